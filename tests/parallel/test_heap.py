"""Freed memory is used again, so that a training step does not wait for the system to clear it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from deepseek.parallel.heap import keep_freed_memory

taken = keep_freed_memory() if sys.argv[1] == "kept" else False
def step():
    tensors = [torch.ones(size) for size in (9_000_000, 3_000_000, 40_000)]
    return sum(float(tensor[0]) for tensor in tensors)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[bool, int]:
    """Whether it was taken, and pages that the system cleared in 20 steps of 48 MB."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
    )
    taken, number = done.stdout.split()
    return taken == "True", int(number)


@pytest.mark.skipif(sys.platform != "linux", reason="settings of the GNU C library")
def test_freed_memory_is_used_again() -> None:
    kept, left = faults("kept"), faults("left")
    assert kept[0] and kept[1] < left[1] / 10
    assert left[1] > 40_000


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek.parallel.heap import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
