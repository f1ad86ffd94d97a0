"""What other programs call the things of this configuration: the one table.

It answers two questions. Somebody gives a key that is not here: what is it called here
(``RENAMED``, ``NO_SUCH_KEY``)? The settings of another program are read or written (``interop``):
which of them are which keys (``TRANSFORMERS``, ``MEGATRON``)? Where a value is written otherwise as
well, the translator has a rule for it. This file imports nothing.
"""

from __future__ import annotations

TRANSFORMERS: dict[str, str] = {
    # TrainingArguments
    "output_dir": "exp_manager.exp_dir",
    "run_name": "name",
    "seed": "seed",
    "learning_rate": "model.optim.lr",
    "weight_decay": "model.optim.weight_decay",
    "adam_beta1": "model.optim.betas",
    "adam_beta2": "model.optim.betas",
    "adam_epsilon": "model.optim.eps",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_steps": "trainer.max_steps",
    "lr_scheduler_type": "model.optim.sched.name",
    "warmup_steps": "model.optim.sched.warmup_steps",
    "warmup_ratio": "model.optim.sched.warmup_steps",
    "per_device_train_batch_size": "model.micro_batch_size",
    "bf16": "trainer.precision",
    "gradient_checkpointing": "model.activations_checkpoint_granularity",
    "torch_compile": "model.torch_compile",
    "optim": "model.optim.name",
    "logging_steps": "trainer.log_every_n_steps",
    "eval_steps": "trainer.val_check_interval",
    "save_steps": "exp_manager.checkpoint_callback_params.every_n_train_steps",
    "save_total_limit": "exp_manager.checkpoint_callback_params.save_top_k",
    "report_to": "exp_manager.create_tensorboard_logger",
    "dataloader_num_workers": "model.data.num_workers",
    "ddp_timeout": "trainer.collective_timeout_minutes",
    "use_cpu": "trainer.accelerator",
    # accelerate, with its sections fsdp_config, parallelism_config and dynamo_config
    "num_machines": "trainer.num_nodes",
    "num_processes": "trainer.devices",
    "mixed_precision": "trainer.precision",
    "gradient_clipping": "trainer.gradient_clip_val",
    "activation_checkpointing": "model.activations_checkpoint_granularity",
    "fsdp_reshard_after_forward": "model.reshard_after_forward",
    "reshard_after_forward": "model.reshard_after_forward",
    "parallelism_config_dp_replicate_size": "model.data_parallel_replicate_size",
    "parallelism_config_tp_size": "model.tensor_model_parallel_size",
    "parallelism_config_cp_size": "model.context_parallel_size",
    "dynamo_backend": "model.torch_compile",
}
"""Settings of the Hugging Face Trainer and of accelerate."""

