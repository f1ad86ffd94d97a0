"""Addresses of many tensors for one call of a kernel, as of all parameters in each step."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from deepseek.ops.native.build import KINDS


def addresses(tensors: Iterable[Tensor], dtype: torch.dtype) -> array[int] | None:
    """Of each its address, int64; None: one of them is not plain and contiguous, of this dtype and
    in this machine's memory."""
    found = array("q")
    for x in tensors:  # one pass: asked for with hundreds of tensors a step
        if type(x) not in KINDS or x.dtype != dtype or not (x.is_cpu and x.is_contiguous()):
            return None
        found.append(x.data_ptr())
    return found
