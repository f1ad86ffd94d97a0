"""Rows padded per expert: slots, the way there and back, and independence of neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops.align import ROWS, aligned_slots, gather_rows, spread_rows
from deepseek.ops.grouped_linear import grouped_linear

counts_lists = st.lists(
    st.sampled_from([0, 0, 1, 2, 15, 16, 17, 33]), min_size=1, max_size=5
) | st.lists(st.integers(0, 40), min_size=1, max_size=4)


def slots_by_hand(counts: list[int]) -> tuple[list[int], list[int]]:
    """Each expert's block starts where the padded one before ends."""
    padded, slots, start = [], [], 0
    for count in counts:
        size = -(-count // ROWS) * ROWS
        padded.append(size)
        slots += range(start, start + count)
        start += size
    return padded, slots


@settings(max_examples=60)
@given(counts=counts_lists)
def test_there_and_back(counts: list[int]) -> None:
    padded_e, slots_R = aligned_slots(torch.tensor(counts))
    assert padded_e.dtype == slots_R.dtype == torch.int64
    assert (padded_e.tolist(), slots_R.tolist()) == slots_by_hand(counts)

    generator = torch.Generator().manual_seed(0)
    x_RD = torch.randn(sum(counts), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    num_slots = int(padded_e.sum())
    spread_PD = spread_rows(x_RD, slots_R, num_slots)
    assert spread_PD.shape == (num_slots, 3)
    is_padding_P = torch.ones(num_slots, dtype=torch.bool)
    is_padding_P[slots_R] = False
    assert not spread_PD[is_padding_P].any()
    back_RD = gather_rows(spread_PD, slots_R)
    assert torch.equal(back_RD, x_RD)

    upstream_RD = torch.randn(x_RD.shape, generator=generator, dtype=torch.float64)
    gradient_PD, gradient_RD = torch.autograd.grad(back_RD, (spread_PD, x_RD), upstream_RD)
    assert torch.equal(gradient_RD, upstream_RD)
    assert torch.equal(gradient_PD[slots_R], upstream_RD)
    assert not gradient_PD[is_padding_P].any()


def test_expanded_gradient() -> None:
    _, slots_R = aligned_slots(torch.tensor([1, 2]))
    x_RD = torch.randn(3, 4, requires_grad=True)
    gather_rows(spread_rows(x_RD, slots_R, 2 * ROWS), slots_R).sum().backward()
    assert torch.equal(x_RD.grad, torch.ones(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [(16, 8), (40, 24), (12, 20)])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Alone or among any number of others, at any place: the same bits.

    For rows of a multiple of 16 bytes; with others the kernel looks at the row's address too.
    """
    generator = torch.Generator().manual_seed(0)
    w_EOI = torch.randn(2, *dims[::-1], generator=generator).to(dtype)
    pool_RI = torch.randn(150, dims[0], generator=generator).to(dtype)
    alone_RO = torch.cat([aligned_linear(row.unsqueeze(0), w_EOI, [0, 1]) for row in pool_RI[:10]])
    for before, others in ((0, 1), (0, 3), (5, 2), (0, 15), (1, 16), (3, 40), (20, 100)):
        x_RI = torch.cat((pool_RI[40 : 40 + before], pool_RI[:10], pool_RI[50 : 50 + others]))
        y_RO = aligned_linear(x_RI, w_EOI, [before, 10 + others])
        assert torch.equal(y_RO[before : before + 10], alone_RO)


def aligned_linear(x_RI: Tensor, w_EOI: Tensor, counts: list[int]) -> Tensor:
    padded_e, slots_R = aligned_slots(torch.tensor(counts))
    x_PI = spread_rows(x_RI, slots_R, int(padded_e.sum()))
    return gather_rows(grouped_linear(x_PI, w_EOI, padded_e), slots_R)
