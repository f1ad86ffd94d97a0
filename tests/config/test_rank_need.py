"""What a rank needs, against every tensor of a fake step, and against torch's own schedules."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining.schedules import _Action, _ComputationType

from deepseek.config import load_config, memory, shipped_configs
from deepseek.config.activations import in_flight, interleaved_order
from deepseek.config.errors import UserError
from deepseek.config.layout import V_SCHEDULES, Layout, stages_of_rank
from deepseek.config.memory import in_half, reduces_gradients
from deepseek.config.rank_need import host_need, rank_need
from deepseek.config.schema import ModelConfig, PeftConfig, RunConfig
from deepseek.parallel.pipeline import SCHEDULES
from support.live_bytes import StepBytes, step_bytes
from support.tiny_runs import small_run

V3 = load_config("deepseek_v3_671b").model


def assert_near(
    model: ModelConfig, layout: Layout, ranks: Iterable[int], micro_batches: int, half: bool
) -> None:
    """Of whole steps of ranks of the pipeline: told is within 5 % of what is tracked."""
    for pp_rank in ranks:
        tracked = tracked_bytes(model, layout, pp_rank, micro_batches, half).device
        need = rank_need(model, layout, pp_rank, micro_batches, half)
        assert 0.95 < need.total / tracked < 1.05, (pp_rank, layout, need, tracked)


def tracked_bytes(
    model: ModelConfig, layout: Layout, pp_rank: int, micro_batches: int, half: bool
) -> StepBytes:
    """In a process of its own: torch remembers by mesh what a rank holds.

    Of ranks that share a sequence the last, whose keys and values are the longest.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
        rank = pp_rank * layout.stage_ranks + (layout.cp - 1) * layout.tp
        return process.submit(step_bytes, model, layout, rank, micro_batches, half).result()


@pytest.mark.nightly
@pytest.mark.parametrize("schedule", ["1F1B", "DualPipeV"])
@pytest.mark.parametrize("pp_rank", [0, 7, 15])
def test_v3_on_2048_ranks(schedule: str, pp_rank: int) -> None:
    """The whole step of a rank of 671B, with every micro-batch that is ever under way."""
    micro_batches = 17 if schedule == "1F1B" else 32
    model = replace(V3, pipeline_schedule=schedule)
    assert_near(model, Layout.of(model, 2048), [pp_rank], micro_batches, half=True)


@pytest.mark.nightly
@pytest.mark.parametrize(("length", "tp"), [(32768, 1), (131072, 1), (131072, 2)])
@pytest.mark.parametrize("pp_rank", [0, 7, 15])
def test_v3_on_long_sequences(length: int, tp: int, pp_rank: int) -> None:
    """Over 8 context ranks, every micro-batch that is ever under way: a GPU of 80 GB has room."""
    sizes = dict(context_parallel_size=8, tensor_model_parallel_size=tp)
    model = replace(V3, data=replace(V3.data, seq_length=length), **sizes)
    layout = Layout.of(model, 2048)
    assert_near(model, layout, [pp_rank], 17, half=True)
    assert max(rank_need(model, layout, pp, 60, half=True).total for pp in range(16)) < 70e9


