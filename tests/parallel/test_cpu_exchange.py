"""Rows through shared memory arrive as the backend brings them, bit by bit, whatever their sizes;
and the backend brings them where memory cannot be shared."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from deepseek.config import shared_memory
from deepseek.models.components.recompute import recomputed
from deepseek.parallel import cpu_memory
from deepseek.parallel.collectives import all_to_all_weighted_rows
from deepseek.parallel.cpu_exchange import _ByBackend, _InMemory, all_to_all
from support.exchanges import without_shared_memory
from support.ranks import RankFailed, run_ranks

SMALL_REGION = 4096


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def bits(rows: int, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, also those of no number."""
    width = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    any_b = torch.randint(0, 256, (rows, width), generator=generator, dtype=torch.uint8)
    return any_b.view(dtype).view(rows, *shape)


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def counts_of(number: int, size: int, most: int) -> list[list[int]]:
    """Rows from each rank to each: none at all, all to one, all from one, or by chance."""
    generator = torch.Generator().manual_seed(number)
    counts_nn = torch.randint(0, most + 1, (size, size), generator=generator)
    counts_nn *= torch.randint(0, 2, (size, size), generator=generator)
    if number % 4 == 1:
        counts_nn[:, 1:] = 0
    elif number % 4 == 2:
        counts_nn[1:] = 0
    elif number == 3:
        counts_nn.zero_()
    return counts_nn.tolist()


