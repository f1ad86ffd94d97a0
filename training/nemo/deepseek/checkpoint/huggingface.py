"""Hugging Face names and ours: the one table, and the functions that read it.

``to_hf`` and ``from_hf`` turn a state dictionary into the other's names, ``hf_tensors`` says the
same without numbers, for those who go tensor by tensor; ``hf_config`` and ``model_config`` are for
``config.json``. Dictionaries in, dictionaries out: no file is read or written here.

Two layouts of the experts exist. ``released`` is that of the published checkpoints: three matrices
per expert. ``stacked`` is that of transformers 5 in memory: ``gate_up_proj`` (E, 2F, D) and
``down_proj`` (E, D, F) per layer. MTP module k is layer ``num_hidden_layers + k``, with copies of
the embedding and the head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek.config.errors import ConfigError, Problem, UserError, shown
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.models.transformer import Transformer

Layout = Literal["released", "stacked"]

# -- the table -------------------------------------------------------------------------------------

_MODEL = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# Below ``layers.{i}.`` or ``mtp.{k}.block.`` with us, below ``model.layers.{i}.`` with them.
# ``{e}`` is the expert: with us the experts are stacked.
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn.wq.weight": "self_attn.q_proj.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attn.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.w1.weight": "mlp.gate_proj.weight",
    "ffn.w3.weight": "mlp.up_proj.weight",
    "ffn.w2.weight": "mlp.down_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.experts.w1": "mlp.experts.{e}.gate_proj.weight",
    "ffn.experts.w3": "mlp.experts.{e}.up_proj.weight",
    "ffn.experts.w2": "mlp.experts.{e}.down_proj.weight",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
}
# Below ``mtp.{k}.`` with us, below ``model.layers.{num_hidden_layers + k}.`` with them.
_MTP = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
# The tensors of the main model that every MTP layer of theirs repeats.
_MTP_COPIES = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "lm_head.weight": "shared_head.head.weight",
}

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


# -- weights ---------------------------------------------------------------------------------------


def to_hf(
    state: Mapping[str, Tensor], cfg: ModelConfig, layout: Layout = "released", mtp: bool = True
) -> dict[str, Tensor]:
    """Our state dictionary under Hugging Face names.

    Values keep their dtype, but for the correction bias, which is fp32 always. Per-expert tensors
    are views of ours; ``gate_up_proj`` and the MTP copies are new tensors.

    Args:
        state: every parameter and buffer of ``Transformer(cfg)``, whole.
        layout: ``released`` or ``stacked``.
        mtp: False leaves the MTP modules out.

    Raises:
        UserError: ``state`` is not exactly what ``cfg`` describes; lists the names.
    """
    expected = our_shapes(cfg)
    account("the model's weights", _shapes(state), expected)
    out: dict[str, Tensor] = {}
    for name in expected:
        if name.startswith("mtp.") and not mtp:
            continue
        tensor = state[name].float() if is_bias(name) else state[name]
        theirs = _hf_name(name, cfg)
        if "{e}" not in theirs:
            out[theirs] = tensor
        elif layout == "released":
            for expert, matrix in enumerate(tensor.unbind(0)):
                out[theirs.format(e=expert)] = matrix
        elif name.endswith(".w2"):
            out[_stacked_name(theirs)] = tensor
        elif name.endswith(".w1"):
            up = state[name.removesuffix(".w1") + ".w3"]
            out[_stacked_name(theirs)] = torch.cat([tensor, up], dim=1)
    if mtp:
        for copy, original in _mtp_copies(cfg).items():
            out[copy] = out[original].clone()
    return out


def from_hf(state: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face weights, of either layout, under our names.

    Values keep their dtype, but for the correction bias, which becomes fp32. Tensors may share
    memory with ``state``. Rotary tables (``rotary_emb.inv_freq``) are passed over, being derived
    from the configuration; the MTP copies of embedding and head may be absent.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape than ``cfg`` asks for, an MTP
            copy differs from its original, or the weights are quantised; lists the names.
    """
    given = {name: tensor for name, tensor in state.items() if "rotary_emb.inv_freq" not in name}
    quantised = [name for name in given if _QUANTISED.search(name)]
    if quantised:
        raise UserError(
            f"the Hugging Face weights are quantised ({listing(quantised)}); "
            "dequantise them to bf16 first"
        )
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in given)
    ours = our_shapes(cfg)
    blank = {name: torch.empty(shape, device="meta") for name, shape in ours.items()}
    theirs = to_hf(blank, cfg, "stacked" if stacked else "released")
    copies = _mtp_copies(cfg)
    account(
        "the Hugging Face weights",
        _shapes(given),
        _shapes(theirs),
        optional=copies,
        way_out=lambda missing, unexpected: _mtp_way_out(missing, unexpected, cfg),
    )
    differing = [c for c, o in copies.items() if c in given and not _equal(given[c], given[o])]
    if differing:
        raise UserError(
            f"the MTP layers of the Hugging Face weights do not share the main model's embedding "
            f"and head ({listing(differing)} differ), as they must here; drop the MTP layers and "
            "set model.num_nextn_predict_layers=0"
        )

    out: dict[str, Tensor] = {}
    for name, shape in ours.items():
        hf_name = _hf_name(name, cfg)
        if "{e}" not in hf_name:
            tensor = given[hf_name]
        elif not stacked:
            tensor = torch.stack([given[hf_name.format(e=expert)] for expert in range(shape[0])])
        else:
            tensor = given[_stacked_name(hf_name)]
            if name.endswith(".w1"):
                tensor = tensor[:, : shape[1]]
            elif name.endswith(".w3"):
                tensor = tensor[:, shape[1] :]
        out[name] = tensor.float() if is_bias(name) else tensor
    return out


