"""Ranks, stages and the split of layers against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config import load_config
from deepseek.config.layout import (
    DENSE_AXES,
    SPARSE_AXES,
    Coordinate,
    Layout,
    StageSlice,
    axes,
    balanced_sizes,
    data_parallel_size,
    data_shards,
    layer_costs,
    num_stages,
    output_costs,
    split_layers,
    stage_costs,
    stage_rank,
    stages_of_rank,
)
from deepseek.config.schema import DataConfig, ModelConfig, RunConfig, TrainerConfig
from deepseek.config.weights import OUTPUT

LAYOUTS = [
    Layout(pp, replicate, shard, tp, ep, cp)
    for pp, replicate, shard, tp in itertools.product((1, 2, 3), (1, 2), (1, 2, 3, 4), (1, 2, 4))
    for ep in range(1, shard * tp + 1)
    for cp in range(1, shard + 1)
    if shard * tp % ep == 0 and shard % cp == 0
]


def test_coordinates_are_those_of_two_reshaped_ranges() -> None:
    for layout in LAYOUTS:
        ranks = np.arange(layout.world_size)
        dense = ranks.reshape(layout.dense_sizes)
        sparse = ranks.reshape(layout.sparse_sizes)
        coordinates = [layout.coordinate(int(rank)) for rank in ranks]
        for rank, at in enumerate(coordinates):
            (in_dense,) = np.argwhere(dense == rank).tolist()
            (in_sparse,) = np.argwhere(sparse == rank).tolist()
            assert [getattr(at, axis) for axis in DENSE_AXES] == in_dense, layout
            assert [getattr(at, axis) for axis in SPARSE_AXES] == in_sparse, layout
        assert len(set(coordinates)) == layout.world_size, layout


def test_ep_groups_are_neighbours_of_one_stage_and_replica() -> None:
    for layout in LAYOUTS:
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(layout.world_size):
            at = layout.coordinate(rank)
            groups.setdefault((at.pp, at.dp_replicate, at.edp), []).append(rank)
        for members in groups.values():
            assert members == list(range(members[0], members[0] + layout.ep)), layout
            assert [layout.coordinate(rank).ep for rank in members] == list(range(layout.ep)), (
                layout
            )
        assert len(groups) * layout.ep == layout.world_size, layout


def test_groups_of_an_axis_are_the_ranks_that_differ_in_it_alone() -> None:
    fields = {
        "PP": ("pp", DENSE_AXES),
        "replicas": ("dp_replicate", DENSE_AXES),
        "data shards": ("dp_shard", DENSE_AXES),
        "TP": ("tp", DENSE_AXES),
        "EP": ("ep", SPARSE_AXES),
        "expert shards": ("edp", SPARSE_AXES),
        "CP": ("cp", ("pp", "dp_replicate", "sequences", "cp", "tp")),
    }
    for layout in LAYOUTS:
        world = layout.world_size
        for axis in axes(layout):
            field, view = fields[axis.name]
            groups: dict[tuple[int, ...], list[int]] = {}
            for rank in range(world):
                at = layout.coordinate(rank)
                known = at._asdict() | {"sequences": at.dp_shard // layout.cp}
                others = tuple(known[name] for name in view if name != field)
                groups.setdefault(others, []).append(rank)
            found = [list(group) for group in axis.groups(world)]
            assert sorted(found) == sorted(groups.values()), (layout, axis)
            for node in (n for n in range(1, world + 1) if world % n == 0):
                crosses = any(len({rank // node for rank in group}) > 1 for group in found)
                assert axis.crosses_nodes(world, node) == crosses, (layout, axis, node)


def test_a_layout_by_hand() -> None:
    layout = Layout(pp=2, dp_replicate=1, dp_shard=2, tp=2, ep=4)
    assert (layout.edp, layout.dp, layout.stage_ranks, layout.world_size) == (1, 2, 4, 8)
    assert layout.coordinate(0) == Coordinate(0, 0, 0, 0, 0, 0, 0)
    assert layout.coordinate(3) == Coordinate(0, 0, 1, 1, 0, 3, 0)
    assert layout.coordinate(6) == Coordinate(1, 0, 1, 0, 0, 2, 0)
    shared = Layout(dp_shard=4, tp=2, cp=2)
    assert (shared.dp, shared.edp, shared.stage_ranks) == (2, 8, 8)
    assert [shared.coordinate(rank).cp for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="EP 4 does not divide 3 x 2 ranks"):
        Layout(dp_shard=3, tp=2, ep=4)
    with pytest.raises(ValueError, match="CP 2 does not divide 3 data shards"):
        Layout(dp_shard=3, cp=2)
    model = ModelConfig(pipeline_model_parallel_size=2, tensor_model_parallel_size=2)
    for world in (6, 2, 0):
        with pytest.raises(ValueError, match=f"{world} ranks cannot be PP 2 x TP 2 x 1"):
            Layout.of(model, world)


def test_what_is_left_over_shards_the_data() -> None:
    model = ModelConfig(
        pipeline_model_parallel_size=2,
        tensor_model_parallel_size=2,
        expert_model_parallel_size=4,
        data_parallel_replicate_size=2,
    )
    assert Layout.of(model, 32) == Layout(pp=2, dp_replicate=2, dp_shard=4, tp=2, ep=4)
    run = RunConfig(trainer=TrainerConfig(devices=8, num_nodes=4), model=model)
    assert Layout.of_run(run) == Layout.of(model, 32)
    assert (data_parallel_size(model, 32), data_shards(model, 32)) == (8, 4)
    assert (data_shards(model, 32, tp=1), data_shards(model, 32, tp=16)) == (8, None)
    assert (data_parallel_size(model, 20), data_shards(model, 20)) == (5, None)
    assert data_parallel_size(model, 6) is None
    model = replace(model, context_parallel_size=2)
    assert Layout.of(model, 32) == Layout(pp=2, dp_replicate=2, dp_shard=4, tp=2, ep=4, cp=2)
    assert (data_parallel_size(model, 32), data_shards(model, 32)) == (4, 4)
    assert (data_parallel_size(model, 20), data_shards(model, 24)) == (None, None)


# -- stages --


def piped(pp: int, schedule: str = "1F1B", **more: Any) -> ModelConfig:
    return ModelConfig(pipeline_model_parallel_size=pp, pipeline_schedule=schedule, **more)


def test_stages_of_every_schedule_by_hand() -> None:
    def held(model: ModelConfig) -> list[list[int]]:
        return [stages_of_rank(model, rank) for rank in range(model.pipeline_model_parallel_size)]

    assert held(piped(1)) == [[0]]
    assert held(piped(1, "DualPipeV")) == [[0]]
    assert held(piped(3)) == held(piped(3, "GPipe")) == [[0], [1], [2]]
    for schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        model = piped(2, schedule, virtual_pipeline_model_parallel_size=3)
        assert held(model) == [[0, 2, 4], [1, 3, 5]]
    for schedule in ("ZBVZeroBubble", "DualPipeV"):
        assert held(piped(3, schedule)) == [[0, 5], [1, 4], [2, 3]]


@given(
    st.integers(2, 6),
    st.sampled_from(["GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"]),
    st.integers(2, 4),
)
def test_stages_are_those_of_torch(pp: int, schedule: str, virtual: int) -> None:
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    interleaved = schedule == "Interleaved1F1B"
    model = piped(pp, schedule, virtual_pipeline_model_parallel_size=virtual if interleaved else 1)
    style = "v" if schedule in ("ZBVZeroBubble", "DualPipeV") else "loop"
    count = num_stages(model)
    assert count == pp * {"GPipe": 1, "Interleaved1F1B": virtual}.get(schedule, 2)
    expected = generate_stage_to_rank_mapping(pp, count, style=style)
    assert {stage: stage_rank(model, stage) for stage in range(count)} == expected


def test_first_and_last_stage() -> None:
    assert split_layers(piped(1, num_hidden_layers=3)) == [StageSlice(range(3), True, OUTPUT)]
    model = piped(3, num_hidden_layers=6, pipeline_layers_per_stage=[1, 3, 2])
    assert split_layers(model) == [
        StageSlice(range(0, 1), True, range(0)),
        StageSlice(range(1, 4), False, range(0)),
        StageSlice(range(4, 6), False, OUTPUT),
    ]


# -- the split by cost --


def splits(count: int, stages: int) -> list[list[int]]:
    """All ways to cut ``count`` layers into groups of at least one."""
    found = []
    for cuts in itertools.combinations(range(1, count), stages - 1):
        edges = [0, *cuts, count]
        found.append([end - start for start, end in itertools.pairwise(edges)])
    return found


def sums(costs: list[int], last: int, sizes: list[int]) -> list[int]:
    edges = [0, *itertools.accumulate(sizes)]
    found = [sum(costs[start:end]) for start, end in itertools.pairwise(edges)]
    found[-1] += last
    return found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 30), st.data())
def test_the_split_is_the_best_of_all(costs: list[int], last: int, data: st.DataObject) -> None:
    """Least bottleneck, then evenness, then small early stages."""
    stages = data.draw(st.integers(1, len(costs)))

    def rank(sizes: list[int]) -> tuple[int, int, list[int]]:
        work = sums(costs, last, sizes)
        return max(work), sum(w * w for w in work), sizes

    assert balanced_sizes(costs, last, stages) == min(splits(len(costs), stages), key=rank)


def loads(model: ModelConfig) -> list[int]:
    """Work of each rank of a pipeline."""
    found = [0] * model.pipeline_model_parallel_size
    for stage, cost in enumerate(stage_costs(model)):
        found[stage_rank(model, stage)] += cost
    return found


def v3(pp: int, schedule: str, over: int = 1) -> ModelConfig:
    return replace(
        load_config("deepseek_v3_671b").model,
        pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
        virtual_pipeline_model_parallel_size=2 if schedule.startswith("Interleaved") else 1,
        pipeline_output_stages=over,
    )


@pytest.mark.parametrize(
    ("pp", "schedule", "over", "before", "idle"),
    [
        (8, "ZBVZeroBubble", 3, 9.2, 3.3),
        (16, "ZBVZeroBubble", 3, 17.8, 7.6),
        (16, "DualPipeV", 3, 17.8, 7.6),
        (16, "Interleaved1F1B", 3, 17.8, 7.6),
        (16, "InterleavedZeroBubble", 3, 17.8, 7.6),
        # Stages in a row: 61 whole blocks are one more than 15 ranks with 4 have.
        (16, "1F1B", 1, 17.8, 17.8),
        (24, "1F1B", 2, 31.3, 9.9),
        (32, "1F1B", 2, 48.4, 20.2),
    ],
)
def test_the_output_of_v3_is_shared(
    pp: int, schedule: str, over: int, before: float, idle: float
) -> None:
    """Per cent of the time that ranks wait for the costliest: with the output on the last stage,
    and with head, MTP and MTP's head, 1.4, 1.2 and 1.4 blocks, where they cost least."""

    def waits(over: int) -> float:
        found = loads(v3(pp, schedule, over))
        return 100 * (1 - sum(found) / len(found) / max(found))

    assert before - 0.2 < waits(1) <= before
    assert idle - 0.2 < waits(over) <= idle
    parts = split_layers(v3(pp, schedule, over))
    assert sum(bool(part.output) for part in parts) == over
    assert [index for part in parts for index in part.output] == [*OUTPUT]
    assert [i for part in parts for i in part.layers] == list(range(61))
    assert all(part.layers for part in parts[:-over])


