"""The tensors of a checkpoint as DCP shards: global names, any layout in, any layout out."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from deepseek.checkpoint.ranks import Ranks
from deepseek.config.errors import UserError
from deepseek.files import FileEntry, HashingWriter


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(path: Path, tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, FileEntry]:
    """Write ``tensors`` into the directory ``path``; a collective.

    Returns:
        Name, size and digest of the files this rank wrote, all of them synced.

    Raises:
        UserError: the disk is full or refuses, here or on another rank.
    """
    writer = _Writer(path)
    with _explained(f"writing to {path}", writer.files):
        dcp.save(
            dict(tensors),
            storage_writer=writer,
            process_group=ranks.group,
            no_dist=not ranks.active,
        )
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
