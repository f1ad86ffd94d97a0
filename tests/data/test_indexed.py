"""The .bin/.idx format: byte-exact, both ways, and every kind of damage named."""

from __future__ import annotations

import pickle
import re
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config.errors import UserError
from deepseek.data import indexed
from deepseek.data.indexed import IndexedDataset, IndexedWriter, dtype_for

# Two documents of uint16 ids: [1, 2, 3] + [4], and [5, 6]; then their bytes, written by hand.
GOLDEN_BIN = struct.pack("<6H", 1, 2, 3, 4, 5, 6)
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)
    + struct.pack("<B", 8)
    + struct.pack("<Q", 3)
    + struct.pack("<Q", 3)
    + struct.pack("<3i", 3, 1, 2)
    + struct.pack("<3q", 0, 6, 8)
    + struct.pack("<3q", 0, 2, 3)
)


def put(folder: Path, idx: bytes = GOLDEN_IDX, bin_: bytes = GOLDEN_BIN) -> Path:
    (folder / "p.idx").write_bytes(idx)
    (folder / "p.bin").write_bytes(bin_)
    return folder / "p"


def test_writes_the_golden_bytes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_sequence([1, 2, 3])
        writer.add_sequence(np.array([4], np.int64))
        writer.end_document()
        writer.add_document([5, 6])
    assert (tmp_path / "p.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "p.bin").read_bytes() == GOLDEN_BIN
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.bin", "p.idx"]


def test_reads_the_golden_bytes(tmp_path: Path) -> None:
    data = IndexedDataset(put(tmp_path))
    assert (data.num_documents, data.num_sequences, data.num_tokens) == (2, 3, 6)
    assert [data.document(k).tolist() for k in range(2)] == [[1, 2, 3, 4], [5, 6]]
    assert data.document_lengths.tolist() == [4, 2]
    assert data.document(0, 1, 3).tolist() == [2, 3]
    assert data.id_range() == (1, 6)


@pytest.mark.parametrize(
    ("code", "letter", "values"),
    [
        (1, "B", [0, 255]),
        (2, "b", [-128, 127]),
        (3, "h", [-32768, 32767]),
        (4, "i", [-(2**31), 2**31 - 1]),
        (5, "q", [-(2**63), 2**63 - 1]),
        (6, "d", [0.1, -3.0]),
        (7, "f", [0.5, -3.0]),
        (8, "H", [0, 65535]),
    ],
)
def test_every_dtype_code(tmp_path: Path, code: int, letter: str, values: list[float]) -> None:
    content = struct.pack(f"<2{letter}", *values)
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 1, 2) + struct.pack("<iqqq", 2, 0, 0, 1)
    data = IndexedDataset(put(tmp_path, idx, content))
    assert data.document(0).tolist() == values
    with IndexedWriter(tmp_path / "again", data.dtype) as writer:
        writer.add_document(data.document(0))
    assert (tmp_path / "again.idx").read_bytes() == idx
    assert (tmp_path / "again.bin").read_bytes() == content


def test_modes_of_multimodal_files_are_passed_over(tmp_path: Path) -> None:
    data = IndexedDataset(put(tmp_path, GOLDEN_IDX + bytes([0, 1, 0])))
    assert data.document(1).tolist() == [5, 6]


@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 65535), max_size=5), max_size=3), min_size=1, max_size=8
    ).filter(lambda documents: any(any(document) for document in documents)),
    st.sampled_from(["uint16", "int32", "int64"]),
)
def test_round_trip(documents: list[list[list[int]]], dtype: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(Path(folder, "p"), dtype) as writer:
            for document in documents:
                for sequence in document:
                    writer.add_sequence(sequence)
                writer.end_document()
        data = IndexedDataset(Path(folder, "p"))
        assert [data.document(k).tolist() for k in range(len(data))] == [
            sum(document, []) for document in documents
        ]
        assert data.num_sequences == sum(map(len, documents))


def test_long_indices_go_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[k] * (k % 4) for k in range(20)]

    def idx(name: str) -> bytes:
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            for document in documents:
                writer.add_document(document)
        return (tmp_path / f"{name}.idx").read_bytes()

    whole = idx("whole")
    monkeypatch.setattr(indexed, "_BLOCK", 3)
    assert idx("blocks") == whole
    data = IndexedDataset(tmp_path / "blocks")
    assert [data.document(k).tolist() for k in range(20)] == documents
    assert data.id_range() == (1, 19)


def test_documents_are_views_of_the_file(tmp_path: Path) -> None:
    data = IndexedDataset(put(tmp_path))
    document = data.document(1)
    assert np.shares_memory(document, data.tokens)
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


