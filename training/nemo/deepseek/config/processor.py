"""What the system tells of the processor."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def processor() -> dict[str, str]:
    """Of one core, by the kernel's names: ``model name``, ``vendor_id``; elsewhere empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name.strip(): text.strip() for name, _, text in (x.partition(":") for x in lines)}


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def told_threads() -> int | None:
    """What ``OMP_NUM_THREADS`` says of a process; None: nothing that OpenMP heeds."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (int(first) or None) if first.isdecimal() else None
