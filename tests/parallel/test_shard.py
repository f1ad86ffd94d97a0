"""Which weights a rank computes with as it keeps them, and which it gathers first."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek.models.components.moe import GroupedExperts
from deepseek.parallel.mesh import local
from support.layouts import Case, batches, small_config, spread
from support.ranks import run_ranks


def addresses(rank: int, case: Case) -> tuple[set[int], set[int]]:
    """Of the experts' first weights: where they are kept, and where they are computed with."""
    driven = spread(case)
    experts = [m for m in driven.module.model.modules() if isinstance(m, GroupedExperts)]
    kept = {local(module.w1).data_ptr() for module in experts}
    used: set[int] = set()
    for module in experts:
        module.register_forward_pre_hook(lambda m, _: used.add(local(m.w1).data_ptr()))
    driven.run(batches(case))
    return kept, used


@pytest.mark.parametrize(
    ("world", "sizes", "as_kept"),
    [
        (2, {"expert_model_parallel_size": 2}, True),
        (2, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}, True),
        (4, {"expert_model_parallel_size": 2}, False),  # two ranks have a part of each expert
        (4, {"expert_model_parallel_size": 2, "data_parallel_replicate_size": 2}, False),
    ],
)
def test_experts_of_one_rank_are_not_copied(
    world: int, sizes: dict[str, Any], as_kept: bool
) -> None:
    case = Case(small_config(**sizes), world, seed=1, steps=1)
    assert case.layout.keeps_experts is as_kept
    for kept, used in run_ranks(world, addresses, case):
        assert len(kept) == len(used)
        assert kept == used if as_kept else not kept & used
