"""Errors for people: what, where, why, and the nearest way out.

``UserError``
    ``ConfigError``   every problem of a configuration at once

The command line prints the message of a ``UserError`` without a traceback and exits with code 2.
``nearest``, ``divisors`` and ``listed`` find what a message offers instead.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class UserError(Exception):
    """Something the user can mend; the message says how."""


@dataclass(frozen=True)
class Problem:
    """One broken rule of a configuration."""

    field: str
    """Dotted key, such as ``model.num_experts_per_tok``; empty: the file as a whole."""
    value: object
    """What was given."""
    rule: str
    """What must hold, with the numbers."""
    way_out: str
    """The nearest change that makes it hold."""
    where: str = ""
    """``file:line`` or ``override`` that gave the value; empty: not known, or a default."""

    def __str__(self) -> str:
        advice = f"{self.rule}; {self.way_out}"
        if not self.field:
            return f"{self.where}: {advice}" if self.where else advice
        origin = f" [{self.where}]" if self.where else ""
        return f"{self.field}={shown(self.value)}: {advice}{origin}"


class ConfigError(UserError):
    """All problems of one configuration, found before any process starts."""

    def __init__(self, problems: Sequence[Problem], source: str = "the configuration") -> None:
        self.problems = list(problems)
        count = len(self.problems)
        noun = "problem" if count == 1 else "problems"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{source} has {count} {noun}:\n{lines}")


def shown(value: object) -> str:
    """``value`` as it would stand in YAML, at most 120 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = "''" if value == "" else str(value)
    return text if len(text) <= 120 else text[:117] + "..."


# -- what a message offers --

MOST_TRIALS = 10**6


def nearest(word: str, options: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The option spelt most like ``word``, upper and lower case alike; None if none is near."""
    by_lower = {option.lower(): option for option in sorted(options)}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


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
