"""Rows from each rank to each: the all-to-all of experts, which goes on beside other work.

Between CPU ranks of one machine rows travel through the memory that these share: each rank writes
what it sends, and reads what is for it once all have written. gloo takes several times as long,
most of it in threads of its own, on the cores that should compute meanwhile. Elsewhere it is the
all-to-all of the group's backend, for which rows and what travels beside them are packed.

Both give the same bits. Who reads how the model is parallelised may take them for the backend's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.parallel.cpu_barrier import Begun
from deepseek.parallel.cpu_memory import (
    SharedMemory,
    bytes_of,
    may_share,
    open_group_memory,
)

HEADER_BYTES = 64
"""Before what a rank has written: in how many pieces it sends."""


class Exchange(Protocol):
    """One that has begun."""

    def wait(self) -> list[Tensor]:
        """What has arrived, by source rank: as many tensors as were sent."""
        ...


def all_to_all(
    input: Sequence[Tensor],
    output_split_sizes: Sequence[int],
    input_split_sizes: Sequence[int],
    group: dist.ProcessGroup,
) -> Exchange:
    """Begin to send consecutive blocks of rows to the ranks of the group; a collective.

    Args:
        input: contiguous, one tensor or more of as many rows, which travel side by side; dtypes and
            sizes of a row are the same on all ranks. The first is two-dimensional if there are
            others, and its numbers are the narrowest. Left alone until the exchange has ended.
        output_split_sizes: rows from each rank; what they send to this one.
        input_split_sizes: rows for each rank; any may be 0.
        group: the ranks.
    """
    memory = _row_memory(input[0], group)
    room = memory.part_bytes // max(sum(map(_row_bytes, input)), 1) if memory else 0
    # Two at once are those of two passes in turn: the second is the same one on all ranks.
    if memory is None or memory.under_way or not room:
        return _ByBackend(input, output_split_sizes, input_split_sizes, group)
    return _InMemory(memory, room, input, output_split_sizes, input_split_sizes)


class _ByBackend:
    """As one tensor, each row with the bits of the others' behind it."""

    def __init__(
        self,
        input: Sequence[Tensor],
        receive: Sequence[int],
        send: Sequence[int],
        group: dist.ProcessGroup,
    ) -> None:
        first, *others = self._like = input
        bits = [x.view(len(x), prod(x.shape[1:])).view(first.dtype) for x in others]
        self._sent = torch.cat((first, *bits), dim=1) if bits else first
        self._arrived = self._sent.new_empty(sum(receive), *self._sent.shape[1:])
        self._work = dist.all_to_all_single(
            self._arrived, self._sent, list(receive), list(send), group=group, async_op=True
        )

    def wait(self) -> list[Tensor]:
        self._work.wait()
        first, *others = self._like
        if not others:
            return [self._arrived]
        widths = [_row_bytes(x) // first.element_size() for x in self._like]
        rows, *bits = self._arrived.split(widths, dim=1)
        # Copies, since what lies behind a single row need not begin where its dtype may.
        form = torch.contiguous_format
        copies = [part.clone(memory_format=form) for part in bits]
        whole = [part.view(x.dtype) for part, x in zip(copies, others, strict=True)]
        return [rows, *(y.view(len(y), *x.shape[1:]) for y, x in zip(whole, others, strict=True))]


class _InMemory:
    """In pieces of ``room`` rows for each other rank, as many as the longest block takes."""

    def __init__(
        self,
        memory: _RowMemory,
        room: int,
        input: Sequence[Tensor],
        receive: Sequence[int],
        send: Sequence[int],
    ) -> None:
        self._memory, self._room, self._input = memory, room, input
        self._sent, self._received = _blocks(send), _blocks(receive)
        self._output = [x.new_empty(sum(receive), *x.shape[1:]) for x in input]
        self._rank, self._others = memory.shared.rank, memory.shared.others
        pieces = max(-(-send[rank] // room) for rank in self._others)
        self._write(0)
        self._barrier = memory.begin(pieces)
        for x, y in zip(input, self._output, strict=True):  # stays here
            y[self._received[self._rank]].copy_(x[self._sent[self._rank]])

    def wait(self) -> list[Tensor]:
        self._barrier.wait()
        pieces = self._memory.most_pieces()
        self._read(0)
        for piece in range(1, pieces):
            self._memory.shared.next_half()
            self._write(piece)
            self._memory.shared.barrier()
            self._read(piece)
        self._memory.end()
        return self._output

    def _write(self, piece: int) -> None:
        for rank in self._others:
            room_b = self._memory.part(self._rank, rank)
            for own_b, place in self._piece(self._input, self._sent[rank], piece):
                room_b[place].copy_(own_b)

    def _read(self, piece: int) -> None:
        for rank in self._others:
            room_b = self._memory.part(rank, self._rank)
            for own_b, place in self._piece(self._output, self._received[rank], piece):
                own_b.copy_(room_b[place])

    def _piece(
        self, tensors: Sequence[Tensor], block: slice, piece: int
    ) -> Iterator[tuple[Tensor, slice]]:
        """Bytes of the rows of a block that are one piece, tensor by tensor, and their place."""
        begin = min(block.start + piece * self._room, block.stop)
        rows, place = slice(begin, min(begin + self._room, block.stop)), 0
        for x in tensors:
            x_b = bytes_of(x[rows])
            yield x_b, slice(place, place + len(x_b))
            place += len(x_b)


class _RowMemory:
    """The memory of a group, for one exchange at a time.

    A half is written again only after the barrier of the other half, into which every rank comes
    when it has read this one: so two halves do, as long as an exchange ends before the next begins.

    Attributes:
        shared: two regions for each rank.
        part_bytes: what a rank can write for each other one between two barriers.
        under_way: an exchange has begun and not ended.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.part_bytes = (shared.region_bytes - HEADER_BYTES) // (shared.size - 1)
        self.under_way = False
        headers = shared.regions[:, :, :HEADER_BYTES].numpy()
        self._pieces = headers.view(np.int64)[:, :, 0]  # (halves, ranks)

    def part(self, writer: int, reader: int) -> Tensor:
        """uint8 (``part_bytes``)."""
        start = HEADER_BYTES + self.part_bytes * (reader - (reader > writer))
        return self.shared.region(writer)[start : start + self.part_bytes]

    def begin(self, pieces: int) -> Begun:
        """Tell the others in how many pieces this rank sends, and that it has written the first."""
        self.under_way = True
        self._pieces[self.shared.half, self.shared.rank] = pieces
        return self.shared.begin_barrier()

    def most_pieces(self) -> int:
        """Of any rank, once all have written the first."""
        return int(self._pieces[self.shared.half].max())

    def end(self) -> None:
        """This rank has read everything."""
        self.shared.next_half()
        self.under_way = False


_memories: WeakKeyDictionary[dist.ProcessGroup, _RowMemory | None] = WeakKeyDictionary()


def _row_memory(tensor: Tensor, group: dist.ProcessGroup) -> _RowMemory | None:
    """None if the ranks of the group do not share a machine; a collective at first."""
    if not may_share(tensor, group):
        return None
    if group not in _memories:
        shared = open_group_memory(group)
        _memories[group] = _RowMemory(shared) if shared is not None else None
    return _memories[group]


def _blocks(counts: Sequence[int]) -> list[slice]:
    """Which rows are those of each rank."""
    return [slice(*ends) for ends in pairwise(accumulate(counts, initial=0))]


def _row_bytes(x: Tensor) -> int:
    return prod(x.shape[1:]) * x.element_size()
