"""Adapters as the ``peft`` library reads them: its names, and its ``adapter_config.json``.

transformers 5 holds a layer's routed experts as two stacks, ``gate_up_proj`` (E, 2F, D) and
``down_proj`` (E, D, F). peft puts one adapter on each stack (``target_parameters``), with a part
for every expert: A is (E r, in), expert by expert, and B (out, r E), the experts running fastest.
Our gate and up matrices have adapters of their own; together they are one of twice the rank, whose
B is block-diagonal.

The matrices of dense and shared layers are named as parameters too (``gate_proj.weight``): as
module names peft takes ``gate_proj`` and its like for the experts of older transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.config.schema import ModelConfig
from deepseek.interop.huggingface import hf_tensors
from deepseek.models.components.lora import LoraExperts, LoraLinear
from deepseek.models.transformer import Transformer

_PREFIX = "base_model.model."


class PeftAdapter(NamedTuple):
    """Content of the two files."""

    tensors: dict[str, Tensor]
    """For ``adapter_model.safetensors``."""
    config: dict[str, Any]
    """For ``adapter_config.json``."""


def peft_adapter(model: Transformer, config: ModelConfig, base: str | None = None) -> PeftAdapter:
    """The adapters of ``model`` under peft's names.

    Args:
        model: with adapters.
        config: of the model.
        base: name or path of the Hugging Face model that they belong on.
    """
    peft = config.peft
    assert peft is not None
    theirs = {
        target.slices[0].name: name
        for name, target in hf_tensors(replace(config, peft=None)).items()
        if target.slices and target.slices[0].expert is None
    }
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    parameters: set[str] = set()
    ranks: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, LoraLinear):
            name = theirs[f"{prefix}.weight"]
            _put(tensors, name.removesuffix(".weight"), module.lora_a, module.lora_b)
            leaf = name.split(".")[-2]
            if ".mlp." in name:
                parameters.add(f"{leaf}.weight")
            else:
                modules.add(leaf)
        elif isinstance(module, LoraExperts):
            layer = prefix.split(".")[1]
            stacks = _stacks(module)
            for depth, (leaf, (a, b)) in enumerate(reversed(stacks.items())):
                owner = f"model.layers.{layer}.mlp.experts" + ".base_layer" * depth
                _put(tensors, owner, *_flat(a, b))
                parameters.add(f"mlp.experts.{leaf}")
                if a.shape[1] != peft.dim:
                    ranks[rf".*\.{leaf}"] = a.shape[1]
    scale = peft.alpha / peft.dim
    return PeftAdapter(
        dict(sorted(tensors.items())),
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": peft.dim,
            "lora_alpha": peft.alpha,
            "target_modules": sorted(modules),
            "target_parameters": sorted(parameters) or None,
            "rank_pattern": ranks,
            "alpha_pattern": {name: scale * rank for name, rank in ranks.items()},
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        },
    )


def _stacks(experts: LoraExperts) -> dict[str, tuple[Tensor, Tensor]]:
    """A (E, r, in) and B (E, out, r) of their stacks, in the order in which peft wraps them."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    pairs = {
        name: (getattr(experts, f"{name}_lora_a"), getattr(experts, f"{name}_lora_b"))
        for name in experts.adapted
    }
    halves = [name for name in ("w1", "w3") if name in pairs]
    if halves:
        width = experts.w1.shape[1]
        a = torch.cat([pairs[name][0] for name in halves], dim=1)
        b = a.new_zeros(a.shape[0], 2 * width, a.shape[1])
        for k, name in enumerate(halves):
            row, column = (0 if name == "w1" else width), k * experts.rank
            b[:, row : row + width, column : column + experts.rank] = pairs[name][1]
        found["gate_up_proj"] = (a, b)
    if "w2" in pairs:
        found["down_proj"] = pairs["w2"]
    return found


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(E, r, in), (E, out, r) -> (E r, in), (out, r E)."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _put(tensors: dict[str, Tensor], owner: str, a: Tensor, b: Tensor) -> None:
    tensors[f"{_PREFIX}{owner}.lora_A.weight"] = a.detach().contiguous()
    tensors[f"{_PREFIX}{owner}.lora_B.weight"] = b.detach().contiguous()
