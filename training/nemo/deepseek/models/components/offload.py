"""What blocks keep for the backward pass, in the host's memory meanwhile.

A block's tensors go as it makes them and come back when its backward pass begins; with them, in
time, those of the block that is next. On a GPU both ways run beside the computation, on a stream of
their own and from pinned memory (no GPU has run it yet); on a CPU they are plain copies, so that
all the rest is the same. A copy is bitwise, and so is the run.

Weights stay, and so does what is small. With recomputation a block keeps its input alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 1 << 20
"""What is smaller costs more in calls than it saves."""


class HostMemory:
    """Of the blocks of one forward pass, in their order."""

    def __init__(self) -> None:
        self._newest: _Block | None = None

    def run(self, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, which calls ``module``; what it keeps goes to the host."""
        self._newest = block = _Block(module, self._newest)
        with saved_tensors_hooks(block.send, block.fetch):
            result = compute()
        block.forget_originals()
        return result


class _Block:
    """What one block keeps.

    Args:
        module: the block.
        before: whose backward pass is next.
    """

    def __init__(self, module: nn.Module, before: _Block | None) -> None:
        self._before = before
        self._known: dict[Any, tuple[Tensor, _Copy]] = {}
        self._copies: list[_Copy] = []
        self._module = module

    def send(self, tensor: Tensor) -> Tensor | _Copy:
        """What autograd keeps of a tensor; the same for one that several operations keep."""
        if tensor.nbytes < LEAST_BYTES or self._is_weight(tensor):
            return tensor
        # The original is held till the block is done, so that its place is not another one's.
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        if key not in self._known:
            self._known[key] = tensor, _Copy(tensor)
            self._copies.append(self._known[key][1])
        self._known[key][1].wanted += 1
        return self._known[key][1]

    def fetch(self, kept: Tensor | _Copy) -> Tensor:
        """The tensor."""
        if isinstance(kept, Tensor):
            return kept
        self._return()
        if self._before is not None:
            self._before._return()
        return kept.take()

    def forget_originals(self) -> None:
        """The block has gone forward."""
        self._known.clear()

    def _return(self) -> None:
        """Begin to bring back what is here, once."""
        for copy in self._copies:
            copy.bring()
        self._copies = []

    def _is_weight(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return True
        # A DTensor is no nn.Parameter where it is used; nor was it gathered when the block began.
        place = tensor.untyped_storage().data_ptr()
        return any(
            place == parameter.to_local().untyped_storage().data_ptr()
            for parameter in self._module.parameters()
            if hasattr(parameter, "to_local")
        )


class _Copy:
    """A tensor on the host, and for a while on its device again.

    Attributes:
        wanted: how often the backward pass will take it. A second backward pass, as schedules that
            split it have, brings it back once more.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.wanted = 0
        self._device = tensor.device
        self._here: Tensor | None = None
        on_gpu = tensor.device.type == "cuda"
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        with aside(tensor.device):
            self._host.copy_(tensor, non_blocking=True)
        if on_gpu:
            tensor.record_stream(copy_stream(tensor.device))

    def bring(self) -> None:
        """Begin to copy it back."""
        with aside(self._device):
            self._here = torch.empty_like(self._host, device=self._device)
            self._here.copy_(self._host, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor; after the last time it is gone from the device."""
        if self._here is None:
            self.bring()
        here = self._here
        assert here is not None
        if self._device.type == "cuda":
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(copy_stream(self._device))
            here.record_stream(current)
        self.wanted -= 1
        if self.wanted <= 0:
            self._here = None
        return here


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """On which a GPU copies to the host and back."""
    return torch.cuda.Stream(device)


def aside(device: torch.device) -> AbstractContextManager[Any]:
    """On the stream of copies, after what the device has been asked for so far."""
    if device.type != "cuda":
        return nullcontext()
    stream = copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)
