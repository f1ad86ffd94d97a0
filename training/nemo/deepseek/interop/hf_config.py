"""``config.json`` of Hugging Face and our model configuration: what each says of the other.

``hf_config`` writes the dictionary, ``model_config`` reads it, ``inference_config`` reads the JSON
of DeepSeek's own inference code. What a file says is done or refused by its name: a model that is
read half computes something else without a word. No file is read or written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from deepseek.config.errors import ConfigError, Problem, UserError, shown
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.config.weights import has_experts

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
_KINDS = {field.name: str(field.type) for field in fields(ModelConfig)}
_YARN_KINDS = {field.name: str(field.type) for field in fields(RopeScaling)}
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
_LARGEST = {"num_hidden_layers": 10_000, "n_routed_experts": 100_000}
"""Counts beyond which no model is; of sizes, ``_LARGEST_SIZE``."""
_LARGEST_SIZE = 1 << 31
_DEFAULT_THETA = 10000.0
_TYPE_KEYS = ("rope_type", "type")
_ROPE_NEUTRAL = ("rope_theta", *_TYPE_KEYS, "partial_rotary_factor")
_PLAIN_ROPE = (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0))


@dataclass(frozen=True)
class Family:
    """A Hugging Face class that computes what this model computes."""

    name: str
    model_types: tuple[str, ...]
    """Of ``config.json``; the first one is written."""
    computes: Mapping[str, tuple[Any, ...]]
    """What the class computes whatever ``config.json`` says."""
    absent: Mapping[str, Any]
    """What the absence of a key means to the class."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of keys that the class takes."""


