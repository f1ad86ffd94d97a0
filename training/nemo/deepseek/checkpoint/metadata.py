"""Reading DCP's ``.metadata`` without trusting it.

The file is a pickle, and unpickling runs whatever the file says. Here it gets the few classes that
DCP writes (torch 2.11 to 2.14), and every other name is refused. What was built of them is then
looked at and made anew: that each chunk lies inside a file that is there, and that the chunks of a
tensor fill it.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from deepseek.config.errors import UserError

METADATA = ".metadata"


@dataclass(frozen=True)
class ForeignMetadata:
    """What a DCP directory of another program holds."""

    tensors: Metadata
    objects: dict[str, tuple[str, int, int]]
    """What is no tensor: by name, file, first byte and number of bytes. Pickles, unread."""
    paths: dict[str, tuple[str | int, ...]]
    """The keys under which a name was saved, where they stand in the file."""


def read_metadata(path: Path, sizes: Mapping[str, int]) -> Metadata:
    """What tensors the checkpoint directory ``path`` holds, and where; errors as below."""
    found = read_foreign_metadata(path, sizes)
    for name in found.objects:
        raise UserError(f"{path / METADATA}: {name} is no tensor, which no checkpoint holds here")
    return found.tensors


def read_foreign_metadata(path: Path, sizes: Mapping[str, int]) -> ForeignMetadata:
    """As ``read_metadata``, of a directory that another program wrote with DCP.

    Args:
        path: directory with a ``.metadata``.
        sizes: bytes of each file of the directory that may be read.

    Raises:
        UserError: the file names anything but the classes DCP metadata is made of (nothing of it
            has run then), or describes tensors that are not there.
    """
    where = path / METADATA
    try:
        with open(where, "rb") as stream:
            found = _Parser(stream).load()
        _require_files(path, found, sizes)
        return _checked(found)
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


class _Forbidden(Exception):
    """A name that is not on the list."""


class _Unused:
    """Stands for what nothing here needs: memory formats, layouts, paths."""

    def __init__(self, *args: object) -> None: ...


class _Properties(TensorProperties):
    """Its dtype alone: the true one wants the memory format, which is unused."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


_DCP = "torch.distributed.checkpoint.metadata"
_CLASSES: dict[str, type] = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (
        Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata,
        MetadataIndex, StorageMeta, _StorageInfo,
    )
}  # fmt: skip
_CLASSES |= {f"{_DCP}.TensorProperties": _Properties, "torch.Size": tuple}
_CLASSES |= dict.fromkeys(
    [f"{_DCP}._MEM_FORMAT_ENCODING", "torch.serialization._get_layout"]
    + [f"pathlib{local}.{kind}Path" for local in ("", "._local") for kind in ("Posix", "Windows")],
    _Unused,
)


class _Parser(pickle.Unpickler):
    """An unpickler that knows the classes above and dtypes, and nothing else."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        # A pickle can set attributes of a class that it is given: it gets subclasses of its own.
        self._classes = {name: type(kind.__name__, (kind,), {}) for name, kind in _CLASSES.items()}

    def find_class(self, module: str, name: str) -> Any:
        known = self._classes.get(f"{module}.{name}")
        dtype = vars(torch).get(name) if module == "torch" else None
        if known is None and not isinstance(dtype, torch.dtype):
            raise _Forbidden(f"{module}.{name}")
        return known or dtype

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Forbidden(f"the persistent object {pid!r}")


def _require_files(path: Path, found: Metadata, sizes: Mapping[str, int]) -> None:
    """Raise ``UserError`` for a file that is missing or shorter than what is said to lie in it."""
    ends: dict[str, int] = {}
    for info in found.storage_data.values():
        if not all(type(n) is int and n >= 0 for n in (info.offset, info.length)):
            raise ValueError(f"{info.length!r} bytes at {info.offset!r} of {info.relative_path!r}")
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
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


def _checked(found: Metadata) -> ForeignMetadata:
    """``found`` made anew. Whatever it raises says that something of it cannot be."""
    entries = found.state_dict_metadata
    objects: dict[str, tuple[str, int, int]] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for index, info in found.storage_data.items():
        place = (info.relative_path, info.offset, info.length)
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored by an extension of DCP, which cannot be read")
        if isinstance(entries.get(index.fqn), BytesStorageMetadata):
            objects[index.fqn] = place
        else:
            places[MetadataIndex(index.fqn, index.offset, index.index)] = _StorageInfo(*place)
    tensors = {}
    for name, entry in entries.items():
        if type(name) is not str:
            raise ValueError(f"the name of a tensor is {name!r}")
        if not isinstance(entry, BytesStorageMetadata):
            tensors[name] = _tensor(name, entry, places)
        elif name not in objects:
            raise ValueError(f"{name} is in no file")
    keys = found.planner_data if isinstance(found.planner_data, dict) else {}
    paths = {
        name: path
        for name, path in keys.items()
        if isinstance(path, tuple) and all(type(key) in (str, int) for key in path)
    }
    return ForeignMetadata(Metadata(dict(tensors), storage_data=places), objects, paths)


def _tensor(
    name: str, entry: TensorStorageMetadata, places: Mapping[MetadataIndex, _StorageInfo]
) -> TensorStorageMetadata:
    size, dtype = torch.Size(entry.size), entry.properties.dtype
    chunks = [
        ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks
    ]
    for chunk in chunks:
        box = list(zip(chunk.offsets, chunk.sizes, size, strict=True))
        if not all(0 <= start and 0 <= length <= whole - start for start, length, whole in box):
            raise ValueError(
                f"{name}: a chunk of shape {tuple(chunk.sizes)} at {tuple(chunk.offsets)} does not "
                f"fit into {tuple(size)}"
            )
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or place.length < math.prod(chunk.sizes) * dtype.itemsize:
            raise ValueError(f"{name}: the chunk at {tuple(chunk.offsets)} is in no file")
    filled = sum(math.prod(chunk.sizes) for chunk in chunks)
    if not chunks or filled != math.prod(size):
        raise ValueError(f"{name}: {len(chunks)} chunks hold {filled} of {math.prod(size)} numbers")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
