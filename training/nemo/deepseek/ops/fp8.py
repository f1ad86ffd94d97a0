"""Weights stored in FP8 with one scale per block, as in the released DeepSeek-V3 checkpoints.

A weight is its 8-bit number times the scale of its block (arXiv:2412.19437 section 3.3.2; the
scales are called ``weight_scale_inv`` although they are factors). Blocks at the lower and the right
edge may be smaller.

I rows, J columns, P blocks down, Q blocks across, N numbers of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
"""Numbers of a quantised weight: 4 bits of exponent, 3 of mantissa."""
_TOPS = (448, 416, 384, 352, 320, 288, 256, 240)
"""Largest numbers that a block can be given, by doubling all of it while FP8 has room."""
_SAMPLE = 256
"""Numbers of a block that rule out most scales."""
_PIECE = 1 << 16
"""Numbers that are widened at a time: their places in the table stay in the caches."""


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
    out_IJ = widened(weight_IJ, torch.float32)
    scale_PJ = scale_PQ.to(torch.float32).repeat_interleave(columns, dim=1)[:, : out_IJ.shape[1]]
    # By rows of blocks: scales for the whole matrix would be another matrix.
    for rows_BJ, scale_J in zip(out_IJ.split(rows), scale_PJ, strict=True):
        rows_BJ.mul_(scale_J)
    return out_IJ


def dequantise_blocks_plainly(
    weight_IJ: Tensor, scale_PQ: Tensor, block: tuple[int, int] = (128, 128)
) -> Tensor:
    """Reference implementation of ``dequantise_blocks``, as the definition reads."""
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


def quantise_blocks(
    weight_IJ: Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """FP8 numbers (I, J) and fp32 scales (P, Q), of which ``dequantise_blocks`` makes the weights.

    The largest number of a block becomes 448, the largest of e4m3, and the others are rounded to
    nearest. A block that came from e4m3 numbers, whatever their scale was, is told by a scale that
    loses nothing, and gets it: its weights come back bit by bit.

    Args:
        weight_IJ: finite fp32.
        block: rows and columns that share a scale.
    """
    rows, columns = block
    numbers, scales = [], []
    for rows_BJ in weight_IJ.split(rows):
        padded_BJ = F.pad(rows_BJ, (0, -rows_BJ.shape[1] % columns))
        blocks_QN = padded_BJ.unflatten(1, (-1, columns)).transpose(0, 1).flatten(1)
        scale_Q = _scales(blocks_QN)
        numbers_QN = (blocks_QN / scale_Q.unsqueeze(1)).to(E4M3)
        numbers_BQC = numbers_QN.unflatten(1, (-1, columns)).transpose(0, 1)
        numbers.append(numbers_BQC.flatten(1)[:, : weight_IJ.shape[1]])
        scales.append(scale_Q)
    return torch.cat(numbers), torch.stack(scales)


def quantise_blocks_plainly(
    weight_IJ: Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """Reference implementation of ``quantise_blocks``: every scale is tried on a whole block."""
    rows, columns = block
    numbers_IJ = torch.empty(weight_IJ.shape, dtype=E4M3)
    scale_PQ = torch.empty(block_counts((weight_IJ.shape[0], weight_IJ.shape[1]), block))
    for p in range(scale_PQ.shape[0]):
        for q in range(scale_PQ.shape[1]):
            place = (
                slice(p * rows, (p + 1) * rows),
                slice(q * columns, (q + 1) * columns),
            )
            part = weight_IJ[place]
            largest = part.abs().max()
            tried = [scale for scale in _candidates(largest) if _keeps(part[None], scale[None])]
            scale_PQ[p, q] = tried[0] if largest > 0 and tried else _usual(largest)
            numbers_IJ[place] = (part / scale_PQ[p, q]).to(E4M3)
    return numbers_IJ, scale_PQ


def _scales(blocks_QN: Tensor) -> Tensor:
    """One for each block."""
    largest_Q = blocks_QN.abs().amax(dim=1)
    scale_Q = _usual(largest_Q)
    left = largest_Q.nonzero().flatten()  # blocks that no scale has been found to keep
    for candidate_Q in _candidates(largest_Q):
        some = left[_keeps(blocks_QN[left, :_SAMPLE], candidate_Q[left])]
        kept = some[_keeps(blocks_QN[some], candidate_Q[some])]
        scale_Q[kept] = candidate_Q[kept]
        left = left[~torch.isin(left, kept)]
    return scale_Q


def _usual(largest: Tensor) -> Tensor:
    """Scales of blocks with these largest numbers; 1 for zeros alone."""
    scale = (largest / _TOPS[0]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def _candidates(largest: Tensor) -> Iterator[Tensor]:
    """Every scale of which a product with an e4m3 number may have been rounded to ``largest``."""
    for top in _TOPS:
        scale = largest / top
        yield scale
        for end in (torch.inf, 0.0):
            yield torch.nextafter(scale, torch.full_like(scale, end))


def _keeps(blocks: Tensor, scale_Q: Tensor) -> Tensor:
    """Which blocks (Q, ...) a scale each brings back bit by bit."""
    scale = scale_Q.reshape(-1, *[1] * (blocks.dim() - 1))
    back = (blocks / scale).to(E4M3).float() * scale
    return (back == blocks).flatten(1).all(dim=1)


def widened(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 numbers in a wider dtype, exactly.

    A CPU's own cast takes them one by one, 4.9 ns each; looked up they take 0.7 ns.
    """
    if numbers.device.type != "cpu" or torch.compiler.is_compiling():
        return numbers.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(numbers.dtype).to(dtype)
    wide = torch.empty(numbers.shape, dtype=dtype)
    bytes_N = numbers.view(torch.uint8).flatten()
    for piece, place in zip(bytes_N.split(_PIECE), wide.view(-1).split(_PIECE), strict=True):
        torch.index_select(table, 0, piece.to(torch.int32), out=place)
    return wide


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
