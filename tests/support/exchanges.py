"""Exchanges of rows by the backend, to hold those through shared memory against them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deepseek.parallel import cpu_exchange


@contextmanager
def without_shared_memory() -> Iterator[None]:
    """Rows travel as on ranks that share no machine: everything by ``dist.all_to_all_single``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_exchange, "_row_memory", lambda tensor, group: None)
        yield
