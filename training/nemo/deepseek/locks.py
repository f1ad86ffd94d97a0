"""The lock of a checkpoint folder: one writer at a time.

The lock belongs to the kernel (``flock`` on ``.lock``), which lets go of it when the process dies
in whatever way; there is nothing to clean by hand. The file also names its owner, for the message
to the second writer. Where the file system has no locks that record alone decides, which leaves a
gap of milliseconds and, after a death on another machine, a file to delete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from deepseek.config.errors import UserError

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class FolderLock:
    """Held from construction to ``release``, garbage collection or death.

    A later lock of the same process takes the folder over: the earlier one is a leftover, such as
    that of an interrupted training in a notebook, and is no longer ``held``.

    Raises ``UserError`` if another process holds it, ``OSError`` if the file cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        if (earlier := _HELD.get(self._folder)) is not None:
            earlier.release()
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._take(handle)
            owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(handle, 0)
            os.pwrite(handle, owner.encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        self._finalizer = weakref.finalize(self, _let_go, handle)
        _HELD[self._folder] = self

    @property
    def held(self) -> bool:
        return self._finalizer.alive

    def release(self) -> None:
        """Let the next writer in. A second call does nothing."""
        self._finalizer()

    def forget(self) -> None:
        """Give up this process's handle and leave the lock to the others that share it."""
        if self._finalizer.detach() is not None:
            os.close(self._handle)

    def _take(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(_owner(handle), "wait for it or stop it") from None
        except OSError as failure:
            if failure.errno not in _UNSUPPORTED:
                raise
            owner = _owner(handle)
            host, pid = owner.get("host"), owner.get("pid")
            if host not in (None, socket.gethostname()):
                way_out = f"stop it, or delete {self._folder / LOCK} if it is dead"
                raise self._refusal(owner, way_out) from None
            if isinstance(pid, int) and pid != os.getpid() and _is_alive(pid):
                raise self._refusal(owner, "wait for it or stop it") from None

    def _refusal(self, owner: dict[str, object], way_out: str) -> UserError:
        who = f"process {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')}"
        return UserError(
            f"{self._folder}: {who} writes checkpoints here already; {way_out}, "
            "or use another run folder"
        )


def _owner(handle: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _let_go(handle: int) -> None:
    os.ftruncate(handle, 0)
    os.close(handle)


# The locks of this process, for the two who must find them: a later lock on the same folder, and a
# forked child. A child shares its parent's locks, and a loader worker that outlives its killed
# parent would keep the next start out.
_HELD: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()


def _forget_all() -> None:
    for lock in list(_HELD.values()):
        lock.forget()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_all)
