"""The DeepSeek-V3 transformer: embedding, blocks, norm, head, and multi-token prediction.

Single-device code. Source: arXiv:2412.19437 section 2.

B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek.config.schema import ModelConfig
from deepseek.models.components.attention import LatentStore, MultiHeadLatentAttention
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.context import TokenContext
from deepseek.models.components.head import Head
from deepseek.models.components.moe import MoE
from deepseek.models.components.mtp import MultiTokenPredictor
from deepseek.models.components.norm import RMSNorm
from deepseek.models.components.rope import rotation
from deepseek.models.components.router import Router
from deepseek.models.losses import shift


class HiddenStates(NamedTuple):
    """Normed hidden states, ready for the head."""

    main_BSD: Tensor
    mtp_BSD: list[Tensor]
    """One per MTP depth."""


class Transformer(nn.Module):
    """Weights start uninitialised; call ``init_weights``, or load some."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(i): DeepSeekBlock(config, i) for i in range(config.num_hidden_layers)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Head(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(config, depth) for depth in range(config.num_nextn_predict_layers)
        )
        self.recompute = config.activations_checkpoint_granularity == "full"

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits (B, S, V).

        Args:
            tokens_BS: int64 ids.
            positions_BS: int64 positions; None: 0, 1, 2, ...
            documents_BS: document ids that attention must not cross; None: one stream.
        """
        context = self.context(tokens_BS, positions_BS, documents_BS)
        return self.head(self._main(tokens_BS, context))

    def last_logits(
        self, tokens_BS: Tensor, positions_BS: Tensor, caches: Sequence[LatentStore]
    ) -> Tensor:
        """Logits after the last of these tokens, (B, V), which also see the cached ones.

        Args:
            tokens_BS: new tokens, added to the caches.
            positions_BS: their positions.
            caches: one per layer.
        """
        context = self.context(tokens_BS, positions_BS)
        return self.head(self._main(tokens_BS, context, caches)[:, -1])

    def hidden_states(self, tokens_BS: Tensor, context: TokenContext) -> HiddenStates:
        """Hidden states of the main model and of every MTP depth, for the training loss."""
        main_BSD = self._main(tokens_BS, context)
        if context.real_BS is not None:  # MTP looks ahead: what padding holds must not matter
            tokens_BS = tokens_BS.where(context.real_BS, 0)
        hidden_BSD, mtp_BSD = main_BSD, []
        for depth, module in enumerate(self.mtp, start=1):
            ahead_BS = shift(tokens_BS, depth, 0, context.documents_BS)
            hidden_BSD = self._run(module, hidden_BSD, self.embed(ahead_BS), context)
            mtp_BSD.append(hidden_BSD)
        return HiddenStates(main_BSD, mtp_BSD)

    def context(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        real_BS: Tensor | None = None,
        balance_scale: Tensor | None = None,
    ) -> TokenContext:
        """What the blocks need to know of these tokens."""
        config = self.config
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
            positions_BS = positions_BS.expand_as(tokens_BS)
        dtype = torch.float64 if self.norm.weight.dtype == torch.float64 else torch.float32
        cos_BSP, sin_BSP = rotation(
            positions_BS, config.qk_rope_head_dim, config.rope_theta, config.rope_scaling, dtype
        )
        return TokenContext(cos_BSP, sin_BSP, documents_BS, real_BS, balance_scale)

    def compile_attention(self) -> None:
        """Compile every block's attention in place; the expert dispatch stays eager, since its
        shapes change with each batch."""
        for module in self.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.compile()

    def routers(self) -> dict[str, Router]:
        """Every router by the name of its block, in order of depth."""
        return {
            name.removesuffix(".ffn"): module.gate
            for name, module in self.named_modules()
            if isinstance(module, MoE)
        }

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every weight and buffer; the values depend on seed and name alone.

        | what                | start                               |
        | ------------------- | ----------------------------------- |
        | RMSNorm             | 1                                   |
        | correction bias     | 0                                   |
        | all other weights   | normal, std ``initializer_range``   |

        (arXiv:2412.19437 section 4.2: all learnable parameters, std 0.006.) Each matrix, and each
        expert of a stack, has a generator of its own, so that a shard can be filled without the
        rest and any layout starts from the same model.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif parameter.dim() == 3:
                for expert, weight in enumerate(parameter):
                    _fill_normal(weight, std, seed, f"{name}.{expert}")
            else:
                _fill_normal(parameter, std, seed, name)
        for buffer in self.buffers():
            buffer.zero_()

    def _main(
        self,
        tokens_BS: Tensor,
        context: TokenContext,
        caches: Sequence[LatentStore] | None = None,
    ) -> Tensor:
        """Embedding, blocks and final norm."""
        h_BSD = self.embed(tokens_BS)
        for i, block in enumerate(self.layers.values()):
            h_BSD = self._run(block, h_BSD, context, *([caches[i]] if caches else []))
        return self.norm(h_BSD)

    def _run(self, module: nn.Module, *args: object) -> Tensor:
        """Call a block, recomputing its activations in the backward pass if so configured."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)


def _fill_normal(weight: Tensor, std: float, seed: int, name: str) -> None:
    """Normal numbers from a generator seeded by (seed, name); drawn on the CPU in fp32."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
