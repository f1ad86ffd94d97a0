"""``metrics.jsonl``: one JSON object a step, append-only, the truth about a run."""

from __future__ import annotations

import errno
import json
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.frameworks import Trainer
from deepseek.training.step import (
    DeepSeekCallback,
    DeepSeekModel,
    StepRecord,
    ValidationRecord,
)

SCALARS = {field.name for record in (StepRecord, ValidationRecord) for field in fields(record)}
SCALARS -= {"step", "time"}
"""What loggers get, whatever the size of the model; matrices stay in the local log."""
_JSON = json.JSONEncoder(allow_nan=False)
_NUMBERS = (int, float)
_BLOCK = 1 << 16


class MetricsLog(DeepSeekCallback):
    """Writes every step and every validation; each line is complete or absent after a kill.

    Args:
        path: the file.
        flops_per_token: training FLOPs, for MFU.
        peak_flops: per second, of all devices together; None: MFU is unknown.
        attempt: how often a launcher has started the run anew.
        loggers: by name, what opens loggers that the trainer does not know; all loggers are told
            the scalars of each row.
    """

    def __init__(
        self,
        path: Path,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        *,
        attempt: int = 0,
        loggers: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self._begun = False
        self.path = path
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.attempt = attempt
        self._mirrors = [Mirror(name, make, path) for name, make in (loggers or {}).items()]
        self._last_end = 0.0
        self._validation_start = 0.0
        self._own_seconds = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Append one object as one line, in one system call.

        Raises:
            UserError: the file cannot be written; of the line nothing stays.
        """
        try:
            text = _JSON.encode(row)
        except ValueError:  # rare, and looked for where it is looked at anyway
            text = json.dumps({key: _finite(value) for key, value in row.items()})
        line = (text + "\n").encode()
        with _reported(self.path):
            with open(self.path, "ab", buffering=0) as file:
                if (count := file.write(line)) < len(line):
                    file.truncate(file.tell() - count)  # else the next event continues this line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def event(self, name: str, step: int, **more: Any) -> None:
        """Append an event; ``more`` are keys of its row."""
        self.write({"event": name, "step": step, "time": round(time.time(), 3)} | more)

    def add_cost(self, seconds: float) -> None:
        """Count what another callback spent on watching after this one had written its row."""
        self._own_seconds += seconds

    def on_fit_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Remove a line cut short by a kill; note the start and what kind of start it is.

        Raises:
            UserError: the file cannot be written: better now than after the first step.
        """
        self._begun = True
        with _reported(self.path):
            drop_partial_line(self.path)
        step = module.finished_steps
        if self.attempt:
            self.event("restart", step, attempt=self.attempt, reason=f"restart {self.attempt}")
        self.event("resumed" if step else "started", step)

    def on_train_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Start the clock of the first step; see which loggers there are."""
        known = [_opener(logger) for logger in trainer.loggers]
        self._mirrors += [Mirror(name, make, self.path) for name, make in known]
        self._last_end = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Note the checkpoint of the step before, if there was one."""
        self._note_checkpoint(module)

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """The step's row. Its seconds begin where those of the step before end, so that waiting for
        data, checkpoints and monitoring are in them; validations are not."""
        begin = time.perf_counter()
        seconds, self._last_end = begin - self._last_end, begin
        record = module.step_record
        assert record is not None
        speed = record.tokens / seconds
        record.seconds, record.time = seconds, round(time.time(), 3)
        record.tokens_per_second = round(speed, 1)
        if self.peak_flops:
            record.mfu = round(speed * self.flops_per_token / self.peak_flops, 6)
        # What this callback cost in the step before: that of this row is not over yet.
        record.monitor_seconds += self._own_seconds
        row = record.row()
        self.write(row)
        self._mirror(row)
        self._own_seconds = time.perf_counter() - begin

    def on_validation_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Stop the clock."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """The validation row."""
        self._last_end += time.perf_counter() - self._validation_start
        if trainer.sanity_checking or module.validation_record is None:
            return
        row = asdict(module.validation_record)
        self.write(row)
        self._mirror(row)

    def on_train_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Note the last checkpoint, and the end and its reason."""
        step = module.finished_steps
        self._note_checkpoint(module)
        number = module.stop_signal
        reason = "complete"
        if step < module.max_steps and number is not None:
            reason = signal.Signals(number).name
            reason += ": nobody reads the output" if number == signal.SIGPIPE else ""
        self.event("stopped", step, reason=reason)
        self._close()

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """The same, as far as the file can still be written; a refused start leaves no trace."""
        if not self._begun:
            return
        with suppress(UserError):
            first_line = (str(exception).splitlines() or [""])[0]
            reason = f"{type(exception).__name__}: {first_line}".removesuffix(": ")
            if isinstance(exception, KeyboardInterrupt) and first_line:
                reason = first_line  # which signal it was
            self.event("stopped", module.finished_steps, reason=reason)
        self._close()

    def _note_checkpoint(self, module: DeepSeekModel) -> None:
        saved = module.save_record
        if saved is not None and saved.step == module.finished_steps:
            self.event("checkpoint", saved.step, seconds=round(saved.seconds, 6))

    def _close(self) -> None:
        mirrors, self._mirrors = self._mirrors, []
        for mirror in mirrors:
            mirror.close()

    def _mirror(self, row: dict[str, Any]) -> None:
        """Give the loggers their scalars."""
        if self._mirrors:
            scalars = {
                key: value
                for key, value in row.items()
                if key in SCALARS and isinstance(value, _NUMBERS)
            }
            for mirror in self._mirrors:
                mirror.tell(scalars, row["step"])


def drop_partial_line(path: Path) -> None:
    """Cut the file after its last complete line."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        length = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
        if end != length:
            file.truncate(end)
            os.fsync(file.fileno())


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """What the system says of the file is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room or mend it, and run again "
            "to go on from the last checkpoint"
        ) from error


