"""Collectives that autograd understands. All of them send contiguous tensors; none is compiled.

Each is a linear map of the inputs of all ranks, and its backward pass is the transposed map: it
sends each rank the gradient of every rank's loss by that rank's input.

B batch, S sequence, s = S/n part of one of n ranks, D model, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.recompute import keep
from deepseek.ops.fp8_linear import pack_tiles, unpack_tiles
from deepseek.parallel import cpu_memory, overlap


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
        weights_R: one or some (R, K) for each row; as wide as the rows' numbers, or a multiple: the
            bits travel as numbers of rows.
        meanwhile: computes something else.
        fp8: rows travel in it, and arrive as what it has left of them; their gradients do not.
        passed_on: what arrives is exchanged once more, and nothing else is done with it: where a
            recomputation keeps rows, it keeps those, and has zeros for these.

    Returns:
        (sum(receive_counts), D) and the weights beside them, by source rank; what it has computed.
    """
    form = _Form(x_RD.shape[1], x_RD.dtype, weights_R.shape[1:], weights_R.dtype)
    trip = _Trip(send_counts, receive_counts, group, passed_on)
    begun = _Depart.apply(x_RD, weights_R, trip, form, form._replace(fp8=fp8))
    computed = meanwhile()
    return *_Arrive.apply(begun, trip, form, form._replace(fp8=fp8)), computed


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

    def begin(self, packed: Tensor, back: bool = False) -> Tensor:
        """A tensor of nothing, by which autograd knows the order."""
        send, receive = reversed(self.counts) if back else self.counts
        start = partial(_UnderWay, packed, send, receive, self.group)
        self.under_way = start() if back else keep(start, rows=True)
        return packed.new_empty(0, dtype=torch.float32)  # one that has a gradient

    def end(self) -> Tensor:
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
        self, packed: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> None:
        self.arrived = packed.new_empty(sum(receive), packed.shape[1])
        self._sent: Tensor | None = packed
        self._work = dist.all_to_all_single(
            self.arrived, packed, receive, send, group=group, async_op=True
        )

    def wait(self) -> Tensor:
        """What has arrived; in a recomputation that keeps it, at once."""
        if self._sent is not None:
            overlap.pause()
            self._work.wait()
            self._sent = self._work = None
        return self.arrived

    def forget(self) -> None:
        """What has arrived, but for its shape."""
        self.arrived = self.arrived.new_zeros(1).expand_as(self.arrived)


class _Depart(torch.autograd.Function):
    """Begins the exchange of rows; its backward pass ends that of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weights_R: Tensor, trip: _Trip, wide: _Form, form: _Form
    ) -> Tensor:
        ctx.trip, ctx.wide = trip, wide
        return trip.begin(form.pack(x_RD, weights_R))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        return *ctx.wide.unpack(ctx.trip.end()), None, None, None


class _Arrive(torch.autograd.Function):
    """Ends the exchange of rows; its backward pass begins that of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, begun: Tensor, trip: _Trip, wide: _Form, form: _Form
    ) -> tuple[Tensor, Tensor]:
        ctx.trip, ctx.wide = trip, wide
        return form.unpack(trip.end())

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor, grad_R: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.trip.begin(ctx.wide.pack(grad_RD, grad_R), back=True), None, None, None


class _Form(NamedTuple):
    """How rows and their weights travel: each row with the bits of its weights behind it."""

    dim: int
    dtype: torch.dtype
    """Of rows."""
    weights: torch.Size
    """Of one row: none, or how many."""
    weights_dtype: torch.dtype
    fp8: bool = False

    def pack(self, x_RD: Tensor, weights_R: Tensor) -> Tensor:
        """One tensor, (R, columns)."""
        rows = pack_tiles(x_RD) if self.fp8 else x_RD
        bits = weights_R.reshape(len(rows), self.weights.numel()).contiguous().view(rows.dtype)
        return torch.cat((rows, bits), dim=1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weights; the rows as a view, unless they came in FP8."""
        width = self.weights.numel() * self.weights_dtype.itemsize // packed.dtype.itemsize
        rows, bits = packed.split([packed.shape[1] - width, width], dim=1)
        weights = bits.contiguous().view(self.weights_dtype).reshape(len(packed), *self.weights)
        return unpack_tiles(rows, self.dim, self.dtype) if self.fp8 else rows, weights


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
    out_RD = x_RD.new_empty(sum(receive_counts), *x_RD.shape[1:])
    sent, beside = x_RD.contiguous(), overlap.are_in_turn()
    work = dist.all_to_all_single(
        out_RD, sent, receive_counts, send_counts, group=group, async_op=beside
    )
    if beside:
        overlap.pause()
        work.wait()
    return out_RD
