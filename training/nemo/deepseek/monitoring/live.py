"""One frame of the terminal monitor, drawn with ``rich`` from what a followed run knows."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek.monitoring import load_metrics
from deepseek.monitoring.array_log import Record
from deepseek.monitoring.followed_run import FollowedRun

if TYPE_CHECKING:  # rich may be missing until something is drawn
    from rich.console import RenderableType
    from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_LAYERS = 8
"""Layers that are shown, those with the largest load first."""
MOST_RANKS = 8
MOST_ALARMS = 4
SILENT_SECONDS = 60.0
"""Without a row, or ten steps' time if that is longer, after which a run is called silent."""


def frame(run: FollowedRun, now: float | None = None, width: int = 100) -> RenderableType:
    """Everything; what was not logged is left out.

    Args:
        run: after its ``update``.
        now: Unix time.
        width: columns of the terminal.
    """
    from rich.console import Group

    now = time.time() if now is None else now
    parts: list[RenderableType] = [_headline(run, now)]
    if run.steps:
        parts += [_training(run, width), _time(run, width)]
    if run.experts is not None:
        parts.append(_experts(run, width))
    if run.ranks is not None and len(_values(run.ranks)) > 1:
        parts.append(_ranks(run))
    if run.collectives:
        parts.append(_collectives(run))
    parts.append(_alarms(run))
    return Group(*parts)


def state(run: FollowedRun, now: float) -> str:
    """``running``, ``ended: ...`` or ``silent for ...``."""
    if run.ended is not None:
        return f"ended: {run.ended}"
    known = [row["time"] for row in [*run.steps, *run.events] if "time" in row]
    if not known:
        return "running"
    silence = now - max(known)
    if silence > max(SILENT_SECONDS, 10 * (run.latest("seconds") or 0.0)):
        return f"silent for {_clock(silence)}: it validates, hangs, or was killed"
    return "running"


def sparkline(values: list[float], width: int) -> str:
    """The values as a row of blocks, means of equal stretches if there are more than columns."""
    if not values:
        return ""
    stretches = np.array_split(np.array(values), min(width, len(values)))
    means = np.array([stretch.mean() for stretch in stretches])
    low, high = means.min(), means.max()
    levels = (means - low) / (high - low) if high > low else np.zeros(len(means))
    return "".join(BLOCKS[round(float(level) * (len(BLOCKS) - 1))] for level in levels)


def strip(tokens_E: np.ndarray, width: int) -> str:
    """Load of each expert, or of neighbours together: half a block is a fair share, a dot none."""
    groups = np.array_split(tokens_E, min(width, len(tokens_E)))
    means = np.array([group.mean() for group in groups])
    fair = means.mean()
    if not fair:
        return "·" * len(means)
    levels = np.clip(np.ceil(means / fair * len(BLOCKS) / 2) - 1, 0, len(BLOCKS) - 1)
    return "".join(
        BLOCKS[int(level)] if mean else "·" for level, mean in zip(levels, means, strict=True)
    )


def _headline(run: FollowedRun, now: float) -> RenderableType:
    from rich.text import Text

    steps = f"{run.step:,}" + (f" / {run.max_steps:,}" if run.max_steps else "")
    text = Text(f"{run.name}", style="bold")
    text.append(f"   step {steps}   {state(run, now)}", style="default")
    goodput = run.goodput()
    if goodput is not None:
        text.append(f"   goodput {goodput:.1%}", style="default")
    seconds = run.series("seconds")[-50:]
    if run.max_steps and seconds and run.ended is None:
        left = float(np.median(seconds)) * (run.max_steps - run.step)
        text.append(f"   about {_clock(left)} left")
    return text


