"""``metrics.jsonl``: one JSON object a step, append-only, the truth about a run."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.frameworks import Callback


class MetricsLog(Callback):
    """Writes every step and every validation; each line is complete or absent after a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clock = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Append one object as one line, in one system call.

        Raises:
            UserError: the file cannot be written; a line half written is cut off at the next start.
        """
        line = (json.dumps({key: _finite(value) for key, value in row.items()}) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room or mend it, and run again "
                "to go on from the last checkpoint"
            ) from error

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
    """All complete rows; of a step trained twice (after a kill) only the later one."""
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is cut short
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for row in map(json.loads, lines):
        kind = row.get("event") or ("validation" if "val_loss" in row else "step")
        rows.pop((kind, row["step"]), None)
        rows[kind, row["step"]] = row
    return list(rows.values())


def drop_partial_line(path: Path) -> None:
    """Cut the file after its last complete line."""
    if not path.is_file():
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
