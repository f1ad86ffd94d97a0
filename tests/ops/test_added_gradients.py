"""Gradients that kernels add where they lie: the sums of autograd, and nobody misses one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from deepseek.models.components.moe import GroupedExperts
from deepseek.ops import grouped_feed_forward, grouped_linear
from deepseek.ops.added_gradients import added_in_place, gradient_to_add_to

COUNTS = torch.tensor([5, 0, 9])


def experts() -> GroupedExperts:
    stack = GroupedExperts(3, 8, 12)
    generator = torch.Generator().manual_seed(0)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator)
    return stack


def loss(stack: GroupedExperts, seed: int) -> Tensor:
    """Of one micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    rows_RD, weights_R = (torch.randn(*size, generator=generator) for size in ((14, 8), (14,)))
    return stack(rows_RD, weights_R, COUNTS).square().sum()


def gradients(stack: GroupedExperts) -> list[Tensor]:
    found = [parameter.grad for parameter in stack.parameters()]
    assert all(grad is not None for grad in found)
    return found  # type: ignore[return-value]


def single(stack: GroupedExperts) -> None:
    """A product at a time."""
    stack.grouped = lambda *given: grouped_linear.grouped_linear(*given)


@pytest.mark.parametrize("way", [lambda _: None, single])
def test_are_the_sums_of_autograd(way: Callable[[GroupedExperts], None]) -> None:
    found = []
    for context in (nullcontext, added_in_place):
        stack = experts()
        way(stack)
        for seed in range(3):
            before = [parameter.grad for parameter in stack.parameters()]
            with context():
                loss(stack, seed).backward()
            if seed:
                assert all(a is b for a, b in zip(before, gradients(stack), strict=True))
        found.append(gradients(stack))
    for added, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(added, wanted, rtol=1e-6, atol=1e-5)


def test_a_second_gradient_makes_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """And autograd keeps the first one as it was made, without a copy."""
    made = []
    asked = grouped_linear.gradient_to_add_to

    def noted(weight: Tensor) -> Tensor | None:
        made.append(asked(weight))
        return made[-1]

    monkeypatch.setattr(grouped_linear, "gradient_to_add_to", noted)
    stack, addresses, compute = experts(), [], grouped_feed_forward.stack_gradient

    def stack_gradient(*given: Tensor) -> Tensor | None:
        grad = compute(*given)
        addresses.append(0 if grad is None else grad.data_ptr())
        return grad

    monkeypatch.setattr(grouped_feed_forward, "stack_gradient", stack_gradient)
    with added_in_place():
        loss(stack, 0).backward()
    assert made == [None] * 3
    assert {grad.data_ptr() for grad in gradients(stack)} == set(addresses)
    with added_in_place():
        loss(stack, 1).backward()
    assert {id(grad) for grad in made[3:]} == {id(grad) for grad in gradients(stack)}


@pytest.mark.parametrize("kind", ["hook", "post_accumulate"])
def test_hooks_see_each_gradient(kind: str) -> None:
    stack, seen = experts(), []
    if kind == "hook":
        stack.w1.register_hook(lambda grad: seen.append(grad.clone()))
    else:
        stack.w1.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    for seed in range(2):
        with added_in_place():
            loss(stack, seed).backward()
    first, second = seen
    total = second if kind == "post_accumulate" else first + second
    torch.testing.assert_close(total, stack.w1.grad)
    assert first.any() and not torch.equal(first, second)


def test_gradients_that_are_asked_for_are_given() -> None:
    """Outside, and of what is no leaf, no fp32 or laid out otherwise."""
    stack = experts()
    loss(stack, 0).backward()
    before = [grad.clone() for grad in gradients(stack)]
    asked = torch.autograd.grad(loss(stack, 1), list(stack.parameters()))
    assert all(grad.any() for grad in asked)
    assert all(map(torch.equal, before, gradients(stack)))
    with added_in_place():
        assert gradient_to_add_to(stack.w1) is stack.w1.grad
        assert gradient_to_add_to(stack.w1 * 1) is None
        turned = nn.Parameter(torch.ones(2, 3).t())
        turned.grad = torch.ones(2, 3).t()
        wide = nn.Parameter(torch.ones(2, dtype=torch.float64))
        wide.grad = torch.ones(2, dtype=torch.float64)
        assert gradient_to_add_to(turned) is None and gradient_to_add_to(wide) is None
    assert gradient_to_add_to(stack.w1) is None
