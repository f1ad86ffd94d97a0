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
readers ignore it, and the writer cuts it off before it goes on. A resumed run repeats steps: a
record takes the place of those of its step and of later steps. No torch here: reports and monitors
read this file where only numpy is at hand.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deepseek.config.errors import UserError

MAGIC = b"DSA1"
_LENGTHS = struct.Struct("<II")
_PREFIX = struct.Struct("<4sIIII")
_LARGEST_HEADER = 1 << 24
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_WINDOW = 1 << 26
"""Bytes after a damaged header in which the next record is looked for."""
_SMALL = 512
"""Bytes for which zlib's least window will do: its usual state of 268 KB takes longer to clear than
a small array to compress, and drives out of the caches what the next step wants there."""


class ArrayLog:
    """Appends records to one file; the folder and the file are made at the first one.

    Args:
        path: the file; whatever an earlier process left half written is cut off before the first
            record of this one. One process writes a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = False
        self._meta: tuple[dict[str, Any], str] = ({}, "{}")

    def append(self, step: int, arrays: dict[str, np.ndarray], **meta: Any) -> None:
        """Write the record of a step in one system call.

        Args:
            step: optimizer step the arrays belong to.
            arrays: by name; numbers of a fixed size, any shape.
            meta: what JSON can say; returned by the reader as it is.

        Raises:
            OSError: the file cannot be written; it is left as it was before the call.
        """
        if meta != self._meta[0]:  # mostly the same in all of a run's records
            self._meta = meta, _ENCODER.encode(meta)
        record = _record(step, arrays, self._meta[1])
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


class Record(NamedTuple):
    """The arrays of one step."""

    step: int
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    """As given to ``ArrayLog.append``."""


class Entry(NamedTuple):
    """Where the record of a step lies."""

    step: int
    start: int
    """Offset of its first byte in the file."""
    end: int
    """Offset of the next record, if there is one."""
    shape: tuple[int, ...]
    """Of its first array."""


class ArrayReader:
    """The records of one file, which may be growing.

    Args:
        path: the file; one that does not exist has no records.

    Attributes:
        entries: where the records lie whose headers are sound, in the order of their steps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []

    def update(self) -> None:
        """Find what has been appended, by its headers alone; a torn tail waits for the next time.

        Raises:
            UserError: the file cannot be read, or is no log at all.
        """
        if not self.path.is_file():
            return
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                if self.entries and self.entries[-1].end > size:  # a torn record was cut off
                    self.entries.clear()
                for entry in _entries(file, self.entries[-1].end if self.entries else 0):
                    while self.entries and self.entries[-1].step >= entry.step:
                        self.entries.pop()
                    self.entries.append(entry)
        except OSError as error:
            raise UserError(
                f"cannot read {self.path}: {error.strerror}; see its permissions"
            ) from error
        if size and not self.entries:
            raise UserError(
                f"{self.path} is damaged: {size:,} bytes without one whole record; "
                "move it away, and the report goes without it"
            )

    def records(
        self, entries: Iterable[Entry] | None = None, names: Collection[str] | None = None
    ) -> Iterator[Record | None]:
        """The record of each entry; None where the payload's checksum is wrong.

        Args:
            entries: of this file; None: all.
            names: decode these arrays alone; None: all.
        """
        with open(self.path, "rb") as file:
            for entry in self.entries if entries is None else entries:
                yield _read(file, entry, names)

    def newest(self) -> Record | None:
        """The sound record of the highest step."""
        for entry in reversed(self.entries):
            for record in self.records([entry]):
                if record is not None:
                    return record
        return None


def read_arrays(path: Path, names: Collection[str] | None = None) -> Iterator[Record]:
    """The sound records of a file in the order of their steps.

    Args:
        path: the file; one that does not exist has no records.
        names: decode these arrays alone; None: all.
    """
    reader = ArrayReader(path)
    reader.update()
    if reader.entries:
        yield from (record for record in reader.records(names=names) if record is not None)


