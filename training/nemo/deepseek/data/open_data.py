"""From a configuration to datasets: the built-in corpus, a prefix, or a blend of them; text, or
conversations with ``model.data.chat``."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.console import complain
from deepseek.data.blend import Blend, BlendedDataset, parse_blend
from deepseek.data.chat import ANSWERS, answers_of
from deepseek.data.chat_template import ChatError, ChatTemplate
from deepseek.data.dataset import ChatDataset, PackedDataset, split_documents
from deepseek.data.digests import DataFile, Verification
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepare import prepare
from deepseek.data.prepared import PreparedData, Report
from deepseek.data.tokenizer import Tokenizer, tokenizers_installed
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.files import add_suffix, atomic_open, user_cache

_COUNTED = 1 << 20
"""Ids looked at to find bytes per id where they are not recorded."""


Dataset = PackedDataset | ChatDataset | BlendedDataset


@dataclass(frozen=True)
class OpenedData:
    """What a run reads."""

    train: Dataset
    validation: Dataset | None
    """None if ``validation_fraction`` is 0 and there is no ``validation_prefix``."""
    tokenizer: Tokenizer | None
    """None for files without a record when ``model.tokenizer.path`` is not set."""
    fingerprint: str
    """sha256 of what decides sample ``i``: content of the files, weights, split, length, seed. A
    run may only go on with the same one."""
    bytes_per_token: float | None
    """UTF-8 bytes per id of the training data: bits per byte = nats per id / ln 2 / this."""
    validation_bytes_per_token: float | None
    """The same of the validation data."""
    verification: Verification
    """Of all files with their digests; not begun."""
    parts: tuple[dict[str, Any], ...] = ()
    """Of the training data: ``name``, ``tokens`` and ``samples`` of an epoch, and ``share`` of the
    sequences of a batch."""
    notes: tuple[str, ...] = ()
    """What people should know of conversations: how many there are, and how many were cut."""

    def epochs(self, samples: int, *parts: dict[str, Any]) -> float:
        """How often the part that is passed most often is, in a run of ``samples`` sequences.

        Args:
            samples: of all parts.
            parts: of which; none: of all.
        """
        passes = [samples * one["share"] / max(one["samples"], 1) for one in parts or self.parts]
        return max(passes, default=0.0)


def open_data(cfg: ModelConfig, seed: int = 1234, progress: Report | None = None) -> OpenedData:
    """Open the data of a run; with ``data_prefix: null`` prepare the built-in corpus first.

    Every process of a run may call this: one prepares, the others wait for it.

    Args:
        cfg: ``model`` of the configuration.
        seed: decides the order of samples.
        progress: called while the built-in corpus is prepared.

    Raises:
        UserError: files missing or damaged, ids or tokenizer larger than ``model.vocab_size``,
            another tokenizer than the one the data was made with, too little text.
    """
    if not 0 <= cfg.data.validation_fraction < 1:
        raise UserError(
            f"model.data.validation_fraction={cfg.data.validation_fraction} must be at least 0 and "
            "below 1; the default is 0.02"
        )
    given = None if cfg.tokenizer.path is None else load_tokenizer(cfg.tokenizer.path)
    data_prefix = cfg.data.data_prefix
    if data_prefix is None:
        data_prefix = str(_built_in(cfg, given, progress))
    train = _Mixture(data_prefix, "model.data.data_prefix")
    mixtures = [train]
    if cfg.data.validation_prefix is not None:
        mixtures.append(_Mixture(cfg.data.validation_prefix, "model.data.validation_prefix"))
    files = [file for mixture in mixtures for file in mixture.files]
    tokenizer = _common_tokenizer(files, given)
    _check_vocabulary(cfg, files, tokenizer)
    for file in files:
        _check_kind(cfg, file)

    splits = [
        split_documents(
            file.indexed.num_documents,
            0.0 if len(mixtures) == 2 else cfg.data.validation_fraction,
        )
        for file in train.files
    ]
    trained = [documents for documents, _ in splits]
    kept = [documents for _, documents in splits]
    validation = train
    if len(mixtures) == 2:
        validation = mixtures[1]
        kept = [np.arange(file.indexed.num_documents) for file in validation.files]
    has_validation = all(len(documents) for documents in kept)
    train_data = train.dataset(cfg, seed, trained, tokenizer, endless=True)
    validation_data = None
    if has_validation:
        validation_data = validation.dataset(cfg, seed, kept, tokenizer, endless=False)
    return OpenedData(
        train=train_data,
        validation=validation_data,
        tokenizer=tokenizer,
        fingerprint=_fingerprint(cfg, seed, mixtures),
        # Of all text, which is not that of the answers alone.
        bytes_per_token=None
        if cfg.data.chat
        else train.bytes_per_token(trained, tokenizer, recorded_first=True),
        validation_bytes_per_token=validation.bytes_per_token(kept, tokenizer, recorded_first=False)
        if has_validation and not cfg.data.chat
        else None,
        verification=Verification([found for file in files for found in file.data_files()]),
        parts=tuple(train.parts(train_data, cfg.data.data_prefix is None)),
        notes=(*_chat_notes(train_data, "train"), *_chat_notes(validation_data, "val")),
    )


class _File:
    """One prefix with its record, if it has one."""

    def __init__(self, prefix: str) -> None:
        self.prefix = Path(prefix)
        self.indexed = IndexedDataset(self.prefix)
        self.record = PreparedData.load(self.prefix)
        if self.record is not None and self.record.tokens != self.indexed.num_tokens:
            raise UserError(
                f"{add_suffix(self.prefix, '.json')} tells of {self.record.tokens} tokens, "
                f"{self.prefix.name}.bin has {self.indexed.num_tokens}: they do not belong "
                "together; copy all files of the prefix again, or prepare the data again"
            )

    def data_files(self) -> list[DataFile]:
        """The files of ids, and what is recorded of each."""
        if self.record is not None:
            return self.record.data_files()
        return [DataFile(add_suffix(self.prefix, suffix), None) for suffix in (".idx", ".bin")]

    @property
    def tokenizer_file(self) -> Path:
        return add_suffix(self.prefix, ".tokenizer") / "tokenizer.json"

    def answers(self) -> np.ndarray:
        """Which ids are answers.

        Raises:
            UserError: that file is gone.
        """
        assert self.record is not None
        found = answers_of(self.record)
        if found is None:
            raise UserError(
                f"{add_suffix(self.prefix, ANSWERS)}: missing, or not of {self.record.tokens} "
                "bytes, one for each id; run prepare-data --chat again"
            )
        return found

    def id_range(self) -> tuple[int, int]:
        """Smallest and largest id: recorded, or found by reading the file once."""
        if self.record is not None:
            return 0, self.record.max_id
        bin_ = add_suffix(self.prefix, ".bin")
        cache = add_suffix(self.prefix, ".ids.json")
        stat = bin_.stat()
        key = [stat.st_size, stat.st_mtime_ns]
        try:
            found = json.loads(cache.read_bytes())
            if found["file"] == key:
                return found["smallest"], found["largest"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        complain(f"{bin_}: reading all ids once to find the largest")
        smallest, largest = self.indexed.id_range()
        try:
            with atomic_open(cache) as stream:
                content = {"file": key, "smallest": smallest, "largest": largest}
                stream.write((json.dumps(content) + "\n").encode())
        except OSError:
            complain(f"{cache} cannot be written; the ids will be read again next time")
        return smallest, largest


class _Mixture:
    """The files of a ``data_prefix`` and their weights."""

    def __init__(self, value: object, field: str) -> None:
        entries = parse_blend(value, field)
        self.files = [_File(prefix) for _, prefix in entries]
        self.blend = Blend([weight for weight, _ in entries])

    def dataset(
        self,
        cfg: ModelConfig,
        seed: int,
        documents: list[np.ndarray],
        tokenizer: Tokenizer | None,
        endless: bool,
    ) -> Dataset:
        """Training data (endless, rearranged) or validation data (in order, as it is)."""
        known = () if tokenizer is None else (tokenizer.pad_id, tokenizer.eos_id)
        pad_id = next((token for token in known if token is not None), 0)
        packed: list[PackedDataset | ChatDataset] = [
            ChatDataset(
                file.indexed,
                file.answers(),
                chosen,
                seq_length=cfg.data.seq_length,
                seed=seed,
                pad_id=pad_id,
                endless=endless,
            )
            if cfg.data.chat
            else PackedDataset(
                file.indexed,
                chosen,
                seq_length=cfg.data.seq_length,
                seed=seed,
                isolate_documents=cfg.data.isolate_documents,
                fim_rate=cfg.data.fim_rate if endless else 0.0,
                fim=None if tokenizer is None else tokenizer.fim,
                bos_id=None if tokenizer is None else tokenizer.bos_id,
                eos_id=None if tokenizer is None else tokenizer.eos_id,
                pad_id=pad_id,
                endless=endless,
            )
            for file, chosen in zip(self.files, documents, strict=True)
        ]
        return packed[0] if len(packed) == 1 else BlendedDataset(packed, self.blend)

    def parts(self, data: Dataset, built_in: bool) -> Iterator[dict[str, Any]]:
        """``OpenedData.parts`` of the dataset that was made of these files."""
        datasets = data.datasets if isinstance(data, BlendedDataset) else [data]
        for file, dataset, share in zip(self.files, datasets, self.blend.shares, strict=True):
            yield {
                "name": "built-in corpus" if built_in else str(file.prefix),
                "tokens": dataset.num_tokens,
                "samples": len(dataset),
                "share": share,
            }

    def bytes_per_token(
        self, documents: list[np.ndarray], tokenizer: Tokenizer | None, recorded_first: bool
    ) -> float | None:
        """Bytes per id of the mixture; None if it is neither recorded nor can be counted.

        Args:
            documents: of each file.
            tokenizer: knows the bytes of each id.
            recorded_first: take what is recorded for all documents of a file, and count only
                without a record; else the other way round.
        """
        found = [
            _bytes_per_token(file, chosen, tokenizer, recorded_first)
            for file, chosen in zip(self.files, documents, strict=True)
        ]
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return None
        return float(np.dot(self.blend.shares, known))


def _bytes_per_token(
    file: _File, documents: np.ndarray, tokenizer: Tokenizer | None, recorded_first: bool
) -> float | None:
    """Recorded, or counted over the first ``_COUNTED`` ids of the documents."""
    recorded = None if file.record is None else file.record.bytes_per_token
    sizes = None if tokenizer is None else tokenizer.token_bytes
    if sizes is None or (recorded_first and recorded is not None):
        return recorded
    ids = text_bytes = 0
    for document in documents:
        found = file.indexed.document(int(document))[: _COUNTED - ids]
        ids += len(found)
        text_bytes += int(sizes[found].sum())
        if ids == _COUNTED:
            break
    return text_bytes / ids if text_bytes else None


def _built_in(cfg: ModelConfig, given: Tokenizer | None, progress: Report | None) -> Path:
    """Prepare the built-in corpus in the cache; return its prefix."""
    cache = Path(cfg.data.cache_dir) if cfg.data.cache_dir is not None else user_cache()
    if given is not None:
        kind = given.fingerprint[:12]
    else:
        kind = f"bpe{cfg.tokenizer.vocab_size}" if tokenizers_installed() else "bytes"
    # Builds of one version differ: a distribution patches its library.
    build = hashlib.sha256(sys.version.encode()).hexdigest()[:8]
    prefix = cache / f"python{platform.python_version()}-{build}-{kind}"
    try:
        prepare(
            None,
            prefix,
            None if cfg.tokenizer.path is None else Path(cfg.tokenizer.path),
            vocab_size=cfg.tokenizer.vocab_size,
            overwrite=True,
            progress=progress,
        )
    except UserError as error:
        if os.access(cache, os.W_OK):
            raise
        raise UserError(
            f"{cache} cannot be written, and the built-in corpus is prepared there; set "
            "model.data.cache_dir to a folder of yours"
        ) from error
    return prefix


def _common_tokenizer(files: list[_File], given: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that all files were made with, checked against the one given.

    Raises:
        UserError: two tokenizers.
    """
    chosen = given
    source = "model.tokenizer.path"
    for file in files:
        if file.record is None:
            continue
        if chosen is None:
            chosen, source = load_tokenizer(file.tokenizer_file), str(file.prefix)
        if chosen.fingerprint != file.record.tokenizer_fingerprint:
            way_out = (
                f"set model.tokenizer.path=null to use the tokenizer recorded with it, "
                f"{file.tokenizer_file}, or prepare the data again"
                if given is not None
                else "prepare one of them again with the tokenizer of the other"
            )
            raise UserError(
                f"{file.prefix} was made with another tokenizer (fingerprint "
                f"{file.record.tokenizer_fingerprint[:12]}) than {source} "
                f"({chosen.fingerprint[:12]}); {way_out}"
            )
        if file.record.chat and chosen.chat_template is None:
            recorded = load_tokenizer(file.tokenizer_file).chat_template
            chosen = chosen.with_chat_template(recorded) if recorded else chosen
        if file.record.chat:
            chosen = _stops_after_answers(chosen)
        elif file.record.settings.get("begin", []) != chosen.prefix_ids:
            complain(
                f"note: the documents of {file.prefix} do not begin as {chosen.origin} begins a "
                "text, and so generate a prompt; prepare the data again without --bos or --no-bos"
            )
    if chosen is None:
        complain(
            f"{files[0].prefix} has no record of its tokenizer and model.tokenizer.path is not "
            "set: no text can be generated, and bits per byte are unknown"
        )
    return chosen


