"""``deepseek ls`` and ``rm`` of runs: what lies in a folder, how it stands, and its removal.

Nothing here waits for a writer, takes a lock to look, or reads weights: a run that is being
written, and checkpoints that are retired meanwhile, are listed as they are found.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.checkpoint.checkpoint import Summary, describe, summary
from deepseek.checkpoint.manifest import MANIFEST, damage_of, step_folders, step_of
from deepseek.config.errors import UserError
from deepseek.config.yaml_file import read_yaml_file
from deepseek.console import printable, say, table
from deepseek.files import disk_errors, megabytes
from deepseek.locks import LOCK, Lock, is_locked, unless_held
from deepseek.monitoring.run_log import SILENT_SECONDS, LogEnd
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, METRICS_FILE

_DEPTH = 4
"""How far below a folder runs are looked for: ``exp_dir/name/sweep/point``, and one more."""
_STEP = re.compile(r"(set_aside_\d+_)?step_\d{8,18}")
_BY_SIGNAL = re.compile(r"SIG[A-Z0-9]+\b|a signal\b|KeyboardInterrupt")
"""Reasons of an end that somebody wanted."""


@dataclass(frozen=True)
class RunState:
    """How a run stands, by what lies in its folder."""

    name: str
    """Its path, from the folder that is listed."""
    state: str
    """``running``, ``finished``, ``stopped`` (by a signal), ``failed``, ``interrupted`` (without a
    last word, as by SIGKILL), or ``no log`` (imported, merged or migrated weights)."""
    reason: str | None
    """Of a stop or a failure."""
    step: int | None
    """Steps done."""
    max_steps: int | None
    loss: float | None
    """Of the newest step, in nats a token; None if there is none or it is not finite."""
    size: int
    """Bytes on disk, links not followed."""
    seen: float | None
    """Unix time of its last sign of life, seconds."""
    checkpoint: int | None
    """Step of the newest whole checkpoint."""
    damaged: list[int]
    """Steps of newer ones that are not whole."""


def list_runs(folder: Path, as_json: bool = False, verify: bool = False) -> None:
    """Show the runs below ``folder``, the checkpoints of a run, or one checkpoint.

    Args:
        folder: any of these.
        as_json: one object a line instead of a table.
        verify: compare the digests of checkpoints too, which reads all of them.

    Raises:
        UserError: none of these.
    """
    if folder.name == CHECKPOINTS and is_run(folder.parent):
        folder = folder.parent
    if is_checkpoint(folder):
        row = summary(folder, verify)
        _show_checkpoints(f"checkpoint {folder}", [row] if row else [], as_json, verify)
    elif is_run(folder):
        rows = describe(folder / CHECKPOINTS, verify)
        _show_checkpoints(f"checkpoints of {folder}", rows, as_json, verify)
    else:
        runs = [state_of(run, str(run.relative_to(folder)), verify) for run in runs_below(folder)]
        if not runs:
            raise UserError(
                f"{folder} is no run folder, and there is none in it; give what --run-dir or "
                "exp_manager.exp_dir named"
            )
        _show_runs(folder, runs, as_json)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's; also one whose start, or removal, was cut short."""
    named = [(path / name).is_file() for name in (CONFIG_FILE, METRICS_FILE)]
    return (path / CHECKPOINTS).is_dir() and (any(named) or _has_steps(path)) or all(named)


def _has_steps(path: Path) -> bool:
    return (path / CHECKPOINTS / LOCK).is_file() or bool(step_folders(path / CHECKPOINTS))


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not."""
    named = _STEP.fullmatch(path.name) is not None and path.parent.name == CHECKPOINTS
    return path.is_dir() and (named or (path / MANIFEST).is_file())


def runs_below(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The runs in a folder, in the order of their names; links are taken, but not walked into."""
    with suppress(OSError):  # one that may not be read, or is gone meanwhile
        for path in sorted(path for path in folder.iterdir() if path.is_dir()):
            if is_run(path):
                yield path
            elif depth > 1 and not path.is_symlink() and not path.name.startswith("."):
                yield from runs_below(path, depth - 1)


