"""Squares of a stack's gradient, added up by the kernel that writes it.

The norm of all gradients reads each of them once more. Those of a mixture's experts are most of a
model, and by then they come from memory, which takes as long as it takes to read them: 34 ms of a
step of 2,800 with 283 M weights of experts on two cores. The kernel has them in registers.

A note is of a gradient as it was written. It counts as long as the gradient lies where it lay and
nobody has changed it, which its version tells. What a version does not tell, changes by way of
``.data``, can come from hooks only, since nobody else is called between the backward pass and the
norm of a step: a weight that has hooks gets no note, nor do those of a model of hooked modules.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.ops.added_gradients import has_hooks

_here = threading.local()
"""``notes`` of this thread, which is that of a CPU's backward pass too; by address."""
WORTH = 1 << 20
"""Numbers of a stack: of fewer, the norm finds most in a cache."""
COLUMNS = 8
"""That have a number together: ``TOGETHER`` in ``native/slabs.h``."""


class _Note(NamedTuple):
    version: int
    squares_EC: Tensor


@contextmanager
def squares_noted() -> Iterator[None]:
    """Inside, gradients of single backward passes are written, added to, and their norm is taken:
    notes end with it."""
    _here.notes = {}
    try:
        yield
    finally:
        _here.notes = None


def squares_to_note(weight: Tensor, grad_EOI: Tensor, adds: bool) -> Tensor | None:
    """Where a kernel is to add up the squares of what it writes: (E, I / ``COLUMNS``), fp64; None:
    nobody will ask for them.

    Args:
        weight: the stack.
        grad_EOI: contiguous; where its gradient will lie, in a room of its own: no other tensor
            can come to lie there.
        adds: to what is there; of an expert without rows nothing is written then.
    """
    notes: dict[int, _Note] | None = getattr(_here, "notes", None)
    if notes is None or grad_EOI.numel() < WORTH:
        return None
    before = notes.pop(grad_EOI.data_ptr(), None)
    if has_hooks(weight):
        return None
    if not adds:
        experts, _, inputs = grad_EOI.shape
        squares_EC = torch.zeros(experts, -(-inputs // COLUMNS), dtype=torch.float64)
    elif before is not None and before.version == grad_EOI._version:
        squares_EC = before.squares_EC
    else:
        return None
    notes[grad_EOI.data_ptr()] = _Note(grad_EOI._version, squares_EC)
    return squares_EC


def doubt_notes(watched: Iterable[bool]) -> None:
    """End all notes, if one of these is true; they are asked for only if there are notes.

    Args:
        watched: whether a module has hooks, of each module of the model.
    """
    notes: dict[int, _Note] | None = getattr(_here, "notes", None)
    if notes and any(watched):
        notes.clear()


def noted_squares(grad: Tensor) -> Tensor | None:
    """The sum of the squares of a gradient, fp64 scalar; None: nobody has noted it, or the gradient
    has been changed since."""
    notes: dict[int, _Note] | None = getattr(_here, "notes", None)
    note = notes.get(grad.data_ptr()) if notes else None
    if note is None or note.version != grad._version:
        return None
    return note.squares_EC.sum(-1).sum()  # not at once: the order would depend on the threads
