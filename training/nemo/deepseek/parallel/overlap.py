"""Two computations in turn: each goes on while an exchange of the other's is under way.

A rank of DualPipeV has the forward pass of one micro-batch and the backward pass of another to
compute at a time (arXiv:2412.19437 section 3.2.1). Here each is a thread of its own, but only one
of them runs: it goes on until it would wait for an exchange between ranks, and then lets the other
go. So all ranks exchange in one order, whatever the threads' timing, and each pass computes what it
would alone. On a GPU both launch into one stream of kernels, in that order, beside NCCL's (no GPU
has run it yet).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

_running: InTurn | None = None


def are_in_turn() -> bool:
    """Whether there is another computation to let go."""
    return _running is not None


def pause() -> None:
    """Let the other computation go until it pauses or ends, if there is one."""
    if _running is not None:
        _running.switch()


def in_turn(here: Callable[[], T], aside: Callable[[], U], device: torch.device) -> tuple[T, U]:
    """What both give; ``here`` begins, on this thread, and ``aside`` has its state of torch.

    Raises:
        Exception: whatever one of them does; the other then ends where it pauses.
    """
    global _running
    assert _running is None
    _running = pair = InTurn()
    try:
        return pair.run(here, _with_state(aside, device))
    finally:
        _running = None


class InTurn:
    """See ``in_turn``."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._ended = [False, False]
        self._error: BaseException | None = None
        self._aside: threading.Thread | None = None

    def run(self, here: Callable[[], T], aside: Callable[[], U]) -> tuple[T, U]:
        """See ``in_turn``."""
        results: list[U] = []
        self._aside = threading.Thread(target=self._run, args=(1, lambda: results.append(aside())))
        self._aside.start()
        mine: list[T] = []
        self._run(0, lambda: mine.append(here()))
        self._aside.join()
        if self._error is not None:
            raise self._error
        return mine[0], results[0]

    def switch(self) -> None:
        """Let the other go."""
        # A GPU's backward pass has a thread of its own, too.
        side = int(threading.current_thread() is self._aside)
        with self._changed:
            if not self._ended[1 - side]:
                self._turn = 1 - side
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._turn == side)
            if self._error is not None:
                raise RuntimeError("the computation beside this one has failed")

    def _run(self, side: int, compute: Callable[[], None]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == side)
        try:
            if self._error is None:
                compute()
        except BaseException as error:
            self._error = self._error or error
        finally:
            with self._changed:
                self._ended[side], self._turn = True, 1 - side
                self._changed.notify_all()


def _with_state(compute: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """``compute`` on another thread, with autocast, gradients and device as here."""
    kind, gradients = device.type, torch.is_grad_enabled()
    casts, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    def run() -> T:
        with (
            torch.set_grad_enabled(gradients),
            torch.autocast(kind, dtype, enabled=casts, cache_enabled=False),
            torch.cuda.stream(stream),
        ):
            return compute()

    return run
