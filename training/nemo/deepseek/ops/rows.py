"""Rows on their way to experts: sorted, padded where products ask for it, and brought back.

Autograd's own backward of ``x[index]`` scatters with atomic adds, whose order (and so whose last
bit) depends on the threads. A permutation needs no scatter: its backward is the inverse gather.

A matrix product over 3 rows takes another path through the kernel than one over 300, and the same
row then differs in its last bits. With every expert's rows padded to a multiple of ``ALIGNMENT``, a
token's result depends on the token alone: a change in one document leaves another's bitwise as it
was. (Found so on CPUs for bf16, for fp32 with dims that are a multiple of 4, and for fp64 on one
thread; libraries promise it nowhere. Our own kernels do, and take rows as they come:
``takes_any_counts``.) An expert without rows gets a block of zeros too: on Blackwell, the
weight gradient of an empty group of a grouped product is whatever the memory held
(github.com/pytorch/pytorch/issues/172439). Only where no gradient is asked for, on a CPU, are such
experts left out: a token that is decoded then reads the weights of its own K alone.

Nothing here waits for the device: sizes come from shapes, or from bounds on what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.activations import ROW_ALIGNMENT
from deepseek.ops.native.build import kernel

ALIGNMENT = ROW_ALIGNMENT
"""Every expert's row count becomes a multiple of this, and none is 0."""


BLOCK_NUMBERS = 1 << 19
"""Of a tensor in one block of rows, about, on a CPU: what stays in the caches meanwhile."""


def as_rows(x: Tensor) -> Tensor:
    """(..., F) -> (R, F)."""
    return x.unsqueeze(0).flatten(0, -2)


def row_step(x: Tensor) -> int | None:
    """Numbers from a row of ``x`` (..., F) to the next; None if they are not evenly apart, or the
    numbers of a row not side by side."""
    if x.is_contiguous():
        return x.shape[-1]
    *strides, last = x.stride()
    if last != 1:
        return None
    expected = strides[-1]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(strides), strict=True):
        if stride != expected:
            return None
        expected *= size
    return strides[-1]


