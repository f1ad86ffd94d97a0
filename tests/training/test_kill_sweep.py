"""Killed at random moments and continued, a run is bitwise the uninterrupted one."""

import pytest

from support.kill_sweep import kill_often, settings_of
from support.micro_runs import MicroRuns


# AdamW is killed at each moment that matters in test_interruptions.py.
@pytest.mark.parametrize(
    ("optimizer", "number"),
    [
        ("muon", 2),
        pytest.param("muon", 4, marks=pytest.mark.nightly),
        pytest.param("adamw", 4, marks=pytest.mark.nightly),
    ],
)
def test_killed_runs_continue_bitwise(micro: MicroRuns, optimizer: str, number: int) -> None:
    settings = settings_of(kills=number, optimizer=optimizer, workers=0)
    whole, killed = f"swept_{optimizer}{number}_whole", f"swept_{optimizer}{number}"
    micro.train(whole, *settings).assert_done()
    kills = kill_often(micro, killed, number, 11, *settings)
    assert kills[-1].checkpoint > 0  # so that continuing is what was tested
    ran = micro.train(killed, *settings, "model.data.num_workers=2").assert_done()
    assert f"at step {kills[-1].checkpoint}" in ran.out
    assert "changed since the checkpoint: model.data.num_workers 0 -> 2" in ran.out
    assert micro.differences(whole, killed) == []
