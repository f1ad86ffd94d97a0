"""What was recorded of data is compared: every damage is seen and named by its place."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.commands.prepare_data import verify_data
from deepseek.config.errors import UserError
from deepseek.data import digests
from deepseek.data.digests import DataFile, FileDigest, Verification
from deepseek.data.prepare import prepare
from deepseek.data.prepared import PreparedData
from deepseek.data.tokenizer import Tokenizer
from support.micro_runs import MicroRuns
from support.sample_texts import TEXTS

Damage = Callable[[Path], None]


@pytest.fixture
def prefix(tmp_path: Path, byte: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(digests, "BLOCK_BYTES", 4096)
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[0].replace("\0", "") * 200)
    byte.save(tmp_path / "bytes")
    prepare([text], tmp_path / "data", tmp_path / "bytes")
    return tmp_path / "data"


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def some_ids(path: Path) -> None:
    ids = np.fromfile(path, np.uint16)
    places = np.random.default_rng(0).choice(len(ids), len(ids) // 100, replace=False)
    ids[places] += 1
    ids.tofile(path)


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def check(files: list[DataFile]) -> Verification:
    verification = Verification(files)
    verification.start()
    return verification


@pytest.mark.parametrize("with_blocks", [True, False])
def test_every_damage_is_seen(prefix: Path, with_blocks: bool) -> None:
    record = PreparedData.load(prefix)
    assert record is not None
    files = record.data_files()
    if not with_blocks:  # as recorded before version 0.2
        files = [DataFile(f.path, f.recorded and FileDigest(f.recorded.sha256)) for f in files]
    bin_ = Path(f"{prefix}.bin")
    sound = bin_.read_bytes()
    assert check(files).finish() == ""
    draw = random.Random(0)
    seen = 0
    for damage in [zeros, some_ids] + [None] * 40:
        if damage is None:
            place = draw.randrange(len(sound))
            flip(bin_, place, draw.randrange(8))
        else:
            damage(bin_)
        with pytest.raises(UserError, match=r"data\.bin is not what prepare-data wrote") as raised:
            check(files)
        if damage is None and with_blocks:
            begin = place // 4096 * 4096
            assert f"(bytes {begin:,} to {min(begin + 4096, len(sound)):,})" in str(raised.value)
        seen += 1
        bin_.write_bytes(sound)
    assert seen == 42


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda b: b[:-1], "block 3 of 3"),
        (lambda b: b[:4096], "blocks 2 to 3 are missing"),
        (lambda b: b + b"x", "block 3 of 3 .*"),
        (lambda b: b + bytes(4096), "block 3 of 3 .*bytes from 12,288 on are too many"),
        (lambda b: b[4096:8192] + b[:4096] + b[8192:], r"block 1 of 3 .*, block 2 of 3 "),
    ],
)
def test_the_place_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.setattr(digests, "BLOCK_BYTES", 4096)
    path = tmp_path / "f"
    whole = random.Random(1).randbytes(10_000)
    path.write_bytes(whole)
    known = FileDigest.of(path)
    assert known.differences(path) == []
    path.write_bytes(content(whole))
    assert re.search(message, ", ".join(known.differences(path)))


def test_large_data_are_compared_beside_the_training(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SMALL", 0)
    record = PreparedData.load(prefix)
    assert record is not None
    flip(Path(f"{prefix}.bin"), 5000)
    verification = Verification(record.data_files())
    with pytest.raises(UserError, match=r"block 2 of \d+ \(bytes 4,096 to 8,192\)"):
        verification.start()  # does not wait, so it may or may not know yet
        verification.finish()


def test_a_short_run_says_what_it_left_out(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SMALL", 0)
    monkeypatch.setattr(digests, "_PATIENCE_SECONDS", 0.0)
    verification = Verification([DataFile(Path(f"{prefix}.bin"), None)])
    verification._over.set()
    verification.start()
    assert re.search(r"MB of .* MB of the data were compared .* data verify", verification.finish())


def test_files_without_a_record_are_compared_with_the_checkpoint(prefix: Path) -> None:
    bin_ = Path(f"{prefix}.bin")
    files = [DataFile(bin_, None)]
    before = check(files).digests
    assert before == [FileDigest.of(bin_).sha256]
    check(files).expect(before)
    check(files).expect([None])  # the run before ended too early to know
    check(files).expect([])  # a checkpoint of an older version
    flip(bin_, 7)
    with pytest.raises(UserError, match="is not the file that the checkpoint was trained on"):
        check(files).expect(before)
    later = Verification(files)
    later.expect(before)
    with pytest.raises(UserError, match="is not the file that the checkpoint was trained on"):
        later.start()


def test_prepared_again_with_other_text_is_told_at_once(prefix: Path) -> None:
    record = PreparedData.load(prefix)
    assert record is not None
    verification = Verification(record.data_files())
    with pytest.raises(UserError, match="is not the file that the checkpoint was trained on"):
        verification.expect([None, "0" * 64])


def test_the_command_names_all_that_differs(
    prefix: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_data([prefix])
    assert "2 files are what prepare-data wrote" in capsys.readouterr().out
    flip(Path(f"{prefix}.bin"), 0)
    flip(Path(f"{prefix}.bin"), 9000)
    with pytest.raises(UserError, match=r"block 1 of .*block 3 of ") as raised:
        verify_data([prefix, prefix])
    assert str(raised.value).count("\n") == 1
    Path(f"{prefix}.json").unlink()
    with pytest.raises(UserError, match=r"data\.json does not exist .* nothing to compare"):
        verify_data([prefix])


def test_prepared_again_damaged_data_are_made_anew(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = Path(f"{prefix}.bin").read_bytes()
    flip(Path(f"{prefix}.bin"), 4097)
    again = prepare([tmp_path / "text.txt"], prefix, tmp_path / "bytes")
    assert again.note == "prepared" and Path(f"{prefix}.bin").read_bytes() == sound
    assert "block 2 of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokens", 5), ("text_bytes", "x"), ("max_id", 1.5), ("files", None), ("record_sha256", None)],
)
def test_a_changed_record_is_refused(prefix: Path, key: str, value: Any) -> None:
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_bytes())
    if value is None:
        del content[key]
    else:
        content[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"data\.json is damaged \(its own digest differs"):
        PreparedData.load(prefix)


def test_a_record_of_an_older_version_is_read(prefix: Path) -> None:
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_bytes())
    del content["files"], content["record_sha256"]
    path.write_text(json.dumps(content))
    record = PreparedData.load(prefix)
    assert record is not None
    files = record.data_files()
    assert [file.recorded for file in files] == [None, FileDigest(content["bin_sha256"])]
    content["tokens"] = "5"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"damaged \(tokens is '5', expected int\)"):
        PreparedData.load(prefix)


def test_a_run_on_damaged_data_ends_before_its_first_step(micro: MicroRuns, tmp_path: Path) -> None:
    for suffix in (".idx", ".bin", ".json"):
        (tmp_path / f"d{suffix}").write_bytes((micro.folder / f"data{suffix}").read_bytes())
    (tmp_path / "d.tokenizer").symlink_to(micro.folder / "data.tokenizer")
    settings = (f"model.data.data_prefix={tmp_path / 'd'}", "trainer.max_steps=4")
    micro.train("sound_data", *settings).assert_done()
    some_ids(tmp_path / "d.bin")
    for name, more in (("unsound_data", ""), ("sound_data", "trainer.max_steps=8")):
        ran = micro.train(name, *settings, *filter(None, [more]))
        assert ran.code == 2 and "Traceback" not in ran.err
        assert "d.bin is not what prepare-data wrote: block 1 of 1" in ran.err
    assert not (micro.folder / "unsound_data" / "metrics.jsonl").exists()
