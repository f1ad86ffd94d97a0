"""Durable files: written, hashed on the way and on the disk before their name is used."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 1 << 22
"""Bytes read or buffered at once."""


@dataclass(frozen=True)
class FileEntry:
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str
    """Digest of the content, 64 hexadecimal digits."""


class HashingWriter(io.BufferedWriter):
    """A new file whose digest is of the bytes handed over, not of what the disk gives back.

    ``close`` flushes and syncs, then calls ``done`` with the entry. (Up to version 2.13 DCP syncs
    without flushing the buffer before, which would leave the last bytes to chance.)
    """

    def __init__(self, path: Path, done: Callable[[FileEntry], None]) -> None:
        super().__init__(io.FileIO(path, "x"), BLOCK)
        self.failure: OSError | None = None
        """The error of the disk; torch's own writer hides it behind one of its own."""
        self._done = done
        self._size = 0
        self._sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            count = super().write(view)
        except OSError as failure:
            self.failure = failure
            raise
        self._sha256.update(view[:count])
        self._size += count
        return count

    def close(self) -> None:
        if self.closed:
            return
        try:
            if self.failure is None:
                self.flush()
                os.fsync(self.fileno())
        except OSError as failure:
            self.failure = failure
            raise
        finally:
            # Not super().close(), which would try once more to write what cannot be written.
            self.raw.close()
        if self.failure is None:
            self._done(FileEntry(self._size, self._sha256.hexdigest()))


def write_durably(path: Path, content: bytes) -> FileEntry:
    """Write a new file and sync it. Raises ``OSError``."""
    entries: list[FileEntry] = []
    with HashingWriter(path, entries.append) as stream:
        stream.write(content)
    return entries[0]


def sha256_of(path: Path) -> str:
    """Digest of a file, read in large blocks. Raises ``OSError``."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring names made, changed or removed in ``folder`` to the disk. Raises ``OSError``."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as failure:
        # Some network file systems sync names by themselves and refuse the call.
        if failure.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
