"""SwiGLU feed-forward of a training step on a CPU in fp32, as one node of autograd's graph.

An operator at a time it is four nodes, whose cost a small model notices: a linear map is seven of
torch's operators with its backward pass. One node adds up the two gradients of its input where the
first of them lies, and makes the hidden values again in the pass that takes gate and up apart.
The twin is ``FeedForward``, an operator at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.ops.native import build
from deepseek.ops.rms_norm import norm_gradients, normed
from deepseek.ops.rows import as_rows
from deepseek.ops.swiglu import swiglu_backward, swiglu_forward


def feed_forward_node(
    x: Tensor,
    w1_FD: Tensor,
    w3_FD: Tensor,
    w2_DF: Tensor,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor | None:
    """``w2(silu(w1 x) * w3 x)``; None: there are no kernels, or they do not take these.

    Args:
        x: (..., D).
        norm: weight and epsilon of an RMSNorm: it is applied before, and ``x`` added behind.

    Returns:
        (..., D).
    """
    norm_D, eps = norm or (None, 0.0)
    given = x, w1_FD, w3_FD, w2_DF
    if not build.takes_in_training(*given, *(() if norm_D is None else (norm_D,))):
        return None
    return _FeedForward.apply(x, norm_D, eps, *given[1:])


class FeedForwardValues(NamedTuple):
    """What the backward pass is given again."""

    gate_TF: Tensor
    up_TF: Tensor


def fed_forward(x_TD: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, FeedForwardValues]:
    """``feed_forward_node`` of rows without gradient, by ``w1``, ``w3`` and ``w2``, and what the
    backward pass needs."""
    w1_FD, w3_FD, w2_DF = weights
    values = FeedForwardValues(x_TD @ w1_FD.t(), x_TD @ w3_FD.t())
    return swiglu_forward(*values) @ w2_DF.t(), values


def fed_back(
    grad_TD: Tensor,
    x_TD: Tensor,
    weights: Sequence[Tensor],
    values: FeedForwardValues,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x`` and of the weights, each of them if it is needed."""
    (w1_FD, w3_FD, w2_DF), (needs_x, *needs_w) = weights, needs
    by_hidden_TF = grad_TD @ w2_DF
    by_gate_TF, by_up_TF, _ = swiglu_backward(by_hidden_TF, *values, makes_hidden=True)
    hidden_TF = by_hidden_TF  # has become them
    pairs = (by_gate_TF, x_TD), (by_up_TF, x_TD), (grad_TD, hidden_TF)
    by_w = [y.t() @ x if needed else None for needed, (y, x) in zip(needs_w, pairs, strict=True)]
    return (by_gate_TF @ w1_FD).addmm_(by_up_TF, w3_FD) if needs_x else None, *by_w


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        norm_D: Tensor | None,
        eps: float,
        w1_FD: Tensor,
        w3_FD: Tensor,
        w2_DF: Tensor,
    ) -> Tensor:
        h_TD = x_TD = as_rows(h)
        weights = w1_FD, w3_FD, w2_DF
        of_norm: tuple[Tensor | None, ...] = None, None, None
        if norm_D is not None:
            x_TD, scale_T1 = normed(h_TD, norm_D, eps)
            of_norm = h_TD, norm_D, scale_T1
        y_TD, values = fed_forward(x_TD, weights)
        ctx.save_for_backward(*of_norm, x_TD, *weights, *values)
        y = y_TD.view(h.shape)
        # Not in place: recomputation may have kept the product. No view: a pipeline's schedule
        # takes it off its graph.
        return y if norm_D is None else h + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, norm_D, scale_T1, x_TD, w1_FD, w3_FD, w2_DF, *kept = ctx.saved_tensors
        needs_h, needs_norm, _, *needs_w = ctx.needs_input_grad
        grad_TD, weights = as_rows(grad), (w1_FD, w3_FD, w2_DF)
        needs = needs_h or needs_norm, *needs_w
        by_x_TD, *by_w = fed_back(grad_TD, x_TD, weights, FeedForwardValues(*kept), needs)
        by_norm_D = None
        if norm_D is not None and by_x_TD is not None:
            of_norm = h_TD, norm_D, scale_T1, needs_norm
            by_x_TD, by_norm_D = norm_gradients(by_x_TD, *of_norm, plus=grad_TD)
        return None if by_x_TD is None else by_x_TD.view(grad.shape), by_norm_D, None, *by_w