MEGATRON: dict[str, dict[str, str]] = {
    "MLATransformerConfig": {
        "num_layers": "model.num_hidden_layers",
        "hidden_size": "model.hidden_size",
        "ffn_hidden_size": "model.intermediate_size",
        "num_attention_heads": "model.num_attention_heads",
        "q_lora_rank": "model.q_lora_rank",
        "kv_lora_rank": "model.kv_lora_rank",
        "qk_head_dim": "model.qk_nope_head_dim",
        "qk_pos_emb_head_dim": "model.qk_rope_head_dim",
        "v_head_dim": "model.v_head_dim",
        "layernorm_epsilon": "model.rms_norm_eps",
        "init_method_std": "model.initializer_range",
        "mtp_num_layers": "model.num_nextn_predict_layers",
        "mtp_loss_scaling_factor": "model.mtp_loss_scaling_factor",
    },
    "experts": {
        "num_moe_experts": "model.n_routed_experts",
        "moe_ffn_hidden_size": "model.moe_intermediate_size",
        "moe_router_topk": "model.num_experts_per_tok",
        "moe_router_score_function": "model.scoring_func",
        "moe_router_topk_scaling_factor": "model.routed_scaling_factor",
        "moe_router_bias_update_rate": "model.moe_router_bias_update_rate",
        "moe_aux_loss_coeff": "model.moe_aux_loss_coeff",
        "moe_z_loss_coeff": "model.moe_z_loss_coeff",
    },
    "groups": {
        "moe_router_num_groups": "model.n_group",
        "moe_router_group_topk": "model.topk_group",
    },
    "YaRN": {
        "rotary_scaling_factor": "model.rope_scaling.factor",
        "original_max_position_embeddings": "model.rope_scaling.original_max_position_embeddings",
        "beta_fast": "model.rope_scaling.beta_fast",
        "beta_slow": "model.rope_scaling.beta_slow",
        "mscale": "model.rope_scaling.mscale",
        "mscale_all_dim": "model.rope_scaling.mscale_all_dim",
    },
    "GPTModel": {
        "vocab_size": "model.vocab_size",
        "max_sequence_length": "model.max_position_embeddings",
        "rotary_base": "model.rope_theta",
        "share_embeddings_and_output_weights": "model.tie_word_embeddings",
    },
    "parallel": {
        "tensor_model_parallel_size": "model.tensor_model_parallel_size",
        "context_parallel_size": "model.context_parallel_size",
        "pipeline_model_parallel_size": "model.pipeline_model_parallel_size",
        "expert_model_parallel_size": "model.expert_model_parallel_size",
    },
    "OptimizerConfig": {
        "lr": "model.optim.lr",
        "min_lr": "model.optim.sched.min_lr",
        "weight_decay": "model.optim.weight_decay",
        "adam_eps": "model.optim.eps",
        "clip_grad": "trainer.gradient_clip_val",
    },
    "training": {
        "seed": "seed",
        "micro_batch_size": "model.micro_batch_size",
        "global_batch_size": "model.global_batch_size",
        "seq_length": "model.data.seq_length",
        "train_iters": "trainer.max_steps",
        "data_path": "model.data.data_prefix",
        "reset_attention_mask": "model.data.isolate_documents",
        "reset_position_ids": "model.data.isolate_documents",
    },
}
"""Keyword arguments of Megatron-Core, by what takes them."""

