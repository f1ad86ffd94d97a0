"""What one field may hold, whatever the others hold: a range of numbers, or one of some names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deepseek.config.errors import Problem
from deepseek.config.fields import LEAVES
from deepseek.config.foreign_names import nearest


@dataclass(frozen=True)
class Range:
    """Legal numbers of one field."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """True if ``value`` is inside."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"above {self.low}" if self.low_open else f"at least {self.low}"
        if self.high in (math.inf, _MOST):
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high}"


# No sound count is larger, and the arithmetic on larger ones (divisors) would take for ever.
_MOST = 10**9

_COUNT = Range(1, _MOST)
_COUNT_OR_ZERO = Range(0, _MOST)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, low_open=True)
_SHARE = Range(0, 1)
_DECAY = Range(0, 1, high_open=True)

RANGES: dict[str, Range] = {
    "seed": Range(0, 2**32, high_open=True),  # numpy and Lightning take 32 bits
    "trainer.devices": _COUNT,
    "trainer.num_nodes": _COUNT,
    "trainer.max_steps": _COUNT,
    "trainer.val_check_interval": _COUNT_OR_ZERO,
    "trainer.limit_val_batches": _COUNT,
    "trainer.log_every_n_steps": _COUNT,
    "trainer.gradient_clip_val": _NOT_NEGATIVE,
    "trainer.num_threads": _COUNT_OR_ZERO,
    "trainer.max_restarts": _COUNT_OR_ZERO,
    # torch counts it in nanoseconds of 64 bits
    "trainer.collective_timeout_minutes": Range(0, 10**6, low_open=True),
    "model.vocab_size": _COUNT,
    "model.hidden_size": _COUNT,
    "model.num_hidden_layers": _COUNT,
    "model.num_attention_heads": _COUNT,
    "model.q_lora_rank": _COUNT,
    "model.kv_lora_rank": _COUNT,
    "model.qk_nope_head_dim": _COUNT,
    "model.qk_rope_head_dim": Range(2, _MOST),
    "model.v_head_dim": _COUNT,
    "model.intermediate_size": _COUNT,
    "model.moe_intermediate_size": _COUNT,
    "model.n_routed_experts": _COUNT,
    "model.n_shared_experts": _COUNT_OR_ZERO,
    "model.num_experts_per_tok": _COUNT,
    "model.first_k_dense_replace": _COUNT_OR_ZERO,
    "model.n_group": _COUNT,
    "model.topk_group": _COUNT,
    "model.routed_scaling_factor": _POSITIVE,
    "model.num_nextn_predict_layers": _COUNT_OR_ZERO,
    "model.max_position_embeddings": _COUNT,
    "model.rope_theta": Range(1, low_open=True),  # YaRN divides by its logarithm
    "model.rope_scaling.factor": Range(1),
    "model.rope_scaling.original_max_position_embeddings": _COUNT,
    "model.rope_scaling.beta_fast": _POSITIVE,
    "model.rope_scaling.beta_slow": _POSITIVE,
    "model.rope_scaling.mscale": _NOT_NEGATIVE,
    "model.rope_scaling.mscale_all_dim": _NOT_NEGATIVE,
    "model.rms_norm_eps": _POSITIVE,
    "model.initializer_range": _POSITIVE,
    "model.moe_aux_loss_coeff": _NOT_NEGATIVE,
    "model.moe_z_loss_coeff": _NOT_NEGATIVE,
    "model.moe_router_bias_update_rate": _SHARE,
    "model.mtp_loss_scaling_factor": _NOT_NEGATIVE,
    "model.micro_batch_size": _COUNT,
    "model.global_batch_size": _COUNT,
    "model.tensor_model_parallel_size": _COUNT,
    "model.pipeline_model_parallel_size": _COUNT,
    "model.virtual_pipeline_model_parallel_size": _COUNT,
    "model.expert_model_parallel_size": _COUNT,
    "model.data_parallel_replicate_size": _COUNT,
    "model.peft.dim": _COUNT,
    "model.peft.alpha": _POSITIVE,
    "model.tokenizer.vocab_size": Range(262, _MOST),  # 256 bytes and 6 special tokens
    "model.data.validation_fraction": _DECAY,
    "model.data.seq_length": Range(2, _MOST),  # a label is the next token
    "model.data.fim_rate": _SHARE,
    "model.data.num_workers": _COUNT_OR_ZERO,
    "model.optim.lr": _POSITIVE,
    "model.optim.eps": _POSITIVE,
    "model.optim.weight_decay": _NOT_NEGATIVE,
    "model.optim.muon_momentum": _DECAY,
    "model.optim.sched.warmup_steps": _COUNT_OR_ZERO,
    "model.optim.sched.constant_steps": _COUNT_OR_ZERO,
    "model.optim.sched.min_lr": _NOT_NEGATIVE,
    "model.optim.sched.max_steps": _COUNT,
    "exp_manager.monitor.every_n_steps": _COUNT_OR_ZERO,
    "exp_manager.monitor.peak_tflops": _POSITIVE,
    "exp_manager.checkpoint_callback_params.every_n_train_steps": _COUNT_OR_ZERO,
    "exp_manager.checkpoint_callback_params.save_top_k": Range(-1, _MOST),  # 0: see checkpoints()
}


