"""The one table of weights: shape, what TP divides, LoRA target, Hugging Face name.

Whoever needs one of these facts takes it from here: the arithmetic of ``layout.py`` and
``cost.py``, tensor parallelism, LoRA, and everything that reads or writes Hugging Face names. The
modules that hold the weights (``models/components``) state their shapes a second time; tests
compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from deepseek.config.schema import ModelConfig


class _Row(NamedTuple):
    name: str
    dims: str
    """Of the whole weight, one letter a dim; see ``_sizes``. A stack of experts has three."""
    tp_dim: int | None
    """The dim that TP divides; None: every TP rank has all of it."""
    lora: str | None
    """The group of ``model.peft.target_modules`` that it belongs to; None: it gets no adapter."""
    hf_name: str
    """``{e}`` stands for the expert: with us experts are stacked, with them they lie one by one."""


_ATTN, _FFN, _EXPERTS = "attention", "feed_forward", "experts"

# Below ``layers.{i}.`` or ``mtp.{k}.block.`` with us, below ``model.layers.{i}.`` with them. The
# rows of one block are those whose dims it has, ``attn.wq`` only where queries have no latent.
_BLOCK = (
    _Row("attn_norm.weight", "D", None, None, "input_layernorm.weight"),
    _Row("attn.wq.weight", "QD", 0, _ATTN, "self_attn.q_proj.weight"),
    _Row("attn.wq_a.weight", "RD", None, _ATTN, "self_attn.q_a_proj.weight"),
    _Row("attn.q_norm.weight", "R", None, None, "self_attn.q_a_layernorm.weight"),
    _Row("attn.wq_b.weight", "QR", 0, _ATTN, "self_attn.q_b_proj.weight"),
    _Row("attn.wkv_a.weight", "LD", None, _ATTN, "self_attn.kv_a_proj_with_mqa.weight"),
    _Row("attn.kv_norm.weight", "C", None, None, "self_attn.kv_a_layernorm.weight"),
    _Row("attn.wkv_b.weight", "KC", 0, _ATTN, "self_attn.kv_b_proj.weight"),
    _Row("attn.wo.weight", "DO", 1, _ATTN, "self_attn.o_proj.weight"),
    _Row("ffn_norm.weight", "D", None, None, "post_attention_layernorm.weight"),
    _Row("ffn.w1.weight", "ID", 0, _FFN, "mlp.gate_proj.weight"),
    _Row("ffn.w2.weight", "DI", 1, _FFN, "mlp.down_proj.weight"),
    _Row("ffn.w3.weight", "ID", 0, _FFN, "mlp.up_proj.weight"),
    _Row("ffn.gate.weight", "ED", None, None, "mlp.gate.weight"),
    _Row("ffn.gate.bias", "E", None, None, "mlp.gate.e_score_correction_bias"),
    _Row("ffn.experts.w1", "EFD", None, _EXPERTS, "mlp.experts.{e}.gate_proj.weight"),
    _Row("ffn.experts.w2", "EDF", None, _EXPERTS, "mlp.experts.{e}.down_proj.weight"),
    _Row("ffn.experts.w3", "EFD", None, _EXPERTS, "mlp.experts.{e}.up_proj.weight"),
    _Row("ffn.shared_experts.w1.weight", "SD", 0, _FFN, "mlp.shared_experts.gate_proj.weight"),
    _Row("ffn.shared_experts.w2.weight", "DS", 1, _FFN, "mlp.shared_experts.down_proj.weight"),
    _Row("ffn.shared_experts.w3.weight", "SD", 0, _FFN, "mlp.shared_experts.up_proj.weight"),
)
# Below ``mtp.{k}.`` with us, below ``model.layers.{num_hidden_layers + k}.`` with them.
_MTP_INPUT = (
    _Row("enorm.weight", "D", None, None, "enorm.weight"),
    _Row("hnorm.weight", "D", None, None, "hnorm.weight"),
    _Row("eh_proj.weight", "DJ", None, None, "eh_proj.weight"),
)
_MTP_OUTPUT = (_Row("norm.weight", "D", None, None, "shared_head.norm.weight"),)
_MODEL_INPUT = (_Row("embed.weight", "VD", 0, None, "model.embed_tokens.weight"),)
_MODEL_OUTPUT = (
    _Row("norm.weight", "D", None, None, "model.norm.weight"),
    _Row("head.weight", "VD", 0, None, "lm_head.weight"),
)
# Stages that have MTP modules or their losses, but not what these share with the main model, have
# copies.
_MTP_EMBED = (_Row("mtp_embed.weight", "VD", 0, None, "model.embed_tokens.weight"),)
_MTP_HEAD = (_Row("mtp_head.weight", "VD", 0, None, "lm_head.weight"),)

OUTPUT = range(3)
"""What follows the last block, by number: final norm, head and main loss; the MTP modules; their
losses. Stages of a pipeline may divide it."""

HF_MTP_COPIES = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "lm_head.weight": "shared_head.head.weight",
}
"""Tensors of the main model that every MTP layer of a Hugging Face checkpoint repeats: their name,
and that of the copy below ``model.layers.{i}.``."""
TP_DIMS = {row.name: row.tp_dim for row in _BLOCK}
"""The dim of each weight of a block that TP divides; None: none."""


def _lora_target(row: _Row) -> str:
    """What ``model.peft.target_modules`` calls the matrix: ``wq_a``, ``w1``, ``experts.w1``."""
    matrix = row.name.removesuffix(".weight").rpartition(".")[2]
    return f"experts.{matrix}" if row.lora == _EXPERTS else matrix


LORA_GROUPS = {
    group: tuple(dict.fromkeys(_lora_target(row) for row in _BLOCK if row.lora == group))
    for group in (_ATTN, _FFN, _EXPERTS)
}
"""Names in ``model.peft.target_modules`` that stand for several matrices, and these."""
UNPACKED_AT_ONCE = 1 << 24
"""Numbers of packed rows that are unpacked at a time, which takes two fp32 copies of them."""
PACKED_BLOCKS = {"nf4": 64, "fp8": 128}
"""Of each ``model.peft.base_dtype``: numbers of a row that share a scale."""


FP8_TILE = 128
"""Numbers of a row that share a scale in products of FP8, and rows and columns of a matrix."""


def has_whole_tiles(rows: int, inner: int, columns: int) -> bool:
    """Whether FP8's kernels take a product of these sizes: whole tiles, and rows of whole 16 bytes.

    Args:
        rows: of the left factor.
        inner: summed over.
        columns: of the result.
    """
    return rows > 0 and rows % 4 == 0 and inner % FP8_TILE == 0 and columns % 16 == 0


def packed_row_bytes(columns: int, kind: str) -> int:
    """Of one row of a frozen matrix: its numbers in whole blocks, each with an fp32 scale."""
    block = PACKED_BLOCKS[kind]
    return -(-columns // block) * (block // (2 if kind == "nf4" else 1) + 4)


def packed_columns(part: slice, columns: int, kind: str) -> slice:
    """The columns, of so many in all, that some whole blocks of a row have; ``part`` in bytes."""
    block, size = PACKED_BLOCKS[kind], packed_row_bytes(PACKED_BLOCKS[kind], kind)
    return slice(part.start // size * block, min(part.stop // size * block, columns))


LORA_HF_NAMES = {
    row.hf_name.split(".")[-2]: _lora_target(row) for row in reversed(_BLOCK) if row.lora
}
"""What Hugging Face calls the matrices that may get adapters; ``w1`` for dense and routed alike."""


@dataclass(frozen=True)
class Weight:
    """One weight, or the like-named weights of like blocks; or the correction bias of a router."""

    name: str
    """As in the state dictionary of the model; from ``block_weights`` without the block."""
    shape: tuple[int, ...]
    """Of the whole weight."""
    hf_name: str = ""
    """Of the released checkpoints; with ``{e}`` for the expert where ``routed``. Empty: adapters
    have none."""
    tp_dim: int | None = None
    """The dim that TP divides; None: every TP rank has all of it."""
    routed: bool = False
    """Holds the routed experts, whose first dim EP divides."""
    lora: str | None = None
    """What ``model.peft.target_modules`` calls it; None: it gets no adapter."""

    @property
    def adapter(self) -> bool:
        """Is half of an adapter, so trained while all else is frozen."""
        return "lora_" in self.name.rpartition(".")[2]

    @property
    def buffer(self) -> bool:
        """Is a correction bias: fp32, moved by the load and not by a gradient, whole on each rank
        that holds its router."""
        return self.name.endswith("gate.bias")

    def below(self, ours: str, theirs: str) -> Weight:
        """The same with its owner's name in front of both names."""
        hf_name = f"{theirs}{self.hf_name}" if self.hf_name else ""
        return replace(self, name=f"{ours}{self.name}", hf_name=hf_name)

    def divided(self, tp: int, ep: int) -> tuple[int, ...]:
        """The shape that TP and EP leave to a rank; they must divide."""
        shape = list(self.shape)
        if self.routed:
            shape[0] //= ep
        elif self.tp_dim is not None:
            shape[self.tp_dim] //= tp
        return tuple(shape)

    def shard_dim(self, tp: int, ep: int, shards: int) -> int | None:
        """The dim along which data-parallel ranks share what TP and EP leave.

        A weight that is whole is cut along its first dim, evenly or not. A part of one must be cut
        evenly, as FSDP2 pads a whole weight but not a part: its first dim that allows this.

        Args:
            tp: ranks that TP divides it over.
            ep: ranks that EP divides it over.
            shards: data-parallel ranks that share what is left.

        Returns:
            The dim; None: none fits.
        """
        if (ep if self.routed else tp if self.tp_dim is not None else 1) == 1:
            return 0
        sizes = enumerate(self.divided(tp, ep))
        return next((dim for dim, size in sizes if size % shards == 0), None)