def state_of(run: Path, name: str, verify: bool = False) -> RunState:
    """How the run in the folder ``run`` stands; damage is told, not raised."""
    end = LogEnd.read(run / METRICS_FILE)
    whole, damaged = None, []
    for path in step_folders(run / CHECKPOINTS):
        if damage_of(path, digests=verify) is None:
            whole = step_of(path)
            break
        if path.exists():  # else it was retired meanwhile
            damaged.append(step_of(path))
    steps = [step for step in (end.step, whole) if step is not None]
    step, most = max(steps, default=None), _max_steps(run)
    seen = end.time if end.time is not None else _changed(run)
    state, reason = _state(run, end, step is not None and most is not None and step >= most)
    loss = end.loss if end.loss is not None and math.isfinite(end.loss) else None
    return RunState(name, state, reason, step, most, loss, size_of(run), seen, whole, damaged)


def _state(run: Path, end: LogEnd, complete: bool) -> tuple[str, str | None]:
    """State and reason. The lock says what runs; without one, rows that are young do."""
    lock = run / CHECKPOINTS / LOCK
    if is_locked(lock):
        return "running", None
    if not (run / METRICS_FILE).is_file() and not lock.is_file():
        return "no log", None
    if complete:
        return "finished", None
    if end.stopped is not None:
        by_signal = end.stopped == "complete" or _BY_SIGNAL.match(end.stopped)
        return "stopped" if by_signal else "failed", end.stopped
    young = end.time is not None and time.time() - end.time < SILENT_SECONDS
    if young and not lock.is_file():  # without checkpoints nothing is locked
        return "running", None
    return "interrupted", None


def _max_steps(run: Path) -> int | None:
    tree: Any = None
    with suppress(UserError, OSError):
        tree = read_yaml_file(run / CONFIG_FILE, "", "").tree
    trainer = tree.get("trainer") if isinstance(tree, dict) else None
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return steps if isinstance(steps, int) else None


def _changed(run: Path) -> float | None:
    with suppress(OSError):
        return max(path.stat().st_mtime for path in (run, *run.glob(f"{CHECKPOINTS}/step_*")))
    return None


def size_of(path: Path) -> int:
    """Bytes of the files below ``path``; links are not followed, what is gone meanwhile is not
    counted."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _show_runs(folder: Path, runs: Sequence[RunState], as_json: bool) -> None:
    if as_json:
        for run in runs:
            say(json.dumps(asdict(run)))
        return
    rows = [
        (
            printable(run.name),
            run.state,
            f"{'?' if run.step is None else run.step}/{run.max_steps or '?'}",
            "" if run.loss is None else f"{run.loss:.4f}",
            _short_size(run.size),
            "" if run.seen is None else _age(time.time() - run.seen),
            ("none" if run.checkpoint is None else str(run.checkpoint)) + "!" * bool(run.damaged),
        )
        for run in runs
    ]
    columns = ("run", "state", "step", "loss", "size", "seen", "saved")
    table(f"runs in {printable(str(folder))}", columns, rows, compact=True)
    for run in runs:
        if run.state == "failed":
            say(f"failed       {printable(run.name)}: {printable(run.reason or '')}")
        if run.damaged:
            steps = ", ".join(map(str, run.damaged))
            say(f"damaged      {printable(run.name)}: checkpoints of steps {steps}")
    say(f"together     {_runs(len(runs))}, {_short_size(sum(run.size for run in runs))}")


def _show_checkpoints(title: str, found: Sequence[Summary], as_json: bool, verified: bool) -> None:
    sound = "sound" if verified else "whole"
    if as_json:
        for row in found:
            told = asdict(row) | {"path": str(row.path), "verified": verified}
            say(json.dumps(told))
        return
    rows = [
        (
            str("?" if s.step is None else s.step),
            megabytes(s.size),
            str(s.tensors or "?"),
            s.problem or sound,
        )
        for s in found
    ]
    table(printable(title), ("step", "size", "tensors", "state"), rows)
    if not verified and rows:
        say("whole: every file is there with its size; --verify compares the digests too")


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _short_size(count: int) -> str:
    """In at most seven characters."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _age(seconds: float) -> str:
    """``now``, ``40 s``, ``3 min``, ``5 h`` or ``12 d``."""
    for unit, factor in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= factor:
            return f"{seconds / factor:.0f} {unit}"
    return "now"


