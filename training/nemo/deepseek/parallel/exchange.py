"""All-gather and reduce-scatter by the fastest way there is.

Between CPU ranks of one machine through memory that they share, in rounds of as much as fits into
it; what was written there in the first place is not copied once more. Else through the group's
backend. gloo's own reduce-scatter is a whole all-reduce of which each rank throws most away. Its
all-to-all is as fast as this would be, and stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.parallel.host_memory import HostMemory, host_memory


def all_gather(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, shared: HostMemory | None = None
) -> None:
    """Every rank's input, one after the other, on every rank.

    Args:
        output: contiguous, as many elements as the inputs of all ranks together. It may hold the
            input at its place.
        input: contiguous, of the same shape and dtype on every rank.
        group: the ranks.
        shared: memory of these ranks in which ``output`` may lie, on every rank or on none; at the
            start of the first region, and with the input at its place. Then it is to be read before
            ``shared`` is used again.
    """
    if shared is not None and shared.holds(output):
        shared.meet()
        shared.turn()
        return
    memory = _memory(input, group)
    if memory is None:
        gather = _torchs("all_gather_single", "all_gather_into_tensor")
        gather(output.flatten(), input.flatten(), group=group)
        return
    own_b = _bytes(input)
    parts_nb = _bytes(output).view(memory.size, -1)
    if parts_nb[memory.rank].data_ptr() != own_b.data_ptr():
        parts_nb[memory.rank].copy_(own_b)
    room = memory.region_bytes
    for start in range(0, len(own_b), room):
        piece = slice(start, min(start + room, len(own_b)))
        length = piece.stop - piece.start
        memory.region(memory.rank)[:length].copy_(own_b[piece])
        memory.meet()
        for rank in _others(memory):
            parts_nb[rank, piece].copy_(memory.region(rank)[:length])
        memory.turn()


def reduce_scatter(
    output: Tensor, input: Tensor, group: dist.ProcessGroup, shared: HostMemory | None = None
) -> None:
    """This rank's part of the sum of all inputs.

    Args:
        output: contiguous, an n-th of the elements of the input.
        input: contiguous, of the same shape and dtype on every rank; first the part of the first
            rank.
        group: n ranks.
        shared: memory of these ranks in which ``input`` may lie, on every rank or on none; at the
            start of this rank's region.
    """
    if shared is not None and shared.holds(input):
        shared.meet()
        own = slice(shared.rank * output.numel(), (shared.rank + 1) * output.numel())
        inputs = [shared.region(rank).view(input.dtype) for rank in range(shared.size)]
        _sum_in_order(output.view(-1), [theirs[own] for theirs in inputs])
        shared.turn()
        return
    memory = _memory(input, group)
    if memory is None:
        scatter = _torchs("reduce_scatter_single", "reduce_scatter_tensor")
        scatter(output.flatten(), input.flatten(), group=group)
        return
    total, parts_nr = output.view(-1), input.view(memory.size, -1)
    room = memory.region_bytes // (memory.size - 1) // input.element_size()  # for each other rank
    for start in range(0, len(total), room):
        piece = slice(start, min(start + room, len(total)))
        for rank in _others(memory):
            slot = _slot(memory, memory.rank, rank, room, input.dtype)
            slot[: piece.stop - start].copy_(parts_nr[rank, piece])
        memory.meet()
        parts = []
        for rank in range(memory.size):
            if rank == memory.rank:
                parts.append(parts_nr[rank, piece])
            else:
                slot = _slot(memory, rank, memory.rank, room, input.dtype)
                parts.append(slot[: piece.stop - start])
        _sum_in_order(total[piece], parts)
        memory.turn()


def _sum_in_order(total: Tensor, parts: list[Tensor]) -> None:
    """In the order of the ranks, whichever this one is: the sum of a part is one number."""
    torch.add(parts[0], parts[1], out=total)
    for part in parts[2:]:
        total.add_(part)


def _torchs(name: str, old_name: str) -> Callable[..., object]:
    """A function of ``torch.distributed``; since 2.13 the old names warn. Looked up at each call:
    a recorder may stand in for it."""
    return getattr(dist, name, None) or getattr(dist, old_name)


def _memory(tensor: Tensor, group: dist.ProcessGroup) -> HostMemory | None:
    if tensor.device.type != "cpu" or dist.get_world_size(group) == 1:
        return None
    return host_memory(group)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _slot(memory: HostMemory, writer: int, reader: int, room: int, dtype: torch.dtype) -> Tensor:
    """Of a rank's region, divided among those it writes to, the part for one of them: (room,)."""
    numbers = room * dtype.itemsize
    start = numbers * (reader - (reader > writer))
    return memory.region(writer)[start : start + numbers].view(dtype)


def _others(memory: HostMemory) -> list[int]:
    """The ranks after this one and then those before it, so that not all read the same first."""
    return [(memory.rank + step) % memory.size for step in range(1, memory.size)]
