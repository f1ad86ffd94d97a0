"""Memory that the CPU ranks of one machine share, and the collectives that go through it.

gloo sends between processes of one machine through its sockets: every byte is copied four times, by
the same cores that should compute, and its reduce-scatter is a whole all-reduce of which each rank
throws most away. In shared memory a byte is written by the rank that has it and read by those that
need it. (``cpu_exchange.py`` has the all-to-all, which goes on beside other work.)

GPUs, and ranks of several machines, never come here: ``all_gather`` and ``reduce_scatter`` then are
those of the group's backend. Who reads how the model is parallelised may take them for just that.

Contents: the two collectives, the memory, FSDP2's collectives in terms of it, and the settings of
the C library's own memory.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from deepseek.config.shared_memory import ALIGNMENT, HALVES, region_bytes
from deepseek.parallel.cpu_barrier import (
    TURNS,
    BackendBarrier,
    Begun,
    CountedBarrier,
    may_count,
)

FSDP_BYTES = 2 << 30
"""What FSDP's own tensors of all units and ranks may take. Larger ones go through a region at a
time."""


# -- the collectives --


def all_gather(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, memory: SharedMemory | None = None
) -> None:
    """Every rank's input, one after the other, on every rank.

    Args:
        output: contiguous, as many elements as the inputs of all ranks together. It may hold the
            input at its place.
        input: contiguous, of the same shape and dtype on every rank.
        group: the ranks.
        memory: of these ranks; ``output`` may lie in it, on every rank or on none: at the start of
            the first region, the input at its place. Then ``output`` must be read before ``memory``
            is used again.
    """
    if memory is not None and memory.holds(output):
        memory.barrier()
        memory.next_half()
        return
    memory = _memory_of(input, group)
    if memory is None:
        gather = _torch_function("all_gather_single", "all_gather_into_tensor")
        gather(output.flatten(), input.flatten(), group=group)
        return
    own_b = bytes_of(input)
    parts_nb = bytes_of(output).view(memory.size, -1)
    if parts_nb[memory.rank].data_ptr() != own_b.data_ptr():
        parts_nb[memory.rank].copy_(own_b)
    room = memory.region_bytes
    for start in range(0, len(own_b), room):
        chunk = slice(start, min(start + room, len(own_b)))
        length = chunk.stop - chunk.start
        memory.region(memory.rank)[:length].copy_(own_b[chunk])
        memory.barrier()
        for rank in memory.others:
            parts_nb[rank, chunk].copy_(memory.region(rank)[:length])
        memory.next_half()


def reduce_scatter(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, memory: SharedMemory | None = None
) -> None:
    """This rank's part of the sum of all inputs.

    Args:
        output: contiguous, an n-th of the elements of the input.
        input: contiguous, of the same shape and dtype on every rank; the part of the first rank
            comes first.
        group: n ranks.
        memory: of these ranks; ``input`` may lie in it, on every rank or on none: at the start of
            this rank's region.
    """
    if memory is not None and memory.holds(input):
        memory.barrier()
        own = slice(memory.rank * output.numel(), (memory.rank + 1) * output.numel())
        inputs = [memory.region(rank).view(input.dtype) for rank in range(memory.size)]
        _sum_in_order(output.view(-1), [theirs[own] for theirs in inputs])
        memory.next_half()
        return
    memory = _memory_of(input, group)
    if memory is None:
        scatter = _torch_function("reduce_scatter_single", "reduce_scatter_tensor")
        scatter(output.flatten(), input.flatten(), group=group)
        return
    total, parts_nr = output.view(-1), input.view(memory.size, -1)
    room = memory.region_bytes // (memory.size - 1) // input.element_size()  # for each other rank
    for start in range(0, len(total), room):
        chunk = slice(start, min(start + room, len(total)))
        for rank in memory.others:
            slot = _slot(memory, memory.rank, rank, room, input.dtype)
            slot[: chunk.stop - start].copy_(parts_nr[rank, chunk])
        memory.barrier()
        parts = []
        for rank in range(memory.size):
            if rank == memory.rank:
                parts.append(parts_nr[rank, chunk])
            else:
                slot = _slot(memory, rank, memory.rank, room, input.dtype)
                parts.append(slot[: chunk.stop - start])
        _sum_in_order(total[chunk], parts)
        memory.next_half()


def _sum_in_order(total: Tensor, parts: list[Tensor]) -> None:
    """In the order of the ranks, whichever this one is: the sum is the same on all of them."""
    torch.add(parts[0], parts[1], out=total)
    for part in parts[2:]:
        total.add_(part)


def _torch_function(name: str, old_name: str) -> Callable[..., object]:
    """A function of ``torch.distributed``; since 2.13 the old names warn.

    Looked up at each call: a recorder may stand in for it.
    """
    return getattr(dist, name, None) or getattr(dist, old_name)


def _memory_of(tensor: Tensor, group: dist.ProcessGroup) -> SharedMemory | None:
    return group_memory(group) if may_share(tensor, group) else None


def may_share(tensor: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether such tensors go through shared memory, if the ranks have any."""
    return tensor.device.type == "cpu" and dist.get_world_size(group) > 1


