"""How fast processes of one machine exchange: gloo's messages, and the memory that they share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from deepseek.parallel import cpu_memory

NUMBERS = 1 << 20
"""fp32, of what all ranks together have in a large collective."""
ROUNDS = 7


def gloo_speed() -> tuple[float, float]:
    """Bytes/s that a rank sends while all do, and seconds of an exchange of next to nothing."""
    size = dist.get_world_size()
    small, large = (_exchange_seconds(numbers * size) for numbers in (1, NUMBERS // size))
    crossing = 4 * NUMBERS * (size - 1) / size
    return crossing / max(large - small, 1e-6), small


def shared_memory_speed() -> tuple[float, float]:
    """Bytes/s of gathering and of adding up, in bytes of the whole, and seconds of an empty one."""
    size, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    found = []
    for numbers in (size, NUMBERS):
        part, whole = torch.ones(numbers // size), torch.empty(numbers // size * size)
        gather = _seconds(partial(cpu_memory.all_gather, whole, part, group))
        add = _seconds(partial(cpu_memory.reduce_scatter, part, whole, group))
        found.append((gather + add) / 2)
    small, large = found
    return 4 * NUMBERS / max(large - small, 1e-6), small


def _exchange_seconds(numbers: int) -> float:
    sent, received = torch.ones(numbers), torch.empty(numbers)
    return _seconds(lambda: dist.all_to_all_single(received, sent))


def _seconds(exchange: Callable[[], object]) -> float:
    """Median of some rounds, the slowest rank's."""
    exchange()
    took = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        exchange()
        took.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(took), dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def meet() -> None:
    """Wait for all ranks."""
    dist.barrier()