def cut_torn_record(path: Path) -> None:
    """Truncate the file after its last sound record."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        entries = reversed(list(_entries(file, 0)))
        end = next((entry.end for entry in entries if _read(file, entry, ())), 0)
        if end < file.seek(0, os.SEEK_END):
            file.truncate(end)
            os.fsync(file.fileno())


def _record(step: int, arrays: dict[str, np.ndarray], meta: str) -> bytes:
    packed = [(name, *_packed(array)) for name, array in arrays.items()]
    listed = _ENCODER.encode(
        [[name, dtype, shape, len(data)] for name, dtype, shape, data in packed]
    )
    header = f'{{"step":{int(step)},"arrays":{listed},"meta":{meta}}}'.encode()
    payload = b"".join(data for _, _, _, data in packed)
    lengths = _LENGTHS.pack(len(header), len(payload))
    crc = zlib.crc32(header, zlib.crc32(lengths))
    return (
        _PREFIX.pack(MAGIC, len(header), len(payload), crc, zlib.crc32(payload)) + header + payload
    )


def _packed(array: np.ndarray) -> tuple[str, list[int], bytes]:
    if array.dtype.kind not in "biufc":
        raise TypeError(f"an array of {array.dtype} is no array of numbers")
    if array.dtype.str[0] == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    plain, size = array.tobytes(), array.itemsize
    grouped = b"".join([plain[place::size] for place in range(size)])
    return array.dtype.str, list(array.shape), _compressed(grouped)


def _compressed(data: bytes) -> bytes:
    if len(data) > _SMALL:
        return zlib.compress(data, 1)
    small = zlib.compressobj(1, zlib.DEFLATED, wbits=9, memLevel=1)
    return small.compress(data) + small.flush()


def _unpacked(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    """Raises ValueError or zlib.error where the bytes are not those of such an array."""
    kind = np.dtype(dtype)
    size = kind.itemsize * math.prod(shape)
    bytes_ = zlib.decompressobj().decompress(data, size + 1)  # no more, whatever they unpack to
    grouped = np.frombuffer(bytes_, np.uint8).reshape(kind.itemsize, -1)
    return np.ascontiguousarray(grouped.T).reshape(-1).view(kind).reshape(shape)


def _entries(file: BinaryIO, start: int) -> Iterator[Entry]:
    """Every record from an offset on whose header is sound and whose payload is not cut short."""
    size = file.seek(0, os.SEEK_END)
    while start < size:
        found = _header(file, start)
        if found is not None:
            header, _, end = found
            yield Entry(header["step"], start, end, tuple(header["arrays"][0][2]))
            start = end
            continue
        file.seek(start + 1)  # past a damaged stretch
        offset = file.read(min(_WINDOW, size - start)).find(MAGIC)
        if offset < 0:
            return
        start += 1 + offset


def _read(file: BinaryIO, entry: Entry, names: Collection[str] | None) -> Record | None:
    """The arrays of one entry; None if they are damaged."""
    found = _header(file, entry.start)
    if found is None:
        return None
    header, payload_crc, end = found
    payload = file.read(end - file.tell())
    if zlib.crc32(payload) != payload_crc:
        return None
    arrays, start = {}, 0
    try:
        for name, dtype, shape, size in header["arrays"]:
            if names is None or name in names:
                arrays[name] = _unpacked(payload[start : start + size], dtype, shape)
            start += size
    except (TypeError, ValueError, zlib.error):
        return None
    return Record(header["step"], arrays, header["meta"]) if start == len(payload) else None


def _header(file: BinaryIO, start: int) -> tuple[dict[str, Any], int, int] | None:
    """Header, checksum and end of a payload at whose begin the file is left; None: no record."""
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    magic, header_size, payload_size, crc, payload_crc = _PREFIX.unpack(prefix)
    end = start + _PREFIX.size + header_size + payload_size
    if magic != MAGIC or header_size > _LARGEST_HEADER or end > size:
        return None
    text = file.read(header_size)
    if crc != zlib.crc32(text, zlib.crc32(_LENGTHS.pack(header_size, payload_size))):
        return None
    try:
        header = json.loads(text)
        step, meta, arrays = header["step"], header["meta"], header["arrays"]
        sound = isinstance(step, int) and isinstance(meta, dict) and len(arrays[0][2]) >= 0
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return (header, payload_crc, end) if sound else None
