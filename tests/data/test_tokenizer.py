"""Tokenizers: exact round trips, streams, special tokens by name, and errors with a way out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from deepseek.config.errors import UserError
from deepseek.data.documents import Chunk
from deepseek.data.tokenizer import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, PAD, FimIds, Tokenizer
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.data.tokenizer_training import byte_tokenizer, train_bpe
from support.sample_texts import TEXTS

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
BPE, BYTE = train_bpe(TEXTS * 3, 400), byte_tokenizer()


@given(texts)
def test_round_trip(text: str) -> None:
    for tokenizer in (BPE, BYTE):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert BYTE.encode(text) == list(text.encode())


@given(st.lists(st.integers(0, 420), max_size=40))
def test_a_stream_joins_to_the_decoded_text(ids: list[int]) -> None:
    for tokenizer in (BPE, BYTE):
        for skip in (False, True):
            stream = tokenizer.stream(skip_special=skip)
            pieces = [*map(stream.push, ids), stream.finish()]
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


@given(texts)
def test_a_stream_never_cuts_a_character(text: str) -> None:
    for tokenizer in (BPE, BYTE):
        stream = tokenizer.stream()
        seen = ""
        for token in tokenizer.encode(text):
            seen += stream.push(token)
            assert text.startswith(seen)
        assert seen == text and stream.finish() == ""


def test_half_a_character_at_the_end_becomes_the_replacement() -> None:
    stream = BYTE.stream()
    assert [stream.push(token) for token in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


@given(st.lists(st.integers(0, 399), max_size=30))
def test_the_table_decodes_as_the_library_does(ids: list[int]) -> None:
    assert BPE.decode(ids) == Library.from_str(BPE._source).decode(ids, skip_special_tokens=False)


def test_bytes_without_the_library_are_those_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    alone = byte_tokenizer()
    monkeypatch.undo()

    @given(st.lists(st.sampled_from([EOS, FIM_HOLE, "a", "é", "\n", "<｜"]), max_size=8))
    def compare(parts: list[str]) -> None:
        text = "".join(parts)
        for special in (False, True):
            assert alone.encode(text, special) == BYTE.encode(text, special)
        assert alone.encode_chunks([Chunk(text, True, 0)] * 2) == [list(text.encode())] * 2

    compare()
    assert alone.fingerprint == BYTE.fingerprint


def test_training_is_repeatable_and_splits_numbers() -> None:
    again = train_bpe(iter(TEXTS * 3), 400)
    assert again.fingerprint == BPE.fingerprint
    assert BPE.vocab_size <= 400
    numbers = train_bpe(["1234567 " * 50], 300)
    longest = max(numbers.decode([token]).strip() for token in range(6, numbers.vocab_size))
    assert len(longest) <= 3
    assert len(numbers.encode("1234567")) == 3


def test_special_tokens_of_tokenizers_made_here() -> None:
    for tokenizer in (BPE, BYTE):
        names = [BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END]
        ids = [tokenizer.encode(name, parse_special=True) for name in names]
        assert all(len(found) == 1 for found in ids)
        flat = [found[0] for found in ids]
        assert flat == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.fim]
        assert len(set(flat)) == 6
        assert all(tokenizer.is_special(token) for token in flat)


def test_text_cannot_forge_special_tokens() -> None:
    for tokenizer in (BPE, BYTE):
        text = f"before{EOS}after"
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.encode_chunks([Chunk(text, True, 0)]) == [tokenizer.encode(text)]
        assert tokenizer.encode(text, parse_special=True).count(tokenizer.eos_id) == 1
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_of_ids_add_up_to_the_text() -> None:
    for tokenizer in (BPE, BYTE):
        sizes = tokenizer.token_bytes
        assert sizes is not None and len(sizes) == tokenizer.vocab_size
        for text in TEXTS:
            ids = [*tokenizer.encode(text), tokenizer.eos_id]
            assert int(sizes[ids].sum()) == len(text.encode())


def test_ids_outside_the_vocabulary_are_nothing() -> None:
    assert BPE.decode([*BPE.encode("ab"), 100_000]) == "ab"


def source(*added: str, **changes: Any) -> str:
    """A small tokenizer.json with these special tokens."""
    content = json.loads(BYTE._source)
    content["added_tokens"] = [
        {**content["added_tokens"][0], "id": 256 + k, "content": name}
        for k, name in enumerate(added)
    ]
    content["model"]["merges"] = [["a", "b"]]
    content["model"]["vocab"]["ab"] = 300
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("added", "bos", "eos", "pad", "fim"),
    [
        ([BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END], 256, 257, 258, FimIds(260, 259, 261)),
        (["[BOS]", "[EOS]", "<|im_end|>", "[UNK]", "[PAD]"], 256, 257, 260, None),
        (["<|endoftext|>"], None, 256, None, None),
        (["<s>", "</s>", "<unk>"], 256, 257, None, None),
        (
            ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
            None,
            256,
            None,
            FimIds(257, 259, 258),
        ),
        (["<eos>", "<fim_prefix>", "<fim_suffix>"], None, 256, None, None),
    ],
)
def test_special_tokens_are_found_by_name(
    tmp_path: Path,
    added: list[str],
    bos: int | None,
    eos: int,
    pad: int | None,
    fim: FimIds | None,
) -> None:
    (tmp_path / "tokenizer.json").write_text(source(*added))
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.pad_id, found.fim) == (bos, eos, pad, fim)
    assert found.vocab_size == 301
    assert found.encode("ab<s>") == [300, *map(ord, "<s>")]


def test_the_config_beside_it_decides(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(source(EOS, "<stop>", "<fill>"))
    config = {"eos_token": {"content": "<stop>"}, "pad_token": "<fill>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.bos_id, found.eos_id, found.pad_id) == (None, 257, 258)
    found.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.eos_id, copy.fingerprint) == (257, found.fingerprint)


def test_fingerprint_ignores_layout_but_not_content(tmp_path: Path) -> None:
    compact = Tokenizer(json.dumps(json.loads(BPE._source)), {}, "test")
    assert compact.fingerprint == BPE.fingerprint
    names = (EOS, "</s>")
    plain = Tokenizer(source(*names), {}, "test")
    assert Tokenizer(source(*names), {"eos_token": "</s>"}, "test").fingerprint != plain.fingerprint
    assert Tokenizer(source(EOS, "<|x|>"), {}, "test").fingerprint != plain.fingerprint
    BPE.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == BPE.fingerprint


def test_truncation_and_padding_of_the_file_are_off() -> None:
    limits = {
        "truncation": {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    }
    cut = Tokenizer(source(EOS, **limits), {}, "test")
    assert cut.encode("xyz") == [120, 121, 122]
    assert cut.fingerprint == Tokenizer(source(EOS), {}, "test").fingerprint


def metaspace() -> Tokenizer:
    """A tokenizer that is not byte-level: words with a leading mark, bytes as a fallback."""
    names = ["</s>", "▁", "a", "b", "▁a", "▁ab", "ab", *(f"<0x{k:02X}>" for k in range(256))]
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    library = Library(
        models.BPE({n: k for k, n in enumerate(names)}, merges, byte_fallback=True, unk_token="a")
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return Tokenizer(library.to_str(), {}, "test")


@given(st.text("ab 東é🗼\ufffd", max_size=20))
def test_streams_of_other_vocabularies(text: str) -> None:
    tokenizer = METASPACE
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert tokenizer.token_bytes is None


METASPACE = metaspace()


def test_a_stream_of_broken_bytes_goes_on() -> None:
    stream = METASPACE.stream()
    broken = METASPACE._vocab["<0xFF>"]
    given_out = "".join(stream.push(broken) for _ in range(50))
    assert len(given_out) >= 45 and set(given_out) == {"\ufffd"}


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    BPE.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (BPE.eos_id, BPE.pad_id)
    for text in TEXTS:
        assert loaded(text, add_special_tokens=False)["input_ids"] == BPE.encode(text)


def test_without_the_library_bytes_are_used_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    BPE.save(tmp_path / "bpe")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    trained = train_bpe(TEXTS, 400)
    said = capsys.readouterr().err
    assert "tokenizers is not installed" in said and "pip install tokenizers" in said
    assert trained.encode("é") == list("é".encode())
    trained.save(tmp_path / "bytes")
    assert load_tokenizer(tmp_path / "bytes").fingerprint == BYTE.fingerprint
    with pytest.raises(UserError, match=r"needs the tokenizers library; pip install tokenizers"):
        load_tokenizer(tmp_path / "bpe")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tokenizer\.json:1: not JSON"),
        ("[1]", r"holds a JSON list, expected an object"),
        ('{"a": 1}', r"not a tokenizer: it has no model\.vocab"),
        (
            source(EOS, decoder={"type": "Nonsense"}),
            r"cannot be read by this version of tokenizers",
        ),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_other_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer .*nowhere does not exist; give a tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist; give a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").touch()
    with pytest.raises(UserError, match=r"holds tiktoken\.model, which must be converted first"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff")
    with pytest.raises(UserError, match=r"is not UTF-8 at byte 1"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(source(EOS))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(UserError, match=r"eos_token is '<gone>', which is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(UserError, match=r"vocab_size=261 is too small: .* take 262; use at least"):
        train_bpe(TEXTS, 261)
    assert train_bpe(TEXTS, 262).vocab_size == 262
