"""``monitor/experts.arrays`` over the run: load per layer and expert, bias, dead experts.

S logged steps, L layers, E experts, R ranks the experts are divided over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek.monitoring import load_metrics
from deepseek.monitoring.array_history import entries_of, evenly, records_of
from deepseek.monitoring.array_log import Record

MOST_STRETCHES = 12
MOST_FRAMES = 100
"""Steps whose whole [layers, experts] picture is kept."""

FORMULAS = {
    "variation": load_metrics.variation,
    "max_violation": load_metrics.max_violation,
    "entropy": load_metrics.entropy,
    "dead": load_metrics.dead,
    "starved": load_metrics.starved,
}


@dataclass
class ExpertHistory:
    """Every logged step in numbers per layer, and evenly spaced ones in full."""

    layers: list[str]
    top_k: int | None
    ranks: int
    steps: np.ndarray
    """int64 [S]."""
    metrics: dict[str, np.ndarray]
    """By the names in ``FORMULAS``, and ``turns``: float32 [S, L]."""
    rank_load: np.ndarray
    """Share of the mean rank's assignments over all layers, float32 [S, R]."""
    rank_imbalance: np.ndarray
    """max / mean over ranks, float32 [S, L]."""
    frame_steps: np.ndarray
    """int64 [F], F at most 100."""
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


def read_experts(path: Path, notes: list[str]) -> ExpertHistory | None:
    """The history in a file; None if there is no record. Damage is added to ``notes``."""
    entries = entries_of(path)
    if not entries:
        return None
    shape = tuple(_shape(entries[-1].header["arrays"]))
    alike = [entry for entry in entries if tuple(_shape(entry.header["arrays"])) == shape]
    if len(alike) < len(entries):
        notes.append(
            f"{path.name}: {len(entries) - len(alike)} records have another number of layers or "
            "experts than the last one and are left out"
        )
    meta = alike[-1].meta
    ranks = int(meta.get("ep") or 1)
    wanted = {alike[index].step for index in evenly(len(alike), MOST_FRAMES)}
    steps: list[int] = []
    metrics: dict[str, list[np.ndarray]] = {name: [] for name in (*FORMULAS, "turns")}
    rank_load, rank_imbalance = [], []
    watch, before = load_metrics.DeadSince(), None
    for record in records_of(path, alike, notes, {"tokens"}):
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
    if not steps:
        return None
    frames = list(records_of(path, [e for e in alike if e.step in wanted], []))
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


def _shape(arrays: list[list]) -> list[int]:
    return next(shape for name, _, shape, _ in arrays if name == "tokens")


def _stacked(frames: list[Record], name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if not any(name in frame.arrays for frame in frames):
        return None
    nothing = np.full(shape, np.nan, np.float32)
    return np.array([frame.arrays.get(name, nothing) for frame in frames])
