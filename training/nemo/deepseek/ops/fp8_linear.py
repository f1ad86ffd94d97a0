"""Products of FP8 numbers, as DeepSeek-V3 was trained (arXiv:2412.19437 section 3.3).

All three products of a linear map take e4m3 numbers on both sides: the forward pass, the gradient
of the input and that of the weight. An activation or gradient has one scale for each 1 x 128 tile
along the dim that a product sums over; a weight one for each 128 x 128 block. What the forward pass
keeps is FP8; for the weight's gradient it is given tiles of 128 tokens of one expert instead.

A scale is a power of two, the least with which no number of its tile overflows (as V3.1's, and
Megatron's by default). So a number times its scale is a bf16 number, and a product of such numbers,
added up in fp32, is that of FP8 kernels, whatever the machine has. Here it is computed so: what FP8
does to training can be seen anywhere, and nothing becomes faster by it. Where ``kernels`` are asked
for, ``fp8_kernels.py`` computes products of linear maps.

R rows, I inputs, O outputs, E experts. A tile at an edge may be smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.weights import FP8_TILE as TILE
from deepseek.config.weights import has_whole_tiles
from deepseek.ops import fp8_kernels
from deepseek.ops.autocast import as_products
from deepseek.ops.fp8 import E4M3, widened
from deepseek.ops.grouped_linear import grouped_linear, grouped_outer

_LARGEST = 448.0


class Tiles(NamedTuple):
    """Numbers in e4m3 and what they are multiplied by."""

    numbers: Tensor
    scales: Tensor
    """Powers of two, one for each 1 x 128 tile, in the dtype that the numbers had."""

    def values(self) -> Tensor:
        """What was rounded; exact in bf16."""
        return widened(self.numbers, self.scales.dtype) * _each(self.scales, self.numbers.shape[1])


class Blocks(NamedTuple):
    """A matrix in e4m3, or a stack of them, and what its numbers are multiplied by."""

    numbers: Tensor
    scales: Tensor
    """Powers of two, one for each 128 x 128 block."""

    def values(self) -> Tensor:
        """What was rounded; exact in bf16."""
        if not self.numbers.is_contiguous() and self.numbers.mT.is_contiguous():
            return Blocks(self.numbers.mT, self.scales.mT).values().mT
        rows, columns = self.numbers.shape[-2:]
        scales = self.scales.repeat_interleave(TILE, dim=-1)[..., :columns]
        scales = scales.repeat_interleave(TILE, dim=-2)[..., :rows, :]
        return widened(self.numbers, scales.dtype) * scales


def fp8_linear(x: Tensor, w_OI: Tensor, kernels: bool = False) -> Tensor:
    """``F.linear(x, w)`` of what e4m3 leaves of both, in the dtype of products.

    Raises:
        UserError: this device has no ``kernels``.
    """
    if kernels:
        fp8_kernels.require_kernels(x.device)
    y_RO = _Product.apply(as_products(x).flatten(0, -2), as_products(w_OI), None, kernels)
    return y_RO.unflatten(0, x.shape[:-1])


def fp8_grouped_linear(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """``grouped_linear`` of what e4m3 leaves of both; arguments and result as there."""
    return _Product.apply(x_RI, w_EOI, counts_E, False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, w: Tensor, counts_E: Tensor | None, kernels: bool
    ) -> Tensor:
        with torch.autocast(x_RI.device.type, enabled=False):
            x = round_rows(x_RI)
            ctx.save_for_backward(*x, w, counts_E)
            ctx.kernels = kernels
            return _product(x, round_blocks(w), counts_E, kernels)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        *x, w, counts_E = ctx.saved_tensors
        needs_x, needs_w, *_ = ctx.needs_input_grad
        grad_x = grad_w = None
        with torch.autocast(grad_RO.device.type, enabled=False):
            if needs_x:
                blocks = Blocks(*(part.mT for part in round_blocks(w)))
                grad_x = _product(round_rows(grad_RO), blocks, counts_E, ctx.kernels)
            if needs_w and counts_E is None:
                sides = round_rows(grad_RO.mT), round_rows(Tiles(*x).values().mT)
                grad_w = _product(*sides, None, ctx.kernels)
            elif needs_w:
                grad_RO = round_columns(grad_RO, counts_E)
                x_RI = round_columns(Tiles(*x).values(), counts_E)
                grad_w = grouped_outer(grad_RO, x_RI, counts_E)
        return grad_x, grad_w, None, None


def _product(x: Tiles, w: Tiles | Blocks, counts_E: Tensor | None, kernels: bool) -> Tensor:
    rows, inner, columns = *x.numbers.shape, w.numbers.shape[-2]
    if kernels and has_whole_tiles(rows, inner, columns):
        return fp8_kernels.product(x.numbers, x.scales, w.numbers, w.scales, x.scales.dtype)
    if counts_E is None:
        return F.linear(x.values(), w.values())
    return grouped_linear(x.values(), w.values(), counts_E)


def round_rows(x_RI: Tensor) -> Tiles:
    """One scale for each 1 x 128 tile of a row."""
    columns = x_RI.shape[1]
    x_RTt = F.pad(x_RI, (0, -columns % TILE)).unflatten(1, (-1, TILE))
    scale_RT = _scales(_largest(x_RTt, dim=2)).squeeze(2)
    return Tiles((x_RI / _each(scale_RT, columns)).to(E4M3), scale_RT)


def pack_tiles(x_RD: Tensor) -> Tensor:
    """Rows as bytes: numbers in e4m3, then the exponent of each tile's scale; (R, D + D/128) uint8.

    53 % of the bytes of bf16 (51 % for wide rows).
    """
    tiles = round_rows(x_RD)
    exponents = tiles.scales.to(torch.float8_e8m0fnu)
    return torch.cat((tiles.numbers.view(torch.uint8), exponents.view(torch.uint8)), dim=1)


def unpack_tiles(packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows (R, D) of packed ones; exact in bf16."""
    numbers, exponents = packed.split([dim, packed.shape[1] - dim], dim=1)
    scales = exponents.contiguous().view(torch.float8_e8m0fnu).to(dtype)
    return Tiles(numbers.contiguous().view(E4M3), scales).values()


