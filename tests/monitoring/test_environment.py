"""What a run ran on: all of it plain JSON, and no name of the machine."""

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.monitoring.record import environment as environment_module
from deepseek.monitoring.record.environment import environment


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
    monkeypatch.setattr(environment_module, "__file__", str(tmp_path / "environment.py"))
    assert environment(1, 1)["commit"] == head.stdout[:12]


def test_without_git_or_a_tree_there_is_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment_module, "__file__", str(tmp_path / "environment.py"))
    assert environment(1, 1)["commit"] is None

    def missing(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment_module.subprocess, "run", missing)
    assert environment(1, 1)["commit"] is None


def test_the_processor_is_named() -> None:
    assert environment(1, 1)["cpu"] != ""
