"""One frame of the terminal monitor, drawn with ``rich`` from what the log says now."""

from __future__ import annotations

import time

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deepseek.monitoring import load_metrics
from deepseek.monitoring.array_log import Record
from deepseek.monitoring.run_log import RunLog, clock, number
from deepseek.run_folder import EXPERTS_FILE, RANKS_FILE

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_LAYERS = 8
"""Layers that are shown, those with the largest load first."""
MOST_RANKS = 8
MOST_ALARMS = 4
MOST_STEPS = 400
"""The newest ones, which curves show."""
RECENT = 50
"""Steps whose mean or median tells what the next ones will take."""


def frame(run: RunLog, now: float | None = None, width: int = 100) -> RenderableType:
    """Everything; what was not logged is left out.

    Args:
        run: after its ``update``.
        now: Unix time.
        width: columns of the terminal.
    """
    now = time.time() if now is None else now
    parts: list[RenderableType] = [_headline(run, now)]
    if run.steps:
        parts += [_training(run, width), _time(run, width)]
    experts, ranks = run.newest(EXPERTS_FILE), run.newest(RANKS_FILE)
    if experts is not None:
        parts.append(_experts(experts, width))
    if ranks is not None and len(_values(ranks)) > 1:
        parts.append(_ranks(ranks))
    if run.collectives:
        parts.append(_collectives(run))
    parts.append(_alarms(run))
    return Group(*parts)


def sparkline(values: np.ndarray, width: int) -> str:
    """The finite values as a row of blocks, means of equal stretches if there are more."""
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    stretches = np.array_split(values, min(width, len(values)))
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


def _headline(run: RunLog, now: float) -> RenderableType:
    steps = f"{run.step:,}" + (f" / {run.max_steps:,}" if run.max_steps else "")
    text = Text(run.label, style="bold")
    text.append(f"   step {steps}   {run.state(now)}", style="default")
    goodput = run.goodput()
    if goodput is not None:
        text.append(f"   goodput {goodput:.1%}", style="default")
    seconds = run.column("seconds")
    if run.max_steps and seconds is not None and not run.has_ended and run.step < run.max_steps:
        left = float(np.nanmedian(seconds[-RECENT:])) * (run.max_steps - run.step)
        text.append(f"   about {clock(left)} left", style="default")
    return text


def _training(run: RunLog, width: int) -> RenderableType:
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
        values = run.steps.get(key) if key == "loss" else run.column(key)  # a loss may be nan
        if values is not None:
            value = float(values[-1])
            text = _bytes(value) if how == "bytes" else format(value, how)
            curve = sparkline(values[-MOST_STEPS:], room)
            lines.add_row(label, Text(text, justify="right"), curve)
        norms = [
            f"{kind} {norm[-1]:.3f}"
            for kind in ("dense", "expert", "router")
            if (norm := run.column(f"grad_norm_{kind}")) is not None
        ]
        if key == "grad_norm" and norms:
            lines.add_row("  of it", "", ", ".join(norms))
    if run.validations:
        newest = {name: float(values[-1]) for name, values in run.validations.items()}
        bits = newest.get("val_bits_per_byte", float("nan"))
        more = f", {bits:.4f} bits per byte" if np.isfinite(bits) else ""
        loss = Text(f"{newest['val_loss']:.4f}", justify="right")
        lines.add_row("val loss", loss, f"at step {newest['step']:,.0f}{more}")
    return _panel(lines, "training")


def _time(run: RunLog, width: int) -> RenderableType:
    """Where the newest steps' time went, as shares."""
    seconds = np.nan_to_num(run.steps.get("seconds", np.zeros(1))[-RECENT:])
    whole, count = float(seconds.sum()), len(seconds)
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
        spent = float(np.nansum(run.steps.get(key, np.zeros(1))[-RECENT:]))
        if whole and spent and 0 < (share := spent / whole) <= 10:  # a damaged row says anything
            bar = "█" * round(share * max(10, width - 50))
            lines.add_row(label, f"{spent / count:.4f} s", f"{share:6.1%}", bar)
    return _panel(lines, f"a step: {whole / count:.4f} s, mean of {count}")


def _experts(record: Record, width: int) -> RenderableType:
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


def _ranks(record: Record) -> RenderableType:
    columns: list[str] = record.meta["columns"]
    values_RM = _values(record)
    order = list(range(len(values_RM)))
    if len(values_RM) > MOST_RANKS and "compute_seconds" in columns:
        compute = values_RM[:, columns.index("compute_seconds")]
        order = sorted(np.argsort(-compute)[:MOST_RANKS].tolist())
    wanted = (
        "compute_seconds",
        "wait_seconds",
        "transfer_seconds",
        "data_seconds",
        "memory_bytes",
        "peak_memory_bytes",
    )
    shown = [name for name in wanted if name in columns]
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


def _collectives(run: RunLog) -> RenderableType:
    """The operations of the newest step that has any."""
    table = _table()
    left, right = ("group", "operation"), ("calls", "bytes", "p50 ms", "p95 ms", "max ms", "GB/s")
    for column in (*left, *right, "wait s", "exposed"):
        justify = "left" if column in left else "right"
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    step = run.collectives[-1]["step"]
    for row in run.collectives:
        if row["step"] != step:
            continue
        keys = ("count", "bytes", "p50", "p95", "max", "busbw", "wait_seconds", "exposed_share")
        count, size, p50, p95, longest, speed, wait, exposed = (
            number(row.get(key)) for key in keys
        )
        table.add_row(
            str(row.get("group", "?")),
            str(row.get("op", "?")),
            f"{count:.0f}",
            _bytes(size),
            *(f"{1e3 * seconds:.2f}" for seconds in (p50, p95, longest)),
            f"{speed / 1e9:.2g}",
            f"{wait:.4f}",
            f"{exposed:.1%}",
        )
    return _panel(table, f"collectives at step {step:,}")


def _alarms(run: RunLog) -> RenderableType:
    alarms = run.alarms()
    if not alarms:
        return Text("no alarms")
    lines = Text()
    for alarm in alarms[-MOST_ALARMS:]:
        over = alarm["until"]
        style = "bold red" if over is None or alarm["with_run"] else "bold"
        lines.append(f"step {alarm['step']:,} {alarm.get('kind')}: ", style=style)
        lines.append(f"{alarm.get('message')}\n   ")
        if over is None:
            lines.append(f"{alarm.get('remedy')}\n")
        elif alarm["with_run"]:
            lines.append(f"still so at step {over:,}, when the run ended. {alarm.get('remedy')}\n")
        else:
            lines.append(f"over at step {over:,}\n")
    lines.rstrip()
    title = f"alarms: {len(alarms)}" + (", the last" if len(alarms) > MOST_ALARMS else "")
    return _panel(lines, title, "red")


def _panel(body: RenderableType, title: str, border: str = "none") -> RenderableType:
    return Panel(body, title=title, title_align="left", border_style=border)


def _grid() -> Table:
    """Columns without heads."""
    return Table.grid(padding=(0, 2))


def _table() -> Table:
    """Columns with heads, no lines."""
    return Table(box=None, padding=(0, 1), pad_edge=False)


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def plain(renderable: RenderableType, width: int) -> str:
    """As text without colours."""
    console = Console(width=width, no_color=True, force_terminal=False, record=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
