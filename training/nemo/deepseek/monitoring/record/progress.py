"""The line a step: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from deepseek.console import progress_bar, say
from deepseek.frameworks import Trainer
from deepseek.monitoring.run_log import clock
from deepseek.training.step import DeepSeekCallback, DeepSeekModel, StepRecord

BAR_COLUMNS = 10


class Progress(DeepSeekCallback):
    """Shows step, losses, speed and time left.

    Args:
        every_n_steps: steps between two lines where there is no terminal.
        epochs: of the data after so many steps, or of the part of a blend that is passed most.
    """

    def __init__(
        self, every_n_steps: int, epochs: Callable[[int], float] = lambda steps: 0.0
    ) -> None:
        self.every_n_steps = max(1, every_n_steps)
        self.epochs = epochs
        self._bar: Any = None
        self._task: Any = None
        self._first_step = 0
        self._start = 0.0
        self._last = (0.0, 0)
        self._validation = ""

    def on_train_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Open the bar where there is a terminal."""
        self._first_step = module.finished_steps
        self._start = time.monotonic()
        self._last = (self._start, 0)
        self._bar = progress_bar(BAR_COLUMNS, shows_time=False)
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=module.max_steps, completed=self._first_step)

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Advance."""
        record = module.step_record
        assert record is not None
        now, tokens = time.monotonic(), self._last[1] + record.tokens
        is_due = record.step % self.every_n_steps == 0 or record.step == module.max_steps
        if self._bar is None and not is_due:
            self._last = (self._last[0], tokens)
            return
        speed = tokens / max(now - self._last[0], 1e-9)
        self._last = (now, 0)
        done = record.step - self._first_step
        left = (now - self._start) / done * (module.max_steps - record.step)
        parts = step_parts(record, module.max_steps, speed, left, self.epochs)
        if self._bar is None:
            columns = os.environ.get("COLUMNS", "")
            say(fitted(parts, int(columns) if columns.isdecimal() else 0))
            return
        if self._validation:
            parts.insert(3 + record.skipped, self._validation)
        room = shutil.get_terminal_size().columns - BAR_COLUMNS - 1
        self._bar.update(self._task, completed=record.step, description=fitted(parts, room))

    def on_validation_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Show the validation loss."""
        metrics = module.validation_record
        if metrics is None:
            return
        text = f"val loss {metrics.val_loss:.4f}"
        if metrics.val_bits_per_byte is not None:
            text += f"  {metrics.val_bits_per_byte:.4f} bits/byte"
        self._validation = text
        if self._bar is None:
            say(f"step {metrics.step:>6} {text}")

    def on_train_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """Close the bar, so that the message below it can be read."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_parts(
    record: StepRecord,
    max_steps: int,
    tokens_per_second: float,
    seconds_left: float,
    epochs: Callable[[int], float] = lambda steps: 0.0,
) -> list[str]:
    """``step 12/400 loss 5.43``, ``3,210 tok/s``, ``0:41 left``, ...: what matters most comes
    first, and what was not measured is left out."""
    parts = [f"step {record.step:>6}/{max_steps} loss {record.loss:.4f}"]
    if record.skipped:
        parts.append(f"SKIPPED, gradient {record.grad_norm:g}")
    parts += [f"{tokens_per_second:,.0f} tok/s", f"{clock(seconds_left)} left"]
    if (most := epochs(max_steps)) > 1:  # else each sample is seen once
        parts.append(f"epoch {epochs(record.step):.2f}/{most:.2f}")
    if record.mtp_loss is not None:
        parts.append(f"mtp {record.mtp_loss:.4f}")
    parts += [f"grad {record.grad_norm:.3f}", f"lr {record.lr:.2e}"]
    if record.load_max_over_mean is not None:
        parts.append(f"load {record.load_max_over_mean:.2f} dead {record.dead_experts}")
    if record.mfu is not None:
        parts.append(f"mfu {record.mfu:.1%}")
    if record.memory_bytes is not None:
        parts.append(f"mem {record.memory_bytes / 2**30:.1f}G")
    if record.all_to_all_seconds and record.seconds:
        parts.append(f"a2a {record.all_to_all_seconds / record.seconds:.0%}")
    return parts


def fitted(parts: list[str], columns: int) -> str:
    """One line of at most so many columns, without the parts that have no room beside those before
    them; 0: of any length."""
    line = parts[0]
    for part in parts[1:]:
        if not columns or len(line) + 3 + len(part) <= columns:
            line += f" | {part}"
    return line
