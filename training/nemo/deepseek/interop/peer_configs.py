"""``deepseek emit``: a configuration in the words of NVIDIA's other programs.

``automodel_recipe``: a recipe of NeMo AutoModel for its ``DeepseekV3ForCausalLM``.
``megatron_config``: the keyword arguments that Megatron-Core's classes are built from. What a
program has no counterpart of is refused, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek.config import RunConfig, load_config
from deepseek.config.errors import ConfigError, Problem
from deepseek.config.foreign_names import MEGATRON
from deepseek.config.layout import data_parallel_size, split_layers, world_size
from deepseek.config.schema import value_at
from deepseek.config.yaml_file import dump_yaml
from deepseek.console import say
from deepseek.files import write_new
from deepseek.interop.hf_config import hf_config

AUTOMODEL = "AutoModel 0.7"
AUTOMODEL_NOTES = (
    "start values are AutoModel's own, not initializer_range",
    "weight decay acts on norms too",
    "samples come in the order of AutoModel's own shuffle",
)
"""What differs from a run here and cannot be set."""
MEGATRON_CORE = "Megatron-Core 0.16"
MEGATRON_NOTES = (
    "names in torch_objects stand for objects: pydoc.locate(name) gives them",
    "start values are Megatron's own draws with the same standard deviation",
    "samples come in the order of Megatron's own shuffle",
)
"""What the reader must know."""
_SCHEDULES = {"GPipe": "gpipe", "1F1B": "1f1b", "Interleaved1F1B": "interleaved1f1b"}


def emit(kind: str, config: str, output: Path, overrides: Sequence[str] = ()) -> None:
    """Write ``output``.

    Args:
        kind: ``automodel`` or ``megatron``.
        config: name of a shipped configuration, or a YAML file.
        output: a file that does not exist.
        overrides: ``a.b=c``.

    Raises:
        ConfigError: of the configuration, or what the target lacks; every problem at once.
        UserError: the file exists or cannot be written.
    """
    run = load_config(config, overrides)
    if kind == "automodel":
        tree, program, notes = automodel_recipe(run), AUTOMODEL, AUTOMODEL_NOTES
    else:
        tree, program, notes = megatron_config(run), MEGATRON_CORE, MEGATRON_NOTES
    words = " ".join(["deepseek emit", kind, config, *overrides])
    lines = [f"For {program}, by `{words}`.", *notes]
    write_new(output, "".join(f"# {line}\n" for line in lines) + dump_yaml(tree))
    say(f"written      {output}, for {program}")
    for note in notes:
        say(f"note         {note}")


# -- NeMo AutoModel --


def automodel_recipe(run: RunConfig) -> dict[str, Any]:
    """The recipe as a tree for YAML.

    Raises:
        ConfigError: settings that AutoModel's DeepSeek-V3 has no counterpart of, all at once.
    """
    model, trainer = run.model, run.trainer
    problems = _automodel_problems(run)
    if problems:
        raise ConfigError(problems, f"the recipe for {AUTOMODEL}")
    saving = run.exp_manager.checkpoint_callback_params.every_n_train_steps
    dtype = "bfloat16" if _in_bf16(run) else "float32"
    pipelined = model.pipeline_model_parallel_size > 1
    recipe: dict[str, Any] = {
        "recipe": "nemo_automodel.recipes.llm.train_ft.TrainFinetuneRecipeForNextTokenPrediction",
        "seed": run.seed,
        "step_scheduler": {
            "global_batch_size": model.global_batch_size,
            "local_batch_size": _local_batch(run) if pipelined else model.micro_batch_size,
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
            "activation_checkpointing": model.activations_checkpoint_granularity is not None,
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
        "lr_scheduler": _schedule(run),
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
    given = hf_config(run.model)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer has them
    return {key: value for key, value in given.items() if key not in ids}


def _pipeline(run: RunConfig) -> dict[str, Any]:
    """The stages hold the layers that they hold here."""
    stages = [
        [
            *(["model.embed_tokens"] if stage.first else []),
            *(f"model.layers.{layer}" for layer in stage.layers),
            *(["model.norm", "lm_head"] if stage.main else []),
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


def _automodel_problems(run: RunConfig) -> list[Problem]:
    model = run.model
    pipelined = model.pipeline_model_parallel_size > 1
    found = _unlike(
        run,
        AUTOMODEL,
        [
            (
                "tensor_model_parallel_size",
                1,
                "its DeepSeek-V3 declares supports_tp=False",
                "1, and more expert or data parallelism",
            ),
            (
                "context_parallel_size",
                1,
                "its context parallelism has not been compared with this one",
                "1, and more expert or data parallelism",
            ),
            ("num_nextn_predict_layers", 0, "its DeepSeek-V3 makes no MTP modules", "0"),
            ("scoring_func", "sigmoid", "its DeepSeek-V3 scores by sigmoid only", "sigmoid"),
            (
                "topk_method",
                "noaux_tc",
                "its DeepSeek-V3 chooses experts with a correction bias only",
                "noaux_tc",
            ),
            (
                "moe_aux_loss_coeff",
                0,
                "its balance loss is over the whole local batch, not per sequence",
                "0",
            ),
            ("moe_z_loss_coeff", 0, "it has no router z-loss", "0"),
            *_compiled(run, "it compiles other parts", "null, and its own section `compile`"),
            ("reshard_after_forward", None, "it decides that by itself", "null"),
            (
                "data.isolate_documents",
                False,
                "its Megatron data are packed as one stream",
                "false",
            ),
        ],
    )
    if pipelined and model.pipeline_schedule not in _SCHEDULES:
        names = ", ".join(_SCHEDULES)
        why = f"of its schedules {names} are known to be the same"
        found.append(_problem(run, "pipeline_schedule", why, names.replace(", ", " or ")))
    return found


# -- Megatron-Core --


def megatron_config(run: RunConfig) -> dict[str, Any]:
    """Sections named after what takes them as keyword arguments.

    Raises:
        ConfigError: settings that Megatron-Core has no counterpart of, all at once.
    """
    problems = _megatron_problems(run)
    if problems:
        raise ConfigError(problems, f"the configuration for {MEGATRON_CORE}")
    model, optim = run.model, run.model.optim
    sizes = {
        **_taken(run, "parallel"),
        "virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size
        if model.virtual_pipeline_model_parallel_size > 1
        else None,
        "expert_tensor_parallel_size": 1,
    }
    dtype = "torch.bfloat16" if _in_bf16(run) else "torch.float32"
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
            "bf16": _in_bf16(run),
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
            "bf16": _in_bf16(run),
            "use_distributed_optimizer": True,
        },
        "OptimizerParamScheduler": {
            **_schedule(run),
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
            *(ahead if stage.ahead else []),
            *(["loss"] if stage.last else []),
        ]
        for stage in split_layers(run.model)
    ]


def _recompute(run: RunConfig) -> dict[str, Any]:
    if run.model.activations_checkpoint_granularity is None:
        return {}
    number = run.model.activations_checkpoint_num_layers
    if run.model.activations_checkpoint_granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": ["layernorm", "mla_up_proj", "moe_act"],
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform" if number is None else "block",
        "recompute_num_layers": number or 1,
    }


def _grouped(run: RunConfig) -> bool:
    return run.model.n_group > 1 and run.model.topk_method != "greedy"


def _whole(number: float) -> float | int:
    """Megatron declares these as whole numbers."""
    return int(number) if number == int(number) else number


def _megatron_problems(run: RunConfig) -> list[Problem]:
    model = run.model
    best = 2 if model.topk_method == "noaux_tc" else 1
    taken = model.num_experts_per_tok // model.topk_group
    softmax = model.scoring_func == "softmax"
    pipelined = model.pipeline_model_parallel_size > 1
    kept = "its ranks keep all weights and share the optimiser's states only"
    found = _unlike(
        run,
        MEGATRON_CORE,
        [
            *_compiled(run, "it has fused kernels instead", "null or false"),
            ("reshard_after_forward", None, kept, "null"),
        ],
    )

    def refuse(key: str, why: str, instead: str) -> None:
        found.append(_problem(run, key, why, instead))

    if model.num_moe_layers > 0 and model.num_experts_per_tok > 1:
        if not softmax and not model.norm_topk_prob:
            refuse("norm_topk_prob", "it always normalises the chosen sigmoid scores", "true")
    if model.num_moe_layers > 0 and _grouped(run) and taken != best:
        refuse(
            "topk_group",
            f"it scores a group by its num_experts_per_tok // topk_group = {taken} best "
            f"experts, {model.topk_method} by {best}",
            f"{max(1, model.num_experts_per_tok // best)}, or n_group=1",
        )
    if softmax and model.topk_method == "noaux_tc":
        why = "it has a correction bias for sigmoid scores only"
        refuse("scoring_func", why, "sigmoid, or another topk_method")
    if _grouped(run) and softmax and model.norm_topk_prob:
        why = "with normalised softmax weights it compares groups by logits"
        refuse("n_group", why, "1, or norm_topk_prob=false")
    if pipelined and model.pipeline_schedule not in ("1F1B", "Interleaved1F1B"):
        why = "it has 1F1B and its interleaved form only"
        refuse("pipeline_schedule", why, "1F1B or Interleaved1F1B")
    return found


# -- both --


def _schedule(run: RunConfig) -> dict[str, Any]:
    """``optim.sched`` for ``OptimizerParamScheduler``, which both have.

    Its warm-up goes from ``init_lr`` to the peak in ``lr_warmup_steps``. With these values each
    step has the learning rate that it has here.
    """
    sched, peak = run.model.optim.sched, run.model.optim.lr
    total = sched.max_steps if sched.max_steps is not None else run.trainer.max_steps
    warmup, constant = sched.warmup_steps, sched.constant_steps
    if sched.name != "CosineAnnealing":
        stable = sched.name == "WarmupStableDecay"
        decay = min(sched.decay_steps, total - warmup) if stable else total - warmup - constant
        return {
            "lr_decay_style": "WSD" if decay or not stable else "constant",
            "lr_wsd_decay_style": sched.decay_style if stable else "cosine",
            "wsd_decay_steps": max(1, decay),
            "init_lr": peak / warmup if warmup else 0.0,
            "lr_warmup_steps": max(0, warmup - 1),
            "lr_decay_steps": total,
            "max_lr": peak,
            "min_lr": sched.min_lr,
        }
    return {
        "lr_decay_style": "cosine",
        "init_lr": 0.0 if constant else peak / (warmup + 1),
        "lr_warmup_steps": warmup,
        "lr_decay_steps": total - constant,
        "max_lr": peak,
        "min_lr": sched.min_lr,
    }


def _compiled(run: RunConfig, why: str, instead: str) -> list[tuple[str, object, str, str]]:
    """Of a run that asks for it, for ``_unlike``."""
    return [("torch_compile", None, why, instead)] if run.model.torch_compile else []


def _unlike(
    run: RunConfig, target: str, extra: Sequence[tuple[str, object, str, str]]
) -> list[Problem]:
    """The settings that ``target`` has no counterpart of.

    Args:
        run: the configuration.
        target: name of the program.
        extra: key below ``model``, the only value the program knows, why, and what to use.
    """
    known: list[tuple[str, object, str, str]] = [
        (
            "peft",
            None,
            f"adapters are described otherwise in {target}",
            "model.peft=null, and its own section for adapters",
        ),
        (
            "restore_from",
            None,
            f"{target} does not read these files",
            "null; `deepseek hf export` writes the weights as files that it loads",
        ),
        ("fp8_kernels", False, f"{target} has recipes of its own", "false"),
        ("fp8_recipe", None, f"{target} has recipes of its own", "null, and its own setting"),
        ("overlap_moe_expert_parallel_comm", False, f"{target} has a setting of its own", "false"),
        ("moe_dispatch_fp8", False, f"{target} has a setting of its own", "false"),
        ("moe_ranks_per_node", None, f"{target} decides how tokens travel", "null"),
        ("cpu_offloading_activations", False, f"{target} has a setting of its own", "false"),
        ("optim.moments_dtype", "fp32", f"{target} chooses it elsewhere", "fp32"),
        ("optim.cpu_offload", False, f"{target} has a setting of its own", "false"),
        ("optim.name", "adamw", "Muon is another one there, with other settings", "adamw"),
        ("optim.qk_clip_threshold", None, f"{target} would not clip so", "null"),
        (
            "data.chat",
            False,
            f"{target} does not read the marks of answers beside the data",
            "false, and its own chat data",
        ),
        ("rampup_batch_size", None, f"{target} takes one batch size", "null"),
        ("data.fim_rate", 0, f"{target} does not rearrange documents", "0"),
        *extra,
    ]
    found = [
        _problem(run, key, why, instead)
        for key, only, why, instead in known
        if value_at(run, f"model.{key}") != only
    ]
    if run.model.data.data_prefix is None:
        way_out = "write data with `deepseek prepare-data` and give its prefix"
        why = f"{target} cannot open the built-in corpus"
        found.append(Problem("model.data.data_prefix", None, why, way_out))
    return found


def _problem(run: RunConfig, key: str, why: str, instead: str) -> Problem:
    return Problem(f"model.{key}", value_at(run, f"model.{key}"), why, f"use {instead}")


def _local_batch(run: RunConfig) -> int:
    """Sequences of one optimiser step on one data-parallel rank."""
    model = run.model
    ranks = data_parallel_size(model, world_size(run))
    assert ranks is not None, "config/layout_rules.py lets this layout through"
    return model.global_batch_size // ranks


def _in_bf16(run: RunConfig) -> bool:
    """Whether products are in bf16; ``auto`` is for a GPU here."""
    return str(run.trainer.precision) != "32"
