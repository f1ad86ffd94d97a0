"""What a run folder says of its run, as numpy columns: the one reader of the log. No torch.

``read_run`` reads a log once; a ``RunLog`` that is kept reads on while the run goes on. What is
only half written is left for the next time, and what a restart trained again counts once.

S logged steps.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.config.batch_ramp import consumed_samples, leads_to
from deepseek.config.errors import UserError
from deepseek.config.yaml_file import read_yaml
from deepseek.monitoring.array_history import (
    ExpertHistory,
    RankHistory,
    Traffic,
    read_experts,
    read_ranks,
    read_traffic,
)
from deepseek.monitoring.array_log import ArrayReader, Record
from deepseek.run_folder import (
    COLLECTIVES_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATIONS_FILE,
    EXPERTS_FILE,
    METRICS_FILE,
    MONITOR,
    RANKS_FILE,
    SAMPLES_FILE,
    TRAFFIC_FILE,
)

SILENT_SECONDS = 60.0
"""Without a row, or ten steps' time if that is longer, after which a run is called silent."""
_BLOCK = 1 << 24


def read_run(folder: Path | str) -> RunLog:
    """The log of a run, whole: ``read_run("my_run").steps["loss"]``.

    Raises:
        UserError: no run folder, no step logged yet, or a file that is damaged in its middle.
    """
    run = RunLog(Path(folder))
    path = run.folder / METRICS_FILE
    if run.damaged_lines:
        number = run.damaged_lines[0]
        raise UserError(
            f"{path}, line {number} is damaged: it is no JSON object with a step; "
            f"take the line out (sed -i {number}d {path}) and run the command again"
        )
    if not run.steps:
        raise UserError(
            f"{path} holds no step yet; its first row is written after the first step: "
            "try again then"
        )
    return run


@dataclass(frozen=True)
class DataPart:
    """One of the prefixes that a run is trained on."""

    name: str
    tokens: int
    """Ids of an epoch."""
    samples: int
    """Sequences of an epoch."""
    share: float
    """Of the sequences of a batch."""


