"""``*.arrays``: what is written is read; a kill, a tear or a flipped bit costs one record."""

import json
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from deepseek.monitoring.array_log import ArrayLog, ArrayReader, cut_torn_record, read_arrays
from support.array_log_driver import content

DRIVER = [sys.executable, "-m", "support.array_log_driver"]


def steps(path: Path) -> list[int]:
    return [record.step for record in read_arrays(path)]


def filled(path: Path, count: int) -> list[int]:
    """A log of ``count`` records; returns the file's size after each."""
    log, sizes = ArrayLog(path), [0]
    for step in range(1, count + 1):
        log.append(step, {"tokens": np.arange(6, dtype=np.uint32).reshape(2, 3) * step})
        sizes.append(path.stat().st_size)
    return sizes


def test_a_record_comes_back_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "monitor" / "experts.arrays"  # the folder is made too
    arrays = {
        "tokens": np.arange(12, dtype=np.uint32).reshape(3, 4),
        "bias": np.array([[0.5, -1.25], [np.nan, np.inf]], np.float32),
        "traffic": np.array([[2**63]], np.uint64),
        "scalar": np.array(7.5),
        "empty": np.zeros((0, 4), np.float32),
        "turned": np.arange(6, dtype=">i4").reshape(2, 3).T,
    }
    ArrayLog(path).append(3, arrays, layers=["layers.3", "mtp.0.block"], ep=2)
    (record,) = read_arrays(path)
    assert record.step == 3
    assert record.meta == {"layers": ["layers.3", "mtp.0.block"], "ep": 2}
    assert list(record.arrays) == list(arrays)
    for name, array in arrays.items():
        assert record.arrays[name].shape == array.shape
        assert record.arrays[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(record.arrays[name], array)


def test_each_record_has_its_own_facts(tmp_path: Path) -> None:
    """Kept from one to the next where they are the same."""
    log, facts = ArrayLog(tmp_path / "a"), [{"ep": 2}, {"ep": 2}, {"ep": 4, "layers": ["a"]}, {}]
    for step, meta in enumerate(facts, 1):
        log.append(step, {"x": np.array([step])}, **meta)
    assert [record.meta for record in read_arrays(tmp_path / "a")] == facts


@given(hnp.arrays(hnp.integer_dtypes() | hnp.floating_dtypes(), hnp.array_shapes(min_side=0)))
def test_any_array_comes_back(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("log") / "a.arrays"
    ArrayLog(path).append(1, {"a": array})
    (record,) = read_arrays(path)
    assert record.arrays["a"].shape == array.shape
    np.testing.assert_array_equal(record.arrays["a"], array)


@pytest.mark.parametrize("size", [1, 255, 256, 263, 511, 512, 513, 4000])
@pytest.mark.parametrize("values", [2, 256])
def test_bytes_come_back_on_both_sides_of_a_small_array(
    tmp_path: Path, size: int, values: int
) -> None:
    """Those that compress well and those that do not."""
    array = np.random.default_rng(size).integers(0, values, size, np.uint8)
    ArrayLog(tmp_path / "a").append(1, {"a": array})
    (record,) = read_arrays(tmp_path / "a")
    np.testing.assert_array_equal(record.arrays["a"], array)


def test_named_arrays_alone_are_decoded(tmp_path: Path) -> None:
    ArrayLog(tmp_path / "a").append(1, {"x": np.ones(2), "y": np.full(3, 2.0)})
    (record,) = read_arrays(tmp_path / "a", {"y"})
    assert list(record.arrays) == ["y"]
    np.testing.assert_array_equal(record.arrays["y"], [2.0, 2.0, 2.0])


def test_what_is_no_number_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no array of numbers"):
        ArrayLog(tmp_path / "a").append(1, {"x": np.array(["word", None], dtype=object)})
    assert not (tmp_path / "a").exists()


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert list(read_arrays(tmp_path / "none")) == []


def test_an_append_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ArrayLog(tmp_path / "a")
    log.append(1, {"x": np.ones(2)})
    before, writes = (tmp_path / "a").stat().st_size, []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(len(data)) or real(fd, data))
    log.append(2, {"x": np.random.default_rng(0).random(100_000)})
    assert writes == [(tmp_path / "a").stat().st_size - before]


def test_a_full_disk_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "a", 2)
    before = (tmp_path / "a").read_bytes()
    real = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda fd, data: real(fd, data[:50]))
        with pytest.raises(OSError, match="No space left"):
            ArrayLog(tmp_path / "a").append(3, {"x": np.ones(100)})
    assert (tmp_path / "a").read_bytes() == before


