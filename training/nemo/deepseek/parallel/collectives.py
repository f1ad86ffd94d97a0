"""Collectives that autograd understands. All of them send contiguous tensors; none is compiled.

Each is a linear map of the inputs of all ranks, and its backward pass is the transposed map: it
sends each rank the gradient of every rank's loss by that rank's input.

B batch, S sequence, s = S/n part of one of n ranks, D model, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.recompute import keep
from deepseek.ops.fp8_linear import pack_tiles, unpack_tiles
from deepseek.parallel import cpu_exchange, cpu_memory, overlap


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
    x_RD: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup,
    fp8: bool = False,
) -> Tensor:
    """Send consecutive blocks of rows to the ranks of the group; blocks may be empty.

    Args:
        x_RD: R = sum(send_counts).
        send_counts: rows for each rank of the group.
        receive_counts: rows from each rank; what they send to this one.
        fp8: gradients go back in it.

    Returns:
        (sum(receive_counts), D), by source rank.
    """
    there, back = _both_ways(send_counts, receive_counts, group)

    def in_fp8(grad_RD: Tensor) -> Tensor:
        return unpack_tiles(back(pack_tiles(grad_RD)), grad_RD.shape[1], grad_RD.dtype)

    return LinearMap.apply(x_RD, there, in_fp8 if fp8 else back)


@torch.compiler.disable
def all_to_all_weighted_rows(
    x_RD: Tensor,
    weights_R: Tensor,
    send_counts: list[int],
    receive_counts: list[int],
    group: dist.ProcessGroup,
    meanwhile: Callable[[], Any] = lambda: None,
    fp8: bool = False,
    passed_on: bool = False,
) -> tuple[Tensor, Tensor, Any]:
    """``all_to_all_rows`` with numbers beside each row, in one exchange.

    It has begun when ``meanwhile`` is called, and is waited for afterwards: NCCL sends on a stream
    of its own. In the backward pass gradients travel beside that of ``meanwhile``.

    Args:
        x_RD: R = sum(send_counts).
        weights_R: one or some (R, K) for each row; as wide as the rows' numbers, or a multiple.
        meanwhile: computes something else.
        fp8: rows travel in it, and arrive as what it has left of them; their gradients do not.
        passed_on: what arrives is exchanged once more, and nothing else is done with it: where a
            recomputation keeps rows, it keeps those, and has zeros for these.

    Returns:
        (sum(receive_counts), D) and the weights beside them, by source rank; what it has computed.
    """
    trip = _Trip(send_counts, receive_counts, group, passed_on)
    begun = _Depart.apply(x_RD, weights_R, trip, fp8)
    computed = meanwhile()
    return *_Arrive.apply(begun, trip, x_RD.shape[1], x_RD.dtype, fp8), computed


class _Trip:
    """Rows under way, or their gradients in the other direction.

    Attributes:
        under_way: of the pass that runs.
    """

    def __init__(
        self,
        send_counts: list[int],
        receive_counts: list[int],
        group: dist.ProcessGroup,
        passed_on: bool,
    ) -> None:
        self.counts, self.group, self.passed_on = (send_counts, receive_counts), group, passed_on
        self.under_way: _UnderWay | None = None

    def begin(self, *input: Tensor, back: bool = False) -> Tensor:
        """A tensor of nothing, by which autograd knows the order."""
        send, receive = reversed(self.counts) if back else self.counts
        start = partial(_UnderWay, input, send, receive, self.group)
        self.under_way = start() if back else keep(start, rows=True)
        return input[0].new_empty(0, dtype=torch.float32)  # one that has a gradient

    def end(self) -> list[Tensor]:
        """What has arrived."""
        assert self.under_way is not None
        under_way, self.under_way = self.under_way, None
        arrived = under_way.wait()
        if self.passed_on:
            under_way.forget()
        return arrived


class _UnderWay:
    """One exchange that has begun."""

    def __init__(
        self,
        input: Sequence[Tensor],
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
    ) -> None:
        sent = [x.contiguous() for x in input]
        self.arrived: list[Tensor] = []
        self._exchange: Any = cpu_exchange.all_to_all(sent, receive, send, group)

    def wait(self) -> list[Tensor]:
        """What has arrived; in a recomputation that keeps it, at once."""
        if self._exchange is not None:
            overlap.pause()
            self.arrived = self._exchange.wait()
            self._exchange = None
        return [x.detach() for x in self.arrived]  # autograd marks what its functions give

    def forget(self) -> None:
        """What has arrived, but for its shape."""
        self.arrived = [x.new_zeros(1).expand_as(x) for x in self.arrived]


class _Depart(torch.autograd.Function):
    """Begins the exchange of rows; its backward pass ends that of their gradients."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weights_R: Tensor, trip: _Trip, fp8: bool) -> Tensor:
        ctx.trip = trip
        return trip.begin(pack_tiles(x_RD) if fp8 else x_RD, weights_R)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_RD, grad_R = ctx.trip.end()
        return grad_RD, grad_R, None, None


class _Arrive(torch.autograd.Function):
    """Ends the exchange of rows; its backward pass begins that of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, begun: Tensor, trip: _Trip, dim: int, dtype: torch.dtype, fp8: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        x_QD, weights_Q = trip.end()
        return unpack_tiles(x_QD, dim, dtype) if fp8 else x_QD, weights_Q

    @staticmethod
    def backward(
        ctx: Any, grad_QD: Tensor, grad_Q: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        return ctx.trip.begin(grad_QD, grad_Q, back=True), None, None, None, None


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
    # By way of rows, since a single sequence would keep the stride of one part: by such, torch
    # multiplies in batches, and a recomputation would not know the product for one to keep.
    rows_RD = parts_nBsD.transpose(0, 1).flatten(0, 2)
    return rows_RD.unflatten(0, (x_BsD.shape[0], -1))


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
    exchange = cpu_exchange.all_to_all([x_RD.contiguous()], receive_counts, send_counts, group)
    overlap.pause()
    (out_RD,) = exchange.wait()
    return out_RD
