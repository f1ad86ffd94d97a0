"""How many kernels a micro-batch launches, counted in the code that torch's compiler writes.

Nothing is computed: all tensors are torch's fakes, and the code is for CPUs. A GPU's
differs in what is fused, but products, sorts and attention are the same calls.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek.config import load_config
from deepseek.config.layout import StageSlice
from deepseek.config.weights import OUTPUT
from deepseek.models.components.block import DeepSeekBlock, TokenContext
from deepseek.models.transformer import Stage, Transformer
from deepseek.ops import rows

LAUNCH = re.compile(r"(cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(")


class Calls(TorchDispatchMode):
    """Counts those that make or fill a tensor: a kernel each, as nothing is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given, made = _storages((args, kwargs)), _storages(result)
        self.count += (not made <= given or func._schema.is_mutable) and "empty" not in func.name()
        return result


def _storages(tree: Any) -> set[int]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {leaf.untyped_storage()._cdata for leaf in leaves}


def launches(block: DeepSeekBlock, x_BSD: Tensor, context: TokenContext) -> int:
    """Of a compiled block, forward and backward; there may be no break in its graph."""
    # Imported here, since it warns at once.
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    found: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        mode = torch._guards.detect_fake_mode(inputs)
        assert mode is not None
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            compile_fx._recursive_post_grad_passes(graph, is_inference=False)
            lowered = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
            with V.set_graph_handler(lowered):
                lowered.run(*inputs)
                code = lowered.codegen()[0].value
        found.extend(LAUNCH.findall(code[code.index("def call(") :]))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(block.forward, fullgraph=True, backend=backend)(x_BSD, context).sum().backward()
    return len([name for name in found if "empty" not in name])


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own doings
def test_kernels_of_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ``deepseek_v3_base``, forward and backward, blocks compiled: at most 1,500."""
    monkeypatch.setattr(rows, "BLOCK_NUMBERS", 1 << 62)  # blocks of rows are for caches of CPUs
    config = load_config("deepseek_v3_base").model
    dense, depth = config.first_k_dense_replace, config.num_nextn_predict_layers
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        model = Transformer(replace(config, num_hidden_layers=dense + 1))  # of a kind all are alike
        ids_BS = torch.zeros(config.micro_batch_size, config.data.seq_length, dtype=torch.int64)
        scale = torch.ones(())
        context = model.context(ids_BS, real_BS=ids_BS >= 0, balance_scale=scale)
        x_BSD = torch.zeros(*ids_BS.shape, config.hidden_size, requires_grad=True)
        of_dense, of_moe = (launches(model.layers[str(i)], x_BSD, context) for i in (0, dense))
        # 2. all else, which is not compiled
        for block in [*model.layers.values(), *(module.block for module in model.mtp)]:
            block.forward = lambda x_BSD, *others: x_BSD
        stage = Stage(model, StageSlice(range(dense + 1), first=True, output=OUTPUT))
        with Calls() as calls:
            others = ids_BS, ids_BS, ids_BS.int(), scale.expand(len(ids_BS))
            stage(ids_BS, ids_BS, *others).sum().backward()
    blocks = dense * of_dense + (config.num_hidden_layers - dense + depth) * of_moe
    told = {"dense": of_dense, "MoE": of_moe, "others": calls.count, "all": blocks + calls.count}
    print(told)
    assert min(of_dense, of_moe) > 40 and calls.count > 20, told
    assert blocks + calls.count <= 1500, told
