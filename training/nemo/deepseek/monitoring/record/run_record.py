"""What a run folder says of its run besides the log: configuration, tokenizer, environment.

The environment names what the run ran on, for people who compare runs (no host names), and how many
floating-point operations its devices could do in a second, the denominator of MFU.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek.config.processor import processor
from deepseek.data.tokenizer import Tokenizer
from deepseek.files import atomic_open, disk_errors
from deepseek.frameworks import Trainer, framework_name
from deepseek.run_folder import CONFIG_FILE, ENVIRONMENT_FILE, TOKENIZER
from deepseek.training.step import DeepSeekCallback, DeepSeekModel


@dataclass(eq=False)
class RunRecord(DeepSeekCallback):
    """Writes them at the start, after a checkpoint has been restored.

    A start that is refused, since its configuration or its data differ or another process has the
    folder, must leave the record of the run as it is.
    """

    folder: Path
    """Of the run."""
    config: str
    """Content of the configuration file, every key resolved."""
    tokenizer: Tokenizer | None
    """None if the data come without one."""
    environment: dict[str, Any]

    def on_fit_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Each file is whole or absent after a kill.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        with disk_errors(f"writing the record of the run into {self.folder}"):
            with atomic_open(self.folder / CONFIG_FILE) as file:
                file.write(self.config.encode())
            with atomic_open(self.folder / ENVIRONMENT_FILE) as file:
                file.write(json.dumps(self.environment, indent=2).encode() + b"\n")
            if self.tokenizer is not None:
                self.tokenizer.save(self.folder / TOKENIZER)


def environment(world_size: int, num_nodes: int) -> dict[str, Any]:
    """Versions, devices, threads, the command; what JSON can say."""
    on_gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "framework": framework_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "cuda": torch.version.cuda if on_gpu else None,
        "processes": world_size,
        "nodes": num_nodes,
        "commit": _commit(),
        "command": shlex.join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "deepseek" if name == "__main__.py" else name  # python -m deepseek


def _cpu() -> str:
    return processor().get("model name") or platform.processor()


def _commit() -> str | None:
    """Of the source tree, if it is one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


DENSE_BF16_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
}
"""NVIDIA's data sheets, without sparsity; a longer name that fits wins."""
SIDE = 512
ROUNDS, MOST_SECONDS = 40, 1.0
"""Short ones and many: where other processes run, some come through undisturbed."""


@dataclass(frozen=True)
class Peak:
    """What one process could reach at best."""

    flops: float | None
    """Per second; None: unknown."""
    source: str
    """Where the number is from."""


def peak_of(
    device: torch.device, configured_tflops: float | None, dtype: torch.dtype = torch.float32
) -> Peak:
    """The configured number; else the data sheet's for a GPU, or a measured one for a CPU.

    Args:
        device: one.
        configured_tflops: ``exp_manager.monitor.peak_tflops``.
        dtype: of the products of the run; what a CPU is measured in.
    """
    if configured_tflops is not None:
        return Peak(configured_tflops * 1e12, "exp_manager.monitor.peak_tflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        fitting = [key for key in DENSE_BF16_TFLOPS if key in name]
        if not fitting:
            return Peak(None, f"unknown for {name}: set exp_manager.monitor.peak_tflops")
        key = max(fitting, key=len)
        return Peak(DENSE_BF16_TFLOPS[key] * 1e12, f"data sheet of {key}, dense bf16")
    name, threads = str(dtype).removeprefix("torch."), torch.get_num_threads()
    source = (
        f"measured here: {threads} x one thread's best of {ROUNDS} {name} products of "
        f"{SIDE} x {SIDE} matrices"
    )
    return Peak(threads * _measured(dtype), source)


def _measured(dtype: torch.dtype) -> float:
    """Of one thread, by its own clock, which stands still while another program has the core.

    Threads that share a product wait for each other, and most of that waiting is no sleep: where
    another program has one's core, the clocks of the others go on.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rate_of_this_thread(dtype)
    finally:
        torch.set_num_threads(threads)


def _rate_of_this_thread(dtype: torch.dtype) -> float:
    a, b = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    best, left = float("inf"), MOST_SECONDS
    for _ in range(ROUNDS):
        begin = time.thread_time()
        a @ b
        seconds = time.thread_time() - begin
        best, left = min(best, seconds), left - seconds
        if left < 0:  # bf16 on a CPU that has no such products
            break
    return 2 * SIDE**3 / best