@dataclass(frozen=True)
class Piece:
    """A matrix or vector of ours, or one expert's of a stack, and where it lies in a tensor of
    theirs."""

    name: str
    """Ours."""
    expert: int | None
    """Its place in our stack; None: ours is the whole tensor."""
    row: int | None = None
    """Its place in theirs where that is a stack too."""
    rows: slice | None = None
    """Which rows of theirs; None: all."""


@dataclass(frozen=True)
class HfTensor:
    """A tensor of theirs without its numbers."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """What it holds of ours; the pieces of one expert lie together."""
    copy_of: str | None = None
    """Their name of the tensor that it repeats (MTP); it may be absent from a file."""


def hf_tensors(cfg: ModelConfig, layout: Layout = "released") -> dict[str, HfTensor]:
    """The tensors that ``to_hf`` gives and ``from_hf`` takes, in the same order."""
    out: dict[str, HfTensor] = {}
    for name, shape in our_shapes(cfg).items():
        theirs = _hf_name(name, cfg)
        if "{e}" not in theirs:
            out[theirs] = HfTensor(shape, (Piece(name, None),))
            continue
        experts = range(shape[0])
        if layout == "released":
            for e in experts:
                out[theirs.format(e=e)] = HfTensor(shape[1:], (Piece(name, e),))
        elif name.endswith(".w2"):
            pieces = tuple(Piece(name, e, row=e) for e in experts)
            out[_stacked_name(theirs)] = HfTensor(shape, pieces)
        elif name.endswith(".w1"):
            width, up = shape[1], name.removesuffix(".w1") + ".w3"
            halves = ((name, slice(0, width)), (up, slice(width, 2 * width)))
            pieces = tuple(Piece(ours, e, e, rows) for e in experts for ours, rows in halves)
            out[_stacked_name(theirs)] = HfTensor((shape[0], 2 * width, shape[2]), pieces)
    for copy, original in _mtp_copies(cfg).items():
        out[copy] = HfTensor(out[original].shape, (), original)
    return out


_QUANTISED = re.compile(r"\.weight_(scale|scale_inv|packed|shape)$")


def our_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter and saved buffer of the model; nothing is allocated."""
    with torch.device("meta"):
        state = Transformer(cfg).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _hf_name(name: str, cfg: ModelConfig) -> str:
    """Their name for ours, by the table; for stacked experts with ``{e}`` left in."""
    if name in _MODEL:
        return _MODEL[name]
    stack, index, rest = name.split(".", 2)
    if stack == "layers":
        return f"model.layers.{index}.{_LAYER[rest]}"
    layer = cfg.num_hidden_layers + int(index)
    below = _LAYER[rest.removeprefix("block.")] if rest.startswith("block.") else _MTP[rest]
    return f"model.layers.{layer}.{below}"


