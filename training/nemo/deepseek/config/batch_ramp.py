"""A global batch that grows over the first samples of a run; arithmetic, no torch.

As Megatron's and NeMo's ``rampup_batch_size: [start, increment, samples]``: the batch begins at
``start`` and gets ``increment`` sequences more each time that an equal part of ``samples`` has been
consumed, until it is ``global_batch_size``. Both numbers below are functions of the step alone, so
that a run goes on from any step at the very sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from deepseek.config.schema import RunConfig

MOST_INCREMENTS = 1000


class Level(NamedTuple):
    """Consecutive steps of one size."""

    step: int
    """Finished steps before the first of them."""
    sample: int
    """Consumed samples before the first of them."""
    size: int
    """Sequences of a step."""


def leads_to(whole: int, ramp: Sequence[int]) -> bool:
    """Whether whole increments, and not too many, lead from start to ``whole``."""
    start, increment, _ = ramp
    return (whole - start) // increment in range(1, MOST_INCREMENTS + 1) and (
        (whole - start) % increment == 0
    )


def levels(whole: int, ramp: Sequence[int] | None) -> tuple[Level, ...]:
    """All levels, the last without an end.

    Args:
        whole: ``model.global_batch_size``.
        ramp: a legal ``model.rampup_batch_size``; None: one level.
    """
    return _levels(whole, *ramp) if ramp else (Level(0, 0, whole),)


def batch_size(step: int, whole: int, ramp: Sequence[int] | None) -> int:
    """Sequences of the step that follows ``step`` finished ones."""
    return _level(step, whole, ramp).size


def consumed_samples(steps: int, whole: int, ramp: Sequence[int] | None) -> int:
    """Of so many finished steps."""
    level = _level(steps, whole, ramp)
    return level.sample + (steps - level.step) * level.size


def tokens_of_run(run: RunConfig) -> int:
    """Of all its steps, padding included."""
    model, steps = run.model, run.trainer.max_steps
    samples = consumed_samples(steps, model.global_batch_size, model.rampup_batch_size)
    return samples * model.data.seq_length


def _level(step: int, whole: int, ramp: Sequence[int] | None) -> Level:
    return [level for level in levels(whole, ramp) if level.step <= step][-1]


@lru_cache(maxsize=64)
def _levels(whole: int, start: int, increment: int, samples: int) -> tuple[Level, ...]:
    count = (whole - start) // increment
    found, step, sample = list[Level](), 0, 0
    while sample < samples:
        number = sample * count // samples
        found.append(Level(step, sample, start + number * increment))
        end = -(-(number + 1) * samples // count)
        steps = -((sample - end) // found[-1].size)
        step, sample = step + steps, sample + steps * found[-1].size
    return *found, Level(step, sample, whole)
