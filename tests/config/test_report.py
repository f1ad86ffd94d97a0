"""The rows that ``deepseek validate`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from deepseek.commands.validate_tables import validate_report
from deepseek.config import RunConfig, load_config, shipped_configs
from deepseek.config.cost import flops_per_token, state_memory
from deepseek.config.schema import PeftConfig
from deepseek.models.transformer import Transformer


def report(name: str, overrides: Sequence[str] = ()) -> list[tuple[str, str]]:
    run = OmegaConf.to_object(load_config(name, overrides))
    assert isinstance(run, RunConfig)
    return validate_report(run)


def test_v3() -> None:
    assert report("deepseek_v3_671b") == [
        ("parameters", "671.03 B (671,026,404,352)"),
        ("active per token", "37.55 B (37,552,282,624), 36.63 B without the input embedding"),
        ("1 MTP module", "11.61 B (11,610,067,968)"),
        ("FLOPs per token", "259.99 GFLOP in training (causal, at 4,096 tokens, with MTP)"),
        ("weights", "2.48 TiB (fp32)"),
        ("gradients", "2.48 TiB (fp32)"),
        ("optimiser states", "4.97 TiB (adamw, fp32)"),
        ("states together", "9.93 TiB, without activations, over 2,048 processes"),
        ("KV cache per token", "70,272 bytes (bf16)"),
        (
            "tokens per step",
            "62,914,560 (15,360 sequences x 4,096, in 120 micro-batches of 1 per rank)",
        ),
        ("tokens of the run", "14.80 T (235,240 steps)"),
        ("FLOPs of the run", "3.85e+24"),
    ]


def test_one_process_and_no_mtp() -> None:
    rows = dict(report("deepseek_v3_tiny", ["model.num_nextn_predict_layers=0", "seed=5"]))
    assert not [name for name in rows if "MTP" in name]
    assert "MFLOP in training" in rows["FLOPs per token"]
    assert "MTP" not in rows["FLOPs per token"]
    assert "processes" not in rows["states together"]
    assert "per rank" not in rows["tokens per step"]
    assert rows["KV cache per token"] == "1,280 bytes (fp32)"


def test_two_modules() -> None:
    rows = dict(report("deepseek_v3_tiny", ["model.num_nextn_predict_layers=2"]))
    assert "2 MTP modules" in rows


def test_adapters_alone_are_trained() -> None:
    """Counted from the built model; frozen weights have no gradient and no optimiser state."""
    whole = report("deepseek_v3_tiny")
    run = OmegaConf.to_object(load_config("deepseek_v3_tiny"))
    assert isinstance(run, RunConfig)
    run.model.peft = PeftConfig(dim=4, target_modules=["wq_a", "w2", "experts.w1"])
    rows = dict(validate_report(run))
    with torch.device("meta"):
        parameters = dict(Transformer(run.model).named_parameters())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    frozen = sum(p.numel() for p in parameters.values()) - trained
    assert rows["trained by LoRA"].split(", ")[0].endswith(f"({trained:,})")
    assert f"{trained / frozen:.2%} of the weights" in rows["trained by LoRA"]
    memory = state_memory(run.model)
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    biases = run.model.n_routed_experts * (run.model.num_moe_layers + 1)
    assert memory.weights == 4 * (frozen + trained + biases)
    assert state_memory(run.model, "muon").optimizer == 4 * trained
    assert rows["parameters"] == dict(whole)["parameters"]
    assert "trained by LoRA" not in dict(whole)


def test_frozen_matrices_cost_two_passes() -> None:
    run = OmegaConf.to_object(load_config("deepseek_v3_tiny"))
    assert isinstance(run, RunConfig)
    full, scores = (flops_per_token(run.model, length, False) for length in (1, 513))
    scores = (scores - full) // 512  # of one more token to look at
    cfg = replace(run.model, peft=PeftConfig(dim=4, target_modules=["wkv_a", "experts.w2"]))
    latents, hidden = cfg.kv_lora_rank + cfg.qk_rope_head_dim, cfg.moe_intermediate_size
    adapters = cfg.num_hidden_layers * 4 * (cfg.hidden_size + latents)
    chosen = cfg.num_moe_layers * cfg.num_experts_per_tok
    adapters += chosen * 4 * (cfg.hidden_size + hidden)
    expected = (full - scores) * 2 // 3 + scores + 6 * adapters
    assert flops_per_token(cfg, 1, False) == expected


def test_flops_of_the_run_are_tokens_times_flops() -> None:
    rows = dict(report("moonlight_16b"))
    tokens = 2048 * 8192 * 10_000
    per_token = float(rows["FLOPs per token"].split()[0]) * 1e9
    assert float(rows["FLOPs of the run"]) == pytest.approx(tokens * per_token, rel=5e-3)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_row_says_something(name: str) -> None:
    rows = report(name)
    assert len(dict(rows)) == len(rows) >= 11
    assert all(what and value for what, value in rows)
