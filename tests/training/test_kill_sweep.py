"""Killed at random moments and continued, a run is bitwise the uninterrupted one."""

import pytest

from support.kill_sweep import kill_often, settings_of
from support.micro_runs import MicroRuns


# AdamW is killed at each moment that matters in test_interruptions.py.
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.nightly), "muon"])
def test_killed_runs_continue_bitwise(micro: MicroRuns, optimizer: str) -> None:
    settings = settings_of(kills=4, optimizer=optimizer, workers=0)
    micro.train(f"whole_{optimizer}", *settings).assert_done()
    kills = kill_often(micro, f"killed_{optimizer}", 4, 11, *settings)
    assert kills[-1].checkpoint > 0  # so that continuing is what was tested
    ran = micro.train(f"killed_{optimizer}", *settings, "model.data.num_workers=2").assert_done()
    assert f"at step {kills[-1].checkpoint}" in ran.out
    assert "changed since the checkpoint: model.data.num_workers 0 -> 2" in ran.out
    assert micro.differences(f"whole_{optimizer}", f"killed_{optimizer}") == []
