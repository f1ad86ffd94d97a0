"""Names that torch and Lightning do not promise, one test each: a new version fails by the name.

``ARCHITECTURE.md`` has the table: what each is for, and what to do without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules import module

from deepseek.frameworks import Trainer
from deepseek.parallel import cpu_memory
from deepseek.parallel.mesh import placed
from deepseek.parallel.parallelize import give_memory

ARCHITECTURE = Path(__file__).parents[1] / "ARCHITECTURE.md"


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def current_graph_task_id() -> None:
    seen = []
    leaf = torch.ones(1, requires_grad=True)
    doubled = leaf * 2
    doubled.register_hook(lambda grad: seen.append(torch._C._current_graph_task_id()))
    doubled.backward()
    assert torch._C._current_graph_task_id() == -1 and seen != [-1]


def nested_graph_breaks() -> None:
    import torch._dynamo

    assert torch._dynamo.config.nested_graph_breaks in (True, False)


def softmax_backward_data() -> None:
    x = torch.tensor([[0.0, 1.0, 3.0]], requires_grad=True)
    y, grad = x.softmax(-1), torch.tensor([[1.0, 2.0, 5.0]])
    y.backward(grad)
    assert torch.equal(x.grad, torch._softmax_backward_data(grad, y.detach(), -1, x.dtype))


def hooks_of_a_leaf() -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        leaf = torch.ones(1, requires_grad=True)
        assert not leaf._backward_hooks and not leaf._post_accumulate_grad_hooks
        handle = getattr(leaf, register)(lambda _: None)
        assert leaf._backward_hooks or leaf._post_accumulate_grad_hooks
        handle.remove()
        assert not leaf._backward_hooks and not leaf._post_accumulate_grad_hooks


def storage_use_count() -> None:
    tensor = torch.ones(2)

    def users() -> int:
        return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)

    alone, other = users(), tensor.detach()
    assert users() == alone + 1
    del other
    assert users() == alone == 2


def any_global_hook() -> None:
    assert not module._has_any_global_hook()
    handle = module.register_module_forward_hook(lambda *given: None)
    try:
        assert module._has_any_global_hook()
    finally:
        handle.remove()


def mkldnn_linear() -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    product = torch.ops.mkldnn._linear_pointwise
    assert torch.equal(product(x, w, None, "none", [], ""), torch.full((2, 4), 3.0))


def memory_of_parts() -> None:
    with torch.device("meta"):
        linear = torch.nn.Linear(4, 4)
    fully_shard(linear, mesh=init_device_mesh("cpu", (1,)))
    give_memory(linear, torch.device("cpu"))  # type: ignore[arg-type]
    linear.requires_grad_(False).weight.fill_(1.0)
    linear.bias.fill_(2.0)
    assert linear(torch.ones(1, 4)).tolist() == [[6.0] * 4]  # what FSDP gathers is this memory


def dtensor_of_a_spec() -> None:
    whole = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
    made = placed(torch.zeros(2, dtype=torch.bfloat16), whole)
    assert (made.placements, made.shape) == (whole.placements, whole.shape)
    assert made.dtype == made.to_local().dtype == torch.bfloat16 and not made.to_local().any()


def local_shape_and_global_offset() -> None:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = init_device_mesh("cpu", (1,))
    assert compute_local_shape_and_global_offset((4, 3), mesh, [Shard(0)]) == ((4, 3), (0, 0))


def set_pg_timeout() -> None:
    from torch.distributed.distributed_c10d import _set_pg_timeout

    gloo = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    _set_pg_timeout(timedelta(seconds=7))
    assert gloo.options._timeout == timedelta(seconds=7)


def storage_info() -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    names = [field.name for field in dataclasses.fields(_StorageInfo)]
    assert names[:3] == ["relative_path", "offset", "length"]
    assert pickle.loads(pickle.dumps(_StorageInfo("a", 1, 2))) == _StorageInfo("a", 1, 2)


def mem_format_encoding() -> None:
    from torch.distributed.checkpoint.metadata import TensorProperties

    text = pickle.dumps(TensorProperties(torch.float32))
    assert b"_MEM_FORMAT_ENCODING" in text and b"_get_layout" in text


def batch_p2p() -> None:
    name = "_batch_p2p" if hasattr(schedules, "_batch_p2p") else "batch_isend_irecv"
    assert f"{name}(" in inspect.getsource(schedules)


def receive_buffers() -> None:
    """Made when the stage is prepared, filled by the operations, and read by the other two."""
    from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo

    assert "buffer" in inspect.signature(_RecvInfo.__init__).parameters
    for name, attribute in (
        ("get_fwd_recv_ops", "args_recv_info"),
        ("get_bwd_recv_ops", "grad_recv_info"),
        ("_retrieve_recv_activations", "args_recv_info"),
        ("_retrieve_recv_grads", "grad_recv_info"),
    ):
        assert f"self.{attribute}" in inspect.getsource(getattr(_PipelineStageBase, name))
    for name in ("_prepare_forward_infra", "_prepare_backward_infra"):
        assert callable(getattr(PipelineStage, name))


def custom_collectives() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_api as api

    for theirs, ours in (
        (api.AllGather, cpu_memory._AllGather),
        (api.ReduceScatter, cpu_memory._ReduceScatter),
    ):
        for method in ("allocate", "__call__"):
            wanted, have = (inspect.signature(getattr(c, method)) for c in (theirs, ours))
            assert list(wanted.parameters) == list(have.parameters), method
    for setter in ("set_custom_all_gather", "set_custom_reduce_scatter"):
        assert callable(getattr(FSDPModule, setter))


def unit_hooks() -> None:
    """What makes a unit of FSDP gather can be moved to another module."""
    inner, outer = torch.nn.Linear(2, 2), torch.nn.Sequential()
    outer.append(inner)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(inner, mesh=mesh)
    state = inner._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    assert not inner._forward_pre_hooks and not inner._forward_hooks
    outer.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    outer.register_forward_hook(state._post_forward)
    fully_shard(outer, mesh=mesh)
    outer(torch.ones(1, 2)).sum().backward()
    assert inner.weight.grad is not None and inner.weight.grad.full_tensor().shape == (2, 2)


def trainer() -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def signal_connector() -> None:
    made = trainer()
    assert callable(made._signal_connector.register_signal_handlers)
    made._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def optim_step_progress() -> None:
    loop = trainer().fit_loop.epoch_loop
    step = loop.manual_optimization.optim_step_progress
    step.total.ready = step.total.completed = 5
    loop.batch_progress.total.ready = loop.batch_progress.total.completed = 3
    assert loop.total_batch_idx == 2
    source = inspect.getsource(type(loop).global_step.fget)  # type: ignore[attr-defined]
    assert "lightning_module.automatic_optimization" in source
    assert "manual_optimization.optim_step_progress.total.completed" in source


def overlapped_passes() -> None:
    runtime = schedules._PipelineScheduleRuntime
    for name, arguments in {
        "_assert_unsharded": ["stage"],
        "_maybe_get_loss": ["stage", "mb_index"],
        "_maybe_compute_loss": ["stage", "output", "target_mbs", "mb_index", "loss_kwargs"],
        "register_custom_function": ["computation_type", "custom_function"],
    }.items():
        assert list(inspect.signature(getattr(runtime, name)).parameters)[1:] == arguments, name
    source = inspect.getsource(runtime)
    for name in ("fwd_recv_ops", "bwd_recv_ops", "backward_counter", "_n_microbatches"):
        assert f"self.{name}" in source, name
    assert {"set_local_fwd_input", "set_local_bwd_input", "get_local_bwd_output"} <= set(
        dir(PipelineStage)
    )
    assert callable(schedules._wait_batch_p2p)


NAMES: dict[str, Callable[[], None]] = {
    "torch._C._current_graph_task_id": current_graph_task_id,
    "torch._dynamo.config.nested_graph_breaks": nested_graph_breaks,
    "torch._softmax_backward_data": softmax_backward_data,
    "torch.ops.mkldnn._linear_pointwise": mkldnn_linear,
    "Tensor._backward_hooks, ._post_accumulate_grad_hooks": hooks_of_a_leaf,
    "torch._C._storage_Use_Count": storage_use_count,
    "torch.nn.modules.module._has_any_global_hook": any_global_hook,
    "nn.Module._apply": memory_of_parts,
    "DTensor(local, tensor._spec)": dtensor_of_a_spec,
    "tensor._utils.compute_local_shape_and_global_offset": local_shape_and_global_offset,
    "distributed_c10d._set_pg_timeout": set_pg_timeout,
    "checkpoint.filesystem._StorageInfo": storage_info,
    "metadata._MEM_FORMAT_ENCODING, serialization._get_layout": mem_format_encoding,
    "pipelining.schedules._batch_p2p": batch_p2p,
    "PipelineStage._prepare_forward_infra, ._prepare_backward_infra, "
    "._retrieve_recv_activations, ._retrieve_recv_grads": receive_buffers,
    "_PipelineScheduleRuntime._assert_unsharded, ._maybe_get_loss, ._maybe_compute_loss, "
    ".register_custom_function": overlapped_passes,
    "FSDPModule.set_custom_all_gather, .set_custom_reduce_scatter": custom_collectives,
    "FSDPState._pre_forward, ._post_forward and the handles of their hooks": unit_hooks,
    "Trainer._signal_connector.register_signal_handlers": signal_connector,
    "epoch_loop.manual_optimization.optim_step_progress": optim_step_progress,
}


@pytest.mark.framework
@pytest.mark.parametrize("name", NAMES)
def test_private_name(name: str) -> None:
    NAMES[name]()


def test_the_table_has_every_name() -> None:
    table = ARCHITECTURE.read_text().partition("## Private names")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.M) == list(NAMES)
