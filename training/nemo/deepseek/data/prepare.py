"""Text to ``.bin/.idx``: many processes, one result; killed and run again, it goes on.

While it works everything lies in the folder ``P.partial``: ids and document lengths, appended in
the order of the input, and a journal that says how far they are complete. Started again with the
same input and settings, the files are cut back to the journal and the work goes on from there. So
the bytes never depend on the number of processes, nor on how often the work was interrupted.

At the end there are ``P.bin``, ``P.idx``, ``P.tokenizer/`` and ``P.json`` (the record: settings,
counts, digests).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.corpus import Corpus, pieces
from deepseek.data.indexed import IndexedDataset, dtype_for, write_index
from deepseek.data.prepared import FORMAT, PreparedData, already_there, input_sha256, is_output
from deepseek.data.tokenizer import (
    Tokenizer,
    load_tokenizer,
    train_bpe,
)
from deepseek.data.tokenizer_backend import tokenizers_installed
from deepseek.files import Lock, add_suffix, atomic_open, require_room, sync, sync_folder

log = logging.getLogger("deepseek.data")

_BATCH = 1 << 20
"""Characters sent to a worker at once."""
_TRAINING_BYTES = 64 << 20
"""Text that a BPE is trained on; of more, evenly spaced pieces are taken."""


@dataclass(frozen=True)
class Progress:
    """How far the work is."""

    stage: str
    """``training tokenizer``, ``tokenizing`` or ``finishing``."""
    done: int
    """Input bytes done."""
    total: int
    """Input bytes in all."""
    documents: int
    tokens: int


def prepare(
    inputs: Sequence[Path] | None,
    output_prefix: Path,
    tokenizer: Path | None = None,
    *,
    vocab_size: int = 4096,
    json_key: str = "text",
    workers: int = 1,
    append_eos: bool = True,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    journal_bytes: int = 4 << 20,
) -> PreparedData:
    """Turn documents into ``P.bin``, ``P.idx``, ``P.json`` and ``P.tokenizer/``.

    inputs: files and folders, or None for the built-in corpus; tokenizer: a ``tokenizer.json`` or
    its folder, or None to train a byte-level BPE of ``vocab_size`` ids; workers: processes (1: this
    one, with the threads of ``tokenizers``); append_eos: end every document with the end token;
    overwrite: replace data of other settings under the same prefix; journal_bytes: bytes of text
    after which progress is made safe.

    If the same data is already there it returns at once. A second process for the same prefix waits
    for the first.

    Raises:
        UserError: unreadable input, no documents, no room on the disk, other data under the prefix.
    """
    prefix = Path(output_prefix)
    if workers < 1:
        raise UserError(f"workers={workers}: give at least 1")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        given = None if tokenizer is None else load_tokenizer(tokenizer)
        if inputs is None:
            corpus = Corpus.stdlib()
        else:
            corpus = Corpus.from_paths(inputs, exclude=lambda path: is_output(path, prefix))
        if corpus.skipped:
            log.warning(
                "left out %d binary files, the first is %s", len(corpus.skipped), corpus.skipped[0]
            )
        settings = {
            "inputs": "the Python standard library" if inputs is None else "files",
            "json_key": json_key,
            "append_eos": append_eos,
            "tokenizer": _tokenizer_setting(given, vocab_size),
        }
        with Lock(
            add_suffix(prefix, ".lock"),
            on_wait=lambda holder: log.warning("%s: waiting for %s", prefix, holder),
        ):
            done = already_there(prefix, corpus, settings, overwrite)
            if done is not None:
                # Left over if the run that made it was killed while it tidied up.
                shutil.rmtree(add_suffix(prefix, ".partial"), ignore_errors=True)
                return done
            report = progress or (lambda state: None)
            work = _Work(prefix, corpus, settings, given, vocab_size, journal_bytes, report)
            return work.run(workers)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"{prefix}: the disk is full; free some room and run again, it goes on from where "
                "it is"
            ) from error
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Mark:
    """How far the files of ``P.partial`` are complete: one line of the journal."""

    source: int = 0
    """Files read to their end."""
    pieces: int = 0
    """Pieces of the next file that are done."""
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    open_tokens: int = 0
    """Ids of the document that is not complete yet; counted in ``tokens``."""
    text_bytes: int = 0
    max_id: int = 0
    complete: bool = False
    """Nothing is left to read."""


class _Batch(NamedTuple):
    """Consecutive pieces, as sent to a worker."""

    texts: list[str]
    lasts: list[bool]
    source: int
    pieces: int
    """Place in the input after this batch, as in ``_Mark``."""
    digests: list[str]
    """sha256 of the files that end in this batch."""
    done: int
    """Input bytes up to here."""


class _Encoded(NamedTuple):
    """A batch after a worker."""

    ids: bytes
    """Ids of all pieces, in the dtype of the file."""
    counts: list[int]
    """Ids of each piece; 0 for an empty document."""
    text_bytes: int
    max_id: int


class _Work:
    """The folder ``P.partial`` and the way from there to the finished files."""

    def __init__(
        self,
        prefix: Path,
        corpus: Corpus,
        settings: dict[str, Any],
        given: Tokenizer | None,
        vocab_size: int,
        journal_bytes: int,
        report: Callable[[Progress], None],
    ) -> None:
        self.prefix, self.corpus, self.settings = prefix, corpus, settings
        self.given, self.vocab_size = given, vocab_size
        self.journal_bytes, self.report = journal_bytes, report
        self.folder = add_suffix(prefix, ".partial")
        self.journal = self.folder / "journal.jsonl"
        self.bin, self.lengths = self.folder / "ids.bin", self.folder / "lengths.bin"
        self.mark = _Mark()
        self.digests: list[str] = []
        self.resumed = False

    def run(self, workers: int) -> PreparedData:
        self._open()
        tokenizer = self._tokenizer()
        dtype = dtype_for(tokenizer.vocab_size)
        self._cut_back(dtype)
        if not self.mark.complete:
            self._check_room(tokenizer, dtype)
            self._tokenize(tokenizer, dtype, workers)
        return self._finish(tokenizer, dtype)

    def _open(self) -> None:
        """Read the journal, or begin a new one."""
        head = {
            "format": FORMAT,
            "settings": self.settings,
            "input_stat": self.corpus.stat_digest(),
        }
        if self.journal.is_file():
            lines = _json_lines(self.journal)
            if lines and lines[0] == head and (self.folder / "tokenizer").is_dir():
                for line in lines[1:]:
                    self.digests += line.pop("digests")
                    self.mark = _Mark(**line)
                self.resumed = True
                return
            log.warning("%s belongs to other settings or other input: starting anew", self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.report(self._progress("training tokenizer", 0))
        (self.given or self._train()).save(self.folder / "tokenizer")
        self.bin.touch()
        self.lengths.touch()
        with atomic_open(self.journal) as stream:
            stream.write((json.dumps(head) + "\n").encode())

    def _train(self) -> Tokenizer:
        stride = max(1, math.ceil(self.corpus.total_bytes / _TRAINING_BYTES))

        def texts() -> Iterator[str]:
            count = done = 0
            for source in self.corpus.sources:
                for piece in pieces(source, self.settings["json_key"]):
                    if count % stride == 0:
                        yield piece.text
                    count += 1
                done += source.size
                self.report(self._progress("training tokenizer", done))

        tokenizer = train_bpe(texts(), self.vocab_size)
        if tokenizers_installed() and tokenizer.vocab_size < self.vocab_size:
            log.warning(
                "the text gives a tokenizer of %d ids, %d were asked for",
                tokenizer.vocab_size,
                self.vocab_size,
            )
        return tokenizer

    def _tokenizer(self) -> Tokenizer:
        return self.given or load_tokenizer(self.folder / "tokenizer")

    def _check_room(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        packed = sum(s.size for s in self.corpus.sources if s.compressed or s.kind == "parquet")
        text = self.corpus.total_bytes + 3 * packed
        # English and code have 3 to 5 bytes an id; 256 byte values have one.
        per_id = 4 if tokenizer.vocab_size > 300 else 1
        needed = text // per_id * dtype.itemsize - self.bin.stat().st_size
        require_room(self.folder, needed, f"{add_suffix(self.prefix, '.bin').name}")

    def _cut_back(self, dtype: np.dtype) -> None:
        """Drop what was written after the last line of the journal."""
        wanted = {
            self.bin: self.mark.tokens * dtype.itemsize,
            self.lengths: self.mark.documents * 4,
        }
        final = add_suffix(self.prefix, ".bin")
        if self.mark.complete and not self.bin.exists() and _size(final) == wanted[self.bin]:
            del wanted[self.bin]  # _finish has moved it there
        if any(_size(path) < size for path, size in wanted.items()):
            log.warning("%s is damaged: starting anew", self.folder)
            self.mark, self.digests, self.resumed = _Mark(), [], False
            head = self.journal.read_bytes().split(b"\n", 1)[0]
            self.journal.write_bytes(head + b"\n")
            wanted = {self.bin: 0, self.lengths: 0}
        # The journal itself may end in half a line.
        content = self.journal.read_bytes()
        self.journal.write_bytes(content[: content.rfind(b"\n") + 1])
        for path, size in wanted.items():
            with open(path, "ab") as stream:
                stream.truncate(size)

    def _tokenize(self, tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> None:
        eos = tokenizer.eos_id if self.settings["append_eos"] else None
        mark = self.mark
        digests: list[str] = []
        unsafe = 0
        with (
            open(self.bin, "ab") as ids,
            open(self.lengths, "ab") as lengths,
            open(self.journal, "ab") as journal,
        ):

            def make_safe() -> None:
                nonlocal digests, unsafe
                for stream in (ids, lengths):
                    sync(stream)
                line = json.dumps({**asdict(mark), "digests": digests})
                journal.write(line.encode() + b"\n")
                sync(journal)
                self.digests += digests
                digests, unsafe = [], 0

            for batch, encoded in self._encoded(tokenizer, dtype, eos, workers):
                complete, empty, open_tokens = [], 0, mark.open_tokens
                for count, last in zip(encoded.counts, batch.lasts, strict=True):
                    open_tokens += count
                    if last and open_tokens:
                        complete.append(open_tokens)
                    elif last:
                        empty += 1
                    open_tokens = 0 if last else open_tokens
                if complete and max(complete) >= 2**31:
                    raise UserError(
                        f"{self.prefix}: a document has {max(complete)} ids, the .idx format ends "
                        f"at {2**31 - 1}; split the largest input file"
                    )
                ids.write(encoded.ids)
                lengths.write(np.array(complete, "<i4").tobytes())
                mark = _Mark(
                    source=batch.source,
                    pieces=batch.pieces,
                    documents=mark.documents + len(complete),
                    empty_documents=mark.empty_documents + empty,
                    tokens=mark.tokens + sum(encoded.counts),
                    open_tokens=open_tokens,
                    text_bytes=mark.text_bytes + encoded.text_bytes,
                    max_id=max(mark.max_id, encoded.max_id),
                )
                digests += batch.digests
                unsafe += encoded.text_bytes
                if unsafe >= self.journal_bytes:
                    make_safe()
                self.mark = mark
                self.report(self._progress("tokenizing", batch.done))
            mark = self.mark = replace(mark, complete=True)
            make_safe()

    def _encoded(
        self, tokenizer: Tokenizer, dtype: np.dtype, eos: int | None, workers: int
    ) -> Iterator[tuple[_Batch, _Encoded]]:
        """Batches in order with their ids, whoever computes them."""
        batches = self._batches()
        if workers == 1:
            for batch in batches:
                yield batch, _encode(tokenizer, batch.texts, batch.lasts, dtype.str, eos)
            return
        folder = str(self.folder / "tokenizer")
        waiting: deque[tuple[_Batch, Future[_Encoded]]] = deque()
        # spawn: a fork would copy the locks of other threads in whatever state they are.
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        try:
            for batch in batches:
                task = (folder, batch.texts, batch.lasts, dtype.str, eos)
                waiting.append((batch, pool.submit(_encode_in_worker, *task)))
                if len(waiting) > 2 * workers:
                    first, job = waiting.popleft()
                    yield first, job.result()
            while waiting:
                first, job = waiting.popleft()
                yield first, job.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{self.prefix}: a worker process died (out of memory?); run again, it goes on "
                f"from where it is; fewer than {workers} workers need less memory"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batches(self) -> Iterator[_Batch]:
        """What is left of the input, from the mark on."""
        begun, skip = self.mark.source, self.mark.pieces
        done = sum(source.size for source in self.corpus.sources[:begun])
        texts: list[str] = []
        lasts: list[bool] = []
        digests: list[str] = []
        size = 0
        for k, source in enumerate(self.corpus.sources[begun:], begun):
            digest = hashlib.sha256()
            count = 0
            for piece in pieces(source, self.settings["json_key"], digest):
                count += 1
                if count <= skip:
                    continue
                texts.append(piece.text)
                lasts.append(piece.last)
                size += len(piece.text)
                if size >= _BATCH:
                    yield _Batch(texts, lasts, k, count, digests, done + piece.position)
                    texts, lasts, digests, size = [], [], [], 0
            skip = 0
            done += source.size
            digests.append(digest.hexdigest())
            if k == len(self.corpus.sources) - 1:
                yield _Batch(texts, lasts, k + 1, 0, digests, done)
            elif size >= _BATCH // 2:
                yield _Batch(texts, lasts, k + 1, 0, digests, done)
                texts, lasts, digests, size = [], [], [], 0

    def _finish(self, tokenizer: Tokenizer, dtype: np.dtype) -> PreparedData:
        """Move everything to its place, the index last; may be interrupted and repeated."""
        mark = self.mark
        self.report(self._progress("finishing", self.corpus.total_bytes))
        if mark.documents == 0:
            shutil.rmtree(self.folder)
            raise UserError(
                f"{self.prefix}: the input holds no text: {len(self.corpus.sources)} files, "
                f"{mark.empty_documents} empty documents"
            )
        bin_ = add_suffix(self.prefix, ".bin")
        idx = add_suffix(self.prefix, ".idx")
        content = self.bin if self.bin.is_file() else bin_
        with open(content, "rb") as stream:
            bin_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        prepared = PreparedData(
            prefix=self.prefix,
            documents=mark.documents,
            empty_documents=mark.empty_documents,
            tokens=mark.tokens,
            text_bytes=mark.text_bytes,
            max_id=mark.max_id,
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            bin_sha256=bin_sha256,
            settings=self.settings,
            input_stat=self.corpus.stat_digest(),
            input_sha256=input_sha256(self.corpus, self.digests),
            note="continued an interrupted run" if self.resumed else "prepared",
        )
        idx.unlink(missing_ok=True)
        tokenizer.save(prepared.tokenizer_folder)
        prepared.save()
        if content == self.bin:
            os.replace(self.bin, bin_)
        lengths = np.fromfile(self.lengths, "<i4")
        write_index(idx, dtype, lengths, np.arange(len(lengths) + 1))
        sync_folder(self.prefix.parent)
        IndexedDataset(self.prefix)
        shutil.rmtree(self.folder)
        return prepared

    def _progress(self, stage: str, done: int) -> Progress:
        total = self.corpus.total_bytes
        return Progress(stage, done, total, self.mark.documents, self.mark.tokens)


def _tokenizer_setting(given: Tokenizer | None, vocab_size: int) -> str:
    if given is not None:
        return f"given {given.fingerprint}"
    return f"BPE of {vocab_size} trained on the text" if tokenizers_installed() else "bytes"


def _encode(
    tokenizer: Tokenizer, texts: list[str], lasts: list[bool], dtype: str, eos: int | None
) -> _Encoded:
    counts, arrays = [], []
    for text, last, ids in zip(texts, lasts, tokenizer.encode_many(texts), strict=True):
        if eos is not None and last and text:
            ids.append(eos)
        counts.append(len(ids))
        arrays.append(np.array(ids, dtype))
    joined = np.concatenate(arrays) if arrays else np.array([], dtype)
    text_bytes = sum(len(text.encode()) for text in texts)
    return _Encoded(joined.tobytes(), counts, text_bytes, int(joined.max(initial=0)))


def _encode_in_worker(folder: str, *arguments: Any) -> _Encoded:
    return _encode(_worker_tokenizer(folder), *arguments)


@lru_cache(1)
def _worker_tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


def _start_worker() -> None:
    """In a worker: one thread, no Ctrl-C of its own, and no life after its parent's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


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
