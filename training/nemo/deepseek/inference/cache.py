"""The latent KV cache: ``kv_lora_rank + qk_rope_head_dim`` numbers per token and layer.

S is the number of new tokens, M that of all in the cache; shapes: ``models/__init__.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.config.schema import ModelConfig


class LatentCache:
    """One layer's latents for a batch whose prompts are aligned at their right end.

    Args:
        batch_size: rows.
        capacity: tokens per row, prompt padding included.
        config: sizes.
        padding_B: int64, slots at the left of each row that hold no token.
        dtype: of the latents.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        config: ModelConfig,
        padding_B: Tensor,
        dtype: torch.dtype,
    ) -> None:
        device = padding_B.device
        self.latent_BMC = torch.zeros(
            batch_size, capacity, config.kv_lora_rank, dtype=dtype, device=device
        )
        self.k_rope_BMH = torch.zeros(
            batch_size, capacity, config.qk_rope_head_dim, dtype=dtype, device=device
        )
        self.padding_B = padding_B
        self.length = 0

    def append(self, latent_BSC: Tensor, k_rope_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the new tokens; return everything stored and who may see what (bool (B, S, M))."""
        start, end = self.length, self.length + latent_BSC.shape[1]
        self.latent_BMC[:, start:end] = latent_BSC
        self.k_rope_BMH[:, start:end] = k_rope_BSH
        self.length = end
        slots_M = torch.arange(end, device=self.padding_B.device)
        new_S1 = torch.arange(start, end, device=self.padding_B.device).unsqueeze(-1)
        visible_BSM = (slots_M >= self.padding_B.view(-1, 1, 1)) & (slots_M <= new_S1)
        # A padding slot sees itself: a row of the softmax with nothing in it would be NaN.
        visible_BSM = visible_BSM | (slots_M == new_S1)
        return self.latent_BMC[:, :end], self.k_rope_BMH[:, :end], visible_BSM
