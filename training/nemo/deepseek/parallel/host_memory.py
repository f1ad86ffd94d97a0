"""Memory that the ranks of one machine share, so that what they exchange is written once.

gloo sends between processes of one machine through its sockets: every byte is copied four times, by
the same cores that should compute. In shared memory it is written by who has it and read by who
needs it. Used on CPUs only; GPUs have NCCL, which does the same.

The memory has no name in any folder: it is gone when the last of the processes is, killed or not,
and no limit of ``/dev/shm`` (64 MB in a container) holds for it.
"""

from __future__ import annotations

import mmap
import os
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

REGION_BYTES = 16 << 20
"""What a rank can write before the others read it, at most. Each time all wait for the slowest."""
GROUP_BYTES = 64 << 20
"""What all regions of a group take, about, however many ranks it has."""
ALIGNMENT = 4096
"""Regions begin on pages."""
HALVES = 2
"""Regions of each rank, used in turn: one is written while the other may still be read."""


class HostMemory:
    """One piece of memory of a group's ranks: a few regions for each of them.

    Attributes:
        rank: of this process in the group.
        size: of the group.
        region_bytes: what a rank can write before it meets the others.
    """

    def __init__(self, group: dist.ProcessGroup, memory: mmap.mmap) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._regions = whole.view(HALVES, self.size, -1)
        self.region_bytes = self._regions.shape[2]
        self._half = 0

    def region(self, rank: int) -> Tensor:
        """uint8 (``region_bytes``): this rank's, to write before ``meet``; any rank's after it."""
        return self._regions[self._half, rank]

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is written where others can read it without a copy."""
        return tensor.untyped_storage().data_ptr() == self._regions.untyped_storage().data_ptr()

    def meet(self) -> None:
        """Wait until every rank has written; then all may read what all have written."""
        dist.barrier(group=self._group)

    def turn(self) -> None:
        """Done reading: go on with the other half.

        Nobody has to wait for that. A rank writes to this half again only after the next ``meet``,
        to which every rank comes when it has read.
        """
        self._half = (self._half + 1) % HALVES


_opened: WeakKeyDictionary[dist.ProcessGroup, HostMemory | None] = WeakKeyDictionary()


@torch.compiler.disable  # a compiler follows neither the files nor the messages of finding it
def host_memory(group: dist.ProcessGroup) -> HostMemory | None:
    """The memory of a group; None if its ranks do not share a machine. A collective at first."""
    if group not in _opened:
        most = GROUP_BYTES // (HALVES * dist.get_world_size(group)) // ALIGNMENT * ALIGNMENT
        _opened[group] = open_memory(group, min(REGION_BYTES, most))
    return _opened[group]


def open_memory(group: dist.ProcessGroup, region_bytes: int) -> HostMemory | None:
    """New memory with regions of at least ``region_bytes``, the same on all ranks; a collective.

    None if the ranks do not share a machine, or it has not so much.
    """
    # The first rank makes it, the others find it among the open files of that process.
    ranks = dist.get_process_group_ranks(group)
    size = HALVES * len(ranks) * -(-region_bytes // ALIGNMENT) * ALIGNMENT
    offer: list[Any] = [None]
    descriptor = -1
    if dist.get_rank() == ranks[0]:
        descriptor = _make(size)
        offer = [(_machine(), os.getpid(), descriptor)]
    dist.broadcast_object_list(offer, src=ranks[0], group=group)
    machine, process, number = offer[0]
    try:
        if machine is not None and machine == _machine() and number >= 0:
            if descriptor < 0:
                descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
    except OSError:  # not allowed to look at that process
        descriptor = -1
    memory = mmap.mmap(descriptor, size) if descriptor >= 0 else None
    # Also keeps the file open until all have found it.
    reached = torch.tensor(int(memory is not None))
    dist.all_reduce(reached, dist.ReduceOp.MIN, group=group)
    if descriptor >= 0:
        os.close(descriptor)
    return HostMemory(group, memory) if memory is not None and reached.item() else None


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