def range_problem(path: str, value: Any) -> Problem | None:
    """The problem of a number outside the range of its field."""
    legal = RANGES.get(path)
    if legal is None or legal.holds(value):
        return None
    if value < legal.low or (legal.low_open and value == legal.low):
        way_out = f"use more than {legal.low}" if legal.low_open else f"use {legal.low} or more"
    else:
        way_out = f"use less than {legal.high}" if legal.high_open else f"use {legal.high} or less"
    default = LEAVES[path].default
    if default is not None:
        way_out += f" (default {default})"
    rule = f"must be at most {_MOST}" if value > _MOST == legal.high else f"must be {legal}"
    return Problem(path, value, rule, way_out)


NAMES: dict[str, tuple[object, ...]] = {
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "trainer.precision": ("32", "bf16-mixed", "auto", 32),
    "model.scoring_func": ("sigmoid", "softmax"),
    "model.topk_method": ("noaux_tc", "group_limited_greedy", "greedy"),
    "model.activations_checkpoint_granularity": ("full",),
    "model.rope_scaling.type": ("yarn",),
    "model.pipeline_schedule": (
        "GPipe",
        "1F1B",
        "Interleaved1F1B",
        "InterleavedZeroBubble",
        "ZBVZeroBubble",
        "DualPipeV",
    ),
    "model.peft.peft_scheme": ("lora",),
    "model.optim.name": ("adamw", "muon"),
    "model.optim.sched.name": ("CosineAnnealing", "WarmupConstantCosine"),
}

# What other stacks call a thing that exists here, where the spelling alone would not tell.
_SAME_THING: dict[str, dict[str, str]] = {
    "trainer.accelerator": {"cuda": "gpu", "tpu": "auto", "mps": "cpu"},
    "trainer.precision": {"16": "bf16-mixed", "16-mixed": "bf16-mixed", "fp32": "32"},
    "model.pipeline_schedule": {
        "interleaved": "Interleaved1F1B",
        "zerobubble": "InterleavedZeroBubble",
        "zbv": "ZBVZeroBubble",
        "dualpipe": "DualPipeV",
    },
    "model.optim.name": {"distributed_fused_adam": "adamw", "adam": "adamw"},
    "model.optim.sched.name": {"cosine": "CosineAnnealing", "wsd": "WarmupConstantCosine"},
}


def name_problem(path: str, value: Any) -> Problem | None:
    """The problem of a name that is none of those its field knows."""
    legal = NAMES.get(path)
    if legal is None or value in legal or (path, value) == ("trainer.precision", "32-true"):
        return None
    names = [name for name in legal if isinstance(name, str)]
    optional = LEAVES[path].optional and LEAVES[path].kind is not object
    *others, last = [*names, "null"] if optional else names
    listed = f"{', '.join(others)} or {last}" if others else last
    same = _SAME_THING.get(path, {}).get(str(value).lower())
    near = same or nearest(str(value), names, cutoff=0.5)
    return Problem(path, value, f"must be {listed}", f"use {near or names[0]}")
