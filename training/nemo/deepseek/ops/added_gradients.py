"""Gradients of weights that kernels add to where they lie.

A step of several micro-batches adds up their gradients. Autograd makes a tensor of each and adds it
to ``.grad``: of a number 20 bytes go through memory, where a kernel that adds its sums needs 8.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_here = threading.local()
"""``adds``: of this thread, which is that of a CPU's backward pass too."""


@contextmanager
def added_in_place() -> Iterator[None]:
    """Inside, ``backward()`` adds to every leaf's ``.grad``, once for each graph: nobody asks for
    the gradients of one micro-batch, as ``torch.autograd.grad`` and FSDP do."""
    _here.adds = True
    try:
        yield
    finally:
        _here.adds = False


def goes_back_once() -> bool:
    """Whether what was kept for the backward pass may be written over: nobody keeps the graph."""
    return getattr(_here, "adds", False)


def has_hooks(weight: Tensor) -> bool:
    """Whether somebody is given this weight's gradients, and may change them."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def gradient_to_add_to(weight: Tensor) -> Tensor | None:
    """``weight.grad``, if a kernel may add to it and give autograd none; None: it may not, or there
    is no gradient yet. Hooks of a weight are given gradients by autograd."""
    if not goes_back_once() or not weight.is_leaf:
        return None
    if has_hooks(weight):
        return None
    grad = weight.grad
    plain = type(grad) is Tensor and grad.is_contiguous() and grad.dtype == torch.float32
    return grad if plain else None
