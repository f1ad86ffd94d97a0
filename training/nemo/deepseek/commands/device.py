"""Devices by the names that people give them: GPUs, and the CPU as it was measured."""

from __future__ import annotations

from pathlib import Path

from deepseek.files import user_cache
from deepseek.planner.cpu import read_machine
from deepseek.planner.hardware import Device, gpu_named


def calibration_file() -> Path:
    """Where ``deepseek calibrate`` keeps what it finds of this machine."""
    return user_cache() / "cpu.json"


def device_named(text: str, processes: int) -> Device:
    """A GPU by its name, or what each process has of a CPU.

    Args:
        text: a GPU; ``cpu`` for this machine's, or a file of ``deepseek calibrate``.
        processes: that share the CPU.

    Raises:
        UserError: no such GPU, or no such file.
    """
    if text.lower() == "cpu":
        return read_machine(calibration_file()).device(processes)
    return read_machine(Path(text)).device(processes) if text.endswith(".json") else gpu_named(text)
