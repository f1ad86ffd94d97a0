"""What a run folder says of where the run ran; the peak of MFU is never guessed."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.monitoring.record import run_record
from deepseek.monitoring.record.run_record import (
    DENSE_BF16_TFLOPS,
    SIDE,
    environment,
    peak_of,
)


def test_versions_devices_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/deepseek", "train", "a.b=c d"])
    found = environment(world_size=8, num_nodes=2)
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert "Lightning" in found["framework"]
    assert (found["processes"], found["nodes"]) == (8, 2)
    assert found["cores"] == os.cpu_count()
    assert found["threads"] == torch.get_num_threads()
    assert found["command"] == "deepseek train 'a.b=c d'"
    if not torch.cuda.is_available():
        assert (found["gpu"], found["gpus"], found["cuda"]) == (None, 0, None)
    assert json.loads(json.dumps(found)) == found


def test_no_name_of_host_or_user() -> None:
    text = json.dumps(environment(1, 1) | {"command": ""})
    for name in (socket.gethostname(), getpass.getuser()):
        if len(name) > 4:  # shorter ones may be part of any word
            assert name not in text


def test_the_commit_of_a_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    try:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    except FileNotFoundError:
        pytest.skip("there is no git here")
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.setattr(run_record, "__file__", str(tmp_path / "run_record.py"))
    assert environment(1, 1)["commit"] == head.stdout[:12]


def test_without_git_or_a_tree_there_is_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_record, "__file__", str(tmp_path / "run_record.py"))
    assert environment(1, 1)["commit"] is None

    def missing(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_record.subprocess, "run", missing)
    assert environment(1, 1)["commit"] is None


def test_the_processor_is_named() -> None:
    assert environment(1, 1)["cpu"] != ""


# -- the denominator of MFU --

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_a_configured_number_wins() -> None:
    assert peak_of(CPU, 2.5).flops == 2.5e12
    assert peak_of(GPU, 900.0).source == "exp_manager.monitor.peak_tflops"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_known_gpus(monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_of(GPU, None)
    assert peak.flops == DENSE_BF16_TFLOPS[key] * 1e12
    assert f"data sheet of {key}," in peak.source


def test_an_unknown_gpu_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 9000")
    peak = peak_of(GPU, None)
    assert peak.flops is None
    assert peak.source == "unknown for Some GPU 9000: set exp_manager.monitor.peak_tflops"


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread's best product counts, for all threads; a second of them is enough."""
    ticks = iter([0.0, 0.3, 5.0, 5.2, 6.0, 6.6])
    clock = type("Clock", (), {"thread_time": staticmethod(lambda: next(ticks))})
    monkeypatch.setattr(run_record, "time", clock)
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    peak = peak_of(CPU, None)
    assert peak.flops == pytest.approx(6 * 2 * SIDE**3 / 0.2)
    assert used == [1, 6] and "6 x one thread's best of" in peak.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_peak_is_plausible(dtype: torch.dtype) -> None:
    peak = peak_of(CPU, None, dtype)
    assert peak.flops is not None and 1e8 < peak.flops < 1e14
    assert str(dtype).removeprefix("torch.") in peak.source


def test_other_programs_do_not_lower_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """MFU would be above 100 % once they have ended. Here two have the core of the products, which
    take longer than a turn of any scheduler, so that none comes through undisturbed."""
    monkeypatch.setattr(run_record, "SIDE", 1024)
    monkeypatch.setattr(run_record, "ROUNDS", 5)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        alone = peak_of(CPU, None).flops
        burn = [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"]
        with ExitStack() as others:
            for _ in range(2):
                other = others.enter_context(subprocess.Popen(burn, stdout=subprocess.PIPE))
                others.callback(other.kill)
                assert other.stdout is not None and other.stdout.readline() == b"\n"
            beside = peak_of(CPU, None).flops
    finally:
        os.sched_setaffinity(0, cores)
    assert alone is not None and beside is not None
    assert beside > 0.6 * alone