def test_a_copy_in_another_process_maps_the_file_anew(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document(np.arange(5000))
    sent = pickle.dumps(IndexedDataset(tmp_path / "p"))
    assert len(sent) < 1000
    assert pickle.loads(sent).document(0).tolist() == list(range(5000))


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = IndexedDataset(put(tmp_path)).fingerprint
    assert IndexedDataset(put(tmp_path)).fingerprint == first
    changed = GOLDEN_BIN[:-1] + b"\1"
    assert IndexedDataset(put(tmp_path, bin_=changed)).fingerprint != first


def test_fingerprint_of_large_files_sees_first_and_last_block(tmp_path: Path) -> None:
    count = 66 << 20
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, 1, 2) + struct.pack("<iqqq", count, 0, 0, 1)
    prefix = put(tmp_path, idx, b"")
    seen = set()
    for place in (None, 0, count - 1):
        with open(tmp_path / "p.bin", "wb") as stream:
            stream.truncate(count)
            if place is not None:
                stream.seek(place)
                stream.write(b"\1")
        seen.add(IndexedDataset(prefix).fingerprint)
    assert len(seen) == 3


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    put(tmp_path)
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([9, 9])
        raise KeyError
    assert (tmp_path / "p.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "p.idx").read_bytes() == GOLDEN_IDX
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.bin", "p.idx"]


def test_new_bin_never_meets_old_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path)

    def fail(*arguments: object) -> None:
        raise KeyError

    monkeypatch.setattr(indexed, "write_index", fail)
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([9, 9])
    with pytest.raises(UserError, match=r"p\.idx does not exist, but p\.bin does"):
        IndexedDataset(tmp_path / "p")


def test_dtype_is_megatrons_choice() -> None:
    assert [dtype_for(n).name for n in (4096, 65499, 65500, 129280)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]


def header(version: int = 1, code: int = 8, sequences: int = 3, documents: int = 3) -> bytes:
    packed = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, code, sequences, documents)
    return packed + GOLDEN_IDX[34:]


@pytest.mark.parametrize(
    ("idx", "bin_", "message"),
    [
        (b"TNTIDX\0\0" + GOLDEN_IDX[8:], GOLDEN_BIN, r"not a Megatron index: it begins with b'TNT"),
        (b"", GOLDEN_BIN, r"not a Megatron index: it begins with b''"),
        (GOLDEN_IDX[:20], GOLDEN_BIN, r"truncated: the header has 34 bytes, the file 20"),
        (header(version=2), GOLDEN_BIN, r"index version 2, only version 1"),
        (header(code=9), GOLDEN_BIN, r"unknown dtype code 9; known are 1 uint8, 2 int8"),
        (
            GOLDEN_IDX[:-1],
            GOLDEN_BIN,
            r"truncated: 3 sequences and 2 documents take 94 bytes, .* 93",
        ),
        (GOLDEN_IDX + b"\0", GOLDEN_BIN, r"has bytes after its end: .* 94 bytes, the file has 95"),
        (
            header(sequences=0, documents=1)[:42],
            b"",
            r"p\.idx is empty: 0 sequences, 0 documents; prepare",
        ),
        (
            GOLDEN_IDX,
            GOLDEN_BIN[:-2],
            r"truncated: p\.idx describes 6 ids of 2 bytes = 12 .* has 10",
        ),
        (GOLDEN_IDX, GOLDEN_BIN + b"\0", r"does not belong to its index: .* = 12 bytes, .* has 13"),
        (
            GOLDEN_IDX[:46] + struct.pack("<q", 2) + GOLDEN_IDX[54:],
            GOLDEN_BIN,
            r"damaged: sequence 0 \(3 ids\) begins at byte 2, but the ones before it end at 0",
        ),
        (
            GOLDEN_IDX[:34] + struct.pack("<3i", 3, -1, 4) + GOLDEN_IDX[46:],
            GOLDEN_BIN,
            r"damaged: sequence 1 \(-1 ids\)",
        ),
        (
            GOLDEN_IDX[:-8] + struct.pack("<q", 7),
            GOLDEN_BIN,
            r"document indices must rise from 0 to 3, they run from 0 to 7",
        ),
        (
            struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2) + struct.pack("<iqqq", 0, 0, 0, 1),
            b"",
            r"p\.bin is empty: p\.idx describes no ids",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, idx: bytes, bin_: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        IndexedDataset(put(tmp_path, idx, bin_))


def test_missing_files_are_named(tmp_path: Path) -> None:
    prefix = put(tmp_path)
    with pytest.raises(UserError, match=r"q\.idx does not exist; prefixes in .*: p"):
        IndexedDataset(tmp_path / "q")
    with pytest.raises(UserError, match=r"q\.idx does not exist; make it with prepare-data"):
        IndexedDataset(tmp_path / "nowhere" / "q")
    message = rf"give the prefix without \.bin: {re.escape(str(prefix))}$"
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "p.bin")
    (tmp_path / "p.bin").unlink()
    with pytest.raises(UserError, match=r"p\.bin does not exist, but p\.idx does"):
        IndexedDataset(prefix)


def test_ids_must_fit_the_dtype(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"p: id 65536 does not fit uint16; open the writer with"),
        IndexedWriter(tmp_path / "p", np.uint16) as writer,
    ):
        writer.add_document([1, 65536])
    with pytest.raises(UserError, match=r"dtype uint32 has no code in the \.idx format; use one"):
        IndexedWriter(tmp_path / "p", np.uint32)
    assert not list(tmp_path.iterdir())
