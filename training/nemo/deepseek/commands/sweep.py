"""``deepseek sweep``: a grid of runs, one after another or as a Slurm array, then compared."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek.commands.auto_layout import auto_layout
from deepseek.commands.report import report
from deepseek.commands.versions import finished_steps, other_settings
from deepseek.config import ConfigError, RunConfig, UserError, load_config
from deepseek.console import say, table
from deepseek.files import write_new
from deepseek.launch.cluster_job import JobSettings
from deepseek.launch.signals import StopRequests
from deepseek.launch.slurm import array_script
from deepseek.run_folder import METRICS_FILE

REPORT_FILE = "sweep.html"
_MOST_RUNS = 10_000


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    name: str
    """What sets it apart, as a folder's name: ``lr=1e-3,seed=2``."""
    overrides: tuple[str, ...]
    folder: Path
    config: RunConfig

    @property
    def is_finished(self) -> bool:
        """It has a checkpoint of its last step."""
        return finished_steps(self.folder) >= self.config.trainer.max_steps


def sweep(
    config: str,
    words: Sequence[str],
    output: Path | None = None,
    only: int | None = None,
    slurm: Path | None = None,
    settings: JobSettings | None = None,
    with_changes: bool = False,
) -> None:
    """Run every point of a grid that is not finished, then compare all of them.

    A run that was stopped goes on where it was. A run that fails is told, and the others go on; a
    signal stops the sweep.

    Args:
        config: name of a shipped configuration, or a YAML file.
        words: ``a.b=c``; ``a.b=1,2,3`` is an axis of the grid. ``[1,2]`` and ``"1,2"`` are one
            value.
        output: folder of the runs; None: ``exp_dir/name/sweep``.
        only: number of one run, from 0: the others are left to other jobs.
        slurm: write a job array for sbatch to this file instead of running.
        settings: of that job.
        with_changes: take runs that were trained, or begun, with other settings: those that are
            finished as they are, the others go on with these.

    Raises:
        ConfigError: the problems of the first point that has any.
        UserError: no axis, too many runs, no such number, a run of other settings.
        SystemExit: 1 if a run failed, 128 + N after signal N.
    """
    points = grid(config, words, output)
    if slurm is not None:
        _write_array(slurm, config, words, output, points, settings or JobSettings(), with_changes)
        return
    if only is not None and not 0 <= only < len(points):
        raise UserError(f"--only {only}: the grid has runs 0 to {len(points) - 1}")
    chosen = points if only is None else [points[only]]
    if not with_changes:
        _refuse_other_settings(chosen)
    failed = []
    for number, point in enumerate(chosen, start=1):
        if point.is_finished:
            say(f"sweep        {number} of {len(chosen)}: {point.name} is complete")
            continue
        say(f"sweep        {number} of {len(chosen)}: {point.name}")
        code, stopped_by = _run(config, point, with_changes)
        if stopped_by is not None:  # also where the run was complete by then
            sys.exit(128 + stopped_by)
        if code < 0 or code > 128:
            sys.exit(code if code > 0 else 128 - code)
        if code or not point.is_finished:
            failed.append(point)
    if only is None:
        compare(points)
    for point in failed:
        say(f"failed       {point.name}: see its messages above; {point.folder}")
    if failed:
        sys.exit(1)


def grid(config: str, words: Sequence[str], output: Path | None) -> list[Point]:
    """All runs of a sweep, the last axis turning fastest; every configuration is checked.

    Raises:
        ConfigError, UserError: as ``sweep``.
    """
    values = [_axis(word) for word in words]
    axes = [row for row in values if len(row) > 1]
    if not axes:
        raise UserError(
            "a sweep needs a setting with several values, such as model.optim.lr=1e-3,2e-3 seed=1,2"
        )
    runs = math.prod(map(len, values))
    if runs > _MOST_RUNS:
        raise UserError(f"the grid has {runs:,} runs, more than {_MOST_RUNS:,}; leave values out")
    short = _short_names([row[0].partition("=")[0] for row in axes])
    base = output
    points = []
    for overrides in itertools.product(*values):
        told = [word for word, row in zip(overrides, values, strict=True) if len(row) > 1]
        name = ",".join(
            f"{short[key]}={re.sub(r'[^A-Za-z0-9.+-]+', '_', value)}"
            for key, _, value in (word.partition("=") for word in told)
        )
        try:
            run = load_config(config, overrides, auto_layout(told=False))
        except ConfigError as error:
            raise ConfigError(error.problems, f"run {name} of the sweep") from error
        if base is None:
            manager = run.exp_manager
            base = Path(manager.exp_dir) / (manager.name or run.name) / "sweep"
        points.append(Point(name, overrides, base / name, run))
    if len({point.folder for point in points}) < len(points):
        raise UserError("two runs of the grid are the same; write each value once")
    return points


