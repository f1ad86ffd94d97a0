"""Random legal configurations pass and survive being saved; random values are never a crash."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deepseek.config import ConfigError, RunConfig, changed, check, load_config, resolved_yaml
from deepseek.config.layout import Layout, kept_shape, split_layers, stages_of_rank
from deepseek.config.schema import FIELDS
from deepseek.config.weights import model_weights
from deepseek.config.yaml_file import read_yaml

SCHEDULES = [
    "GPipe",
    "1F1B",
    "Interleaved1F1B",
    "InterleavedZeroBubble",
    "ZBVZeroBubble",
    "DualPipeV",
]


@st.composite
def legal_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A mapping that obeys the rules by construction, written independently of ``rules.py``."""
    integers = st.integers
    tensor, pipeline = draw(st.sampled_from([1, 2, 4])), draw(integers(1, 3))
    replicas, shards = draw(integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    data_parallel = replicas * shards
    nodes = draw(st.sampled_from([1, data_parallel]))
    expert = draw(st.sampled_from([n for n in (1, 2, 4, 8) if shards * tensor % n == 0]))
    method = draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]))
    groups = 1 if method == "greedy" else draw(st.sampled_from([1, 2, 4]))
    size = expert * draw(integers(2, 4))
    kept = draw(integers(1, groups))
    chosen = draw(integers(1, kept * size))
    schedule = draw(st.sampled_from(SCHEDULES)) if pipeline > 1 else "1F1B"
    interleaved = schedule.startswith("Interleaved")
    virtual = draw(integers(2, 3)) if interleaved else 1
    stages = pipeline * (2 if schedule in ("ZBVZeroBubble", "DualPipeV") else virtual)
    layers = draw(integers(stages, stages + 4))
    by_hand = pipeline > 1 and draw(st.booleans())
    cuts = sorted(draw(st.permutations(range(1, layers)))[: stages - 1])
    sizes = [end - start for start, end in zip([0, *cuts], [*cuts, layers], strict=True)]
    rounds = draw(integers(1, 4))
    count = {"1F1B": pipeline - 1 + rounds, "DualPipeV": stages - 1 + rounds}.get(schedule, rounds)
    count = pipeline * rounds if interleaved else count
    even = tensor * shards  # what TP leaves can be divided further
    depth = draw(integers(0, 2))
    length = tensor * draw(integers(depth + 2, 64))
    micro = draw(integers(1, 3))
    steps = draw(integers(1, 1000))
    warmup = draw(integers(0, steps))
    muon = draw(st.booleans())
    yarn = draw(st.none() | st.just({"factor": 4, "original_max_position_embeddings": 64}))
    rate = draw(st.floats(0, 1)) if method == "noaux_tc" else 0
    model = {
        "vocab_size": even * draw(integers(4096, 8192)),
        "hidden_size": draw(integers(1, 8192)),
        "num_hidden_layers": layers,
        "num_attention_heads": even * draw(integers(1, 8)),
        "intermediate_size": even * draw(integers(1, 100)),
        "moe_intermediate_size": even * draw(integers(1, 100)),
        "q_lora_rank": draw(st.none() | integers(1, 1536)),
        "kv_lora_rank": draw(integers(1, 512)),
        "qk_rope_head_dim": 2 * draw(integers(1, 64)),
        "n_routed_experts": groups * size,
        "n_shared_experts": draw(integers(0, 2)),
        "num_experts_per_tok": chosen,
        "norm_topk_prob": chosen > 1 and draw(st.booleans()),
        "first_k_dense_replace": draw(integers(0, layers - 1)),
        "n_group": groups,
        "topk_group": kept,
        "topk_method": method,
        "scoring_func": draw(st.sampled_from(["sigmoid", "softmax"])),
        "moe_router_bias_update_rate": rate,
        "num_nextn_predict_layers": depth,
        "rope_scaling": yarn,
        "micro_batch_size": micro,
        "global_batch_size": micro * data_parallel * count,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "pipeline_schedule": schedule,
        "virtual_pipeline_model_parallel_size": virtual,
        "pipeline_layers_per_stage": sizes if by_hand else None,
        "expert_model_parallel_size": expert,
        "data_parallel_replicate_size": replicas,
        "data": {"seq_length": length, "fim_rate": draw(st.floats(0, 1))},
        "optim": {
            "name": "muon" if muon else "adamw",
            "lr": draw(st.floats(1e-6, 1)),
            "muon_momentum": draw(st.floats(0, 0.99)) if muon else 0.95,
            "sched": {
                "name": draw(st.sampled_from(["CosineAnnealing", "WarmupConstantCosine"])),
                "warmup_steps": warmup,
                "constant_steps": draw(integers(0, steps - warmup)),
                "min_lr": draw(st.floats(0, 1e-6)),
            }
            if draw(st.booleans())
            else {
                "name": "WarmupStableDecay",
                "warmup_steps": warmup,
                "decay_steps": draw(integers(0, steps - warmup)),
            },
        },
    }
    return {
        "name": draw(st.text("abcXYZ019_-", min_size=1, max_size=12)),
        "seed": draw(integers(0, 2**32 - 1)),
        "trainer": {
            "devices": tensor * pipeline * data_parallel // nodes,
            "num_nodes": nodes,
            "precision": draw(st.sampled_from([32, "32", "bf16-mixed", "auto"])),
            "max_steps": steps,
        },
        "model": model,
    }


