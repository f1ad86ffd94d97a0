"""Whether machines and the network between them are fit to train on: facts, verdicts, ways out.

``local_checks`` look at one machine and take milliseconds; ``disk_check`` writes, and
``group_checks`` exchange tensors with the other ranks. ``worst`` makes one list of those of all.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from deepseek import __version__
from deepseek.config.processor import cores
from deepseek.files import disk_errors
from deepseek.launch.processes import USUAL_FILES, store_files
from deepseek.ops.native import build

Verdict = Literal["ok", "warn", "fail"]
VERDICTS: tuple[Verdict, ...] = ("ok", "warn", "fail")
GIB, MIB = 2**30, 2**20
SHARED_MEMORY = 1 * GIB
"""Of /dev/shm: NCCL takes some 10 MB for a pair of ranks, data loaders their batches."""
DISK_BYTES = 64 * MIB
DISK_RATE = 100e6
"""Bytes a second below which a disk is slow for checkpoints."""
CLOCK_SECONDS = 1.0
PAYLOAD = 16 * MIB
REPEATS = 5
LINK_RATE = 0.1e9
"""Bytes a second of one rank below which the link between ranks is called slow."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    value: str
    way_out: str = ""
    """Empty if all is well."""

    @classmethod
    def judged(cls, name: str, value: str, way_out: str, verdict: Verdict, bad: bool) -> Check:
        """``ok`` with the value alone, or ``verdict`` with the way out if it is ``bad``."""
        return cls(name, verdict, value, way_out) if bad else cls(name, "ok", value)


def local_checks(
    local_world_size: int, on_gpu: bool, workers: int = 0, ranks: int = 1
) -> list[Check]:
    """Of this machine; nothing is written and nobody waited for.

    Args:
        local_world_size: processes that are to run here.
        on_gpu: whether they are to use GPUs.
        workers: of each one's data loader.
        ranks: of all machines.
    """
    found = [_versions(), _devices(local_world_size, on_gpu), _cpu()]
    found += [_threads(local_world_size, on_gpu), _memory()]
    shares = workers > 0 or (local_world_size > 1 and on_gpu)
    return [*found, *_shared_memory(shares), *_open_files(ranks)]


def kernel_check() -> list[Check]:
    """Whether there are kernels in C for CPUs; they are compiled if nobody has."""
    reason = build.why_not()
    way_out = f"{reason}; without them small steps on CPUs, as in decoding, take longer"
    return [
        Check.judged("kernels", "none" if reason else "compiled", way_out, "warn", bool(reason))
    ]


def compile_kernels(tell: Callable[[str], None]) -> None:
    """Those for CPUs, if nobody has: it takes seconds, in which a program would say nothing.

    Args:
        tell: is given a line, and another one if it fails.
    """
    if not build.must_compile():
        return
    tell("kernels      for this CPU are compiled, once")
    for check in kernel_check():
        if check.verdict != "ok":
            tell(f"note         {check.name}: {check.value}; {check.way_out}")


def worst(of_ranks: Sequence[Sequence[Check]]) -> list[Check]:
    """The same checks of several ranks as one list: each as the rank found it that is worst off.

    One that fails in words of its own, such as a version that differs, fails for all.
    """
    merged = []
    for checks in zip(*of_ranks, strict=True):
        hardest = max(checks, key=lambda check: VERDICTS.index(check.verdict))
        ranks = [rank for rank, check in enumerate(checks) if check.verdict == hardest.verdict]
        if hardest.verdict != "ok" and 1 < len(checks):
            who = f"{len(ranks)} of {len(checks)} ranks, first {ranks[0]}"
            hardest = replace(hardest, value=f"{hardest.value} ({who})")
        elif len({check.value for check in checks}) > 1 and hardest.name == "versions":
            others = sorted({check.value for check in checks})
            hardest = Check(
                "versions",
                "fail",
                " / ".join(others),
                "install the same torch and deepseek on every machine",
            )
        merged.append(hardest)
    return merged


