"""Panels of the experts: who gets the tokens, layer by layer and step by step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deepseek.monitoring import load_metrics
from deepseek.monitoring.array_history import ExpertHistory
from deepseek.monitoring.report.panel import (
    CODES,
    Figure,
    Panel,
    binned,
    figure,
    frames,
    heat,
    line,
    packed,
    ratio_codes,
    stretch_starts,
    table,
)

MISSING = "The log has no monitor/experts.arrays: the experts were not monitored."
OCTAVES = 3
"""The colours of utilisation end at 2 ** -3 and 2 ** 3."""
MOST_DEAD_ROWS = 200
BINS = 300
"""Stretches of the lines per layer."""

METRICS: dict[str, tuple[str, str, str]] = {
    "variation": (
        "Load CV",
        "standard deviation / mean",
        "Population deviation of the experts' loads over their mean; 0: balanced.",
    ),
    "max_violation": (
        "MaxVio",
        "max / mean - 1",
        "How far the fullest expert lies above the mean; 0: balanced.",
    ),
    "entropy": (
        "Normalised entropy",
        "entropy / ln E",
        "Of the shares of the experts; 1: balanced, 0: one takes all.",
    ),
    "dead": ("Dead experts", "experts without a token", "Counted at each logged step."),
    "starved": (
        "Starved experts",
        "experts below a tenth",
        "Experts with less than a tenth of the mean load, dead ones included.",
    ),
}


def expert_panels(experts: ExpertHistory | None) -> list[Panel]:
    """In the order of the page."""
    if experts is None:
        titles = {"utilisation": "Utilisation of the experts", "bias": "Correction bias"}
        return [Panel(key, title, missing=MISSING) for key, title in titles.items()]
    return [
        _utilisation(experts),
        *(_metric(experts, name) for name in METRICS),
        _lorenz(experts),
        _dead(experts),
        _bias(experts),
        _bias_range(experts),
        _bias_extremes(experts),
        _bias_turns(experts),
        _margin(experts),
    ]


def _utilisation(experts: ExpertHistory) -> Panel:
    span = OCTAVES + 0.25  # below the coldest colour a band of its own for the dead
    drawn = _map(
        experts,
        heat(
            "@utilisation",
            "utilisation",
            -span,
            span,
            "%{y}, expert %{x}: %{customdata:.3g} of a fair share",
            ticks={
                "tickvals": [-span, *range(1 - OCTAVES, OCTAVES + 1)],
                "ticktext": ["0", "1/4", "1/2", "1", "2", "4", "8"],
            },
        ),
    )
    codes = utilisation_codes(experts.frames)
    drawn["frames"] = frames(_steps(experts), codes, -OCTAVES, OCTAVES, -span)
    return Panel(
        "utilisation",
        "Utilisation of the experts",
        f"Tokens of each expert over its layer's mean, at {len(experts.frame_steps)} of "
        f"{len(experts.steps)} logged steps, of the whole global batch. 1 is a fair share. Colours "
        f"are log2, from 1/{2**OCTAVES} to {2**OCTAVES} in {CODES + 1} levels, so the values shown "
        f"are exact to {100 * (2 ** (2 * OCTAVES / CODES / 2) - 1):.1f} %; beyond, the end's "
        "colour. Experts without a token have a colour of their own.",
        drawn,
        wide=True,
    )


def utilisation_codes(tokens: np.ndarray) -> np.ndarray:
    """uint8 like ``tokens``: 0 no token, 1..254 log2 of the utilisation, 255 an empty layer."""
    return ratio_codes(load_metrics.utilisation(tokens), OCTAVES)


def _map(experts: ExpertHistory, trace: Figure) -> Figure:
    """A heat map of layers x experts."""
    layers, count = experts.frames.shape[1:]
    return figure(
        [{"y": experts.layers} | trace],
        "expert",
        "layer",
        int(min(760, max(240, 110 + 12 * layers))),
        {"autorange": "reversed", "type": "category", "showgrid": False},
        xaxis={"showgrid": False, "range": [-0.5, count - 0.5]},
        hovermode="closest",
    )


def _steps(experts: ExpertHistory) -> list[str]:
    return [f"step {step:,}" for step in experts.frame_steps]


def _metric(experts: ExpertHistory, name: str) -> Panel:
    title, label, note = METRICS[name]
    values = experts.metrics[name]
    return Panel(name, title, note, _per_layer(experts, values, label))


def _per_layer(
    experts: ExpertHistory,
    values: np.ndarray,
    label: str,
    steps: np.ndarray | None = None,
) -> Figure:
    """Median and 95th percentile over layers, and one layer, which the reader chooses."""
    steps = experts.steps if steps is None else steps
    starts = stretch_starts(len(values), BINS)
    mean = binned(values, BINS)
    at = steps[starts]
    middle, high = (_percentile(mean, share) for share in (50, 95))
    low = _percentile(mean, 5)
    high_hover, band = "p95 %{y:.3g}<extra></extra>", {"fill": "tonexty", "fillcolor": "@0/0.16"}
    data = [
        line(at, low, "p5", "@0/0", "", width=0, showlegend=False),
        line(at, high, "p5 to p95 of the layers", "@0/0.35", high_hover, width=0.8, **band),
        line(at, middle, "median layer", "@0", "median %{y:.3g}<extra></extra>"),
        line(at[:0], at[:0], "", "@1", "%{y:.3g}") | {"x": packed(at)},
    ]
    drawn = figure(data, "step", label, yaxis={"rangemode": "tozero"})
    drawn["layers"] = {
        "names": experts.layers,
        "values": packed(mean),  # a layer's curve is a column, so that new steps come at the end
        "trace": 3,
        "first": worst_layer(experts),
    }
    return drawn


def worst_layer(experts: ExpertHistory) -> int:
    """Index of the layer with the largest MaxVio over the last tenth of the run."""
    last = experts.metrics["max_violation"][-max(1, len(experts.steps) // 10) :]
    return int(np.argmax(np.nan_to_num(last).mean(axis=0)))


def _percentile(values: np.ndarray, share: float) -> np.ndarray:
    """Over layers, [bins]; NaN where no layer has a value."""
    result = np.full(len(values), np.nan)
    some = np.isfinite(values).any(axis=1)
    if some.any():
        result[some] = np.nanpercentile(values[some], share, axis=1)
    return result


def _lorenz(experts: ExpertHistory) -> Panel:
    count = experts.frames.shape[-1]
    share = np.linspace(0, 100, count + 1)
    data = [line(share, share, "balanced", "@muted", dash="dot", width=1)]
    moments = sorted({0, (len(experts.frames) - 1) // 2, len(experts.frames) - 1})
    for index, color in zip(moments, ("@2", "@4", "@0"), strict=False):
        curve = load_metrics.lorenz(experts.frames[index])
        mean = 100 * curve[np.isfinite(curve).all(axis=1)].mean(axis=0)
        data.append(line(share, mean, f"step {experts.frame_steps[index]}", color, "%{y:.1f} %"))
    return Panel(
        "lorenz",
        "Lorenz curve",
        "Share of the tokens that the least loaded experts take, mean over layers. The further "
        "below the diagonal, the more uneven.",
        figure(data, "least loaded experts, %", "tokens, %", xaxis={"range": [0, 100]}),
    )


def _dead(experts: ExpertHistory) -> Panel:
    title = "Dead experts, and since when"
    columns, kinds = ["layer", "expert", "since step", "logged steps"], "l r r r"
    if not experts.dead:
        note = f"Every expert had a token at the last logged step, {experts.steps[-1]:,}."
        if not experts.longest_dead:
            return Panel(
                "dead-since", title, body=f"<p>{note[:-1]}, and at every other.</p>", wide=True
            )
        note += " The longest stretches without one:"
        body = table(columns, _dead_rows(experts, experts.longest_dead), kinds)
        return Panel("dead-since", title, note, body=body, wide=True)
    rows = _dead_rows(experts, experts.dead[:MOST_DEAD_ROWS])
    more = len(experts.dead) - len(rows)
    tail = f"<p>... and {more:,} more.</p>" if more else ""
    return Panel(
        "dead-since",
        title,
        f"{len(experts.dead):,} experts had no token at the last logged step, "
        f"{experts.steps[-1]:,}; the longest dead first.",
        body=table(columns, rows, kinds) + tail,
        wide=True,
    )


def _dead_rows(experts: ExpertHistory, dead: list[load_metrics.DeadExpert]) -> list[list[str]]:
    return [
        [experts.layers[one.layer], str(one.expert), f"{one.since:,}", f"{one.steps:,}"]
        for one in dead
    ]


def _bias(experts: ExpertHistory) -> Panel:
    title = "Correction bias"
    if experts.bias is None:
        why = "The log has no bias: the router balances without one."
        return Panel("bias", title, missing=why, wide=True)
    # A round number, so that the codes of what was drawn before mostly stay.
    largest = float(np.nanmax(np.abs(experts.bias), initial=0.0)) or 1e-6
    most = float(2 ** np.ceil(np.log2(largest)))
    place = np.nan_to_num(experts.bias / most)
    codes = np.where(np.isnan(experts.bias), 255, 1 + np.rint(CODES * (place + 1) / 2))
    hover = "%{y}, expert %{x}: bias %{customdata:.3g}"
    drawn = _map(experts, heat("@bias", "bias", -most, most, hover))
    drawn["frames"] = frames(_steps(experts), codes, -most, most)
    return Panel(
        "bias",
        title,
        "What is added to an expert's score when experts are chosen (not when they are weighed). "
        f"Colours are linear from -{most:.3g} to {most:.3g} in {CODES + 1} levels.",
        drawn,
        wide=True,
    )


def _bias_range(experts: ExpertHistory) -> Panel:
    title = "Spread of the bias"
    if experts.bias is None:
        return Panel("bias-range", title, missing="The log has no bias.")
    spread = _over_experts(np.nanmax, experts.bias) - _over_experts(np.nanmin, experts.bias)
    return Panel(
        "bias-range",
        title,
        "Largest less smallest bias of a layer. Where it goes on growing, the bias does not reach "
        "its aim.",
        _per_layer(experts, spread, "max - min", experts.frame_steps),
    )


def _bias_extremes(experts: ExpertHistory) -> Panel:
    title = "Smallest and largest bias"
    if experts.bias is None:
        return Panel("bias-extremes", title, missing="The log has no bias.")
    flat = experts.bias.reshape(len(experts.bias), 1, -1)
    data = [
        line(experts.frame_steps, _over_experts(reduce, values)[:, 0], name, color)
        for reduce, values, name, color in (
            (np.nanmax, flat, "largest", "@1"),
            (np.nanmean, np.abs(flat), "mean size", "@2"),
            (np.nanmin, flat, "smallest", "@0"),
        )
    ]
    return Panel(
        "bias-extremes",
        title,
        "Of all layers. Scores lie between 0 and 1: a bias that nears the scores' own size decides "
        "more than they do.",
        figure(data, "step", "bias, in units of the score"),
    )


def _bias_turns(experts: ExpertHistory) -> Panel:
    return Panel(
        "bias-turns",
        "Turns of the bias",
        "Share of a layer's experts whose load crossed the mean between two logged steps, where "
        "the bias turns around. High: it trembles about its aim; low: it is still on its way.",
        _per_layer(experts, experts.metrics["turns"], "share of experts"),
    )


def _margin(experts: ExpertHistory) -> Panel:
    title = "Router margin"
    if experts.margin is None:
        return Panel("margin", title, missing="The log has no router margin.")
    return Panel(
        "margin",
        title,
        "Mean gap between the last score chosen and the first one not chosen: small gaps make "
        "small changes of the bias reroute many tokens.",
        _per_layer(experts, experts.margin, "score", experts.frame_steps),
    )


def _over_experts(reduce: Callable[..., np.ndarray], bias: np.ndarray) -> np.ndarray:
    """A NaN-aware reduction over the last axis; NaN for layers without a bias."""
    known = np.isfinite(bias).any(axis=-1)
    result = np.full(bias.shape[:-1], np.nan)
    result[known] = reduce(bias[known], axis=-1)
    return result
