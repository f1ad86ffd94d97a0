"""``deepseek report``: one HTML page about one run or several, from their logs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.console import say
from deepseek.files import write_whole

REPORT_FILE = "report.html"


def report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report; a run may still be going on.

    Args:
        runs: run folders; several are also compared.
        output: the file; None: ``report.html`` in the first run's folder.

    Returns:
        The file.

    Raises:
        UserError: no run, an empty or damaged log, plotly missing, or a file that cannot be
            written.
    """
    from deepseek.monitoring.report.page import run_page
    from deepseek.monitoring.run_log import read_run

    if not runs:
        raise UserError("a report needs a run folder: deepseek report RUN")
    read = [read_run(run) for run in runs]
    labels = Counter(run.label for run in read)
    for run in read:
        if labels[run.label] > 1:
            run.label = f"{run.label} ({run.folder.resolve().name})"
    page = run_page(read).whole()
    target = output or runs[0] / REPORT_FILE
    write_whole(target, page, "; choose another file with --output", folders=True)
    say(
        f"report       {target} ({target.stat().st_size / 1e6:.1f} MB, {len(read)} run"
        f"{'s' if len(read) > 1 else ''})"
    )
    for run in read:
        for note in run.notes:
            say(f"note         {run.label}: {note}")
    return target
