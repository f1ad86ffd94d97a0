"""Megatron's indexed datasets: ``P.bin`` holds token ids, ``P.idx`` says where documents lie.

``P.idx``, little-endian::

    9 bytes     magic, "MMIDIDX" and two zero bytes
    uint64      version, 1
    uint8       code of the dtype of the ids (``DTYPES``)
    uint64      S, number of sequences
    uint64      D + 1, number of documents plus one
    int32[S]    ids in each sequence
    int64[S]    byte offset of each sequence in P.bin
    int64[D+1]  first sequence of each document, and S at the end
    int8[S]     modes; only in multimodal files, not read

Format of Megatron-Core ``core/datasets/indexed_dataset.py``, also written by NeMo and AutoModel.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from deepseek.config.errors import UserError
from deepseek.files import add_suffix, atomic_open

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_BLOCK = 1 << 20


class IndexedDataset:
    """Read ``P.bin`` and ``P.idx`` without copying them; documents are views of the mapped file.

    Memory: 8 bytes per document, the rest is mapped. Copies sent to other processes map the files
    anew.

    Args:
        prefix: ``P``.

    Raises:
        UserError: a file is missing, empty, truncated, not of this format, or the two do not belong
            together; the message has the numbers.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        idx, bin_ = add_suffix(self.prefix, ".idx"), add_suffix(self.prefix, ".bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise UserError(_missing(self.prefix, path))
        self.dtype, lengths, pointers, indices = _read_index(idx)
        self.num_sequences = len(lengths)
        self.num_documents = len(indices) - 1
        self.num_tokens = _check_pointers(idx, lengths, pointers, self.dtype.itemsize)

        expected, actual = self.num_tokens * self.dtype.itemsize, bin_.stat().st_size
        if actual != expected:
            which = "is truncated" if actual < expected else "does not belong to its index"
            raise UserError(
                f"{bin_} {which}: {idx.name} describes {self.num_tokens} ids of "
                f"{self.dtype.itemsize} bytes = {expected} bytes, the file has {actual}; "
                "copy both files again or prepare the data again"
            )
        if self.num_tokens == 0:
            raise UserError(f"{bin_} is empty: {idx.name} describes no ids; prepare the data again")
        # A plain array over the map: every slice of a memmap object costs microseconds more.
        self.tokens = np.memmap(bin_, dtype=self.dtype, mode="r").view(np.ndarray)
        """All ids of the file, [num_tokens], in the file's dtype, read-only."""
        self.document_offsets = _document_offsets(pointers, indices, self.num_tokens, self.dtype)
        """Position in ``tokens`` where each document begins, and num_tokens: int64 [D+1]."""

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids ``start:stop`` of a document (its sequences joined): a read-only view."""
        first, end = self.document_offsets[index : index + 2].tolist()
        return self.tokens[first:end][start:stop]

    @property
    def document_lengths(self) -> np.ndarray:
        """Ids in each document, int64 [D]."""
        return np.diff(self.document_offsets)

    def __len__(self) -> int:
        return self.num_documents

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest id; reads the whole file, in blocks."""
        lows, highs = [], []
        for start in range(0, self.num_tokens, _BLOCK):
            block = self.tokens[start : start + _BLOCK]
            lows.append(int(block.min()))
            highs.append(int(block.max()))
        return min(lows), max(highs)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of sizes and content: all of it up to 64 MiB a file, else 64 blocks of 1 MiB."""
        digest = hashlib.sha256()
        for suffix in (".idx", ".bin"):
            path = add_suffix(self.prefix, suffix)
            size = path.stat().st_size
            digest.update(struct.pack("<Q", size))
            blocks = -(-size // _BLOCK)
            with open(path, "rb") as stream:
                for k in range(min(blocks, 64)):
                    stream.seek(k * (blocks - 1) // 63 * _BLOCK if blocks > 64 else k * _BLOCK)
                    digest.update(stream.read(_BLOCK))
        return digest.hexdigest()

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[Path]]:
        return IndexedDataset, (self.prefix,)


class IndexedWriter:
    """Write ``P.bin`` and ``P.idx``; a context manager.

    Both files are written under temporary names and renamed at the end, ``.idx`` last, so a pair
    that can be opened is whole. An exception leaves nothing behind. Memory: 4 bytes a sequence and
    8 a document.

    Args:
        prefix: ``P``.
        dtype: of the ids in the file; see ``dtype_for``.

    Raises:
        UserError: the format has no code for ``dtype``.
    """

    def __init__(self, prefix: str | Path, dtype: np.typing.DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        dtype_code(self.dtype)
        self._lengths = array("i")
        self._indices = array("q", [0])
        self._bin = atomic_open(add_suffix(self.prefix, ".bin"))
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> IndexedWriter:
        self._stream = self._bin.__enter__()
        return self

    def add_sequence(self, ids: Iterable[int] | np.ndarray) -> None:
        """Append one sequence to the current document.

        Raises:
            UserError: an id does not fit the dtype.
        """
        assert self._stream is not None, "use the writer in a with statement"
        given = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        converted = given.astype(self.dtype)
        if not np.array_equal(given, converted):
            wrong = given[given != converted][0]
            raise UserError(
                f"{self.prefix}: id {wrong} does not fit {self.dtype.name}; "
                "open the writer with a wider dtype"
            )
        self._stream.write(converted.tobytes())
        self._lengths.append(len(converted))

    def end_document(self) -> None:
        """Close the current document; without sequences it is an empty one."""
        self._indices.append(len(self._lengths))

    def add_document(self, ids: Iterable[int] | np.ndarray) -> None:
        """Append a document of one sequence."""
        self.add_sequence(ids)
        self.end_document()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        idx = add_suffix(self.prefix, ".idx")
        if kind is None:
            # A new .bin must never meet an old .idx.
            idx.unlink(missing_ok=True)
        self._bin.__exit__(kind, error, trace)
        if kind is None:
            lengths = np.frombuffer(self._lengths, np.int32)
            write_index(idx, self.dtype, lengths, np.frombuffer(self._indices, np.int64))


def write_index(
    path: Path, dtype: np.dtype, lengths_S: np.ndarray, document_indices: np.ndarray
) -> None:
    """Write an ``.idx`` file atomically.

    Args:
        path: of the file.
        dtype: of the ids in ``P.bin``.
        lengths_S: ids in each sequence, [S].
        document_indices: first sequence of each document, and S, [D+1].
    """
    with atomic_open(path) as stream:
        code = dtype_code(dtype)
        stream.write(HEADER.pack(MAGIC, 1, code, len(lengths_S), len(document_indices)))
        stream.write(lengths_S.astype("<i4").tobytes())
        offset = 0
        for start in range(0, len(lengths_S), _BLOCK):
            ends = np.cumsum(lengths_S[start : start + _BLOCK], dtype=np.int64) * dtype.itemsize
            begins = np.concatenate([[0], ends[:-1]]) + offset
            stream.write(begins.astype("<i8").tobytes())
            offset += int(ends[-1])
        stream.write(document_indices.astype("<i8").tobytes())


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype Megatron chooses: uint16 if the vocabulary is below 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def dtype_code(dtype: np.dtype) -> int:
    """The code of a dtype in the header.

    Raises:
        UserError: the format has no code for it.
    """
    for code, known in DTYPES.items():
        if known == dtype:
            return code
    names = ", ".join(known.name for known in DTYPES.values())
    raise UserError(f"dtype {dtype.name} has no code in the .idx format; use one of {names}")


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Dtype, lengths [S], pointers [S] and document indices [D+1] of a validated ``.idx``."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise UserError(
            f"{path} is not a Megatron index: it begins with {head[:9]!r}, expected {MAGIC!r}; "
            "give the prefix of a .bin/.idx pair made by prepare-data or Megatron"
        )
    if len(head) < HEADER.size:
        raise UserError(
            f"{path} is truncated: the header has {HEADER.size} bytes, the file {size}; "
            "copy it again or prepare the data again"
        )
    _, version, code, sequences, documents = HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{path}: index version {version}, only version 1 can be read")
    if code not in DTYPES:
        known = ", ".join(f"{key} {dtype.name}" for key, dtype in DTYPES.items())
        raise UserError(f"{path}: unknown dtype code {code}; known are {known}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):
        what = "is truncated" if size < expected else "has bytes after its end"
        raise UserError(
            f"{path} {what}: {sequences} sequences and {documents - 1} documents take {expected} "
            f"bytes, the file has {size}; copy it again or prepare the data again"
        )
    if sequences == 0 or documents < 2:
        raise UserError(
            f"{path} is empty: {sequences} sequences, {max(0, documents - 1)} documents; "
            "prepare the data again from an input with text"
        )
    content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    indices = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)
    if indices[0] != 0 or indices[-1] != sequences or np.any(np.diff(indices) < 0):
        raise UserError(
            f"{path} is damaged: document indices must rise from 0 to {sequences}, they run from "
            f"{indices[0]} to {indices[-1]}; copy it again or prepare the data again"
        )
    return DTYPES[code], lengths, pointers, indices


def _check_pointers(path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Total ids; UserError unless every sequence begins where the one before it ends."""
    total = 0
    for start in range(0, len(lengths), _BLOCK):
        block = lengths[start : start + _BLOCK]
        ends = np.cumsum(block, dtype=np.int64) + total
        expected = (ends - block) * itemsize
        wrong = np.flatnonzero((pointers[start : start + _BLOCK] != expected) | (block < 0))
        if len(wrong):
            k = int(wrong[0])
            raise UserError(
                f"{path} is damaged: sequence {start + k} ({block[k]} ids) begins at byte "
                f"{pointers[start + k]}, but the ones before it end at {expected[k]}; "
                "copy it again or prepare the data again"
            )
        total = int(ends[-1])
    return total


def _document_offsets(
    pointers: np.ndarray, indices: np.ndarray, total: int, dtype: np.dtype
) -> np.ndarray:
    offsets = np.full(len(indices), total, np.int64)
    # Empty documents at the end point past the last sequence: they keep the total.
    inside = int(np.searchsorted(indices, len(pointers), side="left"))
    offsets[:inside] = pointers[indices[:inside]] // dtype.itemsize
    return offsets


def _missing(prefix: Path, path: Path) -> str:
    if prefix.suffix in (".bin", ".idx") and prefix.is_file():
        bare = prefix.with_suffix("")
        return f"{path} does not exist; give the prefix without {prefix.suffix}: {bare}"
    other = add_suffix(prefix, ".bin" if path.suffix == ".idx" else ".idx")
    if other.is_file():
        return f"{path} does not exist, but {other.name} does; copy the missing half of the pair"
    parent = prefix.parent
    found = sorted(p.stem for p in parent.glob("*.idx")) if parent.is_dir() else []
    hint = f"prefixes in {parent}: {', '.join(found[:5])}" if found else "make it with prepare-data"
    return f"{path} does not exist; {hint}"
