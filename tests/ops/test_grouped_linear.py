"""``grouped_linear`` against its loop over experts, by kernels and by grouped_mm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops import grouped_linear as module
from deepseek.ops.grouped_linear import grouped_linear, grouped_linear_loop, takes_any_counts
from support.kernels import without_kernels

TOLERANCE = {
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
}


@pytest.fixture(params=[True, False], ids=["kernels", "grouped_mm"])
def kernels(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether there are any."""
    with nullcontext() if request.param else without_kernels():
        assert takes_any_counts(torch.ones(1, 1)) == request.param
        yield request.param


def tensors(counts: list[int], dims: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (R, I) and weights (E, O, I), with gradient."""
    generator = torch.Generator().manual_seed(len(counts) + sum(counts))
    inputs, outputs = dims
    x_RI = torch.randn(sum(counts), inputs, generator=generator)
    w_EOI = torch.randn(len(counts), outputs, inputs, generator=generator) * inputs**-0.5
    return (t.to(dtype).requires_grad_() for t in (x_RI, w_EOI))  # type: ignore[return-value]


def compare(counts: list[int], dims: tuple[int, int], dtype: torch.dtype) -> None:
    counts_E = torch.tensor(counts)
    results = []
    for function in (grouped_linear, grouped_linear_loop):
        x_RI, w_EOI = tensors(counts, dims, dtype)
        y_RO = function(x_RI, w_EOI, counts_E)
        assert y_RO.shape == (sum(counts), dims[1]) and y_RO.dtype == dtype
        y_RO.backward(torch.linspace(-1, 1, y_RO.numel()).view_as(y_RO).to(dtype))
        results.append((y_RO, x_RI.grad, w_EOI.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **TOLERANCE[dtype])


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    # 1, 3 and 5 are sizes whose rows grouped_mm refuses
    dims=st.tuples(st.sampled_from([1, 3, 4, 8, 20]), st.sampled_from([1, 5, 8, 12])),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_the_loop(
    counts: list[int], dims: tuple[int, int], dtype: torch.dtype, kernels: bool
) -> None:
    compare(counts, dims, dtype)


@pytest.mark.parametrize("counts", [[0, 0], [1], [1, 1, 1], [0, 6, 0], [2, 0, 3]])
@pytest.mark.parametrize("dims", [(8, 8), (8, 16), (12, 8), (3, 5)])
def test_equals_the_loop_in_bf16(counts: list[int], dims: tuple[int, int]) -> None:
    compare(counts, dims, torch.bfloat16)


def test_counts_in_int32(kernels: bool) -> None:
    x_RI, w_EOI = tensors([2, 0, 3], (8, 8), torch.float32)
    y_RO = grouped_linear(x_RI, w_EOI, torch.tensor([2, 0, 3], dtype=torch.int32))
    torch.testing.assert_close(y_RO, grouped_linear_loop(x_RI, w_EOI, torch.tensor([2, 0, 3])))


def test_every_row_meets_its_own_expert(kernels: bool) -> None:
    """The loop itself against one product per row."""
    counts = [2, 0, 3, 1]
    x_RI, w_EOI = tensors(counts, (4, 8), torch.float32)
    owners = [0, 0, 2, 2, 2, 3]
    for function in (grouped_linear, grouped_linear_loop):
        y_RO = function(x_RI, w_EOI, torch.tensor(counts))
        for row, expert in enumerate(owners):
            torch.testing.assert_close(y_RO[row], w_EOI[expert] @ x_RI[row])


def test_expanded_gradient(kernels: bool) -> None:
    """``sum().backward()`` hands back a gradient with zero strides, which grouped_mm refuses."""
    counts = [3, 0, 2]
    gradients = []
    for function in (grouped_linear, grouped_linear_loop):
        x_RI, w_EOI = tensors(counts, (8, 8), torch.float32)
        function(x_RI, w_EOI, torch.tensor(counts)).sum().backward()
        gradients.append((x_RI.grad, w_EOI.grad))
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_no_expert_touch_nothing(dtype: torch.dtype, kernels: bool) -> None:
    """Rows behind the last expert's, whatever they and their gradients hold."""
    counts_E = torch.tensor([3, 0, 2])
    gradients = []
    for rest in (0, 4):
        x_RI, w_EOI = tensors([3, 0, 2], (8, 8), dtype)
        longer_RI = torch.cat((x_RI, x_RI.new_full((rest, 8), torch.nan)))
        y_RO = grouped_linear(longer_RI, w_EOI, counts_E)
        upstream_RO = torch.linspace(-1, 1, 40).view(5, 8).to(dtype)
        y_RO.backward(torch.cat((upstream_RO, x_RI.new_full((rest, 8), torch.nan))))
        gradients.append((y_RO[:5], x_RI.grad, w_EOI.grad))
    for longer, alone in zip(*gradients, strict=True):
        assert torch.equal(longer, alone)


def test_strided_rows(kernels: bool) -> None:
    counts = [3, 2]
    x_RI, w_EOI = tensors(counts, (8, 8), torch.float32)
    strided_RI = x_RI.detach().t().contiguous().t()
    assert not strided_RI.is_contiguous()
    y_RO = grouped_linear(strided_RI, w_EOI, torch.tensor(counts))
    torch.testing.assert_close(y_RO, grouped_linear_loop(x_RI, w_EOI, torch.tensor(counts)))


def test_an_idle_expert_gets_a_zero_gradient(kernels: bool) -> None:
    """Zero and not None: the optimiser and the collectives then treat every expert alike."""
    for counts in ([4, 0, 1], [0, 0, 0]):
        for dtype in (torch.float32, torch.float64):
            x_RI, w_EOI = tensors(counts, (4, 4), dtype)
            grouped_linear(x_RI, w_EOI, torch.tensor(counts)).sum().backward()
            assert w_EOI.grad is not None and not w_EOI.grad[1].any()


def test_without_kernels_one_grouped_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a loop: 1e-3 of the launches with 256 experts."""
    calls = []
    grouped_mm = F.grouped_mm

    def counted(*args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(module.F, "grouped_mm", counted)
    x_RI, w_EOI = tensors([2, 3], (8, 8), torch.float32)
    grouped_linear(x_RI, w_EOI, torch.tensor([2, 3]))
    assert not calls
    with without_kernels():
        grouped_linear(x_RI, w_EOI, torch.tensor([2, 3]))
    assert len(calls) == 1


@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 7, 30, 61]), min_size=1, max_size=5),
    dims=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    data=st.data(),
)
def test_a_row_is_the_same_wherever_it_lies(
    counts: list[int], dims: tuple[int, int], data: st.DataObject
) -> None:
    """Bit by bit, forward and backward: alone, among others, on three threads."""
    x_RI, w_EOI = tensors(counts, dims, torch.float32)
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    upstream_RO = torch.linspace(-1, 1, len(x_RI) * dims[1]).view(-1, dims[1]).sin()

    def passes(rows: slice, counts: list[int]) -> tuple[Tensor, Tensor]:
        part_RI = x_RI[rows].detach().requires_grad_()
        y_RO = grouped_linear(part_RI, w_EOI, torch.tensor(counts))
        (grad_RI,) = torch.autograd.grad(y_RO, part_RI, upstream_RO[rows])
        return y_RO, grad_RI

    every = passes(slice(None), counts)
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, passes(slice(None), counts), every))
    finally:
        torch.set_num_threads(1)
    for expert, count in enumerate(counts):
        if count:
            some = data.draw(st.integers(1, count))
            rows = slice(starts[expert] + count - some, starts[expert + 1])
            alone = passes(rows, [some * (e == expert) for e in range(len(counts))])
            assert all(
                torch.equal(one, other[rows]) for one, other in zip(alone, every, strict=True)
            )


@pytest.mark.parametrize("case", ["width", "experts", "strides"])
def test_kernels_are_given_what_fits_alone(case: str) -> None:
    """They check nothing. PyTorch tells of what fits nowhere, and takes other strides."""
    x_RI, w_EOI = tensors([2, 3], (8, 8), torch.float32)
    counts_E = torch.tensor([2, 3])
    if case == "strides":
        strided_EOI = torch.cat((w_EOI, w_EOI), dim=-1)[..., :8]
        y_RO = grouped_linear(x_RI, strided_EOI, counts_E)
        torch.testing.assert_close(y_RO, grouped_linear_loop(x_RI, w_EOI, counts_E))
        return
    given = (x_RI[:, :4], w_EOI) if case == "width" else (x_RI, w_EOI[:1])
    with pytest.raises((RuntimeError, ValueError)):
        grouped_linear(*given, counts_E)


def test_counts_of_more_rows_than_there_are() -> None:
    """Reach no memory behind them: of what is missing nothing is computed."""
    x_RI, w_EOI = tensors([2, 3], (8, 8), torch.float32)
    y_RO = grouped_linear(x_RI, w_EOI, torch.tensor([4, 1 << 40]))
    torch.testing.assert_close(y_RO, grouped_linear_loop(x_RI, w_EOI, torch.tensor([4, 1])))


@pytest.mark.parametrize("counts", [[2, 0, 3], [1, 1, 1], [0, 0, 40]])
def test_stacks_that_lie_transposed(counts: list[int], kernels: bool) -> None:
    """As the backward pass of packed rows gives them."""
    found = []
    for function in (grouped_linear, grouped_linear_loop):
        x_RI, w_EOI = tensors(counts, (12, 8), torch.float32)
        lies_EIO = w_EOI.detach().mT.contiguous().requires_grad_()
        y_RO = function(x_RI, lies_EIO.mT, torch.tensor(counts))
        y_RO.square().sum().backward()
        found.append((y_RO, x_RI.grad, lies_EIO.grad))
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-4)
