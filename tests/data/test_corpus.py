"""Input files: what is a document, in which order, and what is wrong with a bad file."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config.errors import UserError
from deepseek.data import corpus, documents
from deepseek.data.corpus import Corpus, Source
from deepseek.data.documents import chunks, cut
from deepseek.data.tokenizer import Tokenizer
from support.sample_texts import TEXTS

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".zst": zstandard.compress,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def texts_of(source: Source, key: str = "text") -> Iterator[str]:
    parts: list[str] = []
    for chunk in chunks(source, key):
        parts.append(chunk.text)
        if chunk.last:
            yield "".join(parts)
            parts = []


def read(path: Path, key: str = "text") -> list[str]:
    return [text for source in Corpus.from_paths([path]).sources for text in texts_of(source, key)]


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(PACKERS.get(path.suffix, lambda plain: plain)(data))
    return path


def parquet(path: Path, rows: list[Any], column: str = "text", **options: Any) -> Path:
    table = pyarrow.table({"id": list(range(len(rows))), column: rows})
    plain = path.with_suffix("") if path.suffix in PACKERS else path
    pyarrow.parquet.write_table(table, plain, **options)
    return put(path, plain.read_bytes()) if path != plain else plain


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.md", "a.py", "noending", "a.txt.zst", "a.txt.gz", "a.gz", "a.md.bz2", "a.txt.xz"],
)
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    for text in TEXTS:
        assert read(put(tmp_path / name, text)) == [text]
    assert read(put(tmp_path / name, "\ufefftext")) == ["text"]


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "a.JSONL"]
    + ["a.jsonl.zst", "a.json.gz", "a.jsonl.bz2", "a.jsonl.xz"],
)
def test_each_line_of_json_is_a_document(tmp_path: Path, name: str) -> None:
    lines = "\n".join(json.dumps({"n": k, "text": text}) for k, text in enumerate(TEXTS))
    assert read(put(tmp_path / name, lines)) == TEXTS
    assert read(put(tmp_path / name, f'\ufeff{lines}\r\n\n  \n{{"text": ""}}\n')) == [*TEXTS, ""]
    assert read(put(tmp_path / name, '{"body": "x"}'), "body") == ["x"]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.zst", "a.parquet.gz"])
def test_each_row_of_parquet_is_a_document(tmp_path: Path, name: str) -> None:
    rows = [*TEXTS, None, "end"] * 100
    expected = [text or "" for text in rows]
    assert read(parquet(tmp_path / name, rows, row_group_size=7)) == expected
    large = pyarrow.array(rows, pyarrow.large_string())
    assert read(parquet(tmp_path / name, large, "body"), "body") == expected
    coded = pyarrow.array(rows).dictionary_encode()
    for other in (
        pyarrow.array(rows, pyarrow.string_view()),
        coded,
        coded.cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string())),
    ):
        assert read(parquet(tmp_path / name, other)) == expected


def test_folders_are_walked_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a.txt", "a/b/c.jsonl", ".hidden.txt", ".git/config", "B.txt"):
        put(tmp_path / name, json.dumps({"text": name}) if "jsonl" in name else name)
    put(tmp_path / "picture.png", b"\x89PNG\0\0")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.txt")
    found = Corpus.from_paths([tmp_path])
    names = [source.name for source in found.sources]
    assert names == ["B.txt", "a.txt", "a/b/c.jsonl", "a/z.txt", "b.txt"]
    hidden = [("hidden", tmp_path / name) for name in (".git", ".hidden.txt")]
    broken = ("broken links", tmp_path / "broken.txt")
    assert sorted(found.skipped) == [
        ("binary files", tmp_path / "picture.png"),
        broken,
        *hidden,
    ]
    assert found.total_bytes == sum(source.path.stat().st_size for source in found.sources)
    excluded = Corpus.from_paths([tmp_path], exclude=lambda path: path.name == "a.txt")
    assert len(excluded.sources) == 4


def linked(tmp_path: Path) -> Path:
    """A folder with links of every kind."""
    for name in ("in/a.txt", "in/sub/c.txt", "elsewhere/b.txt", "elsewhere/deep/d.txt", "one.txt"):
        put(tmp_path / name, name)
    links = {
        "in/shared": "../elsewhere",
        "in/again": "../elsewhere/deep",
        "in/one.txt": "../one.txt",
        "in/two.txt": "../one.txt",
        "in/same.txt": "a.txt",
        "in/up": "..",
        "in/me": ".",
        "in/sub/top": "../../in",
        "in/gone.txt": "nowhere",
        "in/circle": "circle",
        "elsewhere/home": "../in",
    }
    for name, target in links.items():
        os.symlink(target, tmp_path / name)
    os.mkfifo(tmp_path / "in/pipe.txt")
    put(tmp_path / "in/old.tar.gz", b"x")
    return tmp_path / "in"


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder = linked(tmp_path)
    found = Corpus.from_paths([folder])
    names = [source.name for source in found.sources]
    assert names == ["a.txt", "again/d.txt", "one.txt", "shared/b.txt", "sub/c.txt"]
    told = {path.relative_to(folder).as_posix(): kind for kind, path in found.skipped}
    assert told == {
        "circle": "links in a circle",
        "gone.txt": "broken links",
        "me": "links that lead back",
        "old.tar.gz": "archives",
        "pipe.txt": "devices, pipes or sockets",
        "same.txt": "links to what is read already",
        "shared/deep": "read already",
        "shared/home": "links to what is read already",
        "sub/top": "links that lead back",
        "two.txt": "links to what is read already",
        "up": "links that lead back",
    }
    with pytest.raises(UserError, match=r"--strict: archives: 1 \(.*\); broken links: 1 \("):
        Corpus.from_paths([folder], strict=True)
    with pytest.raises(UserError, match=r"old\.tar\.gz is an archive; unpack it"):
        Corpus.from_paths([folder / "old.tar.gz"])


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    found = Corpus.from_paths([tmp_path])
    assert read(tmp_path) == ["text"] and len(found.stat_digest()) == 64


def test_stat_digest_sees_changes(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "one")
    digests = {Corpus.from_paths([tmp_path]).stat_digest()}
    assert Corpus.from_paths([tmp_path]).stat_digest() in digests
    os.utime(path, (1, 1))
    digests.add(Corpus.from_paths([tmp_path]).stat_digest())
    put(tmp_path / "b.txt", "two")
    digests.add(Corpus.from_paths([tmp_path]).stat_digest())
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst", "a.jsonl", "a.parquet", "a.parquet.zst"])
def test_digest_is_that_of_the_file(tmp_path: Path, name: str) -> None:
    if "parquet" in name:
        path = parquet(tmp_path / name, TEXTS)
    else:
        path = put(tmp_path / name, '{"text": "x"}\n' * 5)
    digest = hashlib.sha256()
    source = Corpus.from_paths([path]).sources[0]
    last = list(chunks(source, digest=digest))[-1]
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert last.position == path.stat().st_size


def with_pattern(pattern: str) -> Tokenizer:
    """A byte-level BPE that splits text by another pattern; every pair of pieces is merged."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    texts = ["\n\n", "  ", "\n ", " \n", ",\n", "\n,", " ,", ", ", " a", "a ", "1\n", " 1", "\t\n"]
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts * 9, trainer)
    return Tokenizer(library.to_str(), {}, "test")


