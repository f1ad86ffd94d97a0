"""Prepared data at a prefix ``P``: its record ``P.json``, and what may lie there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.data.corpus import Corpus, digest_lines
from deepseek.data.indexed import IndexedDataset
from deepseek.files import add_suffix, atomic_open

FORMAT = "deepseek-data/1"


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
    settings: dict[str, Any]
    """What the result depends on, apart from the text."""
    input_stat: str
    """Digest of names, sizes and times of the input files."""
    input_sha256: str
    """Digest of names and contents of the input files."""
    chat: dict[str, Any] | None = None
    """Of conversations: what ``prepare_chat`` counted; then ``P.answers`` tells which ids are
    answers. None: text."""
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
            UserError: it is a record that this version cannot read.
        """
        path = add_suffix(prefix, ".json")
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or "format" not in content:
            return None
        if content.pop("format") != FORMAT:
            raise UserError(f"{path}: not written by this version; prepare the data again")
        try:
            return cls(prefix=prefix, **content)
        except TypeError as error:
            raise UserError(f"{path} is damaged ({error}); prepare the data again") from error

    def save(self) -> None:
        """Write ``P.json`` atomically."""
        content = {"format": FORMAT, **asdict(self)}
        del content["prefix"], content["note"]
        if self.chat is None:
            del content["chat"]
        with atomic_open(add_suffix(self.prefix, ".json")) as stream:
            stream.write((json.dumps(content, indent=2) + "\n").encode())


def already_there(
    prefix: Path, corpus: Corpus, settings: dict[str, Any], overwrite: bool
) -> PreparedData | None:
    """The record if the same data is there; None if there is none or it may be replaced.

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
        f"{key}: {record.settings.get(key)} -> {settings[key]}"
        for key in settings
        if record.settings.get(key) != settings[key]
    ]
    if not changes and record.input_stat != corpus.stat_digest():
        digests = []
        for source in corpus.sources:
            with open(source.path, "rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
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
    return replace(record, note="already prepared, nothing to do")


def input_sha256(corpus: Corpus, digests: Sequence[str]) -> str:
    """Digest of names and contents, from the sha256 of each file."""
    names = (source.name for source in corpus.sources)
    return digest_lines(map("\0".join, zip(names, digests, strict=True)))


def is_output(path: Path, prefix: Path) -> bool:
    """True for what prepare writes itself, should the output lie inside an input folder."""
    own = {".bin", ".idx", ".json", ".lock"}
    if path.parent.resolve() == prefix.parent.resolve():
        return path.name in {prefix.name + suffix for suffix in own}
    folders = {add_suffix(prefix, suffix).resolve() for suffix in (".partial", ".tokenizer")}
    return not folders.isdisjoint(path.resolve().parents)
