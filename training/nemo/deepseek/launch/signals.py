"""Signals that ask a process to stop: what it has is saved, and its exit code is 128 + N."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""A closed terminal, Ctrl-C, schedulers, and the warning that Slurm gives before its limit."""
ONE_REQUEST_SECONDS = 1.0
"""Closer signals are one request: Slurm and torchrun send one each, Ctrl-C also closes pipes."""


class StopRequests:
    """Listens for ``STOP_SIGNALS``; the first asks, another one a while later insists.

    Two Ctrl-C are two requests however close, since a person has made them.

    Args:
        ask: called with the first signal, between two instructions of the main thread.
        insist: called with a later one.
    """

    def __init__(self, ask: Callable[[int], None], insist: Callable[[int], None]) -> None:
        self._ask, self._insist = ask, insist
        self._before: dict[int, Any] = {}
        self.first: int | None = None
        self._since = 0.0

    def listen(self) -> None:
        """Set the handlers, also where another has set its own since. What the process was started
        to ignore, as by ``nohup``, stays ignored; but a shell ignores SIGINT for what it starts
        with ``&``, and does not mean it."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python hears signals there alone
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            if handler is signal.SIG_IGN and number != signal.SIGINT:
                continue
            self._before.setdefault(number, handler)
            signal.signal(number, self._hear)

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def request(self, number: int) -> None:
        """What the first signal does, without one; does nothing after one."""
        if self.first is None:
            self.first, self._since = number, time.monotonic()
            self._ask(number)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.request(number)
        elif (
            time.monotonic() - self._since >= ONE_REQUEST_SECONDS
            or number == self.first == signal.SIGINT
        ):
            self._insist(number)


class StoppedAtOnce(KeyboardInterrupt):
    """A signal where there is nothing to be saved, or one more that does not wait for it.

    Args:
        number: the signal.
        again: it is not the first one.
    """

    def __init__(self, number: int, again: bool = False) -> None:
        super().__init__(number)
        self.number, self._again = number, again

    def __str__(self) -> str:
        return signal_name(self.number) + (", a second one" if self._again else "")


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Raise ``StoppedAtOnce`` on a stop signal, so that what was begun is tidied up."""

    def stop(number: int) -> None:
        raise StoppedAtOnce(number)

    requests = StopRequests(stop, stop)
    requests.listen()
    try:
        yield
    finally:
        requests.release()


def signal_name(number: int) -> str:
    """``SIGKILL``, or ``signal 99``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
