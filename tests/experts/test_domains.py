"""Domains: names and paths as given, texts from all over, sequences as in training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from deepseek.config.errors import UserError
from deepseek.data.dataset import PackedDataset
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepare import prepare
from deepseek.data.tokenizer import Tokenizer
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import byte_tokenizer
from deepseek.experts.domains import (
    Domain,
    built_in_domains,
    open_domains,
    packed_domain,
)

TOKENIZER: Tokenizer = byte_tokenizer()
VOCAB = TOKENIZER.vocab_size


def opened(*words: object, tokens: int = 1000, **more: object) -> list[Domain]:
    settings: dict = {"tokenizer": TOKENIZER, "vocab_size": VOCAB} | more
    return open_domains([str(word) for word in words], max_tokens=tokens, **settings)


def text(domain: Domain) -> str:
    return "|".join(TOKENIZER.decode(ids, skip_special=True) for ids in domain.documents)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prose").mkdir()
    for i in range(30):
        (tmp_path / "prose" / f"{i}.txt").write_text(f"{i:03}" * 100)
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"text": word, "body": word.upper()}) + "\n" for word in ("one", "two"))
    )
    (tmp_path / "a.tar.txt").write_text("abc")
    return tmp_path


def test_names(folder: Path) -> None:
    words = [f"good={folder}/a.tar.txt", folder / "lines.jsonl", folder / "prose"]
    found = opened(*words)
    assert [d.name for d in found] == ["good", "lines", "prose"]
    assert [d.source for d in found] == [
        f"{folder}/{n}" for n in ("a.tar.txt", *("lines.jsonl", "prose"))
    ]


def test_a_path_with_an_equals_sign(folder: Path) -> None:
    (folder / "x=1.txt").write_text("abc")
    (folder / "p=q").mkdir()
    (folder / "p=q" / "z.txt").write_text("abc")
    assert opened(folder / "x=1.txt")[0].name == "x=1"
    assert opened(folder / "p=q/z.txt")[0].name == "z"
    assert opened(f"name={folder}/x=1.txt")[0].name == "name"


def test_documents_end_as_in_prepared_data(folder: Path) -> None:
    (domain,) = opened(folder / "lines.jsonl")
    want = [[*TOKENIZER.encode(word), TOKENIZER.eos_id] for word in ("one", "two")]
    assert [ids.tolist() for ids in domain.documents] == want
    assert text(opened(folder / "lines.jsonl", json_key="body")[0]) == "ONE|TWO"


def test_text_is_taken_from_many_files_and_no_more_than_asked(folder: Path) -> None:
    (domain,) = opened(folder / "prose", tokens=320)
    assert domain.num_tokens == 320
    assert [len(ids) for ids in domain.documents] == [20] * 16
    starts = {piece[:3] for piece in text(domain).split("|")}
    assert len(starts) == 16
    assert text(opened(folder / "prose", tokens=320)[0]) == text(domain), "not always the same"
    whole = opened(folder / "prose", tokens=10**6)[0]
    assert whole.num_tokens == 30 * 301


def test_prepared_data(folder: Path) -> None:
    prepare([folder / "prose"], folder / "data", None, vocab_size=300)
    theirs = IndexedDataset(folder / "data")
    tokenizer_folder = folder / "data.tokenizer"
    tokenizer = load_tokenizer(tokenizer_folder)
    (domain,) = opened(folder / "data", tokens=10**6, tokenizer=tokenizer, vocab_size=300)
    want = sorted(theirs.document(i).tolist() for i in range(30))
    assert sorted(ids.tolist() for ids in domain.documents) == want
    without = opened(folder / "data", tokens=10**6, tokenizer=None, vocab_size=300)
    assert without[0].num_tokens == domain.num_tokens
    with pytest.raises(UserError, match="was made with another tokenizer"):
        opened(folder / "data")
    with pytest.raises(UserError, match=r"holds the id \d+, but the model knows ids 0 to 3:"):
        opened(folder / "data", tokenizer=tokenizer, vocab_size=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x={0}/none"], "there is no file or folder {0}/none, nor prepared data {0}/none.bin"),
        (["{0}/prose", "prose={0}/a.tar.txt"], "there are two domains called prose; name this one"),
        (["={0}/prose"], "write name=path"),
        (["prose="], "write name=path"),
        ([""], "write name=path"),
        (["{0}/empty"], "holds no text"),
        (["{0}/void.txt"], "the domain void ({0}/void.txt) holds no text"),
        (["{0}/latin.txt"], "not UTF-8"),
        (["{0}/half"], "half.bin"),
    ],
)
def test_what_cannot_be_read(folder: Path, words: list[str], message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "void.txt").touch()
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "half.idx").touch()
    with pytest.raises(UserError, match=re.escape(message.format(folder))):
        opened(*(word.format(folder) for word in words))


def test_text_needs_a_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match="the run has no tokenizer to read text with"):
        opened(folder / "prose", tokenizer=None)


def test_the_built_in_corpus_by_package() -> None:
    found = built_in_domains(TOKENIZER, VOCAB, 200)
    names = [domain.name for domain in found]
    assert "single modules" in names and "asyncio" in names
    assert 3 <= len(names) == len(set(names)) <= 7
    assert all(1 <= domain.num_tokens <= 200 for domain in found)
    assert sum(domain.num_tokens == 200 for domain in found) >= len(found) - 1


# -- sequences --


@pytest.mark.parametrize("isolate", [True, False])
def test_sequences_are_those_of_training(tmp_path: Path, isolate: bool) -> None:
    """The same documents packed for validation give the same arrays, but for the labels."""
    chance = np.random.default_rng(0)
    words = ["".join(chance.choice(list("abc "), n)) for n in (5, 1, 30, 17, 8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    prepare([tmp_path / "t.jsonl"], tmp_path / "data", vocab_size=300)
    indexed = IndexedDataset(tmp_path / "data")
    packed = PackedDataset(
        indexed, np.arange(5), seq_length=8, isolate_documents=isolate, endless=False
    )
    documents = tuple(indexed.document(i).astype(np.int64) for i in range(5))
    domain = Domain("d", "s", documents)
    batches = domain.batches(8, 3, isolate)
    rows = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    assert len(rows) == -(-domain.num_tokens // 8)
    for i in range(len(packed)):
        sample, (tokens, positions, numbers) = packed[i], rows[i]
        real = sample["documents"] >= 0
        assert (numbers >= 0).tolist() == real.tolist()
        assert tokens[real].tolist() == sample["tokens"][real].tolist()
        assert positions[real].tolist() == sample["positions"][real].tolist()
        same = np.equal.outer(numbers[real], numbers[real])
        theirs = sample["documents"][real]
        assert np.array_equal(same, np.equal.outer(theirs, theirs))
    again = packed_domain("d", "s", packed, 10**6)
    assert np.concatenate(again.documents).tolist() == np.concatenate(documents).tolist()


def test_the_beginning_has_the_same_sequences() -> None:
    domain = Domain("d", "s", tuple(np.arange(n) for n in (5, 9, 30)))
    whole = next(domain.batches(4, 100, True))
    part = next(domain.beginning(16).batches(4, 100, True))
    for key, rows in part.items():
        assert np.array_equal(rows, whole[key][:4])
    assert domain.beginning(10**6).num_tokens == 44


def test_validation_samples_are_taken_from_all_over(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(f"{i:04}" for i in range(250)))
    prepare([tmp_path / "t.txt"], tmp_path / "d", vocab_size=262)
    indexed = IndexedDataset(tmp_path / "d")
    packed = PackedDataset(indexed, np.arange(1), seq_length=10, endless=False)
    domain = packed_domain("d", "s", packed, 40)
    assert domain.num_tokens == 40 and len(domain.documents) == 4
    wanted = [packed[i * len(packed) // 4]["tokens"].tolist() for i in range(4)]
    assert [ids.tolist() for ids in domain.documents] == wanted
