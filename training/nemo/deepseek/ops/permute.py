"""Row permutations with a deterministic backward pass.

Autograd's own backward of ``x[index]`` scatters with atomic adds, whose order (and so whose last
bit) depends on the threads. A permutation needs no scatter: its backward is the inverse gather.

T tokens, K choices per token, R = T*K routed rows, D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inverse_permutation(order_R: Tensor) -> Tensor:
    """``inverse[order[i]] = i``; int64 (R,)."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return inverse_R


def permute_rows(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Row ``i`` of the result is row ``order[i]`` of ``x``; ``order`` is a permutation."""
    return _PermuteRows.apply(x_RD, order_R, inverse_R)


def expand_rows(x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Repeat each row K = R/T times (row-major), then permute: row ``i`` is ``x[order[i] // K]``.

    The backward pass adds each token's K gradients in the order of its choices.
    """
    return _ExpandRows.apply(x_TD, order_R, inverse_R)


def expand_rows_slow(x_TD: Tensor, order_R: Tensor) -> Tensor:
    """Readable twin of ``expand_rows``."""
    num_choices = order_R.numel() // max(x_TD.shape[0], 1)
    return x_TD.repeat_interleave(num_choices, dim=0)[order_R]


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.num_tokens = x_TD.shape[0]
        ctx.num_choices = order_R.numel() // max(x_TD.shape[0], 1)  # there may be no token
        tokens_R = torch.div(order_R, ctx.num_choices, rounding_mode="floor")
        return x_TD.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        rows_RD = grad_RD.index_select(0, inverse_R)
        grad_TKD = rows_RD.view(ctx.num_tokens, ctx.num_choices, grad_RD.shape[1])
        return grad_TKD.sum(dim=1), None, None
