"""Who may write a file, and who reads it: locks that end with their process."""

from __future__ import annotations

import errno
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError

LOCK = ".lock"
"""Lock file of a folder that one process at a time writes."""


class Lock:
    """The lock file ``path``, which names its holder: held from construction to ``release``.

    The system lets go of it when its holder dies, in whatever way; a forked child does not share
    it. Where the file system has no locks a marker beside it decides, which after a death on
    another machine is to be deleted. As a context manager it leaves no file behind.

    Args:
        path: made if missing.
        on_wait: called once with the holder's name, and then the lock is waited for. None: another
            process is not waited for, and a lock of this one is taken over: it is a leftover, such
            as that of an interrupted training in a notebook, and is no longer ``held``.

    Raises:
        UserError: another process has it, and ``on_wait`` is None.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, on_wait: Callable[[str], None] | None = None) -> None:
        from filelock import FileLock, SoftFileLock  # takes 40 ms; few commands lock

        self.path = path.resolve()
        # filelock takes a place where no file can be made for one that another is just making.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644))
        if on_wait is None and (earlier := _HELD.get(self.path)) is not None:
            earlier.release()
        self._lock: Any = FileLock(
            self.path, thread_local=False, fallback_to_soft=False, on_acquired=_sign
        )
        try:
            self._take(on_wait)
        except OSError as failure:
            if failure.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            self._lock = SoftFileLock(_marker(self.path), thread_local=False)
            self._take(on_wait)
        _HELD[self.path] = self

    @property
    def held(self) -> bool:
        return bool(self._lock.is_locked)

    def release(self) -> None:
        """Let the next one in. A second call does nothing."""
        if self.held:
            with suppress(OSError):
                os.truncate(self.path, 0)
            self._lock.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.path.unlink(missing_ok=True)
        self.release()

    def _take(self, on_wait: Callable[[str], None] | None) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            marker = Path(self._lock.lock_file)
            who, here = _holder(marker)
            if on_wait is None:
                dead = "" if marker == self.path or here else f", or delete {marker} if it is dead"
                raise UserError(
                    f"{self.path.parent}: {who} writes here already; wait for it or stop it{dead}, "
                    "or use another folder"
                ) from None
            on_wait(who)
            self._lock.acquire()


# The locks of this process, for a later one on the same file.
_HELD: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


def _marker(path: Path) -> Path:
    """Beside a lock file, where the file system has no locks."""
    return path.with_name(path.name + ".held")


def _sign(handle: int) -> None:
    os.ftruncate(handle, 0)
    # As in the markers of filelock, so that both are read alike.
    os.pwrite(handle, f"{os.getpid()}\n{socket.gethostname()}\n".encode(), 0)


def _holder(path: Path) -> tuple[str, bool]:
    """Who wrote the lock file ``path``, and whether it is a process of this machine."""
    try:
        pid, host = path.read_text(errors="replace").splitlines()[:2]
    except (OSError, ValueError):
        return "another process", False
    return f"process {pid} on host {host}", host == socket.gethostname()


def is_locked(path: Path) -> bool:
    """Whether a process has the lock file ``path``; nothing is written, and nobody is kept out.

    A holder signs the file, and empties it at its orderly end. A signature may be of the dead: on
    this machine its process is looked up, and then the system is asked.
    """
    try:
        if (marker := _marker(path)).exists():
            return _may_live(marker)
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if not os.fstat(handle).st_size or not _may_live(path):
            return False
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as failure:
        return failure.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(handle)
    return False


def _may_live(path: Path) -> bool:
    """Whether the signer of a lock file can be alive; of another machine's that is not known."""
    who, here = _holder(path)
    try:
        if here:
            os.kill(int(who.split()[1]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


class Hold:
    """A reader's hold on the file ``path``, until ``release``, garbage collection or death.

    It keeps away who asks ``unless_held`` before deleting. Nothing is written. Where the file
    system has no locks, nothing is held. Raises ``OSError`` if the file is not there.
    """

    def __init__(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.release = weakref.finalize(self, os.close, handle)
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


@contextmanager
def unless_held(path: Path) -> Iterator[bool]:
    """Whether no reader has a ``Hold`` on ``path``; none gets one before the block ends."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDWR)
    except (ImportError, OSError):
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as failure:
            yield failure.errno not in (errno.EAGAIN, errno.EACCES)
        else:
            yield True
    finally:
        os.close(handle)
