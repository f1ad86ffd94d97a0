"""What lies under a prefix of prepared data: its record, and whether it is what is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.data.corpus import Corpus, digest_lines, kinds
from deepseek.data.digests import DataFile, FileDigest, damaged
from deepseek.data.indexed import IndexedDataset
from deepseek.files import add_suffix, atomic_open, sha256_of
from deepseek.locks import Lock

FORMAT = "deepseek-data/1"


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
