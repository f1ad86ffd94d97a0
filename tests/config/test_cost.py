"""Parameters, FLOPs and bytes against published figures, against hand counts, and term by term."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepseek.config import ModelConfig, load_config, shipped_configs
from deepseek.config.cost import count_parameters, flops_per_token, kv_cache_bytes_per_token
from deepseek.config.layout import Layout, split_layers, stages_of_rank
from deepseek.config.memory import (
    checkpoint_bytes,
    gathered_bytes,
    rank_memory,
    reshards,
    state_memory,
)
from deepseek.config.rank_need import rank_need
from deepseek.config.schema import PeftConfig, changed
from deepseek.models.transformer import Transformer
from support.tiny_runs import small_run, worlds

# Architecture keys of the published config.json files.
V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    topk_method="noaux_tc",
    num_nextn_predict_layers=1,
)
KIMI_K2 = replace(
    V3,
    vocab_size=163840,
    num_attention_heads=64,
    n_routed_experts=384,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=0,
)
V2_LITE = replace(
    V3,
    vocab_size=102400,
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    num_nextn_predict_layers=0,
)
MOONLIGHT = replace(V2_LITE, vocab_size=163840, intermediate_size=11264, topk_method="noaux_tc")
V2 = replace(
    V2_LITE,
    hidden_size=5120,
    num_hidden_layers=60,
    num_attention_heads=128,
    q_lora_rank=1536,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    n_routed_experts=160,
    n_group=8,
    topk_group=3,
    topk_method="group_limited_greedy",
)


def test_v3_to_the_last_parameter() -> None:
    counts = count_parameters(V3)
    assert counts.total == 671_026_404_352
    assert counts.correction_biases == 14_848
    assert counts.attention_per_layer == 187_107_328
    assert counts.expert == 44_040_192
    assert counts.moe_ffn_per_layer == 11_320_164_352
    assert counts.active == 37_552_282_624
    assert counts.active_without_embedding == 36_625_603_584


def test_v3_as_released() -> None:
    """An audit of the released tensors counts 684,489,845,504 numbers, biases of 59 routers
    included."""
    counts = count_parameters(V3)
    biases = counts.correction_biases + counts.mtp_correction_biases
    assert counts.released + biases == 684_489_845_504
    assert counts.trained == counts.released - 2 * counts.embedding


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        (V3, 671_026_404_352, 37_552_282_624),
        (KIMI_K2, 1_026_408_209_408, 32_861_477_888),
        (MOONLIGHT, 15_960_108_544, 2_914_774_528),
        (V2_LITE, 15_706_484_224, 2_661_150_208),
        (V2, 235_741_434_880, 21_375_800_320),
    ],
    ids=["V3", "Kimi-K2", "Moonlight", "V2-Lite", "V2"],
)
def test_family_parameters(model: ModelConfig, total: int, active: int) -> None:
    """Totals as transformers' own classes count them (correction biases are buffers there)."""
    counts = count_parameters(model)
    assert (counts.total, counts.active) == (total, active)


@pytest.mark.parametrize(
    ("model", "with_mtp", "causal", "gflop"),
    [
        (V3, False, True, "249.81"),
        (V3, True, True, "259.99"),
        (V3, False, False, "280.51"),
        (V3, True, False, "291.20"),
        (KIMI_K2, False, True, "204.48"),
        (MOONLIGHT, False, True, "17.15"),
        (V2, False, True, "155.01"),
        (V2_LITE, False, True, "16.39"),
    ],
)
def test_flops_at_4096_tokens(model: ModelConfig, with_mtp: bool, causal: bool, gflop: str) -> None:
    flops = flops_per_token(model, 4096, with_mtp, causal)
    assert f"{flops / 1e9:.2f}" == gflop


def test_flops_of_a_model_without_mtp_do_not_depend_on_the_switch() -> None:
    assert flops_per_token(KIMI_K2, 4096, True) == flops_per_token(KIMI_K2, 4096, False)


def test_attention_flops_grow_with_the_sequence_and_nothing_else_does() -> None:
    """Per token, layer and position before it: 3 x 2 x heads x (qk + v), half of it causal."""
    longer = flops_per_token(V3, 8192, False) - flops_per_token(V3, 4096, False)
    assert longer == 61 * 3 * 4096 * 128 * (192 + 128)
    assert flops_per_token(V3, 1, False, causal=False) - flops_per_token(V3, 1, False) == (
        61 * 3 * 128 * (192 + 128)
    )


