"""Collectives that autograd understands. All of them send contiguous tensors.

B batch, S sequence, s = S/tp local part of the sequence, D model, R rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_sequence(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, S/n, D) -> (B, S, D) on every rank; the backward pass sums and scatters."""
    return _GatherSequence.apply(x_BsD, group)


def scatter_sequence_sum(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums (B, S, D) -> this rank's part of their sum (B, S/n, D)."""
    return _ScatterSequenceSum.apply(x_BSD, group)


def sum_forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group; the gradient goes back to each rank's own part unchanged.

    For a loss that every rank computes alike from the sum, and that counts once.
    """
    return _SumForward.apply(x, group)


def all_to_all_rows(
    x_RD: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send consecutive blocks of rows to the ranks of the group; blocks may be empty."""
    return _AllToAllRows.apply(x_RD, send_counts, receive_counts, group)


def _gather(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    parts = x_BsD.new_empty(size, *x_BsD.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x_BsD.contiguous(), group=group)
    return parts.transpose(0, 1).flatten(1, 2).contiguous()  # (n, B, s, D) -> (B, n*s, D)


def _scatter_sum(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    parts = x_BSD.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # (n, B, s, D)
    out_BsD = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(out_BsD, parts.flatten(0, 1), group=group)
    return out_BsD


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x_BsD, group)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(grad_BSD, ctx.group), None


class _ScatterSequenceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_sum(x_BSD, group)

    @staticmethod
    def backward(ctx: Any, grad_BsD: Tensor) -> tuple[Tensor, None]:
        return _gather(grad_BsD, ctx.group), None


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        send_counts: list[int],
        receive_counts: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.counts = (send_counts, receive_counts)
        ctx.group = group
        return _exchange(x_RD, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        send_counts, receive_counts = ctx.counts
        return _exchange(grad_RD, receive_counts, send_counts, ctx.group), None, None, None


def _exchange(
    x_RD: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    out_RD = x_RD.new_empty(sum(receive_counts), *x_RD.shape[1:])
    dist.all_to_all_single(out_RD, x_RD.contiguous(), receive_counts, send_counts, group=group)
    return out_RD
