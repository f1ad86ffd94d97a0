"""Collectives that autograd understands. All of them send contiguous tensors; none is compiled.

Each is a linear map of the inputs of all ranks, and its backward pass is the transposed map: it
sends each rank the gradient of every rank's loss by that rank's input.

B batch, S sequence, s = S/n part of one of n ranks, D model, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.recompute import keep
from deepseek.parallel import cpu_memory


@torch.compiler.disable
def gather_sequence(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, S/n, D) -> (B, S, D) on every rank; the backward pass sums and scatters."""
    return LinearMap.apply(x_BsD, partial(_gather, group=group), partial(_scatter_sum, group=group))


@torch.compiler.disable
def scatter_sequence_sum(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums (B, S, D) -> this rank's part of their sum (B, S/n, D); n divides S."""
    return LinearMap.apply(x_BSD, partial(_scatter_sum, group=group), partial(_gather, group=group))


@torch.compiler.disable
def sum_forward(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group; the gradient goes back to each rank's own part unchanged.

    For a loss that every rank computes alike from the sum, and that counts once.
    """
    return LinearMap.apply(x, partial(_sum, group=group), lambda grad: grad)


@torch.compiler.disable
def all_to_all_rows(
    x_RD: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Send consecutive blocks of rows to the ranks of the group; blocks may be empty.

    Args:
        x_RD: R = sum(send_counts).
        send_counts: rows for each rank of the group.
        receive_counts: rows from each rank; what they send to this one.

    Returns:
        (sum(receive_counts), D), by source rank.
    """
    return LinearMap.apply(x_RD, *_both_ways(send_counts, receive_counts, group))


@torch.compiler.disable
def all_to_all_weighted_rows(
    x_RD: Tensor,
    weights_R: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """``all_to_all_rows`` with a number beside each row, in one exchange.

    Args:
        x_RD: R = sum(send_counts).
        weights_R: as wide as the rows' numbers, or a multiple: the bits travel as numbers of rows.

    Returns:
        (sum(receive_counts), D) and (sum(receive_counts),), by source rank.
    """
    return _WeightedRows.apply(x_RD, weights_R, *_both_ways(send_counts, receive_counts, group))


class _WeightedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_R: Tensor,
        there: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        ctx.back = back
        arrived = keep(lambda: there(_packed(x_RD, weights_R)), rows=True)
        return _unpacked(arrived, weights_R.dtype)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor, grad_R: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_unpacked(ctx.back(_packed(grad_RD, grad_R)), grad_R.dtype), None, None


def _packed(x_RD: Tensor, weights_R: Tensor) -> Tensor:
    """Each row with the bits of its weight behind it."""
    return torch.cat((x_RD, weights_R.unsqueeze(1).contiguous().view(x_RD.dtype)), dim=1)


def _unpacked(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and weights that were packed; the rows as a view."""
    columns = packed.shape[1] - dtype.itemsize // packed.dtype.itemsize
    return packed[:, :columns], packed[:, columns:].contiguous().view(dtype).squeeze(1)


class LinearMap(torch.autograd.Function):
    """``apply(x, map, transpose)``: the map of ``x``, and its transpose for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, map_: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.transpose = transpose
        return map_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grad), None, None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gather(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts_nBsD = x_BsD.new_empty(dist.get_world_size(group), *x_BsD.shape)
    cpu_memory.all_gather(parts_nBsD, x_BsD.contiguous(), group)
    return parts_nBsD.transpose(0, 1).flatten(1, 2).contiguous()


def _scatter_sum(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts_BnsD = x_BSD.unflatten(1, (dist.get_world_size(group), -1))
    parts_nBsD = parts_BnsD.transpose(0, 1).contiguous()
    out_BsD = parts_nBsD.new_empty(parts_nBsD.shape[1:])
    cpu_memory.reduce_scatter(out_BsD, parts_nBsD, group)
    return out_BsD


def _both_ways(
    send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Rows there and, transposed, back."""
    there = partial(_exchange, send_counts=send_counts, receive_counts=receive_counts, group=group)
    back = partial(_exchange, send_counts=receive_counts, receive_counts=send_counts, group=group)
    return there, back


def _exchange(
    x_RD: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
) -> Tensor:
    out_RD = x_RD.new_empty(sum(receive_counts), *x_RD.shape[1:])
    dist.all_to_all_single(out_RD, x_RD.contiguous(), receive_counts, send_counts, group=group)
    return out_RD
