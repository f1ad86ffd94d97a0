"""Rows permuted, spread over padded slots, and brought back: values, gradients, no waits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops.grouped_linear import grouped_linear
from deepseek.ops.rows import (
    ALIGNMENT,
    aligned_slots,
    combine_rows,
    combine_rows_slow,
    count_rows,
    expand_rows,
    expand_rows_slow,
    gather_rows,
    inverse_permutation,
    most_slots,
    permute_rows,
    spread_rows,
)

permutations = st.integers(0, 12).flatmap(lambda n: st.permutations(range(n)))
expansions = st.tuples(st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda size: st.tuples(st.just(size), st.permutations(range(size[0] * size[1])))
)


def rows(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, generator=generator).to(dtype).requires_grad_()


@given(order=permutations)
def test_permute(order: list[int]) -> None:
    order_R = torch.tensor(order, dtype=torch.int64)
    inverse_R = inverse_permutation(order_R)
    assert inverse_R.dtype == torch.int64
    assert torch.equal(inverse_R[order_R], torch.arange(len(order)))

    x_RD, twin_RD = rows(len(order)), rows(len(order))
    y_RD, slow_RD = permute_rows(x_RD, order_R, inverse_R), twin_RD[order_R]
    assert torch.equal(y_RD, slow_RD)
    upstream_RD = rows(len(order) + 1)[1:].detach()
    y_RD.backward(upstream_RD)
    slow_RD.backward(upstream_RD)
    assert torch.equal(x_RD.grad, twin_RD.grad)
    assert torch.equal(permute_rows(y_RD, inverse_R, order_R), x_RD)


@given(case=expansions)
def test_expand(case: tuple[tuple[int, int], list[int]]) -> None:
    (tokens, choices), order = case
    order_R = torch.tensor(order)
    x_TD, twin_TD = rows(tokens), rows(tokens)
    y_RD = expand_rows(x_TD, order_R, inverse_permutation(order_R))
    slow_RD = expand_rows_slow(twin_TD, order_R)
    assert torch.equal(y_RD, slow_RD)
    for row, source in enumerate(order):
        assert torch.equal(y_RD[row], x_TD[source // choices])
    upstream_RD = rows(len(order) + 1)[1:].detach()
    y_RD.backward(upstream_RD)
    slow_RD.backward(upstream_RD)
    torch.testing.assert_close(x_TD.grad, twin_TD.grad, rtol=1e-14, atol=1e-14)


@given(case=expansions, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_combine(case: tuple[tuple[int, int], list[int]], dtype: torch.dtype) -> None:
    """To the last bit; bf16 to half of it, whichever way a tie is rounded."""
    (tokens, choices), order = case
    order_R = torch.tensor(order)
    inverse_R = inverse_permutation(order_R)
    y_RD, twin_RD = rows(len(order), dtype), rows(len(order), dtype)
    sum_TD = combine_rows(y_RD, order_R, inverse_R, choices)
    slow_TD = combine_rows_slow(twin_RD, inverse_R, choices)
    if dtype == torch.bfloat16:
        exact_TD = combine_rows_slow(twin_RD.double(), inverse_R, choices)
        assert ((sum_TD - exact_TD).abs() <= exact_TD.abs() * 2**-8).all()
    else:
        assert torch.equal(sum_TD, slow_TD)
    upstream_TD = rows(tokens + 1, dtype)[1:].detach()
    sum_TD.backward(upstream_TD)
    slow_TD.backward(upstream_TD)
    assert torch.equal(y_RD.grad, twin_RD.grad)


def test_gradients_are_added_in_the_order_of_the_choices() -> None:
    """fp32 addition is not associative: whatever the permutation, the same bits come out."""
    tokens, choices = 16, 5
    generator = torch.Generator().manual_seed(0)
    upstream_TKD = torch.randn(tokens, choices, 3, generator=generator) * 10.0 ** torch.arange(
        -3, 2
    ).view(1, -1, 1)
    results = []
    for _ in range(6):
        order_R = torch.randperm(tokens * choices, generator=generator)
        x_TD = rows(tokens, torch.float32)
        y_RD = expand_rows(x_TD, order_R, inverse_permutation(order_R))
        y_RD.backward(upstream_TKD.flatten(0, 1)[order_R])
        results.append(x_TD.grad)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[0], sum(upstream_TKD.unbind(1)))


def test_backward_is_a_gather() -> None:
    """Neither a scatter nor an indexed addition, whose order would be the threads'."""
    order_R = torch.tensor([3, 0, 5, 1, 4, 2])
    inverse_R = inverse_permutation(order_R)
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    outputs = [
        permute_rows(rows(6), order_R, inverse_R).sum(),
        expand_rows(rows(3), order_R, inverse_R).sum(),
    ]
    with Watch():
        for output in outputs:
            output.backward()
    assert any("index_select" in name for name in called), "the watch saw nothing"
    assert not [name for name in called if "put" in name or "scatter" in name or "add" in name]


