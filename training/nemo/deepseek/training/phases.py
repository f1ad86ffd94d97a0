"""The phases of a training step: how long each takes, and how much memory it needs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

_STATM = "/proc/self/statm"
_STATUS = "/proc/self/status"
_CLEAR_REFS = "/proc/self/clear_refs"


@dataclass(frozen=True)
class Memory:
    """Bytes of this process on its device: of the GPU, or resident in RAM."""

    allocated: int
    """At the end of the phase."""
    reserved: int
    """The same, with what torch's allocator keeps for later; 0 on a CPU."""
    peak: int
    """Most that was allocated within the phase."""

    def most(self, other: Memory) -> Memory:
        """The larger of each."""
        return Memory(
            max(self.allocated, other.allocated),
            max(self.reserved, other.reserved),
            max(self.peak, other.peak),
        )


class Phases:
    """Measures named parts of a step on one device.

    On a GPU a phase is timed by events and told with the next step, so that nothing waits for it.
    A phase that comes several times in a step counts as one.

    Attributes:
        memory: of each phase of this step.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._on_gpu = False
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._before: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.memory: dict[str, Memory] = {}

    def start_step(self, device: torch.device) -> None:
        """Forget the step before; measure the time and memory of ``device``."""
        self._device, self._on_gpu = device, device.type == "cuda"
        self._seconds.clear()
        self._before, self._events = self._events, []
        self.memory.clear()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure what is inside."""
        with measured_memory(self._device) as found:
            if self._on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
            else:
                begin_time = time.perf_counter()
                yield
                self._add(name, time.perf_counter() - begin_time)
        (memory,) = found
        self.memory[name] = memory.most(self.memory.get(name, memory))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase: of this step, or on a GPU of the step before, if there was one.

        The step must have waited for a number of its own, behind which those events lie.
        """
        for name, begin, end in self._before:
            self._add(name, begin.elapsed_time(end) / 1000)
        self._before.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


@contextmanager
def measured_memory(device: torch.device) -> Iterator[list[Memory]]:
    """Measure what is inside; the list holds the result afterwards."""
    found: list[Memory] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(
            Memory(
                torch.cuda.memory_allocated(device),
                torch.cuda.memory_reserved(device),
                torch.cuda.max_memory_allocated(device),
            )
        )
    else:
        restart_resident_peak()
        yield found
        resident = resident_bytes()
        found.append(Memory(resident, 0, max(resident, resident_peak_bytes())))


def restart_resident_peak() -> None:
    """Let the system look for the largest resident size anew, where it can."""
    with suppress(OSError):
        with open(_CLEAR_REFS, "wb", buffering=0) as file:
            file.write(b"5")


def resident_peak_bytes() -> int:
    """Largest resident size since ``restart_resident_peak``; 0 where the system does not say."""
    with suppress(OSError, IndexError, ValueError):
        return int(_read(_STATUS).partition(b"VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    return 0


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    with suppress(OSError, IndexError, ValueError):
        return int(_read(_STATM).split(maxsplit=2)[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _read(path: str) -> bytes:
    """What the system tells, in one call: it is asked several times a step."""
    with open(path, "rb", buffering=0) as file:
        return file.read(1 << 14)
