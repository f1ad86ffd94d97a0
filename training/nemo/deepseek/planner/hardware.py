"""GPUs as numbers: peaks, memory, links and price of an hour, each with its source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from deepseek.config.errors import UserError, nearest

if TYPE_CHECKING:
    from deepseek.planner.cpu_time import Share


@dataclass(frozen=True)
class Efficiency:
    """The constants that are fitted to published runs."""

    products: float = 0.9
    """Of what a product alone reaches, the share that it reaches in a step."""
    glue: float = 0.7
    """Memory traffic between products, in that of DeepSeek's own kernels, in January 2026."""
    trend: float = 0.3
    """By how much glue and host time fall in a year of releases, as an exponent."""
    host: float = 1.5e-3
    """Seconds of a block with experts, forward and backward, in which a GPU waits for its host to
    learn how many rows each expert has, likewise."""


@dataclass(frozen=True)
class Device:
    """What a GPU, or a process on CPUs (``cpu.py``), and the machine around it can do at best."""

    name: str
    bf16: float
    """FLOP/s of dense bf16 products."""
    fp8: float
    """FLOP/s of dense fp8 products; those of bf16 where there is no fp8."""
    memory: float
    """Bytes that a program can take."""
    hbm: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s to other GPUs of its domain, in each direction."""
    domain: int
    """GPUs that NVLink connects."""
    network: float
    """Bytes/s to GPUs of other domains, in each direction."""
    price: float | None
    """US dollars of an hour; None: no public list price is known."""
    source: str
    """Of the figures."""
    price_note: str
    """Whose price it is."""
    product_share: float = 0.8
    """Of the bf16 peak, what a large product reaches, measured alone."""
    fp8_share: float = 0.66
    """The same of the fp8 peak, of the largest products."""
    fp4_share: float = 0.0
    """The same of products in NVFP4, of the fp8 peak too; 0: it has none."""
    attention_share: float = 0.55
    """Of the bf16 peak, latent attention forward, the mask's half not counted."""
    attention_back_share: float = 0.46
    """The same backward, counted as 2.5 times forward."""
    cpu: Share | None = None
    """What a process of a CPU has instead; None: a GPU."""

    def __str__(self) -> str:
        return self.name

    @property
    def peak(self) -> str:
        """What MFU is a share of."""
        if self.cpu:
            return f"{self.bf16 / 1e9:,.0f} GFLOP/s, the measured rate of fp32 products"
        return f"{self.bf16 / 1e12:,.0f} TFLOP/s, the dense bf16 peak"


# Shares are medians of the kernel tables in aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0):
# products of 4096 rows, latent attention of 128 heads on 4096 tokens. Attention's backward share is
# that of DeepSeek's profile (455 TFLOP/s on H800), elsewhere in the same proportion to forward.
_AMPERE: dict[str, Any] = {"attention_share": 0.47, "attention_back_share": 0.39}
_BLACKWELL: dict[str, Any] = {
    "product_share": 0.67,
    "fp8_share": 0.59,
    "fp4_share": 0.85,
    "attention_share": 0.48,
    "attention_back_share": 0.4,
}
_B300: dict[str, Any] = {
    "product_share": 0.72,
    "fp8_share": 0.66,
    "fp4_share": 1.0,
    "attention_share": 0.55,
    "attention_back_share": 0.46,
}
_GB300: dict[str, Any] = {
    "product_share": 0.76,
    "fp8_share": 0.66,
    "fp4_share": 1.0,
    "attention_share": 0.55,
    "attention_back_share": 0.46,
}
_LIST_PRICE = "on-demand list price of 2025, rounded; contracts differ by a factor of 2"
_NO_PRICE = "no public list price"
_AMD = "7 links of Infinity Fabric; one 400 Gb/s port a GPU; shares are H100's, not measured"