def bytes_of(tensor: Tensor) -> Tensor:
    """uint8 view of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def _slot(memory: SharedMemory, writer: int, reader: int, room: int, dtype: torch.dtype) -> Tensor:
    """The part of the writer's region that one of its readers reads: (room,)."""
    numbers = room * dtype.itemsize
    start = numbers * (reader - (reader > writer))
    return memory.region(writer)[start : start + numbers].view(dtype)


# -- the memory --


class SharedMemory:
    """Memory of a group's ranks: two regions for each of them.

    It has no name in any folder: it is gone when the last of the processes is, killed or not, and
    no limit of ``/dev/shm`` (64 MB in a container) holds for it.

    Attributes:
        rank: of this process in the group.
        size: of the group.
        others: the ranks after this one and then those before it, so that not all read the same
            first.
        region_bytes: what a rank can write between two barriers.
        regions: uint8 (``HALVES``, ranks, ``region_bytes``), all of it.
        half: which of them is used.

    Args:
        group: the ranks.
        memory: a page of zeros, then the regions.
        counts: every rank can count who has come to a barrier.
    """

    def __init__(self, group: dist.ProcessGroup, memory: mmap.mmap, counts: bool) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.others = [(self.rank + step) % self.size for step in range(1, self.size)]
        # A destroyed group ends its threads once nobody has it.
        self._barrier: BackendBarrier | CountedBarrier = BackendBarrier(ref(group))
        with torch.inference_mode(False):  # else nobody could write here outside of it
            whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.regions = whole[ALIGNMENT:].view(HALVES, self.size, -1)
        self.region_bytes = self.regions.shape[2]
        self.half = 0
        if counts:
            words = whole[:ALIGNMENT].view(torch.int64)[:TURNS]
            self._barrier = CountedBarrier(words, self.size, self._barrier)

    def region(self, rank: int) -> Tensor:
        """uint8 (``region_bytes``): this rank's, to write before the barrier; any after it."""
        return self.regions[self.half, rank]

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies here, where others read it without a copy."""
        return tensor.untyped_storage().data_ptr() == self.regions.untyped_storage().data_ptr()

    def barrier(self) -> None:
        """Wait until every rank has written; then all may read what all have written."""
        self._barrier.begin().wait()

    def begin_barrier(self) -> Begun:
        """``barrier``, to be waited for later."""
        return self._barrier.begin()

    def next_half(self) -> None:
        """Go on with the other half, once this rank has read.

        No barrier is needed for it. A rank writes to this half again only after the next barrier,
        which every rank enters after it has read.
        """
        self.half = (self.half + 1) % HALVES


_memories: WeakKeyDictionary[dist.ProcessGroup, SharedMemory | None] = WeakKeyDictionary()


@torch.compiler.disable  # a compiler follows neither the files nor the messages of finding it
def group_memory(group: dist.ProcessGroup) -> SharedMemory | None:
    """The memory of a group; None if its ranks do not share a machine. A collective at first."""
    if group not in _memories:
        _memories[group] = open_group_memory(group)
    return _memories[group]


def open_group_memory(group: dist.ProcessGroup) -> SharedMemory | None:
    """``open_memory`` of as much as a group has."""
    return open_memory(group, region_bytes(dist.get_world_size(group)))


def open_memory(group: dist.ProcessGroup, region_bytes: int) -> SharedMemory | None:
    """New memory with regions of at least ``region_bytes``, the same on all ranks; a collective.

    None if the ranks do not share a machine, or it has not so much.
    """
    # The first rank makes it, the others find it among the open files of that process.
    ranks = dist.get_process_group_ranks(group)
    regions = HALVES * len(ranks) * -(-region_bytes // ALIGNMENT) * ALIGNMENT
    size = ALIGNMENT + regions  # what counts ranks comes first
    offer: list[Any] = [None]
    descriptor, memory = -1, None
    if dist.get_rank() == ranks[0]:
        descriptor = _make(size)
        offer = [(_machine(), os.getpid(), descriptor)]
    dist.broadcast_object_list(offer, src=ranks[0], group=group)
    machine, process, number = offer[0]
    try:
        if machine is not None and machine == _machine() and number >= 0:
            if descriptor < 0:
                descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
            memory = mmap.mmap(descriptor, size)
    except OSError:  # not allowed to look at that process, or to have so much
        pass
    # Also keeps the file open until all have found it.
    reached = torch.tensor([memory is not None, may_count()], dtype=torch.int64)
    dist.all_reduce(reached, dist.ReduceOp.MIN, group=group)
    all_have, all_count = map(bool, reached.tolist())
    if descriptor >= 0:
        os.close(descriptor)
    return SharedMemory(group, memory, all_count) if memory is not None and all_have else None


def _make(size: int) -> int:
    """Descriptor of new memory, -1 if this system has none such."""
    try:
        descriptor = os.memfd_create("deepseek")
    except (AttributeError, OSError):
        return -1
    try:
        os.posix_fallocate(descriptor, 0, size)  # an error now, not a dead process later
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _machine() -> tuple[str, ...] | None:
    """Tells this machine from others, and hosts that are only namespaces from each other."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read()
        return (boot, *(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")))
    except OSError:
        return None


# -- FSDP2 --


def use_in_fsdp(units: Collection[FSDPModule], gathered_bytes: int | None) -> None:
    """Let FSDP gather the weights of ``units`` and sum their gradients by the functions above.

    FSDP copies what a unit exchanges into one flat tensor, which it asks its collectives to
    allocate. It gets shared memory, so that the other ranks read it where it was written first.

    Args:
        units: all of this rank.
        gathered_bytes: of the gathered weights of all ranks that gather the same, if they stay for
            a whole step; None if they are given back to save memory, which then is not spent here.
    """
    fits = gathered_bytes is not None and HALVES * gathered_bytes <= FSDP_BYTES
    for unit in units:
        memory = _UnitMemory(fits)
        # torch declares base classes for these, in a private file, and asks for their methods only.
        unit.set_custom_all_gather(_AllGather(memory))  # type: ignore[arg-type]
        unit.set_custom_reduce_scatter(_ReduceScatter(memory))  # type: ignore[arg-type]


class _UnitMemory:
    """Where the flat tensors of one unit lie.

    Not shared by several units: FSDP gathers the next one's weights before it has read these. What
    one unit exchanges is read before it exchanges anything else.

    Args:
        wanted: False: there never is any.

    Attributes:
        memory: None before the first exchange, and where the ranks share no machine.
    """

    def __init__(self, wanted: bool) -> None:
        self.memory: SharedMemory | None = None
        self._wanted = wanted

    def make_room(self, length: int, group: dist.ProcessGroup) -> None:
        """Open memory for ``length`` bytes, unless there is as much; a collective if not."""
        large = self.memory is not None and self.memory.region_bytes >= length
        if self._wanted and not large:
            self.memory = open_memory(group, length)
            self._wanted = self.memory is not None


class _FlatTensors:
    """Allocates FSDP's flat tensors: at first anywhere, later in the unit's memory.

    The first call tells the group and the size of the tensor that is exchanged, which is brought
    into the unit's memory that once: the memory of the group is for those that find no place in
    one of their own, and would keep what it was touched for. From then on a tensor of that size in
    bytes is placed there. FSDP also asks for tensors that it keeps, such as the sum of a unit's
    gradients: they have another size (an n-th), and stay out.
    """

    def __init__(self, unit: _UnitMemory) -> None:
        self._unit = unit
        self._length = -1

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        memory, length = self._unit.memory, math.prod(size) * dtype.itemsize
        if memory is None or length != self._length:
            return torch.empty(*size, dtype=dtype, device=device)
        return self._region(memory)[:length].view(dtype)

    def _region(self, memory: SharedMemory) -> Tensor:
        raise NotImplementedError

    def _placed(self, flat: Tensor, group: dist.ProcessGroup) -> Tensor:
        """``flat``, or its place in the unit's memory if it lies elsewhere."""
        if flat.nbytes != self._length:
            self._unit.make_room(flat.nbytes, group)
            self._length = flat.nbytes
        memory = self._unit.memory
        if memory is None or memory.holds(flat):
            return flat
        return self._region(memory)[: flat.nbytes].view(flat.dtype).view(flat.shape)


class _AllGather(_FlatTensors):
    """Blocks, so that there is nothing to wait for later: CPU ranks have no second stream."""

    def _region(self, memory: SharedMemory) -> Tensor:
        return memory.region(0)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        whole = self._placed(output_tensor, group)
        if whole is not output_tensor:
            parts = whole.view(dist.get_world_size(group), -1)
            own = parts[dist.get_rank(group)]
            input_tensor = own.copy_(input_tensor.view(-1))
        all_gather(whole, input_tensor, group, self._unit.memory)
        if whole is not output_tensor:
            output_tensor.copy_(whole)


class _ReduceScatter(_FlatTensors):
    def _region(self, memory: SharedMemory) -> Tensor:
        return memory.region(memory.rank)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, op
        whole = self._placed(input_tensor, group)
        if whole is not input_tensor:
            whole.copy_(input_tensor)
        reduce_scatter(output_tensor, whole, group, self._unit.memory)


# -- the C library's memory --

# From malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_GROW_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process use its freed memory again instead of returning it to the system.

    By default every tensor of some size is mapped anew from the system, which clears it page by
    page as it is first written: that takes several times as long as writing it. Each training step
    frees and wants the same sizes, so what is kept is what is needed next.

    Returns:
        Whether the C library took it; others than GNU's have no such settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROW_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])
