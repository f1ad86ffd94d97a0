"""Random legal configurations pass and survive being saved; random values are never a crash."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.config import ConfigError, check, load_config, resolved_yaml
from deepseek.config.fields import FIELDS
from deepseek.config.strict_yaml import read_yaml


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
    layers = draw(integers(pipeline, 6))
    depth = draw(integers(0, 2))
    length = draw(integers(depth + 2, 64))
    micro = draw(integers(1, 3))
    steps = draw(integers(1, 1000))
    warmup = draw(integers(0, steps))
    muon = draw(st.booleans())
    yarn = draw(st.none() | st.just({"factor": 4, "original_max_position_embeddings": 64}))
    rate = draw(st.floats(0, 1)) if method == "noaux_tc" else 0
    model = {
        "vocab_size": draw(integers(4096, 200_000)),
        "hidden_size": draw(integers(1, 8192)),
        "num_hidden_layers": layers,
        "num_attention_heads": tensor * draw(integers(1, 32)),
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
        "global_batch_size": micro * data_parallel * draw(integers(1, 4)),
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
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


@settings(deadline=None, max_examples=60)
@given(legal_configs())
def test_legal_configurations_pass_and_survive_saving(tree: dict[str, Any]) -> None:
    cfg = load_config(tree)
    assert check(cfg) == []
    document = read_yaml(resolved_yaml(cfg), "config.yaml")
    assert document.problems == []
    assert load_config(document.tree) == cfg


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers() | st.text(max_size=4), max_size=3),
    st.dictionaries(st.text("ab_", max_size=3), st.integers(), max_size=2),
)


@settings(deadline=None, max_examples=150)
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


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["{}", "model.hidden_size={}", "name={}", "model.{}=1"]),
    st.text(max_size=30) | st.text("=.{}[]:$&*!|>'\"a1 -", max_size=8),
)
def test_any_override_is_taken_or_explained(form: str, text: str) -> None:
    try:
        load_config({}, [form.replace("{}", text)])
    except ConfigError as error:
        assert error.problems
