"""A configuration as what Megatron-Core 0.16 is built from: keyword arguments, as YAML."""

from __future__ import annotations

from typing import Any

from deepseek.config import RunConfig
from deepseek.config.errors import ConfigError, Problem
from deepseek.config.foreign_names import MEGATRON
from deepseek.config.layout import split_layers
from deepseek.config.schema import value_at
from deepseek.interop.peer_settings import in_bf16, lacking, schedule

TARGET = "Megatron-Core 0.16"
NOTES = (
    "names in torch_objects stand for objects: pydoc.locate(name) gives them",
    "start values are Megatron's own draws with the same standard deviation",
    "samples come in the order of Megatron's own shuffle",
)
"""What the reader must know."""


def megatron_config(run: RunConfig) -> dict[str, Any]:
    """Sections named after what takes them as keyword arguments.

    Raises:
        ConfigError: settings that Megatron-Core has no counterpart of, all at once.
    """
    problems = _problems(run)
    if problems:
        raise ConfigError(problems, f"the configuration for {TARGET}")
    model, optim = run.model, run.model.optim
    sizes = {
        **_taken(run, "parallel"),
        "virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size
        if model.virtual_pipeline_model_parallel_size > 1
        else None,
        "expert_tensor_parallel_size": 1,
    }
    dtype = "torch.bfloat16" if in_bf16(run) else "torch.float32"
    pipelined = model.pipeline_model_parallel_size > 1
    return {
        "torch_objects": {
            "MLATransformerConfig": {
                "activation_func": "torch.nn.functional.silu",
                "params_dtype": dtype,
                **({"pipeline_dtype": dtype} if pipelined else {}),
            },
            "OptimizerConfig": {"params_dtype": dtype},
        },
        "MLATransformerConfig": {
            **_architecture(run),
            **_experts(run),
            **sizes,
            "pipeline_model_parallel_layout": _stages(run),
            "sequence_parallel": model.tensor_model_parallel_size > 1,
            "bf16": in_bf16(run),
            **_recompute(run),
        },
        "GPTModel": {
            **_taken(run, "GPTModel"),
            "position_embedding_type": "rope",
            "rotary_base": _whole(model.rope_theta),
        },
        "initialize_model_parallel": {
            **sizes,
            "num_distributed_optimizer_instances": model.data_parallel_replicate_size,
        },
        "OptimizerConfig": {
            "optimizer": "adam",
            **_taken(run, "OptimizerConfig"),
            "adam_beta1": optim.betas[0],
            "adam_beta2": optim.betas[1],
            "bf16": in_bf16(run),
            "use_distributed_optimizer": True,
        },
        "OptimizerParamScheduler": {
            **schedule(run),
            "start_wd": optim.weight_decay,
            "end_wd": optim.weight_decay,
            "wd_incr_steps": 0,
            "wd_incr_style": "constant",
        },
        "training": _taken(run, "training"),
    }


def _taken(run: RunConfig, section: str) -> dict[str, Any]:
    """What means the same under another name."""
    return {theirs: value_at(run, ours) for theirs, ours in MEGATRON[section].items()}


def _architecture(run: RunConfig) -> dict[str, Any]:
    model = run.model
    rope: dict[str, Any] = {"rope_type": "rope", "rotary_base": _whole(model.rope_theta)}
    if model.rope_scaling is not None:
        yarn = _taken(run, "YaRN")
        whole = ("rotary_scaling_factor", "beta_fast", "beta_slow")
        rope |= {"rope_type": "yarn", **yarn, **{key: _whole(yarn[key]) for key in whole}}
    return {
        "multi_latent_attention": True,
        **_taken(run, "MLATransformerConfig"),
        "qk_layernorm": True,
        **rope,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mtp_num_layers": model.num_nextn_predict_layers or None,
    }


def _experts(run: RunConfig) -> dict[str, Any]:
    model = run.model
    if model.num_moe_layers == 0:
        return {}
    dense = min(model.first_k_dense_replace, model.num_hidden_layers)
    shared = model.n_shared_experts * model.moe_intermediate_size
    return {
        **_taken(run, "experts"),
        "moe_layer_freq": [0] * dense + [1] * model.num_moe_layers,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_router_pre_softmax": model.scoring_func == "softmax" and not model.norm_topk_prob,
        "moe_router_enable_expert_bias": model.topk_method == "noaux_tc",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        **(_taken(run, "groups") if _grouped(run) else {}),
    }


def _stages(run: RunConfig) -> list[list[str]] | None:
    """What each stage holds, which is what it holds here."""
    if run.model.pipeline_model_parallel_size == 1:
        return None
    ahead = ["mtp"] * run.model.num_nextn_predict_layers
    return [
        [
            *(["embedding"] if stage.first else []),
            *(["decoder"] * len(stage.layers)),
            *([*ahead, "loss"] if stage.last else []),
        ]
        for stage in split_layers(run.model)
    ]


def _recompute(run: RunConfig) -> dict[str, Any]:
    if run.model.activations_checkpoint_granularity is None:
        return {}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


def _grouped(run: RunConfig) -> bool:
    return run.model.n_group > 1 and run.model.topk_method != "greedy"


def _whole(number: float) -> float | int:
    """Megatron declares these as whole numbers."""
    return int(number) if number == int(number) else number


def _problems(run: RunConfig) -> list[Problem]:
    model = run.model
    best = 2 if model.topk_method == "noaux_tc" else 1
    taken = model.num_experts_per_tok // model.topk_group
    many = model.num_moe_layers > 0 and model.num_experts_per_tok > 1
    return lacking(
        run,
        TARGET,
        [
            (
                "model.norm_topk_prob",
                many and model.scoring_func == "sigmoid" and not model.norm_topk_prob,
                "it always normalises the chosen sigmoid scores",
                "use true",
            ),
            (
                "model.topk_group",
                model.num_moe_layers > 0 and _grouped(run) and taken != best,
                f"it scores a group by its num_experts_per_tok // topk_group = {taken} best "
                f"experts, {model.topk_method} by {best}",
                f"use {max(1, model.num_experts_per_tok // best)}, or n_group=1",
            ),
            (
                "model.scoring_func",
                model.scoring_func == "softmax" and model.topk_method == "noaux_tc",
                "it has a correction bias for sigmoid scores only",
                "use sigmoid, or another topk_method",
            ),
            (
                "model.n_group",
                _grouped(run) and model.scoring_func == "softmax" and model.norm_topk_prob,
                "with normalised softmax weights it compares groups by logits",
                "use 1, or norm_topk_prob=false",
            ),
            (
                "model.torch_compile",
                model.torch_compile,
                "it has fused kernels instead",
                "use false",
            ),
            (
                "model.reshard_after_forward",
                model.reshard_after_forward is not None,
                "its ranks keep all weights and share the optimiser's states only",
                "use null",
            ),
            (
                "model.pipeline_schedule",
                model.pipeline_model_parallel_size > 1
                and model.pipeline_schedule not in ("1F1B", "Interleaved1F1B"),
                "it has 1F1B and its interleaved form only",
                "use 1F1B or Interleaved1F1B",
            ),
        ],
    )