_V3_RULES = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
_V3_ABSENT = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
}
_V3 = Family(
    "DeepseekV3ForCausalLM",
    ("deepseek_v3", "kimi_k2"),
    _V3_RULES,
    {**_V3_ABSENT, "rms_norm_eps": 1e-6},
    {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"},
)
_GLM = Family(
    "Glm4MoeLiteForCausalLM",
    ("glm4_moe_lite",),
    _V3_RULES,
    {**_V3_ABSENT, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1},
    {"num_local_experts": "n_routed_experts"},
)
_V2 = Family(
    "DeepseekV2ForCausalLM",
    ("deepseek_v2",),
    {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
        "num_nextn_predict_layers": (0,),
    },
    {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "num_nextn_predict_layers": 0,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
    },
    {"num_experts": "n_routed_experts"},
)
FAMILIES = {family.model_types[0]: family for family in (_V3, _V2, _GLM)}
"""By the ``model_type`` that is written."""
_NOT_LATENT = "its attention is not multi-head latent attention (there is no kv_lora_rank)"
_KNOWN = (
    "DeepseekV3ForCausalLM (DeepSeek-V3, R1, V3.1, Kimi-K2, Moonlight), DeepseekV2ForCausalLM "
    "(DeepSeek-V2, V2-Lite, Coder-V2) and Glm4MoeLiteForCausalLM (GLM-4.7-Flash) can be read"
)
# Keys that do not change what the model computes: about training, generation, files and versions.
_IDLE_KEYS = frozenset(
    """
    _attn_implementation _name_or_path add_cross_attention architectures attn_implementation
    auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length model_type moe_router_dtype no_repeat_ngram_size
    num_beam_groups num_beams num_key_value_heads num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads quantization_config remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate rope_parameters rope_scaling rope_theta
    router_aux_loss_coef sep_token_id seq_aux
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """.split()
)
# Architectures that look alike, and why they are not this one, by class or model type.
_SPARSE = "its attention picks tokens with an indexer (sparse attention), which this model lacks"
_HYPER = "it replaces the residual stream by hyper-connections, which this model lacks"
_GROUPED = "its attention is grouped-query attention, not multi-head latent attention"
_SEVERAL = (
    "it joins a vision and a language model; pass the language model's own configuration (its "
    "text_config or language_config), and its weights without their prefix"
)
_REFUSED = {
    r"DeepseekV4|deepseek_v4": (
        "it replaces multi-head latent attention by sliding and compressed attention, "
        "and the residual stream by hyper-connections"
    ),
    r"DeepseekV32|deepseek_v32|GlmMoeDsa|glm_moe_dsa|AXK2|axk2": _SPARSE,
    r"Mistral4|mistral4": (
        "its router chooses by softmax and normalises, and its queries are scaled by their "
        "position (llama_4_scaling_beta)"
    ),
    r"Longcat|longcat": (
        "its layers hold two attentions and two dense feed-forwards beside the experts, and some "
        "of its experts are identities (zero_expert_num)"
    ),
    r"KimiLinear|kimi_linear": "most of its layers are linear attention (Kimi Delta Attention)",
    r"BailingHybrid|bailing_hybrid|BailingMoe(V2_5|Linear)|bailing_moe_(v2_5|linear)": (
        "most of its layers are linear attention"
    ),
    r"BailingMoe|bailing_moe|Dots1|dots1|Glm4MoeFor|glm4_moe$": _GROUPED,
    r"Youtu|youtu": "it has no experts, and its head shares the embedding's weight",
    r"AXK1|axk1|AXK1": "each of its MoE layers ends with a norm of its own (post_mlp_layernorm)",
    r"MiniCPM3|minicpm3": "it has no experts, and scales its embedding and its residual stream",
    r"DeepseekForCausalLM|deepseek$": "its attention is multi-head attention, not latent attention",
    r"(?!.*_text$)(DeepseekVL|deepseek_vl|DeepseekOcr|DeepseekOCR|deepseek_ocr|KimiVL|kimi_vl|KimiK25"
    r"|Kimi_K25|kimi_k25|Mistral3|mistral3|MistralLarge4|mistral_large4)": _SEVERAL,
}
# Keys that tell such an architecture whatever its class is called.
_REFUSED_KEYS = {
    "text_config": _SEVERAL,
    "language_config": _SEVERAL,
    "linear_attn_config": "some of its layers are linear attention",
    "hc_mult": _HYPER,
    "index_topk": _SPARSE,
    "index_n_heads": _SPARSE,
    "index_head_dim": _SPARSE,
}


def hf_config(cfg: ModelConfig, mtp: bool = True) -> dict[str, Any]:
    """Content of the ``config.json`` beside weights that ``to_hf(..., mtp=mtp)`` gave.

    Token ids are null: they are the tokenizer's to fill in. Without them the Hugging Face classes
    would take defaults that belong to another tokenizer. Where ``rms_norm_eps`` is not 1e-6,
    transformers keeps 1e-6 in the two latent norms of attention; vLLM and SGLang compute as here.

    Raises:
        ConfigError: no Hugging Face class computes what ``cfg`` describes.
    """
    by_scores = "deepseek_v3" if cfg.scoring_func == "sigmoid" else "deepseek_v2"
    family = FAMILIES[cfg.model_type or by_scores]
    depths = cfg.num_nextn_predict_layers if mtp else 0
    ours = {**{key: getattr(cfg, key) for key in _SAME_KEYS}, "num_nextn_predict_layers": depths}
    scaling = cfg.rope_scaling
    problems = _class_problems(family, ours, "model.")
    if scaling is not None and not _readers_agree(scaling.mscale, scaling.mscale_all_dim):
        problems.append(_mscale_problem("model.rope_scaling", asdict(scaling)))
    if problems:
        raise ConfigError(problems, f"the export to {family.name}")
    if family is _GLM:  # instead of first_k_dense_replace, which it does not read
        dense = min(cfg.first_k_dense_replace, cfg.num_hidden_layers)
        sparse = cfg.num_hidden_layers - dense
        ours["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * sparse
    return {
        "architectures": [family.name],
        "model_type": family.model_types[0],
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

    Takes the classes of ``FAMILIES``, written by hand or by transformers 4 or 5, as transformers
    5.23 reads them. A key that is not known is refused, since it may change the model; keys that
    begin with ``_`` are not, being notes.

    Args:
        hf: content of ``config.json``.
        ignore: unknown keys that are known not to change the model.

    Raises:
        UserError: another architecture; says why it is not this one.
        ConfigError: a key is missing, is of another type, or asks for something that this model
            does not compute.
    """
    family = _family(hf)
    meant = ("q_lora_rank", "rope_theta")  # of which null says something
    stated = {key: value for key, value in hf.items() if value is not None or key in meant}
    problems: list[Problem] = []
    for alias, key in family.aliases.items():
        if alias in stated and stated.setdefault(key, stated[alias]) != stated.pop(alias):
            problems.append(_contradiction(alias, hf[alias], key, hf[key]))
    problems += _layer_kinds(family, stated)
    given = {**family.absent, **stated}
    theta, scaling, rope_problems = _rope(given)
    problems += rope_problems
    problems += [
        Problem(key, "(absent)", "the architecture depends on it", f"add {key} to config.json")
        for key in _SAME_KEYS
        if key not in given
    ]
    typed = [*_SAME_KEYS, *(["aux_loss_alpha"] if "aux_loss_alpha" in given else [])]
    for key in typed:
        if key in given:
            kind = _KINDS["moe_aux_loss_coeff" if key == "aux_loss_alpha" else key]
            problems += _type_problems(key, given[key], kind)
    if not problems:
        problems += _fixed_problems(given)
        problems += _class_problems(family, given, "")
    problems += _unknown_keys(given, ignore)
    if problems:
        raise ConfigError(problems, "config.json")
    more: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    if family is _GLM:
        more["model_type"] = family.model_types[0]
    sizes = ModelConfig(**{key: given[key] for key in _SAME_KEYS}, **more)
    if "aux_loss_alpha" in given and has_experts(sizes):
        return replace(sizes, moe_aux_loss_coeff=float(given["aux_loss_alpha"]))
    return sizes


def _family(hf: Mapping[str, Any]) -> Family:
    """The Hugging Face class; raises UserError if this model does not compute the same."""
    named, kind = hf.get("architectures"), hf.get("model_type")
    if named is not None and not (
        isinstance(named, list) and all(isinstance(name, str) for name in named)
    ):
        raise UserError(f"config.json: architectures={shown(named)}: must be a list of names")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"config.json: model_type={shown(kind)}: must be a text")
    names = [*(named or [])[:1], *([kind] if kind else [])]
    for pattern, reason in _REFUSED.items():
        if any(re.match(pattern, name) for name in names):
            raise UserError(f"config.json describes {names[0]}: {reason}")
    for key, reason in _REFUSED_KEYS.items():
        if hf.get(key) is not None:
            owner = names[0] if names else "a model"
            raise UserError(f"config.json describes {owner}: {reason} ({key}={shown(hf[key])})")
    for family in (_V3, _V2, _GLM):
        if named and named[0] == family.name or not named and kind in family.model_types:
            return family
    if not names:
        raise UserError(f"config.json names neither architectures nor model_type; {_KNOWN}")
    known = "kv_lora_rank" in hf
    reason = "it is not known whether it computes what this model does" if known else _NOT_LATENT
    raise UserError(f"config.json describes {names[0]}: {reason}; only {_KNOWN}")


def _layer_kinds(family: Family, stated: dict[str, Any]) -> Iterator[Problem]:
    """Which layers hold experts, and what their attention sees.

    Removes both lists from ``stated``, and sets ``first_k_dense_replace`` where the class takes it
    from there.
    """
    layers, dense = stated.get("num_hidden_layers"), stated.get("first_k_dense_replace")
    kinds, attention = stated.pop("mlp_layer_types", None), stated.pop("layer_types", None)
    if attention is not None and not (
        isinstance(attention, list) and all(kind == "full_attention" for kind in attention)
    ):
        rule = "in this model every layer attends to all tokens before"
        yield Problem("layer_types", attention, rule, "take another checkpoint")
    if kinds is None:
        if family is _GLM and stated.setdefault("first_k_dense_replace", 1) != 1:
            rule = f"{family.name} has one dense layer, unless mlp_layer_types says otherwise"
            yield Problem("first_k_dense_replace", dense, rule, "use 1, or add mlp_layer_types")
        return
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= {"dense", "sparse"}:
        rule = "must be a list of dense and sparse, one for each layer"
        yield Problem("mlp_layer_types", kinds, rule, "correct it in config.json")
        return
    first = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if kinds != ["dense"] * first + ["sparse"] * (len(kinds) - first):
        rule = "in this model the dense layers come first"
        yield Problem("mlp_layer_types", kinds, rule, "take another checkpoint")
    elif len(kinds) != layers:
        rule = f"names {len(kinds)} layers, num_hidden_layers={shown(layers)}"
        yield Problem("mlp_layer_types", kinds, rule, "correct it in config.json")
    elif family is _GLM and dense is None:
        stated["first_k_dense_replace"] = first
    elif dense != first and not (type(dense) is int and first == layers and dense > first):
        yield _contradiction("mlp_layer_types", kinds, "first_k_dense_replace", dense)


def _rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None, list[Problem]]:
    """Base, YaRN and what is wrong with them, as transformers 5.23 reads them.

    A ``rope_scaling`` that is not empty stands instead of ``rope_parameters``. Where a block has no
    ``rope_theta``, the one beside it counts.
    """
    problems: list[Problem] = []
    blocks: dict[str, dict[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        block = given.get(name) or {}
        if not isinstance(block, dict):
            rule = f"must be a block of keys, and is {_as_json(block)}"
            problems.append(Problem(name, block, rule, "correct it in config.json"))
            continue
        problems += [
            Problem(
                f"{name}.{key}",
                value,
                "is a block for layers of one type, and here all layers rotate alike",
                f"put its keys directly into {name}",
            )
            for key, value in block.items()
            if isinstance(value, dict)
        ]
        if "rope_theta" in block and block["rope_theta"] is None:
            problems += _type_problems(f"{name}.rope_theta", None, "float")
        if block:
            # To transformers a null is as good as absence, but for this one, where it means false.
            kept = {k: v for k, v in block.items() if v is not None or k == "truncate"}
            blocks[name] = kept
    thetas = {f"{name}.rope_theta": block.get("rope_theta") for name, block in blocks.items()}
    thetas["rope_theta"] = given.get("rope_theta")
    for key, value in thetas.items():
        problems += _type_problems(key, value, "float | None")
    name = next(iter(blocks), "rope_parameters")
    block = blocks.pop(name, {})
    base = block.get("rope_theta", given.get("rope_theta", _DEFAULT_THETA))
    if base is None:
        problems += _type_problems("rope_theta", None, "float")
    if problems:
        return _DEFAULT_THETA, None, problems
    theta = float(base)
    problems += [
        _contradiction(key, value, f"the base that counts, {name}", theta)
        for key, value in thetas.items()
        if value is not None and value != theta
    ]
    kind_key = "type" if "type" in block else "rope_type"
    kind = block.get("rope_type", block.get("type"))
    if block.get("type", kind) != kind:
        problems.append(_contradiction(f"{name}.type", block["type"], f"{name}.rope_type", kind))
    for other, content in blocks.items():  # transformers passes over it
        differing = {k: v for k, v in content.items() if (k, v) not in _PLAIN_ROPE}
        problems += [
            _contradiction(f"{other}.{key}", value, name, block)
            for key, value in differing.items()
            if key != "rope_theta" and value != (kind if key in _TYPE_KEYS else block.get(key))
        ]
    scaling = None
    keys = {key: value for key, value in block.items() if key not in _ROPE_NEUTRAL}
    if kind is None and keys:
        problems.append(
            Problem(
                f"{name}.rope_type",
                "(absent)",
                f"{', '.join(sorted(keys))} mean nothing without a type: transformers would pass "
                "over them, DeepSeek's own code stops",
                'add "rope_type": "yarn", or remove them',
            )
        )
    elif kind in (None, "default"):
        problems += [
            Problem(f"{name}.{key}", value, "plain rotary embeddings have no such key", "remove it")
            for key, value in keys.items()
        ]
    elif kind != "yarn":
        rule = "this model knows yarn and plain rotary embeddings"
        problems.append(Problem(f"{name}.{kind_key}", kind, rule, "take another checkpoint"))
    else:
        problems += _yarn_problems(name, keys)
        if not problems:
            scaling = RopeScaling(**{k: v for k, v in keys.items() if k != "truncate"})
    factor = [(f"{name}.partial_rotary_factor", block.get("partial_rotary_factor", 1.0))]
    factor.append(("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)))
    problems += [
        Problem(key, value, "this model rotates all of qk_rope_head_dim", "take another checkpoint")
        for key, value in factor
        if type(value) not in (int, float) or value != 1.0
    ]
    return theta, scaling, problems


def _yarn_problems(name: str, keys: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the keys of YaRN in the block ``name``."""
    for key, value in keys.items():
        if key == "truncate":
            if value is not True:
                yield Problem(
                    f"{name}.truncate",
                    value,
                    "this model rounds the borders of YaRN's ramp to whole dims (truncate=true); "
                    "without it the frequencies are others",
                    "take another checkpoint: to remove the key would change the model",
                )
        elif key not in _YARN_KINDS or key == "type":
            yield Problem(
                f"{name}.{key}", value, "this model has no such option", "take another checkpoint"
            )
        else:
            yield from _type_problems(f"{name}.{key}", value, _YARN_KINDS[key])
    for key in ("factor", "original_max_position_embeddings"):
        if key not in keys:
            rule, way_out = "YaRN depends on it", f"add it to {name} in config.json"
            yield Problem(f"{name}.{key}", "(absent)", rule, way_out)
    if not _readers_agree(keys.get("mscale"), keys.get("mscale_all_dim")):
        yield _mscale_problem(name, keys)


def _readers_agree(mscale: Any, all_dim: Any) -> bool:
    """Whether transformers and DeepSeek's own code scale cos and sin alike (None: not given).

    transformers divides the two scales if both are there and not 0, else it takes mscale for 1 and
    mscale_all_dim, in cos and sin, for 0. DeepSeek's code takes what is given.
    """
    if mscale and all_dim:
        return True
    return (1.0 if mscale is None else mscale, all_dim or 0.0) == (1.0, 0.0)


def _mscale_problem(name: str, keys: Mapping[str, Any]) -> Problem:
    mscale, all_dim = (shown(keys.get(k, "(absent)")) for k in ("mscale", "mscale_all_dim"))
    return Problem(
        f"{name}.mscale",
        keys.get("mscale", "(absent)"),
        f"with mscale={mscale} and mscale_all_dim={all_dim} transformers scales cos and sin as "
        "with 1 and 0, DeepSeek's own code as the two stand",
        "set both to the same number, or mscale=1 and mscale_all_dim=0",
    )


def _fixed_problems(given: Mapping[str, Any]) -> Iterator[Problem]:
    """Options that exist here at one value only."""
    for key, value in {**_FIXED, "num_key_value_heads": given["num_attention_heads"]}.items():
        if given.get(key, value) != value:
            rule = f"this model has only {shown(value)}"
            yield Problem(key, given[key], rule, "take another checkpoint")


def _class_problems(family: Family, values: Mapping[str, Any], prefix: str) -> list[Problem]:
    """Settings that the Hugging Face class would quietly compute otherwise."""
    return [
        Problem(
            prefix + key,
            values[key],
            f"{family.name} computes {' or '.join(map(shown, allowed))} only",
            f"set {prefix}{key}={shown(allowed[0])}",
        )
        for key, allowed in family.computes.items()
        if values[key] not in allowed
    ]


def _unknown_keys(given: Mapping[str, Any], ignore: Collection[str]) -> Iterator[Problem]:
    """Options that this model may lack; one that is off (null, false, empty) is none."""
    known = {*_SAME_KEYS, *_FIXED, *_IDLE_KEYS, "partial_rotary_factor", *ignore}
    nope, rope = given.get("qk_nope_head_dim"), given.get("qk_rope_head_dim")
    if isinstance(nope, int) and isinstance(rope, int):
        # transformers 5 writes these two beside what they follow from.
        for key, fitting in (("qk_head_dim", (nope + rope,)), ("head_dim", (rope, nope + rope))):
            if given.get(key) in fitting:
                known.add(key)
    for key, value in given.items():
        if key not in known and not key.startswith("_") and value not in (None, False, [], {}, ""):
            yield Problem(
                key,
                value,
                "this model has no such option, and it may change what is computed",
                f"if it does not, ignore it (--ignore-key {key})",
            )


def _type_problems(key: str, value: Any, kind: str) -> Iterator[Problem]:
    """A value of another type than ``kind`` (as in the schema), or an absurd one."""
    if value is None and kind.endswith("| None"):
        return
    wanted, fits = {
        "int": ("a whole number", type(value) is int),
        "float": ("a number", _is_number(value)),
        "bool": ("true or false", type(value) is bool),
        "str": ("a text", type(value) is str),
    }[kind.removesuffix(" | None")]
    if not fits:
        rule = f"must be {wanted}, and is {_as_json(value)}"
        yield Problem(key, value, rule, "correct it in config.json")
    elif type(value) is int and value > (most := _LARGEST.get(key, _LARGEST_SIZE)):
        yield Problem(key, value, f"no model has more than {most:,}", "correct it in config.json")


def _contradiction(one: str, value: object, other: str, second: object) -> Problem:
    return Problem(one, value, f"{other}={shown(second)} says otherwise", "leave one of the two")


def _is_number(value: object) -> bool:
    """A JSON number; Python also reads NaN and Infinity."""
    return type(value) in (int, float) and -1e300 < value < 1e300  # type: ignore[operator]


def _as_json(value: object) -> str:
    """As it stands in the file, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def inference_config(js: Mapping[str, Any]) -> ModelConfig:
    """The model that the JSON of DeepSeek's inference code describes (``config_671B.json``).

    What is absent is what its ``ModelArgs`` says. The code decides some things by the sizes: YaRN
    is on if the longest sequence exceeds the original context, and the correction bias is there at
    width 7168 alone.

    Args:
        js: content of the file.

    Raises:
        ConfigError: a key is not known or is of another type.
        UserError: it is a configuration of a sparse model.
    """
    sparse = sorted(key for key in js if key.startswith("index_"))
    if sparse:
        raise UserError(f"the inference configuration has {sparse[0]}: {_SPARSE}")
    args = {name: js.get(name, default) for name, default in _INFERENCE_ARGS.items()}
    problems = [
        Problem(key, value, "DeepSeek's inference code has no such key", "remove it")
        for key, value in js.items()
        if key not in {*_INFERENCE_ARGS, *_INFERENCE_IDLE} and not key.startswith("_")
    ]
    for name, default in _INFERENCE_ARGS.items():
        problems += _type_problems(name, args[name], type(default).__name__)
    if problems:
        raise ConfigError(problems, "the inference configuration")
    scaling = None
    if args["max_seq_len"] > args["original_seq_len"]:
        scaling = RopeScaling(
            factor=args["rope_factor"],
            original_max_position_embeddings=args["original_seq_len"],
            beta_fast=args["beta_fast"],
            beta_slow=args["beta_slow"],
            mscale=args["mscale"],  # the code scales the softmax alone: both the same
            mscale_all_dim=args["mscale"],
        )
    biased, groups = args["dim"] == 7168, args["n_expert_groups"]
    return ModelConfig(
        **{ours: args[theirs] for theirs, ours in _INFERENCE_NAMES.items()},
        q_lora_rank=args["q_lora_rank"] or None,
        topk_method="noaux_tc" if biased else "group_limited_greedy" if groups > 1 else "greedy",
        norm_topk_prob=args["score_func"] == "sigmoid",
        max_position_embeddings=args["original_seq_len"]
        if scaling is None
        else int(args["original_seq_len"] * args["rope_factor"]),
        rope_scaling=scaling,
    )


# ``ModelArgs`` of DeepSeek's inference/model.py: names, and what their absence means.
_INFERENCE_ARGS: dict[str, Any] = {
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 1,
    "n_limited_groups": 1,
    "score_func": "softmax",
    "route_scale": 1.0,
    "q_lora_rank": 0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_seq_len": 16384,
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
}
_INFERENCE_NAMES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_theta": "rope_theta",
}
_INFERENCE_IDLE = ("max_batch_size", "dtype", "scale_fmt")