def disk_check(folder: Path, needed: int = 0) -> list[Check]:
    """Room and speed of the run folder's disk, by a file that is written there and removed.

    Args:
        folder: that exists.
        needed: bytes of the checkpoints that are to lie there at one time.
    """
    free = shutil.disk_usage(folder).free
    room = Check.judged(
        "disk room",
        f"{_size(free)} free" + (f", {_size(needed)} needed" if needed else ""),
        "free some, or choose another --run-dir",
        "fail",
        free < max(needed, DISK_BYTES),
    )
    if room.verdict != "ok":
        return [room, Check("disk speed", "warn", "not measured", "there is no room to write")]
    path, block = folder / f".doctor.{os.getpid()}", os.urandom(MIB)
    began = time.perf_counter()
    try:
        with disk_errors(f"writing {path}"), open(path, "wb", buffering=0) as file:
            for _ in range(DISK_BYTES // MIB):
                file.write(block)
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    rate = DISK_BYTES / (time.perf_counter() - began)
    save = f", {needed / rate:,.0f} s for one such rank to write it all" if needed else ""
    return [
        room,
        Check.judged(
            "disk speed",
            f"{_size(rate)}/s{save}",
            "checkpoints take long: save less often, or in the background (async_save)",
            "warn",
            rate < DISK_RATE,
        ),
    ]


def group_checks(device: torch.device) -> list[Check]:
    """Clocks, and bandwidth between the ranks of the default process group; a collective.

    Sums must be right, too. Rates are what one rank sends, in bytes of its own tensor a second.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    dist.barrier()
    now = torch.tensor([time.time()], dtype=torch.float64, device=device)
    clocks = [torch.empty_like(now) for _ in range(world)]
    dist.all_gather(clocks, now)
    apart = float(max(clocks) - min(clocks))  # with what the barrier leaves, a few milliseconds
    found = [
        Check.judged(
            "clocks",
            f"{apart:.3f} s apart",
            "times in logs and of files contradict each other: let NTP or chrony set the clocks",
            "warn",
            apart > CLOCK_SECONDS,
        )
    ]
    own = torch.full((PAYLOAD // 4 // world * world,), float(rank), device=device)
    out = torch.empty_like(own)
    total = own.clone()
    dist.all_reduce(total)
    dist.all_to_all_single(out, own)
    is_right = bool((total == world * (world - 1) / 2).all()) and all(
        bool((part == peer).all()) for peer, part in enumerate(out.chunk(world))
    )
    for name, call in (
        ("all-reduce", lambda: dist.all_reduce(total.zero_())),
        ("all-to-all", lambda: dist.all_to_all_single(out, own)),
    ):
        rate = _rate(call, own)
        found.append(
            Check.judged(
                name,
                f"{_size(rate)}/s with {_size(own.numel() * 4)}",
                "the wrong network? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the right one",
                "warn",
                rate < LINK_RATE,
            )
            if is_right
            else Check(name, "fail", "wrong results", "memory or network are broken: drain a node")
        )
    return found


def _rate(call: object, payload: torch.Tensor) -> float:
    def wait() -> None:
        if payload.device.type == "cuda":
            torch.cuda.synchronize()

    assert callable(call)
    call()
    wait()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(REPEATS):
        call()
    wait()
    return REPEATS * payload.numel() * payload.element_size() / (time.perf_counter() - began)


# -- one machine --


def _versions() -> Check:
    value = f"deepseek {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    if torch.cuda.is_available():
        value += (
            f", CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        )
    return Check("versions", "ok", value)


def _devices(local_world_size: int, on_gpu: bool) -> Check:
    driver = _driver()
    if on_gpu:
        count = torch.cuda.device_count()
        kind = torch.cuda.get_device_name()
        return Check.judged(
            "devices",
            f"{count} x {kind}" + (f", driver {driver}" if driver else ""),
            f"{local_world_size} processes are to run here: at most one a GPU",
            "fail",
            count < local_world_size,
        )
    return Check.judged(
        "devices",
        "CPU" + (f", though there is driver {driver}" if driver else ""),
        f"torch is for CUDA {torch.version.cuda} and finds no GPU: what does nvidia-smi say?"
        if torch.version.cuda
        else "this torch is for CPUs: install the one for CUDA, or set trainer.accelerator=cpu",
        "warn",
        driver is not None and not torch.cuda.is_available(),
    )


def _driver() -> str | None:
    text = _read("/proc/driver/nvidia/version")
    match = re.search(r"Kernel Module\D*([\d.]+)", text)
    return match[1] if match else None


def _cpu() -> Check:
    flags = set(next((line.split() for line in _lines("/proc/cpuinfo", "flags")), []))
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx_ne_convert") if flag in flags]
    bf16 = f"bf16 by {fast[0]}" if fast else "no bf16: trainer.precision=32 is faster here"
    return Check("CPU", "ok", f"{cores()} cores, {bf16 if flags else 'kind unknown'}")


def _threads(local_world_size: int, on_gpu: bool) -> Check:
    """More of them than cores wait for each other, after each small step."""
    threads, fair = torch.get_num_threads(), max(1, cores() // local_world_size)
    return Check.judged(
        "threads",
        f"{threads} a process, {local_world_size} x {threads} on {cores()} cores",
        f"they take turns: set trainer.num_threads={fair}, or OMP_NUM_THREADS={fair}",
        "warn",
        not on_gpu and threads > fair,
    )


def _memory() -> Check:
    kilobytes = {line.split(":")[0]: line.split()[1] for line in _lines("/proc/meminfo", "Mem")}
    if "MemAvailable" not in kilobytes:
        return Check("memory", "ok", "unknown")
    total, free = (1024 * int(kilobytes[name]) for name in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal() and int(limit) < total:  # of a container or a job
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = int(limit)
        free = min(free, total - int(used or 0))
    return Check.judged(
        "memory",
        f"{_size(free)} of {_size(total)} free",
        "end what else runs here, or give the job more",
        "warn",
        free < GIB,
    )


def _shared_memory(used: bool) -> list[Check]:
    if not Path("/dev/shm").is_dir():
        return []
    free = shutil.disk_usage("/dev/shm").free
    way_out = (
        "NCCL and data loaders share memory there: docker run --shm-size 8g or --ipc=host; in "
        "Kubernetes an emptyDir of medium Memory"
    )
    few = used and free < SHARED_MEMORY
    return [Check.judged("/dev/shm", f"{_size(free)} free", way_out, "warn", few)]


def _open_files(ranks: int) -> list[Check]:
    try:
        import resource
    except ImportError:  # Windows
        return []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if one == resource.RLIM_INFINITY else one for one in limits)
    value = "unlimited" if soft == math.inf else f"{soft:,}"
    wanted = store_files(ranks)
    if hard < wanted:  # the soft one is raised as far as there is need to
        way_out = f"{ranks:,} ranks: raise the hard limit to {wanted:,} (ulimit -Hn) on node 0"
        verdict: Verdict = "fail" if hard < ranks else "warn"
        return [Check("open files", verdict, f"{value}, at most {hard:,}", way_out)]
    way_out = f"ulimit -n {USUAL_FILES} or more"
    return [Check.judged("open files", value, way_out, "warn", soft < USUAL_FILES)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _lines(path: str, start: str) -> list[str]:
    return [line for line in _read(path).splitlines() if line.startswith(start)]


def _size(count: float) -> str:
    """In units of 1000, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
