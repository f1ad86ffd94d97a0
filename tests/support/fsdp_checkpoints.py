"""Checkpoints of FSDP runs in their forms, and what a migration should make of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manifest import step_name
from deepseek.config.schema import ModelConfig
from deepseek.files import Staging
from deepseek.interop.fsdp_migration import Migration, plan_migration, write_migration
from deepseek.interop.fsdp_names import NameTable
from deepseek.interop.fsdp_source import open_source
from deepseek.interop.huggingface import is_bias, to_hf
from deepseek.models.transformer import Transformer

CFG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=3,
    max_position_embeddings=64,
)
GATE = "model.layers.1.mlp.gate.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


def ours(cfg: ModelConfig = CFG) -> dict[str, Tensor]:
    torch.manual_seed(1)
    state = Transformer(cfg).state_dict()
    return {name: torch.randn_like(tensor, dtype=torch.float32) for name, tensor in state.items()}


def moments(kind: str, cfg: ModelConfig = CFG) -> dict[str, Tensor]:
    torch.manual_seed({"exp_avg": 2, "exp_avg_sq": 3}[kind])
    return {name: torch.rand(tensor.shape) for name, tensor in ours(cfg).items()}


def run(layout: Any = "stacked", cfg: ModelConfig = CFG) -> dict[str, Any]:
    """What a script saves: weights, optimiser state by name, its settings, the step."""
    weights = to_hf(ours(cfg), cfg, layout)
    states: dict[str, dict[str, Tensor]] = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, tensor in to_hf(moments(kind, cfg), cfg, layout).items():
            if not name.endswith("e_score_correction_bias"):
                states.setdefault(name, {"step": torch.tensor(7.0)})[kind] = tensor.clone()
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "params": list(states)}
    return {
        "model": {name: tensor.clone() for name, tensor in weights.items()},
        "optimizer": {"state": states, "param_groups": [group]},
        "step": 7,
    }


def expected(cfg: ModelConfig = CFG) -> dict[str, Tensor]:
    """What our checkpoint is to hold."""
    out = {f"model.{name}": tensor for name, tensor in ours(cfg).items()}
    for name in ours(cfg):
        if not is_bias(name):
            for kind in ("exp_avg", "exp_avg_sq"):
                out[f"optim.{name}.{kind}"] = moments(kind, cfg)[name]
            out[f"optim.{name}.step"] = torch.tensor(7.0)
    return out


@pytest.fixture(autouse=True)
def quiet() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def save(content: Mapping[str, Any], path: Path) -> Path:
    """As one file, or with DCP if the name has no ending."""
    if path.suffix:
        torch.save(content, path)
    else:
        dcp.save(dict(content), checkpoint_id=path, no_dist=True)
    return path


def migrate(path: Path, cfg: ModelConfig = CFG, **options: Any) -> Migration:
    table = options.pop("table", None) or NameTable.hugging_face(cfg)
    return plan_migration(open_source(path, options.pop("optimizer", None)), cfg, table, **options)


def written(migration: Migration, folder: Path) -> dict[str, Tensor]:
    found = migration.step()
    assert found is not None
    with Staging(folder / "out", {}) as staging:
        place = staging.folder / "checkpoints" / step_name(found[0])
        state = {"step": found[0]}
        write_migration(migration, staging, place, found[0], state, lambda done: None)
        staging.finish()
    checkpoint = Checkpoint.open(folder / "out" / "checkpoints" / step_name(found[0]))
    assert set(checkpoint.tensor_dtypes().values()) == {torch.float32}
    tensors = {name: torch.empty(shape) for name, shape in checkpoint.tensor_shapes().items()}
    checkpoint.load(tensors)
    return tensors


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
