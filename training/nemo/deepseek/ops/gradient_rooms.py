"""Memory that a weight's gradient has to itself, from step to step, and lends to activations.

A gradient made anew in each step lies where there is room just then: between activations, of which
most are gone a moment later, and whose memory then is in pieces that the next gradient does not fit
in. Memory of its own would be idle for most of a step. But what a layer keeps for its backward pass
is needed till this makes the gradients of its weights, and no longer: the one can lie where the
other comes to lie. Numbers are the same, wherever they are.

Only weights that were given a room have one, and nobody has to ask who else is about: a room is
lent if nothing lies in it. A gradient that somebody has kept, or that is still to be added to, is
never written over.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_rooms: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
_NOBODY = 2
"""Who holds the memory of an idle room: the room, and who counts."""


def make_gradient_room(weight: Tensor) -> None:
    """Keep memory for the gradients of ``weight``, as long as that one lives."""
    if weight not in _rooms:
        _rooms[weight] = torch.empty_like(weight, requires_grad=False)


def lent_room(weight: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """Memory for a tensor of these sizes where the gradient of ``weight`` will lie; None: there is
    no room, it is too small, or in use."""
    room = _rooms.get(weight)
    if room is None or math.prod(sizes) > room.numel() or _users(room) > _NOBODY:
        return None
    return _placed(room, sizes)


def gradient_room(weight: Tensor, kept: Tensor | None = None) -> Tensor | None:
    """Memory for the gradient of ``weight``; None: there is no room, or it is in use.

    Args:
        weight: has got a room or not.
        kept: what the caller has kept for its backward pass and needs no more. If it lies there,
            autograd is told that it has changed: who goes back a second time is given an error.
    """
    room = _rooms.get(weight)
    if room is None:
        return None
    is_there = kept is not None and kept.untyped_storage().data_ptr() == room.data_ptr()
    if _users(room) > _NOBODY + is_there:
        return None
    if kept is not None and is_there:
        torch.autograd.graph.increment_version(kept)
    return _placed(room, weight.shape)


def _users(room: Tensor) -> int:
    return torch._C._storage_Use_Count(room.untyped_storage()._cdata)


def _placed(room: Tensor, sizes: Sequence[int]) -> Tensor:
    """No view: autograd takes it for a tensor like any other, and keeps it as ``.grad``."""
    storage = room.untyped_storage()
    return room.new_empty(0).set_(storage, 0, tuple(sizes))  # type: ignore[call-overload]
