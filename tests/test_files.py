"""Locks, durable files, room on the disk."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import socket
import time
from pathlib import Path

import pytest

from deepseek.config.errors import UserError
from deepseek.files import atomic_open, require_room, sync_folder
from deepseek.locks import Lock


def hold(path: Path, log: Path, name: str, seconds: float) -> None:
    with Lock(path, on_wait=lambda holder: _append(log, f"{name} waits for {holder}")):
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

    with Lock(lock, on_wait=waiting):
        assert named == [f"process {holder.pid} on host {socket.gethostname()}"]
    holder.join()


def test_no_room(tmp_path: Path) -> None:
    require_room(tmp_path, 1, "p.bin")
    with pytest.raises(UserError, match=r"p\.bin needs about 1,000,000,000,000\.0 MB and the disk"):
        require_room(tmp_path, 10**18, "p.bin")


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """A marker with the holder's name decides."""

    def refuse(handle: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path, marker = tmp_path / "lock", tmp_path / "lock.held"

    def owned_by(pid: int, host: str = socket.gethostname()) -> None:
        marker.write_text(f"{pid}\n{host}\n")

    with Lock(path) as lock:
        assert lock.held and marker.exists()
    assert not lock.held and list(tmp_path.iterdir()) == []
    owned_by(os.getppid())
    with pytest.raises(
        UserError, match=f"process {os.getppid()} on host .*wait for it or stop it,"
    ):
        Lock(path)
    owned_by(1, "elsewhere")
    with pytest.raises(UserError, match=r"stop it, or delete .*\.held if it is dead, or use"):
        Lock(path)
    owned_by(2**22 + 1)  # above the largest process number
    Lock(path).release()
    marker.write_text("cut off")
    with pytest.raises(UserError, match=r"another process writes .* or delete .*\.held if"):
        Lock(path)


@pytest.mark.timeout(20)
def test_a_lock_where_no_file_can_be_made_is_an_error_and_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "missing" / "lock", on_wait=print)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        Lock(tmp_path / "file" / "lock", on_wait=print)


def test_a_lock_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Lock(tmp_path / "lock")


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: int) -> None:
        def fsync(handle: int) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "fsync", fsync)

    for error in (errno.EINVAL, errno.ENOTSUP):  # network file systems that do it by themselves
        fail(error)
        sync_folder(tmp_path)
    fail(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


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