def exchanged(rank: int, size: int, kinds: list[tuple[torch.dtype, list[int]]]) -> int:
    """Exchanges of tensors side by side, nothing between them, the ranks at their own pace."""
    through_memory = 0
    for number, most in enumerate([1, 3, 0, 5, 40, 200, 7, 90, 1, 300]):
        counts = counts_of(number, size, most)
        send, receive = counts[rank], [sent[rank] for sent in counts]
        input = [bits(sum(send), shape, dtype, 100 * number + rank) for dtype, shape in kinds]
        if number % size == rank:
            time.sleep(0.002)  # now this rank is the last, now another
        begun = all_to_all(input, receive, send, group())
        through_memory += isinstance(begun, _InMemory)
        if number % size == 1:
            time.sleep(0.002)
        found = begun.wait()
        wanted = _ByBackend(input, receive, send, group()).wait()
        for x, y, (dtype, shape) in zip(found, wanted, kinds, strict=True):
            assert x.dtype == dtype and x.shape == y.shape == (sum(receive), *shape)
            assert torch.equal(bits_of(x), bits_of(y))
    return through_memory


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "kinds",
    [
        [(torch.float32, [6])],
        [(torch.int64, [])],
        [(torch.float64, [2, 3])],
        [(torch.float32, [6]), (torch.float32, [])],
        [(torch.bfloat16, [3]), (torch.float32, [])],
        [(torch.uint8, [7]), (torch.float32, [4]), (torch.int64, [2])],
    ],
    ids=lambda kinds: "+".join(str(dtype).removeprefix("torch.") for dtype, _ in kinds),
)
def test_any_rows_arrive_bit_by_bit(
    size: int, kinds: list[tuple[torch.dtype, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in several, which only some ranks need."""
    monkeypatch.setattr(shared_memory, "REGION_BYTES", SMALL_REGION)
    assert run_ranks(size, exchanged, size, kinds) == [10] * size


def test_a_row_that_does_not_fit_goes_by_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "REGION_BYTES", SMALL_REGION)
    assert run_ranks(2, exchanged, 2, [(torch.float32, [SMALL_REGION // 4])]) == [0, 0]


def test_two_at_once() -> None:
    """As passes in turn have them, in either order of their ends."""

    def work(rank: int) -> list[type]:
        kinds = []
        for step in range(6):
            sent = [torch.full((3, 2), 10.0 * step + 2 * rank + k) for k in range(2)]
            begun = [all_to_all([x], [1 + rank] * 2, [1, 2], group()) for x in sent]
            kinds += [type(exchange) for exchange in begun]
            arrived = {k: begun[k].wait()[0] for k in ((0, 1) if step % 2 else (1, 0))}
            for k in range(2):
                wanted = [[10.0 * step + 2 * source + k] * (1 + rank) for source in range(2)]
                assert arrived[k][:, 0].tolist() == sum(wanted, [])
        return kinds

    assert run_ranks(2, work) == [[_InMemory, _ByBackend] * 6] * 2


def test_after_an_exchange_that_no_rank_has_ended_the_backend_brings_rows() -> None:
    """As an error between its begin and its end leaves it, which all ranks have caught: who has
    read what nobody can tell, so its memory is not used again."""

    def work(rank: int) -> list[type]:
        kinds = []
        for step in range(4):
            x = torch.full((4, 2), float(10 * step + rank))
            exchange = all_to_all([x], [2, 2], [2, 2], group())
            kinds.append(type(exchange))
            if step != 1:
                wanted = [10.0 * step, 10.0 * step + 1]
                assert exchange.wait()[0][::2, 0].tolist() == wanted
        return kinds

    assert run_ranks(2, work) == [[_InMemory, _InMemory, _ByBackend, _ByBackend]] * 2


def test_groups_within_groups_have_memory_of_their_own() -> None:
    """Of the same rank, used in turn and at different paces."""

    def work(rank: int) -> None:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair, first = pairs[rank // 2], rank // 2 * 2
        for step in range(20):
            x = torch.full((4, 3), float(10 * step + rank))
            within = all_to_all([x], [2, 2], [2, 2], pair)
            if step % 4 == rank:
                time.sleep(0.002)
            all_over = all_to_all([x], [1] * 4, [1] * 4, group())
            (of_pair,), (of_all,) = within.wait(), all_over.wait()
            assert of_pair[::2, 0].tolist() == [10 * step + first, 10 * step + first + 1]
            assert of_all[:, 0].tolist() == [10 * step + r for r in range(4)]
            assert isinstance(within, _InMemory) and isinstance(all_over, _InMemory)

    run_ranks(4, work)


def test_ranks_of_several_machines_exchange_by_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> type:
        monkeypatch.setattr(cpu_memory, "_machine", lambda: (f"machine {rank // 2}",))
        exchange = all_to_all([torch.full((3, 1), float(rank))], [1] * 3, [1] * 3, group())
        assert exchange.wait()[0].flatten().tolist() == [0.0, 1.0, 2.0]
        return type(exchange)

    assert run_ranks(3, work) == [_ByBackend] * 3


def gradients(
    rank: int, counts: list[list[int]], dtype: torch.dtype, granularity: str | None
) -> tuple[Tensor | None, ...]:
    """Of rows and weights that go through an exchange, with what they become."""
    send, receive = counts[rank], [sent[rank] for sent in counts]
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(sum(send), 10, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(sum(send), generator=generator).requires_grad_()

    def there(wide: Tensor) -> Tensor:
        # Every other number: an input that does not lie in one piece.
        rows, beside, _ = all_to_all_weighted_rows(wide[:, ::2], weights, send, receive, group())
        return (rows.float().sin() * beside.unsqueeze(1)).square()

    run: Any = there if granularity is None else partial(recomputed, there, granularity, 5)
    y = run(wide)
    y.sum().backward()
    return y.detach(), wide.grad, weights.grad


@pytest.mark.parametrize("granularity", [None, "full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_backend(dtype: torch.dtype, granularity: str | None) -> None:
    def work(rank: int) -> None:
        for number in range(4):
            found = gradients(rank, counts_of(number, 2, 6), dtype, granularity)
            with without_shared_memory():
                wanted = gradients(rank, counts_of(number, 2, 6), dtype, granularity)
            for ours, theirs in zip(found, wanted, strict=True):
                assert torch.equal(ours, theirs)

    run_ranks(2, work)


def test_a_killed_rank_does_not_leave_the_others_waiting() -> None:
    def work(rank: int) -> None:
        for step in range(3):
            begun = all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], group())
            if (rank, step) == (1, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            begun.wait()

    begin = time.monotonic()
    with pytest.raises(RankFailed):
        run_ranks(2, work)
    assert time.monotonic() - begin < 20


def test_the_time_out_of_the_group_holds() -> None:
    def work(rank: int) -> None:
        all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], group()).wait()
        _set_pg_timeout(timedelta(seconds=1), group())
        time.sleep(4 * rank)
        all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], group()).wait()

    with pytest.raises(RankFailed, match="imed out waiting 1000ms"):
        run_ranks(2, work)


def test_no_file_is_left_open() -> None:
    def work(rank: int) -> int:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], group()).wait()
        return len(os.listdir("/proc/self/fd")) - before

    assert run_ranks(2, work) == [1, 1]  # the mapping's own


def test_destroyed_groups_leave_neither_memory_nor_threads() -> None:
    def work(rank: int) -> list[tuple[int, int]]:
        found = []
        for _ in range(3):
            pair = dist.new_group([0, 1])
            all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], pair).wait()
            dist.barrier()
            dist.destroy_process_group(pair)
            del pair
            found.append(tuple(len(os.listdir(f"/proc/self/{of}")) for of in ("fd", "task")))
        return found

    for first, *later in run_ranks(2, work):
        assert later == [first] * 2


def test_memory_that_inference_has_opened_serves_training() -> None:
    def work(rank: int) -> None:
        with torch.inference_mode():
            all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], group()).wait()
        all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], group()).wait()

    run_ranks(2, work)


def test_all_take_the_backend_where_one_rank_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> mmap.mmap:
        raise OSError("no room")

    def work(rank: int) -> type:
        if rank == 1:
            monkeypatch.setattr(cpu_memory.mmap, "mmap", none)
        exchange = all_to_all([torch.ones(4, 2)], [2, 2], [2, 2], group())
        exchange.wait()
        return type(exchange)

    assert run_ranks(2, work) == [_ByBackend] * 2