def test_a_slice_of_v3() -> None:
    """V3's widths in two stages of 128 ranks, the last with head and MTP."""
    model = replace(V3, pipeline_model_parallel_size=2, num_hidden_layers=4)
    assert_near(model, Layout.of(model, 256), [1], 2, half=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_layout(name: str) -> None:
    """Every one of one stage in a step of two micro-batches, of several with as many as stages."""
    run = load_config(name)
    layout = Layout.of_run(run)
    half = run.trainer.precision == "bf16-mixed"
    assert_near(run.model, layout, {0, layout.pp - 1}, max(2, 2 * layout.pp), half)


def drawn(seed: int) -> tuple[ModelConfig, Layout, int, bool]:
    """A model in a layout, the micro-batches of a step, and whether products are in bf16."""
    among = random.Random(seed).choice
    dim, pp, tp = among((1024, 2048)), among((1, 1, 2, 4)), among((1, 1, 2, 4))
    schedule = among(list(SCHEDULES)) if pp > 1 else "1F1B"
    held = 1 if schedule in ("1F1B", "GPipe") else 2
    peft = PeftConfig(dim=16, target_modules=["attention", "feed_forward", "experts"])
    adapted = among((True, False, False, False))
    model = replace(
        V3,
        hidden_size=dim,
        num_attention_heads=among((8, 16)),
        q_lora_rank=among((None, 512)),
        kv_lora_rank=256,
        intermediate_size=4 * dim,
        moe_intermediate_size=among((512, 1024)),
        n_routed_experts=among((16, 64)),
        n_group=1,
        topk_group=1,
        num_experts_per_tok=among((2, 6, 8)),
        n_shared_experts=among((0, 1, 2)),
        num_hidden_layers=max(3, among((1, 2)) * pp * held),
        first_k_dense_replace=1,
        num_nextn_predict_layers=0 if adapted else among((0, 1, 2)),
        vocab_size=among((32000, 128000)),
        micro_batch_size=among((1, 2)),
        activations_checkpoint_granularity=among((None, "full")),
        pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
        virtual_pipeline_model_parallel_size=2 if schedule.startswith("Interleaved") else 1,
        tensor_model_parallel_size=tp,
        context_parallel_size=among((1, 1, 1, 2)),
        expert_model_parallel_size=among((1, 4, 8)),
        data_parallel_replicate_size=among((1, 2)),
        reduce_gradients=among((None, True, False)) if pp == 1 else None,
        data=replace(V3.data, seq_length=among((2048, 4096))),
        peft=peft if adapted else None,
    )
    layout = Layout.of(model, 8 * pp * tp * model.data_parallel_replicate_size)
    return model, layout, 2 * pp, among((True, True, False))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12))
