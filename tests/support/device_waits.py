"""What would make the host wait for a GPU, seen on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

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
    """What ``work`` waits for; lists, and tensors of Python's numbers, are made by no operator."""
    watch = Watch()

    def noted(owner: object, name: str) -> Callable[..., object]:
        original = getattr(owner, name)

        def note(*args: object, **options: object) -> object:
            watch.waits.append(name)
            return original(*args, **options)

        return note

    with pytest.MonkeyPatch.context() as patch, watch:
        moves = ((Tensor, "cpu"), (Tensor, "numpy"), (Tensor, "new_tensor"), (torch, "tensor"))
        for owner, name in ((Tensor, "tolist"), *moves):
            patch.setattr(owner, name, noted(owner, name))
        work()
    return watch


def unwatched(optimizer: torch.optim.Optimizer) -> None:
    """Let its steps be: AdamW reads its own step counts, which lie on the host."""
    step = optimizer.step

    def alone() -> None:
        with _disable_current_modes():
            step()

    optimizer.step = alone  # type: ignore[method-assign]
