"""Each collective against the same sums in one process, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.parallel.collectives import (
    all_to_all_rows,
    gather_sequence,
    scatter_sequence_sum,
    sum_forward,
)
from support.ranks import run_ranks

Operation = Callable[[Tensor, int], Tensor]
"""What a rank computes from its own tensor."""
Whole = Callable[[list[Tensor]], list[Tensor]]
"""What all ranks compute, from all tensors."""

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def whole_numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Small integers: every dtype adds them exactly, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def one_rank(
    rank: int, operation: Operation, inputs: list[Tensor], upstream: list[Tensor]
) -> tuple[Tensor, Tensor]:
    x = inputs[rank].detach().requires_grad_()
    out = operation(x, rank)
    out.backward(upstream[rank])
    assert x.grad is not None
    return out.detach(), x.grad


def assert_like_one_process(
    operation: Operation, whole: Whole, inputs: list[Tensor], seed: int = 7
) -> None:
    """Outputs and gradients of every rank are those of the sum over ranks of <out, upstream>."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    outputs = whole(leaves)
    upstream = [whole_numbers(*y.shape, seed=seed + i) for i, y in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    dtype = inputs[0].dtype
    results = run_ranks(len(inputs), one_rank, operation, inputs, [u.to(dtype) for u in upstream])
    for (out, grad), wanted, leaf, gradient in zip(
        results, outputs, leaves, gradients, strict=True
    ):
        assert out.dtype == grad.dtype == dtype
        assert out.is_contiguous()
        assert torch.equal(out.double(), wanted)
        assert torch.equal(grad.double(), torch.zeros_like(leaf) if gradient is None else gradient)


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gathered(parts: list[Tensor]) -> list[Tensor]:
    return [torch.cat(parts, dim=1)] * len(parts)


def scattered(parts: list[Tensor]) -> list[Tensor]:
    return list(torch.stack(parts).sum(dim=0).chunk(len(parts), dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gather_sequence(world_size: int, dtype: torch.dtype) -> None:
    inputs = [whole_numbers(3, 2, 5, seed=r, dtype=dtype) for r in range(world_size)]
    assert_like_one_process(lambda x, rank: gather_sequence(x, group()), gathered, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scatter_sequence_sum(world_size: int, dtype: torch.dtype) -> None:
    inputs = [whole_numbers(3, 2 * world_size, 5, seed=r, dtype=dtype) for r in range(world_size)]
    assert_like_one_process(lambda x, rank: scatter_sequence_sum(x, group()), scattered, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_forward(dtype: torch.dtype) -> None:
    """The sum; and where every rank computes the same loss from it, each part's gradient is it."""

    def work(rank: int) -> tuple[Tensor, Tensor]:
        x = whole_numbers(2, 3, seed=rank, dtype=dtype).t().requires_grad_()
        total = sum_forward(x, group())
        (total * total).sum().backward()
        return total.detach(), x.grad

    whole = torch.stack([whole_numbers(2, 3, seed=r).t() for r in range(3)]).sum(dim=0)
    for total, grad in run_ranks(3, work):
        assert total.dtype == grad.dtype == dtype
        assert torch.equal(total.double(), whole)
        assert torch.equal(grad.double(), (2 * whole).to(dtype).double())


def exchanged(counts: list[list[int]]) -> Whole:
    """counts[i][j] rows go from i to j."""

    def whole(inputs: list[Tensor]) -> list[Tensor]:
        blocks = [x.split(sent) for x, sent in zip(inputs, counts, strict=True)]
        return [torch.cat([sent[j] for sent in blocks]) for j in range(len(inputs))]

    return whole


def exchange(counts: list[list[int]]) -> Operation:
    return lambda x, rank: all_to_all_rows(x, counts[rank], [c[rank] for c in counts], group())


def rows(counts: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    return [whole_numbers(sum(c), 3, seed=r, dtype=dtype) for r, c in enumerate(counts)]


@given(
    counts=st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=n, max_size=n),
            min_size=n,
            max_size=n,
        )
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_all_to_all_rows(counts: list[list[int]], dtype: torch.dtype) -> None:
    assert_like_one_process(exchange(counts), exchanged(counts), rows(counts, dtype))


@pytest.mark.parametrize(
    "counts",
    [
        [[0, 0], [0, 0]],
        [[0, 0, 0], [0, 0, 0], [4, 0, 0]],
        [[0, 0, 7], [0, 0, 1], [0, 0, 2]],
        [[0, 3, 0], [0, 0, 3], [3, 0, 0]],
    ],
    ids=["nothing", "one row block", "all to one", "a ring"],
)
def test_all_to_all_extremes(counts: list[list[int]]) -> None:
    assert_like_one_process(exchange(counts), exchanged(counts), rows(counts, torch.float64))


def test_tensors_that_are_not_contiguous() -> None:
    """Inputs that are views, and a gradient that is one number expanded."""

    def work(rank: int) -> list[tuple[Tensor, Tensor]]:
        results = []
        for operation in (
            lambda x: gather_sequence(x, group()),
            lambda x: scatter_sequence_sum(x, group()),
            lambda x: all_to_all_rows(x, [1, 2], [1 + rank] * 2, group()),
        ):
            x = whole_numbers(5, 4, 3, seed=rank).permute(2, 1, 0).requires_grad_()
            assert not x.is_contiguous()
            out = operation(x)
            out.sum().backward()
            results.append((out.detach(), x.grad))
        return results

    inputs = [whole_numbers(5, 4, 3, seed=r).permute(2, 1, 0) for r in range(2)]
    wanted = [gathered(inputs), scattered(inputs), exchanged([[1, 2], [1, 2]])(inputs)]
    uses = [2.0, 1.0, 1.0]  # how often a number appears in all outputs
    for rank, results in enumerate(run_ranks(2, work)):
        for (out, grad), outputs, times in zip(results, wanted, uses, strict=True):
            assert torch.equal(out, outputs[rank])
            assert torch.equal(grad, torch.full_like(grad, times))


def test_gradcheck() -> None:
    """Numerical derivatives of <all outputs, upstream>, one rank's input moved at a time."""

    def work(rank: int) -> bool:
        def loss(x: Tensor) -> Tensor:
            y = scatter_sequence_sum(gather_sequence(x, group()).sin(), group())
            y = all_to_all_rows(y.flatten(0, 1), [1, 1], [1, 1], group())
            return sum_forward(y.square().sum(), group())

        checked = []
        for moved in range(2):
            x = whole_numbers(1, 2, 1, seed=rank).div(7).requires_grad_()
            (analytic,) = torch.autograd.grad(loss(x), x)
            for i in range(2):  # every rank takes part in every evaluation
                step = torch.zeros_like(x)
                step[0, i, 0] = 1e-6 if rank == moved else 0.0
                with torch.no_grad():
                    numeric = (loss(x + step) - loss(x - step)) / 2e-6
                if rank == moved:
                    checked.append(abs(numeric - analytic[0, i, 0]).item())
        return len(checked) == 2 and max(checked) < 1e-8

    assert run_ranks(2, work) == [True, True]
