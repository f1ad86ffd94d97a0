"""SwiGLU feed-forward: dense layers, shared experts, and a single routed expert.

D model, F hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` (arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)  # down
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)  # up

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Expert(FeedForward):
    """One routed expert, the readable form; ``GroupedExperts`` computes many of them at once."""
