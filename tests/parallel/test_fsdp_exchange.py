"""FSDP's flat tensors lie in memory that the ranks share, and nothing else does."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import Case, batches, small_config, spread
from ranks import run_ranks
from torch import Tensor

from deepseek.parallel import exchange, fsdp_exchange
from deepseek.parallel.fsdp_exchange import _AllGather, _ReduceScatter, _UnitMemory
from deepseek.parallel.gradients import local
from deepseek.parallel.host_memory import HostMemory

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
