"""Panels: what stands on the page, before it is HTML.

Figures are plotly's own JSON. Colours are roles (``"@0"`` the first series, ``"@muted"``,
``"@1/0.2"`` at a fifth of its strength, ``"@diverging"``): the page turns them into colours of the
light or the dark theme. Arrays are packed as plotly's base64 typed arrays.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from deepseek.monitoring.array_history import stretch_length

MOST_POINTS = 1200
"""Points of one line; more are thinned, keeping the extremes."""
CODES = 253
"""Steps between the codes 1 and 254 of a quantised picture."""
COLORS = tuple(f"@{index}" for index in range(8))
"""Of series."""

Figure = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One box: a figure, a table, or a plain line that says why there is neither."""

    key: str
    title: str
    note: str = ""
    """What is drawn, in one or two sentences."""
    figure: Figure | None = None
    """``data``, ``layout`` and what the page's script adds (``frames``, ``layers``)."""
    body: str = ""
    """HTML, escaped already."""
    missing: str = ""
    """Why there is nothing to show."""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    key: str
    title: str
    panels: list[Panel] = field(default_factory=list)


def packed(array: np.ndarray | Sequence[float]) -> dict[str, str]:
    """An array as plotly reads it: base64, float32 but for whole numbers; non-finite ones gaps."""
    values = np.asarray(array)
    if values.dtype.kind in "iub" and values.dtype != np.uint8:
        values = values.astype(np.int32)
    elif values.dtype.kind == "f":
        values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    kind = {"int32": "i4", "uint8": "u1", "float32": "f4"}[values.dtype.name]
    spec = {"dtype": kind, "bdata": base64.b64encode(values.tobytes()).decode()}
    if values.ndim > 1:
        spec["shape"] = ",".join(map(str, values.shape))
    return spec


def line(
    x: np.ndarray,
    y: np.ndarray,
    name: str,
    color: str,
    hover: str = "%{y:.4g}",
    dash: str = "solid",
    **more: Any,
) -> Figure:
    """A line through all points, thinned; gaps where ``y`` is not finite.

    Args:
        hover: what is told of a point; empty: nothing.
        more: others of plotly; ``width`` is that of the line.
    """
    x, y = thin(x, y)
    drawn = {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": packed(x),
        "y": packed(y),
        "line": {"color": color, "width": more.pop("width", 1.6), "dash": dash},
    }
    return drawn | ({"hovertemplate": hover} if hover else {"hoverinfo": "skip"}) | more


def marks(
    x: np.ndarray, y: np.ndarray, name: str, color: str, symbol: str, hover: str, **more: Any
) -> Figure:
    """Points that are not joined."""
    edge = {"color": "@panel", "width": 1} | more.pop("edge", {})
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": packed(x),
        "y": packed(y),
        "marker": {"color": color, "symbol": symbol, "size": 10, "line": edge},
        "hovertemplate": hover,
    } | more


def bars(
    x: np.ndarray | Sequence[str], y: np.ndarray, name: str, color: str, hover: str, **more: Any
) -> Figure:
    """Bars at numbers or at names."""
    return {
        "type": "bar",
        "name": name,
        "x": packed(x) if isinstance(x, np.ndarray) else list(x),
        "y": packed(y),
        "marker": {"color": color, "line": {"width": 0}},
        "hovertemplate": hover,
    } | more


def heat(colors: str, label: str, low: float, high: float, hover: str, **more: Any) -> Figure:
    """A heat map.

    Args:
        colors: role of the scale.
        label: what the colours tell.
        low, high: ends of the scale.
        hover: what is told of a cell.
        more: ``z``, ``x``, ``y`` and others of plotly; ``ticks`` go to the colour bar.
    """
    return {
        "type": "heatmap",
        "colorscale": colors,
        "zmin": low,
        "zmax": high,
        "hovertemplate": f"{hover}<extra></extra>",
        "colorbar": {"title": {"text": label, "side": "right"}} | more.pop("ticks", {}),
    } | more


def level(drawn: Figure, value: float) -> Figure:
    """The figure with a dotted line across it."""
    shape = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value}
    look = {"color": "@muted", "width": 1.2, "dash": "dot"}
    drawn["layout"]["shapes"] = [shape | {"line": look}]
    return drawn


def frames(
    names: Sequence[str], codes: np.ndarray, low: float, high: float, below: float | None = None
) -> Figure:
    """Pictures of which the reader chooses one: what a heat map's figure has under ``frames``.

    Args:
        names: of the pictures.
        codes: uint8 [pictures, rows, columns]: 1 to ``CODES + 1`` from ``low`` to ``high``, and
            255 for nothing.
        low, high: linear, or log2 if ``below`` is given.
        below: the colour's place of code 0, which then means 0.
    """
    kind = "linear" if below is None else "log2"
    scale = {"kind": kind, "low": low, "high": high, "codes": CODES} | (
        {} if below is None else {"below": below}
    )
    return {
        "names": list(names),
        "rows": codes.shape[1],
        "columns": codes.shape[2],
        "codes": base64.b64encode(codes.astype(np.uint8).tobytes()).decode(),
        "scale": scale,
    }