def compare(points: Sequence[Point]) -> None:
    """Print final losses with the best marked, and write one report of all runs."""
    from deepseek.monitoring.run_log import read_run

    begun = [point for point in points if (point.folder / METRICS_FILE).is_file()]
    if not begun:
        return
    rows, scores = [], []
    for point in begun:
        log = read_run(point.folder)
        loss = log.steps["loss"][-1] if "loss" in log.steps else math.nan
        held = log.validations.get("val_loss")
        held_out = held[-1] if held is not None and len(held) else math.nan
        scores.append(loss if math.isnan(held_out) else held_out)
        rows.append([point.name, str(int(log.steps["step"][-1])), _number(loss), _number(held_out)])
    complete = [i for i, point in enumerate(begun) if point.is_finished and scores[i] == scores[i]]
    if complete:
        best = min(complete, key=lambda i: scores[i])
        rows[best][0] += "  <- best"
    table("the sweep", ("run", "steps", "loss", "validation loss"), [tuple(row) for row in rows])
    report([point.folder for point in begun], begun[0].folder.parent / REPORT_FILE)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _axis(word: str) -> list[str]:
    """``a=1,2`` as ``a=1``, ``a=2``; commas inside brackets, braces and quotes divide nothing."""
    key, equals, text = word.partition("=")
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise UserError(f"{word}: a value is missing beside a comma; write {key}=1,2")
    return [f"{key.lstrip('-+')}{equals}{part.strip()}" for part in parts]


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key, or the whole key where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)
    }


def _refuse_other_settings(points: Sequence[Point]) -> None:
    """A run's name tells the axes alone: another sweep may have left it."""
    for point in points:
        if finished_steps(point.folder) and (others := other_settings(point.folder, point.config)):
            raise UserError(
                f"{point.folder} was trained with other settings: {', '.join(others)}; set them "
                "back, give the sweep another --output, or add --resume-with-changes to take "
                "finished runs as they are and go on with the others under these settings"
            )


def _run(config: str, point: Point, with_changes: bool) -> tuple[int, int | None]:
    """Train one point in a process of its own.

    Returns:
        Its exit code, negative if a signal killed it, and the signal to this process that was
        passed on to it.
    """
    command = [sys.executable, "-m", "deepseek", "train", "--config", config]
    command += ["--run-dir", str(point.folder), *point.overrides]
    command += ["--resume-with-changes"] * (with_changes and finished_steps(point.folder) > 0)
    # A group of its own: a Ctrl-C of the terminal comes here alone, and is passed on.
    process = subprocess.Popen(command, process_group=0)
    requests = StopRequests(process.send_signal, lambda number: process.kill())
    requests.listen()
    try:
        return process.wait(), requests.first
    finally:
        requests.release()


def _write_array(
    file: Path,
    config: str,
    words: Sequence[str],
    output: Path | None,
    points: Sequence[Point],
    settings: JobSettings,
    with_changes: bool,
) -> None:
    """A Slurm array with a task for each run."""
    command = ["deepseek", "sweep", "--config", config, *words]
    if output is not None:
        command += ["--output", str(output)]
    command += ["--resume-with-changes"] * with_changes
    write_new(file, array_script(points[0].config, shlex.join(command), len(points), settings))
    say(f"wrote {file}, {len(points)} runs; submit it with: sbatch {shlex.quote(str(file))}")