def _stacked_name(name: str) -> str:
    """Of ``...experts.{e}.gate_proj.weight``: the tensor of the stacked layout that holds it."""
    prefix, matrix = name.split("{e}.")
    return prefix + ("down_proj" if matrix.startswith("down") else "gate_up_proj")


def _mtp_copies(cfg: ModelConfig) -> dict[str, str]:
    """Each tensor that an MTP layer of theirs repeats: {name of the copy: name of the original}."""
    return {
        f"model.layers.{cfg.num_hidden_layers + depth}.{copy}": original
        for depth in range(cfg.num_nextn_predict_layers)
        for original, copy in _MTP_COPIES.items()
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def is_bias(name: str) -> bool:
    """Whether our name ``name`` is of a correction bias, which is fp32 everywhere."""
    return name.endswith(".ffn.gate.bias")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or b.is_meta or torch.equal(a, b.to(a.dtype))


def account(
    what: str,
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
    way_out: Callable[[list[str], list[str]], str] = lambda missing, unexpected: "",
) -> None:
    """Raise UserError, listing all that differ, unless names and shapes are the expected ones.

    Args:
        what: begins the message.
        given: shapes by name.
        expected: shapes by name.
        optional: expected names that may be missing.
        way_out: advice for (missing, unexpected) names, or "".
    """
    missing = [name for name in expected if name not in given and name not in optional]
    unexpected = [name for name in given if name not in expected]
    misshapen = [
        f"{name} {given[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    lines = [f"  {len(names)} {kind}: {listing(names)}" for kind, names in found.items() if names]
    if lines:
        advice = (
            way_out(missing, unexpected) or "check that weights and configuration belong together"
        )
        raise UserError(
            "\n".join([f"{what} do not fit the model configuration:", *lines, f"  {advice}"])
        )


def _mtp_way_out(missing: list[str], unexpected: list[str], cfg: ModelConfig) -> str:
    """Advice where MTP layers alone explain the difference, else nothing."""
    found = [layer_of(name) for name in missing + unexpected]
    layers = [-1 if layer is None else layer for layer in found]
    if not layers or min(layers) < cfg.num_hidden_layers or (missing and unexpected):
        return ""
    if missing:
        return (
            "the weights lack MTP layers; set model.num_nextn_predict_layers="
            f"{min(layers) - cfg.num_hidden_layers}"
        )
    return (
        "the weights hold MTP layers; set model.num_nextn_predict_layers="
        f"{max(layers) + 1 - cfg.num_hidden_layers}, or drop them"
    )


def layer_of(name: str) -> int | None:
    """The layer that their name ``name`` belongs to; None outside the layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def listing(names: Collection[str], limit: int = 12) -> str:
    first = ", ".join(sorted(names)[:limit])
    return first + (f" and {len(names) - limit} more" if len(names) > limit else "")


# -- config.json -----------------------------------------------------------------------------------


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

    cfg = ModelConfig(**{key: given[key] for key in _SAME_KEYS})
    cfg.rope_theta, cfg.rope_scaling = theta, scaling
    if "aux_loss_alpha" in given:
        cfg.moe_aux_loss_coeff = float(given["aux_loss_alpha"])
    return cfg


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
