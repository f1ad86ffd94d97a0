"""Experts, ranks and traffic over a run: what its files of arrays say, thinned for drawing.

S logged steps, L layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deepseek.monitoring import load_metrics
from deepseek.monitoring.array_log import ArrayReader, Entry, Record

MOST_STRETCHES = 12
"""Of the longest without a token, that are told."""
MOST_FRAMES = 100
"""Steps whose whole [layers, experts] picture is kept."""
MOST_RANK_STEPS = 600
"""Logged steps of ranks and traffic that are read, evenly spaced."""

FORMULAS = {
    "variation": load_metrics.variation,
    "max_violation": load_metrics.max_violation,
    "entropy": load_metrics.entropy,
    "dead": load_metrics.dead,
    "starved": load_metrics.starved,
}


@dataclass(frozen=True)
class ExpertHistory:
    """Every logged step in numbers per layer, and evenly spaced ones in full."""

    layers: list[str]
    top_k: int | None
    ranks: int
    """R, which the experts are divided over."""
    steps: np.ndarray
    """int64 [S]."""
    metrics: dict[str, np.ndarray]
    """By the names in ``FORMULAS``, and ``turns``: float32 [S, L]."""
    rank_load: np.ndarray
    """Share of the mean rank's assignments over all layers, float32 [S, R]."""
    rank_imbalance: np.ndarray
    """max / mean over ranks, float32 [S, L]."""
    frame_steps: np.ndarray
    """int64 [F], F at most ``MOST_FRAMES``."""
    frames: np.ndarray
    """Assignments, uint32 [F, L, E]."""
    bias: np.ndarray | None
    """Correction bias at the frames, float32 [F, L, E]; NaN where it was not logged."""
    margin: np.ndarray | None
    """Mean router margin at the frames, float32 [F, L]."""
    dead: list[load_metrics.DeadExpert]
    """Experts without tokens at the last logged step."""
    longest_dead: list[load_metrics.DeadExpert]
    """The longest stretches without tokens, whenever they were."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


def stretch_length(count: int, most: int) -> int:
    """The smallest of 1, 2, 4, ... of which at most ``most`` cover ``count``, at least 1."""
    return 1 << (-(-max(1, count) // most) - 1).bit_length()


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0..count-1, evenly spaced, and the last. A larger count
    changes the others only where it doubles the distance."""
    if count <= most:
        return list(range(count))
    return sorted({*range(0, count, stretch_length(count, most - 1)), count - 1})


def read_experts(reader: ArrayReader, notes: list[str]) -> ExpertHistory | None:
    """The history in a file; None if there is no record. Damage is added to ``notes``."""
    entries = _alike(reader, "layers or experts", notes)
    wanted = {entries[index].step for index in evenly(len(entries), MOST_FRAMES)}
    steps: list[int] = []
    metrics: dict[str, list[np.ndarray]] = {name: [] for name in (*FORMULAS, "turns")}
    rank_load, rank_imbalance, frames = [], [], []
    watch, before = load_metrics.DeadSince(), None
    # A run may go on in another layout: its whole history is told by the ranks of the last one.
    newest_first = (next(iter(reader.records([entry]))) for entry in reversed(entries))
    last = next((record for record in newest_first if record is not None), None)
    ranks = int(last.meta.get("ep") or 1) if last is not None else 1
    for record in _sound(reader, entries, notes):
        tokens = record.arrays["tokens"]
        steps.append(record.step)
        for name, formula in FORMULAS.items():
            metrics[name].append(formula(tokens).astype(np.float32))
        turned = load_metrics.turns(tokens if before is None else before, tokens)
        metrics["turns"].append(turned.astype(np.float32))
        before = tokens
        load = load_metrics.rank_load(tokens, ranks)
        rank_load.append(load_metrics.utilisation(load.sum(axis=0)).astype(np.float32))
        rank_imbalance.append(load_metrics.imbalance(load).astype(np.float32))
        watch.add(record.step, tokens)
        if record.step in wanted:
            frames.append(record)
    if not steps:
        return None
    shape, meta = entries[-1].shape, record.meta
    return ExpertHistory(
        layers=[str(name) for name in meta.get("layers") or range(shape[0])],
        top_k=meta.get("top_k"),
        ranks=ranks,
        steps=np.array(steps),
        metrics={name: np.array(rows) for name, rows in metrics.items()},
        rank_load=np.array(rank_load),
        rank_imbalance=np.array(rank_imbalance),
        frame_steps=np.array([frame.step for frame in frames]),
        frames=np.array([frame.arrays["tokens"] for frame in frames]),
        bias=_stacked(frames, "bias", shape),
        margin=_stacked(frames, "margin", shape[:1]),
        dead=watch.experts(),
        longest_dead=watch.longest(MOST_STRETCHES),
    )


