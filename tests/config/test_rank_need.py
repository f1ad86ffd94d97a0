"""What a rank needs, against every tensor of a fake step, and against torch's own schedules."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import _Action, _ComputationType

from deepseek.config import cost, load_config
from deepseek.config.cost import in_flight, rank_need, reduces_gradients
from deepseek.config.layout import Layout, split_layers, stage_rank, stages_of_rank
from deepseek.config.schema import ModelConfig
from deepseek.parallel.pipeline import SCHEDULES
from support.live_bytes import stage_bytes
from support.tiny_runs import small_run

V3 = load_config("deepseek_v3_671b").model


def assert_near(model: ModelConfig, layout: Layout, stage: int, half: bool) -> None:
    """Of two micro-batches in flight: all bytes within 5 %, activations alone within 15 %."""
    part = split_layers(model)[stage]
    tracked, most = stage_bytes(model, layout, part, 2, half)
    need = rank_need(model, layout, stage_rank(model, stage), 16, half)
    # The input of a later stage is what it has received, which is counted for all micro-batches.
    received = 4 * model.micro_batch_size * model.data.seq_length * model.hidden_size
    waiting = in_flight(model, stage_rank(model, stage), 16)[stage]
    kept = need.activations // waiting + (0 if part.first else received)
    told = 2 * kept + need.working
    assert kept == pytest.approx(tracked, rel=0.05)
    assert told == pytest.approx(most, rel=0.15)
    states = need.states + need.gathered + need.gradients
    assert states + told == pytest.approx(states + most, rel=0.05)


@pytest.mark.parametrize(("stage", "recomputed"), [(0, None), (1, "full"), (15, "full")])
def test_v3_on_2048_ranks(stage: int, recomputed: str | None) -> None:
    model = replace(V3, activations_checkpoint_granularity=recomputed)
    assert_near(model, Layout.of(model, 2048), stage, half=True)


@pytest.mark.parametrize(
    "name", ["deepseek_v3_base", "deepseek_v3_2gpu", "deepseek_v3_distributed", "moonlight_16b"]
)
def test_shipped_layout(name: str) -> None:
    """Those without tensor parallelism; six blocks of them, which is what differs."""
    run = load_config(name)
    model = replace(run.model, num_hidden_layers=min(6, run.model.num_hidden_layers))
    assert_near(model, Layout.of_run(run), 0, half=True)


def drawn(seed: int) -> tuple[ModelConfig, Layout, bool]:
    among = random.Random(seed).choice
    dim = among((1024, 2048, 4096))
    model = replace(
        V3,
        hidden_size=dim,
        num_attention_heads=among((8, 16, 32)),
        q_lora_rank=among((None, 512, 1536)),
        kv_lora_rank=among((256, 512)),
        intermediate_size=among((2, 4)) * dim,
        moe_intermediate_size=among((512, 1024, 1408)),
        n_routed_experts=among((16, 64, 128)),
        n_group=1,
        topk_group=1,
        num_experts_per_tok=among((2, 6, 8)),
        n_shared_experts=among((0, 1, 2)),
        num_hidden_layers=4,
        first_k_dense_replace=among((1, 3)),
        num_nextn_predict_layers=among((0, 1, 2)),
        vocab_size=among((32000, 129280)),
        micro_batch_size=among((1, 2, 4)),
        activations_checkpoint_granularity=among((None, "full")),
        pipeline_model_parallel_size=2,
        data=replace(V3.data, seq_length=among((2048, 4096, 8192))),
    )
    return model, Layout(pp=2, dp_shard=8, ep=among((1, 8))), among((True, True, False))


@pytest.mark.parametrize("seed", range(6))
def test_drawn_layout(seed: int) -> None:
    model, layout, half = drawn(seed)
    for stage in range(2):
        assert_near(model, layout, stage, half)


# -- micro-batches in flight --


def torchs_order(model: ModelConfig, pp_rank: int, micro_batches: int) -> dict[int, int]:
    """Counted in torch's own schedule, when the rank holds most."""
    pp = model.pipeline_model_parallel_size
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=pp * len(stages_of_rank(model, 0)),
            group_size=pp,
            group_rank=0,
            is_first=index == 0,
            is_last=False,
            has_backward=True,
            submod=torch.nn.Linear(1, 1),
        )
        for index in stages_of_rank(model, 0)
    ]
    schedule: Any = SCHEDULES[model.pipeline_schedule]
    made = schedule(stages, micro_batches, loss_fn=lambda output, target: output)
    live, most = dict.fromkeys(stages_of_rank(model, pp_rank), 0), 0
    best = dict(live)
    for action in filter(None, made.pipeline_order[pp_rank]):
        steps: tuple[_Action, ...] = action.sub_actions or (action,)
        for step in steps:
            if step.computation_type == _ComputationType.FORWARD:
                live[step.stage_index] += 1
            elif step.computation_type in (
                _ComputationType.FULL_BACKWARD,
                _ComputationType.BACKWARD_WEIGHT,
            ):
                live[step.stage_index] -= 1
        if sum(live.values()) > most:
            most, best = sum(live.values()), dict(live)
    return best


