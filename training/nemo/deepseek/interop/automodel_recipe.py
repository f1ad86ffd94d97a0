"""A configuration as a recipe of NeMo AutoModel 0.7, for its ``DeepseekV3ForCausalLM``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek.config import RunConfig
from deepseek.config.errors import ConfigError, Problem
from deepseek.config.layout import split_layers
from deepseek.interop.peer_settings import in_bf16, lacking, local_batch, schedule

TARGET = "AutoModel 0.7"
NOTES = (
    "start values are AutoModel's own, not initializer_range",
    "weight decay acts on norms too",
    "samples come in the order of AutoModel's own shuffle",
)
"""What differs from a run here and cannot be set."""
_SCHEDULES = {"GPipe": "gpipe", "1F1B": "1f1b", "Interleaved1F1B": "interleaved1f1b"}


def automodel_recipe(run: RunConfig) -> dict[str, Any]:
    """The recipe as a tree for YAML.

    Raises:
        ConfigError: settings that AutoModel's DeepSeek-V3 has no counterpart of, all at once.
    """
    model, trainer = run.model, run.trainer
    problems = _problems(run)
    if problems:
        raise ConfigError(problems, f"the recipe for {TARGET}")
    saving = run.exp_manager.checkpoint_callback_params.every_n_train_steps
    dtype = "bfloat16" if in_bf16(run) else "float32"
    pipelined = model.pipeline_model_parallel_size > 1
    recipe: dict[str, Any] = {
        "recipe": "nemo_automodel.recipes.llm.train_ft.TrainFinetuneRecipeForNextTokenPrediction",
        "seed": run.seed,
        "step_scheduler": {
            "global_batch_size": model.global_batch_size,
            "local_batch_size": local_batch(run) if pipelined else model.micro_batch_size,
            "max_steps": trainer.max_steps,
            "num_epochs": 1,
            "ckpt_every_steps": saving or trainer.max_steps,
            "val_every_steps": trainer.val_check_interval or None,
        },
        "dist_env": {
            "backend": "nccl",
            "timeout_minutes": math.ceil(trainer.collective_timeout_minutes),
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_config",
            "config": {
                "_target_": "transformers.DeepseekV3Config",
                **_hf_config(run),
                "torch_dtype": "float32",
            },
            "torch_dtype": "float32",
            "backend": {
                "_target_": "nemo_automodel.components.models.common.BackendConfig",
                "attn": "sdpa",
                "linear": "torch",
                "rms_norm": "torch_fp32",
                "experts": "torch_mm",
                "dispatcher": "torch",
                "rope_fusion": False,
                "enable_hf_state_dict_adapter": True,
            },
            "moe_overrides": {"gate_bias_update_factor": model.moe_router_bias_update_rate},
        },
        "distributed": {
            "strategy": "fsdp2",
            "tp_size": 1,
            "cp_size": 1,
            "pp_size": model.pipeline_model_parallel_size,
            "ep_size": model.expert_model_parallel_size,
            "dp_replicate_size": model.data_parallel_replicate_size,
            "activation_checkpointing": model.activations_checkpoint_granularity == "full",
            "mp_policy": {
                "_target_": "torch.distributed.fsdp.MixedPrecisionPolicy",
                "param_dtype": dtype,
                "reduce_dtype": "float32",
                "output_dtype": dtype,
            },
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": _dataset(run, "train"),
        "dataloader": _loader(),
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": model.optim.lr,
            "betas": list(model.optim.betas),
            "eps": model.optim.eps,
            "weight_decay": model.optim.weight_decay,
        },
        "lr_scheduler": schedule(run),
        "clip_grad_norm": {"max_norm": trainer.gradient_clip_val},
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(Path(run.exp_manager.exp_dir) / f"{run.name}_automodel"),
            "model_save_format": "safetensors",
            "save_consolidated": True,
        },
    }
    if pipelined:
        recipe["distributed"]["pipeline"] = _pipeline(run)
    if trainer.val_check_interval:
        recipe["validation_dataset"] = _dataset(run, "validation")
        recipe["validation_dataloader"] = _loader()
    return recipe


def _hf_config(run: RunConfig) -> Mapping[str, Any]:
    from deepseek.interop.hf_config import hf_config

    given = hf_config(run.model)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer has them
    return {key: value for key, value in given.items() if key not in ids}


def _pipeline(run: RunConfig) -> dict[str, Any]:
    """The stages hold the layers that they hold here."""
    stages = [
        [
            *(["model.embed_tokens"] if stage.first else []),
            *(f"model.layers.{layer}" for layer in stage.layers),
            *(["model.norm", "lm_head"] if stage.last else []),
        ]
        for stage in split_layers(run.model)
    ]
    return {
        "pp_schedule": _SCHEDULES[run.model.pipeline_schedule],
        "pp_microbatch_size": run.model.micro_batch_size,
        "module_fqns_per_model_part": stages,
        "scale_grads_in_schedule": False,
        "patch_inner_model": False,
        "patch_causal_lm_model": False,
    }


def _dataset(run: RunConfig, split: str) -> dict[str, Any]:
    data = run.model.data
    paths: Any = _paths(data.data_prefix)
    shares = {"split": f"{1 - data.validation_fraction:g},{data.validation_fraction:g},0"}
    if data.validation_prefix is not None:
        paths = {"train": paths, "validation": _paths(data.validation_prefix)}
        shares = {}
    found: dict[str, Any] = {
        "_target_": "nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining",
        "paths": paths,
        "seq_length": data.seq_length,
        **shares,
        "splits_to_build": split,
        "seed": run.seed,
        "index_mapping_dir": str(Path(run.exp_manager.exp_dir) / f"{run.name}_index"),
        "tokenizer": {
            "_target_": "transformers.AutoTokenizer.from_pretrained",
            "pretrained_model_name_or_path": _tokenizer(run),
        },
    }
    if split == "validation":
        samples = run.trainer.limit_val_batches * run.model.global_batch_size
        found["num_val_samples"] = samples
    return found


def _paths(prefix: Any) -> list[str]:
    return [str(part) for part in (prefix if isinstance(prefix, list) else [prefix])]


def _tokenizer(run: RunConfig) -> str:
    """Its folder: the one given, or the one that lies with the (first) data."""
    if run.model.tokenizer.path is not None:
        path = Path(run.model.tokenizer.path)
        return str(path.parent if path.suffix == ".json" else path)
    prefix = run.model.data.data_prefix
    return f"{prefix[1] if isinstance(prefix, list) else prefix}.tokenizer"


def _loader() -> dict[str, Any]:
    return {
        "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
        "collate_fn": "torch.utils.data.default_collate",
        "dataloader_type": "single",
    }


def _problems(run: RunConfig) -> list[Problem]:
    model = run.model
    names = ", ".join(_SCHEDULES)
    return lacking(
        run,
        TARGET,
        [
            (
                "model.tensor_model_parallel_size",
                model.tensor_model_parallel_size > 1,
                "its DeepSeek-V3 declares supports_tp=False",
                "use 1, and more expert or data parallelism",
            ),
            (
                "model.num_nextn_predict_layers",
                model.num_nextn_predict_layers > 0,
                "its DeepSeek-V3 makes no MTP modules",
                "use 0",
            ),
            (
                "model.scoring_func",
                model.scoring_func != "sigmoid",
                "its DeepSeek-V3 scores by sigmoid only",
                "use sigmoid",
            ),
            (
                "model.topk_method",
                model.topk_method != "noaux_tc",
                "its DeepSeek-V3 chooses experts with a correction bias only",
                "use noaux_tc",
            ),
            (
                "model.moe_aux_loss_coeff",
                model.moe_aux_loss_coeff > 0,
                "its balance loss is over the whole local batch, not per sequence",
                "use 0",
            ),
            (
                "model.moe_z_loss_coeff",
                model.moe_z_loss_coeff > 0,
                "it has no router z-loss",
                "use 0",
            ),
            (
                "model.torch_compile",
                model.torch_compile,
                "it compiles other parts",
                "use false, and its own section `compile`",
            ),
            (
                "model.reshard_after_forward",
                model.reshard_after_forward is not None,
                "it decides that by itself",
                "use null",
            ),
            (
                "model.data.isolate_documents",
                model.data.isolate_documents,
                "its Megatron data are packed as one stream",
                "use false",
            ),
            (
                "model.pipeline_schedule",
                model.pipeline_model_parallel_size > 1
                and model.pipeline_schedule not in _SCHEDULES,
                f"of its schedules {names} are known to be the same",
                f"use {names.replace(', ', ' or ')}",
            ),
        ],
    )
