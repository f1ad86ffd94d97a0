"""A loader that knows how long its batches were waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any


class TimedLoader:
    """Iterates over another loader.

    Attributes:
        seconds: that the last batch was waited for.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds = time.perf_counter() - begin
            yield batch
