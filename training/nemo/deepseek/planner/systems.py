"""Training programs: what each does that a layout does not say."""

from __future__ import annotations

import re

from deepseek.planner.architecture import Architecture
from deepseek.planner.hardware import Device
from deepseek.planner.job import DEDICATED, DEEPSEEK, System

OLDEST, NEWEST = 25.66, 26.58
"""Releases between which figures are known; older and newer ones are taken as these."""
USUAL = 26.08
"""Release of a program whose name tells none."""
FIRST_WITH_GRAPHS = 26.4
"""Release from which Megatron-Bridge's recipes in MXFP8 launch whole steps as CUDA graphs on the
GPUs below. With it come exchange that is overlapped, experts' products that are one fused kernel,
and on B300 and GB300 attention in 8 bits."""
WITH_GRAPHS = ("GB200", "B300", "GB300")
FIRST_OVERLAPPED = 26.2
"""Release from which its recipes overlap exchange that leaves an NVLink domain."""
HIDDEN, BY_NCCL = 0.93, 0.3
"""Share of overlapped exchange that is hidden: arXiv:2603.07685; and where NCCL's kernels hold the
compute units, as Qwen3-235B on H100 shows."""


def system_of(
    text: str, device: Device, ep: int, precision: str, model: Architecture, interleaved: bool
) -> System:
    """The program that a row's name, source and notes tell of.

    Args:
        text: name, source and notes.
        device: of the run.
        ep: ranks that share the experts.
        precision: as ``Job.precision``.
        model: what is trained.
        interleaved: several stages a rank, or no pipeline: passes can overlap others.
    """
    lower = text.lower()
    if "automodel" in lower:
        return System("automodel", gathers_weights=True)
    if "titan" in lower:
        return System("torchtitan", gathers_weights=True)
    if "dualpipe" in lower or re.match(r"deepseek[- ](v3|r1)", lower):
        return DEEPSEEK
    if "simumax" in lower:  # nothing is overlapped: its docs/b200/b200_real_repro_guide.md
        return System(
            "megatron, by SimuMax",
            release=26.0,
            loops_experts=True,
            every_copy=True,
            hidden_data_parallel=0.0,
        )
    when, bridge = release(text), "bridge" in lower
    recipe = bridge and when >= FIRST_WITH_GRAPHS and device.name in WITH_GRAPHS
    recipe = recipe and precision in ("mxfp8", "nvfp4") and interleaved and "muon" not in lower
    graphs = recipe or "cuda graph" in lower
    # Recipes of larger models without latent attention exchange by NCCL on machines of 8 GPUs.
    nccl = bridge and device.domain == 8 and not model.kv_lora and model.hidden > 2048
    crosses = ep > device.domain
    overlaps = graphs or "overlap" in lower
    overlaps |= crosses and ("megatron-core moe" in lower or when >= FIRST_OVERLAPPED or nccl)
    return System(
        "megatron-core" if "megatron-core" in lower else "megatron-bridge",
        release=when,
        graphs=graphs,
        loops_experts=not graphs,
        every_copy=nccl,
        hidden_all_to_all=(BY_NCCL if nccl else HIDDEN) if overlaps else 0.0,
        dedicated_sms=DEDICATED if overlaps else 0.0,
        fp8_attention=graphs and device.name in ("B300", "GB300"),
    )


def release(text: str) -> float:
    """Years of the release in a row's text, such as 26.25 for ``26.04`` or ``arXiv:2604.``."""
    found = re.search(r"\b(2[4-9])\.(0[1-9]|1[0-2])(?:\.\d+)?\b", text)
    found = found or re.search(r"arXiv:(2[4-9])(0[1-9]|1[0-2])\.", text)
    when = int(found[1]) + (int(found[2]) - 1) / 12 if found else USUAL
    return min(NEWEST, max(OLDEST, when))