def assert_consistent(run: RunConfig) -> None:
    """Every rank has work, every layer one holder, every weight of a stage parts of equal size."""
    model, layout = run.model, Layout.of_run(run)
    assert layout.world_size == run.trainer.devices * run.trainer.num_nodes
    assert model.n_routed_experts % layout.ep == 0
    parts = split_layers(model)
    assert [i for part in parts for i in part.layers] == list(range(model.num_hidden_layers))
    assert all(part.layers or part.output for part in parts)
    assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    held = [stages_of_rank(model, rank) for rank in range(layout.pp)]
    assert sorted(stage for stages in held for stage in stages) == list(range(len(parts)))
    assert len({len(stages) for stages in held}) == 1
    for part in parts:
        for weight in model_weights(model, *part):
            divided = weight.divided(layout.tp, layout.ep)
            ways = layout.ep if weight.routed else layout.tp if weight.tp_dim is not None else 1
            assert math.prod(divided) * ways == math.prod(weight.shape), weight
            assert min(kept_shape(weight, layout)) >= 1, weight


@given(legal_configs())
def test_legal_configurations_pass_and_survive_saving(tree: dict[str, Any]) -> None:
    run = load_config(tree)
    assert check(run) == []
    assert_consistent(run)
    document = read_yaml(resolved_yaml(run), "config.yaml")
    assert document.problems == []
    assert load_config(document.tree) == run


@st.composite
def layouts(draw: st.DrawFn) -> RunConfig:
    """Sizes and settings drawn almost at will; about one in five is legal."""
    choose = st.sampled_from
    values: dict[str, object] = {}
    values["trainer.devices"] = draw(choose([1, 2, 4, 4, 6, 8, 8, 12]))
    values["trainer.num_nodes"] = draw(choose([1, 1, 2]))
    values["model.tensor_model_parallel_size"] = draw(choose([1, 1, 2, 2, 3]))
    values["model.expert_model_parallel_size"] = draw(choose([1, 2, 4]))
    values["model.data_parallel_replicate_size"] = draw(choose([1, 1, 2]))
    values["model.pipeline_model_parallel_size"] = pipeline = draw(choose([1, 2, 2, 3]))
    if pipeline > 1 or draw(st.integers(0, 9)) == 0:
        values["model.pipeline_schedule"] = schedule = draw(choose(SCHEDULES))
        interleaved = schedule.startswith("Interleaved")
        sizes = [2, 2, 3, 1] if interleaved else [1, 1, 1, 2]
        values["model.virtual_pipeline_model_parallel_size"] = draw(choose(sizes))
        splits = st.lists(st.integers(1, 3), min_size=2, max_size=4)
        values["model.pipeline_layers_per_stage"] = draw(st.none() | st.none() | splits)
    values["model.num_hidden_layers"] = draw(st.integers(2, 8))
    values["model.num_attention_heads"] = draw(choose([2, 6, 12]))
    values["model.vocab_size"] = draw(choose([4098, 4608, 4608]))
    values["model.hidden_size"] = draw(choose([16, 48]))
    values["model.moe_intermediate_size"] = draw(choose([36, 48]))
    values["model.data.seq_length"] = draw(choose([32, 48, 48]))
    values["model.micro_batch_size"] = draw(choose([1, 1, 2]))
    values["model.global_batch_size"] = draw(choose([48, 96]))
    return changed(RunConfig(), values)


@given(layouts())
def test_what_check_accepts_has_a_consistent_layout(run: RunConfig) -> None:
    """Layouts drawn at will are refused with a way out, or are layouts."""
    problems = check(run)
    assert all(problem.field in FIELDS and problem.way_out for problem in problems)
    if not problems:
        assert_consistent(run)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers() | st.text(max_size=4), max_size=3),
    st.dictionaries(st.text("ab_", max_size=3), st.integers(), max_size=2),
)


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, min_size=1, max_size=4))
def test_any_value_in_any_key_is_taken_or_explained(chosen: dict[str, Any]) -> None:
    """Nothing but ``ConfigError`` comes out, and each problem says what and how."""
    tree: dict[str, Any] = {}
    for path, value in chosen.items():
        *sections, key = path.split(".")
        node = tree
        for section in sections:
            inner = node.get(section)
            node[section] = inner if isinstance(inner, dict) else {}
            node = node[section]
        node[key] = value
    try:
        cfg = load_config(tree)
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.rule and problem.way_out
    else:
        assert check(cfg) == []


@given(
    st.sampled_from(["{}", "model.hidden_size={}", "name={}", "model.{}=1"]),
    st.text(max_size=30) | st.text("=.{}[]:$&*!|>'\"a1 -", max_size=8),
)
def test_any_override_is_taken_or_explained(form: str, text: str) -> None:
    try:
        load_config({}, [form.replace("{}", text)])
    except ConfigError as error:
        assert error.problems
