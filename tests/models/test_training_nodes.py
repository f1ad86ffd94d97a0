"""Layers that are one node of autograd's graph on a CPU, against the same layers in fp64, which go
operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.feed_forward import FeedForward, RMSNorm
from deepseek.models.components.moe import MoE
from deepseek.models.components.rope import rotation
from deepseek.models.components.router import Router

Layer = TypeVar("Layer", MultiHeadLatentAttention, FeedForward, MoE)
TOLERANCE = 1e-6
"""Of gradients, of the largest number in each."""


def attention(q_lora_rank: int | None) -> MultiHeadLatentAttention:
    """Three heads of odd sizes."""
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(
        dim=24,
        num_heads=3,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=7,
        norm_eps=1e-6,
        softmax_scale=0.4,
    )
    return filled(layer)


def filled(layer: Layer) -> Layer:
    """Drawn weights, and the norm that a block has before it as ``layer.before``."""
    layer.before = RMSNorm(24, 1e-6)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def attended(layer: MultiHeadLatentAttention, x_BSD: Tensor, isolated: bool) -> Tensor:
    positions_BS = torch.arange(x_BSD.shape[1]).expand(x_BSD.shape[:2])
    angles = rotation(positions_BS, 4, 10000.0, None, x_BSD.dtype)
    documents_BS = (positions_BS >= 5).to(torch.int32) if isolated else None
    return layer.add_to(x_BSD, layer.before, *angles, documents_BS)


def both_passes(layer: nn.Module, compute: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """Result, and gradients of the input and of every weight that has one."""
    x = x.clone().requires_grad_()
    y = compute(layer, x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    assert x.grad is not None
    by_weights = [p.grad for p in layer.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *by_weights]


def compare(layer: nn.Module, compute: Callable[..., Tensor], x: Tensor, node: str) -> None:
    """In fp32 a node of this name, and close to what fp64 gives."""
    y = compute(layer, x.clone().requires_grad_())
    assert y.grad_fn is not None and y.grad_fn.name() == node
    compare_passes(layer, deepcopy(layer).double(), compute, x)


def compare_passes(
    layer: nn.Module, twin: nn.Module, compute: Callable[..., Tensor], x: Tensor
) -> None:
    """Of a layer in fp32 and in fp64."""
    pairs = zip(both_passes(layer, compute, x), both_passes(twin, compute, x.double()), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        largest = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=0, atol=TOLERANCE * (largest + 1))


@pytest.mark.parametrize("q_lora_rank", [None, 9])
@pytest.mark.parametrize("isolated", [False, True])
def test_attention(q_lora_rank: int | None, isolated: bool) -> None:
    compare(
        attention(q_lora_rank),
        lambda layer, x: attended(layer, x, isolated),
        torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(1)),
        "_AttentionBackward",
    )


def test_feed_forward() -> None:
    torch.manual_seed(0)
    layer, x = filled(FeedForward(24, 40)), torch.randn(3, 5, 24)
    compare(layer, lambda layer, x: layer(x), x, "_FeedForwardBackward")
    layer.zero_grad()
    compare(layer, fed, x, "_FeedForwardBackward")


def fed(layer: FeedForward, x_BSD: Tensor) -> Tensor:
    return layer.add_to(x_BSD, layer.before)


def test_what_is_frozen_gets_no_gradient() -> None:
    layers = attention(9), filled(FeedForward(24, 40)), mixture(0.3)
    computes = (lambda layer, x: attended(layer, x, False), fed, mixed)
    for layer, compute in zip(layers, computes, strict=True):
        for frozen in layer.parameters():
            frozen.requires_grad_(False)
            layer.zero_grad()
            whole = both_passes(layer, compute, torch.ones(1, 4, 24))
            assert frozen.grad is None
            assert len(whole) == 1 + len(list(layer.parameters()))
            frozen.requires_grad_(True)


@pytest.mark.parametrize("watched", ["wq", "wkv_a", "kv_norm", "wkv_b", "wo"])
def test_a_module_that_somebody_watches_is_called(watched: str) -> None:
    layer, seen = attention(None), list[Tensor]()
    getattr(layer, watched).register_forward_hook(lambda module, given, y: seen.append(y))
    attended(layer, torch.ones(1, 4, 24), False)
    assert len(seen) == 1


def test_who_watches_all_modules_is_told_of_each() -> None:
    seen = list[nn.Module]()
    handle = register_module_forward_hook(lambda module, given, y: seen.append(module))
    try:
        layers = attention(9), mixture(0.1)
        attended(layers[0], torch.ones(1, 4, 24), False)
        mixed(layers[1], torch.ones(1, 4, 24))
    finally:
        handle.remove()
    assert set(seen) == {module for layer in layers for module in layer.modules()}


def test_a_pass_that_somebody_has_replaced_is_called() -> None:
    layer, x = attention(9), torch.randn(1, 4, 24)
    layer.wo.forward = lambda y: torch.zeros(1, 4, 24)
    assert attended(layer, x, False).equal(x)


def test_sequences_may_share_a_rotation() -> None:
    layer, x = attention(9), torch.randn(3, 5, 24)
    angles = rotation(torch.arange(5).unsqueeze(0), 4, 10000.0, None)
    shared = layer.add_to(x, layer.before, *(angle.expand(3, -1, -1) for angle in angles))
    assert torch.equal(shared, attended(layer, x, False))


def test_the_largest_logits_are_those_of_the_operators() -> None:
    layer, x = attention(None), torch.randn(2, 6, 24)
    layer.largest_logit_N = torch.full((3,), float("-inf"))
    twin = deepcopy(layer).double()
    attended(layer, x, False)
    attended(twin, x.double(), False)
    got, wanted = layer.largest_logit_N, twin.largest_logit_N
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def mixture(coefficient: float, **changes: Any) -> MoE:
    torch.manual_seed(0)
    settings = dict(
        dim=24,
        num_experts=6,
        top_k=2,
        num_groups=3,
        top_k_groups=2,
        scoring="sigmoid",
        topk_method="noaux_tc",
        normalise=True,
        scaling_factor=1.5,
    )
    layer = MoE(
        dim=24,
        hidden_dim=16,
        num_shared_experts=1,
        router=Router(**(settings | changes)),
        balance_coeff=coefficient,
        z_coeff=0.0,
    )
    filled(layer)
    if layer.gate.bias is not None:
        layer.gate.bias.copy_(torch.linspace(-0.2, 0.2, 6))
    return layer


def mixed(layer: MoE, x_BSD: Tensor, real_BS: Tensor | None = None) -> Tensor:
    return layer.add_to(x_BSD, layer.before, real_BS, torch.tensor(0.2))


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scoring": "softmax", "topk_method": "greedy", "normalise": False},
        {"num_groups": 1, "top_k_groups": 1},
    ],
)
def test_mixture(coefficient: float, changes: dict[str, Any]) -> None:
    real_BS = torch.arange(10).view(2, 5) < 8
    layer = mixture(coefficient, **changes)
    twin = deepcopy(layer).double()
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    node = mixed(layer, x.clone().requires_grad_()).grad_fn
    assert node is not None and node.name() == "_MixtureBackward"
    compare_passes(layer, twin, lambda layer, x: mixed(layer, x, real_BS), x)
    one, other = layer.gate, twin.gate
    assert one.tokens_per_expert.equal(other.tokens_per_expert)
    assert one.tokens_per_expert.sum() == 8 * 2
    torch.testing.assert_close(one.balance_loss, other.balance_loss, rtol=1e-6, atol=0)
    assert (one.balance_loss > 0) == (coefficient > 0)


def test_a_token_is_counted_once_where_gradients_of_inputs_and_weights_are_asked_for_apart() -> (
    None
):
    layer, x = mixture(0.3), torch.ones(1, 4, 24, requires_grad=True)
    y = mixed(layer, x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    once = layer.gate.balance_loss.clone()
    torch.autograd.grad(y, layer.gate.weight)
    assert layer.gate.tokens_per_expert.sum() == 4 * 2
    assert once > 0 and torch.equal(layer.gate.balance_loss, once)


def test_a_router_that_somebody_watches_is_called() -> None:
    layer, seen = mixture(0.1), list[Any]()
    layer.gate.register_forward_hook(lambda module, given, y: seen.append(y))
    mixed(layer, torch.ones(1, 4, 24))
    assert len(seen) == 1
