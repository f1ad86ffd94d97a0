"""Chat data (JSON lines) to ``.bin/.idx`` and ``P.answers``, which tells answers from the rest.

A document is a conversation. ``P.answers`` holds one byte for each id of ``P.bin``: 1 if a model is
to say it, else 0. Nothing is cut here: how long a sequence may be is the run's to say.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.chat import ChatError, ChatTemplate, conversation_of
from deepseek.data.corpus import Corpus, json_lines
from deepseek.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from deepseek.data.prepare import Progress
from deepseek.data.prepared import PreparedData, already_there, input_sha256, is_output
from deepseek.data.tokenizer import load_tokenizer
from deepseek.files import Lock, add_suffix, atomic_open, require_room

log = logging.getLogger("deepseek.data")

ANSWERS = ".answers"
"""Suffix of the file that tells which ids are answers."""


def prepare_chat(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: Path,
    *,
    answers: str = "all",
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> PreparedData:
    """Turn conversations into ``P.bin``, ``P.idx``, ``P.answers``, ``P.json`` and ``P.tokenizer/``.

    inputs: ``.jsonl`` files, or folders of them, also ``.zst``; tokenizer: of the model that is to
    be fine-tuned; answers: ``all`` messages of the assistant are learnt, or the ``last`` of each
    conversation; overwrite: replace other data under the same prefix.

    If the same data is already there it returns at once.

    Raises:
        UserError: a line that is no conversation (with file and line), unreadable input, no room on
            the disk, other data under the prefix.
    """
    prefix = Path(output_prefix)
    template = ChatTemplate(load_tokenizer(tokenizer), answers)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        own = lambda path: is_output(path, prefix) or path == add_suffix(prefix, ANSWERS)  # noqa: E731
        corpus = Corpus.from_paths(inputs, exclude=own)
        for source in corpus.sources:
            if source.kind != "jsonl":
                raise UserError(
                    f"{source.path}: conversations are read from .jsonl files (also .jsonl.zst), "
                    "one on each line; convert it, or leave out --chat to read it as text"
                )
        settings = {
            "inputs": "conversations",
            "chat_template": template.fingerprint,
            "answers": answers,
            "tokenizer": f"given {template.tokenizer.fingerprint}",
        }
        with Lock(
            add_suffix(prefix, ".lock"),
            on_wait=lambda holder: log.warning("%s: waiting for %s", prefix, holder),
        ):
            done = already_there(prefix, corpus, settings, overwrite)
            if done is not None and answers_of(done) is not None:
                return done
            report = progress or (lambda state: None)
            return _write(prefix, corpus, settings, template, report)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{prefix}: the disk is full; free some room and run again") from error
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}") from error


def answers_of(record: PreparedData) -> np.ndarray | None:
    """Which ids of ``P.bin`` are answers, uint8 [tokens], mapped from the file.

    None if the file is missing or has another size than it should.
    """
    path = add_suffix(record.prefix, ANSWERS)
    if not path.is_file() or path.stat().st_size != record.tokens:
        return None
    return np.memmap(path, np.uint8, "r")


def _write(
    prefix: Path,
    corpus: Corpus,
    settings: dict[str, str],
    template: ChatTemplate,
    report: Callable[[Progress], None],
) -> PreparedData:
    tokenizer = template.tokenizer
    dtype = dtype_for(tokenizer.vocab_size)
    packed = sum(source.size for source in corpus.sources if source.compressed)
    # English has 3 to 5 bytes an id, and each id takes a byte in the answers as well.
    needed = (corpus.total_bytes + 3 * packed) * (dtype.itemsize + 1) // 2
    require_room(prefix.parent, needed, f"{prefix.name}.bin")
    digests: list[str] = []
    counts: Counter[str] = Counter()
    bin_digest, answers_digest = hashlib.sha256(), hashlib.sha256()
    # Without a record nothing of this prefix is taken for whole.
    add_suffix(prefix, ".json").unlink(missing_ok=True)
    with (
        atomic_open(add_suffix(prefix, ANSWERS)) as answers,
        IndexedWriter(prefix, dtype) as writer,
    ):
        for ids, is_answer, ends, said, done in _encoded(corpus, template, digests):
            writer.add_document(ids)
            answers.write(is_answer.tobytes())
            bin_digest.update(ids.astype(writer.dtype).tobytes())
            answers_digest.update(is_answer.tobytes())
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            counts["answer_tokens"] += int(is_answer.sum())
            counts["text_bytes"] += said
            counts["unended"] += not ends
            counts["longest"] = max(counts["longest"], len(ids))
            counts["max_id"] = max(counts["max_id"], int(ids.max()))
            if counts["documents"] % 256 == 0:
                report(_progress(corpus, counts, done))
        if not counts["documents"]:
            raise UserError(
                f"{prefix}: the input holds no conversation: {len(corpus.sources)} empty files"
            )
    report(_progress(corpus, counts, corpus.total_bytes))
    prepared = PreparedData(
        prefix=prefix,
        documents=counts["documents"],
        empty_documents=0,
        tokens=counts["tokens"],
        text_bytes=counts["text_bytes"],
        max_id=counts["max_id"],
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bin_sha256=bin_digest.hexdigest(),
        settings=settings,
        input_stat=corpus.stat_digest(),
        input_sha256=input_sha256(corpus, digests),
        chat={
            "answer_tokens": counts["answer_tokens"],
            "longest": counts["longest"],
            "without_end": counts["unended"],
            "answers_sha256": answers_digest.hexdigest(),
        },
    )
    if template.is_plain:  # runs on these data are asked as they were taught
        tokenizer = tokenizer.with_chat_template(template.source)
    tokenizer.save(prepared.tokenizer_folder)
    IndexedDataset(prefix)
    prepared.save()
    return replace(prepared, note="prepared")


def _encoded(
    corpus: Corpus, template: ChatTemplate, digests: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, bool, int, int]]:
    """Ids, answers (uint8), whether all answers end, bytes said, and input bytes done."""
    before = 0
    for source in corpus.sources:
        digest = hashlib.sha256()
        for where, row, position in json_lines(source, digest):
            try:
                conversation = conversation_of(row)
                encoded = template.encode(conversation)
            except ChatError as error:
                raise UserError(f"{where}: {error}") from error
            said = sum(len(message["content"].encode()) for message in conversation.messages)
            yield (
                encoded.ids,
                encoded.is_answer.astype(np.uint8),
                encoded.ends,
                said,
                before + position,
            )
        before += source.size
        digests.append(digest.hexdigest())


def _progress(corpus: Corpus, counts: Counter[str], done: int) -> Progress:
    total = corpus.total_bytes
    return Progress("tokenizing", done, total, counts["documents"], counts["tokens"])
