"""No rank leaves a barrier before all have come, however late, counted in memory or by the backend;
who is missing for long is waited for by the backend, with its time-out."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.parallel import cpu_barrier
from deepseek.parallel.cpu_barrier import BackendBarrier, CountedBarrier
from deepseek.parallel.cpu_memory import SharedMemory, open_group_memory
from support.kernels import without_kernels
from support.ranks import run_ranks

LATE = 0.004


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def opened() -> SharedMemory:
    memory = open_group_memory(group())
    assert memory is not None
    return memory


def words(memory: SharedMemory) -> Tensor:
    barrier: Any = memory._barrier
    return barrier._words.view(torch.uint8).view(2, 8)[:, :4].contiguous().view(torch.int32)


def meetings(memory: SharedMemory, rank: int, size: int, number: int) -> None:
    """Each rank writes how far it is; none is behind once all have met."""
    places = memory.regions[:, :, 0]
    for step in range(number):
        if step % (size + 1) == rank:
            time.sleep(LATE)  # now this rank is the last, now another, now none
        places[step % 2, rank] = step
        memory.begin_barrier().wait()
        assert places[step % 2].tolist() == [step] * size


@pytest.mark.parametrize("size", [2, 3, 5])
def test_none_leaves_before_all_have_come(size: int) -> None:
    def work(rank: int) -> type:
        memory = opened()
        meetings(memory, rank, size, 100)
        return type(memory._barrier)

    assert run_ranks(size, work) == [CountedBarrier] * size


def test_who_has_no_patience_asks_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them do, for this barrier and not for the next."""
    monkeypatch.setattr(cpu_barrier, "PATIENCE_SECONDS", LATE / 8)
    asked, begin = [], BackendBarrier.begin

    def noted(barrier: BackendBarrier) -> Any:
        asked.append(barrier)
        return begin(barrier)

    def work(rank: int) -> int:
        memory = opened()
        monkeypatch.setattr(BackendBarrier, "begin", noted)
        meetings(memory, rank, 3, 60)
        assert not (words(memory) % 2).any() or rank, "somebody is still impatient"
        return len(asked)

    first, *others = run_ranks(3, work)
    assert others == [first] * 2 and 30 <= first <= 60


def test_counts_may_wrap_around() -> None:
    def work(rank: int) -> list[int]:
        memory = opened()
        barrier: Any = memory._barrier
        if rank == 0:
            barrier._words.fill_(2**32 - 2 * 2 * 7)  # of seven barriers that two ranks come to
        barrier._number, barrier._size = 0, 2
        dist.barrier()
        barrier._number = 2 * (2**31 // 2 - 7)
        meetings(memory, rank, 2, 40)
        return words(memory).flatten().tolist()

    assert run_ranks(2, work) == [[4 * (20 - 7)] * 2] * 2


def test_all_take_the_backend_where_one_rank_has_no_kernels() -> None:
    def work(rank: int) -> type:
        with without_kernels() if rank == 1 else nullcontext():
            memory = opened()
        meetings(memory, rank, 2, 20)
        return type(memory._barrier)

    assert run_ranks(2, work) == [BackendBarrier] * 2
