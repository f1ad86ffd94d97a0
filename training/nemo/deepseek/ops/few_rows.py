"""Linear maps of a few rows, as in decoding; shapes: ``models/__init__.py``.

One token reads every weight once, so that a product takes as long as its weights take to arrive.
BLAS libraries see a vector there and take another way: MKL's is serial, as it is for each of a
batch, and with rows first it packs the weights, which takes longer than the product. Asked for
``w x^T`` of at least two rows, it streams them through all threads. From some rows on, and where
rows are wide, oneDNN is faster.

On Intel's own processors MKL's vectors are not serial, and as fast as memory; ``w x^T`` pays there
from some rows on.

All of that is for machines where no kernel of ours can be compiled (``native/linear.c``), which
streams the weights on every processor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.processor import processor
from deepseek.ops.native import build

OURS = 16
"""Rows from which on the libraries' ways are as fast as our kernel: products take longest then."""
FEW = 32
"""Rows from which on the usual way is as fast everywhere."""
_IN_CACHES = 1 << 16
"""Numbers of a matrix below which it mostly lies in the caches: there the usual way is fastest."""
_STREAMED_ROWS, _STREAMED_WIDTH = 4, 2048
"""As far as MKL's ``w x^T`` is the fastest: 18 GB/s of weights in a second of CPU time with two
rows, where ``F.linear`` comes to 6 to 9 (EPYC with AVX-512)."""
_ONEDNN_ROWS = 16
"""Rows from which on the usual way is as fast there."""
_INTEL_ROWS = 8
"""Rows from which on ``w x^T`` is faster on an Intel. Weights read by two threads of a Xeon with
AVX-512: 27 GB/s for 8 to 16 rows, where ``F.linear`` falls from 28 to 13; 37 to 58 by that for one
row."""


def linear(x: Tensor, w_OI: Tensor) -> Tensor:
    """``x @ w^T``; of a few rows without gradient on a CPU by another way to the same.

    Args:
        x: (..., I).
        w_OI: of any dtype that ``F.linear`` takes with ``x``.

    Returns:
        (..., O).
    """
    if not 0 < x.numel() < FEW * x.shape[-1] or not takes_few(x, w_OI):
        return F.linear(x, w_OI)
    return few_rows(x.reshape(-1, x.shape[-1]), w_OI).reshape(*x.shape[:-1], w_OI.shape[0])


def takes_few(x: Tensor, w: Tensor) -> bool:
    """Whether ``few_rows`` is of use for this kind of tensors, if they are few."""
    return build.takes(x, w)


def few_rows(x_RI: Tensor, w_OI: Tensor) -> Tensor:
    """``linear`` of R rows, at least one: (R, O), strided. Reference: ``F.linear``."""
    rows, inputs = x_RI.shape
    fits = w_OI.shape[-1] == inputs  # F.linear tells what does not
    if w_OI.numel() < _IN_CACHES or not fits or not w_OI.is_contiguous():
        return F.linear(x_RI, w_OI)  # other strides take both of the following many times as long
    kernel = build.kernel("linear", "pppnnnn") if rows < OURS else None
    if kernel is not None:
        x_RI, y_RO = x_RI.contiguous(), x_RI.new_empty(rows, len(w_OI))
        kernel(y_RO, x_RI, w_OI, rows, len(w_OI), inputs, torch.get_num_threads())
        return y_RO
    if processor().get("vendor_id") == "GenuineIntel":
        return F.linear(x_RI, w_OI) if rows < _INTEL_ROWS else torch.mm(w_OI, x_RI.t()).t()
    if rows <= _STREAMED_ROWS and inputs <= _STREAMED_WIDTH:
        if rows == 1:  # a second row costs nothing, and makes it a matrix
            x_RI = torch.cat((x_RI, x_RI))
        return torch.mm(w_OI, x_RI.t()).t()[:rows]
    if rows >= _ONEDNN_ROWS or not torch.backends.mkldnn.is_available():
        return F.linear(x_RI, w_OI)
    return torch.ops.mkldnn._linear_pointwise(x_RI, w_OI, None, "none", [], "")
