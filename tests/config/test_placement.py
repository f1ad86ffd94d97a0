"""The tables of ``deepseek validate``: against ranks counted one by one, and built models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import pytest
import torch
from omegaconf import OmegaConf

from deepseek.config import RunConfig, load_config
from deepseek.config.cost import count_parameters, state_memory
from deepseek.config.layout import Layout, split_layers, stages_of_rank
from deepseek.config.placement import (
    Table,
    axes,
    gathered_bytes,
    kept_shape,
    placement_notes,
    placement_tables,
    rank_memory,
    ranks_text,
    reshards,
    stage_weights,
)
from deepseek.models.transformer import Transformer

SMALL = [
    "model.num_hidden_layers=6",
    "model.global_batch_size=48",
    "model.micro_batch_size=1",
]


def run_of(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    run = OmegaConf.to_object(load_config(name, overrides))
    assert isinstance(run, RunConfig)
    return run


def small(
    world: int, nodes: int = 1, tp: int = 1, pp: int = 1, ep: int = 1, *more: str
) -> RunConfig:
    layout = [
        f"trainer.devices={world // nodes}",
        f"trainer.num_nodes={nodes}",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"model.expert_model_parallel_size={ep}",
    ]
    return run_of("deepseek_v3_tiny", [*SMALL, *layout, *more])


WORLDS = [
    small(2, ep=2),
    small(8, tp=2, ep=4),
    small(8, 1, 2, 2, 4, "model.data_parallel_replicate_size=1"),
    small(16, 4, 2, 2, 2, "model.data_parallel_replicate_size=2"),
    small(8, 2, 1, 4, 2, "model.pipeline_schedule=GPipe"),
    small(4, 1, 1, 2, 2, "model.pipeline_schedule=DualPipeV"),
    small(4, 1, 1, 2, 2, "model.optim.name=muon", "model.num_nextn_predict_layers=2"),
    small(3),
]


@pytest.mark.parametrize("run", WORLDS)
def test_groups_are_those_of_the_places(run: RunConfig) -> None:
    layout, node = Layout.of_run(run), run.trainer.devices
    places = [layout.place(rank) for rank in range(layout.world_size)]
    names = {
        "PP": ("pp", "dense"),
        "replicas": ("dp_replicate", "dense"),
        "data shards": ("dp_shard", "dense"),
        "TP": ("tp", "dense"),
        "EP": ("ep", "sparse"),
        "expert shards": ("edp", "sparse"),
    }
    views = {
        "dense": ("pp", "dp_replicate", "dp_shard", "tp"),
        "sparse": ("pp", "dp_replicate", "edp", "ep"),
    }
    for axis in axes(layout):
        field, view = names[axis.name]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            others = tuple(getattr(place, name) for name in views[view] if name != field)
            groups.setdefault(others, []).append(rank)
        found = [list(group) for group in axis.groups(layout.world_size)]
        assert sorted(found) == sorted(groups.values()), axis
        crosses = any(len({rank // node for rank in group}) > 1 for group in found)
        assert axis.crosses_nodes(layout.world_size, node) == crosses, axis


@pytest.mark.parametrize("run", WORLDS)
def test_weights_of_the_stages_are_those_of_the_model(run: RunConfig) -> None:
    """Names and shapes of a built model; the last of several stages has a copy of the embedding."""
    parts = split_layers(run.model)
    for part in parts:
        with torch.device("meta"):
            model = Transformer(run.model, [part])
        built = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        assert {name: weight.shape for name, weight in stage_weights(run.model, part)} == built
    names = [name for part in parts for name, _ in stage_weights(run.model, part)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("run", WORLDS)
def test_all_ranks_together_hold_everything(run: RunConfig) -> None:
    """Parts of equal size times the ranks that hold different ones: at least the whole weight, and
    exactly where it divides."""
    layout = Layout.of_run(run)
    for part in split_layers(run.model):
        for name, weight in stage_weights(run.model, part):
            kept = math.prod(kept_shape(weight, layout))
            if weight.routed:
                holders = layout.edp * layout.ep
            else:
                holders = layout.dp_shard * (layout.tp if weight.tp_dim is not None else 1)
            whole = math.prod(weight.shape)
            assert whole <= kept * holders < whole + holders * max(weight.shape) ** 2, name
            if whole % holders == 0 and weight.shape[0] % holders == 0:
                assert kept * holders == whole, name


@pytest.mark.parametrize("run", WORLDS)
def test_memory_of_one_process_is_that_of_the_model(run: RunConfig) -> None:
    """Over one rank the states are those that ``counts.py`` finds on another way."""
    model, alone = run.model, Layout()
    model.pipeline_model_parallel_size, model.pipeline_layers_per_stage = 1, None
    for optimizer in ("adamw", "muon"):
        memory = rank_memory(model, alone, 0, optimizer)
        assert memory.parameters == count_parameters(model).trained
        assert memory.total == state_memory(model, optimizer).total


def test_memory_of_a_rank_counted_by_hand() -> None:
    """Each parameter of a built stage, divided as the layout says."""
    run = small(8, 1, 2, 2, 4)
    layout = Layout.of_run(run)  # 2 data shards, 1 expert shard
    parts = split_layers(run.model)
    for pp in range(2):
        expected = 0
        for stage in stages_of_rank(run.model, pp):
            with torch.device("meta"):
                model = Transformer(run.model, [parts[stage]])
            for name, weight in model.named_parameters():
                split_by_tp = name.split(".")[-2] in (
                    "embed mtp_embed head wq_b wkv_b wo w1 w2 w3".split()
                )
                if ".experts." in name:
                    expected += weight.numel() // 4
                elif split_by_tp:
                    expected += weight.numel() // 2 // 2
                else:
                    expected += -(-weight.shape[0] // 2) * weight[0].numel()
        assert rank_memory(run.model, layout, pp).parameters == expected


# -- what is printed --


def tables_of(run: RunConfig) -> dict[str, Table]:
    return {table.title.split(":")[0]: table for table in placement_tables(run)}


def test_the_tables_of_8_ranks_by_hand() -> None:
    run = small(8, 2, 2, 2, 4, "model.pipeline_layers_per_stage=[4, 2]")
    groups, stages, experts, weights, memory = placement_tables(run)
    assert groups.title == "8 ranks on 2 nodes of 4"
    assert list(groups.rows) == [
        ("PP", "2", "4", "0, 4", "yes"),
        ("data shards", "2", "4", "0, 2", "no"),
        ("TP", "2", "4", "0-1", "no"),
        ("EP", "4", "2", "0-3", "no"),
    ]
    assert stages.title == "2 pipeline stages (1F1B)"
    assert [row[:4] for row in stages.rows] == [
        ("0", "0-3 (1 dense, 3 MoE)", "embedding", "0-3 (PP 0)"),
        ("1", "4-5 (2 MoE)", "norm, head, MTP, a copy of the embedding", "4-7 (PP 1)"),
    ]
    assert list(experts.rows) == [
        ("0-3", "0", "0, 4"),
        ("4-7", "1", "1, 5"),
        ("8-11", "2", "2, 6"),
        ("12-15", "3", "3, 7"),
    ]
    shapes = {row[0]: row[1:] for row in weights.rows}
    assert shapes["embed.weight"] == ("4096 x 256", "2048 x 256", "1024 x 256")
    assert shapes["attn.wq_a.weight"] == ("96 x 256", "96 x 256", "48 x 256")
    assert shapes["attn.wq_b.weight"] == ("384 x 96", "192 x 96", "96 x 96")
    assert shapes["attn.wo.weight"] == ("256 x 256", "256 x 128", "128 x 128")
    assert shapes["ffn.experts.w2"] == ("16 x 256 x 128", "4 x 256 x 128", "4 x 256 x 128")
    assert shapes["eh_proj.weight"] == ("256 x 512", "256 x 512", "128 x 512")
    assert [row[0] for row in memory.rows] == ["0-3", "4-7"]
    layout = Layout.of_run(run)
    for pp, row in enumerate(memory.rows):
        assert row[1] == f"{rank_memory(run.model, layout, pp).parameters:,}"
    assert placement_notes(run) == []


def test_a_v_schedule_puts_both_ends_on_the_first_ranks() -> None:
    run = small(4, 1, 1, 2, 1, "model.pipeline_schedule=DualPipeV")
    rows = placement_tables(run)[1].rows
    assert [row[3] for row in rows] == ["0-1 (PP 0)", "2-3 (PP 1)", "2-3 (PP 1)", "0-1 (PP 0)"]
    assert rows[0][2] == "embedding" and rows[3][2].startswith("norm, head")


def test_groups_wider_than_a_node_are_noted() -> None:
    assert placement_notes(small(4, nodes=4, ep=4)) == [
        "EP 4 is wider than a node of 1: tokens of every layer travel between nodes"
    ]
    assert placement_notes(small(4, nodes=4, tp=2)) == [
        "TP 2 is wider than a node of 1: activations of every layer travel between nodes"
    ]
    assert placement_notes(small(12, nodes=2, ep=4, pp=3)) == [
        "EP 4 does not divide a node of 6: tokens of every layer travel between nodes"
    ]
    assert placement_notes(small(8, nodes=2, ep=4)) == []


def test_v3_on_2048_ranks_in_less_than_a_second() -> None:
    run = run_of("deepseek_v3_671b")
    start = time.process_time()  # this process's own: a neighbour takes none of it
    tables = tables_of(run)
    notes = placement_notes(run)
    assert time.process_time() - start < 3  # one second where nothing else runs
    assert "2,048 ranks on 256 nodes of 8" in tables
    assert notes == ["EP 64 is wider than a node of 8: tokens of every layer travel between nodes"]
    experts = tables["experts of the MoE layers, on the ranks that hold the layer"].rows
    assert len(experts) == 17 and experts[8][0] == "... 48 more"
    assert experts[0] == ("0-3", "0", "0, 64, ..., 1984")
    assert experts[-1] == ("252-255", "63", "63, 127, ..., 2047")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (range(3, 4), "3"),
        (range(0, 8, 8), "0"),
        (range(16), "0-15"),
        (range(0, 32, 8), "0, 8, 16, 24"),
        (range(1, 41, 8), "1, 9, ..., 33"),
    ],
)
def test_ranks_as_text(numbers: range, text: str) -> None:
    assert ranks_text(numbers) == text


def test_weights_gathered_from_data_parallel_ranks() -> None:
    run = small(4, ep=2)
    layout, counts = Layout.of_run(run), count_parameters(run.model)
    moe_layers = run.model.num_moe_layers + run.model.num_nextn_predict_layers
    routed = moe_layers * run.model.n_routed_experts * counts.expert
    assert gathered_bytes(run.model, layout) == 4 * (counts.stored - routed // 2)
    assert not reshards(run.model, layout)
    apart = small(4, ep=4)  # a rank has its experts in whole, and gathers the rest
    gathered = gathered_bytes(apart.model, Layout.of_run(apart))
    assert gathered == 4 * (counts.stored - routed)
    titles = [table.title for table in placement_tables(run)]
    assert any("(kept in a step: " in title for title in titles)


def test_larger_models_gather_anew_unless_there_is_a_pipeline() -> None:
    large = ["model.hidden_size=4096", "model.vocab_size=65536"]  # 2 x 1 GiB of embedding and head
    one, stages = small(2, 1, 1, 1, 1, *large), small(4, 1, 1, 2, 1, *large)
    assert reshards(one.model, Layout.of_run(one))
    assert not reshards(stages.model, Layout.of_run(stages))
    assert not any("kept in a step" in table.title for table in placement_tables(one))
    one.model.reshard_after_forward = False
    assert not reshards(one.model, Layout.of_run(one))
