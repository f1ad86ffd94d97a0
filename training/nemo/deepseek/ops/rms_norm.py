"""RMSNorm (arXiv:1910.07467) with a backward pass of its own: fewer passes over memory, and one
tensor kept where autograd keeps three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dim.

    Args:
        x: (..., D); the mean of squares is taken in fp32, or fp64 for fp64.
        weight_D: of any float dtype.
        eps: added to the mean of squares.

    Returns:
        Shape and dtype of ``x``.
    """
    if x.dtype != weight_D.dtype or x.dtype not in (torch.float32, torch.float64):
        return rms_norm_slow(x, weight_D, eps)
    if torch.compiler.is_compiling():  # which fuses by itself
        return rms_norm_slow(x, weight_D, eps)
    if not torch.is_grad_enabled():
        return x * _scale(x, eps) * weight_D
    return _RMSNorm.apply(x, weight_D, eps)


def rms_norm_slow(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Reference implementation of ``rms_norm``."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight_D * (wide * scale).to(x.dtype)).to(x.dtype)


def _scale(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_D, scale = ctx.saved_tensors
        by_x = grad * x
        # How much the gradient would change rms(x), for each row.
        along = (by_x * weight_D).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        trained = ctx.needs_input_grad[1]
        grad_weight_D = by_x.mul_(scale).unsqueeze(0).flatten(0, -2).sum(0) if trained else None
        return (grad * weight_D).mul_(scale).addcmul_(x, along), grad_weight_D, None
