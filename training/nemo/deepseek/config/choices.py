"""The numbers that a message offers instead of a wrong one."""

from __future__ import annotations

import math
from collections.abc import Iterable

MOST_TRIALS = 10**6


def divisors(number: int) -> list[int]:
    """All divisors, ascending; of a number above ``MOST_TRIALS`` squared those that are found."""
    trials = min(math.isqrt(number), MOST_TRIALS)
    small = [n for n in range(1, trials + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(numbers: Iterable[int], near: int) -> str:
    """The legal numbers, or the eight nearest to ``near``, as a choice."""
    legal = sorted(numbers)
    nearest_eight = sorted(sorted(legal, key=lambda number: abs(number - near))[:8])
    text = ", ".join(map(str, nearest_eight))
    if len(legal) == 1:
        return text
    return f"one of {text}" + (", ..." if len(legal) > 8 else "")