class RunLog:
    """One run by its log. Whatever was not logged is empty or None.

    Args:
        folder: of the run.

    Attributes:
        label: name of the run; a report makes it unique among its runs.
        events: rows of events in the order of the file.
        lost_steps: steps that were trained and then trained again after a restart.

    Raises:
        UserError: no run folder, or a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METRICS_FILE).is_file():
            raise UserError(
                f"{folder} is no run folder: it has no {METRICS_FILE}; "
                "give the folder that `deepseek train` printed at its start and end"
            )
        self._begin()
        self.update()
        self.label = str(self.config.get("name", folder.name))

    def _begin(self) -> None:
        monitor = self.folder / MONITOR
        self._lines = _Lines(self.folder / METRICS_FILE)
        self._collective_lines = _Lines(monitor / COLLECTIVES_FILE)
        self._files = {
            name: ArrayReader(monitor / name) for name in (EXPERTS_FILE, RANKS_FILE, TRAFFIC_FILE)
        }
        self._steps, self._validations = _Table(), _Table()
        self._sample_lines = _Lines(self.folder / SAMPLES_FILE)
        self._evaluation_lines = _Lines(self.folder / EVALUATIONS_FILE)
        self._collectives: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.lost_steps = self._last_step = 0

    def update(self) -> bool:
        """Read on; returns whether there was anything new.

        Raises:
            UserError: the log cannot be read.
        """
        if not self._lines.path.is_file():
            raise UserError(f"cannot read {self._lines.path}: it is gone")
        if self._lines.were_cut():  # another run has begun in this folder
            self._begin()
        found = False
        for rows in self._lines.new():
            found = True
            for row in rows:
                self._take(row)
        if found:
            self._steps.store()
            self._validations.store()
            self._forget("experts", "ranks", "traffic")
            self._notes.clear()
        return found

    def _take(self, row: dict[str, Any]) -> None:
        if "event" in row:
            if row["event"] in ("started", "resumed"):
                row["last_step"] = (
                    self._last_step
                )  # of the process before, which may have lost some
                # These files are written at each start.
                self._forget("config_text", "config", "environment")
            self.events.append(row)
        elif "val_loss" in row:
            self._validations.cut(row["step"])
            self._validations.add(row)
        else:
            if lost := self._steps.cut(row["step"]):
                self.lost_steps += lost
                self._validations.cut(row["step"])
            self._steps.add(row)
            self._last_step = row["step"]

    def _forget(self, *names: str) -> None:
        """Read these properties anew when they are asked for."""
        for name in names:
            self.__dict__.pop(name, None)

    @property
    def damaged_lines(self) -> list[int]:
        """Numbers of the lines, from 1, that are no rows."""
        return self._lines.damaged

    @property
    def steps(self) -> dict[str, np.ndarray]:
        """Columns of the step rows, float64 [S], NaN where a row lacks the key; empty before the
        first step.

        ``step`` ascends: a row takes the place of those of its step and of later steps, which a
        restart has trained, or will train, again.
        """
        return self._steps.columns

    @property
    def validations(self) -> dict[str, np.ndarray]:
        """The same of the validation rows."""
        return self._validations.columns

    # -- steps and events --

    @property
    def step(self) -> int:
        """The newest step, 0 before the first."""
        return int(self.steps["step"][-1]) if self.steps else 0

    def column(self, name: str) -> np.ndarray | None:
        """One column of the step rows; None if no row has a number there."""
        values = self.steps.get(name)
        return None if values is None or not np.isfinite(values).any() else values

    def alarms(self) -> list[dict[str, Any]]:
        """The alarms in the order of steps; of a step trained twice the later ones.

        ``until`` is the step at which the trouble was over, None before. The end of the process
        that watched it ends an alarm too, with the last step of that process; it is ``with_run``.
        """
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for event in self.events:
            if event["event"] == "alarm":
                keys = ("step", "kind", "layer", "rank")
                fresh = event | {"until": None, "with_run": False}
                found[tuple(event.get(key) for key in keys)] = fresh
            elif event["event"] == "alarm_over":
                key = tuple(event.get(key) for key in ("since", "kind", "layer", "rank"))
                if key in found:
                    found[key] |= {"until": event["step"], "with_run": False}
            elif event["event"] in ("stopped", "started", "resumed"):
                ended = {"until": event.get("last_step", event["step"]), "with_run": True}
                found |= {key: row | ended for key, row in found.items() if row["until"] is None}
        return sorted(found.values(), key=lambda alarm: int(alarm["step"]))

    def state(self, now: float | None = None) -> str:
        """``complete``, ``stopped: REASON``, ``running`` or ``silent for 1:02:03: ...``.

        Args:
            now: Unix time, seconds; None: the clock's.
        """
        if self.max_steps and self.step >= self.max_steps:
            return "complete"
        if self.has_ended:
            return f"stopped: {self.events[-1].get('reason', 'no reason was logged')}"
        times, seconds = self._times(), self.column("seconds")
        if not len(times):
            return "running"
        silence = (time.time() if now is None else now) - float(times[-1])
        usual = 0.0 if seconds is None else 10 * float(np.nan_to_num(seconds[-1]))
        if silence <= max(SILENT_SECONDS, usual):
            return "running"
        return f"silent for {clock(silence)}: it validates, hangs, or was killed"

    @property
    def has_ended(self) -> bool:
        """Whether the run has said that it stops."""
        return bool(self.events) and self.events[-1]["event"] == "stopped"

    def wall_seconds(self) -> float | None:
        """From the first start to the last row, less the time after each orderly stop."""
        times = self._times()
        if len(times) < 2:
            return None
        stops = [event for event in self.events if event["event"] == "stopped"]
        pauses = 0.0
        for stop in stops:
            later = np.searchsorted(times, at := number(stop.get("time")), side="right")
            if later < len(times):
                pauses += float(times[later]) - at
        return float(times[-1] - times[0]) - pauses

    def goodput(self) -> float | None:
        """Seconds in the steps that the run kept, over ``wall_seconds``."""
        wall, seconds = self.wall_seconds(), self.column("seconds")
        if not wall or seconds is None:
            return None
        return min(1.0, float(np.nansum(seconds)) / wall)

    def _times(self) -> np.ndarray:
        """When rows were written, ascending."""
        events = [number(event.get("time")) for event in self.events]
        times = np.concatenate([self.steps.get("time", np.empty(0)), events])
        return np.sort(times[np.isfinite(times)])

    # -- what else lies in the folder --

    @cached_property
    def config_text(self) -> str | None:
        """The resolved configuration as it was written."""
        return _text(self.folder / CONFIG_FILE)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; empty if there is none."""
        path = self.folder / CONFIG_FILE
        tree = read_yaml(self.config_text, str(path)).tree if self.config_text else {}
        return tree if isinstance(tree, dict) else {}

    def setting(self, path: str) -> Any:
        """Value of a dotted key of the configuration, None if it is not there."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def max_steps(self) -> int | None:
        """Steps of the whole run by its configuration."""
        value = self.setting("trainer.max_steps")
        return value if isinstance(value, int) else None

    @cached_property
    def environment(self) -> dict[str, Any] | None:
        """What the run ran on."""
        path = self.folder / ENVIRONMENT_FILE
        text = _text(path)
        if text is None:
            return None
        try:
            tree = _JSON.decode(text)
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            raise UserError(
                f"{path} is damaged: it is no JSON object; remove it, and the report goes "
                "without it"
            )
        return tree

    def data_parts(self) -> list[DataPart]:
        """What the run is trained on, as far as it was recorded."""
        parts = (self.environment or {}).get("data")
        found = []
        for part in parts if isinstance(parts, list) else []:
            try:
                tokens, samples = int(part["tokens"]), int(part["samples"])
                found.append(DataPart(str(part["name"]), tokens, samples, float(part["share"])))
            except (KeyError, TypeError, ValueError, OverflowError):
                continue
        return found

    def epochs(self) -> dict[str, float]:
        """How often each part of the data has been read, by its name."""
        batch = self.setting("model.global_batch_size")
        if not isinstance(batch, int) or abs(batch) > _MOST_STEPS:
            return {}
        ramp = self.setting("model.rampup_batch_size")
        is_ramp = (
            isinstance(ramp, list)
            and len(ramp) == 3
            and all(isinstance(n, int) and 0 < n <= _MOST_STEPS for n in ramp)
        )
        is_ramp = is_ramp and leads_to(batch, ramp)
        read = consumed_samples(self.step, batch, ramp if is_ramp else None)
        return {
            part.name: read * part.share / part.samples
            for part in self.data_parts()
            if part.samples
        }

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Texts that the model has written: ``step``, ``prompt`` and ``text``."""
        for rows in self._sample_lines.new():
            self._samples += rows
        return self._samples

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Results of ``deepseek eval``: ``step``, ``window``, ``stride`` and ``domains``."""
        for rows in self._evaluation_lines.new():
            self._evaluations += rows
        return self._evaluations

    # -- experts, ranks, traffic --

    @cached_property
    def experts(self) -> ExpertHistory | None:
        """Load and bias of the experts over the run."""
        return read_experts(self._files[EXPERTS_FILE], self._notes)

    @cached_property
    def ranks(self) -> RankHistory | None:
        """Seconds, bytes and rows of the ranks over the run."""
        return read_ranks(self._files[RANKS_FILE], self._notes)

    @cached_property
    def traffic(self) -> Traffic | None:
        """Bytes between ranks."""
        return read_traffic(self._files[TRAFFIC_FILE], self._notes)

    @property
    def collectives(self) -> list[dict[str, Any]]:
        """Rows of operations between ranks, in the order of the file."""
        for rows in self._collective_lines.new():
            self._collectives += rows
        return self._collectives

    def newest(self, name: str) -> Record | None:
        """The newest sound record of a file of arrays; None if there is none.

        Args:
            name: as ``run_folder.EXPERTS_FILE``.
        """
        self._files[name].update()
        return self._files[name].newest()

    @property
    def notes(self) -> list[str]:
        """Damage that was read past; reads everything."""
        _ = self.experts, self.ranks, self.traffic, self.collectives
        return [*self._notes] + [
            f"{lines.path.name}: line {number} is damaged and left out"
            for lines in (self._lines, self._collective_lines)
            for number in lines.damaged
        ]


@dataclass(frozen=True)
class LogEnd:
    """What the last rows of a log say, read from its end alone: a listing of many runs is quick.

    Attributes are None where there is no such row.
    """

    step: int | None = None
    """The newest row's."""
    loss: float | None = None
    time: float | None = None
    """Unix time of the last row, seconds."""
    stopped: str | None = None
    """The reason of the stop, if that is the last event."""

    @classmethod
    def read(cls, path: Path) -> LogEnd:
        """Of the file ``path``, which may be growing, damaged or absent."""
        window, whole = _TAIL, False
        while not whole:
            try:
                with open(path, "rb") as file:
                    size = file.seek(0, 2)
                    whole = window >= size
                    file.seek(max(0, size - window))
                    lines = file.read(window).split(b"\n")
            except OSError:
                return cls()
            # The first line may have lost its beginning, the last one is not written yet.
            rows = [row for line in lines[not whole : -1] if (row := _row(line)) is not None]
            steps = [row for row in rows if "loss" in row and "event" not in row]
            if steps or whole:
                break
            window *= 8
        events = [row for row in rows if "event" in row]
        stop = events[-1] if events and events[-1]["event"] == "stopped" else None
        times = [time for row in rows if math.isfinite(time := number(row.get("time")))]
        return cls(
            steps[-1]["step"] if steps else None,
            number(steps[-1]["loss"]) if steps else None,
            times[-1] if times else None,
            str(stop.get("reason", "no reason was logged")) if stop else None,
        )