@pytest.mark.parametrize(
    ("schedule", "virtual"),
    [
        ("Interleaved1F1B", 2),
        ("Interleaved1F1B", 3),
        ("InterleavedZeroBubble", 2),
        ("ZBVZeroBubble", 1),
        ("DualPipeV", 1),
    ],
)
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 8), (4, 8), (4, 16), (8, 32)])
def test_micro_batches_in_flight(schedule: str, virtual: int, pp: int, micro_batches: int) -> None:
    model = replace(
        V3,
        pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
        virtual_pipeline_model_parallel_size=virtual,
    )
    for rank in range(pp):
        assert in_flight(model, rank, micro_batches) == torchs_order(model, rank, micro_batches)


def test_of_one_stage_a_rank() -> None:
    """1F1B fills the pipeline, GPipe waits for all."""
    model = replace(V3, pipeline_model_parallel_size=4)
    assert [in_flight(model, rank, 8) for rank in range(4)] == [{0: 4}, {1: 3}, {2: 2}, {3: 1}]
    assert in_flight(model, 0, 2) == {0: 2}
    model = replace(model, pipeline_schedule="GPipe")
    assert [in_flight(model, rank, 8) for rank in range(4)] == [{0: 8}, {1: 8}, {2: 8}, {3: 8}]
    assert in_flight(replace(V3, pipeline_model_parallel_size=1), 0, 8) == {0: 1}


# -- gradients --


def test_gradients_are_counted_as_they_are_held() -> None:
    """Whole between micro-batches, or those of this rank and of the two largest units."""
    run = small_run(2)
    layout = Layout.of_run(run)
    told = {
        choice: rank_need(
            replace(run.model, reduce_gradients=choice), layout, 0, micro_batches=8, half=False
        ).gradients
        for choice in (None, True, False)
    }
    numbers = rank_need(replace(run.model), Layout(), 0, 8, half=False).gradients // 4
    assert told[None] == told[False] == 4 * numbers
    assert 2 * numbers < told[True] < 4 * numbers
    one = rank_need(replace(run.model, reduce_gradients=False), layout, 0, 1, half=False)
    assert one.gradients == told[True], "nothing is held between micro-batches if there is one"


def test_large_gradients_are_divided_after_each_micro_batch() -> None:
    large = ["model.hidden_size=4096", "model.vocab_size=65536"]
    run = small_run(2, 1, 1, 1, 1, *large)
    assert reduces_gradients(run.model, Layout.of_run(run))
    stages = small_run(4, 1, 1, 2, 1, *large)
    assert not reduces_gradients(stages.model, Layout.of_run(stages))
    assert not reduces_gradients(small_run(2).model, Layout(dp_shard=2))


# -- a search over layouts --


def test_a_search_counts_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other batches, schedules, policies and places of the same layout list no weight again."""
    layout = Layout.of(V3, 2048)
    expected = rank_need(V3, layout, 3, 16, half=True)
    for name in ("model_weights", "block_weights", "kept_shape"):
        monkeypatch.setattr(cost, name, None)
    assert rank_need(replace(V3), layout, 3, 16, half=True) == expected
    for changed in (
        replace(V3, micro_batch_size=2),
        replace(V3, activations_checkpoint_granularity=None),
        replace(V3, pipeline_schedule="DualPipeV", num_nextn_predict_layers=1),
    ):
        for pp_rank in range(16):
            assert rank_need(changed, layout, pp_rank, 16, half=True).total > expected.states