# -- counted once --

T = TypeVar("T")

_SHAPE = attrgetter(
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
    "first_k_dense_replace",
    "topk_method",
    "num_nextn_predict_layers",
)


class _Shape(tuple[Any, ...]):
    """What names and shapes of a model's weights follow from, and one model that is so."""

    model: ModelConfig


def once_per_shape(function: Callable[..., T]) -> Callable[..., T]:
    """Remember what ``function`` tells of a model, for all models whose weights are the same.

    A search over layouts asks thousands of times. The function must depend on nothing of the model
    but its weights; its other arguments are hashable, and what it returns is not changed.
    """

    @lru_cache(maxsize=1 << 14)
    def told(shape: _Shape, *arguments: Any) -> T:
        return function(shape.model, *arguments)

    @wraps(function)
    def tell(model: ModelConfig, *arguments: Any) -> T:
        peft = model.peft and (
            model.peft.dim,
            model.peft.base_dtype,
            *model.peft.target_modules,
        )
        shape = _Shape((*_SHAPE(model), peft))
        shape.model = model
        return told(shape, *arguments)

    return tell


# -- lists --


def model_weights(
    model: ModelConfig,
    layers: Iterable[int] | None = None,
    first: bool = True,
    output: range = OUTPUT,
) -> list[Weight]:
    """The state dictionary of a model, or of one pipeline stage, as weights under full names.

    Args:
        model: with ``peft``, adapters stand behind the weights of their block.
        layers: the blocks to list; None: all.
        first: with the embedding.
        output: what it has of ``OUTPUT``; of embedding and head a copy for MTP, if not themselves.

    Returns:
        In the order of ``Transformer.state_dict``, adapters aside.
    """
    found = _weights(_MODEL_INPUT, model) if first else []
    blocks = {moe: block_weights(model, moe) for moe in (False, True)}
    for layer in range(model.num_hidden_layers) if layers is None else layers:
        block = blocks[model.is_moe_layer(layer)]
        found += [weight.below(f"layers.{layer}.", _hf_layer(layer)) for weight in block]
    if 0 in output:
        found += _weights(_MODEL_OUTPUT, model)
    depths = range(model.num_nextn_predict_layers)
    for depth in depths if 1 in output else ():
        layer = model.num_hidden_layers + depth
        found += [weight.below(f"mtp.{depth}.", _hf_layer(layer)) for weight in _mtp_module(model)]
    if depths and 1 in output and not first:
        found += _weights(_MTP_EMBED, model)
    if depths and 2 in output and 0 not in output:
        found += _weights(_MTP_HEAD, model)
    return found


