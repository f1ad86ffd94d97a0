"""Runs in few bits learn what fp32 learns: loss curves of a small model of text, side by side."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.config.schema import DataConfig, ModelConfig, OptimConfig, SchedConfig
from deepseek.training.step import DeepSeekModel

SHORT = 12
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    intermediate_size=128,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_nextn_predict_layers=1,
    initializer_range=0.05,
    global_batch_size=8,
    micro_batch_size=8,
    data=DataConfig(seq_length=64),
    optim=OptimConfig(lr=3e-3, sched=SchedConfig(warmup_steps=10, min_lr=3e-4)),
)


def batch_of(step: int, config: ModelConfig) -> dict[str, Tensor]:
    """Bytes of a source text, from places that depend on the step alone."""
    text = torch.frombuffer(bytearray(inspect.getsource(argparse), "utf8"), dtype=torch.uint8)
    rows, length = config.global_batch_size, config.data.seq_length
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - length - 1, (rows,), generator=generator)
    ids = torch.stack([text[start : start + length + 1] for start in starts]).long()
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:],
        "positions": torch.arange(length).repeat(rows, 1),
        "documents": torch.zeros(rows, length, dtype=torch.int32),
    }


@cache
def curve(steps: int, bf16: bool, **changes: Any) -> list[float]:
    """The loss of every step."""
    config = replace(CONFIG, **changes)
    module: Any = DeepSeekModel(config, seed=3, max_steps=steps)
    optimizer = module.configure_optimizers()
    losses = []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # which casts weights once
            losses.append(module.train_step(batch_of(step, config), optimizer).loss)
    return losses


def assert_alike(losses: list[float], wanted: list[float], within: float) -> None:
    """Means of each quarter of the run; and there is something to learn."""
    quarter = len(losses) // 4
    assert mean(wanted[-quarter:]) < 0.9 * wanted[0]
    for start in range(0, len(losses), quarter):
        part = slice(start, start + quarter)
        ours, theirs = mean(losses[part]), mean(wanted[part])
        assert abs(ours - theirs) < within * theirs, (start, ours, theirs)


@pytest.mark.parametrize("steps", [SHORT, pytest.param(1000, marks=pytest.mark.nightly)])
def test_fp8(steps: int) -> None:
    """V3's report has 0.25 % at 16B. This model, 64 wide, can be held to that for some 50 steps: in
    1,000 two runs in bf16, of start weights that differ by 1.6 %, come 2.7 % apart."""
    bf16 = curve(steps, bf16=True)
    fp8 = curve(steps, bf16=True, fp8_recipe="blockwise")
    assert fp8 != bf16
    assert_alike(fp8[:SHORT], bf16[:SHORT], within=2.5e-3)
    assert_alike(fp8[:100], bf16[:100], within=5e-3)
    assert_alike(fp8, bf16, within=4e-2)


@pytest.mark.parametrize("steps", [SHORT, pytest.param(400, marks=pytest.mark.nightly)])
def test_bf16(steps: int) -> None:
    assert_alike(curve(steps, bf16=True), curve(steps, bf16=False), within=3e-3)
