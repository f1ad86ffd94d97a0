"""``deepseek scaling``: one training on more and more GPUs, on paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from deepseek.commands.plan import cluster, layout_text, room_of
from deepseek.config import UserError
from deepseek.config.layout import world_size
from deepseek.console import say, table
from deepseek.files import write_new
from deepseek.planner.hardware import gpu_named
from deepseek.planner.scaling_curve import Failures, Point, scaled

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 66, 28, 56, 42
"""Margins of a chart, in pixels."""
COLORS = ("#2563c7", "#e0691b", "#178a6b", "#c12f4e")


def scaling(
    config: str,
    overrides: Sequence[str] = (),
    gpu: str = "H100",
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    memory: float | None = None,
    up_to: int = 16384,
    failures: Failures = Failures(),  # noqa: B008
    output: Path | None = None,
) -> None:
    """Print the best layouts of a cluster twice as large, again and again.

    Args:
        config: name of a shipped configuration, or a YAML file.
        overrides: ``a.b=c``.
        gpu, nodes, gpus_per_node, memory: as of ``plan``; the smallest cluster.
        up_to: GPUs of the largest one.
        failures: how often they come, and what they cost.
        output: new SVG file of the curves.

    Raises:
        ConfigError: every problem of the configuration, whatever its layout.
        UserError: no such GPU, a cluster smaller than the first, or none that works.
    """
    device = gpu_named(gpu)
    room = room_of(device, memory)
    run, fixed = cluster(config, overrides, nodes, gpus_per_node)
    base = world_size(run)
    if fixed:
        raise UserError(
            f"{fixed[0]} would be ignored: each size of cluster has a layout of its own"
        )
    if up_to < base:
        raise UserError(f"--up-to {up_to}: the first cluster has {base:,} GPUs; use more")
    sizes = [base << doubled for doubled in range((up_to // base).bit_length())]
    curves: dict[str, list[Point]] = {}
    for name, weak in (("weak scaling", True), ("strong scaling", False)):
        points = list(scaled(run, device, room * 2**30, sizes, weak, failures))
        if not points:
            raise UserError(f"nothing fits {base:,} to {sizes[-1]:,} {device}; see deepseek plan")
        curves[name] = points
        batch = "grows with the cluster" if weak else f"stays {run.model.global_batch_size:,}"
        table(f"{name}: the batch {batch}", _COLUMNS, _rows(points))
    say(
        f"failures: one GPU fails every {failures.mtbf_hours:,.0f} h; checkpoints are written at "
        f"{failures.write_rate / 1e9:g} GB/s a GPU; a new start takes "
        f"{failures.restart_seconds:,.0f} s"
    )
    if output is not None:
        write_new(output, picture(f"{config} on {device}", curves))
        say(f"wrote {output}")


_COLUMNS = (
    "GPUs",
    "layout",
    "tok/s/GPU",
    "of first",
    "bubble",
    "exposed",
    "more would help",
    "checkpoint every",
    "goodput",
)


def _rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    first = points[0].plan.estimate.tokens_per_s_per_gpu
    rows: list[tuple[str, ...]] = []
    for point in points:
        estimate, goodput = point.plan.estimate, point.goodput
        exposed = sum(value for part, value in estimate.parts.items() if "exposed" in part)
        bubble = estimate.parts.get("pipeline bubble", 0.0)
        rows.append(
            (
                f"{point.gpus:,}",
                layout_text(point.plan.run),
                f"{estimate.tokens_per_s_per_gpu:,.0f}",
                f"{100 * estimate.tokens_per_s_per_gpu / first:.0f} %",
                f"{100 * bubble / estimate.seconds:.0f} %",
                f"{100 * exposed / estimate.seconds:.0f} %",
                f"{point.limit} ({100 * point.gains[point.limit]:+.0f} %)",
                f"{goodput.interval / 60:.0f} min",
                f"{100 * goodput.share:.1f} %",
            )
        )
    return rows


# -- the picture --


def picture(title: str, curves: Mapping[str, Sequence[Point]]) -> str:
    """Four charts as SVG: speed of both kinds of scaling, what would help, what failures leave."""
    weak, strong = curves["weak scaling"], curves["strong scaling"]
    both = {"weak": weak, "strong": strong}
    start = strong[0].tokens_per_second / strong[0].gpus
    charts = [
        (
            "tokens/s/GPU, weak scaling",
            {
                "without failures": [(p.gpus, p.plan.estimate.tokens_per_s_per_gpu) for p in weak],
                "with failures": [
                    (p.gpus, p.plan.estimate.tokens_per_s_per_gpu * p.goodput.share) for p in weak
                ],
            },
        ),
        (
            "million tokens/s, strong scaling",
            {
                "if all scaled": [(p.gpus, start * p.gpus / 1e6) for p in strong],
                "without failures": [(p.gpus, p.tokens_per_second / 1e6) for p in strong],
                "with failures": [
                    (p.gpus, p.tokens_per_second * p.goodput.share / 1e6) for p in strong
                ],
            },
        ),
        (
            "% faster with a network twice as fast",
            {name: [(p.gpus, 100 * p.gains["network"]) for p in of] for name, of in both.items()},
        ),
        (
            "% of the time in steps that count",
            {name: [(p.gpus, 100 * p.goodput.share) for p in of] for name, of in both.items()},
        ),
    ]
    drawn = "".join(
        f'<g transform="translate({WIDTH * (place % 2)},{30 + HEIGHT * (place // 2)})">'
        f"{_chart(name, series)}</g>"
        for place, (name, series) in enumerate(charts)
    )
    width, height = 2 * WIDTH, 2 * HEIGHT + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        f'<text x="{LEFT}" y="24" font-size="16" font-weight="bold">{escape(title)}</text>'
        f"{drawn}</svg>\n"
    )


def _chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over numbers of GPUs, which double from tick to tick."""
    xs = sorted({x for points in series.values() for x, _ in points})
    most = max(y for points in series.values() for _, y in points)
    unit = 10 ** math.floor(math.log10(most)) if most > 0 else 1.0
    step = next(s * unit for s in (0.2, 0.25, 0.5, 1, 2, 2.5) if most / (s * unit) <= 5)
    top = step * max(1, math.ceil(most / step))
    low, high = math.log2(xs[0]), max(math.log2(xs[-1]), math.log2(xs[0]) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / (high - low)
        right, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return round(LEFT + across * right, 1), round(TOP + (1 - y / top) * down, 1)

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for number in range(round(top / step) + 1):
        x, y = at(xs[0], number * step)
        parts.append(
            f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="#dddddd"/>'
            f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{number * step:,g}</text>'
        )
    for gpus in xs:
        x, y = at(gpus, 0)
        parts.append(f'<text x="{x}" y="{y + 17}" text-anchor="middle">{gpus:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">GPUs</text>')
    left = LEFT
    for (name, points), color in zip(series.items(), COLORS, strict=False):
        line = "L".join("{} {}".format(*at(x, y)) for x, y in points)
        parts.append(f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y in (at(*point) for point in points):
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        parts.append(
            f'<path d="M{left} 34h16" stroke="{color}" stroke-width="3"/>'
            f'<text x="{left + 21}" y="38">{escape(name)}</text>'
        )
        left += 36 + 7 * len(name)
    return "".join(parts)