TOY = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    num_hidden_layers=3,
    num_attention_heads=2,
    q_lora_rank=5,
    kv_lora_rank=3,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=3,
    intermediate_size=7,
    moe_intermediate_size=6,
    n_routed_experts=4,
    n_shared_experts=2,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=2,
)


def toy_tensors() -> dict[str, int]:
    """Sizes of TOY's tensors, written out by hand."""
    block = {
        "attn_norm": 4,
        "wq_a": 5 * 4,
        "q_norm": 5,
        "wq_b": (2 * 4) * 5,
        "wkv_a": (3 + 2) * 4,
        "kv_norm": 3,
        "wkv_b": 2 * (2 + 3) * 3,
        "wo": 4 * (2 * 3),
        "ffn_norm": 4,
    }
    dense = {"w1": 7 * 4, "w3": 7 * 4, "w2": 4 * 7}
    moe = {
        "gate": 4 * 4,
        "experts.w1": 4 * 6 * 4,
        "experts.w3": 4 * 6 * 4,
        "experts.w2": 4 * 4 * 6,
        "shared.w1": 12 * 4,
        "shared.w3": 12 * 4,
        "shared.w2": 4 * 12,
    }
    tensors = {"embed": 40, "head": 40, "norm": 4}
    for layer in range(3):
        ffn = dense if layer == 0 else moe
        tensors |= {f"layers.{layer}.{name}": size for name, size in (block | ffn).items()}
    for depth in range(2):
        module = {"enorm": 4, "hnorm": 4, "norm": 4, "eh_proj": 4 * 8} | block | moe
        tensors |= {f"mtp.{depth}.{name}": size for name, size in module.items()}
    return tensors


def test_toy_tensor_by_tensor() -> None:
    tensors = toy_tensors()
    counts = count_parameters(TOY)
    assert counts.trained == sum(tensors.values())
    assert counts.mtp == sum(size for name, size in tensors.items() if name.startswith("mtp."))
    idle = 2 * 2 * (3 * 6 * 4)  # two MoE layers, two experts not chosen
    assert counts.active == counts.total - idle
    assert (counts.correction_biases, counts.mtp_correction_biases) == (2 * 4, 2 * 4)
    assert counts.released == counts.trained + 2 * 80


def test_parts_make_the_whole() -> None:
    counts = count_parameters(V3)
    layer = counts.attention_per_layer + counts.norms_per_layer
    assert counts.total == (
        counts.embedding
        + counts.head
        + counts.final_norm
        + 61 * layer
        + 3 * counts.dense_ffn_per_layer
        + 58 * (256 * counts.expert + counts.shared_experts_per_layer + counts.router_per_layer)
    )


def test_no_biases_without_noaux_tc() -> None:
    counts = count_parameters(V2)
    assert (counts.correction_biases, counts.mtp_correction_biases) == (0, 0)


def test_adamw_states_are_16_bytes_a_parameter() -> None:
    memory = state_memory(TOY, "adamw")
    trained = sum(toy_tensors().values())
    assert memory.weights == 4 * trained + 4 * 16  # and 16 correction biases
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 8 * trained
    assert memory.total == 16 * trained + 64


def test_muon_holds_one_momentum_for_hidden_matrices() -> None:
    tensors = toy_tensors()
    with_moments = sum(
        size for name, size in tensors.items() if "norm" in name or name in ("embed", "head")
    )
    hidden = sum(tensors.values()) - with_moments
    memory = state_memory(TOY, "muon")
    assert memory.optimizer == 4 * hidden + 8 * with_moments
    assert memory.weights == state_memory(TOY, "adamw").weights


def test_v3_caches_70272_bytes_a_token() -> None:
    assert kv_cache_bytes_per_token(V3) == 70_272
    assert kv_cache_bytes_per_token(V3, bytes_per_number=4) == 2 * 70_272


@pytest.mark.parametrize(
    ("name", "model"), [("deepseek_v3_671b", V3), ("moonlight_16b", MOONLIGHT)]
)
def test_shipped_files_have_the_published_sizes(name: str, model: ModelConfig) -> None:
    assert count_parameters(load_config(name).model) == count_parameters(model)


