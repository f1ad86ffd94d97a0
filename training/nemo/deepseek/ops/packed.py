"""Frozen weights in few bits; each row is packed by itself, block by block: numbers and a scale.

| kind | numbers                                                          | fp32 scale  | bytes |
| ---- | ---------------------------------------------------------------- | ----------- | ----- |
| nf4  | one of 16, spread as a normal distribution is (arXiv:2305.14314) | of each 64  | 0.563 |
| fp8  | e4m3                                                             | of each 128 | 1.032 |

So rows can be divided over ranks, and gathered, as those of any weight; and so can their columns,
between blocks. A product takes them out again when it needs them, in both passes: nothing keeps
them unpacked.

I inputs, O outputs, E experts, X bytes of a row, Q blocks of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.weights import PACKED_BLOCKS, UNPACKED_AT_ONCE, packed_row_bytes
from deepseek.ops.autocast import as_products
from deepseek.ops.fp8 import E4M3, widened
from deepseek.ops.grouped_linear import grouped_linear

_LARGEST = {"nf4": 1.0, "fp8": 448.0}
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""arXiv:2305.14314 appendix E."""


def pack_rows(w: Tensor, kind: str) -> Tensor:
    """Weights (..., I) in any float dtype -> uint8 (..., X)."""
    columns, block = w.shape[-1], PACKED_BLOCKS[kind]
    blocks = F.pad(w.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST[kind], 1.0)
    numbers = blocks / scale
    if kind == "nf4":
        table = torch.tensor(NF4, device=w.device)
        codes = torch.bucketize(numbers, (table[1:] + table[:-1]) / 2).to(torch.uint8)
        packed = codes[..., 0::2] << 4 | codes[..., 1::2]
    else:
        packed = numbers.to(E4M3).view(torch.uint8)
    return torch.cat((packed, scale.contiguous().view(torch.uint8)), dim=-1).flatten(-2)


def unpack_rows(packed: Tensor, columns: int, kind: str, dtype: torch.dtype) -> Tensor:
    """uint8 (..., X) -> the weights (..., I): products of fp32, rounded to ``dtype`` once."""
    rows_RX = packed.flatten(0, -2)
    w_RI = torch.empty(rows_RX.shape[0], columns, dtype=dtype, device=packed.device)
    at_once = max(1, UNPACKED_AT_ONCE // columns)
    for part_RX, part_RI in zip(rows_RX.split(at_once), w_RI.split(at_once), strict=True):
        part_RI.copy_(_unpacked(part_RX, columns, kind))
    return w_RI.unflatten(0, packed.shape[:-1])


def _unpacked(packed: Tensor, columns: int, kind: str) -> Tensor:
    """In fp32."""
    blocks = packed.unflatten(-1, (-(-columns // PACKED_BLOCKS[kind]), -1))
    bits, scale = blocks[..., :-4], blocks[..., -4:].contiguous().view(torch.float32)
    if kind == "nf4":
        codes = torch.stack((bits >> 4, bits & 15), dim=-1).flatten(-2)
        numbers = torch.tensor(NF4, device=packed.device)[codes.int()]
    else:
        numbers = widened(bits.contiguous().view(E4M3), torch.float32)
    return (numbers * scale).flatten(-2)[..., :columns]


def pack_rows_slow(w_OI: Tensor, kind: str) -> Tensor:
    """Reference implementation of ``pack_rows``: block by block, the nearest number of all."""
    rows = []
    for row_I in w_OI.float():
        blocks = []
        for part in row_I.split(PACKED_BLOCKS[kind]):
            largest = part.abs().max()
            scale = largest / _LARGEST[kind] if largest > 0 else torch.ones(())
            whole = F.pad(part / scale, (0, PACKED_BLOCKS[kind] - len(part)))
            codes = whole.to(E4M3).view(torch.uint8)
            if kind == "nf4":
                nearest = [min(range(16), key=lambda i: abs(NF4[i] - x)) for x in whole.tolist()]
                pairs = zip(nearest[::2], nearest[1::2], strict=True)
                codes = torch.tensor([16 * a + b for a, b in pairs], dtype=torch.uint8)
            blocks.append(torch.cat((codes, scale[None].view(torch.uint8))))
        rows.append(torch.cat(blocks))
    return torch.stack(rows)


def packed_linear(x: Tensor, packed_OX: Tensor, kind: str) -> Tensor:
    """``F.linear`` with the matrix of packed rows; (..., I) -> (..., O) in the dtype of products.

    The gradient is that of ``x`` alone: what is packed is frozen.
    """
    return _PackedProduct.apply(as_products(x), packed_OX, kind, None)


def packed_grouped_linear(x_RI: Tensor, packed_EOX: Tensor, counts_E: Tensor, kind: str) -> Tensor:
    """``grouped_linear`` with a stack of packed rows."""
    return _PackedProduct.apply(x_RI, packed_EOX, kind, counts_E)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, kind: str, counts_E: Tensor | None) -> Tensor:
        assert packed.shape[-1] == packed_row_bytes(x.shape[-1], kind)
        ctx.save_for_backward(packed, counts_E)
        ctx.columns, ctx.kind = x.shape[-1], kind
        w = unpack_rows(packed, x.shape[-1], kind, x.dtype)
        return F.linear(x, w) if counts_E is None else grouped_linear(x, w, counts_E)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, counts_E = ctx.saved_tensors
        w = unpack_rows(packed, ctx.columns, ctx.kind, grad.dtype)
        if counts_E is None:
            return grad @ w, None, None, None
        return grouped_linear(grad.contiguous(), w.mT, counts_E), None, None, None