def test_equal_layers_without_a_head_are_shared_evenly() -> None:
    assert balanced_sizes([5] * 12, 0, 4) == [3, 3, 3, 3]
    assert balanced_sizes([5] * 10, 0, 4) == [2, 2, 3, 3]
    assert balanced_sizes([5] * 4, 100, 4) == [1, 1, 1, 1]


def test_costs_are_the_products_of_a_token() -> None:
    """D 4, N 2, latents 3 and 2: counted by hand."""
    model = ModelConfig(
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=2,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=3,
        intermediate_size=7,
        moe_intermediate_size=5,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        vocab_size=11,
        data=DataConfig(seq_length=6),
    )
    projections = 2 * 5 * 4 + (2 + 2) * 4 + 2 * 6 * 2 + 4 * 6 + 2  # wq, wkv_a, wkv_b, wo, norm
    attention = projections + 6 * 2 * (5 + 3) // 2
    dense, moe = 3 * 4 * 7, 3 * 3 * 4 * 5
    assert layer_costs(model) == [attention + dense, attention + moe]
    head = 11 * 4
    assert sum(output_costs(model)) == head + head + 2 * 4 * 4 + attention + moe
    dense_only = replace(model, first_k_dense_replace=2)  # an MTP module has experts all the same
    assert sum(output_costs(dense_only)) == head + head + 2 * 4 * 4 + attention + moe