_ELSEWHERE: dict[str, str] = {
    # DeepSeek's inference code, Hugging Face's config.json, torchtitan, nanoGPT and the like
    "n_layers": "model.num_hidden_layers",
    "n_layer": "model.num_hidden_layers",
    "n_heads": "model.num_attention_heads",
    "n_head": "model.num_attention_heads",
    "num_heads": "model.num_attention_heads",
    "d_model": "model.hidden_size",
    "n_embd": "model.hidden_size",
    "inter_dim": "model.intermediate_size",
    "moe_inter_dim": "model.moe_intermediate_size",
    "num_experts": "model.n_routed_experts",
    "num_local_experts": "model.n_routed_experts",
    "n_activated_experts": "model.num_experts_per_tok",
    "top_k": "model.num_experts_per_tok",
    "n_dense_layers": "model.first_k_dense_replace",
    "n_expert_groups": "model.n_group",
    "n_limited_groups": "model.topk_group",
    "score_func": "model.scoring_func",
    "route_scale": "model.routed_scaling_factor",
    "aux_loss_alpha": "model.moe_aux_loss_coeff",
    "router_aux_loss_coef": "model.moe_aux_loss_coeff",
    "mtp_loss_weight": "model.mtp_loss_scaling_factor",
    "rope_type": "model.rope_scaling.type",
    "rope_factor": "model.rope_scaling.factor",
    "original_seq_len": "model.rope_scaling.original_max_position_embeddings",
    "norm_eps": "model.rms_norm_eps",
    "torch_dtype": "trainer.precision",
    "fp8": "model.fp8_recipe",
    "fp8_format": "model.fp8_recipe",
    "optimizer_cpu_offload": "model.optim.cpu_offload",
    "offload_optimizer": "model.optim.cpu_offload",
    "dtype": "trainer.precision",
    # sequence and batch
    "encoder_seq_length": "model.data.seq_length",
    "max_seq_length": "model.data.seq_length",
    "max_seq_len": "model.data.seq_length",
    "max_length": "model.data.seq_length",
    "seq_len": "model.data.seq_length",
    "sequence_length": "model.data.seq_length",
    "context_length": "model.data.seq_length",
    "batch_size": "model.micro_batch_size",
    "train_batch_size": "model.global_batch_size",
    # parallel sizes and processes
    "tp": "model.tensor_model_parallel_size",
    "cp": "model.context_parallel_size",
    "pp": "model.pipeline_model_parallel_size",
    "ep": "model.expert_model_parallel_size",
    "tensor_parallel_size": "model.tensor_model_parallel_size",
    "pipeline_parallel_size": "model.pipeline_model_parallel_size",
    "expert_parallel_size": "model.expert_model_parallel_size",
    "ep_size": "model.expert_model_parallel_size",
    "pipeline_parallel_schedule": "model.pipeline_schedule",
    "virtual_pipeline_size": "model.virtual_pipeline_model_parallel_size",
    "vpp": "model.virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers": "model.pipeline_layers_per_stage",
    "decoder_last_pipeline_num_layers": "model.pipeline_layers_per_stage",
    "hsdp": "model.data_parallel_replicate_size",
    "gpus": "trainer.devices",
    "nproc_per_node": "trainer.devices",
    "nnodes": "trainer.num_nodes",
    "timeout": "trainer.collective_timeout_minutes",
    "distributed_timeout_minutes": "trainer.collective_timeout_minutes",
    "init_timeout_seconds": "trainer.collective_timeout_minutes",
    "train_timeout_seconds": "trainer.step_timeout_seconds",
    "distributed_timeout_seconds_after_init": "trainer.step_timeout_seconds",
    "recompute_granularity": "model.activations_checkpoint_granularity",
    "recompute_num_layers": "model.activations_checkpoint_num_layers",
    # optimiser
    "gradient_clip": "trainer.gradient_clip_val",
    "max_lr": "model.optim.lr",
    "optimizer": "model.optim.name",
    "scheduler": "model.optim.sched.name",
    "lr_scheduler": "model.optim.sched.name",
    "lr_warmup_iters": "model.optim.sched.warmup_steps",
    "lr_decay_iters": "model.optim.sched.max_steps",
    # fine-tuning
    "adapter_dim": "model.peft.dim",
    "lora_r": "model.peft.dim",
    "lora_alpha": "model.peft.alpha",
    "lora_target_modules": "model.peft.target_modules",
    "answer_only_loss": "model.data.chat",
    "pretrained_model_name_or_path": "model.restore_from",
    "init_from": "model.restore_from",
    "restore_from_path": "model.restore_from",
    # data and run
    "train_data": "model.data.data_prefix",
    "tokenizer_path": "model.tokenizer.path",
    "tokenizer_model": "model.tokenizer.path",
    "log_interval": "trainer.log_every_n_steps",
    "save_interval": "exp_manager.checkpoint_callback_params.every_n_train_steps",
    "enable_checkpointing": "exp_manager.create_checkpoint_callback",
    "logger": "exp_manager.create_tensorboard_logger",
}
RENAMED: dict[str, str] = {
    **{name: ours for section in MEGATRON.values() for name, ours in section.items()},
    **TRANSFORMERS,
    **_ELSEWHERE,
}
"""Name elsewhere -> dotted key here; some are the last part of a key here as well."""

_STEPS = "a run is counted in steps: set trainer.max_steps"
_NO_DROPOUT = "there is no dropout"
_NO_BIAS = "no projection has a bias"
_SILU = "the activation is always SwiGLU (silu)"
_BATCH = "it follows from model.global_batch_size"
_HEAD_DIMS = "set model.qk_nope_head_dim, model.qk_rope_head_dim and model.v_head_dim"
_SAME_IN_EVERY_LAYOUT = "there is no dropout, so that every layout computes the same"

