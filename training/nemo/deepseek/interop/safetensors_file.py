"""One ``.safetensors`` file, read and written tensor by tensor.

The format is a header (8 bytes of length, then JSON: dtype, shape and place of each tensor) and the
numbers. Read and written here without the library of that name, for memory's sake: its reader maps
whole files, its writer wants every tensor of a file at once. Nothing in such a file can run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from deepseek.checkpoint.shards import TensorSpec
from deepseek.config.errors import UserError
from deepseek.durable import FileEntry, HashingWriter

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


class TensorFile:
    """A file to read from. Its header is checked at once: what it names is there.

    Raises ``UserError`` if the file is missing, is cut off, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorSpec] = {}
        """By name, in the order of the numbers in the file."""
        self._starts: dict[str, int] = {}
        self._stream: IO[bytes] | None = None
        try:
            self._read_header()
        except OSError as failure:
            raise UserError(f"{path}: cannot be read: {failure.strerror}") from failure

    def read(self, name: str, row: int | None = None) -> Tensor:
        """The tensor ``name``, or only ``row`` of its leading dim."""
        spec = self.tensors[name]
        shape = spec.shape if row is None else spec.shape[1:]
        return self._read(self._starts[name], row or 0, spec.dtype, shape)

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """``count`` entries of the leading dim from ``first`` on."""
        spec = self.tensors[name]
        rest = spec.shape[1:]
        start = self._starts[name] + first * math.prod(rest) * spec.dtype.itemsize
        return self._read(start, 0, spec.dtype, (count, *rest))

    def close(self) -> None:
        """Close the file; reading opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _read(self, start: int, row: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        numbers = torch.empty(size, dtype=torch.uint8)
        place = numbers.numpy().data
        try:
            if self._stream is None:
                self._stream = open(self.path, "rb", buffering=0)
            self._stream.seek(start + row * size)
            done = 0
            while done < size:  # one call reads 2 GiB at most
                count = self._stream.readinto(place[done:])  # type: ignore[attr-defined]
                if not count:
                    raise UserError(f"{self.path}: ended while it was read; it has been changed")
                done += count
        except OSError as failure:
            raise UserError(f"{self.path}: cannot be read: {failure.strerror}") from failure
        return numbers.view(dtype).reshape(tuple(shape))

    def _read_header(self) -> None:
        with open(self.path, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > _LARGEST_HEADER:
                raise self._malformed(f"{size} bytes, header of {length}")
            if 8 + length > size:
                raise self._cut_off(size, 8 + length)
            text = stream.read(length)
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self._malformed("its header cannot be read") from None
        end = 0
        for name, entry in entries:
            try:
                kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
                sound = all(type(n) is int and n >= 0 for n in (*shape, first, last))
            except (TypeError, KeyError, ValueError):
                sound = False
            if not sound:
                raise self._malformed(f"the entry of {name} cannot be read")
            if kind not in DTYPES:
                raise UserError(
                    f"{self.path}: {name} has dtype {kind}; {', '.join(DTYPES)} can be read"
                )
            spec = TensorSpec(DTYPES[kind], tuple(shape))
            if first != end or last != first + spec.nbytes:
                raise self._malformed(
                    f"{name}, {kind} {list(shape)}, is said to lie at {first} to {last}, and what "
                    f"is before it ends at {end}"
                )
            self.tensors[name], self._starts[name] = spec, 8 + length + first
            end = last
        if 8 + length + end > size:
            raise self._cut_off(size, 8 + length + end)
        if 8 + length + end < size:
            raise self._malformed(f"it has {size - 8 - length - end} bytes that no tensor owns")

    def _cut_off(self, size: int, wanted: int) -> UserError:
        return UserError(
            f"{self.path} is cut off: it has {size:,} bytes and needs {wanted:,}; copy or download "
            "it again"
        )

    def _malformed(self, reason: str) -> UserError:
        return UserError(
            f"{self.path} is no safetensors file ({reason}); copy or download it again"
        )


class TensorFileWriter:
    """A new file, whose tensors are announced first and then written one by one, in this order.

    Args:
        path: of a file that does not exist.
        tensors: what will be written. Larger dtypes first, or readers would find numbers at odd
            addresses.

    Raises ``OSError``. ``entry`` is there once the file is closed.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in tensors.items():
            place = [end, end + spec.nbytes]
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": place,
            }
            end = place[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.entry: FileEntry | None = None
        self._left = dict(tensors)
        self._stream = HashingWriter(path, self._done)
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        expected = next(iter(self._left), None)
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        assert name == expected and spec == self._left[name], (name, spec, expected)
        del self._left[name]
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._stream.write(numbers.data)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            assert not self._left, f"announced, not written: {list(self._left)}"
            self._stream.close()
        else:
            self._stream.raw.close()

    def _done(self, entry: FileEntry) -> None:
        self.entry = entry
