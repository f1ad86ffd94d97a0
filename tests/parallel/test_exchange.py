"""All-gather and reduce-scatter through shared memory give what torch's own give, at any size, and
fall back to them where memory cannot be shared."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.parallel import exchange, host_memory
from support.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.torch_alone

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]
SMALL_REGION = 4096


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def numbers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).mul(100).to(dtype)


def in_order(parts: list[Tensor]) -> Tensor:
    """The sum as one process adds it up, first rank first."""
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


def exchanges(rank: int, size: int, lengths: list[int], dtype: torch.dtype) -> bool:
    """Gathers and sums of these lengths, nothing between them, the ranks at their own pace."""
    before = len(os.listdir("/proc/self/fd"))
    for number, length in enumerate(lengths):
        if number % size == rank:
            time.sleep(0.002)  # now this rank is the last, now another
        parts = [numbers(length, dtype, 100 * number + r) for r in range(size)]
        gathered = torch.empty(size * length, dtype=dtype)
        own = parts[rank]
        if number % 2:  # as FSDP does: the input is a part of the output
            own = gathered[rank * length : (rank + 1) * length].copy_(own)
        exchange.all_gather(gathered, own, group())
        assert torch.equal(gathered, torch.cat(parts))
        wholes = [numbers(size * length, dtype, 9000 + 100 * number + r) for r in range(size)]
        part = torch.empty(length, dtype=dtype)
        exchange.reduce_scatter(part, wholes[rank].clone(), group())
        assert torch.equal(part, in_order(wholes)[rank * length : (rank + 1) * length])
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # that of the memory
    return host_memory.host_memory(group()) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_length_gives_the_same(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths below, at and above what fits into the memory at once, and none at all."""
    monkeypatch.setattr(host_memory, "REGION_BYTES", SMALL_REGION)
    fits = SMALL_REGION // dtype.itemsize
    others = size - 1  # among whom a region is divided
    lengths = [1, 0, 7, fits // others, fits // others + 1, fits, 5 * fits + 3, 2, 3 * fits, 1]
    shared = run_ranks(size, exchanges, size, lengths, dtype)
    assert shared == [True] * size


def placed(rank: int, size: int, kinds: str, dtype: torch.dtype) -> None:
    """Gathers (g) and sums (s) of what was written into the memory in the first place."""
    length = 1000
    shared = host_memory.open_memory(group(), size * length * dtype.itemsize)
    assert shared is not None
    for number, kind in enumerate(kinds):
        parts = [numbers(length, dtype, 100 * number + r) for r in range(size)]
        wholes = [numbers(size * length, dtype, 9000 + 100 * number + r) for r in range(size)]
        whole_bytes = size * length * dtype.itemsize
        mine = slice(rank * length, (rank + 1) * length)
        if kind == "g":
            gathered = shared.region(0)[:whole_bytes].view(dtype)
            exchange.all_gather(gathered, gathered[mine].copy_(parts[rank]), group(), shared)
            if number % size == rank:
                time.sleep(0.01)  # others are about to write what comes next
            assert torch.equal(gathered, torch.cat(parts))
        else:
            written = shared.region(rank)[:whole_bytes].view(dtype).copy_(wholes[rank])
            part = torch.empty(length, dtype=dtype)
            exchange.reduce_scatter(part, written, group(), shared)
            assert torch.equal(part, in_order(wholes)[mine])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_lies_in_the_memory_is_not_overwritten_before_all_have_read_it(
    size: int, dtype: torch.dtype
) -> None:
    """In any order of gathers and sums, whoever is the slowest to read."""
    run_ranks(size, placed, size, "gsgsggggssssgsggss", dtype)


def test_all_of_a_group_take_a_bounded_piece_of_memory() -> None:
    """However many ranks."""

    def work(rank: int) -> int:
        memory = host_memory.host_memory(group())
        assert memory is not None
        return memory.region_bytes

    assert run_ranks(2, work) == [host_memory.REGION_BYTES] * 2
    (region, *_) = run_ranks(8, work)
    assert 2 * 8 * region == host_memory.GROUP_BYTES


def test_groups_do_not_share_memory() -> None:
    """Two groups of the same rank, used in turn and at different paces."""

    def work(rank: int) -> None:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair = pairs[rank // 2]
        for step in range(20):
            own = torch.full((1000,), float(10 * step + rank))
            pair_out, all_out = torch.empty(2000), torch.empty(4000)
            exchange.all_gather(pair_out, own, pair)
            exchange.all_gather(all_out, own, group())
            first = rank // 2 * 2
            assert pair_out[::1000].tolist() == [10 * step + first, 10 * step + first + 1]
            assert all_out[::1000].tolist() == [10 * step + r for r in range(4)]

    run_ranks(4, work)


@pytest.mark.parametrize("where", ["nowhere", "other machine", "other process table"])
def test_without_shared_memory_the_backend_does_it(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system without such memory; ranks on two machines; a container beside a container."""

    def work(rank: int) -> bool:
        if where == "nowhere":
            monkeypatch.delattr(os, "memfd_create")
        elif where == "other machine":
            monkeypatch.setattr(host_memory, "_machine", lambda: (f"machine {rank // 2}",))
        elif rank == 2:

            def refuse(path: str, *args: Any) -> int:
                raise PermissionError(13, "Permission denied", path)

            monkeypatch.setattr(os, "open", refuse)
        own = torch.full((4,), float(rank + 1))
        gathered, part = torch.empty(12), torch.empty(4)
        exchange.all_gather(gathered, own, group())
        assert gathered.tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
        exchange.reduce_scatter(part, gathered * (rank + 1), group())
        assert part.tolist() == [6.0 * (rank + 1)] * 4
        return host_memory.host_memory(group()) is None

    assert run_ranks(3, work) == [True] * 3


def test_a_killed_rank_does_not_leave_the_others_waiting() -> None:
    def work(rank: int) -> None:
        gathered, own = torch.empty(2000), torch.ones(1000)
        exchange.all_gather(gathered, own, group())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange.all_gather(gathered, own, group())

    begin = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(2, work)
    assert time.monotonic() - begin < 20
