"""What the planner expects of a run, to be told beside what the run then takes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek.commands.device import calibration_file
from deepseek.commands.validate import size_text
from deepseek.config import RunConfig, UserError
from deepseek.config.layout import world_size
from deepseek.config.memory import rank_needs
from deepseek.console import say
from deepseek.monitoring.run_log import RunLog
from deepseek.planner.cpu import cores, read_machine
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
        say(f"expected     {self}, as predicted")

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
        None of GPUs that are not known, and of a CPU that is not calibrated or computes otherwise.
    """
    device = _device(run, gpu_name)
    if device is None:
        return None
    world = world_size(run)
    most = max(need.total for need in rank_needs(run))
    return Forecast(predict_step(run, device, world).seconds, round(device.process + most))


def _device(run: RunConfig, gpu_name: str | None) -> Device | None:
    try:
        if gpu_name is not None:
            return gpu_named(gpu_name)
        machine = read_machine(calibration_file())
    except UserError:
        return None
    usual = str(run.trainer.precision) == "32" and not run.trainer.num_threads
    fits = usual and machine.cores == cores() and run.trainer.num_nodes == 1
    return machine.device(world_size(run)) if fits else None
