"""``deepseek eval``: how well a checkpoint predicts texts, by domain and by document."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.config.errors import UserError
from deepseek.console import StageProgress, complain, say, table
from deepseek.data.chat import answers_of
from deepseek.data.corpus import Corpus, Source
from deepseek.data.dataset import ChatDataset
from deepseek.data.digests import Verification
from deepseek.data.documents import chunks
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepared import PreparedData
from deepseek.data.tokenizer import Tokenizer
from deepseek.experts.domains import check_ids, is_prepared, named_path, open_prepared
from deepseek.inference.evaluation import Document, Score, score_documents
from deepseek.interop.open_weights import OpenedCheckpoint, open_checkpoint
from deepseek.run_folder import EVALUATIONS_FILE


@dataclass(frozen=True)
class DomainScore:
    """What was found for one domain."""

    name: str
    source: str
    documents: tuple[tuple[str, Score], ...]
    """Name and score of each."""

    @property
    def total(self) -> Score:
        """Of all documents: every id counts the same."""
        return Score.of([score for _, score in self.documents])


def evaluate(
    run: Path,
    data: Sequence[str] = (),
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    json_key: str = "text",
    as_json: bool = False,
) -> list[DomainScore]:
    """Loss, perplexity and bits per byte of a checkpoint, by domain and by document.

    The result is also kept in the run folder, for its report.

    Args:
        run: a run folder, of which the newest sound checkpoint is taken, or a checkpoint.
        data: domains, ``name=path``; a path holds text or prepared data (its prefix). None: the
            run's validation data.
        window: ids that are read together; None: ``model.data.seq_length``.
        stride: from one window to the next; None: half the window.
        tokens: read of each domain, the last document cut; None: all.
        json_key: key or column of the text in .jsonl and .parquet files.
        as_json: print one JSON object with every document instead of the table.

    Raises:
        UserError: no checkpoint, sizes that do not fit the model, data that cannot be read, are
            empty, not what prepare-data wrote, or belong to another tokenizer.
    """
    opened = open_checkpoint(run)
    size, step = _sizes(opened, window, stride)
    if tokens is not None and tokens < 2:
        raise UserError(f"--tokens {tokens}: give at least 2, one to read and one to predict")
    tokenizer = opened.tokenizer()
    checks: list[Verification] = []
    domains = [
        (name, source, list(_until(documents, tokens)))
        for name, source, documents in _domains(opened, tokenizer, data, json_key, checks)
    ]
    for name, source, documents in domains:
        if not any(document.num_predicted for document in documents):
            raise UserError(
                f"the domain {name} ({source}) has no document with an id to predict: each needs "
                "two ids, of which the second is predicted"
            )
        ids = [document.ids for document in documents if len(document.ids)]
        smallest, largest = min(int(i.min()) for i in ids), max(int(i.max()) for i in ids)
        check_ids(name, source, smallest, largest, opened.config.model.vocab_size)
    model = opened.model()
    total = sum(max(0, len(d.ids) - 1) for _, _, documents in domains for d in documents)
    done, found = 0, []
    with StageProgress(quiet=as_json) as progress:
        for name, source, documents in domains:

            def tell(count: int, name: str = name) -> None:
                nonlocal done
                done += count
                progress.update("reading", done, total, name)

            scores = score_documents(model, documents, size, step, tell)
            pairs = zip((document.name for document in documents), scores, strict=True)
            found.append(DomainScore(name, source, tuple(pairs)))
    for check in checks:
        if left := check.finish():
            complain(left)
    result = {
        "checkpoint": str(opened.path),
        "step": opened.step,
        "window": size,
        "stride": step,
        "time": round(time.time(), 3),
    }
    if as_json:
        say(json.dumps({**result, "domains": [_domain(domain, True) for domain in found]}))
    else:
        _show(opened, size, step, found)
    _keep(opened, {**result, "domains": [_domain(domain, False) for domain in found]}, as_json)
    return found


def _sizes(opened: OpenedCheckpoint, window: int | None, stride: int | None) -> tuple[int, int]:
    model = opened.config.model
    size = model.data.seq_length if window is None else window
    if not 2 <= size <= model.max_position_embeddings:
        raise UserError(
            f"--window {size}: give 2 to {model.max_position_embeddings}, "
            "model.max_position_embeddings"
        )
    step = size // 2 if stride is None else stride
    if not 1 <= step < size:
        raise UserError(
            f"--stride {step}: give 1 to {size - 1}, less than the window of {size}, so that every "
            "id has another before it"
        )
    return size, step


# -- documents --

_Named = tuple[str, str, Iterator[Document]]
"""Name of a domain, where it comes from, and its documents."""


def _domains(
    opened: OpenedCheckpoint,
    tokenizer: Tokenizer | None,
    words: Sequence[str],
    json_key: str,
    checks: list[Verification],
) -> Iterator[_Named]:
    if not words:
        yield from _validation(opened, tokenizer, checks)
        return
    seen: set[str] = set()
    for word in words:
        name, path = named_path(word)
        if name in seen:
            raise UserError(
                f"--data {word}: there are two domains called {name}; name this one apart, "
                f"--data {name}2={path}"
            )
        seen.add(name)
        if is_prepared(path):
            indexed, record = open_prepared(path, tokenizer, checks), PreparedData.load(path)
            answers = None if record is None or record.chat is None else answers_of(record)
            everything = range(indexed.num_documents)
            yield name, str(path), _prepared(indexed, everything, answers, tokenizer)
        elif not path.exists():
            raise UserError(
                f"--data {word}: there is no file or folder {path}, nor prepared data {path}.bin "
                "and .idx"
            )
        elif tokenizer is None:
            raise UserError(
                f"--data {word}: the checkpoint has no tokenizer beside it to read text with; give "
                "data prepared with `deepseek prepare-data`, by their prefix"
            )
        else:
            yield name, str(path), _texts(Corpus.from_paths([path]).sources, tokenizer, json_key)


def _validation(
    opened: OpenedCheckpoint, tokenizer: Tokenizer | None, checks: list[Verification]
) -> Iterator[_Named]:
    """What the run validates on, whole documents of it."""
    for name, part in opened.validation_parts(checks):
        answers = part.is_answer if isinstance(part, ChatDataset) else None
        documents = _prepared(part.indexed, part.documents, answers, tokenizer)
        yield name, f"{part.indexed.prefix}, documents for validation", documents


def _prepared(
    indexed: IndexedDataset,
    numbers: Sequence[int] | np.ndarray,
    answers: np.ndarray | None,
    tokenizer: Tokenizer | None,
) -> Iterator[Document]:
    """Documents without the id that ends them, as the text itself has none; of conversations
    everything is read, and the answers count."""
    for number in map(int, numbers):
        ids = indexed.document(number)
        counted = np.broadcast_to(True, len(ids))
        if answers is not None:
            start = int(indexed.document_offsets[number])
            counted = answers[start : start + len(ids)] == 1
        elif tokenizer is not None and len(ids) and ids[-1] == tokenizer.eos_id:
            ids, counted = ids[:-1], counted[:-1]
        yield Document(f"document {number}", ids, counted, _bytes_of(ids, counted, tokenizer))


def _texts(sources: Sequence[Source], tokenizer: Tokenizer, json_key: str) -> Iterator[Document]:
    for source in sources:
        number, parts = 0, []
        for chunk in chunks(source, json_key):
            parts.append(chunk.text)
            if not chunk.last:
                continue
            text = "".join(parts)
            begin = tokenizer.prefix_ids
            ids = np.array([*begin, *tokenizer.encode(text)], np.int64)
            counted = np.broadcast_to(True, len(ids))
            size = _bytes_of(ids, counted, tokenizer)
            if size is None and len(ids):  # not byte-level: all, or what follows the first id
                size = len(text.encode())
                size -= 0 if begin else len(tokenizer.decode(ids[:1].tolist()).encode())
            name = source.name if source.kind == "text" else f"{source.name} {number}"
            yield Document(name, ids, counted, size)
            number, parts = number + 1, []


def _bytes_of(ids: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer | None) -> int | None:
    """Bytes of text that the predicted ids stand for; None where ids are not fixed bytes."""
    sizes = None if tokenizer is None else tokenizer.token_bytes
    if sizes is None:
        return None
    predicted = ids[1:][counted[1:]]
    return int(sizes[predicted[predicted < len(sizes)]].sum())


def _until(documents: Iterator[Document], tokens: int | None) -> Iterator[Document]:
    """Documents until there are ``tokens`` ids, the last one cut; its bytes are in proportion."""
    left = tokens
    for document in documents:
        size = len(document.ids)
        if left is not None and size >= left:
            cut = Document(document.name, document.ids[:left], document.counted[:left], None)
            whole = document.num_predicted
            if document.text_bytes is not None and whole:
                part = round(document.text_bytes * cut.num_predicted / whole)
                cut = Document(cut.name, cut.ids, cut.counted, part)
            yield cut
            return
        yield document
        left = None if left is None else left - size


# -- what is told --


def _domain(domain: DomainScore, documents: bool) -> dict[str, Any]:
    told = {"name": domain.name, "source": domain.source, **_numbers(domain.total)}
    rows = [{"name": name, **_numbers(score)} for name, score in domain.documents]
    return told | {"documents": rows if documents else len(rows)}


def _numbers(score: Score) -> dict[str, Any]:
    return {
        "tokens": score.tokens,
        "bytes": score.text_bytes,
        "nats": score.nats,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }


def _show(opened: OpenedCheckpoint, size: int, step: int, found: Sequence[DomainScore]) -> None:
    rows = [_row(d.name, len(d.documents), d.total) for d in found]
    if len(found) > 1:
        count = sum(len(domain.documents) for domain in found)
        rows.append(_row("together", count, Score.of([domain.total for domain in found])))
    table(
        f"{opened.path}: step {opened.step}, windows of {size} ids, {step} apart",
        ["domain", "documents", "predicted ids", "loss, nats", "perplexity", "bits per byte"],
        rows,
    )


def _row(name: str, documents: int, score: Score) -> list[str]:
    shown = [
        "-" if value is None else f"{value:,.4f}"
        for value in (score.loss, score.perplexity, score.bits_per_byte)
    ]
    return [name, f"{documents:,}", f"{score.tokens:,}", *shown]


def _keep(opened: OpenedCheckpoint, line: dict[str, Any], quiet: bool) -> None:
    """Add the result to the run's own list, which its report shows."""
    if opened.run is None:
        return
    path = opened.run / EVALUATIONS_FILE
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    except OSError as error:
        complain(f"{path}: {error.strerror}; the result is not kept for the report")
        return
    if not quiet:
        say(f"kept         {path}")
