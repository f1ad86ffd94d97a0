"""The kernels of experts' products against loops in fp64: any sizes, any rows, any threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops.native import build
from deepseek.ops.noted_squares import COLUMNS

SIZES = st.sampled_from([1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 70])
COUNTS = st.lists(st.sampled_from([0, 1, 2, 3, 6, 7, 13, 14, 15, 29, 40]), min_size=1, max_size=5)


NAMES = "grouped_linear", "grouped_linear_back"


def kernel(name: str, arguments: str) -> Callable[..., None]:
    found = build.function(name, arguments)
    assert found is not None, build.why_not()
    return found


def outer(
    to_EOI: Tensor, y_grad_RO: Tensor, x_RI: Tensor, starts: Tensor, adds: bool = False
) -> Tensor:
    """The squares of what is written, by expert."""
    experts, outputs, inputs = sizes = to_EOI.shape
    squares_EC = torch.zeros(experts, -(-inputs // COLUMNS), dtype=torch.float64)
    run = kernel("grouped_outer", "pppppnnnnn")
    run(to_EOI, squares_EC, y_grad_RO, x_RI, starts, *sizes, adds, torch.get_num_threads())
    without_EOI = torch.full_like(to_EOI, torch.nan)
    run(without_EOI, None, y_grad_RO, x_RI, starts, *sizes, False, torch.get_num_threads())
    assert adds or torch.equal(without_EOI, to_EOI)
    return squares_EC.sum(-1)


def products(
    y_grad_RO: Tensor, x_RI: Tensor, w_EOI: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results, the rows' gradients, the stack's, filled with what no product may leave, and the
    squares of this."""
    starts = torch.tensor([0, *accumulate(counts)])
    sizes = *w_EOI.shape, False, torch.get_num_threads()
    y_RO = torch.full_like(y_grad_RO, torch.nan)
    x_grad_RI, w_grad_EOI = torch.full_like(x_RI, torch.nan), torch.full_like(w_EOI, torch.nan)
    given = (y_RO, x_RI, w_EOI), (x_grad_RI, y_grad_RO, w_EOI)
    for name, tensors in zip(NAMES, given, strict=True):
        kernel(name, "ppppnnnnn")(*tensors, starts, *sizes)
    return y_RO, x_grad_RI, w_grad_EOI, outer(w_grad_EOI, y_grad_RO, x_RI, starts)


def drawn(counts: Sequence[int], outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(counts) + outputs)
    return (
        torch.randn(sum(counts), outputs, generator=generator),
        torch.randn(sum(counts), inputs, generator=generator),
        torch.randn(len(counts), outputs, inputs, generator=generator),
    )


def close(one: Tensor, wide: Tensor, terms: int) -> None:
    torch.testing.assert_close(one.double(), wide, rtol=1e-6, atol=1e-5 * (terms + 1) ** 0.5)


def hold_squares(squares_E: Tensor, w_EOI: Tensor) -> None:
    wanted_E = w_EOI.double().square().sum((1, 2))
    torch.testing.assert_close(squares_E, wanted_E, rtol=1e-6, atol=1e-9)


def hold_against_loops(counts: Sequence[int], outputs: int, inputs: int) -> None:
    y_grad_RO, x_RI, w_EOI = drawn(counts, outputs, inputs)
    y_RO, x_grad_RI, w_grad_EOI, squares_E = products(y_grad_RO, x_RI, w_EOI, counts)
    rows = zip(
        *(x.split(list(counts)) for x in (y_grad_RO.double(), x_RI.double(), y_RO, x_grad_RI)),
        strict=True,
    )
    starts, sizes = torch.tensor([0, *accumulate(counts)]), (*w_EOI.shape, True, 1)
    more_y_RO, more_x_RI, added_EOI = y_grad_RO.clone(), x_RI.clone(), w_EOI.clone()
    given = (more_y_RO, x_RI, w_EOI), (more_x_RI, y_grad_RO, w_EOI)
    for name, tensors in zip(NAMES, given, strict=True):
        kernel(name, "ppppnnnnn")(*tensors, starts, *sizes)
    more_squares_E = outer(added_EOI, y_grad_RO, x_RI, starts, adds=True)
    hold_squares(squares_E, w_grad_EOI)
    has_rows_E = torch.tensor(counts) > 0  # of others nothing is written, and nobody asked
    hold_squares(more_squares_E[has_rows_E], added_EOI[has_rows_E])
    assert not more_squares_E[~has_rows_E].any()
    close(more_y_RO, y_grad_RO.double() + y_RO.double(), inputs)
    close(more_x_RI, x_RI.double() + x_grad_RI.double(), outputs)
    for e, (y_grad, x, y, x_grad) in enumerate(rows):
        w = w_EOI[e].double()
        close(y, x @ w.T, inputs)
        close(x_grad, y_grad @ w, outputs)
        close(w_grad_EOI[e], y_grad.T @ x, len(x))
        close(added_EOI[e], w + y_grad.T @ x, len(x))


@given(counts=COUNTS, outputs=SIZES, inputs=SIZES)
def test_equal_loops_of_any_sizes(counts: list[int], outputs: int, inputs: int) -> None:
    hold_against_loops(counts, outputs, inputs)


@pytest.mark.parametrize(
    ("counts", "outputs", "inputs"),
    [
        ([600, 0, 3], 40, 24),
        ([5, 90], 300, 1100),
        ([33], 2100, 50),
        ([1, 0, 20], 30, 2500),
        ([95, 0, 96, 97, 200], 320, 300),
        ([520, 0, 300], 1300, 70),
    ],
)
def test_equal_loops_of_several_blocks(counts: list[int], outputs: int, inputs: int) -> None:
    """More rows, outputs and inputs than lie in a cache at once."""
    hold_against_loops(counts, outputs, inputs)


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(48, 64), (37, 70), (600, 17), (64, 2100), (150, 1024)]
)
def test_no_result_depends_on_other_rows(outputs: int, inputs: int) -> None:
    """Nor on how many there are: a matrix is laid out for many, and read as it lies for few."""
    counts = [21, 0, 50, 2, 300, 96, 97, 32, 33]
    y_grad_RO, x_RI, w_EOI = drawn(counts, outputs, inputs)
    y_RO, x_grad_RI, *_ = products(y_grad_RO, x_RI, w_EOI, counts)
    places = [(0, 0), (20, 0), (21, 2), (40, 2), (70, 2), (72, 3), (372, 4), (468, 5), (565, 6)]
    places += [(597, 7), (630, 8)]
    for row, e in places:
        one = slice(row, row + 1)
        alone = products(y_grad_RO[one], x_RI[one], w_EOI[e : e + 1], [1])
        assert torch.equal(alone[0], y_RO[one]) and torch.equal(alone[1], x_grad_RI[one])


@pytest.mark.parametrize(
    ("counts", "outputs", "inputs"),
    [
        ([70, 3, 0, 0, 25], 80, 100),
        ([200], 67, 130),
        ([0, 0, 1, 300], 256, 33),
        ([0, 40, 90, 1, 60, 0], 500, 300),
    ],
)
def test_the_same_on_any_threads(counts: list[int], outputs: int, inputs: int) -> None:
    """Shared by rows and by parts of a matrix: skewed experts, one alone, some that are cut; and
    more threads than there are shares."""
    given = drawn(counts, outputs, inputs)
    wanted = products(*given, counts)
    try:
        for threads in (2, 3, 5, 70):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, products(*given, counts), wanted))
    finally:
        torch.set_num_threads(1)
