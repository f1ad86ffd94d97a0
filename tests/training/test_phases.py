"""Phases of a step: seconds add up, memory is the most of each, a new step begins empty."""

import pytest
import torch

from deepseek.training import phases as phases_module
from deepseek.training.phases import Memory, Phases, resident_bytes
from support.fake_clock import FakeClock


def test_seconds_of_a_phase_that_comes_twice_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(phases_module, "time", clock)
    phases = Phases()
    phases.start_step(torch.device("cpu"))
    for _ in range(2):
        with phases("forward"):
            clock.now += 2
        with phases("optimizer"):
            clock.now += 0.5
        clock.now += 8  # between phases
    seconds = phases.seconds()
    assert phases.seconds() == seconds
    assert seconds == {"forward": 4.0, "optimizer": 1.0}


def test_memory_is_the_most_of_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, peaks = iter([5, 9, 7, 3]), iter([8, 9, 11, 0])
    monkeypatch.setattr(phases_module, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(phases_module, "resident_peak_bytes", lambda: next(peaks))
    phases = Phases()
    phases.start_step(torch.device("cpu"))
    for name in ("forward", "optimizer", "forward"):
        with phases(name):
            pass
    assert phases.memory == {"forward": Memory(7, 0, 11), "optimizer": Memory(9, 0, 9)}
    phases.start_step(torch.device("cpu"))
    assert phases.memory == {} and phases.seconds() == {}
    with phases("forward"):
        pass
    assert phases.memory == {"forward": Memory(3, 0, 3)}  # a peak the system does not tell


def test_a_peak_is_that_of_its_phase() -> None:
    """64 MiB that come and go within a phase are seen in it, and not in the next one."""
    phases = Phases()
    phases.start_step(torch.device("cpu"))
    with phases("forward"):
        torch.ones(2**24)
    with phases("optimizer"):
        pass
    forward, optimizer = phases.memory["forward"], phases.memory["optimizer"]
    assert forward.peak - forward.allocated > 48 * 2**20
    assert optimizer.peak - optimizer.allocated < 16 * 2**20


def test_on_a_gpu_seconds_are_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that lie behind what the host has waited for; none is waited for."""
    clock = FakeClock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def elapsed_time(self, end: "Event") -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    phases, told = Phases(), []
    for step in range(3):
        phases.start_step(torch.device("cuda"))
        for _ in range(2):
            with phases("forward"):
                clock.now += step
        told.append(phases.seconds())
    assert told == [{}, {"forward": 0.0}, {"forward": 2.0}]


def test_an_error_inside_goes_through() -> None:
    phases = Phases()
    phases.start_step(torch.device("cpu"))
    with pytest.raises(ValueError, match="inside"):
        with phases("forward"):
            raise ValueError("inside")


def test_resident_bytes_grow_with_memory_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resident_bytes()
    assert before > 2**20
    kept = torch.ones(2**24)  # 64 MiB, touched
    assert 56 * 2**20 < resident_bytes() - before < 128 * 2**20
    assert kept[-1] == 1
    monkeypatch.setattr(phases_module, "_STATM", "/nowhere")
    assert resident_bytes() == 0
