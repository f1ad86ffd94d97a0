"""What people read: plain lines everywhere, tables and colour where ``rich`` is installed."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO, cast

PATIENCE_SECONDS = 5.0
"""How long a process lets the first one of its machine tell why it ends before it does."""

_speaks = True
_when_closed: Callable[[], None] | None = None
_ends_first = True


def speak_for_all(rank: int, local_rank: int) -> None:
    """One of many processes: rank 0 alone says things and draws; any may complain, or end.

    Args:
        rank: among all processes.
        local_rank: among those of this machine.
    """
    global _speaks, _ends_first
    _speaks, _ends_first = rank == 0, local_rank == 0


_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What moves the cursor, colours, rings or turns the direction, and halves of characters, which no
terminal takes. Line ends and tabs may be text."""


def printable(text: str, lines: bool = False) -> str:
    """``text`` with control characters spelt out: names and texts of others reach the terminal.

    Args:
        text: any.
        lines: it may have line ends and tabs; else these are spelt out too.
    """
    spelt = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
    return spelt if lines else spelt.replace("\n", "\\n").replace("\t", "\\t")


def when_output_closes(call: Callable[[], None] | None) -> None:
    """What to do when nobody reads standard output or error any more; None: raise, as Python does.

    Until this is taken back, words that nobody can read are dropped.
    """
    global _when_closed
    _when_closed = call


def say(message: str = "") -> None:
    """One line on standard output, at once."""
    if _speaks:
        _print(message, sys.stdout)


def complain(message: str) -> None:
    """One message on standard error."""
    _print(message, sys.stderr)


def _print(message: str, stream: TextIO) -> None:
    try:
        print(printable(message, lines=True), file=stream, flush=True)
    except OSError as error:
        _silence(stream, error)


def _silence(stream: TextIO, error: OSError) -> None:
    """Drop what else goes to a stream that has failed, and say so, or do what was asked for."""
    if _when_closed is None:
        raise error
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
    if error.errno in (errno.EPIPE, errno.EIO):  # EIO: a terminal that was closed
        _when_closed()
    elif stream is sys.stdout:
        complain(f"standard output: {error.strerror}; the run goes on without it")


class _Terminal:
    """Standard output for ``rich``, which must not fail when the terminal is closed."""

    def __init__(self) -> None:
        self._stream = sys.stdout  # rich puts a stream of its own there while a bar is shown

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            _silence(self._stream, error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            _silence(self._stream, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def complain_at_the_end(message: str, by_first_alone: bool = False) -> None:
    """Why this process is about to end; what all of a machine have to say is shown once.

    The first one says it at once; its end tells the launcher to end the others. They wait for that,
    and say it if they are still there: then the trouble was their own.

    Args:
        message: what to say.
        by_first_alone: all processes have the same to say, if any has.
    """
    if not _ends_first:
        if by_first_alone:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to be saved
        time.sleep(PATIENCE_SECONDS)
    complain(message)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], compact: bool = False
) -> None:
    """A table; ``rich`` draws it if installed, else aligned columns.

    Args:
        title: above it.
        columns: their names.
        rows: a cell for each column.
        compact: without rules, in 80 columns: the first column is folded where it must be.
    """
    if not _speaks:
        return
    rows = [[printable(cell, lines=True) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        _plain_table(title, columns, rows)
        return
    drawn = Table(title=Text(title), title_justify="left", title_style="bold")
    if compact:
        drawn.box, drawn.padding, drawn.pad_edge = None, (0, 2, 0, 0), False
    for place, column in enumerate(columns):
        drawn.add_column(column, overflow="fold", no_wrap=compact and place > 0)
    for row in rows:
        drawn.add_row(*map(Text, row))  # text: a name may hold what rich takes for markup
    width = 80 if compact else 120
    Console(width=None if sys.stdout.isatty() else width).print(drawn)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    say(title)
    for row in [columns, *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


class StageProgress:
    """Progress of work in stages: a bar on a terminal, a line per stage and tenth elsewhere.

    Args:
        quiet: show nothing, where the output is read by a program.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar = None if quiet else progress_bar()
        self._task: Any = None
        self._shown = ("", -1)

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, stage: str, done: int, total: int, detail: str) -> None:
        """``done`` of ``total`` units of ``stage``."""
        if self._quiet:
            return
        if self._bar is not None:
            if self._task is None:  # no bar for work that turns out to be done already
                self._bar.start()
                self._task = self._bar.add_task("", total=1.0)
            text = f"{stage} | {detail}"
            self._bar.update(self._task, completed=done, total=max(total, 1), description=text)
            return
        tenth = 10 * done // max(total, 1)
        if (stage, tenth) != self._shown:
            self._shown = (stage, tenth)
            say(f"{stage} {10 * tenth}% | {detail}")

    def of_bytes(self, stage: str, total: int) -> Callable[[int], None]:
        """What is told how many bytes of ``total`` are done."""
        return lambda done: self.update(stage, done, total, f"{done / 1e9:,.2f} GB")

    def of_data(self, now: Any) -> None:
        """What ``open_data`` and ``prepare`` tell of their stages."""
        self.update(now.stage, now.done, now.total, f"{now.tokens:,} tokens")


def progress_bar(columns: int = 24, shows_time: bool = True) -> Any:
    """A rich progress bar, or None without a terminal, without ``rich``, or on other ranks.

    Args:
        columns: of the bar itself.
        shows_time: whether the time left follows the description.
    """
    if not _speaks or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None
    text = TextColumn("{task.description}", markup=False)
    shown = [BarColumn(bar_width=columns), text, *([TimeRemainingColumn()] if shows_time else [])]
    console = Console(file=cast(TextIO, _Terminal()))
    return Progress(*shown, refresh_per_second=4, console=console)
