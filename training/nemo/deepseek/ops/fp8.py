"""Weights stored in FP8 with one scale per block, as in the released DeepSeek-V3 checkpoints.

A weight is its 8-bit number times the scale of its block (arXiv:2412.19437 section 3.3.2; the
scales are called ``weight_scale_inv`` although they are factors). Blocks at the lower and the right
edge may be smaller.

I rows, J columns, P blocks down, Q blocks across.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantise_blocks(
    weight_IJ: Tensor, scale_PQ: Tensor, block: tuple[int, int] = (128, 128)
) -> Tensor:
    """The fp32 weights (I, J): each product is rounded once, to fp32.

    Args:
        weight_IJ: FP8 numbers (e4m3 or e5m2).
        scale_PQ: scales; fp32, or powers of two as exponents (``float8_e8m0fnu``).
        block: rows and columns that share a scale.

    Raises:
        ValueError: the scales are not one per block.
    """
    rows, columns = block
    _check(weight_IJ, scale_PQ, block)
    out_IJ = weight_IJ.to(torch.float32)
    scale_PJ = scale_PQ.to(torch.float32).repeat_interleave(columns, dim=1)[:, : out_IJ.shape[1]]
    # By rows of blocks: scales for the whole matrix would be another matrix.
    for rows_BJ, scale_J in zip(out_IJ.split(rows), scale_PJ, strict=True):
        rows_BJ.mul_(scale_J)
    return out_IJ


def dequantise_blocks_plainly(
    weight_IJ: Tensor, scale_PQ: Tensor, block: tuple[int, int] = (128, 128)
) -> Tensor:
    """The slow twin of ``dequantise_blocks``: block by block, as the definition reads."""
    rows, columns = block
    _check(weight_IJ, scale_PQ, block)
    out_IJ = torch.empty(weight_IJ.shape, dtype=torch.float32)
    for p in range(scale_PQ.shape[0]):
        for q in range(scale_PQ.shape[1]):
            place = (
                slice(p * rows, (p + 1) * rows),
                slice(q * columns, (q + 1) * columns),
            )
            out_IJ[place] = weight_IJ[place].to(torch.float32) * scale_PQ[p, q].to(torch.float32)
    return out_IJ


def block_counts(shape: tuple[int, int], block: tuple[int, int] = (128, 128)) -> tuple[int, int]:
    """Blocks down and across a matrix of ``shape``: the shape of its scales."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _check(weight_IJ: Tensor, scale_PQ: Tensor, block: tuple[int, int]) -> None:
    wanted = block_counts((weight_IJ.shape[0], weight_IJ.shape[1]), block)
    if tuple(scale_PQ.shape) != wanted:
        raise ValueError(
            f"weights {tuple(weight_IJ.shape)} in blocks of {block} need scales {wanted}, "
            f"got {tuple(scale_PQ.shape)}"
        )