def _stops_after_answers(tokenizer: Tokenizer) -> Tokenizer:
    """A run on conversations stops, and its export, where its answers end."""
    try:
        return tokenizer.with_stop(ChatTemplate(tokenizer).end_id())
    except ChatError as failure:
        complain(f"note: which token ends an answer is not known: {failure}")
        return tokenizer


def _check_vocabulary(cfg: ModelConfig, files: list[_File], tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"model.vocab_size={cfg.vocab_size} is smaller than the tokenizer, which has "
            f"{tokenizer.vocab_size} ids; set model.vocab_size={_round_up(tokenizer.vocab_size)}"
        )
    for file in files:
        if file.indexed.dtype.kind not in "iu":
            continue  # PackedDataset says so
        if np.iinfo(file.indexed.dtype).max < cfg.vocab_size and file.indexed.dtype.kind == "u":
            continue
        smallest, largest = file.id_range()
        if smallest < 0:
            raise UserError(
                f"{file.prefix}.bin holds the id {smallest}; ids are never negative, prepare the "
                "data again"
            )
        if largest >= cfg.vocab_size:
            raise UserError(
                f"{file.prefix}.bin holds the id {largest}, and model.vocab_size={cfg.vocab_size} "
                f"ends at {cfg.vocab_size - 1}; set model.vocab_size={_round_up(largest + 1)}, or "
                "use data made with a smaller tokenizer"
            )


