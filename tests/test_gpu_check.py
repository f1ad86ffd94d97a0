"""``make gpu-check`` itself, in its tiny sizes on a CPU: no GPU has run it yet."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek.config import load_config
from deepseek.config.rules import check
from deepseek.config.schema import RunConfig, TrainerConfig
from support.forked import is_running


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks/gpu.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def collected(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert [name for name in command if name.endswith("test_moe.py")]
        return subprocess.CompletedProcess(command, 0, stdout="2 tests")

    monkeypatch.setattr(module.subprocess, "run", collected)
    monkeypatch.setattr(module, "CPU_PATIENCE", 1)
    return module


def test_every_part_runs_and_one_that_fails_hides_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "device", (lambda device: os.kill(os.getpid(), 9), 30))
    monkeypatch.setitem(gpu.PARTS, "waits", (broken, 30))
    monkeypatch.setitem(gpu.PARTS, "transformers", (lambda device: time.sleep(60), 0.3))
    monkeypatch.setitem(gpu.PARTS, "compile", (lambda device: {"sound": False}, 30))
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
    assert said["base"]["sound"] and not said["compile"]["sound"]
    assert said["group"]["sound"]


def test_what_a_part_has_started_ends_with_it(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pytest, which would hold the GPU."""

    def starts(device: torch.device) -> dict[str, Any]:
        child = os.fork()
        if child == 0:
            time.sleep(60)
        (tmp_path / "pid").write_text(str(child))
        time.sleep(60)
        return {}

    monkeypatch.setitem(gpu.PARTS, "device", (starts, 1))
    assert gpu.in_own_process("device", "cpu", 0.5) == {"error": "stopped after 0 s"}
    child, end = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_parts_have_time_and_end_within_eight_minutes(gpu: ModuleType) -> None:
    """Also if each takes what it may: the tests then have what is left."""
    limits = {name: limit for name, (_, limit) in gpu.PARTS.items()}
    assert gpu.LIMIT_S + 5 < 480 and list(limits)[-1] == "tests"
    assert sum(limits.values()) - limits["tests"] + 15 <= gpu.LIMIT_S


def test_memory_far_from_the_predicted_is_not_sound(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(gpu, "train_step", lambda *_, **__: (lambda: 1.0, 8))
    monkeypatch.setattr(gpu, "_seconds", lambda *_: 1.0)
    monkeypatch.setattr(gpu, "peak_of", lambda *_: SimpleNamespace(flops=1e12, source="told"))
    model = gpu._base(torch.device("cpu"))
    predicted = gpu.speed(model, torch.device("cpu"))["predicted_bytes"]
    for share, sound in ((1.0, True), (1.05, True), (1.2, False), (0.8, False)):
        measured = int(share * predicted)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _, m=measured: m)
        assert gpu.speed(model, torch.device("cuda"))["sound"] is sound


def test_sizes_of_torchtitan(gpu: ModuleType) -> None:
    """A stand-in for its configuration of the 16B, with the names that are read."""

    def linear(width: int) -> SimpleNamespace:
        return SimpleNamespace(w1=SimpleNamespace(out_features=width))

    attention = SimpleNamespace(
        n_heads=16, q_lora_rank=0, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128,
    )  # fmt: skip
    moe = SimpleNamespace(
        num_experts=64,
        router=SimpleNamespace(top_k=6),
        routed_experts=SimpleNamespace(inner_experts=SimpleNamespace(hidden_dim=1408)),
        shared_experts=linear(2816),
    )
    dense = SimpleNamespace(attention=attention, feed_forward=linear(10944), moe=None)
    layers = [dense, SimpleNamespace(attention=attention, moe=moe)]
    titan = SimpleNamespace(dim=2048, vocab_size=102400, layers=layers)
    model = gpu.as_titan(titan)
    assert check(RunConfig(trainer=TrainerConfig(devices=1), model=model)) == []
    lite = load_config("moonlight_16b").model
    assert (model.n_shared_experts, model.q_lora_rank) == (2, None)
    assert model.moe_intermediate_size == lite.moe_intermediate_size


def test_waits_are_counted(gpu: ModuleType) -> None:
    assert gpu.waits_part(torch.device("cpu"))["sound"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
