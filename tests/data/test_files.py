"""Locks and room on the disk."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from deepseek.config.errors import UserError
from deepseek.files import atomic_open, exclusive, require_room


def hold(path: Path, log: Path, name: str, seconds: float) -> None:
    with exclusive(path, on_wait=lambda holder: _append(log, f"{name} waits for {holder}")):
        _append(log, f"{name} in")
        time.sleep(seconds)
        _append(log, f"{name} out")


def _append(log: Path, line: str) -> None:
    with open(log, "a") as stream:
        stream.write(line + "\n")


def test_one_at_a_time(tmp_path: Path) -> None:
    lock, log = tmp_path / "lock", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=hold, args=(lock, log, f"p{k}", 0.05), daemon=True) for k in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    lines = [line for line in log.read_text().splitlines() if "waits" not in line]
    assert len(lines) == 12
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert begin.split()[0] == end.split()[0], "two held the lock at once"
    assert not lock.exists()


def test_the_holder_is_named_and_its_death_frees_the_lock(tmp_path: Path) -> None:
    lock, log = tmp_path / "lock", tmp_path / "log"
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(lock, log, "p", 60))
    holder.start()
    while not log.exists():
        time.sleep(0.005)
    named = []

    def waiting(name: str) -> None:
        named.append(name)
        holder.kill()

    with exclusive(lock, on_wait=waiting):
        assert named == [f"{os.uname().nodename} pid {holder.pid}"]
    holder.join()


def test_no_room(tmp_path: Path) -> None:
    require_room(tmp_path, 1, "p.bin")
    with pytest.raises(UserError, match=r"p\.bin needs about 1,000,000,000,000\.0 MB and the disk"):
        require_room(tmp_path, 10**18, "p.bin")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match=r"no file locks \(Function not implemented\).*another disk"),
        exclusive(tmp_path / "lock", on_wait=print),
    ):
        pass


def test_atomic_open_gives_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_open(path) as stream:
        stream.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_open(path) as stream:
        stream.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
