"""Where CPU ranks of one machine wait for each other, some forty times a step.

gloo's barrier is messages through sockets, sent and received by threads of its own, which want the
cores that compute. Here it is a count in memory that the ranks share: a rank adds itself, and who
waits sleeps until the last one has. Whether the others live, and how long to wait for them, gloo
knows: where a rank is missed for long, all go on to gloo's barrier, and have its time-out and its
errors.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from deepseek.ops.native import build

PATIENCE_SECONDS = 1.0
"""How long ranks that come are counted before the backend is asked for those that are missing."""
TURNS = 2
"""Words, used in turn: one is counted while the other may still be read."""


class Begun(Protocol):
    """A barrier that this rank has come to."""

    def wait(self) -> object:
        """Until all have come."""
        ...


def may_count() -> bool:
    """Whether this rank has what counts; else, on any rank, all take ``BackendBarrier``."""
    return build.why_not() is None


class BackendBarrier:
    """That of the group's backend.

    Args:
        group: gives the ranks; None once it has been destroyed.
    """

    def __init__(self, group: Callable[[], dist.ProcessGroup | None]) -> None:
        self._group = group

    def begin(self) -> Begun:
        """Tell the others that this rank is here."""
        work = dist.barrier(group=self._group(), async_op=True)
        assert work is not None  # this rank is in the group
        return work


class CountedBarrier:
    """Counted in shared memory; one at a time.

    Args:
        words: int64 (``TURNS``,), shared, zeros at first.
        size: how many ranks.
        backend: of the same ranks.
    """

    def __init__(self, words: Tensor, size: int, backend: BackendBarrier) -> None:
        self._words, self._size, self._backend = words, size, backend
        self._impatient = array("q", [0])  # no tensor: nothing here is asked of a device
        self._number = 0

    def begin(self) -> Begun:
        """Tell the others that this rank is here."""
        _kernel("come", "p")(self._word)
        return self

    def wait(self) -> None:
        """Until all have come.

        Raises:
            RuntimeError: the backend's: a rank has died, or has not come in time.
        """
        comers = self._size * (self._number // TURNS + 1)
        patience = int(1e9 * PATIENCE_SECONDS)
        answer, _ = self._impatient.buffer_info()
        _kernel("meet", "ppnn")(answer, self._word, comers, patience)
        if self._impatient[0]:
            self._backend.begin().wait()
            _kernel("forgive", "p")(self._word)
        self._number += 1

    @property
    def _word(self) -> Tensor:
        return self._words[self._number % TURNS]


def _kernel(name: str, arguments: str) -> Callable[..., None]:
    run = build.function(name, arguments)
    assert run is not None, "asked before"
    return run
