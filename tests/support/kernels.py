"""Kernels in C on and off, to hold both ways against each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deepseek.ops.native import build


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a machine where none can be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_library", lambda: "switched off by a test")
        yield
