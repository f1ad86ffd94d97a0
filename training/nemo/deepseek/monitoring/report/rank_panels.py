"""Panels of the ranks: load, what replicas would change, traffic, waiting, memory, collectives."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from deepseek.monitoring import load_metrics
from deepseek.monitoring.array_history import ExpertHistory, RankHistory, Traffic
from deepseek.monitoring.report.panel import (
    COLORS,
    Figure,
    Panel,
    bars,
    binned,
    figure,
    heat,
    line,
    packed,
    quantity,
    stretch_starts,
    table,
)
from deepseek.monitoring.run_log import RunLog

TIME_BINS = 240
MOST_MATRIX = 256
"""Ranks of a traffic map; more are summed by node or in blocks."""
MOST_LINES = len(COLORS)
MOST_BARS = 48
WHAT_IF_RANKS = 8
"""Ranks assumed where the experts lie on one."""

NO_RANKS = "The log has no monitor/ranks.arrays: the ranks were not monitored."


def rank_panels(run: RunLog) -> list[Panel]:
    """In the order of the page."""
    return [
        _load(run.experts),
        _imbalance(run.experts),
        _what_if(run.experts),
        _compute(run.ranks),
        _waiting(run.ranks),
        _traffic(run.traffic),
        _rows(run.ranks),
        _memory_phases(run.ranks),
        _memory(run),
        _collectives(run.collectives),
    ]


def _load(experts: ExpertHistory | None) -> Panel:
    title = "Expert load of the ranks over time"
    if experts is None:
        why = "The log has no monitor/experts.arrays."
        return Panel("rank-load", title, missing=why, wide=True)
    if experts.ranks == 1:
        why = "All experts lie on one rank: there is nothing to compare."
        return Panel("rank-load", title, missing=why, wide=True)
    return Panel(
        "rank-load",
        title,
        "Assignments the experts of each rank compute, all layers together, over the mean rank's. "
        "The busiest rank is the one the others wait for.",
        _rank_map(experts.steps, experts.rank_load, "of the mean", "load / mean"),
        wide=True,
    )


def _rank_map(steps: np.ndarray, values: np.ndarray, words: str, label: str) -> Figure:
    """A heat map of ranks x time of values around 1, [S, R]."""
    starts = stretch_starts(len(values), TIME_BINS)
    mean = binned(values, TIME_BINS)
    away = np.abs(mean[np.isfinite(mean)] - 1)
    # A single odd step must not pale all others.
    far = max(0.05, float(np.percentile(away, 98)) if away.size else 0.0)
    hover = f"step %{{x}}, rank %{{y}}: %{{z:.3f}} {words}"
    cells = {"x": packed(steps[starts]), "z": packed(mean), "transpose": True}
    return figure(
        [heat("@diverging", label, 1 - far, 1 + far, hover, **cells)],
        "step",
        "rank",
        min(560, max(220, 110 + 8 * values.shape[1])),
        {"autorange": "reversed", "showgrid": False, **_ranks_ticks(values.shape[1])},
        xaxis={"showgrid": False},
        hovermode="closest",
    )


def _ranks_ticks(ranks: int) -> Figure:
    """Whole numbers only."""
    return {"tickmode": "linear", "tick0": 0, "dtick": max(1, 2 ** int(np.log2(max(ranks, 2) / 8)))}


def _imbalance(experts: ExpertHistory | None) -> Panel:
    title = "Imbalance of the ranks"
    if experts is None or experts.ranks == 1:
        return Panel("imbalance", title, missing="Experts of several ranks were not monitored.")
    starts = stretch_starts(len(experts.steps), TIME_BINS)
    at = experts.steps[starts]
    layers = binned(experts.rank_imbalance, TIME_BINS)
    layers = np.where(np.isfinite(layers), layers, 1.0)
    together = binned(experts.rank_load.max(axis=1), TIME_BINS)
    data = [
        line(at, layers.max(axis=1), "worst layer", "@1", "%{y:.3f}"),
        line(at, layers.mean(axis=1), "mean layer", "@0", "%{y:.3f}"),
        line(at, together, "all layers together", "@2", "%{y:.3f}", dash="dot"),
    ]
    return Panel(
        "imbalance",
        title,
        "Fullest rank over the mean rank. Layers wait one after the other, so the mean over layers "
        "is how much longer the experts take than they need.",
        figure(data, "step", "max / mean", 340),
    )


def _what_if(experts: ExpertHistory | None) -> Panel:
    title = "What replicas would change"
    if experts is None:
        return Panel("what-if", title, missing="The log has no monitor/experts.arrays.")
    count = experts.frames.shape[-1]
    ranks, assumed = experts.ranks, ""
    if ranks == 1:
        ranks = max(r for r in range(1, WHAT_IF_RANKS + 1) if count % r == 0)
        assumed = f" The experts lie on one rank; {ranks} ranks are assumed."
    if ranks == 1:
        return Panel("what-if", title, missing=f"{count} experts do not divide over ranks.")
    recent = experts.frames[-max(1, len(experts.frames) // 10) :].sum(axis=0, dtype=np.int64)
    recent = recent[recent.sum(axis=1) > 0]
    if not len(recent):
        return Panel("what-if", title, missing="No expert had a token in the last steps.")
    points = replica_counts(count, ranks)
    curves = np.array([load_metrics.replicated_imbalance(recent, ranks, n) for n in points])
    placed = load_metrics.imbalance(load_metrics.rank_load(recent, ranks))
    at = np.array(points)
    hover, marked = "%{y:.3f}", {"mode": "lines+markers"}
    worst, mean = (np.full(len(at), float(value)) for value in (placed.max(), placed.mean()))
    data = [
        line(at, curves.max(axis=1), "worst layer", "@1", hover, **marked),
        line(at, curves.mean(axis=1), "mean layer", "@0", hover, **marked),
        line(at, worst, "worst, as placed", "@1/0.6", hover, dash="dot"),
        line(at, mean, "mean, as placed", "@0/0.6", hover, dash="dot"),
    ]
    return Panel(
        "what-if",
        title,
        f"Predicted fullest over mean of {ranks} ranks if the hottest experts of each layer had "
        "extra copies and all were placed anew, by the load of the last tenth of the run (greedy, "
        f"as DeepSeek's EPLB without groups). 0 extra: placed anew without copies.{assumed}",
        figure(data, "extra expert slots in a layer", "max / mean", 340),
    )


def replica_counts(experts: int, ranks: int) -> list[int]:
    """0 to half the experts in at most 9 whole multiples of the ranks."""
    most = max(ranks, experts // 2 // ranks * ranks)
    stride = max(ranks, -(-most // 8 // ranks) * ranks)
    return list(range(0, most + 1, stride))


def _compute(ranks: RankHistory | None) -> Panel:
    title = "Own computation of the ranks over time"
    if ranks is None or "compute_seconds" not in ranks.columns:
        return Panel("compute", title, missing=NO_RANKS, wide=True)
    if ranks.ranks == 1:
        return Panel("compute", title, missing="The run has one rank.", wide=True)
    own = ranks.columns["compute_seconds"]
    share = own / np.maximum(np.nanmedian(own, axis=1, keepdims=True), 1e-12)
    late = np.nanmean(share[-max(1, len(share) // 10) :], axis=0)
    slowest = int(np.nanargmax(late))
    return Panel(
        "compute",
        title,
        "Seconds a rank computes, without waiting, over the median rank's. A lasting red row is a "
        f"straggler. In the last tenth rank {slowest} is the slowest: {late[slowest]:.2f} of the "
        "median.",
        _rank_map(ranks.steps, share, "of the median", "time / median"),
        wide=True,
    )


def _waiting(ranks: RankHistory | None) -> Panel:
    title = "Waiting and transfer of each rank"
    if ranks is None:
        return Panel("waiting", title, missing=NO_RANKS)
    if ranks.ranks == 1:
        return Panel("waiting", title, missing="The run has one rank: it waits for nobody.")
    at = np.arange(ranks.ranks)
    data = [
        bars(at, np.nanmean(values, axis=0), name, color, "%{y:.4f} s")
        for key, name, color in (
            ("wait_seconds", "waiting for the last rank", "@3"),
            ("transfer_seconds", "transfer", "@1"),
        )
        if (values := ranks.columns.get(key)) is not None and np.isfinite(values).any()
    ]
    if not data:
        return Panel("waiting", title, missing="The ranks' log has no waiting and transfer times.")
    return Panel(
        "waiting",
        title,
        "Mean over the run. The rank that waits least is the one that is waited for.",
        figure(
            data, "rank", "seconds per step", 400, barmode="stack", xaxis=_ranks_ticks(ranks.ranks)
        ),
    )


def _traffic(traffic: Traffic | None) -> Panel:
    title = "Traffic between ranks"
    if traffic is None or len(traffic.bytes_per_step) == 1:
        why = "One rank sends nothing." if traffic else "The log has no monitor/traffic.arrays."
        return Panel("traffic", title, missing=why)
    matrix, unit = folded(traffic)
    total = float(traffic.bytes_per_step.sum())
    words = f"{quantity(total, 'B')} a step in all"
    if traffic.nodes is not None and len(set(traffic.nodes)) > 1:
        node = np.array(traffic.nodes)
        across = float(traffic.bytes_per_step[node[:, None] != node[None, :]].sum())
        words += f", {100 * across / max(total, 1):.1f} % of it between nodes"
    ticks, most = _ranks_ticks(len(matrix)), float(matrix.max()) / 1e6
    hover = f"{unit} %{{y}} to {unit} %{{x}}: %{{z:.4g}} MB"
    return Panel(
        "traffic",
        title,
        f"Bytes sent in dispatch and combine, mean of {traffic.steps} logged steps: {words}.",
        figure(
            [heat("@sequential", "MB per step", 0, most, hover, z=packed(matrix / 1e6))],
            f"to {unit}",
            f"from {unit}",
            400,
            {"autorange": "reversed", "showgrid": False, **ticks},
            xaxis={"showgrid": False, **ticks},
            hovermode="closest",
        ),
    )


def folded(traffic: Traffic) -> tuple[np.ndarray, str]:
    """A matrix of at most 256 x 256 and what its rows are: ranks, nodes, or blocks of ranks."""
    matrix = traffic.bytes_per_step
    ranks = len(matrix)
    if ranks <= MOST_MATRIX:
        return matrix, "rank"
    if traffic.nodes is not None and 1 < len(set(traffic.nodes)) <= MOST_MATRIX:
        owner, unit = np.unique(traffic.nodes, return_inverse=True)[1], "node"
    else:
        size = -(-ranks // MOST_MATRIX)
        owner, unit = np.arange(ranks) // size, f"block of {size} ranks"
    member = np.eye(owner.max() + 1)[owner]
    return member.T @ matrix @ member, unit


def _rows(ranks: RankHistory | None) -> Panel:
    title = "Rows that come to the experts of a rank"
    rows = None if ranks is None else ranks.columns.get("received_rows")
    if ranks is None or rows is None or not np.isfinite(rows).any():
        return Panel("rows", title, missing="The ranks' log has no received rows.")
    data = [
        line(ranks.steps, np.nanmax(rows, axis=1), "fullest rank", "@1", "%{y:,.0f}"),
        line(ranks.steps, np.nanmean(rows, axis=1), "mean rank", "@0", "%{y:,.0f}"),
    ]
    largest = ranks.columns.get("largest_received_rows")
    if largest is not None and np.isfinite(largest).any():
        most = np.nanmax(largest, axis=1)
        data.append(line(ranks.steps, most, "largest at once", "@2", "%{y:,.0f}", dash="dot"))
    return Panel(
        "rows",
        title,
        "Choices of tokens in a step, over layers and micro-batches. Largest at once: of one layer "
        "and micro-batch, what memory has to hold.",
        figure(data, "step", "rows per step", 400, {"rangemode": "tozero", "exponentformat": "SI"}),
    )


def _memory_phases(ranks: RankHistory | None) -> Panel:
    title = "Peak memory of each phase and rank"
    phases = {
        key: (name, color)
        for key, name, color in (
            ("forward_backward", "forward, backward", "@0"),
            ("optimizer", "optimiser", "@2"),
            ("checkpoint", "checkpoint", "@4"),
        )
        if ranks is not None and np.nansum(ranks.columns.get(f"{key}_peak_bytes", 0.0)) > 0
    }
    if ranks is None or not phases:
        return Panel("memory-phases", title, missing="The ranks' log has no memory of phases.")
    most = {key: np.nanmax(ranks.columns[f"{key}_peak_bytes"], axis=0) for key in phases}
    shown, note = np.arange(ranks.ranks), ""
    if ranks.ranks > MOST_BARS:
        shown = np.sort(np.argsort(-np.max(list(most.values()), axis=0))[:MOST_BARS])
        note = f" The {MOST_BARS} ranks of the highest peaks."
    names = [str(rank) for rank in shown]
    data = [
        bars(names, most[key][shown] / 1e9, name, color, "%{y:.2f} GB")
        for key, (name, color) in phases.items()
    ]
    rows = []
    for key, (name, _) in phases.items():
        rank = int(np.argmax(most[key]))
        cells = [quantity(float(most[key][rank]), "B")]
        for kind in ("allocated", "reserved"):
            values = ranks.columns.get(f"{key}_{kind}_bytes")
            largest = 0.0 if values is None else float(np.nanmax(values, initial=0.0))
            cells.append(quantity(largest, "B") if largest else "none")
        rows.append([name, str(rank), *cells])
    columns = ["phase", "rank", "peak", "allocated after", "reserved after"]
    return Panel(
        "memory-phases",
        title,
        "The most of the logged steps. On GPUs allocated bytes, on CPUs the resident size; "
        "reserved is what torch's GPU allocator holds, in use or not. Below, the highest of any "
        "rank." + note,
        figure(data, "rank", "peak memory, GB", 260, barmode="group", xaxis={"type": "category"}),
        table(columns, rows, "l r r r r"),
    )


def _memory(run: RunLog) -> Panel:
    title = "Memory"
    data = _memory_lines(run.ranks)
    if not data:
        values = run.column("memory_bytes")
        if values is None:
            return Panel("memory", title, missing="The log has no memory figures.", wide=True)
        data = [line(run.steps["step"], values / 1e9, "largest rank", "@0", "%{y:.2f} GB")]
    limit = (run.environment or {}).get("memory_bytes_per_device")
    if isinstance(limit, int | float):
        ends = run.steps["step"][[0, -1]]
        data.append(line(ends, np.full(2, limit / 1e9), "device", "@3", "%{y:.2f} GB", dash="dot"))
    return Panel(
        "memory",
        title,
        "On GPUs allocated bytes and their peak within a step; on CPUs the resident size of the "
        "process. A line that only rises is a leak.",
        figure(data, "step", "memory, GB", 340),
        wide=True,
    )


def _memory_lines(ranks: RankHistory | None) -> list[Figure]:
    """A line per rank, or of many ranks the extremes and the median."""
    if ranks is None:
        return []
    known = [
        name
        for name in ("peak_memory_bytes", "memory_bytes")
        if name in ranks.columns and np.isfinite(ranks.columns[name]).any()
    ]
    if not known:
        return []
    values = ranks.columns[known[0]] / 1e9
    kind = "peak" if known[0].startswith("peak") else "memory"
    if ranks.ranks <= MOST_LINES:
        return [
            line(ranks.steps, values[:, rank], f"{kind}, rank {rank}", COLORS[rank], "%{y:.2f} GB")
            for rank in range(ranks.ranks)
        ]
    largest = int(np.nanargmax(np.nanmean(values, axis=0)))
    at, hover = ranks.steps, "%{y:.2f} GB"
    drawn = [
        line(at, np.nanmax(values, axis=1), f"{kind}, largest", "@1", hover),
        line(at, np.nanmedian(values, axis=1), f"{kind}, median", "@0", hover),
        line(at, np.nanmin(values, axis=1), f"{kind}, smallest", "@2", hover),
        line(at, values[:, largest], f"{kind}, rank {largest}", "@4", hover, dash="dot"),
    ]
    reserved = ranks.columns.get("reserved_bytes")
    if reserved is not None and np.isfinite(reserved).any():
        most = np.nanmax(reserved / 1e9, axis=1)
        drawn.append(line(at, most, "reserved, largest", "@muted", hover))
    return drawn


def _collectives(rows: list[dict[str, Any]]) -> Panel:
    title = "Collectives"
    if not rows:
        why = "The log has no monitor/collectives.jsonl, or the run has one process."
        return Panel("collectives", title, missing=why, wide=True)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[str(row.get("group", "")), str(row.get("op", ""))].append(row)
    numbers = "calls bytes p50 p95 max algbw busbw waiting transfer exposed".split()
    cells = []
    for (group, op), found in sorted(groups.items()):
        exposed = _median(found, "exposed_share")
        cells.append(
            [
                group,
                op,
                f"{_median(found, 'count') or 0:,.0f}",
                quantity(_median(found, "bytes"), "B"),
                *(quantity(_median(found, key), "s") for key in ("p50", "p95")),
                quantity(_largest(found, "max"), "s"),
                *(quantity(_median(found, key), "B/s") for key in ("algbw", "busbw")),
                quantity(_median(found, "wait_seconds"), "s"),
                quantity(_median(found, "transfer_seconds"), "s"),
                "not logged" if exposed is None else f"{100 * exposed:.1f} %",
            ]
        )
    steps = len({row["step"] for row in rows})
    return Panel(
        "collectives",
        title,
        f"Median of {steps:,} logged steps, max over all. Calls, bytes, waiting and transfer are "
        "per step; p50, p95 and max of one call. Bus bandwidth is what the wires carry; exposed is "
        "the share that no computation covers.",
        body=table(["group", "operation", *numbers], cells, "l l" + " r" * len(numbers)),
        wide=True,
    )


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = _values(rows, key)
    return float(np.median(values)) if values else None


def _largest(rows: list[dict[str, Any]], key: str) -> float | None:
    return max(_values(rows, key), default=None)
