"""FSDP's flat tensors lie in memory that the ranks share, and nothing else does."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.parallel import exchange, fsdp_exchange
from deepseek.parallel.fsdp_exchange import _AllGather, _ReduceScatter, _UnitMemory, use_exchange
from deepseek.parallel.gradients import local
from deepseek.parallel.host_memory import HostMemory
from support.layouts import Case, batches, small_config, spread
from support.ranks import run_ranks

CPU = torch.device("cpu")


def flat_tensors(rank: int, case: Case) -> tuple[list[bool], bool]:
    """Of each gather and sum, whether it was in shared memory; and whether a result is."""
    driven = spread(case)
    seen: list[bool] = []
    leaked: list[bool] = []

    def watch(name: str, place: int) -> None:
        original = getattr(exchange, name)

        def watched(*given: Any) -> None:
            original(*given)
            if len(given) < 4:  # not FSDP's
                return
            shared: HostMemory | None = given[3]
            seen.append(shared is not None and shared.holds(given[place]))
            if shared is not None:
                parameters = driven.module.model.parameters()
                stay = [given[0]] if name == "reduce_scatter" else map(local, parameters)
                leaked.extend(map(shared.holds, stay))

        setattr(exchange, name, watched)

    watch("all_gather", 0)
    watch("reduce_scatter", 1)
    driven.run(batches(case))
    return seen, any(leaked)


@pytest.mark.parametrize(
    ("world", "sizes", "units"),
    [
        (2, {}, 1),
        (3, {"global_batch_size": 12, "micro_batch_size": 2}, 1),
        (4, {"expert_model_parallel_size": 2}, 5),  # a unit of experts in each MoE block
        (4, {"tensor_model_parallel_size": 2}, 5),
        (4, {"pipeline_model_parallel_size": 2}, 3),  # a unit for each block
    ],
)
def test_weights_that_stay_are_read_where_they_were_written(
    world: int, sizes: dict[str, Any], units: int
) -> None:
    """From the second step on; the first tells how much there is."""
    case = Case(small_config(**sizes), world, steps=3)
    for seen, leaked in run_ranks(world, flat_tensors, case):
        exchanges = len(seen) // 3
        assert exchanges >= 2 * units
        assert seen == [False] * exchanges + [True] * (2 * exchanges)
        assert not leaked


@pytest.mark.parametrize("why", ["given back", "too large", "no such memory"])
def test_memory_is_not_taken_where_it_is_spared_or_missing(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "too large":
        monkeypatch.setattr(fsdp_exchange, "PLACED_BYTES", 1000)
    elif why == "no such memory":
        monkeypatch.delattr(os, "memfd_create")
    case = Case(small_config(reshard_after_forward=why == "given back"), 2, steps=2)
    for seen, _ in run_ranks(2, flat_tensors, case):
        assert seen
        assert not any(seen)


def test_a_gradient_as_large_as_the_gathered_weights_has_memory_of_its_own() -> None:
    """Weights gathered in bf16, gradients summed in fp32, two ranks: both have as many bytes."""

    def work(rank: int) -> list[bool]:
        world = dist.group.WORLD
        assert world is not None
        unit = _UnitMemory(wanted=True)
        gather, scatter = _AllGather(unit), _ReduceScatter(unit)
        found = []
        for _ in range(2):
            output = gather.allocate((64,), dtype=torch.bfloat16, device=CPU)
            own = output[32 * rank :][:32].fill_(rank)
            gather(output, own, world)
            assert output[::32].tolist() == [0.0, 1.0]
            whole = scatter.allocate((64,), dtype=torch.float32, device=CPU).fill_(rank + 1)
            part: Tensor = scatter.allocate((32,), dtype=torch.float32, device=CPU)
            scatter(part, whole, world, dist.ReduceOp.SUM)
            assert part.tolist() == [3.0] * 32
            memory = unit.memory
            assert memory is not None
            found += [memory.holds(tensor) for tensor in (output, whole, part)]
        return found

    assert run_ranks(2, work) == [[False] * 3 + [True, True, False]] * 2


class Unit:
    """What ``use_exchange`` sees of an FSDP unit, used as FSDP uses it."""

    def set_custom_all_gather(self, comm: Any) -> None:
        self.all_gather = comm

    def set_custom_reduce_scatter(self, comm: Any) -> None:
        self.reduce_scatter = comm

    def gather(self, rank: int, number: float) -> Tensor:
        world = dist.group.WORLD
        output: Tensor = self.all_gather.allocate((64,), dtype=torch.float32, device=CPU)
        self.all_gather(output, output[32 * rank :][:32].fill_(number + rank), world)
        return output

    def sum(self, number: float) -> Tensor:
        whole = self.reduce_scatter.allocate((64,), dtype=torch.float32, device=CPU).fill_(number)
        part: Tensor = self.reduce_scatter.allocate((32,), dtype=torch.float32, device=CPU)
        self.reduce_scatter(part, whole, dist.group.WORLD, dist.ReduceOp.SUM)
        return part


def test_what_a_unit_has_gathered_stays_while_others_exchange() -> None:
    """FSDP gathers a unit's weights while another computes, whose gradients are then summed."""

    def work(rank: int) -> None:
        early, other = Unit(), Unit()
        use_exchange([early, other], 1000)  # type: ignore[list-item]
        for unit in (early, other):  # tells how much there is
            unit.gather(rank, 0.0)
            unit.sum(0.0)
        gathered = early.gather(rank, 10.0)
        for number in (20.0, 30.0, 40.0):
            assert other.gather(rank, number)[::32].tolist() == [number, number + 1]
            assert other.sum(number).tolist() == [2 * number] * 32
        assert gathered[::32].tolist() == [10.0, 11.0]

    run_ranks(2, work)
