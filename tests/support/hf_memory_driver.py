"""A process of its own that imports and exports and says how far its memory grew, in bytes.

Argument: a folder with ``hf``, and ``tiny`` to load all code with. Linux: ``ru_maxrss`` begins with
the size of the process that started this one, so the kernel is told to forget the peak so far.
"""

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

from deepseek.commands.convert import export_hf, import_hf


def resident(key: str) -> int:
    """``VmRSS``: now; ``VmHWM``: at most. Bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, key
    return int(found[1]) * 1024


def grown(work: Callable[[], None]) -> int:
    """How far memory rises above what it is now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # freed memory goes back at once, is not held
folder = Path(sys.argv[1])
import_hf(folder / "tiny", folder / "tiny-run")
export_hf(folder / "tiny-run", folder / "tiny-out")
print(grown(lambda: import_hf(folder / "hf", folder / "run")), file=sys.stderr)
print(grown(lambda: export_hf(folder / "run", folder / "out")), file=sys.stderr)
