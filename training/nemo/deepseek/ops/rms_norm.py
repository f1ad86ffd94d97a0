"""RMSNorm (arXiv:1910.07467) with a backward pass of its own: fewer passes over memory, and one
tensor kept where autograd keeps three. On a CPU each pass is one kernel (``native/rms_norm.c``).

What is narrower than its weight, as bf16 in training, is made wide some rows at a time, which stay
in the caches meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.ops.native.build import kernel
from deepseek.ops.rows import as_rows, row_blocks, row_step

_BLOCK = 32
"""Rows whose part of the weight's gradient the kernel adds up by itself."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dim.

    Args:
        x: (..., D); the mean of squares is taken in fp32, or fp64 for fp64.
        weight_D: of any float dtype.
        eps: added to the mean of squares.

    Returns:
        Shape and dtype of ``x``.
    """
    if torch.compiler.is_compiling():  # which fuses by itself
        return rms_norm_slow(x, weight_D, eps)
    wide = x.dtype == weight_D.dtype and x.dtype in (torch.float32, torch.float64)
    if torch.is_grad_enabled():
        return (_RMSNorm if wide else _NarrowRMSNorm).apply(x, weight_D, eps)
    return normed(x, weight_D, eps)[0] if wide else rms_norm_slow(x, weight_D, eps)


def rms_norm_slow(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Reference implementation of ``rms_norm``."""
    wide = x.to(_wide(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight_D * (wide * scale).to(x.dtype)).to(x.dtype)


def _scale(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normed(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``rms_norm`` without gradient, of one dtype, and 1 / rms(x), (..., 1)."""
    run, step = kernel("rms_norm", "ppppnnnfn", x, weight_D), row_step(x)
    if run is None or step is None or weight_D.shape != x.shape[-1:]:
        scale = _scale(x, eps)
        return (x * scale).mul_(weight_D), scale
    width, weight_D = x.shape[-1], weight_D.contiguous()
    y, scale = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1)
    run(y, scale, x, weight_D, scale.numel(), width, step, eps, torch.get_num_threads())
    return y, scale


def norm_gradients(
    grad: Tensor,
    x: Tensor,
    weight_D: Tensor,
    scale: Tensor,
    trained: bool,
    plus: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of what ``normed`` was given, which has told ``scale``; None for a weight that is
    not trained. ``plus`` is added to that of ``x``: what has come by beside the norm."""
    run, step = kernel("rms_norm_backward", "ppppppppnnnn", grad, x, weight_D), row_step(x)
    if run is not None and step is not None and weight_D.shape == x.shape[-1:]:
        rows, width, weight_D = scale.numel(), x.shape[-1], weight_D.contiguous()
        by_x, parts_bD = x.new_empty(x.shape), x.new_empty(-(-rows // _BLOCK), width)
        by_weight_D = torch.empty_like(weight_D) if trained else None
        run(
            by_x, by_weight_D, parts_bD, grad.contiguous(), x, weight_D, scale,
            None if plus is None else plus.contiguous(),
            rows, width, step, torch.get_num_threads(),
        )  # fmt: skip
        return by_x, by_weight_D
    by_x = grad * x
    # How much the gradient would change rms(x), for each row.
    along = (by_x * weight_D).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
    grad_weight_D = by_x.mul_(scale).unsqueeze(0).flatten(0, -2).sum(0) if trained else None
    by_x = (grad * weight_D).mul_(scale).addcmul_(x, along)
    return by_x if plus is None else by_x.add_(plus), grad_weight_D


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, scale = normed(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_D, scale = ctx.saved_tensors
        return *norm_gradients(grad, x, weight_D, scale, ctx.needs_input_grad[1]), None


class _NarrowRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x_RD, y_RD = as_rows(x), as_rows(y)
        scale_R1 = torch.empty(len(x_RD), 1, dtype=_wide(x), device=x.device)
        for rows in row_blocks(x_RD):
            x_rD = x_RD[rows].to(scale_R1.dtype)
            scale_R1[rows] = _scale(x_rD, eps)
            y_RD[rows] = x_rD.mul_(scale_R1[rows]).to(x.dtype) * weight_D
        ctx.save_for_backward(x, weight_D, scale_R1)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_D, scale_R1 = ctx.saved_tensors
        by_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x_RD, grad_RD, by_x_RD, width = as_rows(x), as_rows(grad), as_rows(by_x), x.shape[-1]
        by_weight_D = torch.zeros(width, dtype=scale_R1.dtype, device=x.device)
        for rows in row_blocks(x_RD):
            x_rD, grad_rD = (part[rows].to(scale_R1.dtype) for part in (x_RD, grad_RD))
            scale_r1, product_rD = scale_R1[rows], grad_rD * x_rD
            along_r1 = (product_rD @ weight_D.to(scale_R1.dtype)).unsqueeze(-1)
            along_r1.mul_(scale_r1.pow(3)).div_(-width)
            if ctx.needs_input_grad[1]:
                by_weight_D += product_rD.mul_(scale_r1).sum(0)
            by_x_RD[rows] = grad_rD.mul_(weight_D).mul_(scale_r1).addcmul_(x_rD, along_r1)
        by_weight = by_weight_D.to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return by_x, by_weight, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
