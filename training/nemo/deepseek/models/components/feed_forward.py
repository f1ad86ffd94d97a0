"""The dense pieces of a block: RMSNorm, and SwiGLU feed-forward for dense layers and experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from deepseek.ops.feed_forward_node import feed_forward_node
from deepseek.ops.few_experts import decode_feed_forward, feed_forward
from deepseek.ops.few_rows import linear
from deepseek.ops.rms_norm import rms_norm
from deepseek.ops.swiglu import swiglu


class Linear(nn.Linear):
    """A linear map without bias.

    Attributes:
        product: of input and matrix; replaced where the matrix is packed, or computed with in FP8.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.product: Callable[[Tensor, Tensor], Tensor] = linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.product(x, self.weight)

    @property
    def is_plain(self) -> bool:
        """Whether it is its matrix and no more: no adapter, no part of a matrix, nobody watches."""
        return type(self) is Linear and self.product is linear and not is_watched(self)


class FeedForward(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` (arXiv:2002.05202); dense layers and shared experts."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden_dim)  # gate
        self.w2 = Linear(hidden_dim, dim)  # down
        self.w3 = Linear(dim, hidden_dim)  # up

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self._has_plain_maps():
            given = x, *self.weights
            y = feed_forward_node(*given) if torch.is_grad_enabled() else feed_forward(*given)
            if y is not None:
                return y
        return self.w2(swiglu(self.w1(x), self.w3(x)))

    def add_to(self, h: Tensor, norm: RMSNorm) -> Tensor:
        """``h + self(norm(h))``, where it can be as one node of the graph, or one kernel."""
        if self.is_plain and norm.is_plain:
            of_norm = norm.weight, norm.eps
            if torch.is_grad_enabled():
                y = feed_forward_node(h, *self.weights, of_norm)
            else:
                y = decode_feed_forward(h, of_norm, *self.weights)
            if y is not None:
                return y
        return h + self(norm(h))

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up, down."""
        return self.w1.weight, self.w3.weight, self.w2.weight

    @property
    def is_plain(self) -> bool:
        """Whether it is its matrices and no more: nobody watches."""
        return type(self) is FeedForward and not is_watched(self) and self._has_plain_maps()

    def _has_plain_maps(self) -> bool:
        return self.w1.is_plain and self.w2.is_plain and self.w3.is_plain


class Expert(FeedForward):
    """One routed expert, the readable form; ``GroupedExperts`` computes many of them at once."""


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``; the mean of squares is taken in fp32 (fp64 for fp64 input).

    Source: arXiv:1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dim; any leading shape; returns the dtype of ``x``."""
        return rms_norm(x, self.weight, self.eps)

    @property
    def is_plain(self) -> bool:
        """Whether it is its weight and no more: nobody watches."""
        return type(self) is RMSNorm and not is_watched(self)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody is told when it is called, as adapters' and FSDP's hooks are and those of
    all modules, or has replaced what is called."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    # Asked for dozens of times a token: not any(...), which takes twice as long.
    return bool(module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook())
