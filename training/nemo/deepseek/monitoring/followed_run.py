"""A run seen from outside while it goes on: what its log says now. No torch."""

from __future__ import annotations

import json
import math
from array import array
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.config.strict_yaml import read_yaml
from deepseek.monitoring.array_log import Record, last_record
from deepseek.run_folder import (
    COLLECTIVES_FILE,
    CONFIG_FILE,
    EXPERTS_FILE,
    METRICS_FILE,
    MONITOR,
    RANKS_FILE,
)

MOST_STEPS = 400
"""Steps that are kept."""
MOST_EVENTS = 200
_TAIL = 1 << 16


@dataclass
class FollowedRun:
    """Reads what is new in a run folder each time it is asked to.

    Attributes:
        steps: the newest step rows, ascending; of a step trained twice the later row.
        validation: the newest validation row.
        events: the newest events, alarms among them.
        experts, ranks: newest record of each file, None if there is none.
        collectives: rows of the newest step that has any.
    """

    folder: Path
    name: str = ""
    max_steps: int | None = None
    steps: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_STEPS))
    validation: dict[str, Any] | None = None
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS))
    experts: Record | None = None
    ranks: Record | None = None
    collectives: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _kept_steps: array[int] = field(default_factory=lambda: array("q"))
    _kept_seconds: array[float] = field(default_factory=lambda: array("d"))
    _kept_sum: float = 0.0
    _wall_seconds: float = 0.0
    _last: tuple[float, bool] | None = None

    def __post_init__(self) -> None:
        if not (self.folder / METRICS_FILE).is_file():
            raise UserError(
                f"{self.folder} is no run folder: it has no {METRICS_FILE}; give the folder that "
                "`deepseek train` printed at its start and end"
            )
        config = self.folder / CONFIG_FILE
        tree = read_yaml(config.read_text(), str(config)).tree if config.is_file() else {}
        self.name = str(tree.get("name", self.folder.name))
        steps = (tree.get("trainer") or {}).get("max_steps")
        self.max_steps = steps if isinstance(steps, int) else None
        self.update()

    def update(self) -> bool:
        """Read on; returns whether there was anything new."""
        path = self.folder / METRICS_FILE
        try:
            with open(path, "rb") as file:
                # A resumed run cuts off the line that its predecessor left unfinished: nothing that
                # was read here, for a line is read when it is complete.
                file.seek(self._offset)
                data = file.read()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            self._take(line)
        if end:
            monitor = self.folder / MONITOR
            self.experts = last_record(monitor / EXPERTS_FILE, ("tokens", "bias", "margin"))
            self.ranks = last_record(monitor / RANKS_FILE)
            self.collectives = _newest(monitor / COLLECTIVES_FILE)
        return bool(end)

    @property
    def step(self) -> int:
        """Of the newest row; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def ended(self) -> str | None:
        """Why the run has ended, None if it goes on or was killed."""
        if self.events and self.events[-1]["event"] == "stopped":
            return str(self.events[-1].get("reason", "stopped"))
        return None

    def goodput(self) -> float | None:
        """Seconds in the steps that the run kept, over all since its first start but the pauses
        after an orderly stop; None before there is a step."""
        if not self._kept_sum or not self._wall_seconds:
            return None
        return min(1.0, self._kept_sum / self._wall_seconds)

    def latest(self, key: str) -> float | None:
        """Number in the newest step row; None if there is none."""
        return number(self.steps[-1].get(key)) if self.steps else None

    def series(self, key: str) -> list[float]:
        """The finite numbers of the kept steps."""
        values = [number(row.get(key)) for row in self.steps]
        return [value for value in values if value is not None and math.isfinite(value)]

    def alarms(self) -> list[dict[str, Any]]:
        """The newest alarms, ascending."""
        return [event for event in self.events if event["event"] == "alarm"]

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            return  # the report names damaged lines; here the next frame comes
        if (now := number(row.get("time"))) is not None:
            if self._last is not None and not self._last[1]:
                self._wall_seconds += now - self._last[0]
            self._last = now, row.get("event") == "stopped"
        if "event" in row:
            self.events.append(row)
        elif "val_loss" in row:
            self.validation = row
        else:
            while self.steps and self.steps[-1]["step"] >= step:
                self.steps.pop()
            self.steps.append(row)
            while self._kept_steps and self._kept_steps[-1] >= step:
                self._kept_steps.pop()
                self._kept_sum -= self._kept_seconds.pop()
            self._kept_steps.append(step)
            self._kept_seconds.append(number(row.get("seconds")) or 0.0)
            self._kept_sum += self._kept_seconds[-1]


def number(value: Any) -> float | None:
    """A number of a row; non-finite ones stand there as words."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _newest(path: Path) -> list[dict[str, Any]]:
    """The rows of the last step in a JSONL file, from its end."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        file.seek(max(0, length - _TAIL))
        lines = file.read().split(b"\n")
    rows = []
    for line in lines[1 if length > _TAIL else 0 : -1]:  # the first may lack its beginning
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if row["step"] == rows[-1]["step"]]
