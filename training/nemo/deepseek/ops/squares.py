"""Sums of squares of many tensors at once, most of them small: on a CPU one kernel
(``native/squares.c``)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.ops.native.build import kernel

_ROWS = 256
"""That the kernel adds up by themselves."""


def square_sums(groups: Sequence[Sequence[tuple[Tensor, int]]], device: torch.device) -> Tensor:
    """The sum of the squares of each group of tensors, fp64 (groups,).

    Row by row, then in fp64: a sum over all of a large matrix in fp32 is off by 1e-4, and a copy in
    fp64 takes twenty times as long.

    Args:
        groups: tensors without gradient, and by what to divide the squares of each.
        device: of the tensors.
    """
    tensors = [tensor for group in groups for tensor, _ in group]
    # Without tensors nothing tells the kernel that they would lie on a GPU.
    run = kernel("sums_of_squares", "pppppnn", *tensors) if tensors else None
    if run is None or not all(x.is_contiguous() and x.is_floating_point() for x in tensors):
        return square_sums_slow(groups, device)
    widths = [max(x.shape[-1], 1) if x.dim() > 1 else 1 for x in tensors]
    rows = [x.numel() // width for x, width in zip(tensors, widths, strict=True)]
    sums, room = (
        torch.empty(size, dtype=torch.float64) for size in (len(tensors), -(-max(rows) // _ROWS))
    )
    tables = [array("q", numbers) for numbers in ([x.data_ptr() for x in tensors], rows, widths)]
    given = [table.buffer_info()[0] for table in tables]
    run(sums, room, *given, len(tensors), torch.get_num_threads())
    parts = sums.split([len(group) for group in groups])
    return torch.stack([_divided(*pair) for pair in zip(parts, groups, strict=True)])


def _divided(sums_N: Tensor, group: Sequence[tuple[Tensor, int]]) -> Tensor:
    if all(divisor == 1 for _, divisor in group):
        return sums_N.sum()
    numbers = zip(sums_N.unbind(), group, strict=True)
    return torch.stack([number / divisor for number, (_, divisor) in numbers]).sum()


def square_sums_slow(
    groups: Sequence[Sequence[tuple[Tensor, int]]], device: torch.device
) -> Tensor:
    """Reference implementation of ``square_sums``."""
    none = torch.zeros(1, dtype=torch.float64, device=device)
    squares = []
    for group in groups:
        norms = [_row_norms(tensor, divisor) for tensor, divisor in group]
        squares.append(torch.cat([none, *norms]).square().sum())
    return torch.stack(squares)


def _row_norms(tensor: Tensor, divisor: int) -> Tensor:
    if tensor.dim() < 2:
        tensor = tensor.double()
    norms_R = torch.linalg.vector_norm(tensor, dim=-1).flatten().double()
    return norms_R / math.sqrt(divisor) if divisor > 1 else norms_R
