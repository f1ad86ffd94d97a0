"""``monitor/ranks.arrays`` and ``monitor/traffic.arrays`` over the run.

S logged steps, R ranks, M columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek.monitoring.array_history import entries_of, evenly, records_of

MOST_STEPS = 600
"""Logged steps of ranks and traffic that are read, evenly spaced."""


@dataclass
class RankHistory:
    """Seconds, bytes and rows of every rank."""

    steps: np.ndarray
    """int64 [S]."""
    columns: dict[str, np.ndarray]
    """float32 [S, R] by name; NaN where a record lacks the column."""

    @property
    def ranks(self) -> int:
        """R."""
        return int(next(iter(self.columns.values())).shape[1])


@dataclass
class Traffic:
    """Bytes between ranks in dispatch and combine."""

    bytes_per_step: np.ndarray
    """Mean over the logged steps, float64 [R, R]: row s sent to column d."""
    steps: int
    """How many logged steps the mean is over."""
    nodes: list[int] | None
    """Node of every rank."""
    row_bytes: int | None
    """Bytes of one token's row."""


def read_ranks(path: Path, notes: list[str]) -> RankHistory | None:
    """The history in a file; None if there is no record."""
    entries = entries_of(path)
    if not entries:
        return None
    ranks = entries[-1].header["arrays"][0][2][0]
    entries = [entry for entry in entries if entry.header["arrays"][0][2][0] == ranks]
    picked = [entries[index] for index in evenly(len(entries), MOST_STEPS)]
    steps: list[int] = []
    rows: list[dict[str, np.ndarray]] = []
    for record in records_of(path, picked, notes):
        values = next(iter(record.arrays.values()))
        steps.append(record.step)
        rows.append(dict(zip(record.meta["columns"], values.T, strict=True)))
    if not rows:
        return None
    nothing = np.full(ranks, np.nan, np.float32)
    names = dict.fromkeys(name for row in rows for name in row)
    return RankHistory(
        np.array(steps),
        {name: np.array([row.get(name, nothing) for row in rows]) for name in names},
    )


def read_traffic(path: Path, notes: list[str]) -> Traffic | None:
    """The mean matrix of a file; None if there is no record."""
    entries = entries_of(path)
    if not entries:
        return None
    shape = entries[-1].header["arrays"][0][2]
    entries = [entry for entry in entries if entry.header["arrays"][0][2] == shape]
    picked = [entries[index] for index in evenly(len(entries), MOST_STEPS)]
    total, count = np.zeros(shape), 0
    for record in records_of(path, picked, notes):
        total += next(iter(record.arrays.values()))
        count += 1
    if not count:
        return None
    meta = entries[-1].meta
    return Traffic(total / count, count, meta.get("node_of_rank"), meta.get("row_bytes"))
