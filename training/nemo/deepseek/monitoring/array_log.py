"""``*.arrays``: an append-only file of numpy arrays, one record a logged step.

A record is, little-endian::

    4 bytes   magic "DSA1"
    4 bytes   length of the header
    4 bytes   length of the payload
    4 bytes   crc32 of the two lengths and the header
    4 bytes   crc32 of the payload
    header    JSON: {"step": n, "arrays": [[name, dtype, shape, packed bytes], ...], "meta": {...}}
    payload   the arrays in that order, each grouped by byte significance, then zlib level 1

Grouping puts the high bytes of small integers side by side, where they compress to almost nothing.
A record reaches the file in one write, so a kill leaves at most one torn record, at the end:
readers ignore it, and the writer cuts it off before it goes on. A resumed run repeats steps: the
later record of a step wins. No torch here: reports and monitors read this file where only numpy is
at hand.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"DSA1"
_LENGTHS = struct.Struct("<II")
_PREFIX = struct.Struct("<4sIIII")
_LARGEST_HEADER = 1 << 24


class ArrayLog:
    """Appends records to one file; the folder and the file are made at the first one.

    Args:
        path: the file; whatever an earlier process left half written is cut off before the first
            record of this one. One process writes a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = False

    def append(self, step: int, arrays: dict[str, np.ndarray], **meta: Any) -> None:
        """Write the record of a step in one system call.

        Args:
            step: optimizer step the arrays belong to.
            arrays: by name; numbers of a fixed size, any shape.
            meta: what JSON can say; returned by the reader as it is.

        Raises:
            OSError: the file cannot be written; it is left as it was before the call.
        """
        record = _record(step, arrays, meta)
        if not self._opened:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_record(self.path)
            self._opened = True
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            end = os.fstat(descriptor).st_size
            if os.write(descriptor, record) < len(record):
                os.ftruncate(descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Record:
    """The arrays of one step."""

    step: int
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """Where the record of a step lies; its header, read, without its arrays."""

    step: int
    offset: int
    """Of the payload in the file, bytes."""
    size: int
    """Of the payload, bytes."""
    crc: int
    header: dict[str, Any]

    @property
    def end(self) -> int:
        """Offset of the next record, if there is one."""
        return self.offset + self.size

    @property
    def meta(self) -> dict[str, Any]:
        """As given to ``ArrayLog.append``."""
        meta: dict[str, Any] = self.header["meta"]
        return meta


def read_arrays(path: Path, names: Collection[str] | None = None) -> Iterator[Record]:
    """The sound records of a file in the order of their steps; of a step the last one written.

    A torn tail ends the file; a record with a wrong checksum is passed over.

    Args:
        path: the file; one that does not exist has no records.
        names: decode these arrays alone; None: all.
    """
    if not path.is_file():
        return
    entries = index_arrays(path)
    with open(path, "rb") as file:
        for entry in entries:
            record = read_record(file, entry, names)
            if record is not None:
                yield record


def index_arrays(path: Path) -> list[Entry]:
    """Where each step's last record lies, in the order of steps; reads headers alone."""
    with open(path, "rb") as file:
        latest = {entry.step: entry for entry in _entries(file)}
    return [latest[step] for step in sorted(latest)]


def read_record(
    file: BinaryIO, entry: Entry, names: Collection[str] | None = None
) -> Record | None:
    """The arrays of one entry; None if the payload's checksum is wrong."""
    file.seek(entry.offset)
    payload = file.read(entry.size)
    if len(payload) < entry.size or zlib.crc32(payload) != entry.crc:
        return None
    arrays = {}
    start = 0
    for name, dtype, shape, size in entry.header["arrays"]:
        if names is None or name in names:
            arrays[name] = _unpacked(payload[start : start + size], dtype, shape)
        start += size
    return Record(entry.step, arrays, entry.meta)


def last_record(path: Path, names: Collection[str] | None = None) -> Record | None:
    """The sound record that was written last, found from the end of the file, however long it is.

    Args:
        path: the file; one that does not exist has no records.
        names: decode these arrays alone; None: all.
    """
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        size = 1 << 20
        while True:
            start = max(0, length - size)
            file.seek(start)
            window = file.read(length - start)
            at = len(window)
            while (at := window.rfind(MAGIC, 0, at)) >= 0:
                entry = _entry_at(file, start + at, length)
                record = None if entry is None else read_record(file, entry, names)
                if record is not None:
                    return record
            if start == 0:
                return None
            size *= 4


def cut_torn_record(path: Path) -> None:
    """Truncate the file after its last sound record."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        end = 0
        for entry in reversed(list(_entries(file))):
            if read_record(file, entry, ()) is not None:
                end = entry.end
                break
        if end < file.seek(0, os.SEEK_END):
            file.truncate(end)
            os.fsync(file.fileno())


def _record(step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> bytes:
    packed = [(name, *_packed(array)) for name, array in arrays.items()]
    listed = [[name, dtype, shape, len(data)] for name, dtype, shape, data in packed]
    header = json.dumps(
        {"step": int(step), "arrays": listed, "meta": meta}, separators=(",", ":")
    ).encode()
    payload = b"".join(data for _, _, _, data in packed)
    lengths = _LENGTHS.pack(len(header), len(payload))
    crc = zlib.crc32(header, zlib.crc32(lengths))
    return (
        _PREFIX.pack(MAGIC, len(header), len(payload), crc, zlib.crc32(payload)) + header + payload
    )


def _packed(array: np.ndarray) -> tuple[str, list[int], bytes]:
    if array.dtype.kind not in "biufc":
        raise TypeError(f"an array of {array.dtype} is no array of numbers")
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    grouped = flat.view(np.uint8).reshape(flat.size, flat.itemsize).T
    return flat.dtype.str, list(array.shape), zlib.compress(grouped.tobytes(), 1)


def _unpacked(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    kind = np.dtype(dtype)
    grouped = np.frombuffer(zlib.decompress(data), np.uint8).reshape(kind.itemsize, -1)
    return np.ascontiguousarray(grouped.T).reshape(-1).view(kind).reshape(shape)


def _entries(file: BinaryIO) -> Iterator[Entry]:
    """Every record whose header is sound and whose payload is not cut short, in file order."""
    length = file.seek(0, os.SEEK_END)
    position = 0
    while position + _PREFIX.size <= length:
        entry = _entry_at(file, position, length)
        if entry is not None:
            yield entry
            position = entry.end
            continue
        found = _next_magic(file, position + 1)
        if found is None:
            return
        position = found


def _entry_at(file: BinaryIO, position: int, length: int) -> Entry | None:
    file.seek(position)
    magic, header_size, payload_size, crc, payload_crc = _PREFIX.unpack(file.read(_PREFIX.size))
    offset = position + _PREFIX.size + header_size
    if magic != MAGIC or header_size > _LARGEST_HEADER or offset + payload_size > length:
        return None
    text = file.read(header_size)
    if crc != zlib.crc32(text, zlib.crc32(_LENGTHS.pack(header_size, payload_size))):
        return None
    header = json.loads(text)
    return Entry(header["step"], offset, payload_size, payload_crc, header)


def _next_magic(file: BinaryIO, position: int) -> int | None:
    """Offset of the next magic word at or after ``position``; past a damaged stretch."""
    overlap = len(MAGIC) - 1
    file.seek(position)
    tail = b""
    while chunk := file.read(1 << 20):
        window = tail + chunk
        found = window.find(MAGIC)
        if found >= 0:
            return position - len(tail) + found
        position += len(chunk)
        tail = window[-overlap:]
    return None
