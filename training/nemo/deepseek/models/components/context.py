"""What the blocks need to know of the tokens besides their activations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenContext:
    """Facts about the tokens of one forward pass, the same for every block."""

    cos_BSP: Tensor
    """Rotary cosines of the positions (``rope.rotation``)."""
    sin_BSP: Tensor
    """Rotary sines."""
    documents_BS: Tensor | None = None
    """Document ids: attention stays inside a document. None: one stream."""
    real_BS: Tensor | None = None
    """False for padding, which is never counted in loads or balance losses. None: all real."""
    balance_scale: Tensor | None = None
    """1 / (real tokens of the whole optimiser step), scalar fp32. None: not training, so tokens are
    not counted and no balance loss is added."""
