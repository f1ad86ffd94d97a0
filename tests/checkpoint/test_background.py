"""Saving in the background: what is saved, who waits, and where errors appear."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.checkpoint import manager as manager_module
from deepseek.checkpoint.checkpoint import newest_sound
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.config.errors import UserError


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(8, 6, generator=generator)
    return {
        "a.weight": torch.randn(5, 3, generator=generator).double(),
        "a.step": torch.tensor(float(step)),
        "b.column": whole[:, 2],  # neither contiguous nor alone in its memory
        "b.rows": whole[2:4],
        "b.empty": torch.zeros(0, 4),
        "b.low": whole.bfloat16(),
    }


def overwrite(tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(-1.0)


class Gate:
    """Stops every write at its start, until opened; counts how many are under way at once."""

    def __init__(self, write: Any) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.under_way = self.most_under_way = 0
        self.write = write

    def __call__(self, *args: Any) -> Any:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.reached.set()
        assert self.open.wait(20)
        try:
            return self.write(*args)
        finally:
            self.under_way -= 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(manager_module.write_shards)
    monkeypatch.setattr(manager_module, "write_shards", gate)
    yield gate
    gate.open.set()  # the interpreter waits for the thread


def test_saved_is_what_the_tensors_were(tmp_path: Path, gate: Gate) -> None:
    expected, tensors, state = tensors_of(3), tensors_of(3), {"loss": [1.0]}
    with CheckpointManager(tmp_path) as manager:
        manager.save_in_background(3, tensors, state)
        assert gate.reached.wait(20)
        overwrite(tensors)
        state["loss"].append(2.0)
        assert manager.steps() == []  # not there before it is whole
        gate.open.set()
    checkpoint = newest_sound(tmp_path, pytest.fail)
    assert checkpoint is not None and checkpoint.step == 3
    assert checkpoint.state() == {"loss": [1.0]}
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    checkpoint.load(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_files_are_those_of_save(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "one") as manager:
        manager.save(3, tensors_of(3), {"step": 3})
    with CheckpointManager(tmp_path / "two") as manager:
        manager.save_in_background(3, tensors_of(3), {"step": 3})
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "step_00000003").iterdir()}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 4


def test_one_save_at_a_time(tmp_path: Path, gate: Gate) -> None:
    manager = CheckpointManager(tmp_path, keep=-1)
    manager.save_in_background(1, tensors_of(1), {})
    assert gate.reached.wait(20)
    threading.Timer(0.2, gate.open.set).start()
    manager.save_in_background(2, tensors_of(2), {})
    assert 1 in manager.steps()
    manager.save(3, tensors_of(3), {})
    assert manager.steps() == [1, 2, 3]
    manager.close()
    assert gate.most_under_way == 1


def test_close_waits_and_then_lets_the_next_writer_in(tmp_path: Path, gate: Gate) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save_in_background(1, tensors_of(1), {})
    threading.Timer(0.2, gate.open.set).start()
    manager.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step_00000001"]
    assert (tmp_path / ".lock").read_bytes() == b""
    manager.close()


@pytest.mark.parametrize("waits", ["save", "save_in_background", "wait", "close"])
def test_an_error_is_raised_by_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: str
) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, tensors_of(1), {})
    disk = type("Usage", (), {"total": 10**9, "used": 10**9 - 100, "free": 100})
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: disk)
        manager.save_in_background(2, tensors_of(2), {})
        arguments = (3, tensors_of(3), {}) if waits.startswith("save") else ()
        with pytest.raises(UserError, match=r"step 2 needs about .* 0\.0 MB free"):
            getattr(manager, waits)(*arguments)
    manager.wait()  # said once
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "step_00000001"]
    if waits == "close":
        assert (tmp_path / ".lock").read_bytes() == b""
        manager = CheckpointManager(tmp_path)
    manager.save_in_background(2, tensors_of(2), {})
    manager.close()
    assert manager.steps() == [1, 2]


def test_what_cannot_be_stored_is_refused_at_once(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UserError, match="on the meta device"):
            manager.save_in_background(1, {"a": torch.zeros(2, device="meta")}, {})
        with pytest.raises(UserError, match="JSON has no such number"):
            manager.save_in_background(1, tensors_of(1), {"loss": float("inf")})
        manager.wait()
        assert manager.steps() == []


def test_an_interrupted_wait_is_taken_up_again(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C: the folder must not be given back while it is written to."""
    manager = CheckpointManager(tmp_path)
    manager.save_in_background(1, tensors_of(1), {})
    wait = manager_module.wait

    def interrupted(saves: object) -> None:
        monkeypatch.setattr(manager_module, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(manager_module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.wait()
    threading.Timer(0.2, gate.open.set).start()
    manager.close()
    assert manager.steps() == [1]
