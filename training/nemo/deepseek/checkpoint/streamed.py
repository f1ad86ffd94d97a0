"""A checkpoint written piece by piece, by one process that never has it whole in memory.

The result is what ``CheckpointManager.save`` writes: DCP files, metadata, state, manifest. DCP's
own writer keeps every tensor of a file until the file is closed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from deepseek.checkpoint.manifest import MANIFEST, Manifest
from deepseek.checkpoint.metadata import METADATA
from deepseek.checkpoint.shards import TensorSpec
from deepseek.checkpoint.state import STATE, state_to_json
from deepseek.files import FileEntry, HashingWriter, sync_folder, write_durably

FILE_BYTES = 4 * 10**9
"""A file has no more than one tensor beyond this."""

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor and where it lies in a file."""

    name: str
    """Global name of the tensor."""
    offsets: tuple[int, ...]
    """Of its first number in the tensor."""
    sizes: tuple[int, ...]
    start: int
    """Of its bytes in the file."""
    length: int


@dataclass(frozen=True)
class ChunkFile:
    """A file of chunks."""

    name: str
    entry: FileEntry
    chunks: tuple[Chunk, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChunkFile:
        """The inverse of ``to_json``."""
        chunks = [
            Chunk(c["name"], tuple(c["offsets"]), tuple(c["sizes"]), c["start"], c["length"])
            for c in data["chunks"]
        ]
        return cls(data["name"], FileEntry(**data["entry"]), tuple(chunks))


def files_of(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """The items of each file, in their order."""
    file: list[T] = []
    size = 0
    for item in items:
        file.append(item)
        size += nbytes(item)
        if size >= FILE_BYTES:
            yield file
            file, size = [], 0
    if file:
        yield file


def write_chunks(path: Path, pieces: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> ChunkFile:
    """Write one file, a piece (global name, offsets, numbers) at a time. Raises ``OSError``."""
    chunks: list[Chunk] = []
    entries: list[FileEntry] = []
    stream = HashingWriter(path, entries.append)
    try:
        for name, offsets, tensor in pieces:
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # what is saved is the storage
            start = stream.tell()
            try:
                torch.save(tensor, stream)
            except RuntimeError:  # torch's own about a disk that refuses
                if stream.failure is not None:
                    raise stream.failure from None
                raise
            chunks.append(Chunk(name, offsets, tuple(tensor.shape), start, stream.tell() - start))
        stream.close()
    except BaseException:
        stream.raw.close()
        raise
    return ChunkFile(path.name, entries[0], tuple(chunks))


def write_checkpoint(
    path: Path,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    files: Iterable[ChunkFile],
    state: dict[str, Any],
) -> None:
    """Make a checkpoint of the directory ``path`` in which ``files`` have been written.

    Args:
        path: the directory.
        step: of the checkpoint.
        shapes: global shape of every tensor.
        dtype: of all of them.
        files: their chunks together are the tensors.
        state: as for ``CheckpointManager.save``.

    Raises ``OSError``, and ``UserError`` if ``state`` cannot be kept.
    """
    written = list(files)
    entries = {file.name: file.entry for file in written}
    specs = {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}
    metadata = described(written, specs)
    content = {METADATA: pickle.dumps(metadata), STATE: state_to_json(state)}
    for name, data in content.items():
        (path / name).unlink(missing_ok=True)
        entries[name] = write_durably(path / name, data)
    (path / MANIFEST).unlink(missing_ok=True)
    write_durably(path / MANIFEST, Manifest(step, entries).to_json())
    sync_folder(path)


def described(files: Iterable[ChunkFile], specs: Mapping[str, TensorSpec]) -> Metadata:
    """The tensors ``specs``, whose chunks are in ``files``, as DCP describes them."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in specs}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for chunk in file.chunks:
            offsets, known = torch.Size(chunk.offsets), chunks[chunk.name]
            index = MetadataIndex(chunk.name, offsets, len(known))
            places[index] = _StorageInfo(file.name, chunk.start, chunk.length)
            known.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
    tensors = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), chunks[name]
        )
        for name, spec in specs.items()
    }
    return Metadata(dict(tensors), storage_data=places, storage_meta=StorageMeta())
