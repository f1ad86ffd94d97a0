"""Squares that a kernel notes of the gradients that it writes: those of the norm, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from deepseek.models.components.moe import GroupedExperts
from deepseek.ops import noted_squares as notes
from deepseek.ops.added_gradients import added_in_place
from deepseek.ops.noted_squares import noted_squares, squares_noted
from deepseek.ops.squares import square_sums, square_sums_slow

FIRST, SECOND = torch.tensor([5, 0, 9]), torch.tensor([0, 3, 11])
"""Rows: each time an expert has none."""


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(notes, "WORTH", 0)
    yield


def experts() -> GroupedExperts:
    stack = GroupedExperts(3, 40, 70)
    generator = torch.Generator().manual_seed(0)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator)
    stack.make_gradient_rooms()
    return stack


def go_back(stack: GroupedExperts, counts_E: Tensor) -> None:
    """Of one micro-batch."""
    generator = torch.Generator().manual_seed(int(counts_E[2]))
    rows_RD, weights_R = (torch.randn(*size, generator=generator) for size in ((14, 40), (14,)))
    with added_in_place():
        stack(rows_RD, weights_R, counts_E).square().sum().backward()


def gradients(stack: GroupedExperts) -> list[Tensor]:
    return [parameter.grad for parameter in stack.parameters() if parameter.grad is not None]


def hold_norm(stack: GroupedExperts) -> None:
    groups = [[(grad, 1) for grad in gradients(stack)], [(gradients(stack)[0], 2)]]
    device = torch.device("cpu")
    wanted = square_sums_slow(groups, device)
    torch.testing.assert_close(square_sums(groups, device), wanted, rtol=1e-6, atol=0)


def num_noted(stack: GroupedExperts) -> int:
    return sum(noted_squares(grad) is not None for grad in gradients(stack))


@pytest.mark.parametrize("batches", [[FIRST], [FIRST, SECOND], [FIRST, SECOND, FIRST]])
def test_are_those_of_the_norm(batches: list[Tensor]) -> None:
    """After any number of micro-batches; an expert without rows keeps what it had."""
    stack = experts()
    with squares_noted():
        for counts_E in batches:
            go_back(stack, counts_E)
        assert num_noted(stack) == 3
        hold_norm(stack)
    assert num_noted(stack) == 0
    hold_norm(stack)


def test_a_step_begins_without_notes() -> None:
    stack = experts()
    for counts_E in (FIRST, SECOND):
        with squares_noted():
            go_back(stack, counts_E)
            assert num_noted(stack) == 3
            hold_norm(stack)
        for parameter in stack.parameters():
            parameter.grad = None


def test_gradients_of_outside_have_none() -> None:
    """Nor has what is added to them: of an expert without rows nobody knows the squares."""
    stack = experts()
    go_back(stack, FIRST)
    with squares_noted():
        assert num_noted(stack) == 0
        go_back(stack, SECOND)
        assert num_noted(stack) == 0
        hold_norm(stack)


@pytest.mark.parametrize("between", [False, True])
def test_a_changed_gradient_is_read(between: bool) -> None:
    """Changed after the backward pass, or between two: the second one adds to what is there."""
    stack = experts()
    with squares_noted():
        go_back(stack, FIRST)
        gradients(stack)[0].mul_(3)
        if between:
            go_back(stack, SECOND)
        assert num_noted(stack) == 2
        hold_norm(stack)


def test_another_gradient_is_read() -> None:
    stack = experts()
    with squares_noted():
        go_back(stack, FIRST)
        stack.w1.grad = torch.full_like(stack.w1, 2.0)
        assert num_noted(stack) == 2
        hold_norm(stack)


def changes(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.data.mul_(3)


@pytest.mark.parametrize(
    "hook",
    [
        lambda weight: weight.register_hook(lambda grad: grad.data.mul_(3)),
        lambda weight: weight.register_post_accumulate_grad_hook(changes),
    ],
)
def test_hooks_may_change_what_no_version_tells(hook: Callable[[Tensor], object]) -> None:
    stack = experts()
    hook(stack.w2)
    with squares_noted():
        for counts_E in (FIRST, SECOND):
            go_back(stack, counts_E)
            assert num_noted(stack) == 2
            hold_norm(stack)


def test_no_order_depends_on_threads() -> None:
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            stack = experts()
            with squares_noted():
                go_back(stack, FIRST)
                found.append(torch.stack([noted_squares(g) for g in gradients(stack)]))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_gradient_that_is_not_finite_is_told() -> None:
    stack = experts()
    with squares_noted(), torch.no_grad():
        stack.w2[2, 0, 0] = torch.inf
        with torch.enable_grad():
            go_back(stack, FIRST)
        assert num_noted(stack) == 3
        groups = [[(grad, 1) for grad in gradients(stack)]]
        assert not square_sums(groups, torch.device("cpu")).isfinite()


def test_few_numbers_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = experts()
    monkeypatch.setattr(notes, "WORTH", stack.w1.numel() + 1)
    with squares_noted():
        go_back(stack, FIRST)
        assert num_noted(stack) == 0
