"""The folder ``P.partial``: prepared data while it is written, and how far it is complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.data.corpus import Corpus
from deepseek.data.documents import Chunk
from deepseek.data.prepared import FORMAT, Progress
from deepseek.data.tokenizer import Tokenizer
from deepseek.files import add_suffix, atomic_open, sync


@dataclass(frozen=True)
class State:
    """How far the files of ``P.partial`` are complete: one line of the journal."""

    source: int = 0
    """Files read to their end."""
    chunks: int = 0
    """Chunks of the next file that are done."""
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    open_tokens: int = 0
    """Ids of the document that is not complete yet; counted in ``tokens``."""
    text_bytes: int = 0
    max_id: int = 0
    complete: bool = False
    """Nothing is left to read."""


class Batch(NamedTuple):
    """Consecutive chunks, as sent to a worker."""

    parts: list[Chunk]
    source: int
    chunks: int
    """Place in the input after this batch, as in ``State``."""
    digests: list[str]
    """sha256 of the files that end in this batch."""
    done: int
    """Input bytes up to here."""


class Encoded(NamedTuple):
    """A batch after a worker."""

    ids: bytes
    """Ids of all chunks, in the dtype of the file."""
    counts: list[int]
    """Ids of each chunk; 0 for an empty document."""
    text_bytes: int
    max_id: int


class Partial:
    """The folder ``P.partial``: ids, lengths of documents, and the journal.

    Attributes:
        state: how far ids and lengths are written; durable after ``commit``.
        digests: sha256 of the files read to their end.
        resumed: an earlier run has begun it.
    """

    def __init__(self, prefix: Path, corpus: Corpus, settings: dict[str, Any]) -> None:
        self.prefix, self.corpus, self.settings = prefix, corpus, settings
        self.folder = add_suffix(prefix, ".partial")
        self.journal = self.folder / "journal.jsonl"
        self.bin, self.lengths = self.folder / "ids.bin", self.folder / "lengths.bin"
        self.tokenizer_folder = self.folder / "tokenizer"
        self._noted = 0
        self._forget()

    def load(self) -> bool:
        """Read the journal; False if there is none of this input and these settings."""
        if not self.journal.is_file():
            return False
        head, *lines = _json_lines(self.journal) or [{}]
        if head != self._head() or not self.tokenizer_folder.is_dir():
            complain(f"{self.folder} belongs to other settings or other input: starting anew")
            return False
        for line in lines:
            self.digests += line.pop("digests")
            self.state = State(**line)
        self.resumed = True
        return True

    def create(self, tokenizer: Tokenizer) -> None:
        """Begin anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        tokenizer.save(self.tokenizer_folder)
        self.bin.touch()
        self.lengths.touch()
        with atomic_open(self.journal) as stream:
            stream.write((json.dumps(self._head()) + "\n").encode())

    def cut_back(self, dtype: np.dtype) -> None:
        """Drop what was written after the last line of the journal."""
        wanted = {
            self.bin: self.state.tokens * dtype.itemsize,
            self.lengths: self.state.documents * 4,
        }
        final = add_suffix(self.prefix, ".bin")
        if self.state.complete and not self.bin.exists() and _size(final) == wanted[self.bin]:
            del wanted[self.bin]  # _finish has moved it there
        if any(_size(path) < size for path, size in wanted.items()):
            complain(f"{self.folder} is damaged: starting anew")
            self._forget()
            self.journal.write_bytes(self.journal.read_bytes().split(b"\n", 1)[0] + b"\n")
            wanted = {self.bin: 0, self.lengths: 0}
        # The journal itself may end in half a line.
        content = self.journal.read_bytes()
        self.journal.write_bytes(content[: content.rfind(b"\n") + 1])
        for path, size in wanted.items():
            with open(path, "ab") as stream:
                stream.truncate(size)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Within, ``append`` and ``commit`` may be called."""
        with (
            open(self.bin, "ab") as ids,
            open(self.lengths, "ab") as lengths,
            open(self.journal, "ab") as journal,
        ):
            self._streams = ids, lengths, journal
            yield

    def append(self, batch: Batch, encoded: Encoded) -> None:
        """Write a batch behind those before it.

        Raises:
            UserError: a document is too long for the ``.idx`` format.
        """
        complete, empty, open_tokens = [], 0, self.state.open_tokens
        for count, part in zip(encoded.counts, batch.parts, strict=True):
            open_tokens += count
            if part.last and open_tokens:
                complete.append(open_tokens)
            elif part.last:
                empty += 1
            open_tokens = 0 if part.last else open_tokens
        if complete and max(complete) >= 2**31:
            raise UserError(
                f"{self.prefix}: a document has {max(complete)} ids, the .idx format ends "
                f"at {2**31 - 1}; split the largest input file"
            )
        ids, lengths, _ = self._streams
        ids.write(encoded.ids)
        lengths.write(np.array(complete, "<i4").tobytes())
        state = self.state
        self.state = State(
            source=batch.source,
            chunks=batch.chunks,
            documents=state.documents + len(complete),
            empty_documents=state.empty_documents + empty,
            tokens=state.tokens + sum(encoded.counts),
            open_tokens=open_tokens,
            text_bytes=state.text_bytes + encoded.text_bytes,
            max_id=max(state.max_id, encoded.max_id),
        )
        self.digests += batch.digests

    def commit(self) -> None:
        """Make all that is appended durable, and note in the journal how far it goes."""
        ids, lengths, journal = self._streams
        sync(ids)
        sync(lengths)
        line = {**asdict(self.state), "digests": self.digests[self._noted :]}
        journal.write(json.dumps(line).encode() + b"\n")
        sync(journal)
        self._noted = len(self.digests)

    def progress(self, stage: str, done: int) -> Progress:
        """For people."""
        total = self.corpus.total_bytes
        return Progress(stage, done, total, self.state.documents, self.state.tokens)

    def _head(self) -> dict[str, Any]:
        """First line of the journal."""
        digest = self.corpus.stat_digest()
        return {"format": FORMAT, "settings": self.settings, "input_stat": digest}

    def _forget(self) -> None:
        self.state, self.resumed = State(), False
        self.digests: list[str] = []
        self._noted = 0  # digests that are in the journal


def _size(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a journal up to the first line that is not complete."""
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
