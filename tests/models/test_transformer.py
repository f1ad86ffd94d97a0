"""The whole model: names, start, gradients, modes, recomputation, meta device."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.config import load_config
from deepseek.models.components import attention
from deepseek.models.components.router import Router
from deepseek.models.transformer import Transformer
from deepseek.ops import document_attention
from deepseek.ops.document_attention import attend_in_blocks
from deepseek.parallel.expert_dispatcher import AllToAllDispatcher
from support.tiny_models import (
    assert_same,
    backward,
    gradients,
    loads,
    random_batch,
    start_step,
    tiny_config,
    tiny_model,
)

# -- names and shapes --


def shapes(**changes: object) -> dict[str, tuple[int, ...]]:
    model = Transformer(tiny_config(**changes))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def attention_names(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}attn_norm.weight": (16,),
        f"{prefix}attn.wq.weight": (2 * 12, 16),
        f"{prefix}attn.wkv_a.weight": (8 + 4, 16),
        f"{prefix}attn.kv_norm.weight": (8,),
        f"{prefix}attn.wkv_b.weight": (2 * (8 + 6), 8),
        f"{prefix}attn.wo.weight": (16, 2 * 6),
        f"{prefix}ffn_norm.weight": (16,),
    }


def moe_names(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}ffn.gate.weight": (4, 16),
        f"{prefix}ffn.gate.bias": (4,),
        f"{prefix}ffn.experts.w1": (4, 8, 16),
        f"{prefix}ffn.experts.w2": (4, 16, 8),
        f"{prefix}ffn.experts.w3": (4, 8, 16),
        f"{prefix}ffn.shared_experts.w1.weight": (2 * 8, 16),
        f"{prefix}ffn.shared_experts.w2.weight": (16, 2 * 8),
        f"{prefix}ffn.shared_experts.w3.weight": (2 * 8, 16),
    }


def test_names_and_shapes() -> None:
    """Checkpoints, conversion tables and shards all speak these names."""
    wanted = {"embed.weight": (23, 16), "norm.weight": (16,), "head.weight": (23, 16)}
    wanted |= attention_names("layers.0.") | attention_names("layers.1.")
    wanted |= {
        "layers.0.ffn.w1.weight": (24, 16),
        "layers.0.ffn.w2.weight": (16, 24),
        "layers.0.ffn.w3.weight": (24, 16),
    }
    wanted |= moe_names("layers.1.")
    for depth in range(2):
        wanted |= {f"mtp.{depth}.{norm}.weight": (16,) for norm in ("enorm", "hnorm", "norm")}
        wanted |= {f"mtp.{depth}.eh_proj.weight": (16, 32)}
        wanted |= attention_names(f"mtp.{depth}.block.") | moe_names(f"mtp.{depth}.block.")
    assert shapes(num_nextn_predict_layers=2, n_shared_experts=2) == wanted


def test_names_of_the_options() -> None:
    plain = shapes()
    with_latent = shapes(q_lora_rank=5)
    assert set(plain) - set(with_latent) == {f"layers.{i}.attn.wq.weight" for i in range(2)}
    added = {name: shape for name, shape in with_latent.items() if name not in plain}
    assert added == {
        f"layers.{i}.attn.{name}.weight": shape
        for i in range(2)
        for name, shape in (("wq_a", (5, 16)), ("q_norm", (5,)), ("wq_b", (24, 5)))
    }
    assert set(plain) - set(shapes(n_shared_experts=0)) == {
        f"layers.1.ffn.shared_experts.{w}.weight" for w in ("w1", "w2", "w3")
    }
    for method in ("greedy", "group_limited_greedy"):
        assert set(plain) - set(shapes(topk_method=method)) == {"layers.1.ffn.gate.bias"}
    assert not [name for name in shapes(first_k_dense_replace=2) if "experts" in name]


def test_parameters_and_buffers() -> None:
    """The correction bias is no parameter: no optimiser may touch or decay it."""
    model = Transformer(tiny_config())
    parameters = {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) - parameters == {"layers.1.ffn.gate.bias"}


def test_routers() -> None:
    model = Transformer(tiny_config(num_hidden_layers=12, num_nextn_predict_layers=1))
    routers = model.routers()
    assert list(routers) == [f"layers.{i}" for i in range(1, 12)] + ["mtp.0.block"]
    assert all(isinstance(router, Router) for router in routers.values())


# -- the start --


def test_weights_depend_on_seed_and_name_alone() -> None:
    """A deeper model, another order of construction, another global seed: the same values."""
    torch.manual_seed(1)
    small = Transformer(tiny_config())
    small.init_weights(5)
    torch.manual_seed(2)
    large = Transformer(
        tiny_config(num_hidden_layers=3, num_nextn_predict_layers=1, n_routed_experts=6)
    )
    constructed = torch.get_rng_state()
    large.init_weights(5)
    assert torch.equal(torch.get_rng_state(), constructed), "the global generator was used"
    large_state = large.state_dict()
    for name, tensor in small.state_dict().items():
        if ".experts." in name:
            assert torch.equal(tensor, large_state[name][:4]), name
        elif ".gate." not in name:
            assert torch.equal(tensor, large_state[name]), name
    again = Transformer(tiny_config())
    again.init_weights(5)
    assert_same(dict(again.state_dict()), dict(small.state_dict()), tolerance=0)


def test_every_matrix_starts_differently() -> None:
    model = Transformer(tiny_config(num_nextn_predict_layers=2))
    model.init_weights(5)
    matrices = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:
            matrices |= {f"{name}.{expert}": weight for expert, weight in enumerate(parameter)}
        elif parameter.dim() == 2:
            matrices[name] = parameter
    firsts = [tuple(weight.flatten()[:4].tolist()) for weight in matrices.values()]
    assert len(set(firsts)) == len(firsts) > 40
    other = Transformer(tiny_config(num_nextn_predict_layers=2))
    other.init_weights(6)
    assert not torch.equal(other.embed.weight, model.embed.weight)


@pytest.mark.parametrize("std", [0.006, 0.02])
def test_standard_deviation(std: float) -> None:
    """Paper section 4.2: 0.006 for every learnable matrix; norms start at 1, biases at 0."""
    config = tiny_config(
        initializer_range=std, hidden_size=64, vocab_size=200, q_lora_rank=32, n_routed_experts=8
    )
    model = Transformer(config)
    for buffer in model.buffers():
        buffer.fill_(3)
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        count = parameter.numel()
        assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count)), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(count), name
        assert parameter.abs().max().item() > 2 * std, name
    for name, buffer in model.named_buffers():
        assert not buffer.any(), name


def test_a_bf16_model_starts_from_the_same_numbers() -> None:
    exact, rounded = Transformer(tiny_config()), Transformer(tiny_config()).bfloat16()
    exact.init_weights(0)
    rounded.init_weights(0)
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16()), name


def test_by_way_of_the_meta_device() -> None:
    with torch.device("meta"):
        made = Transformer(tiny_config(num_nextn_predict_layers=1))
    assert all(tensor.is_meta for tensor in made.state_dict().values())
    made.to_empty(device="cpu")
    made.init_weights(3)
    direct = Transformer(tiny_config(num_nextn_predict_layers=1))
    direct.init_weights(3)
    assert_same(dict(made.state_dict()), dict(direct.state_dict()), tolerance=0)
    assert not any(router.tokens_per_expert.any() for router in made.routers().values())


def test_deepseek_v3_on_the_meta_device() -> None:
    """671 billion parameters, to the last one, without any memory for them."""
    config = load_config("deepseek_v3_671b").model
    start = time.monotonic()
    with torch.device("meta"):
        model = Transformer(replace(config, num_nextn_predict_layers=0))
    assert time.monotonic() - start < 20
    assert sum(parameter.numel() for parameter in model.parameters()) == 671_026_404_352
    assert sum(router.bias.numel() for router in model.routers().values()) == 14_848


# -- forward and backward --


CASES = {
    "plain": {},
    "query_latent_and_mtp": dict(q_lora_rank=5, num_nextn_predict_layers=2),
    "softmax": dict(scoring_func="softmax", topk_method="greedy"),
    "no_shared_expert": dict(n_shared_experts=0),
    "all_moe": dict(first_k_dense_replace=0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("granularity", [None, "full"])
def test_every_parameter_gets_a_gradient(case: str, granularity: str | None) -> None:
    """Not only a tensor: every norm, matrix and expert moves."""
    config = tiny_config(**CASES[case], activations_checkpoint_granularity=granularity)
    model = tiny_model(config)
    for router in model.routers().values():
        if router.bias is not None:
            router.bias.zero_()
    backward(model, random_batch(sequences=8, length=12))
    assert all(min(counts) > 0 for counts in loads(model).values())
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        pieces = gradient if gradient.dim() == 3 else [gradient]
        assert all(piece.any() for piece in pieces), name


@pytest.mark.parametrize("layer", ["0", "1"])
def test_a_block_is_pre_norm_and_residual(layer: str) -> None:
    model = tiny_model(tiny_config())
    block = model.layers[layer]
    context = model.context(random_batch().tokens)
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        rotation = context.cos_BSA, context.sin_BSA
        attended = x_BSD + block.attn(block.attn_norm(x_BSD), *rotation)
        fed = block.ffn(block.ffn_norm(attended))
        assert torch.equal(block(x_BSD, context), attended + fed)


def test_training_equals_evaluation() -> None:
    """No dropout, and no path that only one mode takes."""
    model = tiny_model(tiny_config(num_nextn_predict_layers=1))
    tokens = random_batch().tokens
    outputs = []
    for mode in (True, False):
        model.train(mode)
        states = model.hidden_states(tokens, model.context(tokens))
        outputs.append((model(tokens), states.main_BSD, states.mtp_BSD[0]))
    for train, evaluate in zip(*outputs, strict=True):
        assert torch.equal(train, evaluate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_is_bitwise_the_same(dtype: torch.dtype, autocast: bool) -> None:
    if autocast and dtype == torch.float64:
        return  # bf16-mixed keeps its weights in fp32
    found = []
    for granularity in (None, "full"):
        config = tiny_config(
            num_nextn_predict_layers=1, activations_checkpoint_granularity=granularity
        )
        model = tiny_model(config, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = backward(model, random_batch(sequences=3))
        found.append({"loss": loss} | gradients(model))
    assert_same(found[1], found[0], tolerance=0)


def test_recomputation_keeps_only_the_inputs_of_blocks() -> None:
    kept = []
    for granularity in (None, "full"):
        model = tiny_model(
            tiny_config(num_hidden_layers=4, activations_checkpoint_granularity=granularity)
        )
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = random_batch(sequences=4, length=16).tokens
            model.hidden_states(tokens, model.context(tokens))
        kept.append(sum(tensor.numel() for tensor in saved))
    assert kept[1] < kept[0] / 4


def test_decoding_is_never_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(activations_checkpoint_granularity="full"))

    def forbidden(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("recomputation without a backward pass")

    monkeypatch.setattr("deepseek.models.transformer.recomputed", forbidden)
    with torch.no_grad():
        model(random_batch().tokens)


def test_positions() -> None:
    """None counts from 0; the logits depend on distances alone, so a shift changes nothing."""
    model = tiny_model(tiny_config())
    tokens = random_batch().tokens
    positions = torch.arange(7).expand(2, 7)
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(model(tokens, positions), logits)
        torch.testing.assert_close(model(tokens, positions + 50), logits, rtol=1e-8, atol=1e-9)
        assert (model(tokens, positions * 2) - logits).abs().max() > 1e-3


@pytest.mark.parametrize("grad", [True, False])
def test_positions_and_documents_of_one_row_are_those_of_all(grad: bool) -> None:
    """In fp32, where kernels read angles row by row."""
    model, tokens = tiny_model(tiny_config(), torch.float32), random_batch().tokens
    with torch.set_grad_enabled(grad):
        for documents in (None, torch.tensor([[0, 0, 0, 1, 1, 2, 2]])):
            positions = torch.arange(5, 12).unsqueeze(0)
            every = None if documents is None else documents.expand(2, 7)
            logits = model(tokens, positions.expand(2, 7), every)
            assert torch.equal(model(tokens, positions, documents), logits)


def test_causality() -> None:
    """Logits i change with token j exactly for j <= i."""
    model = tiny_model(tiny_config())
    tokens = random_batch(sequences=1).tokens
    with torch.no_grad():
        before = model(tokens)[0]
        for j in range(7):
            changed = tokens.clone()
            changed[0, j] = (tokens[0, j] + 1) % 23
            same = (model(changed)[0] == before).all(dim=-1).tolist()
            assert same == [i < j for i in range(7)]


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    for dtype in (torch.float32, torch.float64):
        model = tiny_model(tiny_config(), dtype)
        tokens = random_batch(sequences=3).tokens
        other = tokens.clone()
        other[1] = (tokens[1] + 3) % 23
        with torch.no_grad():
            before, after = model(tokens), model(other)
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert not torch.equal(before[1], after[1])


def test_bf16_mixed_is_near_fp32() -> None:
    """Router, norms, loss and weights in fp32; only products are rounded."""
    model = tiny_model(tiny_config(num_nextn_predict_layers=1), torch.float32)
    exact = backward(model, random_batch())
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = backward(model, random_batch())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=3e-2)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


@pytest.mark.filterwarnings("default")  # the compiler warns of its own doings
@pytest.mark.parametrize(
    ("granularity", "fp8"),
    [
        pytest.param(None, None, marks=pytest.mark.nightly),
        ("full", None),
        pytest.param(None, "blockwise", marks=pytest.mark.nightly),
    ],
)
def test_compiled_blocks_equal_eager(
    granularity: str | None, fp8: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph each, in place: no name, no gradient and no count of tokens changes."""
    config = tiny_config(
        moe_intermediate_size=16,
        activations_checkpoint_granularity=granularity,
        fp8_recipe=fp8,
    )
    eager, model = tiny_model(config, torch.float32), tiny_model(config, torch.float32)
    compile_whole = torch.compile
    # traced as always, but run by torch and not by generated code, which takes a C++ compiler
    monkeypatch.setattr(
        torch, "compile", lambda f: compile_whole(f, backend="aot_eager", fullgraph=True)
    )
    with torch._dynamo.config.patch(nested_graph_breaks=False):  # is set back
        model.compile_blocks()
        assert list(model.state_dict()) == list(eager.state_dict())
        for each in (eager, model):
            start_step(each)
            backward(each, random_batch())
    for (name, wanted), got in zip(eager.named_parameters(), model.parameters(), strict=True):
        if fp8 is None:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-6, msg=name)
        else:  # a last bit may round the other way
            assert (got.grad - wanted.grad).norm() <= 1e-3 * wanted.grad.norm(), name
    assert loads(model) == loads(eager)


