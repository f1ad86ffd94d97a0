"""The picture of a plan: its pipeline over time, memory, seconds; one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from deepseek.commands.validate import size_text
from deepseek.config.layout import world_size
from deepseek.monitoring.report.page import Page, Tab
from deepseek.monitoring.report.panel import COLORS, Figure, Panel, Section, bars, figure, level
from deepseek.monitoring.report.panel import table as html_table
from deepseek.monitoring.report.run_panels import Card
from deepseek.planner.hardware import Device
from deepseek.planner.pipeline_timeline import Interval
from deepseek.planner.search import Plan

MOST_INTERVALS = 12_000
"""Of a timeline; of a longer one the begin is drawn."""

KINDS = {
    "F": ("forward", COLORS[0]),
    "B": ("backward", COLORS[1]),
    "FB": ("forward and backward, overlapped", COLORS[2]),
    "I": ("gradients of inputs", COLORS[3]),
    "W": ("gradients of weights", COLORS[4]),
}
"""Of intervals: their names and colours."""


def plan_page(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    best: Plan,
    device: Device,
    room: float,
) -> str:
    """The page of the best of some layouts.

    Args:
        title: what was planned.
        columns, rows: the table of all layouts.
        best: the first of them.
        device: of the cluster.
        room: bytes that a rank can take.

    Raises:
        UserError: plotly is not installed.
    """
    estimate = best.estimate
    whole = [
        [re.sub(r"(?<=\d) (?=%|\wi?B)", "\N{NO-BREAK SPACE}", cell) for cell in row] for row in rows
    ]
    panels = [
        Panel("layouts", "Fastest layouts", body=html_table(columns, whole, named=True), wide=True),
        _timeline(best),
        _seconds(best),
        _memory(best, room),
    ]
    cards = [
        Card("step", f"{estimate.seconds:.4g} s", "predicted"),
        Card("tokens/s/GPU", f"{estimate.tokens_per_s_per_gpu:,.0f}"),
        Card(
            "MFU",
            f"{100 * estimate.mfu:.1f} %",
            f"of {device.peak}; {estimate.convention}",
        ),
        Card("memory", size_text(best.most), f"of {room / 2**30:.4g} GiB"),
    ]
    about = f"{world_size(best.run):,} {device}"
    return Page(title, [Tab(title, [Section("plan", "Plan", panels)], about, cards=cards)]).whole()


def _timeline(best: Plan) -> Panel:
    timeline = best.estimate.timeline()
    shown = sorted(timeline.intervals, key=lambda interval: interval.start)[:MOST_INTERVALS]
    note = (
        "When each rank of the pipeline works on which micro-batch; on average they wait "
        f"{100 * timeline.bubble:.1f} % of the time."
    )
    if len(shown) < len(timeline.intervals):
        note += f" The first {len(shown):,} of {len(timeline.intervals):,} pieces."
    data = [
        _pieces([interval for interval in shown if interval.kind == kind], *look)
        for kind, look in KINDS.items()
    ]
    drawn = figure(
        [pieces for pieces in data if pieces],
        "seconds",
        "pipeline rank",
        120 + 26 * timeline.ranks,
        {"autorange": "reversed", "dtick": 1},
        barmode="overlay",
        bargap=0.1,
    )
    return Panel("timeline", "Pipeline", note, drawn, wide=True)


def _pieces(intervals: Sequence[Interval], name: str, color: str) -> Figure:
    """Bars that lie, one for each interval; nothing if there is none."""
    if not intervals:
        return {}
    start = np.array([interval.start for interval in intervals])
    length = np.array([interval.end for interval in intervals]) - start
    rank = np.array([interval.rank for interval in intervals])
    hover = "rank %{y}, stage and micro-batch %{customdata}: %{x:.4g} s<extra></extra>"
    drawn = bars(length, rank, name, color, hover, orientation="h")
    drawn["base"] = start.tolist()
    drawn["customdata"] = [f"{one.stage}, {one.micro_batch}" for one in intervals]
    return drawn


def _seconds(best: Plan) -> Panel:
    parts = {part: seconds for part, seconds in best.estimate.parts.items() if seconds > 0}
    lying = bars(np.array(list(parts.values())), np.arange(len(parts)), "", COLORS[0], "%{x:.4g} s")
    lying |= {"orientation": "h", "y": list(parts)}
    axis = {"autorange": "reversed", "automargin": True}
    drawn = figure([lying], "seconds", "", 340, axis, showlegend=False)
    return Panel("seconds", "A step", "Seconds of the rank with most work, and its waiting.", drawn)


def _memory(best: Plan, room: float) -> Panel:
    ranks = np.arange(len(best.needs))
    data = [
        bars(
            ranks,
            np.array([getattr(need, part) for need in best.needs]) / 2**30,
            part,
            color,
            f"{part} %{{y:.2f}} GiB",
        )
        for part, color in zip(best.needs[0]._fields, COLORS, strict=False)
    ]
    drawn = figure(data, "pipeline rank", "GiB", 340, barmode="stack", xaxis={"dtick": 1})
    note = "Of one rank at each place of the pipeline; the dotted line is what a rank can take."
    return Panel("memory", "Memory", note, level(drawn, room / 2**30))
