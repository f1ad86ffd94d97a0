"""Linear maps of a few rows, as in decoding; shapes: ``models/__init__.py``.

One token reads every weight once, so that a product takes as long as its weights take to arrive.
BLAS libraries see a vector there and take another way: MKL's is serial and, on an AMD CPU, comes
to 10 GB/s of 50. Asked for ``w x^T`` instead, in as many pieces as there are threads, they take the
way of large products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 16
"""Rows from which on the usual way is as fast."""


def linear(x: Tensor, w_OI: Tensor) -> Tensor:
    """``x @ w^T``; of a few rows without gradient on a CPU by another way to the same.

    Args:
        x: (..., I).
        w_OI: of any dtype that ``F.linear`` takes with ``x``.

    Returns:
        (..., O).
    """
    if not takes_few(x, w_OI) or not 0 < x.numel() < FEW * x.shape[-1]:
        return F.linear(x, w_OI)
    return few_rows(x.reshape(-1, x.shape[-1]), w_OI).reshape(*x.shape[:-1], w_OI.shape[0])


def takes_few(x: Tensor, w: Tensor) -> bool:
    """Whether ``few_rows`` is of use for this kind of tensors, if they are few."""
    return (
        x.is_cpu
        and x.dtype == w.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def few_rows(x_RI: Tensor, w_OI: Tensor) -> Tensor:
    """``linear`` of R rows, at least one: (R, O), strided. Reference: ``F.linear``."""
    (rows, inputs), outputs = x_RI.shape, w_OI.shape[0]
    if rows > 1:
        return torch.mm(w_OI, x_RI.t()).t()
    parts = torch.get_num_threads()
    if outputs % parts:
        parts = 1
    x_pI1 = x_RI.reshape(1, inputs, 1).expand(parts, inputs, 1)
    return torch.bmm(w_OI.unflatten(0, (parts, -1)), x_pI1).view(1, outputs)
