"""Short readings of named texts, such as code beside prose, to look at what a model does with each.

A domain is a ``Domain``: ids of at most so many tokens, from all over its files rather than from
the first. ``Domain.batches`` cuts them into sequences as training does.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.corpus import Corpus, Source
from deepseek.data.dataset import ChatDataset, PackedDataset, Sample
from deepseek.data.digests import Verification
from deepseek.data.documents import chunks
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepared import PreparedData
from deepseek.data.tokenizer import Tokenizer
from deepseek.files import add_suffix

_SPREAD = 16
"""Files that a domain is taken from in equal parts, so that a long one is not all of it."""
_GROUPS = 6
"""Packages of the built-in corpus that are domains of their own, the largest ones."""
_CHARACTERS = 32
"""Of text, looked at for each token that is wanted: tokens are hardly ever longer."""


@dataclass(frozen=True)
class Domain:
    """Documents of one kind."""

    name: str
    source: str
    """Where they come from, for people."""
    documents: tuple[np.ndarray, ...]
    """int64 ids of each, or of its beginning."""

    @property
    def num_tokens(self) -> int:
        """Ids in all."""
        return sum(len(ids) for ids in self.documents)

    def beginning(self, tokens: int) -> Domain:
        """The first ``tokens`` ids alone."""
        return Domain(self.name, self.source, _beginnings([self.documents], 1, tokens))

    def batches(
        self, seq_length: int, batch_size: int, isolate_documents: bool
    ) -> Iterator[Sample]:
        """Arrays (B, S): ``tokens``, ``positions`` and ``documents``, the last ones padded.

        The documents follow each other as in training; see ``PackedDataset`` for the arrays.
        """
        ids = np.concatenate(self.documents)
        counts = np.array([len(document) for document in self.documents])
        numbers = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        rows = -(-len(ids) // seq_length)
        size = rows * seq_length
        tokens = np.zeros(size, np.int64)
        tokens[: len(ids)] = ids
        within = np.arange(size) % seq_length
        documents = np.full(size, -1, np.int32)
        documents[: len(ids)] = numbers if isolate_documents else 0
        if isolate_documents:
            begins = np.repeat(np.cumsum(counts) - counts, counts)
            within[: len(ids)] = np.minimum(within[: len(ids)], np.arange(len(ids)) - begins)
        arrays: Sample = {"tokens": tokens, "positions": within, "documents": documents}
        for first in range(0, rows, batch_size):
            cut = slice(first * seq_length, min(rows, first + batch_size) * seq_length)
            yield {key: array[cut].reshape(-1, seq_length) for key, array in arrays.items()}


def open_domains(
    words: Sequence[str],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_tokens: int,
    json_key: str = "text",
    checks: list[Verification] | None = None,
) -> list[Domain]:
    """Domains as given on a command line: ``name=path``, or a path, which names itself.

    Args:
        words: paths of text (files and folders as ``prepare-data`` takes them) or of prepared data
            (its prefix).
        tokenizer: the model's; None if it is not known, which only prepared data can do without.
        vocab_size: rows of the model's embedding.
        max_tokens: read of each domain.
        json_key: key or column of the text in .jsonl and .parquet files.
        checks: gets the comparison of prepared data with their digests, see ``open_prepared``.

    Raises:
        UserError: a path or name that is wrong, no text in it, or ids of another tokenizer.
    """
    domains: list[Domain] = []
    for word in words:
        name, path = named_path(word)
        if any(domain.name == name for domain in domains):
            raise UserError(
                f"--data {word}: there are two domains called {name}; "
                f"name this one apart, --data {name}2={path}"
            )
        if is_prepared(path):
            documents = _prepared(path, tokenizer, max_tokens, checks)
        elif path.exists():
            if tokenizer is None:
                raise UserError(
                    f"--data {word}: the run has no tokenizer to read text with; give data "
                    "prepared with `deepseek prepare-data`, by their prefix"
                )
            sources = Corpus.from_paths([path]).sources
            documents = _texts(sources, tokenizer, max_tokens, json_key)
        else:
            raise UserError(
                f"--data {word}: there is no file or folder {path}, nor prepared data {path}.bin "
                "and .idx"
            )
        domains.append(_checked(Domain(name, str(path), documents), vocab_size))
    return domains


def built_in_domains(tokenizer: Tokenizer, vocab_size: int, max_tokens: int) -> list[Domain]:
    """The built-in corpus by package: the largest ones, and all modules that are in none.

    Raises:
        UserError: this Python comes without its sources, or the tokenizer has too many ids.
    """
    groups: dict[str, list[Source]] = defaultdict(list)
    for source in Corpus.stdlib().sources:
        package, slash, _ = source.name.partition("/")
        groups[package if slash else "single modules"].append(source)
    sizes = {name: sum(source.size for source in group) for name, group in groups.items()}
    chosen = sorted(sizes, key=lambda name: (-sizes[name], name))[: _GROUPS + 1]
    return [
        _checked(
            Domain(
                name,
                f"Python's library, {len(groups[name])} files",
                _texts(groups[name], tokenizer, max_tokens, "text"),
            ),
            vocab_size,
        )
        for name in chosen
    ]


def packed_domain(
    name: str, source: str, data: PackedDataset | ChatDataset, max_tokens: int
) -> Domain:
    """Whole samples of a dataset that is read once (validation), spread evenly over it."""
    wanted = min(len(data), -(-max_tokens // data.seq_length))
    documents: list[np.ndarray] = []
    for i in range(wanted):
        sample = data[i * len(data) // wanted]
        real = sample["documents"] >= 0
        ids, numbers = sample["tokens"][real], sample["documents"][real]
        documents += np.split(ids, np.flatnonzero(np.diff(numbers)) + 1)
    return Domain(name, source, _beginnings([documents], 1, max_tokens))


def named_path(word: str) -> tuple[str, Path]:
    """Name and path of ``name=path``; of a path alone, its name without endings.

    Raises:
        UserError: there is no name, or no path.
    """
    name, equals, path = word.partition("=")
    if not equals or "/" in name or Path(word).exists():
        name, path = Path(word).name.partition(".")[0] or word, word
    if not name or not path:
        raise UserError(f"--data {word}: write name=path, such as --data prose=books.txt")
    return name, Path(path)


def is_prepared(path: Path) -> bool:
    """Whether a path is the prefix of prepared data."""
    return add_suffix(path, ".idx").is_file() or add_suffix(path, ".bin").is_file()


def open_prepared(
    prefix: Path, tokenizer: Tokenizer | None, checks: list[Verification] | None = None
) -> IndexedDataset:
    """Prepared data whose ids mean what they mean to the model.

    Args:
        prefix: of the data.
        tokenizer: the model's, if it is known.
        checks: gets the comparison with what prepare-data recorded, which goes on beside the work
            where there is much to compare; its ``finish`` is the caller's.

    Raises:
        UserError: files missing or damaged, numbers that are no ids, or another tokenizer's.
    """
    indexed = IndexedDataset(prefix)
    if indexed.dtype.kind not in "iu":
        raise UserError(f"{prefix}.bin holds {indexed.dtype.name} numbers, which are not token ids")
    record = PreparedData.load(prefix)
    if record is not None and tokenizer is not None:
        theirs, ours = record.tokenizer_fingerprint, tokenizer.fingerprint
        if theirs != ours:
            raise UserError(
                f"{prefix} was made with another tokenizer (fingerprint {theirs[:12]}) than the "
                f"model's ({ours[:12]}); give the text itself, or prepare it with the tokenizer "
                "in the run folder"
            )
    if record is not None and checks is not None:
        checks.append(Verification.begun(record.data_files()))
    return indexed


def check_ids(name: str, source: str, smallest: int, largest: int, vocab_size: int) -> None:
    """Raises UserError unless the model knows all ids of a domain."""
    if smallest < 0 or largest >= vocab_size:
        raise UserError(
            f"the domain {name} ({source}) holds the id {smallest if smallest < 0 else largest}, "
            f"but the model knows ids 0 to {vocab_size - 1}: use the tokenizer the model was "
            "trained with"
        )


def _prepared(
    prefix: Path,
    tokenizer: Tokenizer | None,
    max_tokens: int,
    checks: list[Verification] | None,
) -> tuple[np.ndarray, ...]:
    indexed = open_prepared(prefix, tokenizer, checks)
    numbers = _shuffled(range(indexed.num_documents))
    return _beginnings(((indexed.document(i),) for i in numbers), len(numbers), max_tokens)


def _texts(
    sources: Sequence[Source], tokenizer: Tokenizer, max_tokens: int, json_key: str
) -> tuple[np.ndarray, ...]:
    longest = _CHARACTERS * max_tokens

    def documents(source: Source) -> Iterator[np.ndarray]:
        end = tokenizer.suffix_ids or [k for k in (tokenizer.eos_id,) if k is not None]
        for chunk in chunks(source, json_key):
            ids = tokenizer.encode(chunk.text[:longest])
            if chunk.text and not chunk.before:
                ids = tokenizer.prefix_ids + ids
            if chunk.last and chunk.text:
                ids = ids + end
            yield np.array(ids, np.int64)

    return _beginnings(
        (documents(source) for source in _shuffled(sources)), len(sources), max_tokens
    )


def _beginnings(
    sources: Iterable[Iterable[np.ndarray]], count: int, max_tokens: int
) -> tuple[np.ndarray, ...]:
    """The beginnings of ``count`` sources of documents, one after the other, until there are
    enough ids."""
    taken: list[np.ndarray] = []
    missing = max_tokens
    for number, source in enumerate(sources):
        # What short sources leave over goes to those after them.
        left = -(-missing // max(1, min(count, _SPREAD) - number))
        for ids in source:
            if len(ids):
                taken.append(np.asarray(ids[:left], np.int64))
                left -= len(taken[-1])
                missing -= len(taken[-1])
            if left == 0:
                break
        if missing == 0:
            break
    return tuple(taken)


T = TypeVar("T")


def _shuffled(items: Iterable[T]) -> list[T]:
    """In an order that is always the same: neighbours in a folder are alike."""
    order = list(items)
    random.Random(0).shuffle(order)
    return order


def _checked(domain: Domain, vocab_size: int) -> Domain:
    """The domain, if it has ids and the model knows them."""
    if not domain.num_tokens:
        raise UserError(f"the domain {domain.name} ({domain.source}) holds no text")
    smallest = min(int(ids.min()) for ids in domain.documents)
    largest = max(int(ids.max()) for ids in domain.documents)
    check_ids(domain.name, domain.source, smallest, largest, vocab_size)
    return domain
