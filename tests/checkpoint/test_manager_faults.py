"""The store when things go wrong: kills, full disks, second writers, failing ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint.checkpoint import newest_sound
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.config.errors import UserError

Driver = Callable[..., Any]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    process = subprocess.Popen(
        [sys.executable, "-m", "support.crash_driver"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(scenario: str, **arguments: Any) -> Any:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps([scenario, arguments]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield ask
    process.communicate(timeout=20)


def save(manager: CheckpointManager, step: int, version: int | None = None) -> Path:
    """A checkpoint like the driver's."""
    version = step if version is None else version
    generator = torch.Generator().manual_seed(version)
    tensors = {f"layer.{i}": torch.randn(25, 500, generator=generator) for i in range(4)}
    return manager.save(step, tensors, {"version": version})


@pytest.mark.parametrize("number", [12, pytest.param(30, marks=pytest.mark.nightly)])
def test_killed_at_random_moments(driver: Driver, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "checkpoints"
    rounds = driver("random_kills", folder=str(folder), rounds=number, seed=1)
    assert len(rounds) == number
    for found in rounds:
        # What save() said was saved is there, or the next one; nothing is damaged.
        assert found["reports"] == []
        assert found["exact"]
        assert found["step"] in (found["acknowledged"], found["acknowledged"] + 1)
    # The kills did land inside saves, early and late.
    assert sum(bool(found["left"]) for found in rounds) >= number // 4
    assert rounds[-1]["step"] >= number * 2 // 3
    CheckpointManager(folder).close()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


@pytest.mark.parametrize("number", [8, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_while_saving_in_the_background(
    driver: Driver, tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "checkpoints"
    rounds = driver("random_kills_in_background", folder=str(folder), rounds=number, seed=1)
    assert len(rounds) == number
    for found in rounds:
        assert found["reports"] == [] and found["exact"]
        # At most the save under way, and the one begun before the word of it got out.
        assert 0 <= found["step"] - found["acknowledged"] <= 2
    assert sum(bool(found["left"]) for found in rounds) >= number // 4
    CheckpointManager(folder).close()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


@pytest.mark.parametrize("step", [5, 6], ids=["same step", "next step"])
def test_killed_before_each_call(driver: Driver, tmp_path: Path, step: int) -> None:
    """keep=1: the hardest case, as there is no other checkpoint to fall back to."""
    folder = tmp_path / "checkpoints"
    with CheckpointManager(folder) as manager:
        save(manager, 5)
    points = driver("crash_points", folder=str(folder), step=step, version=77)
    versions = [point["version"] for point in points]
    # First the old one, from some point on the new one, never neither.
    assert versions == sorted(versions) and set(versions) == {5, 77}
    assert len(points) > 12
    for point in points:
        assert point["exact"] and point["reports"] == [] and point["after"] == []
    kinds = {name.split("-")[0] for point in points for name in point["left"]}
    assert kinds == ({".tmp", ".replaced", ".trash"} if step == 5 else {".tmp", ".trash"})


def test_disk_full(driver: Driver, tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep=2) as manager:
        save(manager, 7)
        save(manager, 8)
    # Too small for: anything, the first shard's end, its last tensor.
    limits = [0, 60_000, 200_000]
    *failed, last = driver("disk_full", folder=str(tmp_path), limits=limits)
    assert len(failed) == 3
    for found in failed:
        assert "failed: File too large; earlier checkpoints are untouched" in found["message"]
        assert str(tmp_path) in found["message"]
        assert found["left"] == [] and found["reports"] == []
        assert found["step"] == 8 and found["exact"]
    assert last["step"] == 9 and last["exact"]


def test_too_little_space_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    usage = (10**9, 10**9 - 100_000, 100_000)
    disk = type("Usage", (), dict(zip(("total", "used", "free"), usage, strict=True)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: disk)
    with pytest.raises(UserError) as caught:
        save(manager, 2)
    # 200,000 bytes of numbers, and 4 KiB for each of 4 tensors and the rest.
    assert "the checkpoint of step 2 needs about 0.2 MB and the disk has 0.1 MB" in str(
        caught.value
    )
    assert "or keep fewer (exp_manager.checkpoint_callback" in str(caught.value)
    assert manager.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000001"]


def test_second_writer(driver: Driver, tmp_path: Path) -> None:
    holder = driver("hold", folder=str(tmp_path), with_loader=False)
    (tmp_path / ".tmp-of-the-living").mkdir()
    with pytest.raises(UserError, match=f"process {holder['pid']} on host .* already"):
        CheckpointManager(tmp_path)
    assert (tmp_path / ".tmp-of-the-living").exists()
    assert newest_sound(tmp_path, print) is None  # reading is free
    driver("kill", pid=holder["pid"])
    with CheckpointManager(tmp_path) as manager:
        assert not (tmp_path / ".tmp-of-the-living").exists()
        save(manager, 1)


def test_loader_worker_does_not_keep_the_lock(driver: Driver, tmp_path: Path) -> None:
    holder = driver("hold", folder=str(tmp_path), with_loader=True)
    try:
        with pytest.raises(UserError, match="already"):
            CheckpointManager(tmp_path)
        driver("kill", pid=holder["pid"])
        os.kill(holder["worker"], 0)  # it lives
        for attempt in range(100):  # a process that is killed takes a moment to end
            try:
                CheckpointManager(tmp_path).close()
                break
            except UserError:
                if attempt == 99:
                    raise
                time.sleep(0.1)
    finally:
        os.kill(holder["worker"], 9)


@pytest.mark.parametrize("moment", ["shard", "state", "folder"])
def test_interruption_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Ctrl-C inside DCP, which wraps it, and outside."""
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    real, countdown = os.fsync, {"shard": 0, "state": 2, "folder": 4}[moment]

    def fsync(handle: int) -> None:
        nonlocal countdown
        if countdown == 0:
            raise KeyboardInterrupt
        countdown -= 1
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        save(manager, 2)
    monkeypatch.setattr(os, "fsync", real)
    assert manager.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000001"]
    save(manager, 2)
    assert manager.steps() == [1, 2]


def test_everything_is_synced_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path)
    synced: dict[int, int] = {}  # inode: bytes the file had
    at_rename: dict[int, int] = {}
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        real_fsync(handle)
        status = os.fstat(handle)
        synced[status.st_ino] = status.st_size

    def rename(source: Path, target: Path) -> None:
        if Path(target).name == "step_00000001":
            at_rename.update(synced)
            synced.clear()
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    path = save(manager, 1)
    for file in [path, *path.iterdir()]:
        status = file.stat()
        assert at_rename[status.st_ino] == status.st_size, file
    assert list(synced) == [tmp_path.stat().st_ino]


def test_failing_disk_while_syncing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)

    def fsync(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="failed: Input/output error"):
            save(manager, 2)
    assert manager.steps() == [1]


def test_failing_rename_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 1)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(UserError, match="step 1 in .* failed: Input/output error"):
            save(manager, 1, version=2)
    checkpoint = manager.newest_sound(print)
    assert checkpoint is not None and checkpoint.state() == {"version": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000001"]


def test_deletion_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    save(manager, 1)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target).name.startswith(".trash-"):
            raise OSError(13, "Permission denied")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        save(manager, 2)
    assert manager.steps() == [1, 2]
    assert "old checkpoints could not be deleted" in caplog.text
    save(manager, 3)
    assert manager.steps() == [3]


def test_two_ranks(driver: Driver, tmp_path: Path) -> None:
    full = torch.arange(15, dtype=torch.float64).reshape(5, 3)
    folder = tmp_path / "checkpoints"
    with CheckpointManager(folder) as manager:
        manager.save(1, {"rows": full}, {})
    answers = driver("two_ranks", folder=str(tmp_path))
    for rank, answer in enumerate(answers):
        assert answer["from_one"] == full.tolist()
        assert answer["rows"] == full.tolist() and answer["one_row"] == full[:1].tolist()
        assert answer["stage"] == [rank] * 3
        assert answer["step"] == 2 and answer["state"] == {"from": 0}
        assert answer["path"] == str(folder / "step_00000002")
        assert answer["steps"] == [1, 2] and answer["left"] == []
        # Failures of one rank, told on both.
        assert "common: rank 1 has other numbers" in answer["differing"]
        assert "common: is [3] torch.float32 on rank 1, [2] torch.float32" in answer["shapes"]
        assert answer["state_of_one"].startswith("rank 1: the state of a checkpoint cannot")
        assert "rank 1: writing to" in answer["disk_of_one"]
        assert "failed: File too large" in answer["disk_of_one"]
        assert "rank 0: " in answer["load_of_one"] and "rank 1: " not in answer["load_of_one"]
        assert "rows: has shape [5, 3], asked for [4, 3]" in answer["load_of_one"]

    # The same directory, in one process.
    checkpoint = newest_sound(folder, print)
    assert checkpoint is not None and checkpoint.step == 2
    shapes = {"rows": (5, 3), "one_row": (1, 3), "copied": (5, 3), "common": (2,)}
    assert checkpoint.tensor_shapes() == {**shapes, "stage0": (3,), "stage1": (3,)}
    names = sorted(path.name for path in checkpoint.path.glob("*.distcp"))
    assert names == ["__0_0.distcp", "__1_0.distcp"]
    rows, copied, stage1 = torch.zeros_like(full), torch.zeros_like(full), torch.zeros(3)
    checkpoint.load({"rows": rows, "copied": copied, "stage1": stage1})
    assert torch.equal(rows, full) and torch.equal(copied, full)
    assert stage1.tolist() == [1, 1, 1]
