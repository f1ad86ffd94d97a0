"""Panels of a run as a whole: its state in a few numbers, alarms, settings; and of several runs."""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek.config.errors import shown
from deepseek.monitoring.report.panel import (
    Panel,
    duration,
    figure,
    line,
    quantity,
    smoothed,
    table,
)
from deepseek.monitoring.report.training_panels import loss_curve
from deepseek.monitoring.run_log import RunLog

MOST_ALARMS = 200
MOST_EVENTS = 100
COLORS = ("@0", "@1", "@2", "@4", "@3", "@5", "@6", "@7")
WITH_MORE = {"validation loss", "tokens per second", "load max / mean"}
"""Cards whose small line is a number too."""
DASHES = ("solid", "dash", "dot", "dashdot")


def headline(run: RunLog) -> list[tuple[str, str, str]]:
    """The numbers at the top: label, value, and a small line below."""
    steps = run.steps["step"]
    of = f"of {run.max_steps:,}" if run.max_steps else ""
    tokens = run.column("tokens")
    loss, validation = run.column("loss"), run.validations.get("val_loss")
    goodput, wall = run.goodput(), run.wall_seconds()
    starts = sum(event["event"] in ("resumed", "restart") for event in run.events)
    restarts = Counter(event["event"] for event in run.events)
    state, _, why = run.state().partition(": ")
    cards = [
        ("state", state, f"{why}; {_when(run)}" if why else _when(run)),
        ("steps", f"{int(steps[-1]):,}", of),
        ("tokens", quantity(float(np.nansum(tokens))) if tokens is not None else "not logged", ""),
        (
            "training loss",
            f"{loss_curve(run)[1][-1]:.4f}" if loss is not None else "not finite",
            "smoothed, nats per token",
        ),
    ]
    if validation is not None:
        bits = run.validations.get("val_bits_per_byte")
        below = f"{bits[-1]:.4f} bits per byte" if bits is not None else ""
        cards.append(("validation loss", f"{validation[-1]:.4f}", below))
    cards.append(
        (
            "wall time",
            duration(wall),
            "" if wall is None else "pauses after a stop left out",
        )
    )
    cards.append(
        (
            "goodput",
            "not logged" if goodput is None else f"{100 * goodput:.1f} %",
            f"{restarts['resumed']} resumed, {run.lost_steps:,} steps lost"
            if starts
            else "time in steps that were kept",
        )
    )
    speed = run.column("tokens_per_second")
    if speed is not None:
        mfu = run.column("mfu")
        recent = slice(-max(1, len(steps) // 10), None)
        below = "" if mfu is None else f"MFU {100 * np.nanmedian(mfu[recent]):.1f} %"
        cards.append(("tokens per second", f"{np.nanmedian(speed[recent]):,.0f}", below))
    memory = run.column("memory_bytes")
    if memory is not None:
        cards.append(("largest memory", quantity(float(np.nanmax(memory)), "B"), "of any rank"))
    if run.experts is not None:
        worst = float(np.nanmax(run.experts.metrics["max_violation"][-1], initial=0.0)) + 1
        below = f"{len(run.experts.dead):,} dead experts"
        cards.append(("load max / mean", f"{worst:.2f}", f"worst layer; {below}"))
    monitor, seconds = run.column("monitor_seconds"), run.column("seconds")
    if monitor is not None and seconds is not None:
        share = 100 * float(np.nansum(monitor)) / max(float(np.nansum(seconds)), 1e-9)
        cards.append(("cost of monitoring", f"{share:.2f} %", "of the steps' time"))
    alarms = run.alarms()
    cards.append(("alarms", f"{len(alarms):,}", _kinds(alarms)))
    skipped = run.steps.get("skipped")
    if skipped is not None:
        cards.append(("steps skipped", f"{int(np.nansum(skipped)):,}", "gradient not finite"))
    return cards


def _when(run: RunLog) -> str:
    times = run.steps.get("time", np.empty(0))
    if not np.isfinite(times).any():
        return ""
    return time.strftime("last row %Y-%m-%d %H:%M UTC", time.gmtime(float(np.nanmax(times))))


def _kinds(alarms: list[dict[str, Any]]) -> str:
    counts = Counter(str(alarm.get("kind", "?")).replace("_", " ") for alarm in alarms)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common(3))


def alarms_panel(run: RunLog) -> Panel:
    """Every alarm with its numbers and the likely remedy."""
    alarms = run.alarms()
    if not alarms:
        return Panel("alarms", "Alarms", body="<p>None was raised.</p>", wide=True)
    rows = [
        [
            f"{alarm['step']:,}",
            str(alarm.get("kind", "")).replace("_", " "),
            str(alarm.get("message", "")),
            str(alarm.get("remedy", "")),
        ]
        for alarm in alarms[-MOST_ALARMS:]
    ]
    note = "" if len(alarms) <= MOST_ALARMS else f"The last {MOST_ALARMS} of {len(alarms):,}."
    words = ["step", "kind", "what", "likely remedy"]
    return Panel("alarms", "Alarms", note, body=table(words, rows, "r l l l"), wide=True)


def events_panel(run: RunLog) -> Panel:
    """Starts, restarts, stops; checkpoints are counted."""
    rows = [
        [
            f"{event['step']:,}",
            event["event"],
            _clock(event.get("time")),
            str(event.get("reason", "")),
        ]
        for event in run.events
        if event["event"] not in ("alarm", "checkpoint")
    ]
    saved = [event["step"] for event in run.events if event["event"] == "checkpoint"]
    note = f"{len(saved):,} checkpoints, the last at step {saved[-1]:,}." if saved else ""
    if not rows:
        return Panel("events", "Events", note, missing="The log has no events.", wide=True)
    words = ["step", "event", "time (UTC)", "reason"]
    body = table(words, rows[-MOST_EVENTS:], "r l l l")
    return Panel("events", "Events", note, body=body, wide=True)


def _clock(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def environment_panel(run: RunLog) -> Panel:
    """What the run ran on."""
    title = "Environment"
    if run.environment is None:
        return Panel("environment", title, missing="The run folder has no environment.json.")
    rows = [[key, _flat(value)] for key, value in run.environment.items()]
    return Panel("environment", title, body=table(["what", "value"], rows), wide=True)


def _flat(value: Any) -> str:
    if isinstance(value, list):
        counts = Counter(map(str, value))
        return ", ".join(f"{n} x {text}" if n > 1 else text for text, n in counts.items())
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_flat(inner)}" for key, inner in value.items())
    return "none" if value is None else str(value)


def config_panel(run: RunLog) -> Panel:
    """The resolved configuration as it was written."""
    title = "Resolved configuration"
    if not run.config_text:
        return Panel("config", title, missing="The run folder has no config.yaml.", wide=True)
    text = html.escape(run.config_text)
    body = f'<pre class="scroll" tabindex="0">{text}</pre>'
    return Panel("config", title, "Every key, as the run used it.", body=body, wide=True)


def comparison_panels(runs: list[RunLog]) -> list[Panel]:
    """Losses over each other, the numbers side by side, and what differs in the settings."""
    return [
        _losses(runs, "compare-training", "Training loss, smoothed", False),
        _losses(runs, "compare-validation", "Validation loss", True),
        _curves(runs, "compare-speed", "Speed, smoothed", "tokens per second", _speed_curve),
        _curves(
            runs,
            "compare-load",
            "Load of the experts, mean of the layers",
            "MaxVio, max / mean - 1",
            _load_curve,
        ),
        _numbers(runs),
        _differences(runs),
    ]


def _speed_curve(run: RunLog) -> tuple[np.ndarray, np.ndarray] | None:
    values = run.column("tokens_per_second")
    if values is None:
        return None
    return run.steps["step"], smoothed(values, max(1.0, len(values) / 100))


def _load_curve(run: RunLog) -> tuple[np.ndarray, np.ndarray] | None:
    if run.experts is None:
        return None
    values = run.experts.metrics["max_violation"]
    known = np.isfinite(values)
    mean = np.where(known, values, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return run.experts.steps, mean


def _curves(
    runs: list[RunLog],
    key: str,
    title: str,
    label: str,
    curve: Callable[[RunLog], tuple[np.ndarray, np.ndarray] | None],
) -> Panel:
    """One line of every run that has it."""
    data = []
    for index, run in enumerate(runs):
        if (found := curve(run)) is not None:
            look = {"dash": DASHES[index // len(COLORS) % len(DASHES)]}
            color = COLORS[index % len(COLORS)]
            data.append(line(*found, html.escape(run.label), color, line=look))
    if not data:
        return Panel(key, title, missing="No run has logged it.")
    return Panel(key, title, figure=figure(data, "step", label, yaxis={"rangemode": "tozero"}))


def _losses(runs: list[RunLog], key: str, title: str, validation: bool) -> Panel:
    data = []
    for index, run in enumerate(runs):
        look = {
            "color": COLORS[index % len(COLORS)],
            "line": {"dash": DASHES[index // len(COLORS) % len(DASHES)]},
        }
        name = html.escape(run.label)
        if validation and "val_loss" in run.validations:
            x, y = run.validations["step"], run.validations["val_loss"]
            data.append(line(x, y, name, mode="lines+markers", **look))  # type: ignore[arg-type]
        elif not validation and run.column("loss") is not None:
            data.append(line(*loss_curve(run), name, **look))  # type: ignore[arg-type]
    if not data:
        return Panel(key, title, missing="No run has logged it.")
    return Panel(key, title, figure=figure(data, "step", "loss, nats per token", 360))


def _numbers(runs: list[RunLog]) -> Panel:
    cards = [
        {
            label: f"{value} ({below})" if below and label in WITH_MORE else value
            for label, value, below in headline(run)
        }
        for run in runs
    ]
    labels = list(dict.fromkeys(label for card in cards for label in card))
    rows = [[label, *(card.get(label, "") for card in cards)] for label in labels]
    columns = ["", *(run.label for run in runs)]
    body = table(columns, rows, "l" + " r" * len(runs))
    return Panel("compare-numbers", "Side by side", body=body, wide=True)


def _differences(runs: list[RunLog]) -> Panel:
    title = "Settings that differ"
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for leaves in flat for key in leaves))
    rows = [
        [key, *(shown(leaves[key]) if key in leaves else "not set" for leaves in flat)]
        for key in keys
        if len({repr(leaves.get(key, _differences)) for leaves in flat}) > 1
    ]
    if not rows:
        return Panel("compare-settings", title, body="<p>None: the configurations are equal.</p>")
    body = table(["key", *(run.label for run in runs)], rows)
    return Panel("compare-settings", title, body=body, wide=True)


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, dict) else [(path, value)]
    return found
