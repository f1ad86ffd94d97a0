"""One transformer block: attention, then a dense or a mixture-of-experts feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from deepseek.config.schema import ModelConfig
from deepseek.models.components.attention import LatentStore, MultiHeadLatentAttention
from deepseek.models.components.context import TokenContext
from deepseek.models.components.feed_forward import FeedForward
from deepseek.models.components.moe import MoE
from deepseek.models.components.norm import RMSNorm
from deepseek.models.components.rope import softmax_scale
from deepseek.models.components.router import Router


class DeepSeekBlock(nn.Module):
    """Pre-norm residual block; B batch, S sequence, D model."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = build_attention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.ffn: nn.Module = (
            build_moe(config)
            if self.is_moe
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self, x_BSD: Tensor, context: TokenContext, cache: LatentStore | None = None
    ) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), context, cache)
        normed_BSD = self.ffn_norm(x_BSD)
        return x_BSD + (self.ffn(normed_BSD, context) if self.is_moe else self.ffn(normed_BSD))


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
