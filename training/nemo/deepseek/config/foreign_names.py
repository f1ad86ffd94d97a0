"""What an unknown key was probably meant to be.

Tried in this order: the names other stacks use, the same key in another section, the nearest
spelling in the same section, the nearest spelling anywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from deepseek.config.fields import FIELDS, LEAVES

# Names of Hugging Face, Megatron, NeMo, Lightning and DeepSeek's inference code. A dotted key of
# this schema, or a sentence where there is none.
OTHER_NAMES: dict[str, str] = {
    # sequence and batch
    "encoder_seq_length": "model.data.seq_length",
    "max_seq_length": "model.data.seq_length",
    "max_seq_len": "model.data.seq_length",
    "seq_len": "model.data.seq_length",
    "sequence_length": "model.data.seq_length",
    "context_length": "model.data.seq_length",
    "batch_size": "model.micro_batch_size",
    "train_batch_size": "model.global_batch_size",
    "per_device_train_batch_size": "model.micro_batch_size",
    "accumulate_grad_batches": "it follows from model.global_batch_size",
    "gradient_accumulation_steps": "it follows from model.global_batch_size",
    "max_epochs": "a run is counted in steps: set trainer.max_steps",
    "num_train_epochs": "a run is counted in steps: set trainer.max_steps",
    "max_time": "a run is counted in steps: set trainer.max_steps",
    "train_iters": "trainer.max_steps",
    # architecture
    "num_layers": "model.num_hidden_layers",
    "n_layers": "model.num_hidden_layers",
    "n_layer": "model.num_hidden_layers",
    "n_heads": "model.num_attention_heads",
    "n_head": "model.num_attention_heads",
    "num_heads": "model.num_attention_heads",
    "dim": "set model.hidden_size (width), or model.peft.dim (rank of adapters)",
    "d_model": "model.hidden_size",
    "n_embd": "model.hidden_size",
    "ffn_hidden_size": "model.intermediate_size",
    "inter_dim": "model.intermediate_size",
    "moe_ffn_hidden_size": "model.moe_intermediate_size",
    "moe_inter_dim": "model.moe_intermediate_size",
    "num_moe_experts": "model.n_routed_experts",
    "num_experts": "model.n_routed_experts",
    "num_local_experts": "model.n_routed_experts",
    "moe_router_topk": "model.num_experts_per_tok",
    "n_activated_experts": "model.num_experts_per_tok",
    "top_k": "model.num_experts_per_tok",
    "moe_shared_expert_intermediate_size": "set model.n_shared_experts "
    "(hidden width = n_shared_experts x moe_intermediate_size)",
    "moe_layer_freq": "every block after model.first_k_dense_replace holds experts",
    "n_dense_layers": "model.first_k_dense_replace",
    "n_expert_groups": "model.n_group",
    "moe_router_num_groups": "model.n_group",
    "n_limited_groups": "model.topk_group",
    "moe_router_group_topk": "model.topk_group",
    "score_func": "model.scoring_func",
    "moe_router_score_function": "model.scoring_func",
    "moe_router_load_balancing_type": "set model.topk_method",
    "route_scale": "model.routed_scaling_factor",
    "moe_router_topk_scaling_factor": "model.routed_scaling_factor",
    "aux_loss_alpha": "model.moe_aux_loss_coeff",
    "router_aux_loss_coef": "model.moe_aux_loss_coeff",
    "seq_aux": "the balance loss is always sequence-wise: set model.moe_aux_loss_coeff",
    "moe_token_dispatcher_type": "the dispatcher follows from model.expert_model_parallel_size",
    "mtp_num_layers": "model.num_nextn_predict_layers",
    "mtp_loss_weight": "model.mtp_loss_scaling_factor",
    "qk_head_dim": "set model.qk_nope_head_dim and model.qk_rope_head_dim",
    "head_dim": "set model.qk_nope_head_dim, model.qk_rope_head_dim and model.v_head_dim",
    "kv_channels": "set model.qk_nope_head_dim, model.qk_rope_head_dim and model.v_head_dim",
    "qk_pos_emb_head_dim": "model.qk_rope_head_dim",
    "num_key_value_heads": "latent attention has no key-value heads: set model.kv_lora_rank",
    "num_query_groups": "latent attention has no query groups: set model.kv_lora_rank",
    "rotary_base": "model.rope_theta",
    "rope_type": "model.rope_scaling.type",
    "rope_factor": "model.rope_scaling.factor",
    "original_seq_len": "model.rope_scaling.original_max_position_embeddings",
    "layernorm_epsilon": "model.rms_norm_eps",
    "norm_eps": "model.rms_norm_eps",
    "init_method_std": "model.initializer_range",
    "hidden_act": "the activation is always SwiGLU (silu)",
    "activation": "the activation is always SwiGLU (silu)",
    "attention_bias": "no projection has a bias",
    "bias": "no projection has a bias",
    "attention_dropout": "there is no dropout",
    "hidden_dropout": "there is no dropout",
    "share_embeddings_and_output_weights": "model.tie_word_embeddings",
    "activations_checkpoint_method": "set model.activations_checkpoint_granularity",
    "recompute_granularity": "model.activations_checkpoint_granularity",
    "gradient_checkpointing": "set model.activations_checkpoint_granularity=full",
    # parallel sizes
    "tp": "model.tensor_model_parallel_size",
    "pp": "model.pipeline_model_parallel_size",
    "ep": "model.expert_model_parallel_size",
    "tensor_parallel_size": "model.tensor_model_parallel_size",
    "pipeline_parallel_size": "model.pipeline_model_parallel_size",
    "expert_parallel_size": "model.expert_model_parallel_size",
    "ep_size": "model.expert_model_parallel_size",
    "pipeline_parallel_schedule": "model.pipeline_schedule",
    "virtual_pipeline_size": "model.virtual_pipeline_model_parallel_size",
    "vpp": "model.virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage": "model.virtual_pipeline_model_parallel_size "
    "counts the stages of a rank; model.pipeline_layers_per_stage gives their layers",
    "decoder_first_pipeline_num_layers": "model.pipeline_layers_per_stage",
    "decoder_last_pipeline_num_layers": "model.pipeline_layers_per_stage",
    "hsdp": "model.data_parallel_replicate_size",
    "fsdp_reshard_after_forward": "model.reshard_after_forward",
    "context_parallel_size": "there is no context parallelism",
    "sequence_parallel": "it follows from model.tensor_model_parallel_size",
    "strategy": "it follows from model.*_model_parallel_size",
    "gpus": "trainer.devices",
    "nproc_per_node": "trainer.devices",
    "nnodes": "trainer.num_nodes",
    "timeout": "trainer.collective_timeout_minutes",
    # optimiser
    "gradient_clip": "trainer.gradient_clip_val",
    "clip_grad": "trainer.gradient_clip_val",
    "max_grad_norm": "trainer.gradient_clip_val",
    "learning_rate": "model.optim.lr",
    "max_lr": "model.optim.lr",
    "optimizer": "model.optim.name",
    "scheduler": "model.optim.sched.name",
    "lr_scheduler": "model.optim.sched.name",
    "lr_warmup_iters": "model.optim.sched.warmup_steps",
    "lr_decay_iters": "model.optim.sched.max_steps",
    "warmup_ratio": "model.optim.sched.warmup_steps",
    "adam_beta1": "model.optim.betas",
    "adam_beta2": "model.optim.betas",
    "adam_eps": "model.optim.eps",
    # fine-tuning
    "adapter_dim": "model.peft.dim",
    "lora_r": "model.peft.dim",
    "lora_alpha": "model.peft.alpha",
    "dropout": "there is no dropout",
    "lora_dropout": "there is no dropout, so that every layout computes the same",
    "adapter_dropout": "there is no dropout, so that every layout computes the same",
    "lora_tuning": "write its keys directly below model.peft",
    "lora_target_modules": "model.peft.target_modules",
    "answer_only_loss": "model.data.chat",
    "train_on_inputs": "set model.data.chat=true: the loss is on answers only",
    # precision, data, run
    "torch_dtype": "trainer.precision",
    "dtype": "trainer.precision",
    "bf16": "set trainer.precision=bf16-mixed",
    "quantization_config": "weights are trained in fp32 or bf16-mixed: set trainer.precision",
    "data_path": "model.data.data_prefix",
    "train_data": "model.data.data_prefix",
    "splits_string": "set model.data.validation_fraction",
    "pretrained_model_name_or_path": "model.restore_from",
    "init_from": "model.restore_from",
    "restore_from_path": "model.restore_from",
    "restore_config": "set model.restore_from",
    "tokenizer_path": "model.tokenizer.path",
    "tokenizer_model": "model.tokenizer.path",
    "log_interval": "trainer.log_every_n_steps",
    "save_interval": "exp_manager.checkpoint_callback_params.every_n_train_steps",
    "output_dir": "exp_manager.exp_dir",
    "explicit_log_dir": "use the option --run-dir DIR",
    "defaults": "use `extends: NAME` at the top of the file",
    "enable_checkpointing": "exp_manager.create_checkpoint_callback",
    "logger": "exp_manager.create_tensorboard_logger",
    "use_distributed_sampler": "the order of the data follows from seed alone",
}


def unknown_key_way_out(path: str) -> str:
    """The way out for the unknown dotted key ``path``."""
    parent, _, key = path.rpartition(".")
    value = next((name for name in LEAVES if path.startswith(f"{name}.")), None)
    if value is not None:
        return f"{value} is a value, not a section: write {value}=..."
    other = OTHER_NAMES.get(key)
    if other is not None:
        return f"use {other}" if other in FIELDS else other
    elsewhere = _in_other_sections(path)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    siblings = [name for name in FIELDS if name.rpartition(".")[0] == parent]
    near = nearest(key, [name.rpartition(".")[2] for name in siblings], cutoff=0.6)
    if near is not None:
        return f"did you mean {parent}.{near}?" if parent else f"did you mean {near}?"
    near = nearest(key, {name.rpartition(".")[2] for name in FIELDS})
    if near is not None:
        return f"did you mean {' or '.join(_ending_with(near))}?"
    if siblings:
        section = parent or "the top level"
        if len(siblings) > 12:
            return f"`deepseek cat deepseek_v3_tiny` shows the {len(siblings)} keys of {section}"
        names = ", ".join(name.rpartition(".")[2] for name in siblings)
        return f"{section} has the keys {names}"
    return "remove it"


def nearest(word: str, options: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The option spelt most like ``word``, upper and lower case alike; None if none is near."""
    by_lower = {option.lower(): option for option in sorted(options)}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def _in_other_sections(path: str) -> list[str]:
    """Keys that end as ``path`` does, matching as many of its last names as possible."""
    names = path.split(".")
    for start in range(len(names)):
        found = _ending_with(".".join(names[start:]))
        if found:
            return found
    return []


def _ending_with(suffix: str) -> list[str]:
    return [name for name in FIELDS if name == suffix or name.endswith(f".{suffix}")]