counts_lists = st.lists(
    st.sampled_from([0, 0, 1, 2, 15, 16, 17, 33]), min_size=1, max_size=5
) | st.lists(st.integers(0, 40), min_size=1, max_size=4)


def slots_by_hand(counts: list[int]) -> tuple[list[int], list[int]]:
    """Each expert's block starts where the padded one before ends."""
    padded, slots, start = [], [], 0
    for count in counts:
        size = max(1, -(-count // ALIGNMENT)) * ALIGNMENT
        padded.append(size)
        slots += range(start, start + count)
        start += size
    return padded, slots


@given(counts=counts_lists)
def test_there_and_back(counts: list[int]) -> None:
    padded_e, slots_R = aligned_slots(torch.tensor(counts), sum(counts))
    assert padded_e.dtype == slots_R.dtype == torch.int64
    assert (padded_e.tolist(), slots_R.tolist()) == slots_by_hand(counts)

    generator = torch.Generator().manual_seed(0)
    x_RD = torch.randn(sum(counts), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    num_slots = most_slots(sum(counts), len(counts))
    assert num_slots >= int(padded_e.sum())
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


def test_most_slots_can_be_needed() -> None:
    """All rows for one expert, a block for each of the others: nothing less would do."""
    for num_rows in (0, 1, 5, 16, 17, 40, 300):
        for num_experts in (1, 2, 7, 64):
            counts = [num_rows, *[0] * (num_experts - 1)]
            padded_e, _ = aligned_slots(torch.tensor(counts), num_rows)
            assert int(padded_e.sum()) == most_slots(num_rows, num_experts)


@given(counts=counts_lists)
def test_without_empty_experts(counts: list[int]) -> None:
    """As if they were not there: the others' blocks, and never more slots than were foretold."""
    padded_e, slots_R = aligned_slots(torch.tensor(counts), sum(counts), skip_empty=True)
    padded, slots = slots_by_hand([count for count in counts if count])
    assert padded_e[torch.tensor(counts) > 0].tolist() == padded and slots_R.tolist() == slots
    assert int(padded_e.sum()) == sum(padded) <= most_slots(sum(counts), len(counts), True)


@given(ids=st.lists(st.integers(0, 4), max_size=12))
def test_count_rows(ids: list[int]) -> None:
    counts_E = count_rows(torch.tensor(ids, dtype=torch.int64), 5)
    assert counts_E.dtype == torch.int64
    assert counts_E.tolist() == [ids.count(expert) for expert in range(5)]


def test_expanded_gradient() -> None:
    _, slots_R = aligned_slots(torch.tensor([1, 2]), 3)
    x_RD = torch.randn(3, 4, requires_grad=True)
    gather_rows(spread_rows(x_RD, slots_R, 2 * ALIGNMENT), slots_R).sum().backward()
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
    padded_e, slots_R = aligned_slots(torch.tensor(counts), sum(counts))
    x_PI = spread_rows(x_RI, slots_R, most_slots(sum(counts), len(counts)))
    return gather_rows(grouped_linear(x_PI, w_EOI, padded_e), slots_R)
