"""SwiGLU feed-forward of a training step on a CPU in fp32, as one node of autograd's graph.

An operator at a time it is four nodes, whose cost a small model notices: a linear map is seven of
torch's operators with its backward pass. One node adds up the two gradients of its input where the
first of them lies, and makes the hidden values again in the pass that takes gate and up apart.
The twin is ``FeedForward``, an operator at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.ops.native import build
from deepseek.ops.rows import as_rows
from deepseek.ops.swiglu import swiglu_backward, swiglu_forward


def feed_forward_node(x: Tensor, w1_FD: Tensor, w3_FD: Tensor, w2_DF: Tensor) -> Tensor | None:
    """``w2(silu(w1 x) * w3 x)``; None: there are no kernels, or they do not take these.

    Args:
        x: (..., D).

    Returns:
        (..., D).
    """
    given = x, w1_FD, w3_FD, w2_DF
    return _FeedForward.apply(*given) if build.takes_in_training(*given) else None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1_FD: Tensor, w3_FD: Tensor, w2_DF: Tensor) -> Tensor:
        x_TD = as_rows(x)
        gate_TF, up_TF = x_TD @ w1_FD.t(), x_TD @ w3_FD.t()
        ctx.save_for_backward(x_TD, w1_FD, w3_FD, w2_DF, gate_TF, up_TF)
        return (swiglu_forward(gate_TF, up_TF) @ w2_DF.t()).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w1_FD, w3_FD, w2_DF, gate_TF, up_TF = ctx.saved_tensors
        (needs_x, *needs_w), grad_TD = ctx.needs_input_grad, as_rows(grad)
        by_hidden_TF = grad_TD @ w2_DF
        by_gate_TF, by_up_TF, _ = swiglu_backward(by_hidden_TF, gate_TF, up_TF, makes_hidden=True)
        hidden_TF = by_hidden_TF  # has become them
        pairs = (by_gate_TF, x_TD), (by_up_TF, x_TD), (grad_TD, hidden_TF)
        by_w = [
            y.t() @ x if needed else None for needed, (y, x) in zip(needs_w, pairs, strict=True)
        ]
        by_x = (by_gate_TF @ w1_FD).addmm_(by_up_TF, w3_FD).view(grad.shape) if needs_x else None
        return by_x, *by_w