GPUS: dict[str, Device] = {
    gpu.name: gpu
    for gpu in (
        Device("A100", 312e12, 312e12, 85.9e9, 2.04e12, 300e9, 8, 25e9, 1.8,
            "NVIDIA A100 80GB SXM data sheet; HDR InfiniBand of a DGX A100",
            _LIST_PRICE, **_AMPERE),
        Device("H800", 989e12, 1979e12, 85.9e9, 3.35e12, 200e9, 8, 50e9, 2.0,
            "arXiv:2412.19437 section 3.1, arXiv:2505.09343 section 2: an H100 with NVLink of "
            "400 GB/s both ways", "what arXiv:2412.19437 reckons with"),
        Device("H100", 989e12, 1979e12, 85.9e9, 3.35e12, 450e9, 8, 50e9, 3.0,
            "NVIDIA H100 SXM data sheet; one 400 Gb/s port a GPU as in a DGX H100", _LIST_PRICE),
        Device("H100PCIe", 756e12, 1513e12, 85.9e9, 2.0e12, 300e9, 2, 50e9, 2.0,
            "NVIDIA H100 PCIe data sheet; NVLink bridges between two; one 400 Gb/s port a GPU",
            _LIST_PRICE),
        Device("H200", 989e12, 1979e12, 151.4e9, 4.8e12, 450e9, 8, 50e9, 3.5,
            "NVIDIA H200 SXM data sheet; one 400 Gb/s port a GPU", _LIST_PRICE),
        Device("H20", 148e12, 296e12, 103.1e9, 4.0e12, 450e9, 8, 50e9, None,
            "NVIDIA H20 data sheet; one 400 Gb/s port a GPU", _NO_PRICE),
        Device("GH200", 989e12, 1979e12, 103.1e9, 4.0e12, 450e9, 32, 50e9, None,
            "NVIDIA GH200 NVL32 data sheet; one 400 Gb/s port a GPU", _NO_PRICE),
        Device("MI300X", 1307e12, 2614e12, 206.2e9, 5.3e12, 448e9, 8, 50e9, None,
            f"AMD Instinct MI300X data sheet, {_AMD}", _NO_PRICE),
        Device("MI325X", 1307e12, 2614e12, 274.9e9, 6.0e12, 448e9, 8, 50e9, None,
            f"AMD Instinct MI325X data sheet, {_AMD}", _NO_PRICE),
        Device("MI355X", 2500e12, 5000e12, 309.2e9, 8.0e12, 537e9, 8, 50e9, None,
            f"AMD Instinct MI355X data sheet, {_AMD}", _NO_PRICE),
        Device("B200", 2250e12, 4500e12, 193.3e9, 8e12, 900e9, 8, 50e9, 5.0,
            "NVIDIA DGX B200 data sheet; one 400 Gb/s port a GPU", _LIST_PRICE, **_BLACKWELL),
        Device("B300", 2250e12, 4500e12, 288e9, 8e12, 900e9, 8, 100e9, None,
            "NVIDIA DGX B300 data sheet; one 800 Gb/s port a GPU", _NO_PRICE, **_B300),
        Device("GB200", 2500e12, 5000e12, 198.7e9, 8e12, 900e9, 72, 50e9, 10.5,
            "NVIDIA GB200 NVL72 data sheet; one 400 Gb/s port a GPU", _LIST_PRICE, **_BLACKWELL),
        Device("GB300", 2500e12, 5000e12, 298.0e9, 8e12, 900e9, 72, 100e9, None,
            "NVIDIA GB300 NVL72 data sheet; one 800 Gb/s port a GPU", _NO_PRICE, **_GB300),
    )
}  # fmt: skip
"""By name."""


def gpu_named(text: str) -> Device:
    """The GPU of a name such as ``h100``, ``NVIDIA H100 PCIe`` or ``GB200-NVL72``.

    Raises:
        UserError: none is meant, or it is not known; with the nearest name, and all names.
    """
    words = re.split(r"[^A-Z0-9]+", text.upper())
    words += [one + other for one, other in pairwise(words)]
    for name in sorted(GPUS, key=len, reverse=True):
        if any(re.fullmatch(rf"{name.upper()}(SXM\d*|NVL\d*)?", word) for word in words):
            return GPUS[name]
    near = nearest(text, GPUS, cutoff=0.4)
    meant = f"use {near}, or one of" if near else "use one of"
    raise UserError(f"GPU {text!r} is not known; {meant} {', '.join(GPUS)}")
