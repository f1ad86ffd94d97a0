"""Devices by the names that people give them: GPUs, and the CPU as it was measured."""

from __future__ import annotations

from pathlib import Path

from deepseek.config import UserError
from deepseek.files import user_cache
from deepseek.planner.cpu import CpuMachine, machine_name, read_machine
from deepseek.planner.hardware import Device, gpu_named


def calibration_file() -> Path:
    """Where ``deepseek calibrate`` keeps what it finds of this machine."""
    return user_cache() / "cpu.json"


def this_machine() -> CpuMachine:
    """The calibration of this machine.

    Raises:
        UserError: there is none, or it is of another one.
    """
    file = calibration_file()
    machine = read_machine(file)
    if machine.name != machine_name():
        raise UserError(
            f"--gpu cpu: {file} was measured on {machine.name}; this is {machine_name()}: "
            f"run `deepseek calibrate`, or give --gpu {file} to plan for that machine"
        )
    return machine


def device_named(text: str, processes: int) -> Device:
    """A GPU by its name, or what each process has of a CPU.

    Args:
        text: a GPU; ``cpu`` for this machine's, or a file of ``deepseek calibrate``.
        processes: that share the CPU.

    Raises:
        UserError: no such GPU, or no such file; ``cpu`` was calibrated on another machine.
    """
    if text.lower() == "cpu":
        return this_machine().device(processes)
    return read_machine(Path(text)).device(processes) if text.endswith(".json") else gpu_named(text)