# -- rows --

_TAIL = 1 << 16
"""Bytes from the end of a log that are read first."""


class _Table:
    """Rows whose steps ascend, kept as columns."""

    def __init__(self) -> None:
        self.columns: dict[str, np.ndarray] = {}
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Append; it is in ``columns`` after ``store``."""
        self._rows.append(row)

    def cut(self, step: int) -> int:
        """Take out the rows of this step and of later ones; returns how many."""
        count = 0
        while self._rows and self._rows[-1]["step"] >= step:
            self._rows.pop()
            count += 1
        if not self._rows and self.columns:
            known = self.columns["step"]
            kept = int(np.searchsorted(known, step))
            count += len(known) - kept
            if kept < len(known):
                items = self.columns.items()
                self.columns = {name: values[:kept] for name, values in items} if kept else {}
        return count

    def store(self) -> None:
        """Turn what was added into columns."""
        rows, self._rows = self._rows, []
        nothing = np.full(len(self.columns.get("step", ())), math.nan)
        names = dict.fromkeys([*self.columns, *(name for row in rows for name in row)])
        self.columns = {
            name: np.concatenate(
                [self.columns.get(name, nothing), [number(row.get(name)) for row in rows]]
            )
            for name in names
        }


class _Lines:
    """The rows of a JSONL file that may be growing.

    Attributes:
        damaged: numbers of the lines, from 1, that are no objects with a step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: list[int] = []
        self._offset = self._count = 0

    def were_cut(self) -> bool:
        """Whether complete lines that were read are gone."""
        return self.path.is_file() and self.path.stat().st_size < self._offset

    def new(self) -> Iterator[list[dict[str, Any]]]:
        """The rows that were appended, block by block; what follows the last newline waits.

        A resumed run cuts off the line that its predecessor left unfinished: nothing read here.
        """
        if not self.path.is_file():
            return
        rest = b""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                while block := file.read(_BLOCK):
                    *lines, rest = (rest + block).split(b"\n")
                    self._offset += sum(len(line) + 1 for line in lines)
                    if lines:
                        yield self._rows(lines)
        except OSError as error:
            raise UserError(_unreadable(self.path, error)) from error

    def _rows(self, lines: list[bytes]) -> list[dict[str, Any]]:
        rows = []
        for line in lines:
            self._count += 1
            row = _row(line)
            if row is not None:
                rows.append(row)
            else:
                self.damaged.append(self._count)
        return rows


_MOST_STEPS = 1 << 31
"""A row of a later step is damaged."""


def _measured(digits: str) -> int | float:
    """An integer of JSON; one of hundreds of digits, which no float can hold, is infinite."""
    return int(digits) if len(digits) < 20 else float(digits)


_JSON = json.JSONDecoder(parse_int=_measured)


def _row(line: bytes) -> dict[str, Any] | None:
    """One line of a log; None if it is no object with a step."""
    try:
        row = _JSON.decode(line.decode(errors="surrogatepass"))
    except (ValueError, RecursionError):
        return None
    fits = (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and 0 <= row["step"] < _MOST_STEPS
        and isinstance(row.get("event", ""), str)
    )
    return row if fits else None


def number(value: Any) -> float:
    """A number of a row; non-finite ones stand there as words."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode(errors="replace") if path.is_file() else None
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: OSError) -> str:
    return f"cannot read {path}: {error.strerror}; see its permissions"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
