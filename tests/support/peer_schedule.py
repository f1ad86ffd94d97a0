"""Learning rates by the scheduler of Megatron-Core or of AutoModel, which has a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def learning_rates(
    scheduler_class: Callable[..., Any], given: Mapping[str, Any], steps: int
) -> list[float]:
    """Of each of the first steps.

    Args:
        scheduler_class: ``OptimizerParamScheduler``.
        given: its arguments, ``max_lr`` among them.
        steps: how many.
    """
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=given["max_lr"])
    scheduler = scheduler_class(optimizer, **given)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return found