def _training(run: FollowedRun, width: int) -> RenderableType:
    from rich.text import Text

    lines = _grid()
    room = max(10, width - 50)
    shown = (
        ("loss", "loss", ".4f"),
        ("mtp loss", "mtp_loss", ".4f"),
        ("grad norm", "grad_norm", ".3f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("mfu", "mfu", ".1%"),
        ("lr", "lr", ".2e"),
        ("memory", "memory_bytes", "bytes"),
    )
    for label, key, how in shown:
        value = run.latest(key)
        if value is not None:
            text = _bytes(value) if how == "bytes" else format(value, how)
            lines.add_row(label, Text(text, justify="right"), sparkline(run.series(key), room))
        norms = [
            f"{kind} {norm:.3f}"
            for kind in ("dense", "expert", "router")
            if (norm := run.latest(f"grad_norm_{kind}")) is not None
        ]
        if key == "grad_norm" and norms:
            lines.add_row("  of it", "", ", ".join(norms))
    if run.validation is not None:
        text = f"{run.validation['val_loss']}"[:6]
        bits = run.validation.get("val_bits_per_byte")
        more = f", {bits:.4f} bits per byte" if isinstance(bits, float) else ""
        lines.add_row("val loss", text, f"at step {run.validation['step']:,}{more}")
    return _panel(lines, "training")


def _time(run: FollowedRun, width: int) -> RenderableType:
    """Where the newest steps' time went, as shares."""
    rows = list(run.steps)[-50:]
    whole = sum(float(row["seconds"]) for row in rows)
    lines = _grid()
    parts = {
        "forward, backward": "forward_backward_seconds",
        "  of it all-to-all": "all_to_all_seconds",
        "optimizer": "optimizer_seconds",
        "data": "data_seconds",
        "checkpoint": "checkpoint_seconds",
        "monitoring": "monitor_seconds",
    }
    for label, key in parts.items():
        spent = sum(float(row.get(key) or 0.0) for row in rows)
        if whole and spent:
            share = spent / whole
            bar = "█" * round(share * max(10, width - 50))
            lines.add_row(label, f"{spent / len(rows):.4f} s", f"{share:6.1%}", bar)
    title = f"a step: {whole / len(rows):.4f} s, mean of {len(rows)}"
    return _panel(lines, title)


def _experts(run: FollowedRun, width: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    record = run.experts
    assert record is not None
    tokens_LE, meta = record.arrays["tokens"].astype(np.int64), record.meta
    worst = np.nan_to_num(load_metrics.max_violation(tokens_LE) + 1)
    dead = load_metrics.dead(tokens_LE)
    effective = load_metrics.effective_experts(tokens_LE)
    rows = sorted(range(len(worst)), key=lambda row: -worst[row])[:MOST_LAYERS]
    table = _table()
    for column in ("layer", "max/mean", "dead", "in use"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    table.add_column("experts", no_wrap=True)
    for row in sorted(rows):
        table.add_row(
            meta["layers"][row],
            f"{worst[row]:.2f}",
            f"{dead[row]}",
            f"{effective[row]:.0%}",
            strip(tokens_LE[row], max(16, width - 50)),
        )
    title = f"experts at step {record.step:,}: {len(worst)} layers, {dead.sum()} dead experts"
    if len(rows) < len(worst):
        title += f"; the {len(rows)} most uneven"
    parts: list[RenderableType] = [table]
    ranks = int(meta.get("ep", 1))
    if ranks > 1:
        load = load_metrics.rank_load(tokens_LE, ranks).sum(axis=0)
        uneven = float(load_metrics.imbalance(load))
        loads = strip(load, max(16, width - 50))
        parts.append(Text(f"load of the {ranks} EP ranks: max/mean {uneven:.2f}  {loads}"))
    return _panel(Group(*parts), title)


def _ranks(run: FollowedRun) -> RenderableType:
    record = run.ranks
    assert record is not None
    columns: list[str] = record.meta["columns"]
    values_RM = _values(record)
    order = range(len(values_RM))
    if len(values_RM) > MOST_RANKS and "compute_seconds" in columns:
        compute = values_RM[:, columns.index("compute_seconds")]
        order = sorted(np.argsort(-compute)[:MOST_RANKS].tolist())  # type: ignore[assignment]
    shown = [
        name
        for name in (
            "compute_seconds", "wait_seconds", "transfer_seconds", "data_seconds",
            "memory_bytes", "peak_memory_bytes",
        )
        if name in columns
    ]  # fmt: skip
    table = _table()
    table.add_column("rank", justify="right")
    for name in shown:
        table.add_column(name.rsplit("_", 1)[0].replace("_", " "), justify="right")
    for rank in order:
        cells = [float(values_RM[rank, columns.index(name)]) for name in shown]
        texts = [
            _bytes(cell) if name.endswith("bytes") else f"{cell:.4f}"
            for name, cell in zip(shown, cells, strict=True)
        ]
        table.add_row(str(rank), *texts)
    title = f"ranks at step {record.step:,}, seconds"
    if len(order) < len(values_RM):
        title += f"; the {len(order)} of {len(values_RM)} that compute longest"
    return _panel(table, title)


def _values(record: Record) -> np.ndarray:
    """(R, M): the one array of a record of ranks."""
    return next(iter(record.arrays.values()))


def _collectives(run: FollowedRun) -> RenderableType:
    table = _table()
    for column in ("group", "operation", "calls", "bytes", "p50 ms", "p95 ms", "max ms",
                   "GB/s", "wait s", "exposed"):  # fmt: skip
        left = column in ("group", "operation")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in run.collectives:
        table.add_row(
            str(row["group"]),
            str(row["op"]),
            f"{row['count']}",
            _bytes(row["bytes"]),
            *(f"{1e3 * row[key]:.2f}" for key in ("p50", "p95", "max")),
            f"{row['busbw'] / 1e9:.2g}",
            f"{row['wait_seconds']:.4f}",
            f"{row['exposed_share']:.1%}",
        )
    title = f"collectives at step {run.collectives[0]['step']:,}"
    return _panel(table, title)


def _alarms(run: FollowedRun) -> RenderableType:
    from rich.text import Text

    alarms = run.alarms()
    if not alarms:
        return Text("no alarms")
    lines = Text()
    for alarm in alarms[-MOST_ALARMS:]:
        lines.append(f"step {alarm['step']:,} {alarm['kind']}: ", style="bold red")
        lines.append(f"{alarm['message']}\n   {alarm['remedy']}\n")
    lines.rstrip()
    title = f"alarms: {len(alarms)}" + (", the last" if len(alarms) > MOST_ALARMS else "")
    return _panel(lines, title, "red")


def _panel(body: RenderableType, title: str, border: str = "none") -> RenderableType:
    from rich.panel import Panel

    return Panel(body, title=title, title_align="left", border_style=border)


def _grid() -> Table:
    """Columns without heads."""
    from rich.table import Table

    return Table.grid(padding=(0, 2))


def _table() -> Table:
    """Columns with heads, no lines."""
    from rich.table import Table

    return Table(box=None, padding=(0, 1), pad_edge=False)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def plain(renderable: Any, width: int) -> str:
    """As text without colours."""
    from rich.console import Console

    console = Console(width=width, no_color=True, force_terminal=False, record=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