def row_blocks(x_RF: Tensor) -> Iterator[slice]:
    """Rows that are computed with at one time: on a CPU few, elsewhere all."""
    rows, width = x_RF.shape
    size = max(1, BLOCK_NUMBERS // max(width, 1) if x_RF.is_cpu else rows)
    return (slice(start, start + size) for start in range(0, rows, size))


def sort_by_expert(expert_ids_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable sort: its order and the inverse (R,), and how many rows each expert gets (E,); all
    int64."""
    if run := kernel("sort_rows", "ppppnn", expert_ids_R):
        order_R, inverse_R = torch.empty_like(expert_ids_R), torch.empty_like(expert_ids_R)
        counts_E = expert_ids_R.new_empty(num_experts)
        run(order_R, inverse_R, counts_E, expert_ids_R, len(order_R), num_experts)
        return order_R, inverse_R, counts_E
    order_R = expert_ids_R.argsort(stable=True)
    return order_R, inverse_permutation(order_R), count_rows(expert_ids_R, num_experts)


def inverse_permutation(order_R: Tensor) -> Tensor:
    """``inverse[order[i]] = i``; int64 (R,)."""
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return inverse_R


def permute_rows(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Row ``i`` of the result is row ``order[i]`` of ``x``; ``order`` is a permutation."""
    return _PermuteRows.apply(x_RD, order_R, inverse_R)


Room = Callable[[Sequence[int]], Tensor | None]
"""From the sizes of a tensor to memory for it; None: it needs its own."""


def expand_rows(
    x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, room: Room | None = None
) -> Tensor:
    """Repeat each row K = R/T times (row-major), then permute: row ``i`` is ``x[order[i] // K]``.

    The backward pass adds each token's K gradients in the order of its choices.

    Args:
        x_TD: rows.
        order_R: of the K T rows.
        inverse_R: of the order.
        room: where a kernel lays the result.
    """
    return _ExpandRows.apply(x_TD, order_R, inverse_R, room)


def expand_rows_slow(x_TD: Tensor, order_R: Tensor) -> Tensor:
    """Reference implementation of ``expand_rows``."""
    num_choices = order_R.numel() // max(x_TD.shape[0], 1)
    return x_TD.repeat_interleave(num_choices, dim=0)[order_R]


def combine_rows(y_RD: Tensor, order_R: Tensor, inverse_R: Tensor, num_choices: int) -> Tensor:
    """The way back from ``expand_rows``: the sum of each token's K rows, (R, D) -> (T, D).

    Added in the order of the choices; bf16 in fp32, and rounded once, to the nearest.
    """
    return _CombineRows.apply(y_RD, order_R, inverse_R, num_choices)


def combine_rows_slow(y_RD: Tensor, inverse_R: Tensor, num_choices: int) -> Tensor:
    """Reference implementation of ``combine_rows``."""
    return y_RD.index_select(0, inverse_R).unflatten(0, (-1, num_choices)).sum(dim=1)


def count_rows(expert_ids_R: Tensor, num_experts: int) -> Tensor:
    """How many rows each expert gets, int64 (E,)."""
    counts_E = expert_ids_R.new_zeros(num_experts)
    # not bincount: on CUDA it waits for the device
    return counts_E.scatter_add_(0, expert_ids_R, torch.ones_like(expert_ids_R))


def row_starts(counts_E: Tensor, num_rows: int) -> Tensor:
    """Where each expert's rows begin, and where the last one's end, int64 (E + 1,): none of them
    beyond ``num_rows``. By a kernel, for kernels."""
    starts = counts_E.new_empty(len(counts_E) + 1)
    run = kernel("row_starts", "ppnn", counts_E)
    assert run is not None, "asked before"
    run(starts, counts_E.contiguous(), len(counts_E), num_rows)
    return starts


def aligned_slots(
    counts_e: Tensor, num_rows: int, skip_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Padded counts (e,), and the slot of each row among the padded ones (R,), both int64.

    Args:
        counts_e: int64 rows per expert.
        num_rows: R, their sum.
        skip_empty: an expert without rows gets none: its weights are not read.
    """
    least_rows = 0 if skip_empty else 1
    if run := kernel("align_rows", "pppnnnn", counts_e):
        padded_e, slots_R = torch.empty_like(counts_e), counts_e.new_zeros(num_rows)
        run(
            padded_e, slots_R, counts_e.contiguous(), num_rows, len(counts_e), ALIGNMENT, least_rows
        )
        return padded_e, slots_R
    padded_e = (counts_e.clamp(min=least_rows) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    added_e = padded_e - counts_e
    shift_e = added_e.cumsum(0) - added_e
    shift_R = shift_e.repeat_interleave(counts_e, output_size=num_rows)
    return padded_e, torch.arange(num_rows, device=counts_e.device) + shift_R


def most_slots(num_rows: int, num_experts: int, skip_empty: bool = False) -> int:
    """P, the most slots that so many rows can need, whatever their counts: known without them."""
    if skip_empty:
        num_experts = min(num_experts, num_rows)
    return (num_experts + max(num_rows - 1, 0) // ALIGNMENT) * ALIGNMENT


def spread_rows(x_RD: Tensor, slots_R: Tensor, num_slots: int) -> Tensor:
    """Rows to their slots, zeros elsewhere: (R, D) -> (P, D)."""
    return _SpreadRows.apply(x_RD, slots_R, num_slots)


def gather_rows(x_PD: Tensor, slots_R: Tensor) -> Tensor:
    """Rows back from their slots: (P, D) -> (R, D)."""
    return _GatherRows.apply(x_PD, slots_R)


def take_rows(x_TD: Tensor, index_R: Tensor, slots_TK: Tensor) -> Tensor:
    """Row ``i`` of the result is row ``index[i]`` of ``x``; a row may be taken several times.

    Args:
        x_TD: rows.
        index_R: which.
        slots_TK: where each row has gone, up to K places; R for none.
    """
    return _TakeRows.apply(x_TD, index_R, slots_TK)


def add_rows(y_RD: Tensor, slots_TK: Tensor, index_R: Tensor) -> Tensor:
    """Sum of the rows at each of T places, the transpose of ``take_rows``; arguments as there."""
    return _AddRows.apply(y_RD, slots_TK, index_R)


def _added(y_RD: Tensor, slots_TK: Tensor) -> Tensor:
    padded_RD = torch.cat((y_RD, y_RD.new_zeros(1, y_RD.shape[1])))
    rows_TKD = padded_RD.index_select(0, slots_TK.flatten()).unflatten(0, slots_TK.shape)
    return rows_TKD.sum(dim=1)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, index_R: Tensor, slots_TK: Tensor) -> Tensor:
        ctx.slots_TK = slots_TK
        return x_TD.index_select(0, index_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return _added(grad_RD, ctx.slots_TK), None, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, slots_TK: Tensor, index_R: Tensor) -> Tensor:
        ctx.index_R = index_R
        return _added(y_RD, slots_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return grad_TD.index_select(0, ctx.index_R), None, None


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.inverse_R = inverse_R  # not saved: nothing is recomputed for it
        return taken(x_RD, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return taken(grad_RD, ctx.inverse_R), None, None


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, room: Room | None
    ) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.num_choices = inverse_R.numel() // max(x_TD.shape[0], 1)  # there may be no token
        return taken(x_TD, order_R, ctx.num_choices, room)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return summed(grad_RD, inverse_R, ctx.num_choices), None, None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor, num_choices: int
    ) -> Tensor:
        ctx.order_R, ctx.num_choices = order_R, num_choices  # not saved, as with _PermuteRows
        return summed(y_RD, inverse_R, num_choices)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        return taken(grad_TD, ctx.order_R, ctx.num_choices), None, None, None


def taken(x_TD: Tensor, index_R: Tensor, copies: int = 1, room: Room | None = None) -> Tensor:
    """Rows ``index // copies``, of one dim or two."""
    if x_TD.is_floating_point() and (run := kernel("take_rows", "pppnnnn", x_TD, index_R)):
        sizes, width = (len(index_R), *x_TD.shape[1:]), math.prod(x_TD.shape[1:])
        lent = room(sizes) if room is not None else None
        y_RD = x_TD.new_empty(sizes) if lent is None else lent
        threads = torch.get_num_threads()
        run(y_RD, x_TD.contiguous(), index_R, len(index_R), width, copies, threads)
        return y_RD
    if copies > 1:
        index_R = torch.div(index_R, copies, rounding_mode="floor")
    return x_TD.index_select(0, index_R)


def summed(
    x_RD: Tensor,
    inverse_R: Tensor,
    num_choices: int,
    one_TD: Tensor | None = None,
    two: Tensor | None = None,
) -> Tensor:
    """Sum of each token's rows, and then of ``one`` and ``two``, both contiguous; (T, D), or the
    shape of ``two``.

    On a CPU in one pass, which gathers and adds: by operators as the bags of an embedding.
    """
    if not num_choices:  # there is no token
        return x_RD[:0]
    if run := kernel("add_rows", "pppppnnnn", x_RD, inverse_R):
        tokens, width = len(inverse_R) // num_choices, x_RD.shape[1]
        y = x_RD.new_empty(tokens, width) if two is None else torch.empty_like(two)
        given = x_RD.contiguous(), inverse_R, one_TD, two
        run(y, *given, tokens, num_choices, width, torch.get_num_threads())
        return y
    if x_RD.is_cpu and x_RD.numel() and not torch.compiler.is_compiling():
        y = F.embedding_bag(inverse_R.view(-1, num_choices), x_RD.contiguous(), mode="sum")
    else:
        y = combine_rows_slow(x_RD, inverse_R, num_choices)
    y = y if one_TD is None else y + one_TD
    return y if two is None else y.view_as(two) + two


class _SpreadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, slots_R: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots_R)
        return _in_slots(x_RD, slots_R, num_slots)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (slots_R,) = ctx.saved_tensors
        return taken(grad_PD, slots_R), None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, slots_R: Tensor) -> Tensor:
        ctx.slots_R, ctx.num_slots = slots_R, x_PD.shape[0]
        return taken(x_PD, slots_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _in_slots(grad_RD, ctx.slots_R, ctx.num_slots), None


def _in_slots(x_RD: Tensor, slots_R: Tensor, num_slots: int) -> Tensor:
    """Zeros where no row goes; on a CPU, whose memory is slow, they alone are filled in."""
    if run := kernel("spread_rows", "pppnnnn", x_RD, slots_R):
        rows, width = x_RD.shape
        x_PD, threads = x_RD.new_empty(num_slots, width), torch.get_num_threads()
        run(x_PD, x_RD.contiguous(), slots_R, rows, num_slots, width, threads)
        return x_PD
    if not x_RD.is_cpu or torch.compiler.is_compiling():
        return x_RD.new_zeros(num_slots, x_RD.shape[1]).index_copy_(0, slots_R, x_RD)
    empty_P = torch.ones(num_slots, dtype=torch.bool).index_fill_(0, slots_R, False)
    x_PD = x_RD.new_empty(num_slots, x_RD.shape[1]).index_copy_(0, slots_R, x_RD)
    gaps = torch.nonzero_static(empty_P, size=num_slots - x_RD.shape[0]).squeeze(1)
    return x_PD.index_fill_(0, gaps, 0)