def _check_kind(cfg: ModelConfig, file: _File) -> None:
    """Conversations are read as such, and nothing else is."""
    is_chat = file.record is not None and file.record.chat is not None
    if cfg.data.chat and not is_chat:
        raise UserError(
            f"{file.prefix} does not say which ids are answers, as model.data.chat=true needs; "
            "prepare conversations with `deepseek prepare-data --chat`, or set "
            "model.data.chat=false"
        )
    if is_chat and not cfg.data.chat:
        raise UserError(
            f"{file.prefix} holds conversations, whose answers model.data.chat=false would ignore; "
            "set model.data.chat=true, or prepare the text without --chat"
        )


def _chat_notes(data: Dataset | None, name: str) -> list[str]:
    """How many conversations there are, and what was cut."""
    parts = data.datasets if isinstance(data, BlendedDataset) else [data]
    notes = []
    for part in parts:
        if not isinstance(part, ChatDataset):
            continue
        share = (part.num_tokens - part.num_documents) / (len(part) * part.seq_length)
        notes.append(
            f"{name}: {part.num_documents:,} conversations in {len(part):,} sequences "
            f"({share:.0%} full), {part.answer_tokens:,} answer tokens"
        )
        if part.cut:
            notes.append(
                f"{name}: {part.cut:,} conversations of {part.indexed.prefix} are longer than "
                f"model.data.seq_length={part.seq_length} and lose the end of an answer; "
                f"{part.left_out:,} of them lose every answer and are left out"
            )
    return notes


def _round_up(count: int) -> int:
    """To a multiple of 128, which matrix kernels like."""
    return -(-count // 128) * 128


def _fingerprint(cfg: ModelConfig, seed: int, mixtures: list[_Mixture]) -> str:
    content = {
        "seed": seed,
        "seq_length": cfg.data.seq_length,
        "isolate_documents": cfg.data.isolate_documents,
        "fim_rate": cfg.data.fim_rate,
        "validation_fraction": cfg.data.validation_fraction if len(mixtures) == 1 else None,
        "mixtures": [
            {
                "parts": mixture.blend.parts,
                "files": [file.indexed.fingerprint for file in mixture.files],
            }
            for mixture in mixtures
        ],
    }
    if cfg.data.chat:
        content["answers"] = [
            file.record.chat["answers_sha256"]
            for mixture in mixtures
            for file in mixture.files
            if file.record is not None and file.record.chat is not None
        ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
