"""The Lightning strategies, for PyTorch Lightning and NeMo: processes and meshes, nothing more.

How the model is spread is the module's own business (``configure_model``), and checkpoints are
written by ``deepseek.checkpoint.callback.Checkpointing``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.layout import Layout
from deepseek.console import complain
from deepseek.frameworks import pl
from deepseek.launch.processes import Processes, check_world, join
from deepseek.launch.supervisor import supervise, worker_command
from deepseek.parallel.mesh import Meshes

_environments = importlib.import_module(f"{pl.__name__}.plugins.environments")
_OWN_CHECKPOINTS = (
    "checkpoints of a sharded model are written and read by the callback "
    "deepseek.checkpoint.callback.Checkpointing: use it, with Trainer(enable_checkpointing=False) "
    "and without ckpt_path"
)


class OneProcess(pl.strategies.SingleDeviceStrategy):  # type: ignore[misc, name-defined]
    """A run of a ``DeepSeekModel`` without other ranks."""

    def batch_to_device(
        self, batch: Mapping[str, Tensor], device: Any = None, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Lightning's own asks three hooks, and looks for tensors in whatever a batch may be, which
        takes longer than to move the few that there are."""
        to = self.root_device
        return {name: tensor.to(to, non_blocking=True) for name, tensor in batch.items()}


