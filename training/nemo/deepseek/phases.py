"""The phases of a training step: how long each takes, and how much memory it needs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


class Phases:
    """Measures named parts of a step on one device.

    On a GPU a phase is timed by events, so nothing waits for it; ``seconds`` does, after the step.
    A phase that comes several times in a step counts as one.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._on_gpu = False
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.peak_bytes: dict[str, int] = {}
        """Most memory of each phase of this step: allocated on the GPU; on a CPU the resident size
        at the end of the phase."""

    def start_step(self, device: torch.device) -> None:
        """Forget the step before; measure the time and memory of ``device``."""
        self._device, self._on_gpu = device, device.type == "cuda"
        self._seconds.clear()
        self._events.clear()
        self.peak_bytes.clear()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what is inside."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            begin_time = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begin_time)
            peak = resident_bytes()
        self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase of this step."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._events:
            self._add(name, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
