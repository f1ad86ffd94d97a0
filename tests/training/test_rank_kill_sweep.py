"""Ranks killed at random moments: the run comes back by itself and ends as if nothing had been."""

import pytest

from support.forked import FORK_WORKERS
from support.launchers import by_itself, by_torchrun
from support.micro_runs import MicroRuns
from support.rank_kill_sweep import kill_ranks, settings_of


# The supervisor and a job's torchruns lose a rank in test_parallel_runs.py.
@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["supervisor", "torchrun"])
def test_killed_ranks_come_back_bitwise(micro: MicroRuns, launcher: str) -> None:
    settings, whole, name = settings_of(2, kills=2), "whole2", f"killed_{launcher}"
    if not (micro.folder / whole).exists():
        micro.train(whole, *settings, before=FORK_WORKERS).assert_done()
    if launcher == "supervisor":
        started = by_itself(micro, name, *settings)
    else:
        started = by_torchrun(micro, name, 2, *settings, restarts=4)
    kills = kill_ranks(micro, name, started, 2, 2, seed=3)
    ran = started.wait().assert_done()
    assert kills[-1].checkpoint > 0  # so that continuing is what was tested
    assert ran.out.count("resumed from") >= 1
    assert micro.differences(whole, name) == []
    assert micro.cli.orphans() == []
