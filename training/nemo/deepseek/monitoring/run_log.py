"""What the log of one run says, read once, ready to be drawn. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.config.errors import UserError
from deepseek.config.strict_yaml import read_yaml
from deepseek.monitoring.expert_history import ExpertHistory, read_experts
from deepseek.monitoring.rank_history import RankHistory, Traffic, read_ranks, read_traffic
from deepseek.run_folder import (
    COLLECTIVES_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EXPERTS_FILE,
    METRICS_FILE,
    MONITOR,
    RANKS_FILE,
    TRAFFIC_FILE,
)


@dataclass
class RunData:
    """One run. A part that was not logged is None or empty."""

    folder: Path
    label: str
    """Name of the run, made unique among the runs of a report."""
    steps: dict[str, np.ndarray]
    """Columns of the step rows, float64 [S], NaN where a row lacks the key; ``step`` ascends."""
    validations: dict[str, np.ndarray]
    """Columns of the validation rows."""
    events: list[dict[str, Any]]
    """All events in the order of the file."""
    lost_steps: int
    """Steps that were trained and then trained again after a restart."""
    config: dict[str, Any]
    config_text: str | None
    environment: dict[str, Any] | None
    collectives: list[dict[str, Any]]
    experts: ExpertHistory | None
    ranks: RankHistory | None
    traffic: Traffic | None
    notes: list[str] = field(default_factory=list)
    """Damage that was read past."""

    def column(self, name: str) -> np.ndarray | None:
        """One column of the step rows; None if no row has a number there."""
        values = self.steps.get(name)
        return None if values is None or not np.isfinite(values).any() else values

    def alarms(self) -> list[dict[str, Any]]:
        """The alarms in the order of steps; of a step trained twice the later ones."""
        alarms = [event for event in self.events if event["event"] == "alarm"]
        keys = ("step", "kind", "layer", "rank")
        latest = {tuple(alarm.get(key) for key in keys): alarm for alarm in alarms}
        return sorted(latest.values(), key=lambda alarm: int(alarm["step"]))

    @property
    def max_steps(self) -> int | None:
        """Steps of the whole run by its configuration."""
        value = self.setting("trainer.max_steps")
        return value if isinstance(value, int) else None

    def setting(self, path: str) -> Any:
        """Value of a dotted key of the configuration, None if it is not there."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def wall_seconds(self) -> float | None:
        """From the first start to the last row, less the time after each orderly stop."""
        times = [(event.get("time"), event["event"]) for event in self.events]
        times += [(float(t), "step") for t in self.steps.get("time", ()) if math.isfinite(t)]
        known = sorted((float(t), kind) for t, kind in times if t is not None)
        if len(known) < 2:
            return None
        pauses = sum(
            later[0] - earlier[0]
            for earlier, later in zip(known, known[1:], strict=False)
            if earlier[1] == "stopped"
        )
        return known[-1][0] - known[0][0] - pauses

    def goodput(self) -> float | None:
        """Seconds in the steps that the run kept, over ``wall_seconds``."""
        wall, seconds = self.wall_seconds(), self.column("seconds")
        if not wall or seconds is None:
            return None
        return min(1.0, float(np.nansum(seconds)) / wall)


def read_run(folder: Path) -> RunData:
    """Everything in a run folder that a report shows.

    Raises:
        UserError: no run folder, no step logged yet, or a file that is damaged in its middle.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is no run folder: it has no {METRICS_FILE}; "
            "give the folder that `deepseek train` printed at its start and end"
        )
    rows = read_rows(path)
    steps = _latest([row for row in rows if "event" not in row and "val_loss" not in row])
    if not steps:
        raise UserError(
            f"{path} holds no step yet; its first row is written after the first step: "
            "try again then"
        )
    validations = _latest([row for row in rows if "val_loss" in row])
    trained = sum("event" not in row and "val_loss" not in row for row in rows)
    config_text = _text(folder / CONFIG_FILE)
    config = read_yaml(config_text, str(folder / CONFIG_FILE)).tree if config_text else {}
    monitor = folder / MONITOR
    notes: list[str] = []
    collectives = monitor / COLLECTIVES_FILE
    return RunData(
        folder=folder,
        label=str(config.get("name", folder.name)) if isinstance(config, dict) else folder.name,
        steps=_columns(steps),
        validations=_columns(validations),
        events=[row for row in rows if "event" in row],
        lost_steps=trained - len(steps),
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        environment=_environment(folder / ENVIRONMENT_FILE),
        collectives=read_rows(collectives) if collectives.is_file() else [],
        experts=read_experts(monitor / EXPERTS_FILE, notes),
        ranks=read_ranks(monitor / RANKS_FILE, notes),
        traffic=read_traffic(monitor / TRAFFIC_FILE, notes),
        notes=notes,
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; what follows the last newline is a line cut short, and ignored.

    Raises:
        UserError: a line in the middle is no object with a step.
    """
    rows = []
    for number, line in enumerate(_bytes(path).split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            sound = isinstance(row, dict) and isinstance(row.get("step"), int)
        except ValueError:
            sound = False
        if not sound:
            raise UserError(
                f"{path}, line {number} is damaged: it is no JSON object with a step; "
                f"take the line out (sed -i {number}d {path}) and run the command again"
            )
        rows.append(row)
    return rows


def _latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each step the row written last, in the order of steps."""
    latest = {row["step"]: row for row in rows}
    return [latest[step] for step in sorted(latest)]


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def _number(value: Any) -> float:
    """A number of a row; non-finite ones stand there as words."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _environment(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} is damaged: it is no JSON object; remove it, and the report goes without it"
        )
    return tree


def _text(path: Path) -> str | None:
    return _bytes(path).decode(errors="replace") if path.is_file() else None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; see its permissions") from error
