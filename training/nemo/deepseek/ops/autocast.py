"""Values in the dtype of products: what lies between two products need be no wider than they are.

Norms, routers and losses go back to fp32 inside, and give what they were given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COLUMNS = 1024
"""Of a table's gradient that are added up at a time."""


def as_products(x: Tensor) -> Tensor:
    """``x`` in autocast's dtype, if it is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def lookup(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of a table, (..., D) in the dtype of products.

    The gradients of an id's places are added up in fp32, and rounded to the table's dtype once:
    a CPU's own kernel rounds each sum, and an id of every other place would stop to learn.

    Args:
        ids: int64.
        weight_VD: the table; of any float dtype.
    """
    return as_products(_Lookup.apply(ids, weight_VD))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = weight_VD.shape[0], weight_VD.dtype
        return torch.nn.functional.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        if ctx.dtype == wide:
            return None, _scattered(grad.to(wide), ids, ctx.rows)
        table_VD = grad.new_empty(ctx.rows, grad.shape[-1], dtype=ctx.dtype)
        for part, columns in zip(
            grad.split(_COLUMNS, -1), table_VD.split(_COLUMNS, 1), strict=True
        ):
            # Scattered in fp32, some columns at a time: all of them are as much as the optimiser's.
            columns.copy_(_scattered(part.to(wide), ids, ctx.rows))
        return None, table_VD


def _scattered(grad: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, ids, num_rows, -1, False)
