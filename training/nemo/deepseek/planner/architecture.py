"""The sizes of a model that its step's time depends on, of this package's models and of others.

Published runs are of models that ``train`` does not know, too (grouped-query attention), so that
the model of time has a description of its own. ``of_model`` makes it from a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from deepseek.config.schema import ModelConfig


@dataclass(frozen=True)
class Product:
    """A matrix (inner, outer) that rows of activations are multiplied with."""

    inner: int
    outer: int

    @property
    def size(self) -> int:
        """Numbers of the matrix."""
        return self.inner * self.outer


@dataclass(frozen=True)
class Architecture:
    """Sizes, named as in ``ModelConfig``."""

    hidden: int
    layers: int
    """Blocks without the MTP modules."""
    dense_layers: int
    """Leading blocks without experts."""
    heads: int
    kv_heads: int
    """Heads of keys and values; those of the queries in latent attention."""
    qk_dim: int
    """Width of a query's head."""
    v_dim: int
    """Width of a value's head."""
    vocab: int
    dense_ffn: int
    expert_ffn: int = 0
    experts: int = 0
    top_k: int = 0
    shared: int = 0
    """Shared experts of a block."""
    q_lora: int = 0
    """0: queries are not compressed."""
    kv_lora: int = 0
    """0: grouped-query attention instead of latent attention."""
    rope_dim: int = 0
    """Dims of the key that all heads share in latent attention."""
    groups: int = 1
    top_groups: int = 1
    mtp: int = 0
    """MTP modules."""
    window: int = 0
    """Tokens that every other layer's attention looks back; 0: all."""

    @classmethod
    def of_model(cls, model: ModelConfig) -> Architecture:
        """Of a configuration."""
        return cls(
            hidden=model.hidden_size,
            layers=model.num_hidden_layers,
            dense_layers=min(model.first_k_dense_replace, model.num_hidden_layers),
            heads=model.num_attention_heads,
            kv_heads=model.num_attention_heads,
            qk_dim=model.qk_head_dim,
            v_dim=model.v_head_dim,
            vocab=model.vocab_size,
            dense_ffn=model.intermediate_size,
            expert_ffn=model.moe_intermediate_size,
            experts=model.n_routed_experts,
            top_k=model.num_experts_per_tok,
            shared=model.n_shared_experts,
            q_lora=model.q_lora_rank or 0,
            kv_lora=model.kv_lora_rank,
            rope_dim=model.qk_rope_head_dim,
            groups=model.n_group,
            top_groups=model.topk_group,
            mtp=model.num_nextn_predict_layers,
        )

    @cached_property
    def attention(self) -> tuple[Product, ...]:
        """Matrices of one block's attention."""
        dim, heads = self.hidden, self.heads
        out = Product(heads * self.v_dim, dim)
        if not self.kv_lora:
            keys_values = self.kv_heads * (self.qk_dim + self.v_dim)
            return (Product(dim, heads * self.qk_dim + keys_values), out)
        query = heads * self.qk_dim
        queries = (
            (Product(dim, self.q_lora), Product(self.q_lora, query))
            if self.q_lora
            else (Product(dim, query),)
        )
        expanded = heads * (self.qk_dim - self.rope_dim + self.v_dim)
        return (
            *queries,
            Product(dim, self.kv_lora + self.rope_dim),
            Product(self.kv_lora, expanded),
            out,
        )

    @property
    def expansions(self) -> tuple[Product, ...]:
        """Of latent attention's matrices, those that latents are expanded with."""
        if not self.kv_lora:
            return ()
        return self.attention[1:4:2] if self.q_lora else self.attention[2:3]

    def feed_forward(self, moe: bool) -> tuple[Product, ...]:
        """Matrices of a block's feed-forward that every token goes through."""
        width = self.shared * self.expert_ffn if moe else self.dense_ffn
        return (Product(self.hidden, 2 * width), Product(width, self.hidden)) if width else ()

    @property
    def expert(self) -> tuple[Product, Product]:
        """Matrices of one routed expert."""
        return Product(self.hidden, 2 * self.expert_ffn), Product(self.expert_ffn, self.hidden)

    @property
    def moe_layers(self) -> int:
        """Blocks with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @cached_property
    def attention_size(self) -> int:
        """Numbers of one block's attention matrices."""
        return sum(product.size for product in self.attention)

    @cached_property
    def expert_size(self) -> int:
        """Numbers of one routed expert."""
        return sum(product.size for product in self.expert)

    @cached_property
    def block_size(self) -> dict[bool, int]:
        """Numbers of a block without its routed experts and norms, with a router and without."""
        return {
            moe: self.attention_size
            + sum(product.size for product in self.feed_forward(moe))
            + (self.hidden * self.experts if moe else 0)
            for moe in (False, True)
        }

    @cached_property
    def parameters(self) -> int:
        """Numbers of the model without MTP and norms."""
        moe = self.moe_layers
        return (
            2 * self.vocab * self.hidden
            + (self.layers - moe) * self.block_size[False]
            + moe * (self.block_size[True] + self.experts * self.expert_size)
        )
