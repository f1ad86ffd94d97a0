"""The fork launcher: results, failures, hangs, and what must not be left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from support.ranks import RankFailed, run_ranks


def backward_pass() -> float:
    """Uses autograd and, in the parent, several threads."""
    weight = torch.ones(300, 300, requires_grad=True)
    (weight @ weight).square().sum().backward()
    assert weight.grad is not None
    return float(weight.grad.sum())


def total(rank: int, start: float) -> tuple[int, float, float]:
    value = torch.tensor([start + rank])
    dist.all_reduce(value)
    return torch.get_num_threads(), value.item(), backward_pass()


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_results_come_in_order_of_rank(world_size: int) -> None:
    assert run_ranks(world_size, lambda rank: (rank, dist.get_rank())) == [
        (rank, rank) for rank in range(world_size)
    ]


def test_works_after_the_parent_has_used_threads_and_autograd() -> None:
    torch.set_num_threads(2)
    try:
        expected = backward_pass()
        results = run_ranks(3, total, 10.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert results == [(1, 33.0, expected)] * 3


def test_first_failure_is_shown_with_its_traceback_and_rank() -> None:
    def work(rank: int) -> None:
        print("said before")
        if rank == 1:
            raise ValueError("forty-two")
        dist.barrier()

    with pytest.raises(RankFailed) as caught:
        run_ranks(3, work)
    message = str(caught.value)
    assert message.startswith("rank 1 ended with code 1\nTraceback")
    assert "ValueError: forty-two" in message
    assert "said before" in message


def test_killed_rank_is_named() -> None:
    def work(rank: int) -> None:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RankFailed, match="^rank 2 was killed by signal 9"):
        run_ranks(3, work)


def test_hang_ends_and_says_where(tmp_path: Path) -> None:
    def left_alone(rank: int) -> None:
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        if rank == 0:
            dist.barrier()
        time.sleep(600)

    with pytest.raises(RankFailed, match=r"ranks \[0, 1\] still ran after 5 s") as caught:
        run_ranks(2, left_alone, timeout=5)
    assert str(caught.value).count("left_alone") == 2
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_ranks_die_with_the_test_process(tmp_path: Path) -> None:
    def asleep(rank: int) -> None:
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        time.sleep(600)

    parent = os.fork()
    if parent == 0:
        try:
            run_ranks(2, asleep)
        finally:
            os._exit(1)
    end = time.monotonic() + 30
    while len(pids := [int(f.read_text() or 0) for f in tmp_path.iterdir()]) < 2 or 0 in pids:
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "an orphan is left"
        time.sleep(0.01)
