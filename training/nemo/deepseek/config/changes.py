"""Which settings of a run may change when it goes on, and which make it another run."""

from __future__ import annotations

import re
from typing import Any

from deepseek.config.schema import FIELDS

FIXED = {
    "model.optim.name",
    "model.vocab_size",
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.q_lora_rank",
    "model.kv_lora_rank",
    "model.qk_nope_head_dim",
    "model.qk_rope_head_dim",
    "model.v_head_dim",
    "model.intermediate_size",
    "model.moe_intermediate_size",
    "model.n_routed_experts",
    "model.n_shared_experts",
    "model.first_k_dense_replace",
    "model.num_nextn_predict_layers",
    "model.topk_method",
    "model.peft",
    "model.peft.peft_scheme",
    "model.peft.dim",
    "model.peft.alpha",
    "model.peft.target_modules",
    "model.peft.base_dtype",
}
"""Keys a run keeps for life: they decide the tensors."""
SAMPLES = {
    "seed",
    "model.global_batch_size",
    "model.rampup_batch_size",
    "model.data.seq_length",
    "model.data.isolate_documents",
    "model.data.fim_rate",
    "model.data.validation_fraction",
}
"""Keys that decide which sample comes when."""
HARMLESS = re.compile(
    r"name|exp_manager\..*|trainer\.(?!precision|gradient_clip_val).*"
    r"|model\.(model_type|restore_from|micro_batch_size|torch_compile|reshard_after_forward"
    r"|pipeline_.*|.*_parallel_size|data_parallel_replicate_size|moe_token_dispatcher_type|moe_ranks_per_node|overlap_moe_.*|fp8_kernels"
    r"|activations_checkpoint_.*|cpu_offloading_activations|optim\.(sched\.max_steps|cpu_offload)|tokenizer\..*"
    r"|data\.(data_prefix|validation_prefix|chat|num_workers|cache_dir))"
)
"""Keys under which a run computes the same up to rounding, or that are compared by what they come
to: data and tokenizer by their fingerprint, the length of the schedule by its learning rates."""


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What differs between two flat configurations: by key, ``key BEFORE -> NOW``."""
    return {
        key: f"{key} {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def with_new_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of an earlier version, with the default of each key that it did not know."""
    sections = {key.rpartition(".")[0] for key in before}
    new = {
        key: FIELDS[key].default
        for key in now.keys() - before.keys()
        if key in FIELDS and key.rpartition(".")[0] in sections
    }
    return before | new


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
