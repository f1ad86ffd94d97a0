"""Finds a C compiler, compiles the kernels of this folder once, and loads them.

PyTorch's operators are too large or too small for some steps on a CPU: a token that is decoded
takes hundreds of them, each of a few microseconds before it computes anything, and reads its
experts one by one. These steps are plain C here, with no header but the C library's, so that
compiling takes some seconds, and are called through ``ctypes`` by address.

Compiled for the very processor, since vectors of 512 bits are twice those of 256, in the user's
cache folder under a name that holds sources, flags, compiler and processor: none of them can meet
another's library there. It is written under a temporary name and renamed, so that ranks may race.

Threads are those of torch's own OpenMP runtime: the library is linked with the file that torch has
loaded, since a second runtime would have threads of its own, which wait for the first one's.

Where anything is missing the callers take PyTorch's way; ``why_not`` tells what.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.processor import cores, processor
from deepseek.files import sync, user_cache

SOURCES = Path(__file__).parent
COMPILERS = "cc", "gcc", "clang"
"""Looked for in this order, unless ``$CC`` names one."""
FLAGS = (
    *("-std=gnu99", "-O3", "-march=native", "-fPIC", "-fopenmp"),
    # What keeps loops from becoming vectors. Not -ffast-math: it sets the whole process to flush
    # small numbers to zero, and sums would no longer be in the order that is written.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
SECONDS = 120
"""That a compiler may take."""
ROOT = 0
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}


class Unavailable(Exception):
    """Why there are no kernels on this machine."""


def kernel(name: str, arguments: str, *tensors: Tensor) -> Callable[..., None] | None:
    """A kernel by its name in C; None where there are none, or a tensor is none that they take:
    plain and on the CPU, of fp32, int64 or bool.

    As it is for the passes of autograd's functions, and for what has no gradient; who computes what
    may have one asks ``takes`` before.

    Args:
        name: of the function, which returns nothing.
        arguments: a letter each: ``p`` an address, or a tensor that has it, or None; ``n`` an
            int64, ``f`` a float, ``d`` a double.
        tensors: among those that it will be given.
    """
    return function(name, arguments) if _plain(*tensors) else None


def takes(*tensors: Tensor) -> bool:
    """Whether kernels may be given these: plain fp32 tensors in this machine's memory, of which
    nobody asks for gradients, and whose operators nobody watches or casts."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(x.dtype == torch.float32 for x in tensors) and _plain(*tensors)


