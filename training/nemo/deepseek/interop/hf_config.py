"""``config.json`` of Hugging Face and our model configuration: what each says of the other.

``hf_config`` writes the dictionary, ``model_config`` reads it. What this model does not compute is
refused, with the reason. No file is read or written here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from deepseek.config.errors import ConfigError, Problem, UserError, shown
from deepseek.config.schema import ModelConfig, RopeScaling

# Keys of ``config.json`` that mean the same under the same name.
_SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "scoring_func",
    "topk_method",
    "norm_topk_prob",
    "routed_scaling_factor",
    "num_nextn_predict_layers",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
COMPUTED_KEYS = frozenset(_SAME_KEYS) - {
    "initializer_range",
    "max_position_embeddings",
    "num_nextn_predict_layers",
} | {"rope_theta", "rope_scaling"}
"""Keys of ``ModelConfig`` on which the logits of given weights depend."""
# Options of the Hugging Face classes that exist here at one value only.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "mlp_bias": False,
    "rope_interleave": True,
    "tie_word_embeddings": False,
}
_V3 = "DeepseekV3ForCausalLM"
_V2 = "DeepseekV2ForCausalLM"
_TYPE_OF_CLASS = {_V3: "deepseek_v3", _V2: "deepseek_v2"}
_CLASS_OF_TYPE = {"deepseek_v3": _V3, "kimi_k2": _V3, "deepseek_v2": _V2}
# What the absence of a key means to the class.
_IF_ABSENT: dict[str, dict[str, Any]] = {
    _V3: {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
    },
    _V2: {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
    },
}
# What the class computes whatever ``config.json`` says.
_CLASS_RULES: dict[str, dict[str, tuple[Any, ...]]] = {
    _V3: {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    _V2: {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
        "num_nextn_predict_layers": (0,),
    },
}
# Keys that do not change what the model computes: about training, generation, files and versions.
_IDLE_KEYS = frozenset(
    """
    _attn_implementation _name_or_path add_cross_attention architectures attn_implementation
    auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_key_value_heads num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads quantization_config remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate rope_parameters rope_scaling rope_theta sep_token_id seq_aux
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed
    use_bfloat16 use_cache
    """.split()
)
# Architectures that look alike, and why they are not this one.
_SPARSE = "its attention picks tokens with an indexer (sparse attention), which this model lacks"
_HYPER = "it replaces the residual stream by hyper-connections, which this model lacks"
_REFUSED = {
    "DeepseekV32ForCausalLM": _SPARSE,
    "GlmMoeDsaForCausalLM": _SPARSE,
    "DeepseekV4ForCausalLM": (
        "it replaces multi-head latent attention by sliding and compressed attention, "
        "and the residual stream by hyper-connections"
    ),
    "KimiK25ForConditionalGeneration": (
        "it joins a vision and a language model; pass its text_config, and the weights under "
        "language_model. without that prefix"
    ),
}
# Keys that tell such an architecture whatever its class is called.
_REFUSED_KEYS = {
    "index_topk": _SPARSE,
    "index_n_heads": _SPARSE,
    "index_head_dim": _SPARSE,
    "hc_mult": _HYPER,
}
_YARN_KEYS = frozenset(RopeScaling.__dataclass_fields__) | {"rope_type", "rope_theta"}


def hf_config(cfg: ModelConfig, mtp: bool = True) -> dict[str, Any]:
    """Content of the ``config.json`` beside weights that ``to_hf(..., mtp=mtp)`` gave.

    Token ids are null: they are the tokenizer's to fill in. Without them the Hugging Face classes
    would take defaults that belong to another tokenizer. Where ``rms_norm_eps`` is not 1e-6,
    transformers keeps 1e-6 in the two latent norms of attention; vLLM and SGLang compute as here.

    Raises:
        ConfigError: no Hugging Face class computes what ``cfg`` describes.
    """
    family = _V3 if cfg.scoring_func == "sigmoid" else _V2
    depths = cfg.num_nextn_predict_layers if mtp else 0
    ours = {**{key: getattr(cfg, key) for key in _SAME_KEYS}, "num_nextn_predict_layers": depths}
    scaling = cfg.rope_scaling
    problems = _class_problems(family, ours, scaling, prefix="model.")
    if problems:
        raise ConfigError(problems, f"the export to {family}")
    return {
        "architectures": [family],
        "model_type": _TYPE_OF_CLASS[family],
        **ours,
        **_FIXED,
        "num_key_value_heads": cfg.num_attention_heads,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if scaling is None else asdict(scaling),
        "aux_loss_alpha": cfg.moe_aux_loss_coeff,
        "seq_aux": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
    }


def model_config(hf: Mapping[str, Any], ignore: Collection[str] = ()) -> ModelConfig:
    """The model that a ``config.json`` describes; what it does not say stays at our defaults.

    Takes DeepSeek-V3, R1, V3.1, Kimi-K2, Moonlight (``DeepseekV3ForCausalLM``), V2 and V2-Lite
    (``DeepseekV2ForCausalLM``), written by hand or by transformers 4 or 5. A key that is not known
    is refused, since it may change the model; keys that begin with ``_`` are not, being notes.

    Args:
        hf: content of ``config.json``.
        ignore: unknown keys that are known not to change the model.

    Raises:
        UserError: another architecture; says why it is not this one.
        ConfigError: a key is missing, or asks for something that this model does not compute.
    """
    family = _family(hf)
    stated = {key: value for key, value in hf.items() if value is not None or key == "q_lora_rank"}
    given = {**_IF_ABSENT[family], **stated}
    theta, scaling, problems = _rope(given)
    problems += [
        Problem(key, "(absent)", "the architecture depends on it", f"add {key} to config.json")
        for key in _SAME_KEYS
        if key not in given
    ]
    if not problems:
        required = {**_FIXED, "num_key_value_heads": given["num_attention_heads"]}
        problems += [
            Problem(
                key, given[key], f"this model has only {shown(value)}", "take another checkpoint"
            )
            for key, value in required.items()
            if given.get(key, value) != value
        ]
        problems += _class_problems(family, given, scaling, prefix="")
    problems += _unknown_keys(given, ignore)
    if problems:
        raise ConfigError(problems, "config.json")

    ours = {key: given[key] for key in _SAME_KEYS}
    if "aux_loss_alpha" in given:
        ours["moe_aux_loss_coeff"] = float(given["aux_loss_alpha"])
    return ModelConfig(**ours, rope_theta=theta, rope_scaling=scaling)


def _family(hf: Mapping[str, Any]) -> str:
    """The Hugging Face class; raises UserError if this model does not compute the same."""
    architectures = hf.get("architectures") or []
    name = architectures[0] if architectures else _CLASS_OF_TYPE.get(hf.get("model_type", ""))
    key = next((key for key in _REFUSED_KEYS if hf.get(key) is not None), None)
    if name in _TYPE_OF_CLASS and key is None:
        return name
    if key is not None:
        reason: str | None = f"{_REFUSED_KEYS[key]} ({key}={shown(hf[key])})"
    else:
        reason = _REFUSED.get(name or "")
    if reason is None:
        known = ", ".join(_TYPE_OF_CLASS)
        reason = f"only {known} (DeepSeek-V2, V3, R1, V3.1, Kimi-K2, Moonlight) can be read"
    raise UserError(f"config.json describes {name or hf.get('model_type')}: {reason}")


def _unknown_keys(given: Mapping[str, Any], ignore: Collection[str]) -> list[Problem]:
    """Options that this model may lack; one that is off (null, false, empty) is none."""
    known = {*_SAME_KEYS, *_FIXED, *_IDLE_KEYS, *ignore}
    problems = []
    nope, rope = given.get("qk_nope_head_dim"), given.get("qk_rope_head_dim")
    if isinstance(nope, int) and isinstance(rope, int):
        # transformers 5 writes these two beside what they follow from.
        for key, fitting in (("qk_head_dim", (nope + rope,)), ("head_dim", (rope, nope + rope))):
            if given.get(key) in fitting:
                known.add(key)
    for key, value in given.items():
        if key not in known and not key.startswith("_") and value not in (None, False, [], {}, ""):
            problems.append(
                Problem(
                    key,
                    value,
                    "this model has no such option, and it may change what is computed",
                    f"if it does not, ignore it (--ignore-key {key})",
                )
            )
    return problems


def _rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None, list[Problem]]:
    """Base, YaRN and what is wrong with them; transformers 4 and 5 spell them differently."""
    if "rope_parameters" in given:
        keys = dict(given["rope_parameters"])
    else:
        keys = {"rope_theta": given.get("rope_theta", 10000.0), **given.get("rope_scaling", {})}
    keys = {key: value for key, value in keys.items() if value is not None}
    theta = float(keys.get("rope_theta", 10000.0))
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind == "default":
        return theta, None, []
    if kind != "yarn":
        rule = "this model knows yarn and plain rotary embeddings"
        return theta, None, [Problem("rope_scaling.type", kind, rule, "take another checkpoint")]

    neutral = {"truncate": True, "partial_rotary_factor": 1.0}
    problems = [
        Problem(f"rope_scaling.{key}", value, "this model has no such option", "remove the key")
        for key, value in keys.items()
        if key not in _YARN_KEYS and neutral.get(key) != value
    ]
    problems += [
        Problem(f"rope_scaling.{key}", "(absent)", "YaRN depends on it", "add it to config.json")
        for key in ("factor", "original_max_position_embeddings")
        if key not in keys
    ]
    fields = RopeScaling.__dataclass_fields__.keys() - {"type"}
    scaling = RopeScaling(**{key: keys[key] for key in fields if key in keys})
    return theta, scaling, problems


def _class_problems(
    family: str, values: Mapping[str, Any], scaling: RopeScaling | None, prefix: str
) -> list[Problem]:
    """Settings that the Hugging Face class would quietly compute otherwise."""
    problems = [
        Problem(
            prefix + key,
            values[key],
            f"{family} computes {' or '.join(map(shown, allowed))} only",
            f"set {prefix}{key}={shown(allowed[0])}",
        )
        for key, allowed in _CLASS_RULES[family].items()
        if values[key] not in allowed
    ]
    if scaling is not None and not (scaling.mscale and scaling.mscale_all_dim):
        if (scaling.mscale, scaling.mscale_all_dim) != (1.0, 0.0):
            problems.append(
                Problem(
                    f"{prefix}rope_scaling.mscale",
                    scaling.mscale,
                    f"with mscale_all_dim={scaling.mscale_all_dim} transformers takes it for 1 and "
                    "0, DeepSeek's own code takes it as it stands",
                    "set both to the same number, or mscale=1 and mscale_all_dim=0",
                )
            )
    return problems
