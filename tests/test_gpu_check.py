"""``make gpu-check`` itself, in its tiny sizes on a CPU: no GPU has run it yet."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def collected(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert [name for name in command if name.endswith("test_moe.py")]
        return subprocess.CompletedProcess(command, 0, stdout="2 tests")

    monkeypatch.setattr(module.subprocess, "run", collected)
    return module


def test_every_part_runs_and_one_that_fails_hides_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "device", (lambda device: os.kill(os.getpid(), 9), 30))
    monkeypatch.setitem(gpu.PARTS, "waits", (broken, 30))
    monkeypatch.setitem(gpu.PARTS, "transformers", (lambda device: time.sleep(60), 0.3))
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "out.json")]) == 1
    said = json.loads((tmp_path / "out.json").read_text())
    assert list(said) == list(gpu.PARTS)
    errors = {name: part["error"] for name, part in said.items() if "error" in part}
    assert errors == {
        "device": "its process ended with exit code -9",
        "waits": "RuntimeError('no such kernel')",
        "transformers": "stopped after 0 s",
    }
    assert "no such kernel" in said["waits"]["traceback"]
    assert said["losses"]["sound"] and said["losses"]["largest_relative"] == 0
    assert said["base"]["tokens_per_s"] > 0 and said["slice"]["predicted_bytes"] > 0


def test_waits_are_counted(gpu: ModuleType) -> None:
    assert gpu.waits_part(torch.device("cpu"))["sound"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