def takes_in_training(*tensors: Tensor) -> bool:
    """Whether autograd functions made of kernels and products may be given these: plain fp32
    tensors in this machine's memory, whose operators nobody casts, in training."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    is_fp32 = all(x.dtype == torch.float32 for x in tensors)
    return is_fp32 and _plain(*tensors) and not isinstance(_library(), str)


def function(name: str, arguments: str) -> Callable[..., None] | None:
    """``kernel``, whatever it is to be given: called by it alone, so that tests watch all here."""
    library = _library()
    return None if isinstance(library, str) else _bound(library, name, arguments)


def _plain(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    for x in tensors:  # not all(...): asked for hundreds of times a step
        if type(x) not in KINDS or not x.is_cpu or x.dtype not in _DTYPES:
            return False
    return True


KINDS = Tensor, torch.nn.Parameter
_DTYPES = torch.float32, torch.int64, torch.bool


def why_not() -> str | None:
    """Why there are no kernels here; None: there are. Compiles them, if nobody has."""
    library = _library()
    return library if isinstance(library, str) else None


def must_compile() -> bool:
    """Whether there is a compiler that nobody has used yet: who asks for a kernel waits for it."""
    try:
        return not _file(_compiler(), _openmp()).exists()
    except _REASONS:
        return False


@cache
def _library() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    try:
        return _load()
    except _REASONS as reason:
        return str(reason)


_REASONS = OSError, ValueError, UserError, Unavailable
"""``ValueError``: a name in /proc that is no text."""


@cache
def _bound(library: ctypes.CDLL, name: str, arguments: str) -> Callable[..., None]:
    found = getattr(library, name)
    found.argtypes, found.restype = [_TYPES[letter] for letter in arguments], None

    def call(*given: Any) -> None:
        # In an autograd function only a backward pass that is to be differentiated has it on.
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in given
        ):
            raise RuntimeError(
                f"{name}: a kernel has no second derivative, and create_graph=True asks for one"
            )
        found(*[x.data_ptr() if isinstance(x, Tensor) else x for x in given])

    return call


def _load() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise Unavailable(f"they are compiled on Linux only, and this is {sys.platform}")
    compiler, runtime = _compiler(), _openmp()
    library = _file(compiler, runtime)
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, runtime, library)
    if library.stat().st_uid not in (os.getuid(), ROOT):  # its code would run as this user
        raise Unavailable(
            f"{library} belongs to another user; set XDG_CACHE_HOME to a folder of yours"
        )
    return ctypes.CDLL(str(library))


def _compiler() -> list[str]:
    """The command, with its path first."""
    given = os.environ.get("CC", "")
    try:
        named = shlex.split(given)
    except ValueError as reason:
        raise Unavailable(f"CC={given}: {reason}") from None
    for command in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    if named:
        raise Unavailable(f"CC={shlex.join(named)}: there is no such program")
    raise Unavailable(f"no C compiler: install gcc, or set CC (looked for {', '.join(COMPILERS)})")


def _openmp() -> str:
    """The file of the OpenMP runtime that torch has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line.rpartition("/")[2]}
    runtimes = sorted(
        f for f in loaded if Path(f).name.startswith(("libgomp", "libiomp", "libomp"))
    )
    # Another package may have brought one of its own, into a folder beside torch's.
    folder = Path(torch.__file__).resolve().parent  # as the maps name it
    torchs = folder, folder.with_name("torch.libs")
    of_torch = [f for f in runtimes if any(Path(f).is_relative_to(own) for own in torchs)]
    if len(of_torch or runtimes) != 1:
        found = ", ".join(runtimes) or "none"
        raise Unavailable(f"which OpenMP runtime torch uses is not clear (loaded: {found})")
    return (of_torch or runtimes)[0]


def _file(compiler: list[str], runtime: str) -> Path:
    """Where the library is kept."""
    return user_cache() / "kernels" / f"{_fingerprint(compiler, runtime)}.so"


def _fingerprint(compiler: list[str], runtime: str) -> str:
    """Of all that decides what the library holds."""
    program, cpu = Path(compiler[0]).resolve(), processor()
    facts = [*compiler, *FLAGS, runtime, str(program), str(program.stat().st_mtime_ns)]
    facts += [
        cpu.get(name, "") for name in ("model name", "model", "flags", "Features", "CPU part")
    ]
    digest = hashlib.sha256("\n".join(facts).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _compile(compiler: list[str], runtime: str, library: Path) -> None:
    """Objects first: given ``-fopenmp``, a linker would take a runtime of its own choice."""
    sources = sorted(SOURCES.glob("*.c"), key=lambda source: -source.stat().st_size)
    workers = ThreadPoolExecutor(cores())
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".making-") as folder:
        made = Path(folder) / library.name
        try:
            for done in [
                workers.submit(_run, [*compiler, *FLAGS, "-c", str(source)], folder)
                for source in sources
            ]:
                done.result()
        finally:  # of what has not begun nothing is of use once one has failed
            workers.shutdown(cancel_futures=True)
        objects = sorted(str(path) for path in Path(folder).glob("*.o"))
        linked = ["-shared", "-Wl,-z,defs", "-o", str(made), *objects, runtime, "-lm"]
        _run([*compiler, *linked], folder)
        with open(made, "rb") as stream:
            sync(stream)  # what a full disk or a crash cuts short ends the processes that load it
        made.replace(library)


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace",
            timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {SECONDS} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        if "__kmpc_" in done.stderr:
            first = (
                "its OpenMP is LLVM's runtime, and torch has loaded GNU's; install gcc, or set CC"
            )
        raise Unavailable(f"{command[0]} cannot compile them: {first}")
