"""Stacked experts against the readable single expert."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.models.components.feed_forward import Expert
from deepseek.models.components.moe import GroupedExperts
from deepseek.ops.grouped_linear import grouped_linear
from deepseek.ops.native import build
from support.kernels import without_kernels


def experts(
    num_experts: int, dtype: torch.dtype, dim: int = 8, hidden_dim: int = 12
) -> GroupedExperts:
    stack = GroupedExperts(num_experts, dim, hidden_dim).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return stack


def rows(count: int, dtype: torch.dtype, dim: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, dim, generator=generator).to(dtype).requires_grad_()


def weighted(stack: GroupedExperts, rows_RD: Tensor, counts_e: Tensor) -> Tensor:
    """With weights of 1."""
    dtype = torch.float64 if rows_RD.dtype == torch.float64 else torch.float32
    return stack(rows_RD, torch.ones(len(rows_RD), dtype=dtype), counts_e)


def one_by_one(singles: list[Expert], rows_RD: Tensor, counts: list[int]) -> Tensor:
    pieces = rows_RD.split(counts)
    return torch.cat([single(piece) for single, piece in zip(singles, pieces, strict=True)])


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_single_experts(counts: list[int], dtype: torch.dtype) -> None:
    stack = experts(len(counts), dtype)
    singles = [stack.expert(index) for index in range(len(counts))]
    rows_RD, twin_RD = rows(sum(counts), dtype), rows(sum(counts), dtype)
    got, wanted = (
        weighted(stack, rows_RD, torch.tensor(counts)),
        one_by_one(singles, twin_RD, counts),
    )
    tolerance = (
        dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-11, atol=1e-11)
    )
    torch.testing.assert_close(got, wanted, **tolerance)

    upstream = torch.linspace(-1, 1, got.numel()).view_as(got).to(dtype)
    got.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(rows_RD.grad, twin_RD.grad, **tolerance)
    for name in ("w1", "w2", "w3"):
        stacked = getattr(stack, name).grad
        for index, single in enumerate(singles):
            alone = getattr(single, name).weight.grad
            alone = torch.zeros_like(stacked[index]) if alone is None else alone
            torch.testing.assert_close(stacked[index], alone, **tolerance)


@pytest.mark.parametrize("counts", [[0, 0, 0], [7, 0, 0], [0, 0, 1], [1, 1, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_idle_experts(counts: list[int], dtype: torch.dtype) -> None:
    """No row for some, or for any: right values, and a zero gradient rather than none."""
    stack = experts(3, dtype, hidden_dim=16)
    rows_RD = rows(sum(counts), dtype)
    got = weighted(stack, rows_RD, torch.tensor(counts))
    assert got.shape == (sum(counts), 8) and got.dtype == dtype
    wanted = one_by_one([stack.expert(index) for index in range(3)], rows_RD, counts)
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2)
    got.sum().backward()
    for parameter in stack.parameters():
        assert parameter.grad is not None
        for gradient, count in zip(parameter.grad, counts, strict=True):
            assert bool(gradient.any()) == (count > 0)


@pytest.mark.parametrize("kernels", [True, False])
def test_rows_are_padded_where_products_ask_for_it(kernels: bool) -> None:
    """Our own kernels ask for nothing: neither zeros between rows nor rows for idle experts."""
    counts_e, seen = torch.tensor([3, 0, 18]), []

    def product(x_RI: Tensor, w_EOI: Tensor, counts_e: Tensor) -> Tensor:
        seen.append((len(x_RI), counts_e.tolist()))
        return grouped_linear(x_RI, w_EOI, counts_e)

    stack = experts(3, torch.float32)
    stack.grouped = product
    with nullcontext() if kernels else without_kernels():
        weighted(stack, rows(21, torch.float32), counts_e)
    assert seen == 3 * [(21, [3, 0, 18]) if kernels else (64, [16, 16, 32])]


class _Poisoned(torch.autograd.Function):
    """``grouped_mm`` as Blackwell's may be: an empty group has any weight gradient, and rows of no
    group hold anything, forward and backward (pytorch issues 172439 and 193633)."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EIO: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, w_EIO)
        ctx.ends = offs.tolist()
        y_RO = x_RI.new_full((x_RI.shape[0], w_EIO.shape[2]), torch.nan)
        for expert, rows_of in enumerate(map(slice, [0, *ctx.ends], ctx.ends)):
            y_RO[rows_of] = x_RI[rows_of] @ w_EIO[expert]
        return y_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, w_EIO = ctx.saved_tensors
        grad_RI = torch.full_like(x_RI, torch.nan)
        grad_EIO = torch.full_like(w_EIO, torch.nan)
        for expert, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
            grad_RI[start:end] = grad_RO[start:end] @ w_EIO[expert].T
            if end > start:
                grad_EIO[expert] = x_RI[start:end].T @ grad_RO[start:end]
        return grad_RI, grad_EIO, None


