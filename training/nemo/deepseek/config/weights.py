"""Every weight of the model by its name: its shape, and how a layout divides it.

Dims: D model, N heads, Rq and C latents of query and key-value, I and F hidden widths of a dense
feed-forward and of one expert, E experts, V vocabulary, r rank of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek.config.peft_rules import targeted
from deepseek.config.schema import ModelConfig


@dataclass(frozen=True)
class Weight:
    """One weight, or the like-named weights of like blocks."""

    name: str
    """As in the model, without the block in front."""
    shape: tuple[int, ...]
    """Of the whole weight."""
    tp_dim: int | None = None
    """The dim that TP divides; None: every TP rank has all of it."""
    routed: bool = False
    """Holds the routed experts, whose first dim EP divides."""

    @property
    def adapter(self) -> bool:
        """Is half of an adapter, so trained while all else is frozen."""
        return "lora_" in self.name.rpartition(".")[2]

    def divided(self, tp: int, ep: int) -> tuple[int, ...]:
        """The shape that TP and EP leave to a rank; they must divide."""
        shape = list(self.shape)
        if self.routed:
            shape[0] //= ep
        elif self.tp_dim is not None:
            shape[self.tp_dim] //= tp
        return tuple(shape)

    def shard_dim(self, tp: int, ep: int, shards: int) -> int | None:
        """The dim along which data-parallel ranks share what TP and EP leave; None: none fits.

        A weight that is whole is cut along its first dim, evenly or not. A part of one must be cut
        evenly: its first dim that allows this.
        """
        if (ep if self.routed else tp if self.tp_dim is not None else 1) == 1:
            return 0
        sizes = enumerate(self.divided(tp, ep))
        return next((dim for dim, size in sizes if size % shards == 0), None)


def block_weights(model: ModelConfig, moe: bool) -> list[Weight]:
    """One block with a MoE or a dense feed-forward; names begin with ``attn`` and ``ffn``."""
    plain = _block_weights(model, moe)
    return [*plain, *(half for weight in plain for half in adapter_of(model, weight))]


def adapter_of(model: ModelConfig, weight: Weight) -> list[Weight]:
    """The two halves of the adapter beside a block's matrix: A (r, I) and B (O, r), of each routed
    expert its own; none without ``model.peft`` or if it does not name the matrix."""
    if model.peft is None:
        return []
    name = weight.name.removesuffix(".weight")
    owner, _, matrix = name.rpartition(".")
    if (f"experts.{matrix}" if weight.routed else matrix) not in targeted(
        model.peft.target_modules
    ):
        return []
    rank, (*experts, rows, columns) = model.peft.dim, weight.shape
    halves = {"a": (*experts, rank, columns), "b": (*experts, rows, rank)}
    prefix = f"{owner}.{matrix}_" if weight.routed else f"{name}."
    cut = {"a": 1, "b": 0}  # the half that has the dim which TP divides
    return [
        Weight(
            f"{prefix}lora_{half}",
            shape,
            weight.tp_dim if weight.tp_dim == cut[half] else None,
            weight.routed,
        )
        for half, shape in halves.items()
    ]


def _block_weights(model: ModelConfig, moe: bool) -> list[Weight]:
    dim, heads, latent = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    queries, rank = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim), model.q_lora_rank
    expanded = heads * (model.qk_nope_head_dim + model.v_head_dim)
    found = [Weight("attn_norm.weight", (dim,))]
    if rank is None:
        found.append(Weight("attn.wq.weight", (queries, dim), tp_dim=0))
    else:
        found += [
            Weight("attn.wq_a.weight", (rank, dim)),
            Weight("attn.q_norm.weight", (rank,)),
            Weight("attn.wq_b.weight", (queries, rank), tp_dim=0),
        ]
    found += [
        Weight("attn.wkv_a.weight", (latent + model.qk_rope_head_dim, dim)),
        Weight("attn.kv_norm.weight", (latent,)),
        Weight("attn.wkv_b.weight", (expanded, latent), tp_dim=0),
        Weight("attn.wo.weight", (dim, heads * model.v_head_dim), tp_dim=1),
        Weight("ffn_norm.weight", (dim,)),
    ]
    if not moe:
        return found + _swiglu("ffn", dim, model.intermediate_size)
    experts, hidden = model.n_routed_experts, model.moe_intermediate_size
    found += [
        Weight("ffn.gate.weight", (experts, dim)),
        Weight("ffn.experts.w1", (experts, hidden, dim), routed=True),
        Weight("ffn.experts.w3", (experts, hidden, dim), routed=True),
        Weight("ffn.experts.w2", (experts, dim, hidden), routed=True),
    ]
    if model.n_shared_experts > 0:
        found += _swiglu("ffn.shared_experts", dim, model.n_shared_experts * hidden)
    return found


def mtp_weights(model: ModelConfig) -> list[Weight]:
    """One MTP module; its embedding and head are the model's, and it has no adapters."""
    dim = model.hidden_size
    block = [
        Weight(f"block.{w.name}", w.shape, w.tp_dim, w.routed)
        for w in _block_weights(model, moe=True)
    ]
    joined = Weight("eh_proj.weight", (dim, 2 * dim))
    norms = [Weight(f"{name}.weight", (dim,)) for name in ("enorm", "hnorm", "norm")]
    return [*norms, joined, *block]


def table_weight(name: str, model: ModelConfig) -> Weight:
    """``embed``, ``head``, or ``mtp_embed``: a row for every id."""
    return Weight(f"{name}.weight", (model.vocab_size, model.hidden_size), tp_dim=0)


def _swiglu(name: str, dim: int, hidden: int) -> list[Weight]:
    return [
        Weight(f"{name}.w1.weight", (hidden, dim), tp_dim=0),
        Weight(f"{name}.w3.weight", (hidden, dim), tp_dim=0),
        Weight(f"{name}.w2.weight", (dim, hidden), tp_dim=1),
    ]
