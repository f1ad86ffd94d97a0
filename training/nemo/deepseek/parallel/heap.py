"""How the C library hands memory back to the system: here, not at all while a run lasts."""

from __future__ import annotations

import ctypes
import sys

# From malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_GROW_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process use its freed memory again instead of returning it to the system.

    By default every tensor of some size is mapped anew from the system, which clears it page by
    page as it is first written: that takes several times as long as writing it. Each training step
    frees and wants the same sizes, so what is kept is what is needed next.

    Returns:
        Whether the C library took it; others than GNU's have no such settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _GROW_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])
