"""How fast processes of one machine exchange: gloo's messages, and the memory that they share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from deepseek.parallel.collectives import gather_sequence, scatter_sequence_sum
from deepseek.parallel.cpu_exchange import all_to_all

ROUNDS, TIMES = 9, 6
"""Of each exchange, and how often it comes in one, with computation before it each time: processes
that compute come late, and those that wait must be woken. The median round counts."""
SMALL, LARGE = 1 << 10, 1 << 20
"""Numbers, fp32, of an exchange."""


def link_costs(ranks: int) -> dict[str, float]:
    """Seconds of exchanges and of each byte more, by the names of ``planner.cpu_time.Links``.

    A collective of all processes, which exchange in groups of so many neighbours, all at once.
    """
    world, me = dist.get_world_size(), dist.get_rank()
    groups = [list(range(first, first + ranks)) for first in range(0, world - ranks + 1, ranks)]
    made = [dist.new_group(members) for members in groups]
    mine = next((made[i] for i, members in enumerate(groups) if me in members), None)

    def shared(numbers: int) -> None:
        assert mine is not None
        whole = torch.ones(1, numbers // 64, 64)
        part = scatter_sequence_sum(whole, mine)
        gather_sequence(part, mine)

    def rows(numbers: int) -> None:
        assert mine is not None
        parts = [numbers // ranks] * ranks
        all_to_all([torch.ones(sum(parts))], parts, parts, mine).wait()

    def summed(numbers: int) -> None:
        dist.all_reduce(torch.ones(numbers), group=mine)

    def hop(numbers: int) -> None:
        at = dist.get_rank(mine) if mine is not None else 0
        there = torch.ones(numbers)
        operation = dist.irecv if at % 2 else dist.isend
        if at ^ 1 < ranks:
            message = dist.P2POp(operation, there, group=mine, group_peer=at ^ 1)
            for work in dist.batch_isend_irecv([message]):
                work.wait()

    costs = {}
    for name, exchange, share in (
        ("shared", shared, 1.0),
        ("rows", rows, (ranks - 1) / ranks),
        ("sum", summed, 1.0),
        ("hop", hop, 1.0),
    ):
        times = 2 if name == "shared" else 1  # two of them
        work = exchange if mine is not None else lambda numbers: None
        small, large = (_between(partial(work, n)) / times for n in (SMALL, LARGE))
        costs[name] = max(small, 1e-9)
        costs[f"{name}_byte"] = max(large - small, 1e-9) / (4 * share * (LARGE - SMALL))
    return costs


def _between(exchange: Callable[[], object]) -> float:
    """Seconds that an exchange takes between computations."""
    rows, matrix = torch.ones(128, 512), torch.ones(512, 512)

    def compute() -> None:
        rows @ matrix

    def both() -> None:
        for _ in range(TIMES):
            compute()
            exchange()

    seconds = timed(both, ROUNDS)
    return (statistics.median(seconds) - TIMES * min(timed(compute, ROUNDS))) / TIMES


def fastest(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round: whatever else runs makes the others slower."""
    return min(timed(work, rounds))


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of some rounds, which all processes begin together; means of the processes."""
    took = [begun_together(work) for _ in range(rounds + 1)]
    return [mean_of_processes(seconds) for seconds in sorted(took[1:])]  # the first one connects


def begun_together(work: Callable[[], object]) -> float:
    """Seconds of what all processes begin at once. Without a process group, this one alone."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def mean_of_processes(seconds: float) -> float:
    """Of all processes."""
    if not dist.is_initialized():
        return seconds
    total = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
