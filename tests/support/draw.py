"""Draws small models in layouts of up to eight ranks, from all that the rules of the configuration
allow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from deepseek.config.layout import INTERLEAVED_SCHEDULES, V_SCHEDULES
from deepseek.config.schema import DataConfig, ModelConfig, OptimConfig, RopeScaling, SchedConfig
from support.layouts import Case, small_config

WORLDS = (1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7, 8, 8, 8)
MOST_STAGES = 8
WEIGHTS = {torch.float64: 0.2, torch.float32: 0.1}
"""Their standard deviation: large, so that every part counts, but not so large that eight layers
of this width blow up what is rounded differently."""
ADAM_EPS = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Adam's first step is the sign of the gradient. Where a gradient is itself a rounding error, no
two ways of adding it up agree on the sign, unless eps is above such errors."""

T = TypeVar("T")


@cache
def draw_cases(count: int, dtype: torch.dtype, seed_: int) -> list[Case]:
    """``count`` different cases, the same for the same seed.

    Drawn a few at a time: in a long run hypothesis takes to varying what it has drawn before.
    """
    found: dict[str, Case] = {}
    for batch in itertools.count():

        @seed(f"{seed_} {batch}")
        @settings(
            max_examples=10,
            database=None,
            derandomize=False,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(dtype))
        def collect(case: Case) -> None:
            found.setdefault(str(case.layout) + str(case.config), case)

        collect()
        if len(found) >= count:
            break
    return list(found.values())[:count]


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Case:
    """A case that the rules accept. Most of them are met by construction, as almost no random
    numbers would."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def among(options: tuple[T, ...] | list[T]) -> T:
        return draw(st.sampled_from(options))

    # 1. the layout
    world = among(WORLDS)
    schedule = among(
        ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
    )
    virtual = number(2, 3) if schedule in INTERLEAVED_SCHEDULES else 1
    held = 2 if schedule in V_SCHEDULES else virtual
    pp = among([n for n in _sizes(world) if n * held <= MOST_STAGES or n == 1])
    if pp == 1:
        schedule, virtual, held = "1F1B", 1, 1
    tp = among(_sizes(world // pp))
    cp = among(_divisors(world // (pp * tp)))
    replicate = among(_divisors(world // (pp * tp * cp)))
    shards = world // (pp * tp * replicate)
    ep = among(_sizes(shards * tp))
    # What TP and EP leave of a weight must divide over the ranks that share it; whole ones need not
    whole = shards if tp > 1 else 1
    # 2. depth
    stages = pp * held
    layers = number(stages, max(stages, min(stages + 3, 8)))
    depth = number(0, 2)
    over = number(1, min((1, 3, 2)[depth], stages)) if pp > 1 and draw(st.booleans()) else 1
    split = None
    if pp > 1 and draw(st.booleans()):
        first = stages - over  # stage of the output, which may have none
        split = [1] * first + [number(0, 1) if first else 1] + [0] * (stages - first - 1)
        for _ in range(layers - sum(split)):
            split[number(0, max(0, first - 1))] += 1
    # 3. experts
    method = among(("noaux_tc", "noaux_tc", "group_limited_greedy", "greedy"))
    experts = ep * number(1, max(2, 12 // ep))
    assume(experts >= 2)
    fewest = 2 if method == "noaux_tc" else 1
    groups = among([n for n in _divisors(experts) if experts // n >= fewest])
    if method == "greedy":
        groups = 1
    kept = number(1, groups)
    chosen = number(1, min(4, kept * (experts // groups)))
    # 4. the batch
    dp = replicate * shards // cp
    micro = number(1, 3)
    count = number(1, 4) if pp == 1 else _micro_batches(schedule, pp, number)
    ramp = None
    if count > 1 and draw(st.booleans()):  # the first step of two is a smaller one
        fewer = number(1, count - 1)
        ramp = [micro * dp * fewer, micro * dp * (count - fewer), 1]
    # 5. what is recomputed, of all blocks of a stage or of some
    recompute = among((None, "full", "selective"))
    some = layers > stages and split is None or bool(split and max(split) > 1)
    unit = math.lcm(2 * cp, cp * tp) if cp > 1 else tp
    hidden = whole * number(12 // whole, 24 // whole) if whole <= 12 else whole
    config: ModelConfig = replace(
        small_config(),
        vocab_size=tp * number(24 // tp + 1, 64 // tp),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=tp * number(1, max(1, 4 // tp)),
        q_lora_rank=among([None, whole * number(max(1, 4 // whole), max(1, 10 // whole))]),
        kv_lora_rank=whole * number(max(1, 4 // whole), max(1, 10 // whole)),
        qk_nope_head_dim=number(2, 5),
        qk_rope_head_dim=2 * number(1, 2),
        v_head_dim=number(2, 5),
        intermediate_size=tp * number(max(1, 8 // tp), max(1, 28 // tp)),
        moe_intermediate_size=among((tp * number(1, 3), number(4, 10), 6, 8)),
        n_routed_experts=experts,
        n_shared_experts=number(0, 2),
        num_experts_per_tok=chosen,
        first_k_dense_replace=number(0, layers) if number(0, 3) == 0 else number(0, 1),
        n_group=groups,
        topk_group=kept,
        scoring_func=among(("sigmoid", "softmax")),
        topk_method=method,
        norm_topk_prob=chosen > 1 and draw(st.booleans()),
        routed_scaling_factor=among((1.0, 2.5)),
        num_nextn_predict_layers=depth,
        initializer_range=WEIGHTS[dtype],
        rope_scaling=among(
            (None, RopeScaling(factor=4.0, original_max_position_embeddings=4, mscale_all_dim=1.0))
        ),
        moe_aux_loss_coeff=among((0.02, 0.02, 0.0)),
        moe_z_loss_coeff=among((0.01, 0.0)),
        moe_router_bias_update_rate=0.01 if method == "noaux_tc" else 0.0,
        activations_checkpoint_granularity=recompute,
        activations_checkpoint_num_layers=among((None, 1)) if recompute and some else None,
        cpu_offloading_activations=recompute != "selective" and draw(st.booleans()),
        micro_batch_size=micro,
        global_batch_size=micro * count * dp,
        rampup_batch_size=ramp,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        pipeline_schedule=schedule,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_layers_per_stage=split,
        pipeline_output_stages=over,
        expert_model_parallel_size=ep,
        moe_ranks_per_node=among([None, *_divisors(ep)[1:-1]]),
        data_parallel_replicate_size=replicate,
        reshard_after_forward=among((True, False)) if pp == 1 and (shards > 1 or tp > ep) else None,
        data=DataConfig(
            seq_length=unit * number(max(1, 6 // unit), max(1, 12 // unit)),
            isolate_documents=draw(st.booleans()),
        ),
        optim=OptimConfig(
            name=among(("adamw", "adamw", "muon")),
            lr=3e-3,
            eps=ADAM_EPS[dtype],
            sched=SchedConfig(min_lr=1e-3),
            qk_clip_threshold=among((None, 0.2)),
            moments_dtype=among(("fp32", "fp32", "bf16")),
            cpu_offload=draw(st.booleans()),
        ),
    )
    if config.num_moe_layers == 0 and depth == 0:  # nothing to balance
        off = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate")
        config = replace(config, **dict.fromkeys(off, 0.0))
    clip = among((1.0, 0.1, 1e3, 0.0))
    case = Case(config, world, dtype, seed=number(0, 10**6), clip=clip)
    assume(not case.problems())
    return case


def _micro_batches(schedule: str, pp: int, number: Callable[[int, int], int]) -> int:
    """A number of micro-batches that the schedule takes."""
    if schedule == "1F1B":
        return number(pp, pp + 3)
    if schedule == "DualPipeV":
        return number(2 * pp, 2 * pp + 2)
    if schedule in INTERLEAVED_SCHEDULES:
        return pp * number(1, 2)
    return number(1, pp + 3)


def _sizes(ranks: int) -> list[int]:
    """Of an axis of so many ranks: 1 comes up half as often as the others."""
    return [*_divisors(ranks), *_divisors(ranks)[1:]]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
