"""Phases of a step: seconds add up, memory is the most of each, a new step begins empty."""

import time

import pytest
import torch

from deepseek import phases as phases_module
from deepseek.phases import Phases, resident_bytes


def test_seconds_of_a_phase_that_comes_twice_add_up() -> None:
    phases = Phases()
    phases.start_step(torch.device("cpu"))
    for _ in range(2):
        with phases("forward"):
            time.sleep(0.02)
        with phases("optimizer"):
            pass
    seconds = phases.seconds()
    assert seconds == phases.seconds()
    assert seconds.keys() == {"forward", "optimizer"}
    assert 0.04 <= seconds["forward"] < 0.4 and seconds["optimizer"] < 0.02


def test_memory_is_the_most_of_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([5, 9, 7, 3])
    monkeypatch.setattr(phases_module, "resident_bytes", lambda: next(sizes))
    phases = Phases()
    phases.start_step(torch.device("cpu"))
    for name in ("forward", "optimizer", "forward"):
        with phases(name):
            pass
    assert phases.peak_bytes == {"forward": 7, "optimizer": 9}
    phases.start_step(torch.device("cpu"))
    assert phases.peak_bytes == {} and phases.seconds() == {}
    with phases("forward"):
        pass
    assert phases.peak_bytes == {"forward": 3}


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
    monkeypatch.setattr(phases_module, "_STATM", phases_module.Path("/nowhere"))
    assert resident_bytes() == 0
