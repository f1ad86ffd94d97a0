"""Digests of data files by block, and files compared with them: in front, or while a run trains.

A file's digest is that of the whole and of each block, so that what has changed is named by its
place. The comparison of a run takes a thread of its own at the lowest priority: it draws nothing
and writes nothing, so the run is the same with it and without.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from deepseek.config.errors import UserError
from deepseek.files import BLOCK, megabytes

BLOCK_BYTES = 64 << 20
"""Bytes of a file behind one digest."""
_SMALL = 64 << 20
"""Bytes of data that are compared before the first step: that takes a tenth of a second."""
_PATIENCE_SECONDS = 5.0
"""How long the end of a run waits for the comparison."""

Tell = Callable[[int], None]


@dataclass(frozen=True)
class FileDigest:
    """What a file of data holds."""

    sha256: str
    """Of the whole."""
    block_bytes: int = 0
    """Size of a block; 0: only the whole is known."""
    blocks: tuple[str, ...] = ()
    """sha256 of each block, in order; the last may be shorter."""

    @classmethod
    def of(cls, path: Path, tell: Tell = lambda count: None) -> FileDigest:
        """Read a file. ``tell`` gets the bytes of every piece. Raises ``OSError``."""
        whole = hashlib.sha256()
        blocks = [block.hexdigest() for block in _block_digests(path, BLOCK_BYTES, tell, whole)]
        return cls(whole.hexdigest(), BLOCK_BYTES, tuple(blocks))

    def differences(
        self, path: Path, tell: Tell = lambda count: None, first_alone: bool = False
    ) -> list[str]:
        """Where a file differs, in words; nothing if it is the same.

        Args:
            path: of the file.
            tell: gets the bytes of every piece read.
            first_alone: stop at the first difference.

        Raises:
            OSError: it cannot be read.
        """
        if not self.block_bytes:
            whole = hashlib.sha256()
            for _ in _block_digests(path, BLOCK_BYTES, tell, whole):
                pass
            return [] if whole.hexdigest() == self.sha256 else ["its content"]
        found, count = [], 0
        for count, block in enumerate(_block_digests(path, self.block_bytes, tell), 1):
            if count > len(self.blocks):
                found.append(f"bytes from {(count - 1) * self.block_bytes:,} on are too many")
                break
            if block.hexdigest() != self.blocks[count - 1]:
                begin = (count - 1) * self.block_bytes
                end = min(begin + self.block_bytes, path.stat().st_size)
                found.append(f"block {count} of {len(self.blocks)} (bytes {begin:,} to {end:,})")
                if first_alone:
                    break
        else:
            if count < len(self.blocks):
                found.append(f"blocks {count + 1} to {len(self.blocks)} are missing")
        return found


def _block_digests(
    path: Path, block_bytes: int, tell: Tell, whole: hashlib._Hash | None = None
) -> Iterator[hashlib._Hash]:
    """Digests of the blocks of a file, each as soon as it is read; ``whole`` gets every byte."""
    buffer = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as stream:
        digest, left = hashlib.sha256(), block_bytes
        while count := stream.readinto(buffer[: min(left, BLOCK)]):
            digest.update(buffer[:count])
            if whole is not None:
                whole.update(buffer[:count])
            tell(count)
            left -= count
            if not left:
                yield digest
                digest, left = hashlib.sha256(), block_bytes
        if left < block_bytes:
            yield digest


@dataclass(frozen=True)
class DataFile:
    """A file that a run reads."""

    path: Path
    recorded: FileDigest | None
    """What prepare-data wrote; None: nothing is recorded."""


class _Stopped(Exception):
    """The run is over."""


@final
class Verification:
    """Compares the files of a run with what was recorded of them, while it trains.

    Files without a record are read as a whole too: their digest goes into the checkpoints, and a
    resumed run compares with it.

    Args:
        files: what the run reads, in the order of the configuration.
    """

    def __init__(self, files: Sequence[DataFile]) -> None:
        self.files = list(files)
        self.total = sum(file.path.stat().st_size for file in files)
        """Bytes to read."""
        self.done = 0
        """Bytes read."""
        self._digests: list[str | None] = [
            file.recorded.sha256 if file.recorded else None for file in files
        ]
        self._expected: list[str | None] = [None] * len(files)
        self._failure: str | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def begun(cls, files: Sequence[DataFile]) -> Verification:
        """Of the files that are recorded, for commands that only read; begun.

        Raises:
            UserError: a file differs.
        """
        found = cls([file for file in files if file.recorded is not None])
        found.start()
        return found

    @property
    def digests(self) -> list[str | None]:
        """sha256 of each file; None as long as it is not known. For the checkpoint."""
        return list(self._digests)

    def expect(self, digests: Sequence[str | None]) -> None:
        """Compare also with the ``digests`` of a checkpoint, of the same files."""
        self._expected = list(digests)
        self.refuse_damage()

    def start(self) -> None:
        """Begin, and be through before the first step if there is little to read.

        Raises:
            UserError: a file differs.
        """
        self._thread = threading.Thread(target=self._run, name="data verification", daemon=True)
        self._thread.start()
        if self.total <= _SMALL:
            self._thread.join()
        self.refuse_damage()

    def refuse_damage(self) -> None:
        """Raise ``UserError`` if a difference has been found so far."""
        if self._failure is None:
            for file, known, expected in zip(
                self.files, self._digests, self._expected, strict=False
            ):
                if known is not None and expected is not None and known != expected:
                    self._failure = (
                        f"{file.path} is not the file that the checkpoint was trained on (sha256 "
                        f"{expected[:12]} then, {known[:12]} now); restore it, or start a new run"
                    )
        if self._failure is not None:
            raise UserError(self._failure)

    def finish(self) -> str:
        """Wait a little for the end. Returns what remains to be said, or "".

        Raises:
            UserError: a file differs.
        """
        if self._thread is None:
            return ""
        self._thread.join(_PATIENCE_SECONDS)
        self.stop()
        self.refuse_damage()
        if self.done == self.total:
            return ""
        return (
            f"{megabytes(self.done)} of {megabytes(self.total)} of the data were compared with "
            "their digests before the run was over; `deepseek data verify PREFIX` reads all"
        )

    def stop(self) -> None:
        """Read no further."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with suppress(AttributeError, OSError):  # a thread's own priority: Linux alone has it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            for number, file in enumerate(self.files):
                if file.recorded is None:
                    self._digests[number] = FileDigest.of(file.path, self._tell).sha256
                elif found := file.recorded.differences(file.path, self._tell, first_alone=True):
                    self._failure = damaged(file.path, found)
                    return
        except _Stopped:
            pass
        except OSError as error:
            self._failure = f"{file.path} cannot be read ({error.strerror}); copy it again"

    def _tell(self, count: int) -> None:
        self.done += count
        if self._over.is_set():
            raise _Stopped


def damaged(path: Path, differences: Sequence[str]) -> str:
    """The message about a file that is not what was recorded."""
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return (
        f"{path} is not what prepare-data wrote: {', '.join(differences[:3])}{more} differ; copy "
        "it again, or prepare the data again"
    )
