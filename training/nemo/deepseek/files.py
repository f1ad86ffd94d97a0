"""Files that are whole or absent: durable writing, folders that take long, errors of the disk."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from deepseek.config.errors import UserError
from deepseek.locks import LOCK, Lock

BLOCK = 1 << 22
"""Bytes read or buffered at once."""


# -- writing -------------------------------------------------------------------------------------


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
                sync(self)
        except OSError as failure:
            self.failure = failure
            raise
        finally:
            # Not super().close(), which would try once more to write what cannot be written.
            self.raw.close()
        if self.failure is None:
            self._done(FileEntry(self._size, self._sha256.hexdigest()))


def user_cache() -> Path:
    """Folder of what is made once for a user.

    Raises:
        UserError: the user has no home, as in a container that runs under any number.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "deepseek"
    try:
        return Path.home() / ".cache" / "deepseek"
    except RuntimeError:
        raise UserError(
            "this user has no home folder to keep a cache in; set "
            "XDG_CACHE_HOME to a folder of yours"
        ) from None


def write_durably(path: Path, content: bytes) -> FileEntry:
    """Write a new file and sync it. Raises ``OSError``."""
    entries: list[FileEntry] = []
    with HashingWriter(path, entries.append) as stream:
        stream.write(content)
    return entries[0]


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


def sync(stream: IO[bytes] | io.BufferedWriter) -> None:
    """Push everything written so far down to the disk. Raises ``OSError``."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Bring names made, changed or removed in ``folder`` to the disk. Raises ``OSError``.

    Where a folder cannot be opened (Windows) or synced (some network file systems, which do it by
    themselves) there is nothing to do.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as failure:
        if failure.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Digest of a file, read in large blocks. Raises ``OSError``."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def zip_damage(path: Path) -> str | None:
    """What is wrong with a zip archive of ``torch.save``, in words; None: nothing.

    torch does not look at the archive's own CRC-32. Where it was told not to write them
    (``torch.serialization.set_crc32_options``) they are 0. It never compresses: what is compressed
    may be a few bytes that unpack to all memory.

    Raises:
        zipfile.BadZipFile, NotImplementedError, RuntimeError: it is no zip archive.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                return f"{member.filename} is compressed, which torch.save never does"
        for member in members:
            try:
                with archive.open(member) as stream:
                    while member.CRC and stream.read(BLOCK):
                        pass
            except (zipfile.BadZipFile, EOFError):
                return f"the check sum of {member.filename} is wrong"
    return None


def has_size(path: Path, entry: FileEntry) -> bool:
    """Whether the file is there as long as it was written."""
    return path.is_file() and path.stat().st_size == entry.size


def add_suffix(prefix: Path, suffix: str) -> Path:
    """``P`` + ``.bin``; unlike ``with_suffix`` it keeps dots that are part of the name."""
    return prefix.with_name(prefix.name + suffix)


# -- folders that take long ----------------------------------------------------------------------

_NOTES = ".done"
_PLAN = ".plan.json"