@pytest.mark.parametrize("counts", [[0, 5, 0, 17], [0, 0, 0, 16], [3, 0, 0, 0]])
def test_what_kernels_leave_in_empty_groups_and_rows_reaches_nothing(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without kernels of ours."""
    monkeypatch.setattr(build, "_library", lambda: "switched off")

    def gradients() -> list[Tensor]:
        stack, rows_RD = experts(4, torch.float32), rows(sum(counts), torch.float32)
        weights_R = torch.linspace(0.1, 1, sum(counts)).requires_grad_()
        y_RD = stack(rows_RD, weights_R, torch.tensor(counts))
        y_RD.square().sum().backward()
        return [y_RD, rows_RD.grad, weights_R.grad, *(p.grad for p in stack.parameters())]

    sound = gradients()
    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: _Poisoned.apply(x, w, offs))
    for got, wanted in zip(gradients(), sound, strict=True):
        torch.testing.assert_close(got, wanted)
    # And it is poison: with the counts as they are, it gets through.
    stack = experts(4, torch.float32)
    x_RD = rows(sum(counts) + 40, torch.float32)
    grouped_linear(x_RD, stack.w1, torch.tensor(counts)).nan_to_num().sum().backward()
    assert stack.w1.grad.isnan().any() and x_RD.grad.isnan().any()


def test_autocast() -> None:
    """Products in bf16, gradients of the weights in fp32, values near the exact ones."""
    stack = experts(2, torch.float32, hidden_dim=16)
    rows_RD = rows(9, torch.float32)
    counts_e = torch.tensor([4, 5])
    exact = weighted(stack, rows_RD, counts_e)
    with torch.autocast("cpu", torch.bfloat16):
        got = weighted(stack, rows_RD, counts_e)
    assert got.dtype == torch.bfloat16
    difference = (got.float() - exact).abs().max()
    assert 1e-5 < difference / exact.abs().max() < 3e-2
    got.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in stack.parameters())
    assert rows_RD.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """A token's bits stay whatever else its expert, or another expert, has to do."""
    stack = experts(3, dtype)
    pool_RD = rows(100, dtype).detach()
    generator = torch.Generator().manual_seed(1)
    alone = weighted(stack, pool_RD[:1], torch.tensor([0, 1, 0]))
    for _ in range(20):
        before, in_front, behind, after = torch.randint(0, 20, (4,), generator=generator).tolist()
        neighbours_RD = pool_RD[torch.randint(1, 100, (80,), generator=generator)]
        rows_RD = torch.cat(
            (
                neighbours_RD[: before + in_front],
                pool_RD[:1],
                neighbours_RD[before + in_front : before + in_front + behind + after],
            )
        )
        counts_e = torch.tensor([before, in_front + 1 + behind, after])
        assert torch.equal(weighted(stack, rows_RD, counts_e)[before + in_front], alone[0])


def test_a_single_expert_is_a_copy() -> None:
    stack = experts(2, torch.bfloat16)
    single = stack.expert(1)
    assert single.w1.weight.dtype == torch.bfloat16
    for name, shape in (("w1", (12, 8)), ("w2", (8, 12)), ("w3", (12, 8))):
        weight = getattr(single, name).weight
        assert weight.shape == shape and torch.equal(weight, getattr(stack, name)[1])
    with torch.no_grad():
        single.w1.weight.zero_()
    assert stack.w1[1].any()