OTHERS = [
    # As in DeepSeek-V3 and in cl100k (GPT-4, Llama 3, Qwen).
    with_pattern(
        r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    with_pattern(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
]


@given(st.text("ab1 \n\t,東", max_size=80), st.integers(1, 10))
def test_pieces_join_to_the_text_and_to_its_ids(bpe: Tokenizer, text: str, limit: int) -> None:
    found, rest = cut(text, final=True, limit=limit)
    assert "".join(found) == text and rest == ""
    open_pieces, rest = cut(text, final=False, limit=limit)
    assert "".join(open_pieces) + rest == text
    assert found[: len(open_pieces)] == open_pieces
    if all(len(piece) < 16 * limit for piece in found):
        for tokenizer in (bpe, *OTHERS):
            assert sum(map(tokenizer.encode, found), []) == tokenizer.encode(text)


def test_a_text_without_a_place_to_cut_is_cut_anyway() -> None:
    found, _ = cut("x" * 100, final=True, limit=5)
    assert [len(piece) for piece in found] == [80, 20]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst"])
def test_long_files_come_in_chunks_whatever_the_blocks(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {k} é東🗼\n" for k in range(150_000))
    path = put(tmp_path / name, text)
    source = Corpus.from_paths([path]).sources[0]
    whole = [(chunk.text, chunk.last) for chunk in chunks(source)]
    assert len(whole) >= 3
    assert [last for _, last in whole] == [False] * (len(whole) - 1) + [True]
    monkeypatch.setattr(documents, "_BLOCK", 100_003)
    assert [(chunk.text, chunk.last) for chunk in chunks(source)] == whole
    assert list(texts_of(source)) == [text]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    lines = [os.urandom(500).hex() for _ in range(20_000)]
    if "jsonl" in name:
        lines = [json.dumps({"text": line}) for line in lines]
    path = put(tmp_path / name, "\n".join(lines))
    source = Corpus.from_paths([path]).sources[0]
    del lines
    tracemalloc.start()
    count = sum(1 for _ in chunks(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count >= 20 and peak < 8_000_000  # of 20 MB


def test_the_standard_library_is_a_corpus() -> None:
    found = Corpus.stdlib()
    names = [source.name for source in found.sources]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert 5_000_000 < found.total_bytes < 20_000_000
    assert found.stat_digest() == Corpus.stdlib().stat_digest()
    first = next(texts_of(found.sources[0]))
    assert first == found.sources[0].path.read_bytes().decode()


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"holds no \.py files; give input files instead"):
        Corpus.stdlib()
    put(tmp_path / "latin.py", b"# \xe9")
    put(tmp_path / "good.py", b"# \xc3\xa9")
    assert [source.name for source in Corpus.stdlib().sources] == ["good.py"]


BAD = [
    ("a.txt", b"ab\xffcd", r"a\.txt: not UTF-8 at byte 2 \(invalid start byte\); convert it"),
    ("a.txt", b"x" * 2_000_000 + b"\xc3(", r"a\.txt: not UTF-8 at byte 2000000 "),
    ("a.txt", b"ab\xe6\x9d", r"a\.txt: not UTF-8 at byte 2 \(unexpected end of data\)"),
    ("a.txt.zst", b"ab\xffcd", r"a\.txt\.zst: not UTF-8 at byte 2"),
    ("a.txt", "text".encode("utf-16"), r"at byte 0 .*looks like UTF-16: iconv -f UTF-16"),
    ("a.txt", gzip.compress(b"text", mtime=0), r"at byte 1 .*it is gzip-compressed: unpack it"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 at byte 24 of the"),
    (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "x"\n',
        r"a\.jsonl:2: not JSON \(Expecting.*one JSON obj",
    ),
    ("a.jsonl.zst", b'{"text": "x"}\n\n{', r"a\.jsonl\.zst:3: not JSON"),
    ("a.json", b'[\n{"text": "x"}\n]', r"a\.json:1: not JSON .*one JSON array, make it lines: jq"),
    (
        "a.json",
        b'{\n "text": "x"\n}',
        r"a\.json:1: .*must stand on one line: jq -c \. a\.json > a\.",
    ),
    (
        "a.json",
        b'[{"text":"a"},{"text":"b"}]',
        r"a JSON array, .*lines: jq -c '\.\[\]' a\.json > a\.jsonl",
    ),
    (
        "b c.json.gz",
        b'\xef\xbb\xbf [{"text":"a"},\n',
        r"jq -c '\.\[\]' 'b c\.json\.gz' > 'b c\.jsonl'",
    ),
    ("a.json", b'[\n {\n  "text": "a"\n }\n]', r"not JSON.*lines: jq -c '\.\[\]' a\.json"),
    ("a.json", b'["a",\n "b"]', r"not JSON.*: jq -c '\.\[\] \| \{text: \.\}' a\.json"),
    ("a.json", b'["a", "b"]', r"a JSON array, .*: jq -c '\.\[\] \| \{text: \.\}' a\.json"),
    (
        "a.jsonl",
        b'{"meta": {"text": "a"}}',
        r"no key 'text', but meta\.text inside .* '\{text: \.meta\.text\}'",
    ),
    ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl:1: not JSON \(maximum recursion"),
    ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", r"a\.jsonl:1: not JSON \(Exceeds the limit"),
    ("a.jsonl", b'["x"]', r"a\.jsonl:1: a JSON array, expected an object with the key 'text'"),
    ("a.jsonl", b'{"txt": "x", "id": 1}', r"no key 'text'; present: txt, id; pass --json-key txt"),
    ("a.jsonl", b'{"q": "x"}', r"no key 'text'; present: q; choose one with --json-key"),
    ("a.jsonl", b"{}", r"no key 'text'; present: none"),
    ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: 'text' holds a JSON null, expected a string"),
    ("a.jsonl", b'{"text": 1.5}', r"'text' holds a JSON number, expected a string"),
    ("a.jsonl", b'{"text": "ab\\ud800"}', r"a\.jsonl:1: character 2 of the text is half of a surr"),
    ("a.parquet", b"PAR1 no", r"a\.parquet is not a readable parquet file .*copy it again"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(put(tmp_path / name, content))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_frames_and_damage(tmp_path: Path, suffix: str) -> None:
    plain = random.Random(1).randbytes(300_000).hex().encode()
    packed = PACKERS[suffix](plain)
    path = tmp_path / f"a.txt{suffix}"
    padding = b"" if suffix in (".zst", ".bz2") else bytes(512)
    path.write_bytes(packed + PACKERS[suffix](b"") + PACKERS[suffix](b"second") + padding)
    assert read(path) == [plain.decode() + "second"]
    for content in (b"", packed[:-10], packed[:100_000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"truncated: it ends inside a compressed frame"):
            read(path)
    for content in (b"plain text" * 9, bytes(600), packed[:50_000] + b"?" * 90 + packed[50_090:]):
        path.write_bytes(content)
        if suffix == ".zst" and content.startswith(packed[:9]):
            continue  # without a checksum damage may decode to other text
        with pytest.raises(
            UserError, match=r"is damaged near byte \d+ \(.*\); copy it again|UTF-8"
        ):
            read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_small_file_with_a_long_line_is_refused(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, b'{"text": "')
    path.write_bytes(path.read_bytes() + 30 * PACKERS[path.suffix](b"a" * 10_000_000))
    assert path.stat().st_size < 400_000
    code = (
        "import resource, sys, time; from pathlib import Path\n"
        "from deepseek.data.corpus import Corpus\n"
        "from deepseek.data.documents import chunks\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: list(chunks(Corpus.from_paths([Path(sys.argv[1])]).sources[0]))\n"
        "except Exception as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    message, grown = ran.stdout.splitlines()
    assert f"{name}:1: the line is longer than 67.1 MB; write the text as several" in message
    assert int(grown) < 200_000


def test_bad_compression_is_named(tmp_path: Path) -> None:
    # With a checksum, as zstd's own command writes: without one, damage may decode to other text.
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    packed = compressor.compress(random.Random(1).randbytes(300_000).hex().encode())
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packed[:-10])
    with pytest.raises(
        UserError, match=rf"truncated: it ends inside .* after {len(packed) - 10} b"
    ):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"truncated: .* after 0 bytes \(0 unpacked\)"):
        read(path)
    path.write_bytes(packed[:200_000] + b"??" * 40 + packed[200_080:])
    with pytest.raises(UserError, match=r"is damaged near byte \d+ \(.*\); copy it again"):
        read(path)
    path.write_bytes(packed + zstandard.compress(b"second frame"))
    assert read(path)[0].endswith("second frame")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TEXTS, "body")
    with pytest.raises(UserError, match=r"no column 'text'; present: id, body; choose one with"):
        read(path)
    with pytest.raises(UserError, match=r"column 'id' holds int64, expected strings"):
        read(path, "id")
    nested = pyarrow.array([{"text": "a", "n": 1}])
    path = parquet(tmp_path / "n.parquet", nested, "row")
    with pytest.raises(UserError, match=r"no column 'text', but row\.text inside another"):
        read(path)
    with pytest.raises(UserError, match=r"column 'row' holds struct<.*>, expected strings"):
        read(path, "row")
    for column, kind in (
        ([["a", "b"]], "list"), ([b"a"], "binary"), ([None], "null"), ([1.5], "double"),
        ([[{"text": "a"}]], "list"), ([{"a": {"text": "b"}}], "struct"),
        (pyarrow.array([b"a"], pyarrow.large_binary()), "large_binary"),
    ):  # fmt: skip
        path = parquet(tmp_path / "k.parquet", column, "text")
        with pytest.raises(UserError, match=f"column 'text' holds {kind}.*, expected strings"):
            read(path)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="2 columns are called 'text'; rename all but one"):
        read(tmp_path / "t.parquet")
    rows = [random.Random(i).randbytes(500).hex() for i in range(50)]
    path = parquet(tmp_path / "b.parquet", rows, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[2000:6000] = b"\xff" * 4000
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"b\.parquet is not a readable parquet file"):
        read(path)


@pytest.mark.parametrize(("name", "module"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_missing_libraries_are_named(
    tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / name, "text")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} needs {module}; pip install {module}"):
        read(path)


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    path = put(tmp_path / "train.txt", "x")
    with pytest.raises(UserError, match=r"tran\.txt does not exist; nearest: .*train\.txt"):
        Corpus.from_paths([tmp_path / "tran.txt"])
    with pytest.raises(UserError, match=r"zzz does not exist; look into "):
        Corpus.from_paths([tmp_path / "zzz"])
    with pytest.raises(UserError, match=r"a\.txt does not exist; nor does the folder .*no"):
        Corpus.from_paths([tmp_path / "no" / "a.txt"])
    with pytest.raises(UserError, match=r"train\.txt is given twice"):
        Corpus.from_paths([tmp_path, path])
    with pytest.raises(UserError, match=r"no input was given"):
        Corpus.from_paths([])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty holds no text; give a folder with \.txt"):
        Corpus.from_paths([empty])
    put(empty / "x.bin", b"\0")
    with pytest.raises(
        UserError, match=r"empty holds no text \(binary files: 1 \(.*x\.bin\) left out\)"
    ):
        Corpus.from_paths([empty])


def test_a_file_that_grows_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "x")
    source = Corpus.from_paths([path]).sources[0]
    put(path, "xyz")
    with pytest.raises(UserError, match=r"a\.txt changed while it was read \(1 -> 3 bytes\)"):
        list(chunks(source))
