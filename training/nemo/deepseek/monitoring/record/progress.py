"""The line a step: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from deepseek.console import progress_bar, say
from deepseek.frameworks import Trainer
from deepseek.monitoring.run_log import clock
from deepseek.training.step import DeepSeekCallback, DeepSeekModel, StepRecord


class Progress(DeepSeekCallback):
    """Shows step, losses, speed and time left."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = max(1, every_n_steps)
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
        self._bar = progress_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=module.max_steps, completed=self._first_step)

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Advance."""
        record = module.step_record
        assert record is not None
        now, tokens = time.monotonic(), self._last[1] + record.tokens
        if self._bar is not None:
            speed = record.tokens / max(now - self._last[0], 1e-9)
            self._last = (now, 0)
            line = step_line(record, module.max_steps, speed)
            line += self._validation
            self._bar.update(self._task, completed=record.step, description=line)
            return
        self._last = (self._last[0], tokens)
        if record.step % self.every_n_steps and record.step != module.max_steps:
            return
        speed = tokens / max(now - self._last[0], 1e-9)
        self._last = (now, 0)
        done = record.step - self._first_step
        left = (now - self._start) / done * (module.max_steps - record.step)
        line = step_line(record, module.max_steps, speed)
        say(f"{line} | {clock(left)} left")

    def on_validation_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Show the validation loss."""
        metrics = module.validation_record
        if metrics is None:
            return
        text = f"val loss {metrics.val_loss:.4f}"
        if metrics.val_bits_per_byte is not None:
            text += f"  {metrics.val_bits_per_byte:.4f} bits/byte"
        self._validation = f" | {text}"
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


def step_line(record: StepRecord, max_steps: int, tokens_per_second: float) -> str:
    """``step 12/400 loss 5.43 mtp 5.61 3,210 tok/s mfu 31.0% grad 1.20 lr 2.2e-04 mem 0.4G | load
    1.32 dead 0 a2a 12%``; what was not measured is left out."""
    parts = [f"step {record.step:>6}/{max_steps} loss {record.loss:.4f}"]
    if record.mtp_loss is not None:
        parts.append(f"mtp {record.mtp_loss:.4f}")
    parts.append(f"{tokens_per_second:,.0f} tok/s")
    if record.mfu is not None:
        parts.append(f"mfu {record.mfu:.1%}")
    parts.append(f"grad {record.grad_norm:.3f} lr {record.lr:.2e}")
    if record.memory_bytes is not None:
        parts.append(f"mem {record.memory_bytes / 2**30:.1f}G")
    if record.load_max_over_mean is not None:
        parts.append(f"| load {record.load_max_over_mean:.2f} dead {record.dead_experts}")
    if record.all_to_all_seconds and record.seconds:
        parts.append(f"a2a {record.all_to_all_seconds / record.seconds:.0%}")
    if record.skipped:
        parts.append("SKIPPED: gradient not finite")
    return " ".join(parts)
