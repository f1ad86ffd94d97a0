"""Kernels in C on and off, to hold both ways against each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deepseek.files import user_cache
from deepseek.ops.native import build


@contextmanager
def without_kernels() -> Iterator[None]:
    """As on a machine where none can be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_library", lambda: "switched off by a test")
        yield


@contextmanager
def kernels_asked_for() -> Iterator[set[str]]:
    """The names of kernels that are asked for inside, by this thread or another."""
    asked, names = build.function, set[str]()

    def noted(name: str, arguments: str) -> Any:
        names.add(name)
        return asked(name, arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "function", noted)
        yield names


def cache_with_kernels(folder: Path) -> dict[str, str]:
    """A process's environment with an empty cache in ``folder``, but for the kernels, which it
    would compile anew for ten seconds."""
    ours, cache = user_cache() / "kernels", folder / "deepseek"
    ours.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "kernels").exists():
        (cache / "kernels").symlink_to(ours)
    return {"XDG_CACHE_HOME": str(folder)}
