"""The denominator of MFU: how many floating-point operations a device could do in a second."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

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
ROUNDS = 40
"""Short ones and many: where other processes run, some come through undisturbed."""


@dataclass(frozen=True)
class Peak:
    """What one process could reach at best."""

    flops: float | None
    """Per second; None: unknown."""
    source: str
    """Where the number is from."""


def peak_of(device: torch.device, configured_tflops: float | None) -> Peak:
    """The configured number; else the data sheet's for a GPU, or a measured one for a CPU."""
    if configured_tflops is not None:
        return Peak(configured_tflops * 1e12, "exp_manager.monitor.peak_tflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        fitting = [key for key in DENSE_BF16_TFLOPS if key in name]
        if not fitting:
            return Peak(None, f"unknown for {name}: set exp_manager.monitor.peak_tflops")
        key = max(fitting, key=len)
        return Peak(DENSE_BF16_TFLOPS[key] * 1e12, f"data sheet of {key}, dense bf16")
    return Peak(_measured(), f"best of {ROUNDS} fp32 products of {SIDE} x {SIDE} matrices here")


def _measured() -> float:
    a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2 * SIDE**3 / best
