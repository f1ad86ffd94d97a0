"""Panels of a run as a whole: its state in a few numbers, alarms, settings; and of several runs."""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.config.errors import shown
from deepseek.monitoring.report.panel import (
    Panel,
    duration,
    figure,
    hundredth,
    line,
    quantity,
    smoothed,
    table,
)
from deepseek.monitoring.report.training_panels import loss_curve
from deepseek.monitoring.run_log import RunLog

MOST_ALARMS = 200
MOST_EVENTS = 100
MOST_SAMPLES = 3
MOST_EVALUATIONS = 100
COLORS = ("@0", "@1", "@2", "@4", "@3", "@5", "@6", "@7")
DASHES = ("solid", "dash", "dot", "dashdot")
IN_DATA_PANEL = ("parameters", "active_parameters", "trained_parameters", "data")
"""Keys of the environment that are not told of as such."""


@dataclass(frozen=True)
class Card:
    """One number at the top."""

    label: str
    value: str
    below: str = ""
    """A small line."""
    is_warning: bool = False


def headline(run: RunLog) -> list[Card]:
    """The numbers at the top, losses first; what was not logged is left out."""
    cards = []
    if run.column("loss") is not None:
        value = f"{loss_curve(run)[1][-1]:.4f}"
        cards.append(Card("training loss", value, "smoothed, nats per token"))
    else:
        cards.append(Card("training loss", "not finite", "in any step", is_warning=True))
    if run.validations:
        bits = run.validations.get("val_bits_per_byte", np.array([np.nan]))[-1]
        below = f"{bits:.4f} bits per byte" if np.isfinite(bits) else "nats per token"
        cards.append(Card("validation loss", f"{run.validations['val_loss'][-1]:.4f}", below))
    of = f"of {run.max_steps:,}" if run.max_steps else ""
    cards.append(Card("steps", f"{run.step:,}", of))
    tokens = run.column("tokens")
    if tokens is not None:
        cards.append(Card("tokens", quantity(float(np.nansum(tokens)))))
    recent = slice(-max(1, len(run.steps["step"]) // 10), None)
    speed, mfu = run.column("tokens_per_second"), run.column("mfu")
    if speed is not None:
        below = ""
        if mfu is not None and np.isfinite(mfu[recent]).any():
            below = f"MFU {100 * np.nanmedian(mfu[recent]):.1f} %"
        cards.append(Card("tokens per second", f"{np.nanmedian(speed[recent]):,.0f}", below))
    if (wall := run.wall_seconds()) is not None:
        cards.append(Card("wall time", duration(wall), "pauses after a stop left out"))
    if (goodput := run.goodput()) is not None:
        starts = Counter(event["event"] for event in run.events)
        below = "time in steps that were kept"
        if starts["resumed"] or starts["restart"]:
            below = f"{starts['resumed']} resumed, {run.lost_steps:,} steps lost"
        cards.append(Card("goodput", f"{100 * goodput:.1f} %", below))
    facts = run.environment or {}
    if isinstance(count := facts.get("parameters"), int):
        active = facts.get("active_parameters")
        words = [f"{quantity(active)} active per token"] if isinstance(active, int) else []
        trained = facts.get("trained_parameters")
        if isinstance(trained, int) and trained != count:
            words.append(f"{quantity(trained)} trained")
        cards.append(Card("parameters", quantity(count), ", ".join(words)))
    if parts := run.data_parts():
        epochs = run.epochs()
        most = f", {max(epochs.values()):.2f} epochs" if epochs else ""
        name = Path(parts[0].name).name if len(parts) == 1 else f"{len(parts)} prefixes"
        of_most = " of the one read most" if epochs and len(parts) > 1 else ""
        size = quantity(float(sum(part.tokens for part in parts)))
        cards.append(Card("data", size, f"tokens of {name}{most}{of_most}"))
    if (memory := run.column("memory_bytes")) is not None:
        most = quantity(float(np.nanmax(memory)), "B")
        cards.append(Card("largest memory", most, "of any rank"))
    if run.experts is not None:
        worst = float(np.nanmax(run.experts.metrics["max_violation"][-1], initial=0.0)) + 1
        below = f"worst layer; {len(run.experts.dead):,} dead experts"
        cards.append(Card("load max / mean", f"{worst:.2f}", below))
    monitor, seconds = run.column("monitor_seconds"), run.column("seconds")
    if monitor is not None and seconds is not None:
        share = 100 * float(np.nansum(monitor)) / max(float(np.nansum(seconds)), 1e-9)
        cards.append(Card("cost of monitoring", f"{share:.2f} %", "of the steps' time"))
    alarms = run.alarms()
    cards.append(Card("alarms", f"{len(alarms):,}", _kinds(alarms), bool(alarms)))
    skipped = run.column("skipped")
    if skipped is not None and (count := int(np.nansum(skipped))):
        cards.append(Card("steps skipped", f"{count:,}", "gradient not finite", is_warning=True))
    return cards


def last_row(run: RunLog) -> str:
    """When it was written, for people."""
    times = run.steps.get("time", np.empty(0))
    last = float(np.nanmax(times)) if np.isfinite(times).any() else None
    return f"last row {at} UTC" if (at := _clock(last, "%Y-%m-%d %H:%M")) else ""


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
            _until(alarm, run),
            str(alarm.get("kind", "")).replace("_", " "),
            str(alarm.get("message", "")),
            str(alarm.get("remedy", "")),
        ]
        for alarm in alarms[-MOST_ALARMS:]
    ]
    note = "" if len(alarms) <= MOST_ALARMS else f"The last {MOST_ALARMS} of {len(alarms):,}."
    words = ["step", "until", "kind", "what", "likely remedy"]
    return Panel("alarms", "Alarms", note, body=table(words, rows, "r r l l l"), wide=True)