@pytest.mark.filterwarnings("default")  # the compiler warns of its own doings
def test_blocks_of_documents_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: once a micro-batch, outside of the blocks that are compiled, which take the next
    one's without being traced again. They have what is computed without."""
    config = tiny_config(num_nextn_predict_layers=1)
    model = tiny_model(config, torch.float32)
    made, graphs = [], []
    make, compile_whole = document_attention.document_blocks, torch.compile

    def counted(documents_BM: Tensor, queries: int) -> Any:
        made.append(queries)
        return make(documents_BM, queries)

    def noted(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, *others: Any) -> Tensor:
        *_, blocks = others
        return attend_in_blocks(q, k, v, scale, blocks)

    tokens_BS = random_batch().tokens
    steps = [(torch.arange(tokens_BS.shape[1]) // size).expand_as(tokens_BS) for size in (2, 3, 4)]
    with torch.no_grad():
        wanted = [model.main(tokens_BS, model.context(tokens_BS, None, ids)) for ids in steps]
        monkeypatch.setattr(document_attention, "takes_blocks", lambda device: True)
        monkeypatch.setattr(document_attention, "document_blocks", counted)
        monkeypatch.setattr(attention, "causal_attention", in_blocks)
        monkeypatch.setattr(torch, "compile", lambda f: compile_whole(f, backend=noted))
        with torch._dynamo.config.patch(nested_graph_breaks=False):  # is set back
            model.compile_blocks()
            for number, ids_BS in enumerate(steps):
                context = model.context(tokens_BS, None, ids_BS)
                main_BSD = model.main(tokens_BS, context)
                model.predict_ahead(main_BSD, tokens_BS, context)
                torch.testing.assert_close(main_BSD, wanted[number])
    assert len(made) == len(steps)
    assert len(graphs) == 2, "a dense block and one of experts"
    for operators in graphs:
        assert sum("flex_attention" in name for name in operators) == 1


@pytest.mark.filterwarnings("default")  # the compiler warns of its own doings
def test_a_compiled_block_breaks_where_ranks_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """At dispatch and combine, and nowhere else."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    graphs = []

    def noted(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    try:
        model = tiny_model(tiny_config(), torch.float32)
        block = model.layers["1"]
        assert dist.group.WORLD is not None
        block.ffn.dispatcher = AllToAllDispatcher(model.config.n_routed_experts, dist.group.WORLD)
        compile_whole = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f: compile_whole(f, backend=noted))
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(nested_graph_breaks=False):  # is set back
            model.compile_blocks()
            backward(model, random_batch())
        breaks = torch._dynamo.utils.counters["graph_break"]
        assert sum(breaks.values()) == 2, breaks
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
