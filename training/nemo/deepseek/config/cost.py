"""Parameters, FLOPs and cache of a model, exact, from its configuration alone.

The shapes are those of DeepSeek-V3 (arXiv:2412.19437 section 2.1). With D = ``hidden_size``, N
heads, Rq and C the latent ranks of query and key-value, I and F the hidden widths of a dense
feed-forward and of one expert, E experts of which a token takes K, V ids:

    attention   Rq (D + N qk) + C N (nope + v) + (C + rope) D + N v D + norms of the latents
    dense       3 D I
    expert      3 D F
    MoE layer   (E + shared) experts + router E D
    MTP module  2 D D + norms + a MoE layer with its attention
    adapter     r (I + O) beside a matrix (O, I), in every routed expert
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepseek.config.schema import ModelConfig
from deepseek.config.weights import Weight, model_weights

CHUNK_TOKENS = 512
"""Tokens whose logits exist at one time; ``ops/cross_entropy.py`` computes in such chunks."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. The correction biases are no parameters and stand apart."""

    embedding: int
    """V x D."""
    head: int
    """V x D."""
    attention_per_layer: int
    """All projections and the norms of the latents."""
    norms_per_layer: int
    """The norms before attention and before the feed-forward."""
    dense_ffn_per_layer: int
    """SwiGLU of a dense layer."""
    expert: int
    """One routed expert."""
    shared_experts_per_layer: int
    """All shared experts of a MoE layer."""
    router_per_layer: int
    """E x D."""
    final_norm: int
    """D."""
    moe_ffn_per_layer: int
    """Routed experts, shared experts and router of a MoE layer."""
    total: int
    """The model without its MTP modules, as models are usually named."""
    active: int
    """Parameters that one token passes through, embedding and head included, MTP not."""
    mtp: int
    """All MTP modules; embedding and head are the main model's and are not counted again."""
    mtp_copies: int
    """Embedding and head once more for each MTP module, as released checkpoints store them."""
    correction_biases: int
    """fp32 numbers of the routers of the main model, moved by the load and not by a gradient."""
    mtp_correction_biases: int
    """The same of the MTP modules."""
    adapters: int | None
    """Numbers of all adapters, in no other count; None without ``model.peft``."""

    @property
    def active_without_embedding(self) -> int:
        """``active`` without the input embedding, which is looked up and not multiplied."""
        return self.active - self.embedding

    @property
    def trained(self) -> int:
        """What the optimiser updates: the model and its MTP modules, or the adapters alone."""
        return self.stored if self.adapters is None else self.adapters

    @property
    def stored(self) -> int:
        """The model and its MTP modules, adapters not counted."""
        return self.total + self.mtp

    @property
    def released(self) -> int:
        """Parameters of a checkpoint in the released form."""
        return self.stored + self.mtp_copies


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """The parameters of ``model``, part by part."""
    dim, depth = model.hidden_size, model.num_nextn_predict_layers
    table = model.vocab_size * dim
    attention = attention_parameters(model)
    norms = 2 * dim
    dense = 3 * dim * model.intermediate_size
    expert = 3 * dim * model.moe_intermediate_size
    shared = model.n_shared_experts * expert
    router = model.n_routed_experts * dim
    moe = model.n_routed_experts * expert + shared + router
    active_moe = model.num_experts_per_tok * expert + shared + router
    moe_layers = model.num_moe_layers
    dense_layers = model.num_hidden_layers - moe_layers
    common = 2 * table + model.num_hidden_layers * (attention + norms) + dim + dense_layers * dense
    mtp_module = 2 * dim * dim + 3 * dim + attention + norms + moe  # norms of both inputs, output
    biases = model.n_routed_experts if model.topk_method == "noaux_tc" else 0
    return ParameterCounts(
        embedding=table,
        head=table,
        attention_per_layer=attention,
        norms_per_layer=norms,
        dense_ffn_per_layer=dense,
        expert=expert,
        shared_experts_per_layer=shared,
        router_per_layer=router,
        final_norm=dim,
        moe_ffn_per_layer=moe,
        total=common + moe_layers * moe,
        active=common + moe_layers * active_moe,
        mtp=depth * mtp_module,
        mtp_copies=depth * 2 * table,
        correction_biases=moe_layers * biases,
        mtp_correction_biases=depth * biases,
        adapters=None
        if model.peft is None
        else sum(math.prod(weight.shape) for weight in _adapters(model)),
    )