class Staging:
    """The unfinished folder of ``target``: whole under its name, or not there.

    It is built as ``.NAME.partial`` beside it and renamed at the end; one process at a time works
    on it. Parts that are done are noted, so that work that was cut short goes on instead of
    starting again; what is refused before it has written anything leaves no folder.

    Args:
        target: must not exist, or be an empty folder.
        plan: what the result depends on, as JSON. What is left of work with another plan is thrown
            away.

    Raises:
        UserError: ``target`` exists, its parent cannot be written, or another process is at it.
    """

    def __init__(self, target: Path, plan: Mapping[str, Any]) -> None:
        self.target = target
        refuse_existing(target)
        self.folder = target.absolute().parent / f".{target.absolute().name}.partial"
        with disk_errors(f"starting {self.folder}", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder / LOCK)
            text = json.dumps(plan, sort_keys=True).encode()
            if not self._is_of(text):
                self._clear()
                (self.folder / _NOTES).mkdir()
                write_durably(self.folder / _PLAN, text)

    def note(self, part: str) -> dict[str, Any] | None:
        """What was noted of a part that is done; None if it is not."""
        try:
            note = json.loads(self._note(part).read_bytes())
        except (OSError, ValueError):
            return None
        return note if isinstance(note, dict) else None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file anew, and sync it. Raises ``OSError``."""
        (self.folder / name).unlink(missing_ok=True)
        write_durably(self.folder / name, content)

    def require_room(self, nbytes: int, what: str) -> None:
        """Raise UserError unless the disk has room for what is left of ``nbytes``."""
        written = sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
        require_room(self.folder, max(0, nbytes - written), what)

    def done(self, part: str, note: Mapping[str, Any]) -> None:
        """Note that ``part`` is written and synced; ``note`` is JSON."""
        with atomic_open(self._note(part)) as stream:
            stream.write(json.dumps(note).encode())

    def finish(self) -> None:
        """Give the folder its name."""
        with disk_errors(f"finishing {self.target}", self.folder):
            shutil.rmtree(self.folder / _NOTES)
            (self.folder / _PLAN).unlink()
            self._lock.path.unlink()
            sync_folder(self.folder)
            refuse_existing(self.target)
            self.folder.rename(self.target)
            sync_folder(self.folder.parent)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is not None and self._is_empty():  # refused before it began
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _is_empty(self) -> bool:
        """Whether there is nothing to go on with."""
        try:
            own = {path.name for path in self.folder.iterdir()} <= {_NOTES, _PLAN, LOCK}
            return own and not any((self.folder / _NOTES).iterdir())
        except OSError:
            return False

    def _note(self, part: str) -> Path:
        return self.folder / _NOTES / f"{part}.json"

    def _is_of(self, plan: bytes) -> bool:
        try:
            return (self.folder / _PLAN).read_bytes() == plan and (self.folder / _NOTES).is_dir()
        except OSError:
            return False

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif not path.name.startswith(LOCK):
                path.unlink()


def refuse_existing(target: Path) -> None:
    """Raise UserError unless ``target`` is free, or an empty folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UserError(
            f"{target} exists already and nothing is overwritten; give another name, or delete it"
        )


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        UserError: it does, or it cannot be written.
    """
    refuse_existing(path)
    write_whole(path, text)


def write_whole(path: Path, text: str, way_out: str = "", folders: bool = False) -> None:
    """Write a file whole or not at all, in place of one of this name; a pipe or device is written
    to, and what a link points to is the file.

    Args:
        way_out: ends the message of the error.
        folders: make those above it too.

    Raises:
        UserError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if folders:
            target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
        else:
            with atomic_open(target) as stream:
                stream.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}{way_out}") from error


# -- what the disk says --------------------------------------------------------------------------


@contextmanager
def disk_errors(doing: str, kept: Path | None = None) -> Iterator[None]:
    """Turn errors of the disk into ``UserError``; what is done stays in the folder ``kept``."""
    try:
        yield
    except OSError as failure:
        name = f" ({failure.filename})" if failure.filename else ""
        again = (
            "; mend it and give the same command again, which goes on from what is done "
            f"(in {kept}, to be deleted if you do not)"
        )
        raise UserError(
            f"{doing} failed: {failure.strerror}{name}{again if kept else ''}"
        ) from failure


def require_room(
    folder: Path, needed: int, what: str, way_out: str = "choose another disk"
) -> None:
    """Raise UserError unless the disk of ``folder`` has ``needed`` bytes free for ``what``."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs about {megabytes(needed)} and the disk has "
            f"{megabytes(free)} free; free {megabytes(needed - free)} or {way_out}"
        )


def megabytes(count: int) -> str:
    """``count`` bytes in MB (10^6), one decimal."""
    return f"{count / 1e6:,.1f} MB"
