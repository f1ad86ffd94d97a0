"""Training programs: what each does that a layout does not say."""

from __future__ import annotations

import re

from deepseek.planner.hardware import Device
from deepseek.planner.job import DEEPSEEK, System

OLDEST, NEWEST = 25.66, 26.58
"""Releases between which figures are known; older and newer ones are taken as these."""
USUAL = 26.08
"""Release of a program whose name tells none."""
FIRST_WITH_GRAPHS = 26.4
"""Release from which Megatron-Bridge launches whole steps of this model as CUDA graphs."""


def system_of(text: str, device: Device, ep: int) -> System:
    """The program that a row's name, source and notes tell of."""
    lower = text.lower()
    if "automodel" in lower:
        return System("automodel", gathers_weights=True)
    if "titan" in lower:
        return System("torchtitan", gathers_weights=True)
    if "dualpipe" in lower or re.match(r"deepseek[- ](v3|r1)", lower):
        return DEEPSEEK
    when = release(text)
    graphs = "cuda graph" in lower or (when >= FIRST_WITH_GRAPHS and "bridge" in lower)
    if "simumax" in lower:
        return System("megatron, by SimuMax", release=when)
    paper = "megatron-core moe" in lower or "overlap" in lower
    crosses = ep > device.domain
    return System(
        "megatron-core" if "megatron-core" in lower else "megatron-bridge",
        release=when,
        graphs=graphs,
        hidden_all_to_all=0.93 if paper and crosses else 0.0,
        dedicated_sms=20 / 132 if paper and crosses else 0.0,
    )


def release(text: str) -> float:
    """Years of the release in a row's text, such as 26.25 for ``26.04`` or ``arXiv:2604.``."""
    found = re.search(r"\b(2[4-9])\.(0[1-9]|1[0-2])(?:\.\d+)?\b", text)
    found = found or re.search(r"arXiv:(2[4-9])(0[1-9]|1[0-2])\.", text)
    when = int(found[1]) + (int(found[2]) - 1) / 12 if found else USUAL
    return min(NEWEST, max(OLDEST, when))
