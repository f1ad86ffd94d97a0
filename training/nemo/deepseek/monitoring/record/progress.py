"""The line a step: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from deepseek.console import progress_bar, say
from deepseek.frameworks import Callback
from deepseek.monitoring.run_log import clock
from deepseek.training.step import StepMetrics


class Progress(Callback):
    """Shows step, losses, speed and time left."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = max(1, every_n_steps)
        self._bar: Any = None
        self._task: Any = None
        self._first_step = 0
        self._start = 0.0
        self._last = (0.0, 0)
        self._validation = ""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the bar where there is a terminal."""
        self._first_step = pl_module.finished_steps
        self._start = time.monotonic()
        self._last = (self._start, 0)
        self._bar = progress_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=pl_module.max_steps, completed=self._first_step
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Advance."""
        metrics = pl_module.step_metrics
        now, tokens = time.monotonic(), self._last[1] + metrics.tokens
        if self._bar is not None:
            speed = metrics.tokens / max(now - self._last[0], 1e-9)
            self._last = (now, 0)
            line = step_line(metrics, pl_module.max_steps, speed, pl_module.step_facts)
            line += self._validation
            self._bar.update(self._task, completed=metrics.step, description=line)
            return
        self._last = (self._last[0], tokens)
        if metrics.step % self.every_n_steps and metrics.step != pl_module.max_steps:
            return
        speed = tokens / max(now - self._last[0], 1e-9)
        self._last = (now, 0)
        done = metrics.step - self._first_step
        left = (now - self._start) / done * (pl_module.max_steps - metrics.step)
        line = step_line(metrics, pl_module.max_steps, speed, pl_module.step_facts)
        say(f"{line} | {clock(left)} left")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the validation loss."""
        metrics = pl_module.validation_metrics
        if metrics is None:
            return
        text = f"val loss {metrics.val_loss:.4f}"
        if metrics.val_bits_per_byte is not None:
            text += f"  {metrics.val_bits_per_byte:.4f} bits/byte"
        self._validation = f" | {text}"
        if self._bar is None:
            say(f"step {metrics.step:>6} {text}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, so that the message below it can be read."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def step_line(
    metrics: StepMetrics,
    max_steps: int,
    tokens_per_second: float,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """``step 12/400 loss 5.43 mtp 5.61 3,210 tok/s mfu 31.0% grad 1.20 lr 2.2e-04 mem 0.4G | load
    1.32 dead 0 a2a 12%``; what was not measured is left out.

    Args:
        facts: what callbacks have found of the step, see ``DeepSeekModel.step_facts``.
    """
    facts = facts or {}
    parts = [f"step {metrics.step:>6}/{max_steps} loss {metrics.loss:.4f}"]
    if metrics.mtp_loss is not None:
        parts.append(f"mtp {metrics.mtp_loss:.4f}")
    parts.append(f"{tokens_per_second:,.0f} tok/s")
    if facts.get("mfu") is not None:
        parts.append(f"mfu {facts['mfu']:.1%}")
    parts.append(f"grad {metrics.grad_norm:.3f} lr {metrics.lr:.2e}")
    if "memory_bytes" in facts:
        parts.append(f"mem {facts['memory_bytes'] / 2**30:.1f}G")
    if "load_max_over_mean" in facts:
        parts.append(f"| load {facts['load_max_over_mean']:.2f} dead {facts['dead_experts']}")
    if facts.get("all_to_all_seconds") and facts.get("seconds"):
        parts.append(f"a2a {facts['all_to_all_seconds'] / facts['seconds']:.0%}")
    if metrics.skipped:
        parts.append("SKIPPED: gradient not finite")
    return " ".join(parts)