def test_drawn_layout(seed: int) -> None:
    model, layout, micro_batches, half = drawn(seed)
    assert_near(model, layout, {0, layout.pp // 2, layout.pp - 1}, micro_batches, half)


def drawn_run(seed: int) -> tuple[RunConfig, int]:
    """A run that the rules allow, of all that changes memory, and the micro-batches of a step."""
    among: Any = random.Random(seed).choice
    kind = among(("moe", "moe", "moe", "small experts", "dense"))
    peft = among((None, None, None, None, "lora", "nf4", "fp8"))
    while True:
        pp, tp, cp = among((1, 1, 2, 4)), among((1, 1, 2)), among((1, 1, 1, 2, 4))
        schedule = among(list(SCHEDULES)) if pp > 1 else "1F1B"
        virtual = among((2, 3)) if schedule.startswith("Interleaved") else 1
        stages = pp * (2 if schedule in V_SCHEDULES else virtual)
        dim = among((768, 1024, 2048, 2560))
        layers = max(3, stages + among((0, 1, 3, stages)))
        recompute = among((None, "full", "selective"))
        small, dense = kind == "small experts", kind == "dense"
        replicas = among((1, 1, 2))
        shards = among((1, 2, 4, 8)) * replicas * cp
        world = pp * tp * shards
        size = among((1, 2))
        micro_batches = (
            2 * pp * (among((1, 2)) if virtual > 1 else 1) if pp > 1 else among((1, 2, 3))
        )
        values: dict[str, Any] = {
            "hidden_size": dim,
            "num_hidden_layers": layers,
            "num_attention_heads": among((8, 16)),
            "q_lora_rank": among((None, 384, 768)),
            "kv_lora_rank": among((256, 512)),
            "qk_nope_head_dim": among((64, 128)),
            "qk_rope_head_dim": among((32, 64)),
            "v_head_dim": among((64, 128)),
            "intermediate_size": among((2, 3, 4)) * dim,
            "moe_intermediate_size": among((256, 384) if small else (768, 1024, 1408)),
            "n_routed_experts": among((64, 128, 160) if small else (8, 16, 32)),
            "num_experts_per_tok": among((6, 8) if small else (2, 4)),
            "n_shared_experts": among((0, 1, 2)),
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": layers if dense else among((0, 1, 2)),
            "num_nextn_predict_layers": 0 if peft or dense else among((0, 1, 2)),
            "vocab_size": among((32000, 64000, 129280)),
            "max_position_embeddings": 8192,
            "data.seq_length": among((2048, 4096, 8192)),
            "micro_batch_size": size,
            "global_batch_size": micro_batches * size * (shards // cp),
            "activations_checkpoint_granularity": recompute,
            "activations_checkpoint_num_layers": among((None, None, 1)) if recompute else None,
            "cpu_offloading_activations": among((False, False, False, True)),
            "fp8_recipe": None if peft else among((None, None, None, "blockwise")),
            "pipeline_model_parallel_size": pp,
            "pipeline_schedule": schedule,
            "virtual_pipeline_model_parallel_size": virtual,
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp,
            "expert_model_parallel_size": 1 if dense else among((1, 2, 4, 8)),
            "data_parallel_replicate_size": replicas,
            "reduce_gradients": among((None, True, False)) if pp == 1 else None,
            "reshard_after_forward": among((None, None, True, False) if pp == 1 else (None, False)),
            "optim.name": among(("adamw", "adamw", "muon")),
            "optim.moments_dtype": among(("fp32", "fp32", "bf16")),
        }
        if peft or dense:
            values |= {"moe_router_bias_update_rate": 0.0}
        if dense:
            values |= {"moe_aux_loss_coeff": 0.0}
        overrides = [f"model.{key}={'null' if v is None else v}" for key, v in values.items()]
        devices = f"trainer.devices={min(world, 8)}", f"trainer.num_nodes={max(1, world // 8)}"
        precision = f"trainer.precision={among(('bf16-mixed', 'bf16-mixed', '32'))}"
        try:
            run = load_config("deepseek_v3_671b", [*overrides, *devices, precision])
        except UserError:
            continue
        if peft:
            groups = ["attention", "feed_forward", *among(([], ["experts"]))]
            base = None if peft == "lora" else peft
            adapters = PeftConfig(dim=8, target_modules=groups, base_dtype=base)
            run = replace(run, model=replace(run.model, peft=adapters))
        return run, micro_batches


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12))
def test_drawn_run(seed: int) -> None:
    run, micro_batches = drawn_run(seed)
    layout = Layout.of_run(run)
    ranks = {0, layout.pp // 2, layout.pp - 1}
    assert_near(run.model, layout, ranks, micro_batches, in_half(run))


def test_a_split_backward_pass_recomputes_once() -> None:
    """DualPipeV: nothing that was recomputed for the inputs waits for the weights' turn."""
    model, *_ = drawn(0)
    model = replace(
        model,
        activations_checkpoint_granularity="full",
        pipeline_model_parallel_size=2,
        tensor_model_parallel_size=1,
        pipeline_schedule="DualPipeV",
        virtual_pipeline_model_parallel_size=1,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
        n_shared_experts=1,
        expert_model_parallel_size=4,
    )
    assert_near(model, Layout.of(model, 16), [0], 4, half=True)


SMALL = replace(
    V3,
    hidden_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=128,
    intermediate_size=1024,
    moe_intermediate_size=256,
    n_routed_experts=8,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    vocab_size=2048,
    pipeline_model_parallel_size=1,
    expert_model_parallel_size=1,
    data=replace(V3.data, seq_length=4096),
)
ADAPTERS = PeftConfig(dim=8, target_modules=["attention", "feed_forward", "experts"])
TERMS: dict[str, tuple[dict[str, Any], bool]] = {
    "rows travel beside the shared experts of all TP ranks": (
        dict(
            tensor_model_parallel_size=2, expert_model_parallel_size=4, first_k_dense_replace=0,
            num_experts_per_tok=6, n_shared_experts=2, reduce_gradients=False,
        ),
        True,
    ),
    "the first stage's embedding has its gradient made": (
        dict(pipeline_model_parallel_size=2, vocab_size=65536), True,
    ),
    "rows travel in FP8": (
        dict(expert_model_parallel_size=8, moe_dispatch_fp8=True, first_k_dense_replace=0), True,
    ),
    "rows go to machines first, and are added up there": (
        dict(expert_model_parallel_size=8, moe_ranks_per_node=2, first_k_dense_replace=0), True,
    ),
    "two passes go on in turn": (
        dict(
            pipeline_model_parallel_size=2, pipeline_schedule="DualPipeV", num_hidden_layers=8,
            overlap_moe_expert_parallel_comm=True, expert_model_parallel_size=4,
            first_k_dense_replace=0, activations_checkpoint_granularity=None,
        ),
        True,
    ),
    "before the first stage of a V goes back there is no gradient of its embedding": (
        dict(
            pipeline_model_parallel_size=2, pipeline_schedule="DualPipeV", num_hidden_layers=4,
            vocab_size=65536,
        ),
        True,
    ),
    "the first stage under zero bubble has the gradients of all others": (
        dict(
            pipeline_model_parallel_size=2, pipeline_schedule="InterleavedZeroBubble",
            virtual_pipeline_model_parallel_size=2, num_hidden_layers=4, vocab_size=65536,
            first_k_dense_replace=0, data=replace(V3.data, seq_length=512),
        ),
        False,
    ),
    "the second micro-batch's embedding goes back beside the first one's gradient": (
        dict(
            pipeline_model_parallel_size=2, pipeline_schedule="GPipe", vocab_size=65536,
            hidden_size=1024, data=replace(V3.data, seq_length=1024), num_hidden_layers=4,
            activations_checkpoint_granularity=None,
        ),
        False,
    ),
    "MTP is made again to its end": (
        dict(
            num_nextn_predict_layers=1, expert_model_parallel_size=8, n_shared_experts=0,
            num_experts_per_tok=6,
        ),
        False,
    ),
    "what two look-ups have made is added up": (
        dict(
            num_nextn_predict_layers=1, vocab_size=65536, reduce_gradients=True,
            data=replace(V3.data, seq_length=512),
        ),
        False,
    ),
    "a chunk of logits is gone when the next is made": (
        dict(peft=ADAPTERS, vocab_size=131072, data=replace(V3.data, seq_length=1024)), True,
    ),
    "frozen experts have no scaled gradient of an adapter's": (
        dict(
            peft=replace(ADAPTERS, target_modules=["attention", "feed_forward"]),
            expert_model_parallel_size=2, first_k_dense_replace=0, n_shared_experts=0,
        ),
        False,
    ),
    "experts with adapters go forward": (
        dict(
            peft=ADAPTERS, expert_model_parallel_size=2, first_k_dense_replace=0,
            reshard_after_forward=True,
        ),
        True,
    ),
    "the weights' pass of adapters waits for gradients of gathered experts": (
        dict(
            peft=ADAPTERS, expert_model_parallel_size=2, first_k_dense_replace=0,
            pipeline_model_parallel_size=2, pipeline_schedule="ZBVZeroBubble",
            num_hidden_layers=4, activations_checkpoint_granularity=None, n_shared_experts=0,
            tensor_model_parallel_size=4, moe_intermediate_size=2048,
            data=replace(V3.data, seq_length=512),
        ),
        True,
    ),
    "frozen products of a gathered sequence are kept by selective recomputation": (
        dict(
            peft=ADAPTERS, tensor_model_parallel_size=2, first_k_dense_replace=8,
            num_hidden_layers=8, intermediate_size=2048,
            activations_checkpoint_granularity="selective",
        ),
        True,
    ),
    "of a V the stage that recomputes more goes back beside less of the other": (
        dict(
            pipeline_model_parallel_size=2, pipeline_schedule="ZBVZeroBubble", num_hidden_layers=6,
            pipeline_layers_per_stage=[1, 1, 1, 3], first_k_dense_replace=6, intermediate_size=4096,
            activations_checkpoint_granularity="full", activations_checkpoint_num_layers=1,
        ),
        True,
    ),
    "attention goes back in two halves of a context": (
        dict(context_parallel_size=4, num_attention_heads=16), True,
    ),
    "products in FP8 round what they are given": (dict(fp8_recipe="blockwise"), True),
    "products in FP8 round before SwiGLU goes back": (
        dict(
            fp8_recipe="blockwise", activations_checkpoint_granularity="full",
            first_k_dense_replace=2,
        ),
        True,
    ),
    "products in FP8 keep rows of their own on the host": (
        dict(
            fp8_recipe="blockwise", cpu_offloading_activations=True, first_k_dense_replace=2,
            activations_checkpoint_granularity=None,
        ),
        True,
    ),
    "what adapters are given lies on the host": (
        dict(
            peft=ADAPTERS, cpu_offloading_activations=True, first_k_dense_replace=0,
            activations_checkpoint_granularity=None,
        ),
        False,
    ),
    "packed experts are taken out while they compute": (
        dict(
            peft=replace(ADAPTERS, base_dtype="fp8"), hidden_size=1024, moe_intermediate_size=1024,
            first_k_dense_replace=0, activations_checkpoint_granularity=None,
            data=replace(V3.data, seq_length=1024),
        ),
        True,
    ),
    "packed matrices are small beside the last norm's backward pass": (
        dict(
            peft=replace(ADAPTERS, base_dtype="nf4"), hidden_size=2048, first_k_dense_replace=2,
            activations_checkpoint_granularity=None, data=replace(V3.data, seq_length=1024),
        ),
        True,
    ),
    "logits of adapters' models": (
        dict(peft=ADAPTERS, vocab_size=65536, activations_checkpoint_granularity="full"), True,
    ),
    "of adapters' models embedding and head are gathered in two places": (
        dict(
            peft=replace(ADAPTERS, base_dtype="nf4"), vocab_size=65536, reshard_after_forward=True,
            first_k_dense_replace=2, hidden_size=4096, data=replace(V3.data, seq_length=1024),
        ),
        True,
    ),
    "replicas keep what they add up": (
        dict(
            data_parallel_replicate_size=2, reduce_gradients=True, vocab_size=65536,
            hidden_size=2048, data=replace(V3.data, seq_length=1024),
        ),
        True,
    ),
    "the only block of a stage lies on the host": (
        dict(
            cpu_offloading_activations=True, activations_checkpoint_granularity=None,
            pipeline_model_parallel_size=2, first_k_dense_replace=2, intermediate_size=2048,
        ),
        True,
    ),
    "blocks lie on the host": (
        dict(
            cpu_offloading_activations=True, activations_checkpoint_granularity=None,
            num_hidden_layers=4,
        ),
        False,
    ),
}  # fmt: skip
"""What was once not told, each in a small model in which it is much."""


@pytest.mark.parametrize("term", TERMS)
def test_a_term(term: str) -> None:
    sizes, half = TERMS[term]
    model = replace(SMALL, **sizes)
    layout = Layout.of(model, 8 * model.pipeline_model_parallel_size)
    micro_batches = 2 * layout.pp
    tracked = tracked_bytes(model, layout, 0, micro_batches, half)
    need = rank_need(model, layout, 0, micro_batches, half)
    assert 0.95 < need.total / tracked.device < 1.05, (need, tracked)
    host = host_need(model, layout, 0, micro_batches, half)
    assert (host > 0) == model.cpu_offloading_activations
    assert 0.95 * tracked.host <= host <= 1.05 * tracked.host, (host, tracked.host)


def test_a_single_micro_batch_has_gradients_block_by_block() -> None:
    """Each is handed on when its block is through, whose activations are gone by then."""
    sizes = dict(num_hidden_layers=3, first_k_dense_replace=0, moe_intermediate_size=2048)
    model = replace(SMALL, **sizes, data=replace(V3.data, seq_length=1024))
    assert_near(model, Layout.of(model, 8), [0], 1, half=True)


@pytest.mark.parametrize(
    "sizes",
    [
        # Attention's result lies there once: the product behind it keeps two halves, joined.
        dict(context_parallel_size=4, num_attention_heads=16),
        # MTP keeps what its norms and its projection are given.
        dict(num_nextn_predict_layers=2, n_shared_experts=1, num_experts_per_tok=2),
        # Weights stay on the device, of TP ranks too, whose weights are gathered block by block.
        dict(tensor_model_parallel_size=2, intermediate_size=2048),
        # The first stage goes forward once more when the last one has nothing, and nothing stays of
        # what has gone back.
        dict(
            pipeline_model_parallel_size=2, pipeline_schedule="ZBVZeroBubble",
            pipeline_layers_per_stage=[2, 1, 1, 1], num_hidden_layers=5,
        ),
    ],
)  # fmt: skip
def test_on_the_host(sizes: dict[str, Any]) -> None:
    offloaded = dict(cpu_offloading_activations=True, activations_checkpoint_granularity=None)
    model = replace(SMALL, first_k_dense_replace=2, **offloaded, **sizes)
    pp = model.pipeline_model_parallel_size
    layout = Layout.of(model, 8 * pp)
    tracked = tracked_bytes(model, layout, 0, 2 * pp, half=True).host
    assert 0.95 * tracked <= host_need(model, layout, 0, 2 * pp, half=True) <= 1.05 * tracked


def test_deep_ep_has_room_for_all_that_may_come() -> None:
    """Rows of bf16, of every token of every EP rank, whatever else the rank holds."""
    deep = replace(V3, moe_token_dispatcher_type="deepep")
    layout = Layout.of(V3, 2048)
    for pp_rank in (0, 15):
        plain, told = (rank_need(model, layout, pp_rank, 60, half=True) for model in (V3, deep))
        assert told.total - plain.total == told.buffers - plain.buffers == 64 * 4096 * 7168 * 2


def test_nothing_stays_of_a_micro_batch_that_is_done() -> None:
    """On the last stage, whose losses torch's schedules keep to the end of the step."""
    small = ["num_hidden_layers=2", "first_k_dense_replace=2", "num_nextn_predict_layers=0"]
    run = small_run(2, 1, 1, 2, 1, *[f"model.{setting}" for setting in small])
    layout = Layout.of_run(run)
    few, many = (tracked_bytes(run.model, layout, 1, count, half=False).device for count in (2, 5))
    hidden = 4 * run.model.micro_batch_size * run.model.data.seq_length * run.model.hidden_size
    assert many - few < hidden


# -- micro-batches in flight --


def torchs_actions(model: ModelConfig, pp_rank: int, micro_batches: int) -> list[_Action]:
    """What a rank does in torch's own schedule, its halves of an overlap one after the other."""
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
    actions = filter(None, made.pipeline_order[pp_rank])
    return [step for action in actions for step in action.sub_actions or (action,)]


def torchs_order(model: ModelConfig, pp_rank: int, micro_batches: int) -> dict[int, int]:
    """Counted in torch's own schedule, when the rank holds most."""
    live, most = dict.fromkeys(stages_of_rank(model, pp_rank), 0), 0
    best = dict(live)
    for step in torchs_actions(model, pp_rank, micro_batches):
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


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble"])
@pytest.mark.parametrize(("pp", "virtual", "micro_batches"), [(2, 2, 4), (4, 2, 16), (2, 3, 6)])
def test_interleaved_order(schedule: str, pp: int, virtual: int, micro_batches: int) -> None:
    """What waits for the gradients of inputs, and of weights, is what torch lets wait."""
    model = replace(
        V3,
        pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
        virtual_pipeline_model_parallel_size=virtual,
    )
    splits = schedule == "InterleavedZeroBubble"
    for rank in range(pp):
        inputs, weights, theirs = [0] * virtual, [0] * virtual, []
        for step in torchs_actions(model, rank, micro_batches):
            stage, kind = step.stage_index // pp, step.computation_type
            goes_back = kind in (_ComputationType.BACKWARD_INPUT, _ComputationType.FULL_BACKWARD)
            inputs[stage] += (kind == _ComputationType.FORWARD) - goes_back
            weights[stage] += kind == _ComputationType.BACKWARD_INPUT
            weights[stage] -= kind == _ComputationType.BACKWARD_WEIGHT
            theirs.append(([*inputs], [*weights]))
        ours = [
            ([*a], [*b])
            for _, a, b, done in interleaved_order(pp, virtual, rank, micro_batches, splits)
            if splits or done is not None or not any(b)
        ]
        assert ours == theirs


@pytest.mark.nightly
def test_a_stage_of_more_layers_waits_alone() -> None:
    """InterleavedZeroBubble: most wait of the stage before the head, not as many of both."""
    model, *_ = drawn(5)
    model = replace(model, num_nextn_predict_layers=0, num_hidden_layers=6)
    model = replace(model, pipeline_layers_per_stage=[1, 3, 1, 1])
    assert_near(model, Layout.of(model, 32), [0, 1], 4, half=True)


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
    assert 2 * numbers <= told[True] < 4 * numbers
    one = rank_need(replace(run.model, reduce_gradients=False), layout, 0, 1, half=False)
    assert one.gradients < 4 * numbers, "nothing is held between micro-batches if there is one"


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
        monkeypatch.setattr(memory, name, None)
    assert rank_need(replace(V3), layout, 3, 16, half=True) == expected
    for changed in (
        replace(V3, micro_batch_size=2),
        replace(V3, activations_checkpoint_granularity=None),
        replace(V3, pipeline_schedule="DualPipeV", num_nextn_predict_layers=1),
    ):
        for pp_rank in range(16):
            assert rank_need(changed, layout, pp_rank, 16, half=True).total > expected.states