def flops_per_token(
    model: ModelConfig, seq_length: int, with_mtp: bool, causal: bool = True
) -> int:
    """Training FLOPs of one token: three times the forward pass, 2 FLOPs to a multiplication.

    With adapters (``model.peft``), frozen matrices are passed through twice, since they need no
    gradient of their own, and adapters three times.

    Counted: every matrix product, the head, and attention's two products over the sequence, which a
    causal mask halves. Not counted: embedding, router, norms, recomputation. This is the convention
    of DeepSeek's and NVIDIA's published figures (V3 at 4096 tokens: 250 GFLOP).

    Args:
        model: the sizes.
        seq_length: tokens that attention looks over.
        with_mtp: include the MTP modules, each with its own pass through the head.
        causal: count only the lower triangle of attention.

    Returns:
        FLOPs.
    """
    counts = count_parameters(model)
    attention = counts.attention_per_layer - model.kv_lora_rank - (model.q_lora_rank or 0)
    active_moe = model.num_experts_per_tok * counts.expert + counts.shared_experts_per_layer
    moe_layers = model.num_moe_layers
    layers = model.num_hidden_layers
    products = (
        counts.head
        + layers * attention
        + (layers - moe_layers) * counts.dense_ffn_per_layer
        + moe_layers * active_moe
    )
    if with_mtp:
        depth = model.num_nextn_predict_layers
        layers += depth
        products += depth * (counts.head + 2 * model.hidden_size**2 + attention + active_moe)
    scores = seq_length * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    passes, adapted = 3, 0
    if model.peft is not None:
        chosen = model.num_experts_per_tok / model.n_routed_experts
        passes, adapted = (
            2,
            sum(round(math.prod(w.shape) * (chosen if w.routed else 1)) for w in _adapters(model)),
        )
    return 2 * passes * products + 6 * adapted + 3 * layers * scores * (1 if causal else 2)


def domains_of_token(domains: int, top_k: int, groups: int, top_groups: int) -> float:
    """How many machines, or domains of NVLink, have experts of a token, if routing is balanced.

    Args:
        domains: that share the experts, as many each.
        top_k: experts of a token.
        groups: of experts.
        top_groups: of which a token's are chosen.
    """
    if groups > 1 and groups % domains == 0:
        others = math.comb(groups - groups // domains, top_groups)
        return domains * (1 - others / math.comb(groups, top_groups))
    reached = domains * (1 - (1 - 1 / domains) ** top_k)
    return min(reached, top_groups) if groups > 1 else reached


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes that decoding caches for one token: latent and rotary key of every layer.

    V3 in bf16: 70272 (arXiv:2505.09343 table 1). MTP modules are not used in decoding.

    Args:
        model: the sizes.
        bytes_per_number: 2 in bf16, 4 in fp32.
    """
    numbers = model.kv_lora_rank + model.qk_rope_head_dim
    return numbers * model.num_hidden_layers * bytes_per_number


# -- terms of the counts --


def _adapters(model: ModelConfig) -> list[Weight]:
    """Both halves of every adapter."""
    return [weight for weight in model_weights(model) if weight.adapter]


def attention_parameters(model: ModelConfig) -> int:
    """Parameters of one latent attention (MLA), the norms of its latents included."""
    dim, heads, latent = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    queries = heads * model.qk_head_dim
    if model.q_lora_rank is None:
        query = dim * queries
    else:
        query = dim * model.q_lora_rank + model.q_lora_rank + model.q_lora_rank * queries
    key_value = dim * (latent + model.qk_rope_head_dim) + latent
    expand = latent * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + key_value + expand + heads * model.v_head_dim * dim
