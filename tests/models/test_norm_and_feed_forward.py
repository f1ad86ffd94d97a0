"""RMSNorm and SwiGLU by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor

from deepseek.models.components.feed_forward import Expert, FeedForward, RMSNorm
from deepseek.ops import rows as rows_module
from deepseek.ops.rms_norm import rms_norm, rms_norm_slow
from deepseek.ops.swiglu import swiglu, swiglu_slow


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_rms_norm_by_hand() -> None:
    """rms(3, 4) = sqrt(12.5); eps is added to the mean of squares, inside the root."""
    norm = RMSNorm(2, 0.5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))
    got = norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64))
    root = 13.0**0.5
    torch.testing.assert_close(got[0], torch.tensor([6 / root, -4 / root], dtype=torch.float64))
    assert not got[1].any()


@pytest.mark.parametrize("shape", [(1, 6), (5, 6), (2, 3, 6), (0, 6)])
def test_rms_norm_equals_torch(shape: tuple[int, ...]) -> None:
    ours, theirs = RMSNorm(6, 1e-6).double(), torch.nn.RMSNorm(6, 1e-6).double()
    with torch.no_grad():
        ours.weight.copy_(random(6))
        theirs.weight.copy_(random(6))
    results = []
    for norm in (ours, theirs):
        x = random(*shape).requires_grad_()
        y = norm(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).double())
        results.append((y, x.grad, norm.weight.grad))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def gradients(function: Callable[..., Tensor], *inputs: Tensor | float | None) -> list[Tensor]:
    """The result, without gradient and with it, and the gradient of every tensor."""
    with torch.no_grad():
        alone = function(*inputs)
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [alone, y, *[x.grad for x in leaves if isinstance(x, Tensor)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (2, 4, 6), (0, 6)])
@pytest.mark.parametrize("same", [False, True])
def test_rms_norm_equals_its_slow_twin(
    dtype: torch.dtype, shape: tuple[int, ...], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of three rows where dtypes differ; the weight may be wider, or of the same."""
    monkeypatch.setattr(rows_module, "BLOCK_NUMBERS", 18)
    weight_dtype = dtype if same else torch.promote_types(dtype, torch.float32)
    inputs = random(*shape, dtype=dtype), random(6, dtype=weight_dtype) + 1, 1e-3
    fast, slow = (gradients(function, *inputs) for function in (rms_norm, rms_norm_slow))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for got, wanted in zip(fast, slow, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (2, 4, 6), (0, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_equals_its_slow_twin(
    dtype: torch.dtype, shape: tuple[int, ...], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of three rows; weights may be wider, and 0."""
    monkeypatch.setattr(rows_module, "BLOCK_NUMBERS", 18)
    gate, up = random(2, *shape, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.arange(prod(shape[:-1]), dtype=wide).view(*shape[:-1], 1)
    inputs = gate, up, weights if weighted else None
    fast, slow = (gradients(function, *inputs) for function in (swiglu, swiglu_slow))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for got, wanted in zip(fast, slow, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=4 * tolerance)


def test_rms_norm_of_bf16_squares_in_fp32() -> None:
    """200 squared times 512 has no place in bf16's 8 bits, nor in fp16's range."""
    for dtype in (torch.bfloat16, torch.float16):
        x = random(3, 512, dtype=dtype) * 200
        norm = RMSNorm(512, 1e-6).to(dtype)
        got = norm(x)
        assert got.dtype == dtype
        wide = x.double()
        wanted = (wide / wide.square().mean(-1, keepdim=True).sqrt()).to(dtype)
        assert (got.double() - wanted.double()).abs().max() <= 2 * torch.finfo(dtype).eps * 4


def test_rms_norm_keeps_the_dtype_under_autocast() -> None:
    norm = RMSNorm(8, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(random(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
        x = random(2, 8, dtype=torch.float32)
        assert torch.equal(norm(x), RMSNorm(8, 1e-6)(x))


def test_feed_forward() -> None:
    """w2 (silu(w1 x) * w3 x): w1 is the gate, w3 the up and w2 the down projection."""
    feed_forward = FeedForward(4, 6).double()
    assert {name: tuple(p.shape) for name, p in feed_forward.named_parameters()} == {
        "w1.weight": (6, 4),
        "w2.weight": (4, 6),
        "w3.weight": (6, 4),
    }
    x = random(2, 3, 4)
    gate, up = x @ feed_forward.w1.weight.T, x @ feed_forward.w3.weight.T
    wanted = (gate / (1 + torch.exp(-gate)) * up) @ feed_forward.w2.weight.T
    torch.testing.assert_close(feed_forward(x), wanted)


def test_an_expert_is_a_feed_forward() -> None:
    expert, feed_forward = Expert(4, 6), FeedForward(4, 6)
    feed_forward.load_state_dict(expert.state_dict())
    x = random(5, 4, dtype=torch.float32)
    assert torch.equal(expert(x), feed_forward(x))
