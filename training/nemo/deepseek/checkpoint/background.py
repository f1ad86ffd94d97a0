"""Saving beside the training: a copy of the tensors, and a thread that writes it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor


class Background:
    """Work in a thread of its own, which the interpreter waits for before it exits.

    Args:
        work: starts at once.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until it is done; raises what it raised, the first time."""
        self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as failure:
            self._failure = failure


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy of what lies here, in CPU memory; of a DTensor again a DTensor, over the same ranks.

    That of a DTensor over GPUs is good for being saved only.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    # Not DTensor.from_local, which would move it back to the mesh's device.
    local = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor(local, tensor._spec, requires_grad=False)
