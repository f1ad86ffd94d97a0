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
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.data.corpus import Corpus
from deepseek.data.digests import FileDigest
from deepseek.data.documents import Apart, Chunk, chunks
from deepseek.data.encoding import encoded_by_workers, encoded_here
from deepseek.data.indexed import IndexedDataset, dtype_for, write_index
from deepseek.data.partial import Batch, Encoded, Partial, State
from deepseek.data.prepared import (
    PreparedData,
    Progress,
    Report,
    already_there,
    corpus_for,
    input_sha256,
    one_writer,
)
from deepseek.data.tokenizer import Tokenizer, tokenizers_installed
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import train_bpe
from deepseek.files import (
    add_suffix,
    disk_errors,
    require_room,
    sync_folder,
)

_BATCH_CHARACTERS = 1 << 20
"""Sent to a worker at once."""
_TRAINING_BYTES = 64 << 20
"""Text that a BPE is trained on; of more, evenly spaced chunks are taken."""


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
            partial = Partial(prefix, corpus, settings)
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
                    encoded = encoded_here(batches, used, dtype, around)
                else:
                    encoded = encoded_by_workers(batches, partial, dtype, around, workers)
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


def _check_room(partial: Partial, tokenizer: Tokenizer, dtype: np.dtype) -> None:
    packed = sum(s.size for s in partial.corpus.sources if s.compressed or s.kind == "parquet")
    text = partial.corpus.total_bytes + 3 * packed
    # English and code have 3 to 5 bytes an id; 256 byte values have one.
    per_id = 4 if tokenizer.vocab_size > 300 else 1
    needed = text // per_id * dtype.itemsize - partial.bin.stat().st_size
    require_room(partial.folder, needed, f"{partial.prefix.name}.bin")


def _batches(corpus: Corpus, json_key: str, state: State, apart: Apart | None) -> Iterator[Batch]:
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
            if size >= _BATCH_CHARACTERS:
                yield Batch(parts, k, count, digests, done + chunk.position)
                parts, digests, size = [], [], 0
        skip = 0
        done += source.size
        digests.append(digest.hexdigest())
        if k == len(corpus.sources) - 1 or size >= _BATCH_CHARACTERS // 2:
            yield Batch(parts, k + 1, 0, digests, done)
            parts, digests, size = [], [], 0


def _write(
    partial: Partial,
    encoded: Iterable[tuple[Batch, Encoded]],
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


def _finish(partial: Partial, tokenizer: Tokenizer, dtype: np.dtype) -> PreparedData:
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