def ratio_codes(share: np.ndarray, octaves: float) -> np.ndarray:
    """uint8 for ``frames``: 0 for 0, 1..254 log2 from ``-octaves`` to ``octaves``, 255 for NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (np.log2(share) + octaves) / (2 * octaves)
    codes = 1 + np.rint(CODES * np.clip(np.nan_to_num(place, neginf=0.0), 0, 1))
    codes = np.where(share == 0, 0, codes)
    return np.where(np.isnan(share), 255, codes).astype(np.uint8)


def figure(
    data: list[Figure], x: str, y: str, height: int = 300, yaxis: Figure | None = None, **more: Any
) -> Figure:
    """A figure with titles on both axes; ``more`` goes into its layout."""
    layout = {
        "height": height,
        "xaxis": {"title": {"text": x}} | more.pop("xaxis", {}),
        "yaxis": {"title": {"text": y}} | (yaxis or {}),
    }
    return {"data": data, "layout": layout | more}


def thin(x: np.ndarray, y: np.ndarray, points: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``points`` of the points, and gaps: of each stretch the lowest and the highest, and
    both ends."""
    if len(x) <= points:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.split(np.arange(len(x)), stretch_starts(len(x), points // 2 - 1)[1:]):
        values = y[stretch]
        finite = np.isfinite(values)
        if not finite.all():
            kept.add(int(stretch[np.argmin(finite)]))  # a gap stays a gap
        if finite.any():
            kept.add(int(stretch[np.nanargmin(np.where(finite, values, np.nan))]))
            kept.add(int(stretch[np.nanargmax(np.where(finite, values, np.nan))]))
    index = sorted(kept)
    return x[index], y[index]


def binned(values: np.ndarray, bins: int) -> np.ndarray:
    """Means of at most ``bins`` stretches of the first axis, NaN left out."""
    if len(values) <= bins:
        return values.astype(np.float64)
    edges = stretch_starts(len(values), bins)
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0.0), edges, axis=0)
    count = np.add.reduceat(finite.astype(np.float64), edges, axis=0)
    return total / np.where(count > 0, count, np.nan)


def stretch_starts(length: int, bins: int) -> np.ndarray:
    """Index of the first element of each of at most ``bins`` stretches.

    They are of 1, 2, 4, ... elements, so that a log that has grown changes the last one alone.
    """
    return np.arange(0, length, stretch_length(length, bins))


def smoothed(values: np.ndarray, half_life: float) -> np.ndarray:
    """Mean whose weights halve every ``half_life`` values to both sides; NaN are passed over.

    Both sides, since a mean over the past alone lags behind a falling loss.
    """
    keep = 0.5 ** (1 / half_life)
    finite = np.isfinite(values)
    numbers, ones = np.where(finite, values, 0.0).tolist(), finite.astype(float).tolist()
    total = _decayed(numbers, keep) + _decayed(numbers[::-1], keep)[::-1]
    weight = _decayed(ones, keep) + _decayed(ones[::-1], keep)[::-1]
    return total / np.where(weight > 0, weight, np.nan)


def hundredth(count: int) -> float:
    """Half-life for a curve of so many values, a hundredth of them or somewhat less: 1, 2, 4, ...,
    so that it mostly stays while the log grows."""
    return float(1 << max(0, (count // 100).bit_length() - 1))


def _decayed(values: list[float], keep: float) -> np.ndarray:
    """Running sums in which each earlier value counts ``keep`` times as much."""
    return np.array(list(accumulate(values, lambda total, value: keep * total + value)))


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: str = "", named: bool = False
) -> str:
    """An HTML table.

    Args:
        columns: their names.
        rows: of cells.
        numbers: holds an ``r`` for every column aligned right, as in ``l r r``.
        named: each cell knows its column's name, for screens too narrow for a row.
    """
    align = numbers.split() or ["l"] * len(columns)
    classes = ['class="num"' if kind == "r" else "" for kind in align]

    def cells(tag: str, row: Sequence[str], names: Sequence[str]) -> str:
        return "".join(
            f"<{tag} {kind}{name}>{html.escape(str(cell))}</{tag}>"
            for kind, cell, name in zip(classes, row, names, strict=True)
        )

    plain = [""] * len(columns)
    names = [f' data-column="{html.escape(column)}"' for column in columns] if named else plain
    body = "".join(f"<tr>{cells('td', row, names)}</tr>" for row in rows)
    head = cells("th", columns, plain)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def duration(seconds: float | None) -> str:
    """``3 d 4 h``, ``2 h 05 min``, ``4 min 10 s`` or ``7.3 s``."""
    if seconds is None:
        return "not logged"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole % 60:02} s"


def quantity(value: float | None, unit: str = "") -> str:
    """Three digits and a decimal prefix: ``1.23 G``, ``456 k``, ``12.0 m`` with its unit."""
    if value is None or not np.isfinite(value):
        return "not logged"
    size = abs(value)
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
        if size >= factor:
            return f"{_digits(value / factor)} {prefix}{unit}".rstrip()
    if not unit or size == 0:
        return f"{value:.3g} {unit}".rstrip()
    for factor, prefix in ((1e-3, "m"), (1e-6, "µ"), (1e-9, "n")):
        if size >= factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
