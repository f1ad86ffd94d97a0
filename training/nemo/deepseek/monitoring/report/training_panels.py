"""Panels of the training: losses with events, norms, rate, speed, and where the time goes."""

from __future__ import annotations

from typing import Any

import numpy as np

from deepseek.monitoring.report.panel import (
    Figure,
    Panel,
    binned,
    duration,
    figure,
    hundredth,
    line,
    marks,
    packed,
    quantity,
    smoothed,
    stretch_starts,
    table,
)
from deepseek.monitoring.run_log import RunLog

STEP = "step"

EVENTS = {
    "restart": ("restart", "@3", "x"),
    "resumed": ("resumed", "@2", "triangle-right"),
    "alarm": ("alarm", "@5", "diamond"),
    "spike": ("loss spike", "@1", "star"),
    "skipped": ("step skipped", "@4", "cross"),
}
"""Kind of mark: its name, colour and symbol."""

PARTS = {
    "data": ("waiting for data", "@6"),
    "compute": ("computation", "@0"),
    "wait": ("waiting for other ranks", "@3"),
    "transfer": ("transfer", "@1"),
    "optimizer": ("optimiser", "@2"),
    "checkpoint": ("checkpoint", "@4"),
    "monitor": ("monitoring", "@7"),
    "other": ("other", "@muted"),
}
"""Parts of a step from the bottom to the top: name and colour."""


def loss_panels(run: RunLog) -> list[Panel]:
    """What the page begins with."""
    return [_loss(run), _bits(run)]


def training_panels(run: RunLog) -> list[Panel]:
    """In the order of the page."""
    return [
        _norms(run),
        _single(run, "lr", "lr", "Learning rate", "learning rate", "%{y:.3e}"),
        _speed(run),
        _mfu(run),
        _single(
            run,
            "balance",
            "balance_loss",
            "Balance loss",
            "balance loss, weighted",
            "%{y:.3e}",
            "The sequence-wise loss that keeps experts level, as it enters the total.",
        ),
        _step_time(run),
    ]