class DeepSeekStrategy(pl.strategies.ParallelStrategy):  # type: ignore[misc, name-defined]
    """Joins the processes and makes the meshes; never moves or wraps the model.

    Processes come from torchrun or our supervisor. Without either and with ``Trainer(devices=N)``,
    N > 1, the script becomes the supervisor of N processes that run it.

    Args:
        layout_of: the layout for a world size; or a layout.
        timeout: of every collective.
        step_timeout: of those of a step, after the first; None: the same.
        max_restarts: how often a supervisor of our own starts the processes anew.
        processes: this process; read from the environment if not given.

    Attributes:
        meshes: from ``setup_environment`` on, thus in ``configure_model``.

    Raises:
        UserError: the environment contradicts itself or the Trainer's devices and nodes.
    """

    def __init__(
        self,
        layout_of: Callable[[int], Layout] | Layout,
        timeout: timedelta = timedelta(minutes=30),
        max_restarts: int = 0,
        processes: Processes | None = None,
        step_timeout: timedelta | None = None,
    ) -> None:
        self.processes = processes or Processes.from_environment()
        super().__init__(cluster_environment=OurEnvironment(self.processes))
        self.layout_of = layout_of
        self.timeout, self.step_timeout = timeout, step_timeout
        self.max_restarts = max_restarts
        self.num_nodes = 1  # the Trainer sets it
        self._meshes: Meshes | None = None

    @property
    def meshes(self) -> Meshes:
        """The meshes; made when the Trainer starts to fit, validate or test."""
        assert self._meshes is not None, "meshes are made by setup_environment"
        return self._meshes

    # -- processes --

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        assert self.parallel_devices is not None
        device = self.parallel_devices[0]
        return torch.device("cuda", self.local_rank) if device.type == "cuda" else device

    @property
    def num_processes(self) -> int:
        """On this node."""
        return len(self.parallel_devices or ())

    @property
    def is_distributed(self) -> bool:
        """Lightning reduces what is logged with ``sync_dist``."""
        return True

    def set_world_ranks(self) -> None:
        """Lightning's own messages come from rank 0 only."""
        pl.utilities.rank_zero.rank_zero_only.rank = self.global_rank

    def _configure_launcher(self) -> None:
        # The Trainer calls this when it has given the strategy its devices and nodes.
        alone = self.processes.started_by == "none" and self.num_nodes == 1
        if alone and self.num_processes > 1:
            self._launcher = SupervisingLauncher(self.num_processes, self.max_restarts)
        else:
            check_world(self.processes, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Join, unless it is done, and make the meshes."""
        super().setup_environment()
        join(self.processes, self.root_device.type, self.timeout)
        if self._meshes is None:
            size = self.processes.world_size
            layout = self.layout_of if isinstance(self.layout_of, Layout) else self.layout_of(size)
            if layout.world_size != size:
                raise UserError(f"the layout is for {layout.world_size} ranks, started are {size}")
            self._meshes = Meshes(layout, self.root_device.type, self.timeout, self.step_timeout)

    def setup(self, trainer: Any) -> None:
        """Optimisers, over the parameters that ``configure_model`` has left."""
        # Lightning's SIGTERM handler broadcasts from wherever the signal struck, in the middle of
        # another collective, too.
        trainer._signal_connector.register_signal_handlers = lambda: None
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Parameters are made where they belong."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Around ``configure_model``: the precision's dtype; the device is the module's choice."""
        with self.precision_plugin.tensor_init_context():
            yield

    def teardown(self) -> None:
        """Leaves the model where it is, and the process group, which lasts as long as the process:
        callbacks and whoever called ``fit`` still need it."""
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    # -- collectives of the framework, over all ranks --

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            on_gpu = self.root_device.type == "cuda"
            dist.barrier(device_ids=[self.root_device.index] if on_gpu else None)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Any object that pickles."""
        if not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """A new tensor; ``reduce_op`` is ``mean``, ``avg``, ``sum``, ``min``, ``max``, or torch's.
        What is no tensor is returned."""
        if not isinstance(tensor, Tensor) or not dist.is_initialized():
            return tensor
        reduced = tensor.detach().clone().to(self.root_device)
        mean = reduce_op in ("mean", "avg", None, dist.ReduceOp.AVG)
        if isinstance(reduce_op, str) and not mean:
            reduce_op = getattr(dist.ReduceOp, reduce_op.upper())
        dist.all_reduce(reduced, dist.ReduceOp.SUM if mean else reduce_op, group=group)
        return reduced / dist.get_world_size(group) if mean else reduced

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """(ranks, *shape); gradients flow through it only if ``sync_grads``."""
        if sync_grads or not dist.is_initialized():
            return super().all_gather(tensor, group, sync_grads)
        own = tensor.detach().to(self.root_device).contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        return torch.stack(parts)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Ranks that share a batch (pipeline and tensor parallel ones) count once."""
        return {"num_replicas": self.meshes.layout.dp, "rank": self.meshes.data_rank}

    # -- checkpoints are not written here --

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Never asked to restore."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Never asked to restore."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: a rank has only its part."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: a rank has only its part."""
        return {}

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Raises ``UserError``: ``Checkpointing`` does it."""
        raise UserError(f"{filepath}: {_OWN_CHECKPOINTS}")

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Raises ``UserError``: ``Checkpointing`` does it."""
        raise UserError(f"{checkpoint_path}: {_OWN_CHECKPOINTS}")


class OurEnvironment(_environments.ClusterEnvironment):  # type: ignore[misc, name-defined]
    """``Processes`` as Lightning asks for them.

    So its own detection, and its requeueing of Slurm jobs, stay out.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return self.processes.main_address

    @property
    def main_port(self) -> int:
        return self.processes.main_port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.processes.world_size

    def set_world_size(self, size: int) -> None:
        """The launcher has decided."""

    def global_rank(self) -> int:
        return self.processes.rank

    def set_global_rank(self, rank: int) -> None:
        """The launcher has decided."""

    def local_rank(self) -> int:
        return self.processes.local_rank

    def node_rank(self) -> int:
        return self.processes.node_rank


class SupervisingLauncher:
    """Where a Trainer would run, runs the same command line in several processes instead, and
    exits with their code."""

    is_interactive_compatible = False

    def __init__(self, num_processes: int, max_restarts: int) -> None:
        self.num_processes = num_processes
        self.max_restarts = max_restarts

    def launch(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Does not return."""
        sys.exit(supervise(worker_command(), self.num_processes, self.max_restarts, complain))

    def kill(self, signum: int) -> None:
        """Signals are passed on by the supervisor itself."""
