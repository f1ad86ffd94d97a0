"""A file of ``torch.save`` that holds named tensors, read and written tensor by tensor.

Such a file is a zip: a pickle that says which numbers make which tensor, and the numbers of each in
an entry of their own, not compressed. ``torch.save`` wants all of them in memory, ``torch.load``
gives all of them at once unless the file lies by itself; here it may be a part of another file.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek.checkpoint.shards import TensorSpec
from deepseek.config.errors import UserError
from deepseek.files import BLOCK

_ROOT = "archive"
_ALIGNMENT = 64
"""Numbers begin at a multiple of this many bytes, as torch has it."""
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_LOCAL_HEADER = 30
"""Bytes of an entry's header before its name."""


class FilePart(io.RawIOBase):
    """Bytes of an open file from ``start`` on, as a file of its own.

    Args:
        file: seekable; its position is moved.
        start: first byte of the part.
        size: bytes of the part; None: it is being written and has no end yet.
    """

    def __init__(self, file: IO[bytes], start: int, size: int | None = None) -> None:
        super().__init__()
        self._file, self._start, self._position = file, start, 0
        self.size = size or 0
        self._writes = size is None

    def readable(self) -> bool:
        return not self._writes

    def writable(self) -> bool:
        return self._writes

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        view[: len(content)] = content
        self._position += len(content)
        return len(content)

    def write(self, data: Any) -> int:
        self._file.seek(self._start + self._position)
        count = self._file.write(data)
        self._position += count
        self.size = max(self.size, self._position)
        return count


def write_tensors(
    stream: FilePart, specs: Mapping[str, TensorSpec], numbers: Callable[[str], Tensor]
) -> None:
    """Write what ``torch.load`` reads as a dictionary of tensors.

    Args:
        stream: new and empty.
        specs: floating-point tensors by name.
        numbers: called once for each name, in order.
    """
    keys = {name: str(index) for index, name in enumerate(specs)}
    skeleton = io.BytesIO()
    pickler = _Pickler(skeleton, protocol=2)
    pickler.dump({name: _Tensor(keys[name], spec) for name, spec in specs.items()})
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        # No .format_version: from that torch would guess where the numbers lie, not look.
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/data.pkl"), skeleton.getvalue())
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/byteorder"), b"little")
        for name, spec in specs.items():
            tensor = numbers(name).detach().cpu().contiguous()
            assert TensorSpec(tensor.dtype, tuple(tensor.shape)) == spec, name
            content = tensor.view(-1).view(torch.uint8).numpy().data
            info = zipfile.ZipInfo(f"{_ROOT}/data/{keys[name]}")
            info.file_size = len(content)
            info.extra = _padding(stream.tell(), info.filename)
            with archive.open(info, "w", force_zip64=True) as out:
                for start in range(0, len(content), BLOCK):
                    out.write(content[start : start + BLOCK])
        archive.writestr(zipfile.ZipInfo(f"{_ROOT}/version"), b"3\n")


@dataclass(frozen=True)
class Place:
    """Where the numbers of a tensor lie."""

    spec: TensorSpec
    start: int
    """First byte in the outer file."""


class TensorsInFile:
    """The tensors of a part of ``path``; the numbers stay on the disk until they are used.

    Args:
        path: a file.
        start: first byte of the part that ``torch.save`` wrote.
        size: bytes of the part.

    Raises:
        UserError: it is no such file, it is cut off, or it asks to load code (nothing has run).
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        self.path = path
        with open(path, "rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            try:
                with zipfile.ZipFile(FilePart(file, start, size)) as archive:
                    self.entries = {
                        info.filename: (self._start(start, info), info.file_size, info.CRC)
                        for info in archive.infolist()
                    }
                # Fake tensors: torch reads the pickle alone, and notes where the numbers lie.
                with FakeTensorMode():
                    content = torch.load(
                        io.BufferedReader(FilePart(file, start, size)), weights_only=True
                    )
            except Exception as failure:  # a broken file may bring about anything
                first = str(failure).strip().splitlines()[0][:200] if str(failure).strip() else ""
                raise UserError(
                    f"{path}: its weights are no file of torch.save, or damaged: {first}"
                ) from None
        self.tensors: dict[str, Place] = {}
        starts = {begin for begin, _, _ in self.entries.values()}
        for name, value in content.items():
            if not isinstance(value, Tensor) or not value.is_contiguous():
                raise UserError(f"{path}: {name} is no plain tensor")
            offset = value.untyped_storage()._checkpoint_offset
            if offset is None or start + offset not in starts:
                raise UserError(f"{path}: {name} has no numbers")
            offset += int(value.storage_offset()) * value.dtype.itemsize
            spec = TensorSpec(value.dtype, tuple(value.shape))
            if offset + spec.nbytes > size:
                raise UserError(f"{path}: {name} lies beyond the end of the file")
            self.tensors[name] = Place(spec, start + offset)

    def read(self, name: str) -> Tensor:
        """The whole tensor, mapped; what is written to it does not reach the file."""
        place = self.tensors[name]
        if not place.spec.nbytes:
            return torch.empty(place.spec.shape, dtype=place.spec.dtype)
        flat = torch.frombuffer(
            self._mapped,
            dtype=place.spec.dtype,
            count=math.prod(place.spec.shape),
            offset=place.start,
        )
        return flat.view(place.spec.shape)

    def damage(self, names: Iterable[str]) -> list[str]:
        """What is wrong with the zip's entries ``names``, by their check sums."""
        wrong = []
        for name in names:
            start, size, expected = self.entries[name]
            found = 0
            for begin in range(start, start + size, BLOCK):
                end = min(begin + BLOCK, start + size)
                found = zlib.crc32(memoryview(self._mapped)[begin:end], found)
            if found != expected:
                wrong.append(f"the check sum of {name} is {found:08x} instead of {expected:08x}")
        return wrong

    def _start(self, part: int, info: zipfile.ZipInfo) -> int:
        """First byte of an entry's content; its own header says how long that header is."""
        header = part + info.header_offset
        lengths = self._mapped[header + _LOCAL_HEADER - 4 : header + _LOCAL_HEADER]
        name, extra = lengths[:2], lengths[2:]
        return header + _LOCAL_HEADER + sum(int.from_bytes(n, "little") for n in (name, extra))


def _padding(position: int, name: str) -> bytes:
    """An extra field that moves the content of the next entry to a multiple of the alignment."""
    zip64 = 20
    before = position + _LOCAL_HEADER + len(name.encode()) + zip64
    length = -(before + 4) % _ALIGNMENT
    return b"FB" + length.to_bytes(2, "little") + b"Z" * length


@dataclass(frozen=True)
class _Numbers:
    """Stands for a storage in the pickle."""

    key: str
    spec: TensorSpec


class _Tensor:
    """Pickles as a tensor does."""

    def __init__(self, key: str, spec: TensorSpec) -> None:
        self._numbers, self._shape = _Numbers(key, spec), spec.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = [math.prod(self._shape[dim + 1 :]) for dim in range(len(self._shape))]
        hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (self._numbers, 0, self._shape, tuple(strides), False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    """Names storages instead of pickling them, as ``torch.save`` does."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Numbers):
            return None
        count = math.prod(value.spec.shape)
        return "storage", _STORAGES[value.spec.dtype], value.key, "cpu", count
