"""The MoE layer, and what the whole model counts: every token once, padding never."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek.models.components.balance import router_z, sequence_balance
from deepseek.models.components.block import build_moe
from deepseek.models.components.lora import LoraExperts
from deepseek.models.components.moe import MoE
from deepseek.models.transformer import Transformer
from deepseek.ops import grouped_linear
from deepseek.ops.cross_entropy import IGNORE_INDEX
from deepseek.ops.native import build
from support.device_waits import watched
from support.tiny_models import (
    Batch,
    assert_same,
    backward,
    gradients,
    loads,
    random_batch,
    start_step,
    tiny_config,
    tiny_model,
)


def moe(dtype: torch.dtype = torch.float64, **changes: object) -> MoE:
    layer = build_moe(tiny_config(**changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
        if layer.gate.bias is not None:
            layer.gate.bias.normal_(-0.5, 0.4, generator=generator)
    return layer.to(dtype)


def inputs(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, length, 16, generator=generator, dtype=torch.float64)


# -- the layer --


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(n_shared_experts=0),
        dict(n_shared_experts=2, routed_scaling_factor=2.5),
        dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
        dict(n_routed_experts=6, n_group=3, topk_group=2, num_experts_per_tok=3),
        dict(num_experts_per_tok=4),
    ],
)
def test_equals_a_loop_over_tokens(changes: dict[str, object]) -> None:
    layer = moe(**changes)
    x_BSD = inputs(2, 5)
    with torch.no_grad():
        got = layer(x_BSD).flatten(0, 1)
        routing = layer.gate(x_BSD.flatten(0, 1))
        singles = [layer.experts.expert(index) for index in range(layer.gate.num_experts)]
        for token, x_D in enumerate(x_BSD.flatten(0, 1)):
            pairs = zip(routing.expert_ids_TK[token], routing.weights_TK[token], strict=True)
            wanted = sum(weight * singles[int(expert)](x_D) for expert, weight in pairs)
            if layer.shared_experts is not None:
                wanted = wanted + layer.shared_experts(x_D)
            torch.testing.assert_close(got[token], wanted, rtol=1e-10, atol=1e-11)


def test_shared_experts() -> None:
    """One SwiGLU of n_shared * F hidden, unweighted; none for 0."""
    assert moe(n_shared_experts=0).shared_experts is None
    assert moe(n_shared_experts=3).shared_experts.w1.weight.shape == (3 * 8, 16)


def test_the_value_is_the_same_with_balance_losses() -> None:
    layer = moe()
    x_BSD = inputs(2, 5)
    assert torch.equal(layer(x_BSD), layer(x_BSD, balance_scale=torch.tensor(1.0)))


def layer_gradients(layer: MoE, x_BSD: Tensor, scale: float | None) -> dict[str, Tensor]:
    layer.zero_grad()
    layer(
        x_BSD, balance_scale=None if scale is None else torch.tensor(scale)
    ).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


def balance_gradient(layer: MoE, x_BSD: Tensor, scale: float) -> Tensor:
    """Gradient of both balance losses alone, by autograd on their definition."""
    routing = layer.gate(x_BSD.flatten(0, 1))
    real_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool)
    shape = (*real_BS.shape, -1)
    loss = layer.balance_coeff * sequence_balance(routing.scores_TE.view(shape), 2, real_BS)
    loss = loss + layer.z_coeff * router_z(routing.logits_TE.view(shape), real_BS)
    return torch.autograd.grad(loss * scale, layer.gate.weight)[0]


@pytest.mark.parametrize(("balance", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_balance_losses_reach_the_router_alone(balance: float, z: float) -> None:
    layer = moe(moe_aux_loss_coeff=balance, moe_z_loss_coeff=z)
    x_BSD = inputs(2, 5)
    without, with_them = (layer_gradients(layer, x_BSD, scale) for scale in (None, 0.5))
    added = with_them.pop("gate.weight") - without.pop("gate.weight")
    if balance or z:
        wanted = balance_gradient(layer, x_BSD, 0.5)
        torch.testing.assert_close(added, wanted, rtol=1e-8, atol=1e-12)
        assert added.abs().max() > 1e-4
    else:
        assert not added.any()
    assert_same(with_them, without, tolerance=0)


def test_what_is_counted_and_when() -> None:
    layer = moe()
    x_BSD = inputs(2, 5)
    real_BS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    ids = layer.gate(x_BSD.flatten(0, 1)).expert_ids_TK[real_BS.flatten()].flatten()
    wanted = torch.bincount(ids, minlength=4)

    output = layer(x_BSD, real_BS, torch.tensor(0.125))
    assert not layer.gate.tokens_per_expert.any(), "counted by the forward pass"
    output.sum().backward()
    assert torch.equal(layer.gate.tokens_per_expert, wanted)
    assert layer.gate.balance_loss > 0

    layer(x_BSD, real_BS).sum().backward()
    with torch.no_grad():
        layer(x_BSD, real_BS, torch.tensor(0.125))
    assert torch.equal(layer.gate.tokens_per_expert, wanted), "counted without training"


def test_no_mask_means_all_real() -> None:
    found = []
    for real_BS in (None, torch.ones(2, 5, dtype=torch.bool)):
        layer = moe()
        layer(inputs(2, 5), real_BS, torch.tensor(1.0)).sum().backward()
        found.append((layer.gate.tokens_per_expert.tolist(), layer.gate.balance_loss.item()))
    assert found[0] == found[1] and sum(found[0][0]) == 2 * 5 * 2


def test_an_unchosen_expert_gets_a_zero_gradient() -> None:
    layer = moe()
    layer.gate.bias.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0]))
    layer(inputs(2, 5), balance_scale=torch.tensor(1.0)).sum().backward()
    assert layer.gate.tokens_per_expert.tolist() == [10, 10, 0, 0]
    assert not layer.experts.w1.grad[2:].any() and layer.experts.w1.grad[:2].any()


class PoisonedProduct(torch.autograd.Function):
    """``grouped_mm`` as Blackwell may do it: what no row decides is NaN.

    That is the weight gradient of a group without rows, and every row behind the last group's.
    """

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EIO: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI, w_EIO)
        ctx.groups = list(pairwise([0, *ends]))
        y_RO = x_RI.new_full((x_RI.shape[0], w_EIO.shape[2]), torch.nan)
        for (start, end), w_IO in zip(ctx.groups, w_EIO, strict=True):
            y_RO[start:end] = x_RI[start:end] @ w_IO
        return y_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, w_EIO = ctx.saved_tensors
        grad_x_RI, grad_w_EIO = (torch.full_like(tensor, torch.nan) for tensor in (x_RI, w_EIO))
        for expert, (start, end) in enumerate(ctx.groups):
            grad_x_RI[start:end] = grad_RO[start:end] @ w_EIO[expert].T
            if end > start:
                grad_w_EIO[expert] = x_RI[start:end].T @ grad_RO[start:end]
        return grad_x_RI, grad_w_EIO, None


@pytest.mark.parametrize("adapters", [False, True])
def test_nothing_undefined_reaches_a_gradient(
    monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    """Experts without a row, one of them the last, and adapters of theirs; without kernels."""
    monkeypatch.setattr(build, "_library", lambda: "switched off")
    found = []
    for poisoned in (False, True):
        if poisoned:
            product = lambda x, w, offs: PoisonedProduct.apply(x, w, offs.tolist())  # noqa: E731
            monkeypatch.setattr(grouped_linear.F, "grouped_mm", product)
        layer = moe(torch.float32)
        if adapters:
            layer.experts = LoraExperts(4, 16, 8, ("w1", "w2"), 4, 2.0)
            for parameter in layer.experts.parameters():
                nn.init.normal_(parameter, 0.0, 0.4, torch.Generator().manual_seed(0))
        layer.gate.bias.copy_(torch.tensor([-5.0, 5.0, 5.0, -5.0]))
        x_BSD = inputs(2, 5).float().requires_grad_()
        layer(x_BSD, balance_scale=torch.tensor(1.0)).square().sum().backward()
        assert layer.gate.tokens_per_expert.tolist() == [0, 10, 10, 0]
        found.append({"x": x_BSD.grad} | {n: p.grad for n, p in layer.named_parameters()})
    torch.testing.assert_close(found[1], found[0])


def test_autocast_is_near_fp32() -> None:
    layer = moe(torch.float32)
    x_BSD = inputs(2, 5).float()
    exact = layer(x_BSD, balance_scale=torch.tensor(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x_BSD, balance_scale=torch.tensor(1.0))
    difference = (got - exact).abs().max() / exact.abs().max()
    assert 1e-5 < difference < 4e-2


@pytest.mark.parametrize("num_shared", [0, 1])
def test_a_layer_waits_for_no_number_of_the_device(num_shared: int) -> None:
    """Forward and backward; dims and dtype for which the grouped product does not wait either."""
    layer = moe(torch.float32, n_shared_experts=num_shared)
    x_BSD = inputs(2, 5).float().requires_grad_()
    scale = torch.tensor(0.5)
    watch = watched(lambda: layer(x_BSD, balance_scale=scale).sum().backward())
    assert watch.calls > 100, "the watch saw nothing"
    assert not watch.waits


def test_the_watch_sees_waits() -> None:
    ones = torch.ones(3, dtype=torch.int64)
    waits: dict[str, Callable[[], object]] = {
        "item": lambda: int(ones.sum()),
        "list": lambda: ones.tolist(),
        "repeats": lambda: ones.repeat_interleave(ones),
        "mask": lambda: ones[ones > 0],
        "bincount": lambda: torch.bincount(ones),
        "fp64": lambda: moe()(inputs(1, 2)),  # a loop over experts
    }
    assert [name for name, wait in waits.items() if not watched(wait).waits] == []
    assert not watched(lambda: ones.repeat_interleave(ones, output_size=3)).waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_layer_waits_for_nothing_on_a_gpu() -> None:
    layer = moe(torch.bfloat16).cuda()
    x_BSD = inputs(2, 5).bfloat16().cuda().requires_grad_()
    scale = torch.tensor(0.5, device="cuda")
    layer(x_BSD, balance_scale=scale).sum().backward()  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x_BSD, balance_scale=scale).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# -- the whole model --


def padded(batch: Batch, columns: int, rows: int, token: int) -> Batch:
    """The same batch with padding behind every sequence and whole rows of it."""
    sequences, length = batch.tokens.shape
    shape = (sequences + rows, length + columns)
    out = Batch(
        torch.full(shape, token),
        torch.full(shape, IGNORE_INDEX),
        None if batch.documents is None else torch.full(shape, -1),
        torch.zeros(shape, dtype=torch.bool),
    )
    for name in ("tokens", "labels", "documents", "real"):
        source = getattr(batch, name)
        if source is not None:
            getattr(out, name)[:sequences, :length] = source
    return out


def isolated(batch: Batch) -> Batch:
    """Two documents a sequence; labels end at the border."""
    documents = torch.zeros_like(batch.tokens)
    documents[:, 3:] = 1
    labels = batch.labels.clone()
    labels[:, 2] = IGNORE_INDEX
    return Batch(batch.tokens, labels, documents, batch.real)


def seen(model: Transformer, batch: Batch, cuts: list[int] | None = None) -> dict[str, Tensor]:
    """All that a step leaves behind: loss, counts, balance losses, gradients, biases."""
    start_step(model)
    found = {"loss": backward(model, batch, cuts)} | gradients(model)
    for name, router in model.routers().items():
        found |= {f"{name} counts": router.tokens_per_expert.double()}
        found |= {f"{name} balance": router.balance_loss.clone()}
        if router.bias is not None:
            before = router.bias.clone()
            router.update_bias(router.tokens_per_expert, 0.01)
            found |= {f"{name} bias": router.bias.clone()}
            router.bias.copy_(before)
    return found


@pytest.mark.parametrize("token", [0, 5])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("depths", [0, 2])
def test_padding_is_never_counted(depths: int, documents: bool, token: int) -> None:
    """Padding behind sequences and whole rows of it change nothing, whatever id it holds."""
    model = tiny_model(tiny_config(num_nextn_predict_layers=depths))
    batch = random_batch()
    batch = isolated(batch) if documents else batch
    wanted = seen(model, batch)
    for columns, rows in ((3, 0), (0, 2), (2, 1)):
        assert_same(seen(model, padded(batch, columns, rows, token)), wanted, tolerance=1e-6)


@pytest.mark.parametrize("depths", [0, 2])
def test_micro_batches_change_nothing(depths: int) -> None:
    model = tiny_model(tiny_config(num_nextn_predict_layers=depths))
    batch = random_batch(sequences=5)
    batch.labels[0] = IGNORE_INDEX  # a micro-batch without any label
    batch.labels[1, 1:] = IGNORE_INDEX  # and one with a single label
    wanted = seen(model, batch)
    for cuts in ([1, 1, 1, 1, 1], [2, 3], [4, 1]):
        assert_same(seen(model, batch, cuts), wanted, tolerance=1e-6)


def test_recomputation_counts_once() -> None:
    """The forward pass runs twice, and gradients and counts are bitwise those of one run."""
    for depths in (0, 2):
        found = []
        for granularity, number in ((None, None), ("full", None), ("selective", None), ("full", 1)):
            changes = dict(
                activations_checkpoint_granularity=granularity,
                activations_checkpoint_num_layers=number,
            )
            config = tiny_config(num_nextn_predict_layers=depths, **changes)
            found.append(seen(tiny_model(config, torch.float32), random_batch(), [1, 1]))
        for other in found[1:]:
            assert_same(other, found[0], tolerance=0)


def test_recomputation_runs_the_forward_pass_twice() -> None:
    """Otherwise the test above would prove nothing."""
    calls = []
    for granularity, number in ((None, None), ("full", None), ("selective", None), ("full", 1)):
        changes = dict(
            activations_checkpoint_granularity=granularity,
            activations_checkpoint_num_layers=number,
        )
        model = tiny_model(tiny_config(**changes))
        hook = model.layers["1"].ffn.gate.register_forward_hook(lambda *_: calls.append(1))
        backward(model, random_batch())
        hook.remove()
        calls.append(0)
    assert calls == [1, 0, 1, 1, 0, 1, 1, 0, 1, 0], "with a number of 1, the second block keeps all"


@pytest.mark.parametrize("granularity", [None, "full"])
def test_the_bias_goes_the_same_way_for_any_micro_batch(granularity: str | None) -> None:
    """Six steps of training, cut three ways: the same loads and biases after each step."""
    ways = []
    for cuts in ([4], [1, 3], [1, 1, 1, 1]):
        config = tiny_config(activations_checkpoint_granularity=granularity)
        model = tiny_model(config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        way = []
        for step in range(6):
            start_step(model)
            backward(model, random_batch(sequences=4, seed=step), cuts)
            optimizer.step()
            for router in model.routers().values():
                router.update_bias(router.tokens_per_expert, 0.05)
            biases = {name: router.bias.tolist() for name, router in model.routers().items()}
            way.append((loads(model), biases))
        ways.append(way)
    assert ways[0] == ways[1] == ways[2]
    assert ways[0][0] != ways[0][5]


def test_each_step_counts_every_assignment() -> None:
    model = tiny_model(tiny_config(num_hidden_layers=3))
    backward(model, random_batch(sequences=3, length=6), [1, 2])
    assert {name: sum(counts) for name, counts in loads(model).items()} == {
        "layers.1": 3 * 6 * 2,
        "layers.2": 3 * 6 * 2,
    }
