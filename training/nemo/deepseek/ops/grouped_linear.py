"""One linear layer per expert over rows sorted by expert; shapes: ``models/__init__.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.compiler.disable  # the compiler's shape check refuses fp32 grouped_mm, which eager runs
def grouped_linear(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """``y[r] = w[e(r)] @ x[r]``, rows sorted by expert, ``counts[e]`` of them for expert ``e``.

    Args:
        x_RI: fp32, bf16, fp16 or fp64; R may be 0, and more than sum(counts).
        w_EOI: stacked weights of the same dtype.
        counts_E: int64 rows per expert; zeros allowed.

    Returns:
        (R, O) in the dtype of ``x``; rows of no expert hold anything, NaN included.
    """
    if x_RI.shape[0] == 0 or not _grouped_mm_takes(w_EOI):
        return grouped_linear_loop(x_RI, w_EOI, counts_E)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    y_RO = F.grouped_mm(x_RI.contiguous(), w_EOI.transpose(-2, -1), offs=offsets_E)
    if y_RO.requires_grad:
        y_RO.register_hook(Tensor.contiguous)  # grouped_mm refuses an expanded gradient
    return y_RO


def grouped_linear_loop(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Readable twin of ``grouped_linear``: a loop over experts."""
    # unbind, not w[e]: indexing makes each backward build a full zero gradient of all experts
    counts = counts_E.tolist()
    *owned, rest_RI = x_RI.split([*counts, x_RI.shape[0] - sum(counts)])
    y = [F.linear(x, w) for x, w in zip(owned, w_EOI.unbind(0), strict=True)]
    return torch.cat([*y, rest_RI.new_zeros(rest_RI.shape[0], w_EOI.shape[1])])


def _grouped_mm_takes(w_EOI: Tensor) -> bool:
    """grouped_mm has no fp64, and asks for rows of a multiple of 16 bytes on both sides."""
    row_bytes = (dim * w_EOI.element_size() for dim in w_EOI.shape[1:])
    return w_EOI.dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)