NO_SUCH_KEY: dict[str, str] = {
    "accumulate_grad_batches": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "max_epochs": _STEPS,
    "num_train_epochs": _STEPS,
    "max_time": _STEPS,
    "dim": "set model.hidden_size (width), or model.peft.dim (rank of adapters)",
    "moe_shared_expert_intermediate_size": "set model.n_shared_experts "
    "(hidden width = n_shared_experts x moe_intermediate_size)",
    "moe_layer_freq": "every block after model.first_k_dense_replace holds experts",
    "moe_router_load_balancing_type": "set model.topk_method",
    "seq_aux": "the balance loss is always sequence-wise: set model.moe_aux_loss_coeff",
    "qk_head_dim": "set model.qk_nope_head_dim and model.qk_rope_head_dim",
    "head_dim": _HEAD_DIMS,
    "kv_channels": _HEAD_DIMS,
    "num_key_value_heads": "latent attention has no key-value heads: set model.kv_lora_rank",
    "num_query_groups": "latent attention has no query groups: set model.kv_lora_rank",
    "hidden_act": _SILU,
    "activation": _SILU,
    "attention_bias": _NO_BIAS,
    "bias": _NO_BIAS,
    "dropout": _NO_DROPOUT,
    "attention_dropout": _NO_DROPOUT,
    "hidden_dropout": _NO_DROPOUT,
    "lora_dropout": _SAME_IN_EVERY_LAYOUT,
    "adapter_dropout": _SAME_IN_EVERY_LAYOUT,
    "activations_checkpoint_method": "set model.activations_checkpoint_granularity",
    "gradient_checkpointing": "set model.activations_checkpoint_granularity=full",
    "num_layers_per_virtual_pipeline_stage": "model.virtual_pipeline_model_parallel_size "
    "counts the stages of a rank; model.pipeline_layers_per_stage gives their layers",
    "sequence_parallel": "it follows from model.tensor_model_parallel_size",
    "strategy": "it follows from model.*_model_parallel_size",
    "bf16": "set trainer.precision=bf16-mixed",
    "quantization_config": "weights are trained in fp32 or bf16-mixed: set trainer.precision",
    "lora_tuning": "write its keys directly below model.peft",
    "train_on_inputs": "set model.data.chat=true: the loss is on answers only",
    "splits_string": "set model.data.validation_fraction",
    "restore_config": "set model.restore_from",
    "explicit_log_dir": "use the option --run-dir DIR",
    "defaults": "use `extends: NAME` at the top of the file",
    "use_distributed_sampler": "the order of the data follows from seed alone",
}
"""Name elsewhere -> what to do here, where no key means the same."""

OTHER_VALUES: dict[str, dict[str, str]] = {
    "trainer.accelerator": {"cuda": "gpu", "tpu": "auto", "mps": "cpu"},
    "trainer.precision": {"16": "bf16-mixed", "16-mixed": "bf16-mixed", "fp32": "32"},
    "model.pipeline_schedule": {
        "interleaved": "Interleaved1F1B",
        "zerobubble": "InterleavedZeroBubble",
        "zbv": "ZBVZeroBubble",
        "dualpipe": "DualPipeV",
    },
    "model.moe_token_dispatcher_type": {"allgather": "alltoall", "flex": "deepep"},
    "model.optim.name": {"distributed_fused_adam": "adamw", "adam": "adamw"},
    "model.optim.sched.name": {
        "cosine": "CosineAnnealing",
        "wsd": "WarmupStableDecay",
        "constant": "WarmupStableDecay",
    },
}
"""Of a key here: its values elsewhere, in lower case, where the spelling alone would not tell."""

LORA_TARGETS: dict[str, str] = {
    "gate_up_proj": "experts.w1 and experts.w3",
    "linear_qkv": "attention",
    "linear_proj": "wo",
    "linear_q_proj": "wq",
    "linear_q_down_proj": "wq_a",
    "linear_q_up_proj": "wq_b",
    "linear_kv_down_proj": "wkv_a",
    "linear_kv_up_proj": "wkv_b",
    "linear_fc1": "w1 and w3",
    "linear_fc2": "w2",
    "all-linear": "attention, feed_forward and experts",
    "mtp": "attention, feed_forward or experts: MTP modules get no adapters, since peft and "
    "transformers have no place for them",
}
"""Matrices in ``target_modules`` of transformers 5, Megatron, NeMo and peft; those of the released
checkpoints are in ``weights.py``."""
