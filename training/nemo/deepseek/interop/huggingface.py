"""Tensors under Hugging Face names and under ours; the names stand in ``config/weights.py``.

``to_hf`` and ``from_hf`` turn a state dictionary into the other's names, ``hf_tensors`` says the
same without numbers, for those who go tensor by tensor. Dictionaries in, dictionaries out: no file
is read or written here.

Two layouts of the experts exist. ``released`` is that of the published checkpoints: three matrices
per expert. ``stacked`` is that of transformers 5 in memory: ``gate_up_proj`` (E, 2F, D) and
``down_proj`` (E, D, F) per layer. MTP module k is layer ``num_hidden_layers + k``, with copies of
the embedding and the head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.config.weights import HF_MTP_COPIES, model_weights

Layout = Literal["released", "stacked"]


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
    account("the model's weights", _shapes(state), our_shapes(cfg))
    out: dict[str, Tensor] = {}
    for weight in model_weights(cfg):
        name, theirs = weight.name, weight.hf_name
        if name.startswith("mtp.") and not mtp:
            continue
        tensor = state[name].float() if is_bias(name) else state[name]
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
    memory with ``state``. Rotary tables and tensors without numbers are passed over; the MTP copies
    of embedding and head may be absent.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape than ``cfg`` asks for, an MTP
            copy differs from its original, or the weights are quantised; lists the names.
    """
    given = {name: t for name, t in state.items() if not is_derived(name, tuple(t.shape))}
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
    for weight in model_weights(cfg):
        name, shape, hf_name = weight.name, weight.shape, weight.hf_name
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
class WeightSlice:
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
    slices: tuple[WeightSlice, ...]
    """What it holds of ours; the slices of one expert lie together."""
    copy_of: str | None = None
    """Their name of the tensor that it repeats (MTP); it may be absent from a file."""


def hf_tensors(cfg: ModelConfig, layout: Layout = "released") -> dict[str, HfTensor]:
    """The tensors that ``to_hf`` gives and ``from_hf`` takes, in the same order."""
    out: dict[str, HfTensor] = {}
    for weight in model_weights(cfg):
        name, shape, theirs = weight.name, weight.shape, weight.hf_name
        if "{e}" not in theirs:
            out[theirs] = HfTensor(shape, (WeightSlice(name, None),))
            continue
        experts = range(shape[0])
        if layout == "released":
            for e in experts:
                out[theirs.format(e=e)] = HfTensor(shape[1:], (WeightSlice(name, e),))
        elif name.endswith(".w2"):
            slices = tuple(WeightSlice(name, e, row=e) for e in experts)
            out[_stacked_name(theirs)] = HfTensor(shape, slices)
        elif name.endswith(".w1"):
            width, up = shape[1], name.removesuffix(".w1") + ".w3"
            halves = ((name, slice(0, width)), (up, slice(width, 2 * width)))
            slices = tuple(WeightSlice(ours, e, e, rows) for e in experts for ours, rows in halves)
            out[_stacked_name(theirs)] = HfTensor((shape[0], 2 * width, shape[2]), slices)
    for copy, original in _mtp_copies(cfg).items():
        out[copy] = HfTensor(out[original].shape, (), original)
    return out


SCALE = "_scale_inv"
"""What the name of an FP8 weight's scales ends with."""
_QUANTISED = re.compile(r"\.weight_(scale|scale_inv|packed|shape)$")
_PROJECTION = re.compile(r"\.(self_attn|mlp)\.(.+\.)?\w+_proj(_with_mqa)?\.weight$")


def is_projection(name: str) -> bool:
    """Whether ``name``, theirs, is of a matrix that released FP8 files hold in FP8: those of
    attention and feed-forward; not embedding, head, router, or ``eh_proj`` of the MTP modules."""
    return _PROJECTION.search(name) is not None


def our_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter and saved buffer of the model."""
    return {weight.name: weight.shape for weight in model_weights(cfg)}


def _stacked_name(name: str) -> str:
    """Of ``...experts.{e}.gate_proj.weight``: the tensor of the stacked layout that holds it."""
    prefix, matrix = name.split("{e}.")
    return prefix + ("down_proj" if matrix.startswith("down") else "gate_up_proj")


def _mtp_copies(cfg: ModelConfig) -> dict[str, str]:
    """Each tensor that an MTP layer of theirs repeats: {name of the copy: name of the original}."""
    return {
        f"model.layers.{cfg.num_hidden_layers + depth}.{copy}": original
        for depth in range(cfg.num_nextn_predict_layers)
        for original, copy in HF_MTP_COPIES.items()
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def is_bias(name: str) -> bool:
    """Whether our name ``name`` is of a correction bias, which is fp32 everywhere."""
    return name.endswith(".ffn.gate.bias")


def is_derived(name: str, shape: tuple[int, ...]) -> bool:
    """Whether their tensor holds nothing that is to be kept: rotary tables follow from the
    configuration, and of shared experts that a model has none of transformers writes 0 rows."""
    return "rotary_emb.inv_freq" in name or 0 in shape


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
