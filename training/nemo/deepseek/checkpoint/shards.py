"""The tensors of a checkpoint as DCP shards: global names, any layout in, any layout out."""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from deepseek.checkpoint.manifest import MANIFEST, STATE, Manifest, state_to_json
from deepseek.checkpoint.metadata import METADATA
from deepseek.checkpoint.ranks import Ranks
from deepseek.config.errors import UserError
from deepseek.files import FileEntry, HashingWriter, sync_folder, write_durably

FILE_BYTES = 4 * 10**9
"""A streamed file has no more than one tensor beyond this."""

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Planner(dcp.DefaultSavePlanner):
    """What each rank writes, agreed upon once: the next save with it repeats that.

    At 2,048 ranks of V3 the plans have 379,392 parts, which rank 0 otherwise collects, compares and
    hands out anew at each save. To be used again only with the same tensors in the same places.
    """

    def __init__(self) -> None:
        super().__init__()
        self._agreed: dcp.SavePlan | None = None

    def create_local_plan(self) -> dcp.SavePlan:
        """Of this rank; empty if all know it."""
        return super().create_local_plan() if self._agreed is None else dcp.SavePlan([])

    def create_global_plan(
        self, all_plans: list[dcp.SavePlan]
    ) -> tuple[list[dcp.SavePlan], Metadata]:
        """Who writes what of all, on rank 0."""
        if self._agreed is None:
            return super().create_global_plan(all_plans)
        return all_plans, self.metadata

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        """This rank's part of it."""
        self._agreed = self._agreed or super().finish_plan(new_plan)
        return self._agreed

    def forget(self) -> None:
        """Let go of what the next save does not need: the tensors, and the plans of other ranks."""
        self.state_dict, self.global_plan = {}, []


def write_shards(
    path: Path, tensors: dict[str, Tensor], ranks: Ranks, planner: Planner | None = None
) -> dict[str, FileEntry]:
    """Write ``tensors`` into the directory ``path``; a collective.

    Args:
        path: of the directory.
        tensors: by global name.
        ranks: that write together.
        planner: of a save before, of the same tensors in the same places; None: one of this save.

    Returns:
        Name, size and digest of the files this rank wrote, all of them synced.

    Raises:
        UserError: the disk is full or refuses, here or on another rank.
    """
    writer, planner = _Writer(path), planner or Planner()
    try:
        with _explained(f"writing to {path}", writer.files):
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=planner,
                process_group=ranks.group,
                no_dist=not ranks.active,
            )
    finally:
        planner.forget()
    return writer.files.written


def read_shards(path: Path, metadata: Metadata, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill ``tensors`` in place from the directory ``path``; a collective.

    Names, shapes and dtypes must have been checked against ``metadata``, the files against their
    digests. Raises ``UserError`` if a file cannot be read.
    """
    read_tensors(_Reader(path, metadata), path, tensors, ranks)


def read_tensors(
    reader: dcp.StorageReader, path: Path, tensors: dict[str, Tensor], ranks: Ranks
) -> None:
    """Fill ``tensors`` in place with what ``reader`` finds in ``path``; a collective."""
    # Names are global and flat: the planner has nothing to flatten.
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _explained(f"reading from {path}"):
        dcp.load(
            dict(tensors),
            storage_reader=reader,
            planner=planner,
            process_group=ranks.group,
            no_dist=not ranks.active,
        )


# -- chunk by chunk, by one process that never has the whole in memory ----------------------------


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

    Raises ``OSError``, and ``UserError`` if ``state`` cannot be kept or the chunks do not fill the
    tensors.
    """
    written = list(files)
    found = dict.fromkeys(shapes, 0)
    for file in written:
        for chunk in file.chunks:
            found[chunk.name] += torch.Size(chunk.sizes).numel()
    partial = [name for name, shape in shapes.items() if found[name] != torch.Size(shape).numel()]
    if partial:
        raise UserError(f"{len(partial)} tensors were not written whole, such as {partial[0]}")
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


# -- DCP's reader and writer ----------------------------------------------------------------------


class _HashingFiles(FileSystem):
    """DCP's file system with durable, hashed writing."""

    def __init__(self) -> None:
        self.written: dict[str, FileEntry] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", mode
        name = Path(path).name
        stream = HashingWriter(Path(path), lambda entry: self.written.update({name: entry}))
        try:
            with stream:
                yield cast(io.IOBase, stream)
        finally:
            self.failure = self.failure or stream.failure

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer on ``_HashingFiles``.

    It stores no path and no random id: equal tensors in an equal layout give equal files.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync_files=False, overwrite=False)
        self.files = _HashingFiles()
        self.fs = self.files

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class _Reader(dcp.FileSystemReader):
    """DCP's reader, given metadata that has been checked instead of unpickling its own."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._checked = metadata

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return self._checked


@contextmanager
def _explained(doing: str, files: _HashingFiles | None = None) -> Iterator[None]:
    """Turn what DCP raises into a ``UserError``; an interruption stays one.

    DCP's own exception derives from ``BaseException``, wraps even Ctrl-C, and hides the error of
    the disk, which ``files`` remembers.
    """
    # For good, as a filter put back by one thread would undo what another one has set meanwhile.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        yield
    except CheckpointException as failure:
        causes = {rank: cause for rank, (cause, _) in failure.failures.items()}
        for cause in causes.values():
            if not isinstance(cause, Exception):
                raise cause from None
        if files is not None and files.failure is not None:
            raise UserError(
                f"{doing} failed: {files.failure.strerror}; earlier checkpoints are untouched, "
                "make room on the disk or use another run folder"
            ) from failure
        texts = [f"rank {rank}: {_first_line(cause)}" for rank, cause in causes.items()]
        raise UserError(f"{doing} failed: {'; '.join(texts)}") from failure


def _first_line(cause: BaseException) -> str:
    text = str(cause).splitlines()
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__
