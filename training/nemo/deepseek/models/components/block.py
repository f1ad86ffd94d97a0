"""One transformer block, and the multi-token prediction module that is made of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from deepseek.config.schema import ModelConfig
from deepseek.models.components.attention import LatentStore, MultiHeadLatentAttention
from deepseek.models.components.feed_forward import FeedForward, Linear, RMSNorm
from deepseek.models.components.moe import GroupedExperts, MoE
from deepseek.models.components.rope import softmax_scale
from deepseek.models.components.router import Router
from deepseek.ops.fp8_linear import fp8_grouped_linear, fp8_linear


class DeepSeekBlock(nn.Module):
    """Pre-norm residual block: attention, then a dense or a mixture-of-experts feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = build_attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.ffn: MoE | FeedForward = (
            build_moe(config)
            if self.is_moe
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self, x_BSD: Tensor, context: TokenContext, cache: LatentStore | None = None
    ) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_BSD = self.attn.add_to(
            x_BSD,
            self.attn_norm,
            context.cos_BSA,
            context.sin_BSA,
            context.documents_BS,
            cache,
            context.real_BS,
            context.blocks,
        )
        counted = (context.real_BS, context.balance_scale, cache is not None) if self.is_moe else ()
        return self.ffn.add_to(x_BSD, self.ffn_norm, *counted)


@dataclass(frozen=True)
class TokenContext:
    """What blocks need to know of the tokens of one forward pass besides their activations."""

    cos_BSA: Tensor
    """Rotary cosines of the positions (``rope.rotation``)."""
    sin_BSA: Tensor
    """Rotary sines."""
    documents_BS: Tensor | None = None
    """Document ids: attention stays inside a document. None: one stream."""
    real_BS: Tensor | None = None
    """False for padding, which is never counted in loads or balance losses. None: all real."""
    balance_scale: Tensor | None = None
    """1 / (real tokens of the whole optimiser step), scalar fp32. None: not training, so tokens are
    not counted and no balance loss is added."""
    blocks: Sequence[BlockMask | None] = (None,)
    """Of each chunk of queries here, the blocks of keys that they may see, for all layers; None:
    what is behind them, or this is a CPU, which makes none."""


class MultiTokenPredictor(nn.Module):
    """One extra token ahead (arXiv:2412.19437 section 2.2).

    Depth k joins the hidden state at i with the embedding of token i+k, and predicts token i+k+1.
    Embedding and head are the main model's own and are passed in or applied by the caller.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = Linear(2 * dim, dim)
        self.block = DeepSeekBlock(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(dim, eps)

    def forward(
        self,
        hidden_BSD: Tensor,
        ahead_BSD: Tensor,
        context: TokenContext,
        cache: LatentStore | None = None,
    ) -> Tensor:
        """Next depth's hidden state, ready for the head.

        Args:
            hidden_BSD: the depth before, normed (the main model's final norm for the first depth).
            ahead_BSD: embedding of the token k places ahead of each position.
            context: of these tokens.
            cache: of this depth, when decoding.
        """
        # The released weights take the embedding first; the paper's eq 21 writes it second.
        joined = torch.cat((self.enorm(ahead_BSD), self.hnorm(hidden_BSD)), dim=-1)
        return self.norm(self.block(self.eh_proj(joined), context, cache))


def use_fp8(block: DeepSeekBlock, kernels: bool) -> None:
    """Compute the products of a block in FP8, all but the router's and attention's own, as V3 does
    (arXiv:2412.19437 section 3.3.1), of linear maps by ``kernels`` if so asked for. Embedding,
    head and MTP's projection are not in a block."""
    for module in block.modules():
        if isinstance(module, Linear):
            module.product = partial(fp8_linear, kernels=True) if kernels else fp8_linear
        elif isinstance(module, GroupedExperts):
            module.grouped = fp8_grouped_linear


def build_attention(config: ModelConfig) -> MultiHeadLatentAttention:
    """MLA of the configured sizes."""
    return MultiHeadLatentAttention(
        dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        norm_eps=config.rms_norm_eps,
        softmax_scale=softmax_scale(config.qk_head_dim, config.rope_scaling),
    )


def build_moe(config: ModelConfig) -> MoE:
    """Router and experts of the configured sizes."""
    router = Router(
        dim=config.hidden_size,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group,
        top_k_groups=config.topk_group,
        scoring=config.scoring_func,
        topk_method=config.topk_method,
        normalise=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
    )
    return MoE(
        dim=config.hidden_size,
        hidden_dim=config.moe_intermediate_size,
        num_shared_experts=config.n_shared_experts,
        router=router,
        balance_coeff=config.moe_aux_loss_coeff,
        z_coeff=config.moe_z_loss_coeff,
    )