def block_weights(model: ModelConfig, moe: bool) -> list[Weight]:
    """One block with a MoE or a dense feed-forward; names begin with ``attn`` and ``ffn``.

    With ``model.peft`` the adapters of the block stand last.
    """
    plain = _plain_block(model, moe)
    if model.peft is None:
        return plain
    chosen = lora_targets(model.peft.target_modules)
    adapted = [weight for weight in plain if weight.lora in chosen]
    return [*plain, *(half for weight in adapted for half in _adapter(weight, model.peft.dim))]


@once_per_shape
def weight_kinds(model: ModelConfig) -> list[Weight]:
    """One weight of each kind that the model has; of blocks, and of MTP modules, named without."""
    found = _weights(_MODEL_INPUT, model)
    if model.first_k_dense_replace > 0:
        found += block_weights(model, moe=False)
    if has_experts(model):
        known = {weight.name for weight in found}
        found += [weight for weight in block_weights(model, moe=True) if weight.name not in known]
    found += _weights(_MODEL_OUTPUT, model)
    if model.num_nextn_predict_layers > 0:
        found += _weights(_MTP_INPUT, model)
    return found


def has_experts(model: ModelConfig) -> bool:
    """True if some block is no dense one; the block of an MTP module never is."""
    return model.num_moe_layers > 0 or model.num_nextn_predict_layers > 0


