"""Reading DCP's ``.metadata`` without trusting it.

The file is a pickle, and unpickling runs whatever the file says. Here a pickle is only taken apart:
the few class names DCP writes (torch 2.11 to 2.14) stand for inert records, every other name is
refused, and the true objects are built from the records after each value has been checked: types,
shapes, that the pieces of a tensor fill it, that each piece lies inside a file of the manifest.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeGuard, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from deepseek.config.errors import UserError

METADATA = ".metadata"
_T = TypeVar("_T")


def read_metadata(path: Path, sizes: Mapping[str, int]) -> Metadata:
    """What tensors the checkpoint directory ``path`` holds, and where.

    Args:
        path: directory with a ``.metadata``.
        sizes: bytes of each file of the directory, from its manifest.

    Raises:
        UserError: the file names anything but the classes DCP metadata is made of (nothing of it
            has run then), or describes tensors that are not there.
    """
    return _read(path / METADATA, _STAND_INS, lambda record: _metadata(record, sizes))


@dataclass(frozen=True)
class ForeignMetadata:
    """What a DCP directory of another program holds."""

    tensors: Metadata
    objects: dict[str, tuple[str, int, int]]
    """What is no tensor: by name, file, first byte and number of bytes. Pickles, unread."""
    paths: dict[str, tuple[str | int, ...]]
    """The keys under which a name was saved, where they stand in the file."""


def read_foreign_metadata(path: Path, sizes: Mapping[str, int]) -> ForeignMetadata:
    """As ``read_metadata``, of a directory that another program wrote with DCP.

    Such programs also keep what is no tensor, and where they wrote it. ``sizes``: of the files that
    are there.
    """

    def built(record: object) -> ForeignMetadata:
        fields = _fields(record, _MetadataRecord, "the file")
        entries = _dict(fields.get("state_dict_metadata"), "the list of tensors")
        places = _dict(fields.get("storage_data"), "the list of places")
        _require_files(path, places, sizes)
        others = {name for name, entry in entries.items() if isinstance(entry, _BytesRecord)}
        lying: dict[str, tuple[str, int, int]] = {}
        kept = {}
        for index, info in places.items():
            name = _string(_fields(index, _IndexRecord, "a place").get("fqn"))
            if name in others:
                lying[name] = _bytes_of(name, info, sizes)
            else:
                kept[index] = info
        if others - lying.keys():
            raise _Invalid(f"{min(others - lying.keys())}: is in no file")
        record = _MetadataRecord()
        record.fields = {
            "state_dict_metadata": {n: e for n, e in entries.items() if n not in others},
            "storage_data": kept,
        }
        return ForeignMetadata(_metadata(record, sizes), lying, _paths(fields.get("planner_data")))

    return _read(path / METADATA, _STAND_INS | _FOREIGN_STAND_INS, built)


def _read(
    where: Path, stand_ins: Mapping[tuple[str, str], type], build: Callable[[object], _T]
) -> _T:
    """Take the pickle ``where`` apart, and build the true objects from the records."""
    try:
        with open(where, "rb") as stream:
            record = _Parser(stream, stand_ins).load()
        return build(record)
    except _Forbidden as failure:
        raise UserError(
            f"{where}: refused: it asks to load {failure}, which no checkpoint needs; the file was "
            "damaged or made to run code, do not use this checkpoint"
        ) from None
    except UserError:
        raise
    except OSError as failure:
        raise UserError(f"{where}: cannot be read: {failure.strerror}") from failure
    # Whatever else a broken pickle brings about (the module lists no complete set) is damage.
    except Exception as failure:
        raise UserError(f"{where}: not the metadata of a checkpoint: {failure}") from failure


def _paths(planner_data: object) -> dict[str, tuple[str | int, ...]]:
    """Keys of nested dictionaries and lists by name; of what is malformed, none."""
    if not isinstance(planner_data, dict):
        return {}
    return {
        name: keys
        for name, keys in planner_data.items()
        if isinstance(name, str)
        and isinstance(keys, tuple)
        and all(isinstance(key, str) or _is_count(key) for key in keys)
    }


def _require_files(path: Path, places: Mapping[Any, Any], sizes: Mapping[str, int]) -> None:
    """Raise ``UserError`` for a file that is missing or shorter than what is said to lie in it."""
    ends: dict[str, int] = {}
    for info in places.values():
        fields = _fields(info, _StorageRecord, "a place")
        file, offset, length = (fields.get(k) for k in ("relative_path", "offset", "length"))
        if isinstance(file, str) and _is_count(offset) and _is_count(length):
            ends[file] = max(ends.get(file, 0), offset + length)
    missing = sorted(ends.keys() - sizes.keys())
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of its {len(ends)} files are missing, such as {missing[0]}; "
            "copy the folder again (every rank wrote some), or use another step"
        )
    for file, end in sorted(ends.items()):
        if end > sizes[file]:
            raise UserError(
                f"{path / file} is cut short: it has {sizes[file]:,} bytes and needs {end:,}; copy "
                "it again, or use another step"
            )


class _Forbidden(Exception):
    """A name that is not on the list."""


class _Invalid(Exception):
    """A value that cannot be."""


class _Record:
    """Stands for an object of the pickle: the arguments and the state it was given, unused."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        # TensorProperties gives a tuple, all others their fields.
        self.args = state if isinstance(state, tuple) else ()
        self.fields = state if isinstance(state, dict) else {}


class _MetadataRecord(_Record): ...


