"""Sums of squares of many tensors at once, most of them small: on a CPU one kernel
(``native/squares.c``)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.ops.native.addresses import addresses
from deepseek.ops.native.build import kernel
from deepseek.ops.noted_squares import noted_squares

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
    sums = torch.zeros(len(groups), dtype=torch.float64)
    parts: list[tuple[int, Tensor, int]] = []
    for kind, group in enumerate(groups):
        for x, divisor in group:
            squares = noted_squares(x)
            if squares is None:
                parts.append((kind, x, divisor))
            else:
                sums[kind] += squares / divisor
    # Without tensors nothing tells the kernel that they would lie on a GPU.
    if any(groups) and (not parts or _add_squares(sums, parts)):
        return sums
    return square_sums_slow(groups, device)


def _add_squares(sums: Tensor, parts: Sequence[tuple[int, Tensor, int]]) -> bool:
    """By the kernel, each to the sum of its group; False: it takes one of them not."""
    run = kernel("sums_of_squares", "pppppppnn")
    table = None if run is None else addresses((x for _, x, _ in parts), torch.float32)
    if run is None or table is None:
        return False
    widths = [max(x.shape[-1], 1) if x.dim() > 1 else 1 for _, x, _ in parts]
    rows = [x.numel() // width for (_, x, _), width in zip(parts, widths, strict=True)]
    kinds, divisors = [kind for kind, *_ in parts], [divisor for *_, divisor in parts]
    room = torch.empty(sum(-(-count // _ROWS) for count in rows), dtype=torch.float64)
    tables = [table, *(array("q", numbers) for numbers in (rows, widths, kinds, divisors))]
    given = [table.buffer_info()[0] for table in tables]
    run(sums, room, *given, len(parts), torch.get_num_threads())
    return True


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
