"""Folders of Hugging Face files for tests: in shards, in FP8, of either layout; and reading what
became of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manifest import step_name
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.data.tokenizer_training import byte_tokenizer
from deepseek.interop.hf_config import hf_config
from deepseek.interop.huggingface import Layout, to_hf
from deepseek.models.transformer import Transformer
from deepseek.ops.fp8 import block_counts, dequantise_blocks_plainly


def small(**changes: Any) -> ModelConfig:
    """A model with every kind of layer but MTP."""
    fields: dict[str, Any] = dict(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=8,
        n_routed_experts=4,
        max_position_embeddings=4096,
    )
    return ModelConfig(**(fields | changes))


def random_config(seed: int) -> ModelConfig:
    """One of many models; MTP 0, 1 or 2 modules in turn."""
    draw = random.Random(seed)
    groups, size = draw.choice([1, 2, 4]), draw.randint(2, 3)
    yarn = RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale_all_dim=1.0)
    layers = draw.randint(1, 3)
    return small(
        hidden_size=draw.choice([12, 16, 20]),
        num_hidden_layers=layers,
        num_attention_heads=draw.randint(1, 3),
        q_lora_rank=draw.choice([None, 6, 8]),
        v_head_dim=draw.choice([4, 8, 12]),
        n_routed_experts=groups * size,
        n_shared_experts=draw.randint(0, 2),
        num_experts_per_tok=2,
        first_k_dense_replace=draw.randint(0, layers),
        n_group=groups,
        topk_group=draw.randint(1, groups),
        rope_scaling=draw.choice([None, yarn]),
        rope_theta=draw.choice([10000.0, 50000.0]),
        rms_norm_eps=draw.choice([1e-6, 1e-5]),
        num_nextn_predict_layers=seed % 3,
    )


def weights(cfg: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights and biases under our names, fp32."""
    with torch.device("meta"):
        state = Transformer(cfg).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        * (tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0)
        for name, tensor in state.items()
    }


def write_folder(
    folder: Path,
    cfg: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    shards: int = 1,
    layout: Layout = "released",
    tokenizer: bool = True,
    seed: int = 0,
    **config: Any,
) -> dict[str, Tensor]:
    """Write ``state`` (our names) as they would; returns it under their names."""
    theirs = to_hf(state, cfg, layout)
    write_tensors(folder, theirs, shards, seed)
    (folder / "config.json").write_text(json.dumps(hf_config(cfg) | config))
    if tokenizer:
        byte_tokenizer().save(folder)
    return theirs


def write_tensors(folder: Path, theirs: Mapping[str, Tensor], shards: int, seed: int = 0) -> None:
    """Files and index; the tensors of a layer may end up far apart."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(theirs)
    random.Random(seed).shuffle(names)
    if shards == 1:
        save_file({n: theirs[n].contiguous() for n in names}, folder / "model.safetensors")
        return
    places = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:06d}.safetensors"
        part = names[k::shards]
        save_file({n: theirs[n].contiguous() for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantised(
    theirs: Mapping[str, Tensor], block: tuple[int, int], exponents: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projections in FP8 with their scales, and what they mean in fp32, by the reference."""
    stored, meant = dict(theirs), dict(theirs)
    for name, tensor in theirs.items():
        linear = name.endswith(
            ("_proj.weight", "kv_a_proj_with_mqa.weight", "up_proj", "down_proj")
        )
        if not linear or name.endswith("eh_proj.weight"):
            continue
        shape = block_counts((tensor.shape[-2], tensor.shape[-1]), block)
        stack = tensor.reshape(-1, *tensor.shape[-2:])
        scales = torch.rand(stack.shape[0], *shape) + 0.01
        if exponents:
            scales = scales.to(torch.float8_e8m0fnu)
        numbers = (stack * 20).to(torch.float8_e4m3fn)
        plain = [
            dequantise_blocks_plainly(one, scale, block)
            for one, scale in zip(numbers, scales, strict=True)
        ]
        meant[name] = torch.stack(plain).reshape(tensor.shape)
        stored[name] = numbers.reshape(tensor.shape)
        stored[name + "_scale_inv"] = scales.reshape(*tensor.shape[:-2], *shape)
    return stored, meant


def imported(folder: Path) -> dict[str, Tensor]:
    """The weights of an imported folder, by our names."""
    checkpoint = Checkpoint.open(folder / "checkpoints" / step_name(0))
    shapes = checkpoint.tensor_shapes()
    tensors = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    checkpoint.load(tensors)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def exported(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_equal(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
