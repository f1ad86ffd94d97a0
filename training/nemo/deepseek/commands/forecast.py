"""What the planner expects of a run, to be told beside what the run then takes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek.commands.device import this_machine
from deepseek.commands.validate import size_text
from deepseek.config import RunConfig, UserError
from deepseek.config.layout import world_size
from deepseek.config.processor import cores, told_threads
from deepseek.console import say
from deepseek.monitoring.run_log import RunLog
from deepseek.planner.cpu import DISTURBED, resident_bytes
from deepseek.planner.hardware import Device, gpu_named
from deepseek.planner.step_time import predict_step

LAST = 50
"""Steps that are compared; never the first of a run, which connects and compiles."""


class Forecast(NamedTuple):
    """Of one step."""

    seconds: float
    bytes: int
    """Of the fullest rank; on a CPU of its whole process."""

    def tell(self) -> None:
        """At the start of a run."""
        say(f"expected     {self}, as predicted for an idle machine")

    def compare(self, folder: Path) -> None:
        """At its end, with the median and the most memory of its last steps."""
        log = RunLog(folder)
        seconds, held = log.column("seconds"), log.column("memory_bytes")
        if seconds is None or held is None or len(seconds) < 3:
            return
        took = Forecast(float(np.median(seconds[1:][-LAST:])), int(max(held[-LAST:])))
        error = self.seconds / took.seconds - 1
        say(f"took         {took}; predicted {self} ({error:+.0%} of the time)")

    def __str__(self) -> str:
        return f"{self.seconds:.3g} s a step, {size_text(self.bytes)}"


def forecast(run: RunConfig, gpu_name: str | None) -> Forecast | None:
    """What is expected of a run.

    Args:
        run: with sound sizes.
        gpu_name: as the driver tells it; None: on a CPU.

    Returns:
        None of GPUs that are not known, and of a CPU that is not calibrated, was not idle then, or
        computes otherwise than is measured.
    """
    device = _device(run, gpu_name)
    if device is None:
        return None
    seconds = predict_step(run, device, world_size(run)).seconds
    return Forecast(seconds, resident_bytes(run, device))


def _device(run: RunConfig, gpu_name: str | None) -> Device | None:
    try:
        if gpu_name is not None:
            return gpu_named(gpu_name)
        machine = this_machine()
    except UserError:
        return None
    trainer, model = run.trainer, run.model
    usual = str(trainer.precision) == "32" and not trainer.num_threads and trainer.num_nodes == 1
    usual = usual and model.optim.name == "adamw" and not (model.peft or model.torch_compile)
    threads = told_threads() or cores()
    world = world_size(run)
    crew = machine.crew(world)
    if (
        not usual
        or machine.disturbed > DISTURBED
        or threads != max(1, crew.threads * crew.processes // world)
    ):
        return None
    return machine.device(world)
