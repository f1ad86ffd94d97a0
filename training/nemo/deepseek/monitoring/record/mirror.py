"""A logger of others (TensorBoard, W&B, MLflow), told of every step without a wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from deepseek.console import complain

MOST_WAITING = 1000
"""Rows that a slow logger may lag behind; further ones are left out."""
MOST_WORDS = 200
"""Characters of a logger's own message that are shown."""
PATIENCE_SECONDS = 20.0
"""At the end of training, for what is still waiting."""


class Mirror:
    """Feeds one logger from a thread of its own: what it does there cannot stop or slow training.

    A logger that raises is told of once and gets no more; one that hangs or does not keep up loses
    rows. Nothing else is lost, since the local log has everything.

    Args:
        name: for messages.
        open_logger: gives the logger; called in the thread, for it may want the network.
        everything_is_in: where the reader of a message finds what the logger did not get.
    """

    def __init__(self, name: str, open_logger: Callable[[], Any], everything_is_in: object) -> None:
        self.name = name
        self._open_logger = open_logger
        self._elsewhere = f"everything is in {everything_is_in}"
        self._rows: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        self._broken = False
        # A daemon: one that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._feed, name=f"mirror {name}", daemon=True)

    def tell(self, scalars: dict[str, Any], step: int) -> None:
        """Hand over one row; returns at once."""
        if self._broken:
            return
        if self._thread.ident is None:
            self._thread.start()
        try:
            self._rows.put_nowait((scalars, step))
        except queue.Full:
            if not self._left_out:
                complain(
                    f"{self.name} does not keep up, it is {MOST_WAITING} rows behind: rows are "
                    f"left out from step {step} on; {self._elsewhere}"
                )
            self._left_out += 1

    def close(self, patience: float = PATIENCE_SECONDS) -> None:
        """Give it what is waiting, for so many seconds at most."""
        if self._thread.ident is None:
            return
        try:
            self._rows.put(None, timeout=patience)
        except queue.Full:
            pass
        self._thread.join(patience)
        if self._thread.is_alive():
            behind = self._rows.qsize()
            complain(
                f"{self.name} did not take its last rows within {patience:g} s, about {behind} are "
                f"missing there; {self._elsewhere}"
            )

    def _feed(self) -> None:
        try:
            logger = self._open_logger()
            while (row := self._rows.get()) is not None:
                scalars, step = row
                logger.log_metrics(scalars, step=step)
        except BaseException as error:  # also SystemExit, which some raise where they cannot log in
            self._broken = True
            words = " ".join(str(error).split())
            words = words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]} ..."
            complain(
                f"{self.name} failed ({type(error).__name__}: {words}) and gets no more; "
                f"{self._elsewhere}"
            )
