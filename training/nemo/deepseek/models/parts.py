"""The parts of a transformer and how they follow each other; some of them may be elsewhere.

B batch, S sequence, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek.config.schema import ModelConfig
from deepseek.models.components.attention import LatentStore
from deepseek.models.components.context import TokenContext
from deepseek.models.components.head import Head
from deepseek.models.components.rope import rotation
from deepseek.models.losses import shift


class HiddenStates(NamedTuple):
    """Normed hidden states, ready for the head."""

    main_BSD: Tensor
    mtp_BSD: list[Tensor]
    """One per MTP depth."""


class Parts(nn.Module):
    """Embedding, blocks, norm, head and MTP modules, or consecutive ones of them.

    Attributes:
        embed: None unless the first part is here.
        layers: blocks by their number.
        norm, head: None unless the last part is here.
        mtp: empty unless the last part is here.
        mtp_embed: a copy of the embedding for MTP, where the embedding itself is in another stage.
        recompute: blocks keep no activations and compute them again in the backward pass.
    """

    config: ModelConfig
    embed: nn.Embedding | None
    layers: nn.ModuleDict
    norm: nn.Module | None
    head: Head | None
    mtp: nn.ModuleList
    mtp_embed: nn.Embedding | None
    recompute: bool

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
        is_fp64 = next(self.parameters()).dtype == torch.float64
        cos_BSP, sin_BSP = rotation(
            positions_BS,
            config.qk_rope_head_dim,
            config.rope_theta,
            config.rope_scaling,
            torch.float64 if is_fp64 else torch.float32,
        )
        return TokenContext(cos_BSP, sin_BSP, documents_BS, real_BS, balance_scale)

    def main(
        self,
        inputs: Tensor,
        context: TokenContext,
        caches: Sequence[LatentStore] | None = None,
    ) -> Tensor:
        """Embedding, blocks and final norm, as far as they are here: (B, S, D).

        Args:
            inputs: tokens (B, S) if the embedding is here, else the stage before's result.
            context: of all tokens.
            caches: one per block, when decoding.
        """
        h_BSD = self.embed(inputs) if self.embed is not None else inputs
        if torch.is_grad_enabled() and not h_BSD.requires_grad:
            # Frozen below, as with adapters: loads are counted in the backward pass, which must
            # come to every block.
            h_BSD.requires_grad_()
        for i, block in enumerate(self.layers.values()):
            h_BSD = self._run(block, h_BSD, context, *([caches[i]] if caches else []))
        return self.norm(h_BSD) if self.norm is not None else h_BSD

    def predict_ahead(
        self, main_BSD: Tensor, tokens_BS: Tensor, context: TokenContext
    ) -> list[Tensor]:
        """Hidden states of every MTP depth, from the main model's."""
        if context.real_BS is not None:  # MTP looks ahead: what padding holds must not matter
            tokens_BS = tokens_BS.where(context.real_BS, 0)
        embed = self.mtp_embed if self.mtp_embed is not None else self.embed
        hidden_BSD, mtp_BSD = main_BSD, []
        for depth, module in enumerate(self.mtp, start=1):
            assert embed is not None
            ahead_BS = shift(tokens_BS, depth, 0, context.documents_BS)
            hidden_BSD = self._run(module, hidden_BSD, embed(ahead_BS), context)
            mtp_BSD.append(hidden_BSD)
        return mtp_BSD

    def _run(self, module: nn.Module, *args: object) -> Tensor:
        """Call a block, recomputing its activations in the backward pass if so configured."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)