def _until(alarm: dict[str, Any], run: RunLog) -> str:
    """When its trouble was over, as far as it was watched."""
    over: int | None = alarm["until"]
    if over is None and run.state() == "running":
        return "goes on"
    ended = over is None or alarm["with_run"]
    return f"{run.step if over is None else over:,}{', the run ended' if ended else ''}"


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
        if event["event"] not in ("alarm", "alarm_over", "checkpoint")
    ]
    saved = [event["step"] for event in run.events if event["event"] == "checkpoint"]
    note = f"{_count(len(saved), 'checkpoint')}, the last at step {saved[-1]:,}." if saved else ""
    if not rows:
        return Panel("events", "Events", note, missing="The log has no events.", wide=True)
    words = ["step", "event", "time (UTC)", "reason"]
    body = table(words, rows[-MOST_EVENTS:], "r l l l")
    return Panel("events", "Events", note, body=body, wide=True)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _clock(seconds: Any, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A Unix time in UTC; empty if there is none, or none that a calendar has."""
    try:
        return time.strftime(form, time.gmtime(seconds)) if seconds is not None else ""
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def data_panel(run: RunLog) -> Panel:
    """How large the model is, what it is trained on, and how often it has seen that."""
    title, facts = "Model and data", run.environment or {}
    counts = {
        "parameters": facts.get("parameters"),
        "active per token": facts.get("active_parameters"),
        "trained": facts.get("trained_parameters"),
    }
    rows = [
        [name, f"{count:,}", "", ""] for name, count in counts.items() if isinstance(count, int)
    ]
    epochs = run.epochs()
    for part in run.data_parts():
        seen = f"{epochs[part.name]:.2f} epochs" if part.name in epochs else ""
        share = f"{100 * part.share:.3g} % of the batches" if part.share < 1 else ""
        rows.append([part.name, f"{part.tokens:,} tokens", share, seen])
    if not rows:
        why = "The run folder does not tell parameters and data."
        return Panel("data", title, missing=why)
    return Panel("data", title, body=table(["what", "size", "share", "seen"], rows, "l r l r"))


def samples_panel(run: RunLog) -> Panel:
    """What the model has written."""
    title, samples = "Sample text", run.samples[-MOST_SAMPLES:]
    if not samples:
        why = "No sample was taken: deepseek train --sample takes one at the end."
        return Panel("samples", title, missing=why)
    bodies = [
        f"<h4>step {sample['step']:,}</h4>"
        f'<pre class="scroll sample" tabindex="0"><b>{_escaped(sample.get("prompt"))}</b>'
        f"{_escaped(sample.get('text'))}</pre>"
        for sample in reversed(samples)
    ]
    return Panel("samples", title, body="".join(bodies))


def evaluations_panel(run: RunLog) -> Panel | None:
    """What ``deepseek eval`` found, the newest first; None where it never ran."""
    rows = [
        [
            f"{found['step']:,}",
            str(domain.get("name", "")),
            f"{found.get('window', '')} / {found.get('stride', '')}",
            *(_number(domain.get(key)) for key in ("loss", "perplexity", "bits_per_byte")),
        ]
        for found in reversed(run.evaluations)
        for domain in found.get("domains", [])
        if isinstance(domain, dict)
    ]
    if not rows:
        return None
    note = "Nats per predicted id; every document is read alone, in windows of so many ids."
    words = ["step", "domain", "window / stride", "loss", "perplexity", "bits per byte"]
    body = table(words, rows[:MOST_EVALUATIONS], "r l r r r r")
    return Panel("evaluations", "Evaluations", note, body=body, wide=True)


def _number(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, int | float) else "-"


def _escaped(text: Any) -> str:
    return html.escape(str(text or ""))


def environment_panel(run: RunLog) -> Panel:
    """What the run ran on."""
    title = "Environment"
    if run.environment is None:
        return Panel("environment", title, missing="The run folder has no environment.json.")
    items = run.environment.items()
    rows = [[key, _flat(value)] for key, value in items if key not in IN_DATA_PANEL]
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
    return run.steps["step"], smoothed(values, hundredth(len(values)))


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
            color, dash = _look(index)
            data.append(line(*found, html.escape(run.label), color, dash=dash))
    if not data:
        return Panel(key, title, missing="No run has logged it.")
    return Panel(key, title, figure=figure(data, "step", label, yaxis={"rangemode": "tozero"}))


def _losses(runs: list[RunLog], key: str, title: str, validation: bool) -> Panel:
    data = []
    for index, run in enumerate(runs):
        name, (color, dash) = html.escape(run.label), _look(index)
        if validation and "val_loss" in run.validations:
            x, y = run.validations["step"], run.validations["val_loss"]
            data.append(line(x, y, name, color, dash=dash, mode="lines+markers"))
        elif not validation and run.column("loss") is not None:
            data.append(line(*loss_curve(run), name, color, dash=dash))
    if not data:
        return Panel(key, title, missing="No run has logged it.")
    return Panel(key, title, figure=figure(data, "step", "loss, nats per token", 360))


def _look(index: int) -> tuple[str, str]:
    """Colour and dashes of a run's lines."""
    return COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]


def _numbers(runs: list[RunLog]) -> Panel:
    cards = [{"state": run.state()} | {c.label: _cell(c) for c in headline(run)} for run in runs]
    labels = list(dict.fromkeys(label for card in cards for label in card))
    rows = [[label, *(card.get(label, "") for card in cards)] for label in labels]
    columns = ["", *(run.label for run in runs)]
    body = table(columns, rows, "l" + " r" * len(runs))
    return Panel("compare-numbers", "Side by side", body=body, wide=True)


def _cell(card: Card) -> str:
    """Its value, and the small line where that has a number too."""
    has_number = any(character.isdigit() for character in card.below)
    return f"{card.value} ({card.below})" if has_number else card.value


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
