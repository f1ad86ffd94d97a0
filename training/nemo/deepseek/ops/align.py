"""Row counts per expert rounded up, so that a row's result does not depend on its neighbours.

A matrix product over 3 rows takes another path through the kernel than one over 300, and the same
row then differs in its last bits. With every expert's rows padded to a multiple of ``ROWS``, a
token's result depends on the token alone: a change in one document leaves another's bitwise as it
was. (Found so on CPUs for fp32 with dims that are a multiple of 4, and for fp64 on one thread; the
kernels promise it nowhere.)

R rows sorted by expert, P padded rows, D dims, e experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 16
"""Every expert's row count becomes a multiple of this."""


def aligned_slots(counts_e: Tensor) -> tuple[Tensor, Tensor]:
    """Padded counts (e,), and the slot of each row among the padded ones (R,), both int64."""
    padded_e = (counts_e + ROWS - 1) // ROWS * ROWS
    added_e = padded_e - counts_e
    shift_e = added_e.cumsum(0) - added_e
    slots_R = torch.arange(int(counts_e.sum()), device=counts_e.device)
    return padded_e, slots_R + shift_e.repeat_interleave(counts_e)


def spread_rows(x_RD: Tensor, slots_R: Tensor, num_slots: int) -> Tensor:
    """Rows to their slots, zeros between them: (R, D) -> (P, D)."""
    return _Spread.apply(x_RD, slots_R, num_slots)


def gather_rows(x_PD: Tensor, slots_R: Tensor) -> Tensor:
    """Rows back from their slots: (P, D) -> (R, D)."""
    return _Gather.apply(x_PD, slots_R)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, slots_R: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots_R)
        return x_RD.new_zeros(num_slots, x_RD.shape[1]).index_copy_(0, slots_R, x_RD)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (slots_R,) = ctx.saved_tensors
        return grad_PD[slots_R], None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, slots_R: Tensor) -> Tensor:
        ctx.save_for_backward(slots_R)
        ctx.num_slots = x_PD.shape[0]
        return x_PD[slots_R]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        (slots_R,) = ctx.saved_tensors
        grad_PD = grad_RD.new_zeros(ctx.num_slots, grad_RD.shape[1])
        return grad_PD.index_copy_(0, slots_R, grad_RD), None
