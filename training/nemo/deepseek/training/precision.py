"""Which precision ``trainer.precision=auto`` is: on a CPU, whichever has the faster products.

CPUs differ a hundredfold: with AMX or AVX512-BF16 a product in bf16 takes a half to a quarter of
fp32's time, without them a hundred times as long. No list of names or flags tells this as well as
a measurement, which takes a fraction of a second and is kept.
"""

from __future__ import annotations

import json
import math
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from deepseek.config.errors import UserError
from deepseek.config.processor import processor
from deepseek.files import atomic_open, user_cache

WORTH_IT = 1.5
"""How many times faster products must be: the casts around them take a part of the gain back."""
_SIZE, _ROUNDS, _HOPELESS = 512, 6, 0.25
_LARGEST = 1000
"""No CPU comes near."""


def cpu_speedup() -> float:
    """How many times faster this CPU multiplies matrices in bf16 than in fp32.

    Measured once for a CPU, a torch and a number of threads, then read from the user's cache; where
    there is none, or it cannot be written, each time.
    """
    try:
        file = user_cache() / "precision.json"
    except UserError:  # no home
        return _measured_speedup()
    machine = f"{_cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    known = _known(file)
    if machine in known:
        return known[machine]
    speedup = _measured_speedup()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(file) as stream:
            stream.write(json.dumps(known | {machine: float(f"{speedup:.3g}")}, indent=1).encode())
    return speedup


def _known(file: Path) -> dict[str, float]:
    """What was measured, by machine; what can be no measurement is as if it were not there."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    # Compared, not converted: an integer may be too large for a float.
    return {
        name: speedup
        for name, speedup in found.items()
        if type(speedup) in (int, float) and 0 < speedup < _LARGEST
    }


def _measured_speedup() -> float:
    """The best of some rounds, in turn: what else runs here slows both."""
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    ones_SS = torch.ones(_SIZE, _SIZE)
    for number in range(_ROUNDS):
        for dtype in best:
            x_SS = ones_SS.to(dtype)
            begin = time.perf_counter()
            F.linear(x_SS, x_SS)
            if number > 0:  # the first one chooses its kernel
                best[dtype] = min(best[dtype], time.perf_counter() - begin)
        if number > 0 and best[torch.float32] < _HOPELESS * best[torch.bfloat16]:
            break
    return best[torch.float32] / best[torch.bfloat16]


def _cpu_name() -> str:
    """With the instructions that matter: rented machines hide the model behind one name."""
    if found := processor():
        flags = [flag for flag in found.get("flags", "").split() if "bf16" in flag]
        return " ".join([found.get("model name", ""), found.get("model", ""), *flags])
    return f"{platform.machine()} {platform.processor()}"