def test_a_tear_at_any_byte_costs_the_last_record_alone(tmp_path: Path) -> None:
    *_, start, end = filled(tmp_path / "whole", 3)
    data = (tmp_path / "whole").read_bytes()
    torn = tmp_path / "torn"
    for cut in range(start, end):
        torn.write_bytes(data[:cut])
        assert steps(torn) == [1, 2], cut
        ArrayLog(torn).append(3, {"again": np.ones(1)})
        assert torn.read_bytes()[:start] == data[:start], cut
        assert steps(torn) == [1, 2, 3], cut


def test_a_tail_of_zeros_is_cut(tmp_path: Path) -> None:
    """A power failure can leave the length of a record on disk without its bytes."""
    *_, start, end = filled(tmp_path / "a", 3)
    data = (tmp_path / "a").read_bytes()
    for kept in (start, start + 10, end - 4):
        (tmp_path / "a").write_bytes(data[:kept] + bytes(end - kept))
        assert steps(tmp_path / "a") == [1, 2]
        cut_torn_record(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == data[:start]


def test_a_flipped_bit_anywhere_costs_its_record_alone(tmp_path: Path) -> None:
    _, first, second, _ = filled(tmp_path / "a", 3)
    data = (tmp_path / "a").read_bytes()
    for position in range(first, second):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        (tmp_path / "a").write_bytes(damaged)
        assert steps(tmp_path / "a") == [1, 3], position
        cut_torn_record(tmp_path / "a")
        assert (tmp_path / "a").stat().st_size == len(data), "damage in the middle is no torn tail"


def test_the_later_record_of_a_step_wins(tmp_path: Path) -> None:
    log = ArrayLog(tmp_path / "a")
    for step, value in ((1, 1), (2, 2), (3, 3)):
        log.append(step, {"x": np.array([value])})
    for step, value in ((2, 20), (3, 30)):
        ArrayLog(tmp_path / "a").append(step, {"x": np.array([value])})
    assert [(r.step, int(r.arrays["x"][0])) for r in read_arrays(tmp_path / "a")] == [
        (1, 1), (2, 20), (3, 30)]  # fmt: skip


def test_a_reader_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    reader = ArrayReader(path)
    reader.update()
    assert reader.entries == [] and reader.newest() is None  # no file yet
    *_, start, end = filled(path, 3)
    data = path.read_bytes()
    path.write_bytes(data[:start] + data[start : end - 1])  # the third is under way
    reader.update()
    assert [entry.step for entry in reader.entries] == [1, 2]
    path.write_bytes(data)
    reader.update()
    assert [entry.step for entry in reader.entries] == [1, 2, 3]
    ArrayLog(path).append(2, {"x": np.array([20])})  # a restart
    reader.update()
    assert [entry.step for entry in reader.entries] == [1, 2]
    newest = reader.newest()
    assert newest is not None and newest.arrays["x"].tolist() == [20]


def test_a_torn_tail_that_is_cut_off_is_forgotten(tmp_path: Path) -> None:
    """Its length was on disk, its bytes were not: the next writer cuts it off."""
    path = tmp_path / "a"
    *_, start, end = filled(path, 3)
    path.write_bytes(path.read_bytes()[: end - 4] + bytes(4))
    reader = ArrayReader(path)
    reader.update()
    newest = reader.newest()
    assert newest is not None and newest.step == 2
    cut_torn_record(path)
    reader.update()
    assert [entry.step for entry in reader.entries] == [1, 2]


@pytest.mark.parametrize("cut", [4, 19, 20])
def test_a_magic_word_among_the_last_bytes_is_no_record(tmp_path: Path, cut: int) -> None:
    filled(tmp_path / "a", 2)
    with open(tmp_path / "a", "ab") as file:
        file.write((b"DSA1" + bytes(20))[:cut])
    assert steps(tmp_path / "a") == [1, 2]
    reader = ArrayReader(tmp_path / "a")
    reader.update()
    newest = reader.newest()
    assert newest is not None and newest.step == 2


HOSTILE: list[dict[str, object]] = [
    {"step": "1", "arrays": [["x", "<f8", [1], 9]], "meta": {}},
    {"step": 1, "arrays": [], "meta": {}},
    {"step": 1, "arrays": [["x", "<f8", 5, 9]], "meta": {}},
    {"step": 1, "arrays": [["x", "no type", [1], 9]], "meta": {}},
    {"step": 1, "arrays": [["x", "<f8", [2], 9]], "meta": {}},
    {"step": 1, "arrays": [["x", "O", [1], 9]], "meta": {}},
    {"step": 1, "arrays": [["x", "<f8", [-1], 9]], "meta": {}},
    {"step": 1, "arrays": [["x", "|u1", [8], 10**12]], "meta": {}},
    {"step": 1},
]


def sealed(header: bytes, payload: bytes) -> bytes:
    """A record whose checksums are right, whatever it says."""
    lengths = struct.pack("<II", len(header), len(payload))
    sums = struct.pack("<II", zlib.crc32(header, zlib.crc32(lengths)), zlib.crc32(payload))
    return b"DSA1" + lengths + sums + header + payload


@pytest.mark.parametrize("header", [json.dumps(header) for header in HOSTILE] + ["[" * 100_000])
def test_a_sealed_record_of_nonsense_is_damage(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(sealed(header.encode(), zlib.compress(bytes(8))))
    ArrayLog(tmp_path / "b").append(2, {"x": np.ones(1)})
    path.write_bytes(path.read_bytes() + (tmp_path / "b").read_bytes())
    assert steps(path) == [2]


def test_what_unpacks_to_far_more_than_its_shape_is_damage(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(1 << 26), 9)
    header = {"step": 1, "arrays": [["x", "|u1", [8], len(bomb)]], "meta": {}}
    (tmp_path / "a").write_bytes(sealed(json.dumps(header).encode(), bomb))
    tracemalloc.start()
    assert steps(tmp_path / "a") == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_index_reads_headers_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        ArrayLog(tmp_path / "a").append(step, {"x": rng.random(200_000)}, note=step * 2)
    reader = ArrayReader(tmp_path / "a")
    reader.update()
    assert [(e.step, e.shape) for e in reader.entries] == [(n, (200_000,)) for n in range(1, 6)]
    (record,) = reader.records([reader.entries[3]])
    assert record is not None and (record.step, record.meta) == (4, {"note": 8})


def test_a_whole_v3_record_is_small(tmp_path: Path) -> None:
    """58 layers x 256 experts: counts of balanced experts take about a byte and a half each."""
    tokens = np.random.default_rng(0).poisson(4096, (58, 256)).astype(np.uint32)
    ArrayLog(tmp_path / "a").append(1, {"tokens": tokens})
    assert (tmp_path / "a").stat().st_size < 0.5 * tokens.nbytes


def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    """Every record a writer reported before it was killed is there, and holds what it must."""
    path, last = tmp_path / "a.arrays", 0
    rng = np.random.default_rng(7)
    for kill in range(20):
        process = subprocess.Popen([*DRIVER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(int(rng.integers(1, 40))):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last = int((process.stdout.read().split() or [last])[-1])
        process.wait()
        records = list(read_arrays(path))
        assert records[-1].step in (last, last + 1), kill
        assert [record.step for record in records] == list(range(1, records[-1].step + 1))
        for record in records:
            np.testing.assert_array_equal(record.arrays["values"], content(record.step))