# -- against the built model --


@pytest.mark.parametrize("name", shipped_configs())
def test_counts_equal_the_built_model(name: str) -> None:
    config = load_config(name).model
    with torch.device("meta"):
        model = Transformer(config)
    counts = count_parameters(config)
    main = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mtp."))
    mtp = sum(p.numel() for p in model.mtp.parameters())
    assert (main, mtp) == (counts.total, counts.mtp)
    if name == "deepseek_v3_671b":
        assert main == 671_026_404_352


def test_frozen_matrices_cost_two_passes() -> None:
    run = load_config("deepseek_v3_tiny")
    full, scores = (flops_per_token(run.model, length, False) for length in (1, 513))
    scores = (scores - full) // 512  # of one more token to look at
    cfg = replace(run.model, peft=PeftConfig(dim=4, target_modules=["wkv_a", "experts.w2"]))
    latents, hidden = cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.moe_intermediate_size
    adapters = cfg.num_hidden_layers * 4 * (cfg.hidden_size + latents)
    chosen = cfg.num_moe_layers * cfg.num_experts_per_tok
    adapters += chosen * 4 * (cfg.hidden_size + hidden)
    expected = (full - scores) * 2 // 3 + scores + 6 * adapters
    assert flops_per_token(cfg, 1, False) == expected


# -- one rank --


def test_memory_of_one_process_is_that_of_the_model() -> None:
    """Over one rank the parameters are what the closed forms say, the bytes those of the model."""
    for run in worlds():
        model = replace(run.model, pipeline_model_parallel_size=1, pipeline_layers_per_stage=None)
        for optimizer in ("adamw", "muon"):
            memory = rank_memory(model, Layout(), 0, optimizer)
            assert memory.parameters == count_parameters(model).trained
            assert memory.total == state_memory(model, optimizer).total


def test_moments_on_the_host_are_told_apart() -> None:
    """Not a byte of them is lost or told twice; in bf16 they are half as many."""
    for run in worlds():
        model, layout, name = run.model, Layout.of_run(run), run.model.optim.name
        away = changed(model, {"optim.cpu_offload": True})
        here, there = rank_memory(model, layout, 0, name), rank_memory(away, layout, 0, name)
        assert (there.on_host, there.optimizer) == (here.optimizer, 0) != (here.on_host, 0)
        assert there.total == here.total - here.optimizer
        half = changed(away, {"optim.moments_dtype": "bf16"})
        assert 2 * rank_memory(half, layout, 0, name).on_host == there.on_host
        assert checkpoint_bytes(away, name) == checkpoint_bytes(model, name)
        one, other = (rank_need(m, layout, 0, 4, True) for m in (model, away))
        assert there.total <= other.total <= one.total


def test_memory_of_a_rank_counted_by_hand() -> None:
    """Each parameter of a built stage, divided as the layout says."""
    run = small_run(8, 1, 2, 2, 4)
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


def test_weights_gathered_from_data_parallel_ranks() -> None:
    run = small_run(4, ep=2)
    layout, counts = Layout.of_run(run), count_parameters(run.model)
    moe_layers = run.model.num_moe_layers + run.model.num_nextn_predict_layers
    routed = moe_layers * run.model.n_routed_experts * counts.expert
    assert gathered_bytes(run.model, layout) == 4 * (counts.stored - routed // 2)
    assert not reshards(run.model, layout)
    apart = small_run(4, ep=4)  # a rank has its experts in whole, and gathers the rest
    gathered = gathered_bytes(apart.model, Layout.of_run(apart))
    assert gathered == 4 * (counts.stored - routed)


def test_larger_models_gather_anew_unless_there_is_a_pipeline() -> None:
    large = ["model.hidden_size=4096", "model.vocab_size=65536"]  # 2 x 1 GiB of embedding and head
    one, stages = small_run(2, 1, 1, 1, 1, *large), small_run(4, 1, 1, 2, 1, *large)
    assert reshards(one.model, Layout.of_run(one))
    assert not reshards(stages.model, Layout.of_run(stages))
    told = replace(one.model, reshard_after_forward=False)
    assert not reshards(told, Layout.of_run(one))