# -- rm --


def remove(paths: Sequence[Path], yes: bool = False) -> None:
    """Delete runs and checkpoints, after a question.

    All are looked at before the first is touched. What a link in them points to is left alone.

    Args:
        paths: run folders, or checkpoints.
        yes: do not ask.

    Raises:
        UserError: one is neither, is a link, is being written or read; nobody can be asked.
    """
    for path in paths:
        _check_removable(path)
    sizes = {path: size_of(path) for path in dict.fromkeys(paths)}
    for path, size in sizes.items():
        kind = "checkpoint" if is_checkpoint(path) else "run"
        say(f"{kind:<12} {printable(str(path))}, {megabytes(size)}{_remarks(path)}")
    total = megabytes(sum(sizes.values()))
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"deleting {total} asks first, and nobody is there: add --yes")
        if input(f"delete {total} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            say("nothing was deleted")
            return
    for path in sizes:
        with disk_errors(f"deleting {path}"):
            _remove_checkpoint(path) if is_checkpoint(path) else _remove_run(path)
    say(f"freed        {total}")


def _check_removable(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a link; give {path.resolve()}, where it points to")
    if not is_checkpoint(path) and not is_run(path):
        inside = sum(1 for _ in runs_below(path)) if path.is_dir() else 0
        more = (
            f"; it holds {_runs(inside)}: name {'it' if inside == 1 else 'them'}" if inside else ""
        )
        raise UserError(
            f"{path} is neither a run folder nor a checkpoint, and nothing else is deleted{more}"
        )
    here = Path.cwd().resolve()
    if path.resolve() in (here, *here.parents) or (path / ".git").exists():
        raise UserError(
            f"{path} holds the folder you are in, or a repository, and is not deleted; "
            "change to another folder, or delete it by hand"
        )
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    state, _ = _state(run, LogEnd.read(run / METRICS_FILE), complete=False)
    if is_run(run) and state == "running":
        raise UserError(f"{run} is running, and is written to; stop it first")
    with unless_held(path / MANIFEST) as free:
        if not free:
            raise UserError(f"{path} is being read; wait for its reader")


def _remarks(path: Path) -> str:
    """What the person who is asked should know."""
    if not is_checkpoint(path):
        steps = len(step_folders(path / CHECKPOINTS))
        links = [entry.name for entry in path.iterdir() if entry.is_symlink()]
        kept = f"; links go, what they point to stays: {', '.join(links)}" if links else ""
        return f", {steps} checkpoint{'s' * (steps != 1)}{kept}"
    others = [step for step in step_folders(path.parent) if step.resolve() != path.resolve()]
    return "" if others else ", the only one of its run"


def _remove_checkpoint(path: Path) -> None:
    """It is gone at once: what a kill leaves of it, the next writer cleans up."""
    if path.parent.name != CHECKPOINTS:
        shutil.rmtree(path)
        return
    lock = Lock(path.parent / LOCK)
    try:
        trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
        path.rename(trash)
        shutil.rmtree(trash)
    finally:
        lock.release()


def _remove_run(path: Path) -> None:
    """It stays a run, which can be removed again, until its last file has gone."""
    checkpoints = path / CHECKPOINTS
    lock = (
        None if checkpoints.is_symlink() or not checkpoints.is_dir() else Lock(checkpoints / LOCK)
    )
    try:
        for entry in sorted(path.iterdir(), key=lambda entry: entry == checkpoints):
            if lock is not None and entry == checkpoints:
                for inner in checkpoints.iterdir():
                    if inner.name != LOCK:
                        _remove_entry(inner)
            _remove_entry(entry)
        path.rmdir()
    finally:
        if lock is not None:
            lock.release()


def _remove_entry(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