def _opener(logger: Any) -> tuple[str, Callable[[], Any]]:
    """A logger that the trainer has, as ``Mirror`` takes it."""
    return type(logger).__name__, lambda: logger


def _finite(value: Any) -> Any:
    """JSON has no NaN: say it in words that every parser takes."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


MOST_WAITING = 1000
"""Rows that a slow logger may lag behind; further ones are left out."""
MOST_WORDS = 200
"""Characters of a logger's own message that are shown."""
PATIENCE_SECONDS = 4.0
"""At the end of training, for what is still waiting."""


class Mirror:
    """Feeds one logger from a thread of its own: what it does there cannot stop or slow training.

    A logger that raises is told of once and gets no more; one that hangs or does not keep up loses
    rows. Nothing else is lost, since the local log has everything.

    Args:
        name: for messages.
        open_logger: gives the logger; called in the thread, for it may want the network.
        everything_is_in: where the reader of a message finds what the logger did not get.
    """

    def __init__(self, name: str, open_logger: Callable[[], Any], everything_is_in: object) -> None:
        self.name = name
        self._open_logger = open_logger
        self._elsewhere = f"everything is in {everything_is_in}"
        self._rows: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        self._broken = False
        # A daemon: one that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._feed, name=f"mirror {name}", daemon=True)

    def tell(self, scalars: dict[str, Any], step: int) -> None:
        """Hand over one row; returns at once."""
        if self._broken:
            return
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._rows.put_nowait((scalars, step))
        except queue.Full:
            if not self._left_out:
                complain(
                    f"{self.name} does not keep up, it is {MOST_WAITING} rows behind: rows are "
                    f"left out from step {step} on; {self._elsewhere}"
                )
            self._left_out += 1

    def close(self, patience: float = PATIENCE_SECONDS) -> None:
        """Give it what is waiting, for so many seconds at most."""
        if self._thread.ident is None:
            return
        try:
            self._rows.put(None, timeout=patience)
        except queue.Full:
            pass
        self._thread.join(patience)
        if self._thread.is_alive():
            behind = self._rows.qsize()
            complain(
                f"{self.name} did not take its last rows within {patience:g} s, about {behind} are "
                f"missing there; {self._elsewhere}"
            )

    def _feed(self) -> None:
        try:
            logger = self._open_logger()
            while (row := self._rows.get()) is not None:
                scalars, step = row
                logger.log_metrics(scalars, step=step)
        except BaseException as error:  # also SystemExit, which some raise where they cannot log in
            self._broken = True
            words = " ".join(str(error).split())
            words = words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]} ..."
            complain(
                f"{self.name} failed ({type(error).__name__}: {words}) and gets no more; "
                f"{self._elsewhere}"
            )
