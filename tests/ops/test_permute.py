"""Row permutations: values, gradients, inverses, and the order of additions."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops.permute import (
    expand_rows,
    expand_rows_slow,
    inverse_permutation,
    permute_rows,
)

permutations = st.integers(0, 12).flatmap(lambda n: st.permutations(range(n)))
expansions = st.tuples(st.integers(1, 6), st.integers(1, 4)).flatmap(
    lambda size: st.tuples(st.just(size), st.permutations(range(size[0] * size[1])))
)


def rows(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, generator=generator).to(dtype).requires_grad_()


@settings(max_examples=40)
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


@settings(max_examples=40)
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
    assert torch.equal(results[0], upstream_TKD.sum(dim=1))


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
