"""``metrics.jsonl``: one JSON object a step, append-only, the truth about a run."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek.frameworks import Callback


class MetricsLog(Callback):
    """Writes every step and every validation; each line is complete or absent after a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clock = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Append one object as one line, in one system call."""
        line = json.dumps({key: _finite(value) for key, value in row.items()}) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Remove a line cut short by a kill; note a resumption."""
        drop_partial_line(self.path)
        if pl_module.finished_steps:
            self.write({"event": "resumed", "step": pl_module.finished_steps})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Start the clock of the step."""
        self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """The step's row: losses, gradient norm, learning rate, tokens, seconds."""
        row = asdict(pl_module.step_metrics)
        row["seconds"] = round(time.perf_counter() - self._clock, 6)
        self.write(row)
        for logger in trainer.loggers:
            scalars = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            logger.log_metrics(scalars, step=row["step"])

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The validation row."""
        if trainer.sanity_checking or pl_module.validation_metrics is None:
            return
        row = asdict(pl_module.validation_metrics)
        self.write(row)
        for logger in trainer.loggers:
            scalars = {k: v for k, v in row.items() if v is not None and k != "step"}
            logger.log_metrics(scalars, step=row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows; of a step trained twice (after a kill) the later row counts."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            rows.append(json.loads(line))
    return rows


def drop_partial_line(path: Path) -> None:
    """Cut the file after its last complete line."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        with open(path, "r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """JSON has no NaN: say it in words that every parser takes."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
