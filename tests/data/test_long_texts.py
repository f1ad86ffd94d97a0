"""Long texts are encoded in parts: their ids are those of the whole, whatever the tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from deepseek.config.errors import UserError
from deepseek.data import documents
from deepseek.data.corpus import Corpus
from deepseek.data.documents import Chunk
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepare import prepare
from deepseek.data.tokenizer import Tokenizer
from deepseek.data.tokenizer_files import load_tokenizer
from support.sample_texts import TEXTS

SPACE = "▁"
SPECIAL = ["<unk>", "<s>", "</s>"]
LEARNT = [*TEXTS, "the cat, the dog\nand the cow\n\nab ab  ab\tx é 東京 the the\n" * 20]


def bpe(normalizer: Any = None, pre_tokenizer: Any = None, **options: Any) -> Tokenizer:
    """A BPE trained on words; without a pre-tokenizer its merges reach across spaces."""
    settings = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False, **options}
    library = Library(models.BPE(**settings))
    return trained(library, trainers.BpeTrainer, normalizer, pre_tokenizer)


def unigram(normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    library = Library(models.Unigram())
    return trained(library, trainers.UnigramTrainer, normalizer, pre_tokenizer)


def trained(library: Library, trainer: Any, normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    options = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    if normalizer is not None:
        library.normalizer = normalizer
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    library.train_from_iterator(
        LEARNT, trainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False, **options)
    )
    return Tokenizer(library.to_str(), {}, "test")


def llama(**options: Any) -> Tokenizer:
    steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    return bpe(normalizers.Sequence(steps), **options)


def word_piece() -> Tokenizer:
    library = Library(models.WordPiece(unk_token="<unk>"))
    library.decoder = decoders.WordPiece()
    return trained(
        library,
        trainers.WordPieceTrainer,
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )


def metaspace(scheme: str, split: bool = True) -> Any:
    return pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=split)


COLLAPSE = normalizers.Replace(Regex(" {2,}"), " ")
KINDS = {
    "llama": llama(),
    "llama_without_fused_unknown": llama(fuse_unk=False),
    "llama_bytes": llama(byte_fallback=True),
    "gemma": bpe(normalizers.Replace(" ", SPACE), byte_fallback=True),
    "stripped": bpe(normalizers.Sequence([normalizers.Strip(), normalizers.Replace(" ", SPACE)])),
    "metaspace_first": bpe(pre_tokenizer=metaspace("first")),
    "metaspace_always": bpe(pre_tokenizer=metaspace("always")),
    "metaspace_never": bpe(pre_tokenizer=metaspace("never")),
    "metaspace_whole": bpe(pre_tokenizer=metaspace("first", split=False)),
    "unigram": unigram(normalizers.NFKC(), metaspace("always")),
    "unigram_whole": unigram(None, metaspace("first", split=False)),
    "t5": unigram(
        normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), COLLAPSE]),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("always")]),
    ),
    "lower": bpe(normalizers.Lowercase(), metaspace("first")),
    "word_piece": word_piece(),
    "byte_level_prefixed": bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte_level": bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
}
WORDS = ["the", "cat", "a", "Ab", ",", "é", "東", "x" * 9, "0", "ß", "<s>", "▁"]
GAPS = [" ", " ", "\n", "\n", "  ", "\n\n", "\t", " \n", "\n ", "", "\r\n"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = KINDS[kind]
    monkeypatch.setattr(documents, "CHUNK", 12)
    monkeypatch.setattr(documents, "CONTEXT", 8)
    draw = random.Random(kind)
    cuts = 0
    for _ in range(settings.default.max_examples * 3):
        count = draw.randrange(60)
        text = "".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(count))
        size = draw.randrange(1, 30)
        pieces = [text[k : k + size] for k in range(0, len(text), size)]
        parts = [
            Chunk(part, last, 0, before, after)
            for part, last, before, after in documents._parts(
                [*pieces, ""], "here", tokenizer.apart
            )
        ]
        assert "".join(part.text for part in parts) == text
        if kind == "byte_level" and any(len(part.text) >= 16 * 12 for part in parts):
            continue  # exact but for texts without a place to cut
        cuts += len(parts) - 1
        assert sum(tokenizer.encode_chunks(parts), []) == tokenizer.encode(text), text
    # Where scores are added up over the whole text a tie depends on all of it.
    assert cuts >= 30 if kind != "unigram_whole" else cuts == 0


@pytest.mark.parametrize("kind", ["llama_bytes", "unigram", "metaspace_whole"])
@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_data_hold_them(
    tmp_path: Path, kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 1000)
    text = "".join(f"line {k} of the text, the cat\n" for k in range(2000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    KINDS[kind].save(tmp_path / "tok")
    prepare(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"],
        tmp_path / "p",
        tmp_path / "tok",
        workers=workers,
    )
    data = IndexedDataset(tmp_path / "p")
    expected = [*KINDS[kind].encode(text), KINDS[kind].eos_id]
    assert [np.array_equal(data.document(k), expected) for k in range(2)] == [True, True]


def test_a_text_that_cannot_be_cut_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK", 100)
    monkeypatch.setattr(documents, "_LONGEST", 5000)
    (tmp_path / "a.txt").write_text("x" * 20_000)
    source = Corpus.from_paths([tmp_path / "a.txt"]).sources[0]
    with pytest.raises(UserError, match=r"a\.txt: .* characters in a row without a line or a word"):
        list(documents.chunks(source, apart=KINDS["llama"].apart))


def changed(tmp_path: Path, kind: str, **model: Any) -> Tokenizer:
    """The tokenizer as its file says with some keys of its model changed."""
    KINDS[kind].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"].update(model)
    file.write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("llama", {"unk_token": None}),
        ("metaspace_first", {"unk_token": None}),
        ("unigram", {"unk_id": None}),
        ("unigram_whole", {"unk_id": None}),
    ],
)
def test_a_character_without_a_token_is_named(
    tmp_path: Path, kind: str, model: dict[str, Any]
) -> None:
    tokenizer = changed(tmp_path, kind, **model)
    assert tokenizer.encode("the cat") == KINDS[kind].encode("the cat")
    for text in ("the ☃ cat", "\u0416"):
        with pytest.raises(UserError, match=r"has no token for the character .* none for unknown"):
            tokenizer.encode(text)


def test_a_word_level_vocabulary_without_unknown_is_told(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(library.to_str(), {}, "words")
    assert tokenizer.encode("a a") == [0, 0]
    with pytest.raises(UserError, match=r"words cannot encode a text: .*\[UNK\] token"):
        tokenizer.encode("a b")


def test_dropout_is_off(tmp_path: Path) -> None:
    tokenizer = changed(tmp_path, "llama", dropout=0.9)
    assert {tuple(tokenizer.encode("the cat and the dog")) for _ in range(20)} == {
        tuple(KINDS["llama"].encode("the cat and the dog"))
    }


def test_a_pattern_that_takes_for_ever_is_told() -> None:
    pattern = pre_tokenizers.Split(Regex(r"(a+)+b"), "isolated")
    tokenizer = bpe(pre_tokenizer=pattern)
    with pytest.raises(UserError, match="test cannot encode a text: "):
        tokenizer.encode("a" * 40_000 + "c")
