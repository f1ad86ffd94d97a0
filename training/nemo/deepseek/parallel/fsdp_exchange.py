"""FSDP2's own collectives on CPUs, by way of ``exchange``.

FSDP copies what a unit exchanges into one flat tensor, which it asks for here: it gets memory that
the ranks share, so that the others read it where it was written first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from deepseek.parallel import exchange
from deepseek.parallel.host_memory import HALVES, HostMemory, host_memory, open_memory

PLACED_BYTES = 2 << 30
"""What such memory of all units and ranks may take. More is exchanged piece by piece."""


def use_exchange(units: Collection[FSDPModule], kept_bytes: int | None) -> None:
    """Let FSDP gather the weights of ``units`` and sum their gradients through ``exchange``.

    Args:
        units: all of this rank.
        kept_bytes: of the gathered weights of all ranks that gather the same, if they stay for a
            whole step; None if they are given back for the sake of memory.
    """
    placed = kept_bytes is not None and HALVES * kept_bytes <= PLACED_BYTES
    for unit in units:
        memory = _UnitMemory(placed)
        # torch declares base classes for these, in a private file, and asks for their methods only.
        unit.set_custom_all_gather(_AllGather(memory))  # type: ignore[arg-type]
        unit.set_custom_reduce_scatter(_ReduceScatter(memory))  # type: ignore[arg-type]


class _UnitMemory:
    """Where the flat tensors of one unit lie.

    Not shared by several units: FSDP gathers the next one's weights before it has read these. What
    one unit exchanges is read before it exchanges anything else.

    Args:
        wanted: else there never is any.

    Attributes:
        memory: None before the first exchange, and where the ranks share no machine.
    """

    def __init__(self, wanted: bool) -> None:
        self.memory: HostMemory | None = None
        self._wanted = wanted

    def fit(self, length: int, group: dist.ProcessGroup) -> None:
        """Make it as large as that, in bytes; a collective if it is not."""
        large = self.memory is not None and self.memory.region_bytes >= length
        if self._wanted and not large and host_memory(group) is not None:
            self.memory = open_memory(group, length)


class _Flat:
    """Gives FSDP its flat tensors: after the first exchange, which tells group and size, placed.

    Told by their size, in bytes, from what FSDP keeps: the weights' gradients are an n-th of it.
    """

    def __init__(self, unit: _UnitMemory) -> None:
        self._unit = unit
        self._length = -1

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        memory, length = self._unit.memory, math.prod(size) * dtype.itemsize
        if memory is None or length != self._length:
            return torch.empty(*size, dtype=dtype, device=device)
        return self._place(memory)[:length].view(dtype)

    def _place(self, memory: HostMemory) -> Tensor:
        raise NotImplementedError

    def _seen(self, flat: Tensor, group: dist.ProcessGroup) -> None:
        if flat.nbytes != self._length:
            self._unit.fit(flat.nbytes, group)
            self._length = flat.nbytes


class _AllGather(_Flat):
    """Blocks, so that there is nothing to wait for later: CPU ranks have no second stream."""

    def _place(self, memory: HostMemory) -> Tensor:
        return memory.region(0)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        exchange.all_gather(output_tensor, input_tensor, group, self._unit.memory)
        self._seen(output_tensor, group)


class _ReduceScatter(_Flat):
    def _place(self, memory: HostMemory) -> Tensor:
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
        exchange.reduce_scatter(output_tensor, input_tensor, group, self._unit.memory)
        self._seen(input_tensor, group)