def lora_targets(target_modules: Sequence[str]) -> set[str]:
    """The matrices that ``model.peft.target_modules`` names, groups resolved."""
    return {matrix for name in target_modules for matrix in LORA_GROUPS.get(name, (name,))}


def _sizes(model: ModelConfig, moe: bool) -> dict[str, int]:
    """The letters of ``_Row.dims`` that a block of this kind has."""
    heads, latent, rope = model.num_attention_heads, model.kv_lora_rank, model.qk_rope_head_dim
    sizes = {
        "D": model.hidden_size,
        "Q": heads * model.qk_head_dim,  # queries
        "C": latent,
        "L": latent + rope,  # latent and rotary key
        "K": heads * (model.qk_nope_head_dim + model.v_head_dim),  # keys and values
        "O": heads * model.v_head_dim,
        "V": model.vocab_size,
        "J": 2 * model.hidden_size,  # hidden state and embedding, joined
    }
    if model.q_lora_rank is not None:
        sizes["R"] = model.q_lora_rank
    if not moe:
        return sizes | {"I": model.intermediate_size}
    sizes |= {"E": model.n_routed_experts, "F": model.moe_intermediate_size}
    if model.n_shared_experts > 0:
        sizes["S"] = model.n_shared_experts * model.moe_intermediate_size
    return sizes


def _weights(rows: Iterable[_Row], model: ModelConfig, moe: bool = False) -> list[Weight]:
    """Those rows whose dims are there, with their sizes."""
    sizes = _sizes(model, moe)
    return [
        Weight(
            row.name,
            tuple(sizes[dim] for dim in row.dims),
            row.hf_name,
            row.tp_dim,
            routed=len(row.dims) == 3,
            lora=_lora_target(row) if row.lora else None,
        )
        for row in rows
        if sizes.keys() >= set(row.dims)
    ]


def _plain_block(model: ModelConfig, moe: bool) -> list[Weight]:
    absent = set()
    if model.q_lora_rank is not None:
        absent.add("attn.wq.weight")
    if model.topk_method != "noaux_tc":
        absent.add("ffn.gate.bias")
    return [weight for weight in _weights(_BLOCK, model, moe) if weight.name not in absent]


def _mtp_module(model: ModelConfig) -> list[Weight]:
    """Its embedding and head are the model's, and it gets no adapters."""
    block = (replace(weight, lora=None) for weight in _plain_block(model, moe=True))
    return [
        *_weights(_MTP_INPUT, model),
        *(weight.below("block.", "") for weight in block),
        *_weights(_MTP_OUTPUT, model),
    ]


def _adapter(weight: Weight, rank: int) -> list[Weight]:
    """The halves A (r, I) and B (O, r) beside a matrix (O, I), of each routed expert its own.

    The half that has the dim which TP divides in the matrix is divided as well.
    """
    name, (*experts, rows, columns) = weight.name.removesuffix(".weight"), weight.shape
    joint = "_" if weight.routed else "."
    a_dim, b_dim = (dim if weight.tp_dim == dim else None for dim in (1, 0))
    a, b = (*experts, rank, columns), (*experts, rows, rank)
    return [
        Weight(f"{name}{joint}lora_a", a, tp_dim=a_dim, routed=weight.routed),
        Weight(f"{name}{joint}lora_b", b, tp_dim=b_dim, routed=weight.routed),
    ]


def _hf_layer(layer: int) -> str:
    return f"model.layers.{layer}."