class _TensorRecord(_Record): ...


class _PropertiesRecord(_Record): ...


class _ChunkRecord(_Record): ...


class _IndexRecord(_Record): ...


class _StorageRecord(_Record): ...


class _BytesRecord(_Record): ...


_DCP = "torch.distributed.checkpoint"
_STAND_INS: dict[tuple[str, str], type] = {
    (f"{_DCP}.metadata", "Metadata"): _MetadataRecord,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _TensorRecord,
    (f"{_DCP}.metadata", "TensorProperties"): _PropertiesRecord,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _ChunkRecord,
    (f"{_DCP}.metadata", "MetadataIndex"): _IndexRecord,
    (f"{_DCP}.filesystem", "_StorageInfo"): _StorageRecord,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _BytesRecord,
    (f"{_DCP}.metadata", "StorageMeta"): _Record,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("torch", "Size"): tuple,
}
_FOREIGN_STAND_INS: dict[tuple[str, str], type] = {
    (module, name): _Record
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath")
}
"""Where it was written stands in the file as a path."""


class _Parser(pickle.Unpickler):
    """An unpickler that can make plain data, dtypes and records, and nothing else."""

    def __init__(self, stream: IO[bytes], stand_ins: Mapping[tuple[str, str], type]) -> None:
        super().__init__(stream)
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        stand_in = self._stand_ins.get((module, name))
        if stand_in is not None:
            return stand_in
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Forbidden(f"the persistent object {pid!r}")


def _metadata(record: object, sizes: Mapping[str, int]) -> Metadata:
    fields = _fields(record, _MetadataRecord, "the file")
    entries = _dict(fields.get("state_dict_metadata"), "the list of tensors")
    places = _dict(fields.get("storage_data"), "the list of places")
    tensors = {_string(name): _tensor(name, entry) for name, entry in entries.items()}
    storage = dict(_place(index, info, sizes) for index, info in places.items())
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in storage:
                raise _Invalid(f"{name}: the piece at {tuple(chunk.offsets)} is in no file")
    return Metadata(state_dict_metadata=dict(tensors), storage_data=storage)


def _tensor(name: str, record: object) -> TensorStorageMetadata:
    fields = _fields(record, _TensorRecord, name)
    properties = fields.get("properties")
    state = properties.args if isinstance(properties, _PropertiesRecord) else ()
    if not state or not isinstance(state[0], torch.dtype):
        raise _Invalid(f"{name}: has no dtype")
    size = _shape(fields.get("size"), name)
    chunks = fields.get("chunks")
    if not isinstance(chunks, list):
        raise _Invalid(f"{name}: has no list of pieces")
    pieces = [_chunk(name, size, chunk) for chunk in chunks]
    filled = sum(math.prod(piece.sizes) for piece in pieces)
    if not pieces or filled != math.prod(size):
        raise _Invalid(f"{name}: {len(pieces)} pieces hold {filled} of {math.prod(size)} numbers")
    return TensorStorageMetadata(TensorProperties(dtype=state[0]), size, pieces)


def _chunk(name: str, size: torch.Size, record: object) -> ChunkStorageMetadata:
    fields = _fields(record, _ChunkRecord, name)
    offsets, sizes = _shape(fields.get("offsets"), name), _shape(fields.get("sizes"), name)
    inside = len(offsets) == len(sizes) == len(size) and all(
        offset + length <= whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
    )
    if not inside:
        raise _Invalid(
            f"{name}: a piece of shape {tuple(sizes)} at {tuple(offsets)} "
            f"does not fit into {tuple(size)}"
        )
    return ChunkStorageMetadata(offsets, sizes)


def _place(
    index: object, info: object, sizes: Mapping[str, int]
) -> tuple[MetadataIndex, _StorageInfo]:
    where = _fields(index, _IndexRecord, "a place")
    name = _string(where.get("fqn"))
    file, offset, length = _bytes_of(name, info, sizes)
    hint = where.get("index")
    key = MetadataIndex(name, _shape(where.get("offset"), name), hint if _is_count(hint) else None)
    return key, _StorageInfo(file, offset, length)


def _bytes_of(name: str, info: object, sizes: Mapping[str, int]) -> tuple[str, int, int]:
    """File, first byte and number of bytes of what lies at ``info``."""
    fields = _fields(info, _StorageRecord, name)
    file, offset, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if not isinstance(file, str) or file not in sizes:
        raise _Invalid(f"{name}: is said to lie in {file!r}, which is not in the manifest")
    if not (_is_count(offset) and _is_count(length) and offset + length <= sizes[file]):
        raise _Invalid(
            f"{name}: is said to lie at {offset!r} over {length!r} bytes of {file}, "
            f"which has {sizes[file]}"
        )
    if fields.get("transform_descriptors"):
        raise _Invalid(f"{name}: is stored by an extension of DCP, which is not supported")
    return file, offset, length


def _fields(record: object, kind: type[_Record], what: str) -> dict[str, Any]:
    if not isinstance(record, kind):
        raise _Invalid(f"{what}: holds something other than tensors, or is malformed")
    return record.fields


def _dict(value: object, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _Invalid(f"{what} is missing")
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise _Invalid(f"a tensor's name is {value!r}")
    return value


def _shape(value: object, name: str) -> torch.Size:
    if not isinstance(value, tuple) or not all(map(_is_count, value)):
        raise _Invalid(f"{name}: {value!r} is not a shape")
    return torch.Size(value)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0