def _each(scale_RT: Tensor, columns: int) -> Tensor:
    """The scale of each number, (R, I)."""
    return scale_RT.repeat_interleave(TILE, dim=1)[:, :columns]


def round_blocks(w: Tensor) -> Blocks:
    """One scale for each 128 x 128 block of a matrix, or of each of a stack."""
    rows, columns = w.shape[-2:]
    padded = F.pad(w, (0, -columns % TILE, 0, -rows % TILE))
    blocks = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))  # (..., P, t, Q, t)
    scales = _scales(_largest(blocks, dim=(-3, -1)))
    numbers = (blocks / scales).flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return Blocks(numbers.to(E4M3), scales.squeeze(-1).squeeze(-2))


def round_columns(x_RI: Tensor, counts_E: Tensor) -> Tensor:
    """What e4m3 leaves of rows, with a scale for each 128 x 1 tile of a column.

    Args:
        x_RI: rows.
        counts_E: of each expert, one after the other; its tiles begin with it.
    """
    rows = x_RI.shape[0]
    place_R = torch.arange(rows, device=x_RI.device)
    ends_E = counts_E.cumsum(0)
    expert_R = torch.searchsorted(ends_E, place_R, right=True).clamp(max=len(counts_E) - 1)
    tiles_E = (counts_E + TILE - 1) // TILE
    first_R = (ends_E - counts_E)[expert_R]
    before_R = (tiles_E.cumsum(0) - tiles_E)[expert_R]
    spare = rows // TILE + len(counts_E)  # of rows that are no expert's, and hold anything
    tile_R = (before_R + (place_R - first_R) // TILE).where(place_R < ends_E[-1], spare)
    largest_TI = x_RI.new_zeros(spare + 1, x_RI.shape[1])
    largest_TI.scatter_reduce_(0, tile_R.unsqueeze(1).expand_as(x_RI), x_RI.abs(), "amax")
    scales_RI = _scales(largest_TI)[tile_R]
    return widened((x_RI / scales_RI).to(E4M3), x_RI.dtype) * scales_RI


def _largest(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Of absolute values, NaN above all: compared as the integers that their bits are, which takes
    a CPU a fourth of the time."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.abs().view(bits).amax(dim, keepdim=True).view(x.dtype)


def _scales(largest: Tensor) -> Tensor:
    """The least power of two by which these, divided, are no more than e4m3 holds; of zeros 1."""
    wide = largest.to(torch.promote_types(largest.dtype, torch.float32))
    mantissa, exponent = torch.frexp(wide / _LARGEST)  # mantissa from a half to below 1
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale = torch.ldexp(torch.ones_like(wide), exponent)
    # What is below fp32's own range has no scale in it, and rounds to zero with the least.
    least = torch.finfo(torch.float32).tiny
    scale = torch.where(wide == 0, torch.ones_like(scale), scale.clamp(min=least))
    # e4m3 has no infinity, and a cast gives its largest number: such a tile shall be NaN.
    return scale.where(wide.isfinite(), wide).to(largest.dtype)


def fp8_linear_slow(x_RI: Tensor, w_OI: Tensor) -> Tensor:
    """Reference implementation of ``fp8_linear``'s forward pass: tile by tile."""
    y_RO = x_RI.new_zeros(x_RI.shape[0], w_OI.shape[0])
    for r in range(x_RI.shape[0]):
        for start in range(0, x_RI.shape[1], TILE):
            columns = slice(start, start + TILE)
            x_t = rounded_slow(x_RI[r, columns])
            for top in range(0, w_OI.shape[0], TILE):
                rows = slice(top, top + TILE)
                y_RO[r, rows] += rounded_slow(w_OI[rows, columns]) @ x_t
    return y_RO


def rounded_slow(tile: Tensor) -> Tensor:
    """What e4m3 leaves of numbers with one scale."""
    largest, scale = tile.abs().max().item(), 2.0**-126
    if largest == 0:
        return tile
    while largest / scale > _LARGEST:
        scale *= 2
    return (tile / scale).to(E4M3).to(tile.dtype) * scale
