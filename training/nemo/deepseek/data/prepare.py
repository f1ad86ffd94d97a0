"""Text to ``.bin/.idx``: many processes, one result; killed and run again, it goes on.

While it works everything lies in the folder ``P.partial``: ids and document lengths, appended in
the order of the input, and a journal that says how far they are complete. Started again with the
same input and settings, the files are cut back to the journal and the work goes on from there. So
the bytes never depend on the number of processes, nor on how often the work was interrupted.

At the end there are ``P.bin``, ``P.idx``, ``P.tokenizer/`` and ``P.json`` (the record: settings,
counts, digests).
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.data.corpus import Corpus, digest_lines, kinds
from deepseek.data.digests import DataFile, FileDigest, damaged
from deepseek.data.documents import Apart, Chunk, chunks
from deepseek.data.indexed import IndexedDataset, dtype_for, write_index
from deepseek.data.tokenizer import Tokenizer, tokenizers_installed
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import train_bpe
from deepseek.files import (
    Lock,
    add_suffix,
    atomic_open,
    disk_errors,
    require_room,
    sha256_of,
    sync,
    sync_folder,
)

FORMAT = "deepseek-data/1"
_BATCH = 1 << 20
"""Characters sent to a worker at once."""
_TRAINING_BYTES = 64 << 20
"""Text that a BPE is trained on; of more, evenly spaced chunks are taken."""


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
    """Written so far, the empty ones left out."""
    tokens: int
    """Ids written so far."""


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class PreparedData:
    """The record of prepared data, ``P.json``."""

    prefix: Path
    documents: int
    empty_documents: int
    """Left out."""
    tokens: int
    """Ids in ``P.bin``, ends of documents included."""
    text_bytes: int
    """UTF-8 bytes of the text behind them."""
    max_id: int
    """Largest id."""
    vocab_size: int
    """Size of the tokenizer."""
    tokenizer_fingerprint: str
    bin_sha256: str
    """Of ``P.bin``."""
    settings: dict[str, Any]
    """What the result depends on, apart from the text."""
    input_stat: str
    """Digest of names, sizes and times of the input files."""
    input_sha256: str
    """Digest of names and contents of the input files."""
    chat: dict[str, Any] | None = None
    """Of conversations: what ``chat.prepare_chat`` counted; then ``P.answers`` tells which ids are
    answers. None: text."""
    files: dict[str, FileDigest] = field(default_factory=dict)
    """By suffix, what the files hold. Empty: written before version 0.2, which knew of ``P.bin``
    alone."""
    note: str = field(default="", compare=False)
    """What happened, for people: prepared, continued, or already there. Not stored."""

    @property
    def tokenizer_folder(self) -> Path:
        """Holds ``tokenizer.json``."""
        return add_suffix(self.prefix, ".tokenizer")

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per id: bits per byte = nats per id / ln 2 / this."""
        return self.text_bytes / self.tokens

    @classmethod
    def load(cls, prefix: Path) -> PreparedData | None:
        """Read the record of ``prefix``; None if ``P.json`` is absent or is not a record.

        Raises:
            UserError: it is no JSON, or a record that this version cannot read or that has changed.
        """
        path = add_suffix(prefix, ".json")
        try:
            content = json.loads(path.read_bytes())
        except OSError:
            return None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged (not JSON: {error}); prepare the data again, or, if it is no "
                "record of prepare-data, move it away"
            ) from error
        if not isinstance(content, dict) or "format" not in content:
            return None
        if content.pop("format") != FORMAT:
            raise UserError(f"{path}: not written by this version; prepare the data again")
        own = content.pop("record_sha256", None)
        try:
            if own != (_record_digest(content) if "files" in content else None):
                raise ValueError("its own digest differs: it was changed after it was written")
            files = {
                suffix: FileDigest(told["sha256"], told["block_bytes"], tuple(told["blocks"]))
                for suffix, told in content.pop("files", {}).items()
            }
            record = cls(prefix=prefix, files=files, **content)
            _check_types(record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare the data again") from error
        return record

    def save(self) -> None:
        """Write ``P.json`` atomically."""
        content = asdict(self)
        del content["prefix"], content["note"]
        if self.chat is None:
            del content["chat"]
        content = {"format": FORMAT, **content, "record_sha256": _record_digest(content)}
        with atomic_open(add_suffix(self.prefix, ".json")) as stream:
            stream.write((json.dumps(content, indent=2) + "\n").encode())

    def data_files(self) -> list[DataFile]:
        """The files of ids, and what is recorded of each."""
        known = self.files or {".bin": FileDigest(self.bin_sha256)}
        files = [
            DataFile(add_suffix(self.prefix, suffix), known.get(suffix))
            for suffix in (".idx", ".bin")
        ]
        if self.chat is not None:
            answers = FileDigest(str(self.chat["answers_sha256"]))
            files.append(DataFile(add_suffix(self.prefix, ".answers"), answers))
        return files


def _record_digest(content: dict[str, Any]) -> str:
    """sha256 of a record without its format and its own digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_types(record: PreparedData) -> None:
    """Raise ``TypeError`` for a value of another type than the field's, ``ValueError`` for none."""
    kinds = {"int": int, "str": str, "dict[str, Any]": dict}
    for this in fields(PreparedData):
        kind, value = kinds.get(str(this.type)), getattr(record, this.name)
        if kind is not None and type(value) is not kind:
            raise TypeError(f"{this.name} is {value!r}, expected {kind.__name__}")
    if record.chat is not None and "answers_sha256" not in record.chat:
        raise ValueError("chat lacks answers_sha256")
    if min(record.tokens, record.documents) < 1 or record.max_id >= record.vocab_size:
        raise ValueError(
            f"{record.documents} documents, {record.tokens} tokens, largest id {record.max_id} of "
            f"{record.vocab_size}"
        )


def prepare(
    inputs: Sequence[Path] | None,
    output_prefix: Path,
    tokenizer: Path | None = None,
    *,
    vocab_size: int = 4096,
    json_key: str = "text",
    workers: int = 1,
    append_eos: bool = True,
    bos: bool | None = None,
    overwrite: bool = False,
    strict: bool = False,
    progress: Report | None = None,
    journal_bytes: int = 4 << 20,
) -> PreparedData:
    """Turn documents into ``P.bin``, ``P.idx``, ``P.json`` and ``P.tokenizer/``.

    If the same data is already there it returns at once. A second process for the same prefix waits
    for the first.

    Args:
        inputs: files and folders; None: the built-in corpus.
        output_prefix: ``P``.
        tokenizer: a ``tokenizer.json`` or its folder; None: a byte-level BPE is trained on the
            text.
        vocab_size: ids of that BPE.
        json_key: key of a JSON line, or column of a parquet file, that holds the text.
        workers: processes; 1: this one, with the threads of ``tokenizers``.
        append_eos: end every document with the end token, or as the tokenizer itself ends a text.
        bos: begin every document with the token for that; None: as the tokenizer itself does.
        overwrite: replace data of other settings under the same prefix.
        strict: refuse folders of which something would be left out.
        progress: called as the work goes on.
        journal_bytes: bytes of text after which what is written is made durable.

    Raises:
        UserError: unreadable input, no documents, no room on the disk, other data under the prefix.
    """
    prefix = Path(output_prefix)
    report = progress or (lambda state: None)
    if workers < 1:
        raise UserError(f"workers={workers}: give at least 1")
    with disk_errors(f"preparing {prefix}", add_suffix(prefix, ".partial")):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        given = None if tokenizer is None else load_tokenizer(tokenizer)
        begin = _begin(given, bos)
        if given is not None and append_eos and not given.suffix_ids:
            given.required_eos()
        corpus = Corpus.stdlib() if inputs is None else corpus_for(prefix, inputs, strict)
        settings = {
            "inputs": "the Python standard library" if inputs is None else "files",
            "json_key": json_key,
            "append_eos": append_eos,
            "tokenizer": _tokenizer_setting(given, vocab_size),
            **({"begin": begin} if begin else {}),
        }
        with one_writer(prefix):
            done = already_there(prefix, corpus, settings, overwrite)
            if done is not None:
                # Left over if the run that made it was killed while it tidied up.
                shutil.rmtree(add_suffix(prefix, ".partial"), ignore_errors=True)
                return done
            # 1. take up what an earlier run left, or begin with the tokenizer
            partial = _Partial(prefix, corpus, settings)
            if not partial.load():
                partial.create(given or _trained(corpus, json_key, vocab_size, report))
            used = given or load_tokenizer(partial.tokenizer_folder)
            dtype = dtype_for(used.vocab_size)
            partial.cut_back(dtype)
            # 2. the rest of the input
            if not partial.state.complete:
                _check_room(partial, used, dtype)
                end = (used.suffix_ids or [used.required_eos()]) if append_eos else []
                around = begin, end
                batches = _batches(corpus, json_key, partial.state, used.apart)
                if workers == 1:
                    encoded = _encoded_here(batches, used, dtype, around)
                else:
                    encoded = _encoded_by_workers(batches, partial, dtype, around, workers)
                _write(partial, encoded, journal_bytes, report)
            # 3. give everything its name
            report(partial.progress("finishing", corpus.total_bytes))
            return _finish(partial, used, dtype)


def _begin(tokenizer: Tokenizer | None, bos: bool | None) -> list[int]:
    """The ids before every document; a tokenizer trained here puts none."""
    if bos is None:
        return [] if tokenizer is None else tokenizer.prefix_ids
    if not bos:
        return []
    if tokenizer is None:
        raise UserError("--bos needs --tokenizer: that of a model which begins texts with a token")
    if tokenizer.bos_id is None and not tokenizer.prefix_ids:
        raise UserError(
            f"{tokenizer.origin}: no token begins a text, as --bos asks; name one in "
            "tokenizer_config.json as bos_token, or leave the option out"
        )
    return tokenizer.prefix_ids or [tokenizer.bos_id]  # type: ignore[list-item]


def corpus_for(prefix: Path, inputs: Sequence[Path], strict: bool) -> Corpus:
    """The input without what is written to ``prefix``; what else is left out is said.

    Raises: as ``Corpus.from_paths``.
    """
    corpus = Corpus.from_paths(inputs, lambda path: is_output(path, prefix), strict)
    if corpus.skipped:
        complain(f"left out: {kinds(corpus.skipped, names=3)}; --strict makes this an error")
    return corpus


@contextmanager
def one_writer(prefix: Path) -> Iterator[None]:
    """Within, no other process prepares data under ``prefix``; it is waited for."""
    with Lock(
        add_suffix(prefix, ".lock"),
        on_wait=lambda holder: complain(f"{prefix}: waiting for {holder}"),
    ):
        yield


# -- what lies under a prefix already --


def already_there(
    prefix: Path, corpus: Corpus, settings: dict[str, Any], overwrite: bool
) -> PreparedData | None:
    """The record if the same data is there; None if there is none or it may be replaced.

    Args:
        prefix: of the output.
        corpus: the input.
        settings: what the result depends on, apart from the text.
        overwrite: other data of ours may be replaced, and files of others.

    Raises:
        UserError: the prefix holds other data.
    """
    record = PreparedData.load(prefix)
    files = [add_suffix(prefix, suffix) for suffix in (".json", ".bin", ".idx")]
    foreign = [path.name for path in files if path.exists()]
    if record is None:
        if foreign and not overwrite:
            raise UserError(
                f"{prefix}: {', '.join(foreign)} exists and was not made by prepare-data; choose "
                "another output, or delete them"
            )
        return None
    changes = [
        f"{key}: {record.settings.get(key)} -> {settings.get(key)}"
        for key in (*settings, *(record.settings.keys() - settings))
        if record.settings.get(key) != settings.get(key)
    ]
    if not changes and record.input_stat != corpus.stat_digest():
        digests = [sha256_of(source.path) for source in corpus.sources]
        if input_sha256(corpus, digests) != record.input_sha256:
            changes = ["the input files have changed"]
    if changes:
        if overwrite:
            return None
        raise UserError(
            f"{prefix} holds data prepared differently ({'; '.join(changes)}); choose another "
            f"output, or delete {prefix}.*"
        )
    try:
        there = IndexedDataset(prefix)
    except UserError:
        return None
    if there.num_tokens != record.tokens:
        return None
    for file in record.data_files():
        different = file.recorded and file.recorded.differences(file.path)
        if different:
            complain(f"{damaged(file.path, different)}: it is prepared again")
            return None
    return replace(record, note="already prepared, nothing to do")


def input_sha256(corpus: Corpus, digests: Sequence[str]) -> str:
    """Digest of names and contents, from the sha256 of each file."""
    names = (source.name for source in corpus.sources)
    return digest_lines(map("\0".join, zip(names, digests, strict=True)))


def is_output(path: Path, prefix: Path) -> bool:
    """True for what prepare writes itself, should the output lie inside an input folder."""
    own = {".bin", ".idx", ".json", ".lock", ".answers"}
    if path.parent.resolve() == prefix.parent.resolve():
        return path.name in {prefix.name + suffix for suffix in own}
    folders = {add_suffix(prefix, suffix).resolve() for suffix in (".partial", ".tokenizer")}
    return not folders.isdisjoint(path.resolve().parents)


# -- the unfinished files --


@dataclass(frozen=True)
class _State:
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


class _Batch(NamedTuple):
    """Consecutive chunks, as sent to a worker."""

    parts: list[Chunk]
    source: int
    chunks: int
    """Place in the input after this batch, as in ``_State``."""
    digests: list[str]
    """sha256 of the files that end in this batch."""
    done: int
    """Input bytes up to here."""


class _Encoded(NamedTuple):
    """A batch after a worker."""

    ids: bytes
    """Ids of all chunks, in the dtype of the file."""
    counts: list[int]
    """Ids of each chunk; 0 for an empty document."""
    text_bytes: int
    max_id: int


class _Partial:
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
            self.state = _State(**line)
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

    def append(self, batch: _Batch, encoded: _Encoded) -> None:
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
        self.state = _State(
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
        self.state, self.resumed = _State(), False
        self.digests: list[str] = []
        self._noted = 0  # digests that are in the journal


# -- the steps --


def _trained(corpus: Corpus, json_key: str, vocab_size: int, report: Report) -> Tokenizer:
    """A BPE of the text."""
    stride = max(1, math.ceil(corpus.total_bytes / _TRAINING_BYTES))

    def tell(done: int) -> None:
        report(Progress("training tokenizer", done, corpus.total_bytes, 0, 0))

    def texts() -> Iterator[str]:
        count = done = 0
        for source in corpus.sources:
            for chunk in chunks(source, json_key):
                if count % stride == 0:
                    yield chunk.text
                count += 1
            done += source.size
            tell(done)

    tell(0)
    tokenizer = train_bpe(texts(), vocab_size)
    if tokenizers_installed() and tokenizer.vocab_size < vocab_size:
        complain(
            f"the text gives a tokenizer of {tokenizer.vocab_size} ids, {vocab_size} were asked for"
        )
    return tokenizer


def _check_room(partial: _Partial, tokenizer: Tokenizer, dtype: np.dtype) -> None:
    packed = sum(s.size for s in partial.corpus.sources if s.compressed or s.kind == "parquet")
    text = partial.corpus.total_bytes + 3 * packed
    # English and code have 3 to 5 bytes an id; 256 byte values have one.
    per_id = 4 if tokenizer.vocab_size > 300 else 1
    needed = text // per_id * dtype.itemsize - partial.bin.stat().st_size
    require_room(partial.folder, needed, f"{partial.prefix.name}.bin")


def _batches(corpus: Corpus, json_key: str, state: _State, apart: Apart | None) -> Iterator[_Batch]:
    """What is left of the input after ``state``."""
    begun, skip = state.source, state.chunks
    done = sum(source.size for source in corpus.sources[:begun])
    parts: list[Chunk] = []
    digests: list[str] = []
    size = 0
    for k, source in enumerate(corpus.sources[begun:], begun):
        digest = hashlib.sha256()
        count = 0
        for chunk in chunks(source, json_key, digest, apart):
            count += 1
            if count <= skip:
                continue
            parts.append(chunk)
            size += len(chunk.text)
            if size >= _BATCH:
                yield _Batch(parts, k, count, digests, done + chunk.position)
                parts, digests, size = [], [], 0
        skip = 0
        done += source.size
        digests.append(digest.hexdigest())
        if k == len(corpus.sources) - 1 or size >= _BATCH // 2:
            yield _Batch(parts, k + 1, 0, digests, done)
            parts, digests, size = [], [], 0


def _write(
    partial: _Partial,
    encoded: Iterable[tuple[_Batch, _Encoded]],
    journal_bytes: int,
    report: Report,
) -> None:
    uncommitted = 0
    with partial.appending():
        for batch, result in encoded:
            partial.append(batch, result)
            uncommitted += result.text_bytes
            if uncommitted >= journal_bytes:
                partial.commit()
                uncommitted = 0
            report(partial.progress("tokenizing", batch.done))
        partial.state = replace(partial.state, complete=True)
        partial.commit()


def _finish(partial: _Partial, tokenizer: Tokenizer, dtype: np.dtype) -> PreparedData:
    """Move everything to its place, the index last; may be interrupted and repeated."""
    prefix, state, corpus = partial.prefix, partial.state, partial.corpus
    if state.documents == 0:
        shutil.rmtree(partial.folder)
        raise UserError(
            f"{prefix}: the input holds no text: {len(corpus.sources)} files, "
            f"{state.empty_documents} empty documents"
        )
    bin_, idx = add_suffix(prefix, ".bin"), add_suffix(prefix, ".idx")
    moved = not partial.bin.is_file()
    lengths = np.fromfile(partial.lengths, "<i4")
    index = partial.folder / "index"
    write_index(index, dtype, lengths, np.arange(len(lengths) + 1))
    files = {".bin": FileDigest.of(bin_ if moved else partial.bin), ".idx": FileDigest.of(index)}
    prepared = PreparedData(
        prefix=prefix,
        documents=state.documents,
        empty_documents=state.empty_documents,
        tokens=state.tokens,
        text_bytes=state.text_bytes,
        max_id=state.max_id,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bin_sha256=files[".bin"].sha256,
        settings=partial.settings,
        input_stat=corpus.stat_digest(),
        input_sha256=input_sha256(corpus, partial.digests),
        files=files,
        note="continued an interrupted run" if partial.resumed else "prepared",
    )
    idx.unlink(missing_ok=True)
    tokenizer.save(prepared.tokenizer_folder)
    prepared.save()
    if not moved:
        os.replace(partial.bin, bin_)
    os.replace(index, idx)
    sync_folder(prefix.parent)
    IndexedDataset(prefix)
    shutil.rmtree(partial.folder)
    return prepared


def _tokenizer_setting(given: Tokenizer | None, vocab_size: int) -> str:
    if given is not None:
        return f"given {given.fingerprint}"
    return f"BPE of {vocab_size} trained on the text" if tokenizers_installed() else "bytes"


# -- encoding --


Around = tuple[list[int], list[int]]
"""Ids before and after every document."""


def _encoded_here(
    batches: Iterable[_Batch], tokenizer: Tokenizer, dtype: np.dtype, around: Around
) -> Iterator[tuple[_Batch, _Encoded]]:
    """Batches in order with their ids."""
    for batch in batches:
        yield batch, _encode(tokenizer, batch.parts, dtype.str, around)


def _encoded_by_workers(
    batches: Iterable[_Batch], partial: _Partial, dtype: np.dtype, around: Around, workers: int
) -> Iterator[tuple[_Batch, _Encoded]]:
    """The same, computed by ``workers`` processes."""
    folder = str(partial.tokenizer_folder)
    waiting: deque[tuple[_Batch, Future[_Encoded]]] = deque()
    # spawn: a fork would copy the locks of other threads in whatever state they are.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        for batch in batches:
            task = (folder, batch.parts, dtype.str, around)
            waiting.append((batch, pool.submit(_encode_in_worker, *task)))
            if len(waiting) > 2 * workers:
                first, job = waiting.popleft()
                yield first, job.result()
        while waiting:
            first, job = waiting.popleft()
            yield first, job.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{partial.prefix}: a worker process died (out of memory?); run again, it goes on "
            f"from where it is; fewer than {workers} workers need less memory"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(tokenizer: Tokenizer, parts: list[Chunk], dtype: str, around: Around) -> _Encoded:
    counts, arrays = [], []
    for part, ids in zip(parts, tokenizer.encode_chunks(parts), strict=True):
        if part.text and not part.before:  # the first of its document
            ids = around[0] + ids
        if part.last and part.text:
            ids = ids + around[1]
        counts.append(len(ids))
        arrays.append(np.array(ids, dtype))
    joined = np.concatenate(arrays) if arrays else np.array([], dtype)
    text_bytes = sum(len(part.text.encode()) for part in parts)
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
