"""Files that are whole or absent: atomic writes, a lock between processes, room on the disk."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deepseek.config.errors import UserError


def add_suffix(prefix: Path, suffix: str) -> Path:
    """``P`` + ``.bin``; unlike ``with_suffix`` it keeps dots that are part of the name."""
    return prefix.with_name(prefix.name + suffix)


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing bytes under a temporary name; it appears whole, or not at all.

    The name is unique, so two processes that write the same file never mix their bytes: the last
    rename wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            sync(stream)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(stream: IO[bytes]) -> None:
    """Push everything written so far down to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the system can open a folder (Windows cannot)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``; wait while another process holds it.

    The file names its holder (host and pid), and is gone afterwards. The system drops the lock when
    its holder dies, however it dies. ``on_wait`` is called once, with the holder's name, if there
    is one. On Windows nothing is locked.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    waited = False
    while True:
        stream = open(path, "a+b")
        try:
            if not waited:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                fcntl.flock(stream, fcntl.LOCK_EX)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().decode("utf-8", "replace").strip()
            stream.close()
            on_wait(holder or "another process")
            waited = True
            continue
        except OSError as error:
            stream.close()
            raise UserError(
                f"{path}: this file system has no file locks ({error.strerror}), so two processes "
                "could write the same data at once; choose a folder on another disk"
            ) from error
        except BaseException:
            stream.close()
            raise
        # The holder before us removed the file: what we locked may no longer be what others see.
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
            break
        stream.close()
    try:
        stream.truncate(0)
        stream.write(f"{socket.gethostname()} pid {os.getpid()}\n".encode())
        stream.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        stream.close()


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise UserError unless the disk of ``folder`` has ``needed`` bytes free for ``what``."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs about {megabytes(needed)} and the disk has "
            f"{megabytes(free)} free; free {megabytes(needed - free)} or choose another disk"
        )


def megabytes(count: int) -> str:
    """``count`` bytes in MB (10^6), one decimal."""
    return f"{count / 1e6:,.1f} MB"