def loss_curve(run: RunLog) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the training loss, smoothed over a hundredth of the run."""
    steps = run.steps["step"]
    return steps, smoothed(run.steps["loss"], hundredth(len(steps)))


def _loss(run: RunLog) -> Panel:
    title, raw = "Training and validation", run.column("loss")
    if raw is None:
        return Panel("loss", title, missing="No step has a finite loss.", wide=True)
    steps, smooth = loss_curve(run)
    data = [
        line(steps, raw, "training, raw", "@0/0.3", "", width=1),
        line(steps, smooth, "training, smoothed", "@0"),
    ]
    mtp = run.column("mtp_loss")
    if mtp is not None:
        mtp_smooth = smoothed(mtp, hundredth(len(steps)))
        data.append(line(steps, mtp_smooth, "MTP, smoothed", "@4", dash="dot"))
    if "val_loss" in run.validations:
        data.append(_validation(run, "val_loss"))
    data += _event_marks(run, steps, smooth)
    return Panel(
        "loss",
        title,
        "Per token, in nats. Smoothed: a mean whose weights halve about every hundredth of the "
        "run to both sides. Marks on the curve are events; ticks along the bottom are checkpoints.",
        figure(
            data,
            STEP,
            "loss, nats per token",
            420,
            _loss_range(smooth, run),
            yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        ),
        wide=True,
    )


def _loss_range(smooth: np.ndarray, run: RunLog) -> Figure:
    """From the lowest value to a little above the start: one bad step must not flatten the rest."""
    seen = [smooth, run.validations.get("val_loss", np.empty(0)), run.steps.get("mtp_loss", smooth)]
    values = np.concatenate(seen)
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.1
    return {"range": [low - 2 * room, high + room]}


def _event_marks(run: RunLog, steps: np.ndarray, curve: np.ndarray) -> list[Figure]:
    marked: dict[str, list[tuple[int, str]]] = {}
    for event in [e for e in run.events if e["event"] != "alarm"] + run.alarms():
        kind = event["event"]
        if kind == "alarm" and "spike" in str(event.get("kind")):
            kind = "spike"
        words = event.get("message") or event.get("reason") or event.get("kind") or ""
        marked.setdefault(kind, []).append((event["step"], str(words)))
    skipped = run.steps.get("skipped")
    if skipped is not None:
        marked["skipped"] = [
            (int(s), "gradient not finite") for s in run.steps["step"][skipped == 1]
        ]
    drawn = []
    for kind, (name, color, symbol) in EVENTS.items():
        if marked.get(kind):
            at = np.array([step for step, _ in marked[kind]])
            y = np.interp(at, steps, curve)
            words = [_short(text) for _, text in marked[kind]]
            more = {"text": words, "cliponaxis": False}
            drawn.append(marks(at, y, name, color, symbol, "%{text}", **more))
    if marked.get("checkpoint"):
        at = np.unique([step for step, _ in marked["checkpoint"]])
        y, edge = np.full(len(at), 0.02), {"color": "@muted", "width": 1.5}
        look = {"yaxis": "y2", "edge": edge}
        drawn.append(marks(at, y, "checkpoint", "@muted", "line-ns", "saved", **look))
    return drawn


def _short(words: str) -> str:
    """For a hover label: plotly reads a few HTML tags there, so angle brackets become words."""
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return words if len(words) <= 90 else words[:87] + "..."


def _bits(run: RunLog) -> Panel:
    title = "Bits per byte"
    values = run.validations.get("val_bits_per_byte")
    if values is None or not np.isfinite(values).any():
        return Panel("bits", title, missing="No validation row has bits per byte.")
    note = "Validation loss per byte of text: comparable between tokenizers."
    return Panel(
        "bits", title, note, figure([_validation(run, "val_bits_per_byte")], STEP, "bits per byte")
    )


def _validation(run: RunLog, column: str) -> Figure:
    marker = {"color": "@1", "size": 6}
    at, values = run.validations["step"], run.validations[column]
    return line(at, values, "validation", "@1", mode="lines+markers", marker=marker)


def _norms(run: RunLog) -> Panel:
    title = "Gradient norms"
    kinds = {
        "grad_norm": ("all", "@0"),
        "grad_norm_dense": ("dense", "@2"),
        "grad_norm_expert": ("experts", "@1"),
        "grad_norm_router": ("router", "@4"),
    }
    data = [
        line(run.steps["step"], values, name, color, width=1.2)
        for key, (name, color) in kinds.items()
        if (values := run.column(key)) is not None
    ]
    if not data:
        return Panel("norms", title, missing="No step has a finite gradient norm.")
    axis = {"type": "log", "exponentformat": "power", "dtick": 1}
    note = "Before clipping, of the whole gradient and of its parts."
    return Panel("norms", title, note, figure(data, STEP, "norm, log scale", yaxis=axis))


def _single(
    run: RunLog, key: str, column: str, title: str, label: str, hover: str, note: str = ""
) -> Panel:
    values = run.column(column)
    if values is None:
        return Panel(key, title, missing=f"No step row has {column}.")
    return Panel(
        key,
        title,
        note,
        figure(
            [line(run.steps["step"], values, label, "@0", hover)],
            STEP,
            label,
            yaxis={"exponentformat": "e", "rangemode": "tozero"},
            showlegend=False,
        ),
    )


def _speed(run: RunLog) -> Panel:
    values = run.column("tokens_per_second")
    if values is None and (seconds := run.column("seconds")) is not None:
        values = run.steps["tokens"] / seconds
    if values is None:
        return Panel("speed", "Speed", missing="No step row has tokens per second.")
    data = [
        line(run.steps["step"], values, "each step", "@2/0.35", "%{y:,.0f}", width=1),
        line(
            run.steps["step"],
            smoothed(values, hundredth(len(values))),
            "smoothed",
            "@2",
            "%{y:,.0f}",
        ),
    ]
    axis = {"rangemode": "tozero", "exponentformat": "SI"}
    note = "Tokens of the whole global batch, by the step's wall time."
    return Panel("speed", "Speed", note, figure(data, STEP, "tokens per second", yaxis=axis))


def _mfu(run: RunLog) -> Panel:
    title = "Model FLOPs utilisation"
    values = run.column("mfu")
    if values is None:
        why = "No step row has mfu: the peak of the device is not known."
        return Panel("mfu", title, missing=why)
    data = [
        line(run.steps["step"], 100 * values, "each step", "@4/0.35", width=1),
        line(run.steps["step"], 100 * smoothed(values, hundredth(len(values))), "smoothed", "@4"),
    ]
    return Panel(
        "mfu",
        title,
        "FLOPs the model needs (recomputation not counted), over what the devices could do at "
        "best." + _denominator(run.environment or {}),
        figure(data, STEP, "MFU, %", yaxis={"rangemode": "tozero"}),
    )


def _denominator(environment: dict[str, Any]) -> str:
    """Both sides of the fraction, as far as they were recorded."""
    peak, devices = environment.get("peak_flops_per_device"), environment.get("processes")
    words = ""
    if isinstance(peak, int | float) and isinstance(devices, int):
        source = environment.get("peak_source")
        words += f" Peak: {devices} x {quantity(peak, 'FLOP/s')}" + (
            f" ({source})." if source else "."
        )
    if isinstance(flops := environment.get("flops_per_token"), int | float):
        words += f" A token takes {quantity(flops, 'FLOP')}."
    return words


def _step_time(run: RunLog) -> Panel:
    title = "Where the time of a step goes"
    seconds = run.column("seconds")
    parts = step_parts(run)
    if seconds is None or not parts:
        why = "The step rows lack the seconds of their parts."
        return Panel("step-time", title, missing=why, wide=True)
    bins = 150
    starts = stretch_starts(len(seconds), bins)
    at = run.steps["step"][starts]
    total = float(np.nansum(seconds))
    data, rows = [], []
    for key, values in parts.items():
        name, color = PARTS[key]
        mean = binned(values, bins)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "stackgroup": "time",
                "name": name,
                "x": packed(at),
                "y": packed(np.nan_to_num(mean)),
                "fillcolor": f"{color}/0.85",
                "line": {"width": 0, "color": color},
                "hovertemplate": "%{y:.4f} s",
            }
        )
        spent = float(np.nansum(values))
        rows.append(
            [name, f"{spent / len(seconds):.4f}", f"{100 * spent / total:.2f}", duration(spent)]
        )
    share = table(["part", "seconds per step", "% of the steps", "whole run"], rows, "l r r r")
    return Panel(
        "step-time",
        title,
        f"Means over {len(starts)} stretches of the run and over ranks. Communication that "
        "computation covers is inside computation; waiting and transfer are what it does not "
        "cover. Where a step takes far longer than the others, its top is cut off.",
        figure(
            data,
            STEP,
            "seconds per step",
            360,
            _time_range(binned(seconds, bins)),
            legend={"traceorder": "normal"},
        ),
        share,
        wide=True,
    )


def _time_range(seconds: np.ndarray) -> Figure:
    """From 0 to the longest, or to three times the usual: one step of a minute must not flatten a
    thousand of a second."""
    usual = 3 * float(np.nanpercentile(seconds, 90))
    longest = float(np.nanmax(seconds))
    return {"range": [0, 1.05 * min(longest, usual)]} if usual > 0 else {"rangemode": "tozero"}


def step_parts(run: RunLog) -> dict[str, np.ndarray]:
    """Seconds of each part of each step, by the keys of ``PARTS``; empty if nothing is known.

    Waiting and transfer come from the ranks' own log where there is one, held between its steps;
    else all communication of the step row counts as transfer.
    """
    columns = {
        "data": "data_seconds",
        "optimizer": "optimizer_seconds",
        "checkpoint": "checkpoint_seconds",
        "monitor": "monitor_seconds",
    }
    found = {k: np.nan_to_num(v) for k, c in columns.items() if (v := run.column(c)) is not None}
    compute = run.column("forward_backward_seconds")
    seconds = run.column("seconds")
    if compute is None or seconds is None:
        return {}
    parts: dict[str, Any] = {"compute": np.nan_to_num(compute)} | found
    communication = _communication(run)
    for key, values in communication.items():
        parts[key] = np.minimum(values, parts["compute"])
        parts["compute"] = parts["compute"] - parts[key]
    known = np.sum(list(parts.values()), axis=0)
    parts["other"] = np.maximum(0.0, np.nan_to_num(seconds) - known)
    return {key: parts[key] for key in PARTS if key in parts}


def _communication(run: RunLog) -> dict[str, np.ndarray]:
    steps = run.steps["step"]
    found: dict[str, np.ndarray] = {}
    if run.ranks is not None and run.ranks.ranks > 1:
        for key in ("wait", "transfer"):
            values = run.ranks.columns.get(f"{key}_seconds")
            if values is not None and np.isfinite(values).any():
                mean = np.nan_to_num(np.nanmean(values, axis=1))
                found[key] = np.interp(steps, run.ranks.steps, mean)
    if found:
        return found
    exchanged = run.column("all_to_all_seconds")
    return {} if exchanged is None else {"transfer": np.nan_to_num(exchanged)}
