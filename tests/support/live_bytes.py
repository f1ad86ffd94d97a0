"""The bytes that a rank holds in a step, told without computing: on fakes.

Every tensor is one of torch's fakes, with a shape and no numbers, and the other ranks are torch's
fake process group, so that a rank of the largest model takes seconds. All else is the product's own
code as it runs on GPUs: TP, EP, FSDP, the schedule of the pipeline, recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import InferenceMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepseek.config.cost import domains_of_token
from deepseek.config.layout import Layout
from deepseek.config.memory import rank_memory
from deepseek.config.schema import ModelConfig
from deepseek.models.components import attention, offload, recompute
from deepseek.models.transformer import Transformer
from deepseek.ops import fp8_linear, grouped_linear, packed
from deepseek.ops import rows as row_ops
from deepseek.parallel import (
    context,
    cpu_exchange,
    cpu_memory,
    expert_dispatcher,
    overlap,
    parallelize,
)
from deepseek.parallel.expert_dispatcher import AllToAllDispatcher
from deepseek.parallel.gradients import finish_gradients
from deepseek.parallel.mesh import Meshes, SingleProcess
from deepseek.parallel.node_dispatcher import NodeDispatcher, NodePlan


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes or fills until it is gone or emptied.

    Attributes:
        peak: bytes.
        host_peak: the same of what is made ``on_host``, which ``peak`` leaves out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._host: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = self.peak = self.host_peak = 0
        self._makes_host = False

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is made here lies in the host's memory."""
        self._makes_host = True
        yield
        self._makes_host = False
        self.host_peak = max(self.host_peak, self._count(self._host))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            # As fakes tell it, at once: it is asked more often than all else is computed.
            asked = args[0]
            in_kernel = asked.fake_mode.in_kernel_invocation
            return torch.device("meta") if in_kernel else asked.fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its local part is seen next
        result = func(*args, **(kwargs or {}))
        made = tree_leaves(result)
        if result is None:  # an operator that fills what FSDP has just given its bytes
            made = tree_leaves((args, kwargs))
        for leaf in made:
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if self._makes_host:
                    self._host[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                if storage._cdata in self._host:
                    continue
                _, before = self._alive.get(storage._cdata, (None, 0))
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._at_most += storage.nbytes() - before
        if self._at_most > self.peak:  # what is gone is looked for only when it matters
            self._at_most = self.count()
            self.peak = max(self.peak, self._at_most)
        return result

    def count(self) -> int:
        """Bytes alive at this moment."""
        return self._count(self._alive)

    @staticmethod
    def _count(known: dict[int, tuple[StorageWeakRef, int]]) -> int:
        for key, (reference, _) in list(known.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del known[key]
            else:
                known[key] = (reference, storage.nbytes())
        return sum(size for _, size in known.values())


@torch.library.custom_op("support::flash", mutates_args=())
def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("on fakes alone")


@_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return v.new_empty(v.shape[0], q.shape[2], v.shape[1], v.shape[3]).transpose(1, 2), rows


class _Attention(torch.autograd.Function):
    """What a flash kernel keeps: inputs, output, one number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, rows = _flash(q, k, v)
        ctx.save_for_backward(q, k, v, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Counts:
    """Every rank of a group gets as many rows as it sends."""

    def __init__(self, received_ne: Tensor, each: int) -> None:
        self._received_ne, self._each = received_ne, each

    def unflatten(self, dim: int, sizes: tuple[int, int]) -> _Counts:
        return _Counts(self._received_ne.unflatten(0, sizes), self._each)

    def sum(self, dim: int) -> _Counts:
        return self

    def tolist(self) -> list[list[int]]:
        return [[self._each] * len(self._received_ne)] * 2

    def __getitem__(self, index: int) -> Tensor:
        return self._received_ne


def _exchange_counts(self: AllToAllDispatcher, expert_ids_R: Tensor) -> Any:
    received_ne = expert_ids_R.new_zeros(self.num_ranks, self.experts_per_rank)
    return _Counts(received_ne, expert_ids_R.numel() // self.num_ranks)


def _node_dispatcher(config: ModelConfig) -> type[NodeDispatcher]:
    """A token's machines are as many as if routing were balanced."""
    sizes = config.num_experts_per_tok, config.n_group, config.topk_group

    class Balanced(NodeDispatcher):
        def plan(self, expert_ids_TK: Tensor) -> NodePlan:
            self._tokens, self._choices = expert_ids_TK.shape
            return super().plan(expert_ids_TK)

        def _both(self, counts: Tensor, group: dist.ProcessGroup) -> Any:
            if group is self.inside:
                return _Counts(counts, self._tokens * self._choices // self.ranks)
            pairs = self._tokens * domains_of_token(self.nodes, *sizes)
            return _Counts(counts, round(pairs / self.nodes))

    return Balanced


class StepBytes(NamedTuple):
    """The most that a rank holds at a time."""

    device: int
    """Optimiser states included."""
    host: int
    """Of activations."""


def step_bytes(
    config: ModelConfig, layout: Layout, rank: int, micro_batches: int, autocast: bool
) -> StepBytes:
    """The most that a rank holds in a step of so many micro-batches.

    Makes a process group: a process can ask for one rank of each layout.
    """
    rows = micro_batches * config.micro_batch_size
    config = replace(config, global_batch_size=rows * layout.dp)
    live, mode = LiveBytes(), FakeTensorMode(allow_non_fake_inputs=True)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        with _as_on_gpus(config, mode, live):
            meshes: Meshes | SingleProcess = SingleProcess()
            if layout.world_size > 1:
                meshes = Meshes(layout, "cpu", timedelta(minutes=1))
                meshes.device_type = "cuda"  # which decides the units of FSDP
            products = torch.bfloat16 if autocast else None
            model, runner = parallelize.parallelize(
                config, meshes, torch.device("cpu"), seed=0, products=products
            )
            with mode, live:
                ids = torch.zeros(rows, config.data.seq_length, dtype=torch.int64)
                batch = {"tokens": ids, "labels": ids, "positions": ids, "documents": ids.int()}
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                    runner.train(batch, lambda sums: sums.sum(), torch.ones(()))
                finish_gradients(model, meshes)
    finally:
        dist.destroy_process_group()
    pp_rank = layout.coordinate(rank).pp
    moments = rank_memory(config, layout, pp_rank, config.optim.name).optimizer
    return StepBytes(live.peak + moments, live.host_peak)


@contextmanager
def _as_on_gpus(config: ModelConfig, mode: FakeTensorMode, live: LiveBytes) -> Iterator[None]:
    """Stand-ins for what asks for numbers, and for kernels of GPUs."""

    units: list[FSDPModule] = []
    shard = parallelize.shard_data_parallel

    def note_units(model: Transformer, stages: Any, *others: Any) -> int:
        count = shard(model, stages, *others)
        units.extend(m for stage in stages for m in stage.modules() if isinstance(m, FSDPModule))
        return count

    def give_memory(model: Transformer, device: torch.device) -> None:
        """The parameters as fakes; ``nn.Module`` cannot swap those of FSDP for such."""
        for module in model.modules():
            for name, tensor in module.named_parameters(recurse=False):
                with mode, live:
                    made = nn.Parameter(_fake(tensor), requires_grad=tensor.requires_grad)
                setattr(module, name, made)
            for name, tensor in module.named_buffers(recurse=False):
                with mode, live:
                    setattr(module, name, torch.empty_like(tensor, device=device))
        for unit in units:
            group = unit._get_fsdp_state()._fsdp_param_group
            for parameter in group.fsdp_params if group is not None else ():
                parameter.reset_sharded_param()

    shapes_of = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(*arguments: Any) -> Any:
        """DTensor tells the shape of a result by computing it on fakes of its own, in whole."""
        with _disable_current_modes():
            return shapes_of(*arguments)

    def warm_up(_: Any, stages: list[Any], *others: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    with_state = overlap._with_state

    def followed(compute: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        """Modes are a thread's own, and the pass beside a backward pass has one."""
        run = with_state(compute, device)

        def beside() -> Any:
            with mode, live:
                return run()

        return beside

    copies = offload._Copy.__init__

    def copy_to_host(self: Any, tensor: Tensor) -> None:
        with live.on_host():
            copies(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload._Copy, "__init__", copy_to_host)
        patch.setattr(overlap, "_with_state", followed)
        # Fakes lie nowhere; what lies in the same place has the same storage.
        patch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
        patch.setattr(Tensor, "data_ptr", lambda tensor: tensor.untyped_storage()._cdata)
        patch.setattr(parallelize, "fill", lambda *_: None)
        patch.setattr(Transformer, "init_weights", lambda *_: None)
        patch.setattr(parallelize, "shard_data_parallel", note_units)
        patch.setattr(cpu_memory, "open_memory", lambda *_: None)
        patch.setattr(cpu_exchange, "_row_memory", lambda *_: None)
        patch.setattr(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen)
        patch.setattr(parallelize, "give_memory", give_memory)
        patch.setattr(schedules._PipelineSchedule, "_warmup_p2p", warm_up)
        patch.setattr(AllToAllDispatcher, "exchange_counts", _exchange_counts)
        patch.setattr(expert_dispatcher, "NodeDispatcher", _node_dispatcher(config))
        patch.setattr(recompute, "ATTENTION", {torch.ops.support.flash.default})
        patch.setattr(row_ops, "BLOCK_NUMBERS", 1 << 62)  # blocks of rows are for caches of CPUs
        patch.setattr(row_ops, "summed", row_ops.combine_rows_slow)  # and so are bags of rows
        for owner in (fp8_linear, packed):  # a CPU looks up a piece at a time
            patch.setattr(owner, "widened", Tensor.to)
        for owner in (attention, context):
            patch.setattr(owner, "causal_attention", lambda q, k, v, *_: _Attention.apply(q, k, v))
        # The product with the first matrix alone: as large, and what it keeps is kept before it is
        # computed, which ends a recomputation. torch's own fake of it takes bf16 alone.
        patch.setattr(grouped_linear.F, "grouped_mm", lambda x, w, offs: x @ w[0])
        yield


def _fake(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return DTensor.from_local(
        torch.empty(tensor.to_local().shape, dtype=tensor.dtype),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