def _stacked(frames: list[Record], name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if not any(name in frame.arrays for frame in frames):
        return None
    nothing = np.full(shape, np.nan, np.float32)
    return np.array([frame.arrays.get(name, nothing) for frame in frames])


def read_ranks(reader: ArrayReader, notes: list[str]) -> RankHistory | None:
    """The history in a file; None if there is no record. Damage is added to ``notes``."""
    entries = _alike(reader, "ranks", notes)
    picked = [entries[index] for index in evenly(len(entries), MOST_RANK_STEPS)]
    steps: list[int] = []
    rows: list[dict[str, np.ndarray]] = []
    for record in _sound(reader, picked, notes):
        values = next(iter(record.arrays.values()))
        steps.append(record.step)
        rows.append(dict(zip(record.meta["columns"], values.T, strict=True)))
    if not rows:
        return None
    nothing = np.full(entries[-1].shape[0], np.nan, np.float32)
    names = dict.fromkeys(name for row in rows for name in row)
    return RankHistory(
        np.array(steps),
        {name: np.array([row.get(name, nothing) for row in rows]) for name in names},
    )


def read_traffic(reader: ArrayReader, notes: list[str]) -> Traffic | None:
    """The mean matrix of a file; None if there is no record. Damage is added to ``notes``."""
    entries = _alike(reader, "ranks", notes)
    picked = [entries[index] for index in evenly(len(entries), MOST_RANK_STEPS)]
    total, count, meta = np.zeros(()), 0, {}
    for record in _sound(reader, picked, notes):
        total = total + next(iter(record.arrays.values()))
        count, meta = count + 1, record.meta
    if not count:
        return None
    mean_RR = _whole(total / count)
    return Traffic(mean_RR, count, meta.get("node_of_rank"), meta.get("row_bytes"))


def _whole(traffic_RP: np.ndarray) -> np.ndarray:
    """(R, R): each rank's EP group are its neighbours, and it sends to no others."""
    ranks, places = traffic_RP.shape
    whole_RR = np.zeros((ranks, ranks))
    for rank, row in enumerate(traffic_RP):
        first = rank // places * places
        whole_RR[rank, first : first + places] = row
    return whole_RR


def _alike(reader: ArrayReader, of: str, notes: list[str]) -> list[Entry]:
    """The records of the last one's shape; that others are left out is noted.

    Raises:
        UserError: the file cannot be read, or is no log at all.
    """
    reader.update()
    entries = [entry for entry in reader.entries if entry.shape == reader.entries[-1].shape]
    if len(entries) < len(reader.entries):
        notes.append(
            f"{reader.path.name}: {len(reader.entries) - len(entries)} records have another number "
            f"of {of} than the last one and are left out"
        )
    return entries


def _sound(reader: ArrayReader, entries: list[Entry], notes: list[str]) -> Iterator[Record]:
    """The records of ``entries``; those that are damaged are passed over, with a note."""
    damaged = []
    if not entries:
        return
    for entry, record in zip(entries, reader.records(entries), strict=True):
        if record is None:
            damaged.append(entry.step)
        else:
            yield record
    if damaged:
        notes.append(
            f"{reader.path.name}: {len(damaged)} of {len(entries)} records are damaged and left "
            f"out (the first at step {damaged[0]})"
        )
