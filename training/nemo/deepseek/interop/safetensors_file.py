"""One ``.safetensors`` file, read and written tensor by tensor.

The format is a header (8 bytes of length, then JSON: dtype, shape and offsets of each tensor) and
the numbers. The library of that name reads it, from a mapped file. It does not write it here: its
writer wants every tensor of a file in memory at once. Nothing in such a file can run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.checkpoint.shards import TensorSpec
from deepseek.config.errors import UserError
from deepseek.files import FileEntry, HashingWriter

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


class TensorFile:
    """A file to read from. Its header is checked at once: what it names is there.

    Raises:
        UserError: the file is missing, is cut off, names a tensor twice, has a dtype that torch
            lacks, or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: Any = None
        self._open()
        self.close()
        with open(path, "rb") as stream:
            text = stream.read(int.from_bytes(stream.read(8), "little"))
        header = json.loads(text, object_pairs_hook=self._once)
        header.pop("__metadata__", None)
        self.tensors: dict[str, TensorSpec] = {}
        """By name, in the order of the numbers in the file."""
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {name} has dtype {entry['dtype']}; {', '.join(DTYPES)} can be read"
                )
            self.tensors[name] = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def read(self, name: str, row: int | None = None) -> Tensor:
        """The tensor ``name``, or only ``row`` of its leading dim; mapped, so not to be changed."""
        mapped = self._mapped or self._open()
        return mapped.get_tensor(name) if row is None else mapped.get_slice(name)[row]

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """``count`` entries of the leading dim from ``first`` on."""
        mapped = self._mapped or self._open()
        return mapped.get_slice(name)[first : first + count]

    def close(self) -> None:
        """Let go of the file; reading opens it again."""
        self._mapped = None

    def _open(self) -> Any:
        """The library checks header and size each time."""
        try:
            self._mapped = safe_open(self.path, "pt")
        except SafetensorError as failure:
            raise UserError(
                f"{self.path} is cut off, or no safetensors file: {failure} (it has "
                f"{self.path.stat().st_size:,} bytes); copy or download it again"
            ) from None
        except OSError as failure:
            raise UserError(f"{self.path}: cannot be read: {failure}") from failure
        return self._mapped

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object. Readers disagree about which of two entries of one name counts."""
        entries = dict(pairs)
        if len(entries) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{self.path}: its header names {twice} twice; download it again")
        return entries


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

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            assert not self._left, f"announced, not written: {list(self._left)}"
            self._stream.close()
        else:
            self._stream.raw.close()

    def _done(self, entry: FileEntry) -> None:
        self.entry = entry
