"""What ``deepseek doctor`` looks at, on false machines; and the verb itself, in two processes."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.launch import health
from deepseek.launch.health import (
    Check,
    compile_kernels,
    disk_check,
    kernel_check,
    local_checks,
    worst,
)
from deepseek.ops.native import build
from support.forked import FORK_WORKERS
from support.kernels import without_kernels
from support.micro_runs import MicroRuns

Usage = namedtuple("Usage", "total used free")
FILES = {
    "/proc/cpuinfo": "model name\t: A\nflags\t\t: fpu avx512_bf16 amx_bf16\n",
    "/proc/meminfo": "MemTotal:  8000000 kB\nMemFree: 1 kB\nMemAvailable:  6000000 kB\n",
}


def found(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], **options: Any
) -> dict[str, Check]:
    """The local checks by name, of a machine that has these files."""
    monkeypatch.setattr(health, "_read", lambda path: files.get(path, ""))
    given = {"local_world_size": 1, "on_gpu": False} | options
    return {check.name: check for check in local_checks(**given)}


def test_a_machine_that_is_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.process_time()
    checks = found(monkeypatch, FILES)
    assert time.process_time() - began < 0.1
    assert list(checks) == [
        "versions",
        "devices",
        "CPU",
        "threads",
        "memory",
        "/dev/shm",
        "open files",
    ]
    assert f"torch {torch.__version__}" in checks["versions"].value
    assert "bf16 by amx_bf16" in checks["CPU"].value
    assert checks["memory"] == Check("memory", "ok", "6.14 GB of 8.19 GB free")
    assert all(check.way_out == "" for check in checks.values() if check.verdict == "ok")


@pytest.mark.parametrize(
    ("threads", "processes", "way_out"),
    [
        (4, 1, ""),
        (2, 2, ""),
        (1, 6, ""),
        (3, 2, "set trainer.num_threads=2, or OMP_NUM_THREADS=2"),
        (5, 1, "set trainer.num_threads=4, or OMP_NUM_THREADS=4"),
        (2, 6, "set trainer.num_threads=1, or OMP_NUM_THREADS=1"),
    ],
)
def test_more_threads_than_cores(
    monkeypatch: pytest.MonkeyPatch, threads: int, processes: int, way_out: str
) -> None:
    monkeypatch.setattr(health, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check = found(monkeypatch, FILES, local_world_size=processes)["threads"]
    assert check.value == f"{threads} a process, {processes} x {threads} on 4 cores"
    assert check.way_out.endswith(way_out) and check.verdict == ("warn" if way_out else "ok")
    assert health._threads(processes, on_gpu=True).verdict == "ok"


def test_a_container_with_little_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: Usage(0, 0, 64 * 2**20))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    group = "/sys/fs/cgroup/memory."
    files = {
        "/proc/cpuinfo": "flags : fpu avx2\n",
        "/proc/meminfo": FILES["/proc/meminfo"],
        f"{group}max": "1000000000\n",
        f"{group}current": "900000000\n",
        "/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Kernel Module  570.86.15  Tue",
    }
    checks = found(monkeypatch, files, workers=2)
    told = {name: check.way_out for name, check in checks.items() if check.verdict == "warn"}
    assert told.keys() == {"devices", "memory", "/dev/shm", "open files"}
    assert checks["devices"].value == "CPU, though there is driver 570.86.15"
    assert "install the one for CUDA" in told["devices"] or "nvidia-smi" in told["devices"]
    assert checks["memory"].value == "100 MB of 1 GB free"
    assert checks["/dev/shm"].value == "67.1 MB free" and "--shm-size" in told["/dev/shm"]
    assert told["open files"] == "ulimit -n 1024 or more"
    assert "no bf16: trainer.precision=32" in checks["CPU"].value
    assert found(monkeypatch, files)["/dev/shm"].verdict == "ok"  # nobody shares anything there
    for ranks, verdict in ((2048, "warn"), (3800, "warn"), (8192, "fail")):  # the hard limit: 4,096
        check = found(monkeypatch, files, ranks=ranks)["open files"]
        assert check.verdict == verdict
    assert check.value == "256, at most 4,096"
    assert check.way_out == "8,192 ranks: raise the hard limit to 8,704 (ulimit -Hn) on node 0"


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    check = found(monkeypatch, FILES, local_world_size=4, on_gpu=True)["devices"]
    assert (check.verdict, check.value) == ("fail", "2 x H100")
    assert "at most one a GPU" in check.way_out


def test_the_kernels() -> None:
    assert kernel_check() == [Check("kernels", "ok", "compiled")]
    with without_kernels():
        (check,) = kernel_check()
    assert (check.verdict, check.value) == ("warn", "none")
    assert check.way_out.startswith("switched off by a test; without them")


def test_compiling_kernels_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.why_not() is None
    library = build._file(build._compiler(), build._openmp())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda *given: shutil.copy(library, given[-1]))
    told = list[str]()
    try:
        build._library.cache_clear()
        for _ in range(2):
            compile_kernels(told.append)
        assert told == ["kernels      for this CPU are compiled, once"]
    finally:
        build._library.cache_clear()


def test_kernels_that_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    told = list[str]()
    try:
        build._library.cache_clear()
        compile_kernels(told.append)
    finally:
        build._library.cache_clear()
    assert len(told) == 2 and told[1].startswith("note         kernels: none; ")
    assert "false cannot compile them: exit status 1; without them small steps" in told[1]


def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, speed = disk_check(tmp_path, 10**6)
    assert room.verdict == "ok" and room.value.endswith("free, 1 MB needed")
    assert "/s, " in speed.value and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(health, "DISK_RATE", 1e18)
    assert disk_check(tmp_path)[1].verdict == "warn"
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: Usage(0, 0, 10**9))
    room, speed = disk_check(tmp_path, 10**10)
    assert (room.verdict, room.value) == ("fail", "1 GB free, 10 GB needed")
    assert speed.value == "not measured"


def test_the_worst_of_all_ranks_is_told() -> None:
    fit, slow = Check("disk speed", "ok", "2 GB/s"), Check("disk speed", "warn", "1 MB/s", "way")
    assert worst([[fit], [slow], [slow]]) == [
        Check("disk speed", "warn", "1 MB/s (2 of 3 ranks, first 1)", "way")
    ]
    assert worst([[fit]]) == [fit] and worst([[slow]]) == [slow]
    (versions,) = worst(
        [[Check("versions", "ok", "torch 2.12")], [Check("versions", "ok", "2.13")]]
    )
    assert versions.verdict == "fail" and versions.value == "2.13 / torch 2.12"
    assert "the same torch" in versions.way_out


def test_the_verb_in_two_processes(micro: MicroRuns, tmp_path: Path) -> None:
    words = ["doctor", "--config", micro.config, "--json", "--run-dir", tmp_path / "a" / "b"]
    started = micro.cli.start(*words, "--devices", 2, before=FORK_WORKERS)
    told = json.loads(started.wait().assert_done().out)
    assert told["ranks"] == 2 and not list(tmp_path.iterdir())
    names = [check["name"] for check in told["checks"]]
    assert names[-6:] == [
        "kernels",
        "disk room",
        "disk speed",
        "clocks",
        "all-reduce",
        "all-to-all",
    ]
    assert {check["name"]: check for check in told["checks"]}["all-reduce"]["value"].endswith(
        "/s with 16.8 MB"
    )


def test_the_verb_alone_and_what_is_not_fit(micro: MicroRuns, tmp_path: Path) -> None:
    ran = micro.cli("doctor", "--run-dir", tmp_path).assert_done()
    assert "doctor: one process" in ran.out and "clocks" not in ran.out
    small = "import collections, shutil; U = collections.namedtuple('U', 'total used free')\n"
    small += "shutil.disk_usage = lambda path: U(0, 0, 1000)\n"
    micro.cli("doctor", "--run-dir", tmp_path, before=small).assert_refused(
        "not fit to train: disk room"
    )
