"""What would make the host wait for a GPU, seen on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "bincount", "masked_select")
"""Operators whose result's value or shape must come to the host."""


class Watch(TorchDispatchMode):
    """Notes the operators that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) else ()
        if (
            name in WAITS
            or (func is torch.ops.aten.repeat_interleave.Tensor and "output_size" not in kwargs)
            or any(index is not None and index.dtype == torch.bool for index in indices)
        ):
            self.waits.append(name)
        return func(*args, **kwargs)


def watched(work: Callable[[], object]) -> Watch:
    """What ``work`` waits for; lists are made without an operator."""
    tolist = Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, Watch() as watch:
        patch.setattr(Tensor, "tolist", lambda self: watch.waits.append("tolist") or tolist(self))
        work()
    return watch
