"""GPUs by the names people give them."""

from __future__ import annotations

import pytest

from deepseek.config import UserError
from deepseek.planner.hardware import GPUS, gpu_named


def test_names_as_people_and_drivers_write_them() -> None:
    for text, name in {
        "h100": "H100",
        "NVIDIA H100 80GB HBM3": "H100",
        "H100-SXM5": "H100",
        "gb200-nvl72": "GB200",
        "NVIDIA GB200": "GB200",
        "B200": "B200",
        "NVIDIA H100 PCIe": "H100PCIe",
        "NVIDIA A100-SXM4-80GB": "A100",
    }.items():
        assert gpu_named(text) is GPUS[name], text


def test_unknown_names_tell_the_nearest_and_all() -> None:
    with pytest.raises(
        UserError, match=r"GPU 'H10' is not known; use H100, or one of A100, .*GB300"
    ):
        gpu_named("H10")
    with pytest.raises(UserError, match="use one of"):
        gpu_named("abacus")


def test_every_gpu_is_sound() -> None:
    for gpu in GPUS.values():
        assert gpu.bf16 <= gpu.fp8 and gpu.network < gpu.nvlink < gpu.hbm and gpu.source
