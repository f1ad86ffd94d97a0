"""SwiGLU of all experts over rows sorted by expert, by kernels; shapes: ``models/__init__.py``.

One node of autograd's graph, where an operator at a time makes five. It keeps gate and up, and
makes the hidden values again; the gradients of rows that gate and up give are added in place. What
it keeps lies in the rooms of its gradients, if these have some (``ops/gradient_rooms.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.ops.gradient_rooms import lent_room
from deepseek.ops.grouped_linear import (
    fits,
    grouped_linear_loop,
    product,
    stack_gradient,
    takes_any_counts,
)
from deepseek.ops.rows import row_starts
from deepseek.ops.swiglu import swiglu_backward, swiglu_forward, swiglu_slow


def grouped_feed_forward(
    x_RD: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    w2_EDF: Tensor,
) -> Tensor | None:
    """``w2(silu(w1 x) * w3 x * weight)`` of each row with the matrices of its expert; None: there
    is no kernel, or it does not take these.

    Args:
        x_RD: rows sorted by expert, ``counts[e]`` of them for expert ``e``.
        weights_R: of each row.
        counts_E: int64 rows per expert; zeros allowed.
        w1_EFD, w3_EFD, w2_EDF: stacks.

    Returns:
        (R, D).
    """
    given = x_RD, weights_R, w1_EFD, w3_EFD, w2_EDF
    if not takes_any_counts(x_RD, weights_R) or not weights_R.is_contiguous():
        return None
    if not takes_stacks(w1_EFD, w3_EFD, w2_EDF) or not fits(x_RD, w1_EFD, counts_E):
        return None
    if weights_R.shape != x_RD.shape[:1]:
        return None
    return _FeedForward.apply(*given, row_starts(counts_E, len(x_RD)))


def takes_stacks(w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor) -> bool:
    """Whether kernels go by these: shapes that fit each other, plain numbers side by side."""
    stacks = w1_EFD, w3_EFD, w2_EDF
    if not takes_any_counts(*stacks) or not all(x.is_contiguous() for x in stacks):
        return False
    return w3_EFD.shape == w1_EFD.shape and w2_EDF.shape == w1_EFD.mT.shape


def grouped_feed_forward_slow(
    x_RD: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    w2_EDF: Tensor,
) -> Tensor:
    """Reference implementation of ``grouped_feed_forward``."""
    gate_RF, up_RF = (grouped_linear_loop(x_RD, w, counts_E) for w in (w1_EFD, w3_EFD))
    hidden_RF = swiglu_slow(gate_RF, up_RF, weights_R.unsqueeze(1))
    return grouped_linear_loop(hidden_RF, w2_EDF, counts_E)


class ExpertValues(NamedTuple):
    """What the backward pass is given again."""

    x_RD: Tensor
    weights_R: Tensor
    w1_EFD: Tensor
    w3_EFD: Tensor
    w2_EDF: Tensor
    starts: Tensor
    gate_RF: Tensor
    up_RF: Tensor


def experts_forward(
    x_RD: Tensor,
    weights_R: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    w2_EDF: Tensor,
    starts: Tensor,
) -> tuple[Tensor, ExpertValues]:
    """``grouped_feed_forward`` without gradient, and what that needs; ``starts``: of each expert's
    rows, see ``row_starts``; what is given is contiguous."""
    sizes = len(x_RD), w1_EFD.shape[1]
    gate_RF, up_RF = (product(x_RD, w, starts, lent_room(w, sizes)) for w in (w1_EFD, w3_EFD))
    y_RD = product(swiglu_forward(gate_RF, up_RF, weights_R), w2_EDF, starts)
    stacks = w1_EFD, w3_EFD, w2_EDF
    return y_RD, ExpertValues(x_RD, weights_R, *stacks, starts, gate_RF, up_RF)


def experts_back(
    grad_RD: Tensor, kept: ExpertValues, needs_x: bool, needs_w: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of rows, of their weights and of the stacks, each of them if it is needed."""
    x_RD, weights_R, w1_EFD, w3_EFD, w2_EDF, starts, gate_RF, up_RF = kept
    by_x, by_w1, by_w3, by_w2 = None, None, None, None
    by_hidden_RF = product(grad_RD, w2_EDF.mT, starts)
    by_gate_RF, by_up_RF, by_weights_R = swiglu_backward(
        by_hidden_RF, gate_RF, up_RF, weights_R, makes_hidden=needs_w[2]
    )
    hidden_RF = by_hidden_RF if needs_w[2] else None  # has become them
    del by_hidden_RF
    # Gradients may come to lie where gate and up were, and the last one where the rows were.
    if needs_w[0]:
        by_w1 = stack_gradient(w1_EFD, by_gate_RF, x_RD, starts, gate_RF)
    if needs_w[1]:
        by_w3 = stack_gradient(w3_EFD, by_up_RF, x_RD, starts, up_RF)
    if needs_x:
        by_x = product(by_gate_RF, w1_EFD.mT, starts)
        product(by_up_RF, w3_EFD.mT, starts, by_x, adds=True)
    if hidden_RF is not None:
        by_w2 = stack_gradient(w2_EDF, grad_RD, hidden_RF, starts, x_RD)
    return by_x, by_weights_R, by_w1, by_w3, by_w2


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, *given: Tensor) -> Tensor:
        y_RD, kept = experts_forward(x_RD.contiguous(), *given)
        ctx.save_for_backward(*kept)
        return y_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, *needs_w, _ = ctx.needs_input_grad
        kept = ExpertValues(*ctx.saved_tensors)
        return *experts_back(grad_RD.contiguous(), kept, needs_x, needs_w), None
