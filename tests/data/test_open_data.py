"""From a configuration to datasets: what is chosen, checked and refused."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.config import changed
from deepseek.config.errors import UserError
from deepseek.config.schema import DataConfig, ModelConfig, TokenizerConfig
from deepseek.data import corpus as corpus_module
from deepseek.data.blend import BlendedDataset
from deepseek.data.dataset import PackedDataset
from deepseek.data.indexed import IndexedDataset
from deepseek.data.open_data import OpenedData, open_data
from deepseek.data.prepare import prepare
from deepseek.data.prepared import Progress
from deepseek.data.tokenizer import Tokenizer
from support.sample_texts import TEXTS


@pytest.fixture
def cfg(tmp_path: Path) -> ModelConfig:
    data = DataConfig(cache_dir=str(tmp_path / "cache"), seq_length=32, validation_fraction=0.1)
    return ModelConfig(vocab_size=512, data=data, tokenizer=TokenizerConfig(vocab_size=400))


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., str]:
    """Prepare some lines of text with a given tokenizer or a trained one."""

    def make(name: str, tokenizer: Tokenizer | None = None, documents: int = 40) -> str:
        folder = tmp_path / name
        folder.mkdir()
        rows = [json.dumps({"text": f"{name} {k} " + TEXTS[k % 3] * 3}) for k in range(documents)]
        (folder / "in.jsonl").write_text("\n".join(rows))
        given = None
        if tokenizer is not None:
            tokenizer.save(folder / "given")
            given = folder / "given"
        prepare([folder / "in.jsonl"], folder / "data", given, vocab_size=400)
        return str(folder / "data")

    return make


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The json package stands for the standard library."""
    folder = tmp_path / "library"
    folder.mkdir()
    for path in Path(json.__file__).parent.glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    return folder


def test_the_default_prepares_the_built_in_corpus_once(
    cfg: ModelConfig, small_library: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    first = open_data(cfg, progress=seen.append)
    assert {state.stage for state in seen} >= {"training tokenizer", "tokenizing"}
    seen.clear()
    second = open_data(cfg, progress=seen.append)
    assert seen == []
    assert second.fingerprint == first.fingerprint
    assert first.tokenizer is not None and first.tokenizer.vocab_size == 400
    files = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert files == {".bin", ".idx", ".json", ".tokenizer"}
    assert isinstance(first.train, PackedDataset) and isinstance(first.validation, PackedDataset)
    assert first.validation.num_documents == 1
    text = small_library / "decoder.py"
    assert "import" in text.read_text()
    ids = first.train[0]["tokens"]
    decoded = first.tokenizer.decode(ids)
    assert any(decoded[:20] in path.read_text() for path in small_library.iterdir())


def test_a_changed_library_is_prepared_again(cfg: ModelConfig, small_library: Path) -> None:
    before = open_data(cfg).fingerprint
    (small_library / "more.py").write_text("more = 1\n" * 500)
    assert open_data(cfg).fingerprint != before


def test_settings_of_the_tokenizer_have_their_own_files(
    cfg: ModelConfig, small_library: Path, tmp_path: Path, byte: Tokenizer
) -> None:
    open_data(cfg)
    cfg = changed(cfg, {"tokenizer.vocab_size": 300})
    open_data(cfg)
    byte.save(tmp_path / "byte")
    cfg = changed(cfg, {"tokenizer.path": str(tmp_path / "byte")})
    opened = open_data(cfg)
    assert opened.tokenizer is not None and opened.tokenizer.fingerprint == byte.fingerprint
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 3


def put_fingerprint(cfg: ModelConfig, queue: Any) -> None:
    queue.put(open_data(cfg).fingerprint)


def test_all_processes_of_a_run_may_open_at_once(cfg: ModelConfig, small_library: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=put_fingerprint, args=(cfg, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1


def test_the_cache_is_in_the_home_folder_unless_told(
    cfg: ModelConfig, small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = changed(cfg, {"data.cache_dir": None})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_data(cfg)
    assert list((tmp_path / "xdg" / "deepseek").glob("python3*.bin"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_data(cfg)
    assert list((tmp_path / "home" / ".cache" / "deepseek").glob("python3*.bin"))


def test_a_cache_that_cannot_be_written(cfg: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cfg = changed(cfg, {"data.cache_dir": str(tmp_path / "file" / "cache")})
    with pytest.raises(UserError, match=r"cannot be written, .* set model\.data\.cache_dir to a"):
        open_data(cfg)


def test_a_prefix_is_split_and_counted(cfg: ModelConfig, prepared: Callable[..., str]) -> None:
    prefix = prepared("a")
    cfg = changed(cfg, {"data.data_prefix": prefix})
    opened = open_data(cfg)
    record = json.loads(Path(f"{prefix}.json").read_text())
    assert opened.validation is not None and opened.tokenizer is not None
    assert (opened.train.num_documents, opened.validation.num_documents) == (36, 4)
    assert opened.bytes_per_token == record["text_bytes"] / record["tokens"]
    # Counted by hand on the validation documents.
    indexed = IndexedDataset(prefix)
    kept = [9, 19, 29, 39]
    ids = np.concatenate([indexed.document(k) for k in kept])
    ended = opened.tokenizer.decode(ids, skip_special=True)
    assert opened.validation_bytes_per_token == pytest.approx(len(ended.encode()) / len(ids))

    cfg = changed(cfg, {"data.validation_fraction": 0.0})
    all_ = open_data(cfg)
    assert all_.validation is None and all_.validation_bytes_per_token is None
    assert all_.train.num_documents == 40


def test_validation_files_of_their_own(
    cfg: ModelConfig, prepared: Callable[..., str], byte: Tokenizer
) -> None:
    a, b = prepared("a", byte), prepared("b", byte, documents=7)
    cfg = changed(cfg, {"data.data_prefix": a, "data.validation_prefix": b})
    opened = open_data(cfg)
    assert opened.validation is not None and opened.tokenizer is not None
    assert (opened.train.num_documents, opened.validation.num_documents) == (40, 7)
    assert opened.tokenizer.decode(opened.validation[0]["tokens"]).startswith("b 0 ")


def test_a_blend(cfg: ModelConfig, prepared: Callable[..., str], byte: Tokenizer) -> None:
    cfg = changed(cfg, {"data.data_prefix": [0.75, prepared("a", byte), 0.25, prepared("b", byte)]})
    opened = open_data(cfg)
    assert isinstance(opened.train, BlendedDataset)
    assert isinstance(opened.validation, BlendedDataset)
    assert opened.train.blend.parts == [3, 1]
    assert opened.train.num_documents == 72 and opened.validation.num_documents == 8
    sizes = [part.num_tokens for part in opened.train.datasets]
    assert sizes[0] != 0 and opened.bytes_per_token == pytest.approx(1.0, abs=0.05)


def test_training_and_validation_follow_the_configuration(
    cfg: ModelConfig, prepared: Callable[..., str]
) -> None:
    values = {"data_prefix": prepared("a"), "isolate_documents": True, "fim_rate": 0.5}
    cfg = changed(cfg, {f"data.{key}": value for key, value in values.items()})
    opened = open_data(cfg, seed=5)
    assert isinstance(opened.train, PackedDataset) and isinstance(opened.validation, PackedDataset)
    assert opened.tokenizer is not None and opened.tokenizer.fim is not None
    assert (opened.train.seed, opened.train.seq_length) == (5, 32)
    ids = np.concatenate([opened.train[i]["tokens"] for i in range(len(opened.train))])
    assert abs(int((ids == opened.tokenizer.fim.begin).sum()) - 18) <= 1
    shown = np.concatenate([opened.validation[i]["tokens"] for i in range(len(opened.validation))])
    assert not np.isin(shown, opened.tokenizer.fim).any()
    assert any(opened.validation[i]["documents"].max() > 0 for i in range(len(opened.validation)))


def test_the_fingerprint_follows_what_decides_the_samples(
    cfg: ModelConfig, prepared: Callable[..., str], byte: Tokenizer, tmp_path: Path
) -> None:
    a, b = prepared("a", byte), prepared("b", byte)
    cfg = changed(cfg, {"data.data_prefix": a})

    def fingerprint(seed: int = 1, **changes: Any) -> str:
        other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))
        return open_data(other, seed=seed).fingerprint

    same = fingerprint()
    assert fingerprint() == same
    others = {
        fingerprint(seed=2),
        fingerprint(data_prefix=b),
        fingerprint(data_prefix=[1, a, 1, b]),
        fingerprint(data_prefix=[2, a, 1, b]),
        fingerprint(validation_prefix=b),
        fingerprint(validation_fraction=0.2),
        fingerprint(seq_length=16),
        fingerprint(isolate_documents=True),
        fingerprint(fim_rate=0.5),
    }
    assert len(others) == 9 and same not in others
    moved = tmp_path / "moved"
    os.rename(Path(a).parent, moved)
    assert fingerprint(data_prefix=str(moved / "data"), num_workers=3) == same


def on_foreign(
    cfg: ModelConfig, write: Callable[..., IndexedDataset], top: int, dtype: str = "int32"
) -> ModelConfig:
    documents = [[k % 97, 5, top] * 10 for k in range(20)]
    return changed(cfg, {"data.data_prefix": str(write(documents, "foreign", dtype).prefix)})


def open_foreign(
    cfg: ModelConfig, write: Callable[..., IndexedDataset], top: int, dtype: str = "int32"
) -> OpenedData:
    return open_data(on_foreign(cfg, write, top, dtype))


def test_files_of_megatron_need_no_record(
    cfg: ModelConfig,
    write: Callable[..., IndexedDataset],
    capsys: pytest.CaptureFixture[str],
    bpe: Tokenizer,
    tmp_path: Path,
) -> None:
    cfg = on_foreign(cfg, write, 300)
    opened = open_data(cfg)
    assert opened.tokenizer is None and opened.bytes_per_token is None
    assert opened.train[0]["tokens"].shape == (32,)
    said = capsys.readouterr().err
    assert "has no record of its tokenizer" in said
    assert "reading all ids once to find the largest" in said
    open_data(cfg)
    assert "reading all ids once" not in capsys.readouterr().err

    bpe.save(tmp_path / "bpe")
    cfg = changed(cfg, {"tokenizer.path": str(tmp_path / "bpe")})
    opened = open_data(cfg)
    indexed = IndexedDataset(str(cfg.data.data_prefix))
    train = [k for k in range(20) if k not in (9, 19)]
    ids = np.concatenate([indexed.document(k) for k in train])
    assert bpe.token_bytes is not None
    assert opened.bytes_per_token == pytest.approx(bpe.token_bytes[ids].sum() / len(ids))


def test_a_changed_file_is_read_again(
    cfg: ModelConfig, write: Callable[..., IndexedDataset]
) -> None:
    open_foreign(cfg, write, 300)
    with pytest.raises(UserError, match=r"holds the id 9999, and model\.vocab_size=512 ends"):
        open_foreign(cfg, write, 9999)


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    cfg: ModelConfig,
    write: Callable[..., IndexedDataset],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("deepseek.data.open_data.atomic_open", refuse)
    assert open_foreign(cfg, write, 300).train.num_documents == 18
    assert "cannot be written; the ids will be read again next time" in capsys.readouterr().err


def test_small_dtypes_need_no_reading(
    cfg: ModelConfig, write: Callable[..., IndexedDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_foreign(cfg, write, 255, "uint8").train.num_documents == 18
    assert "reading all ids" not in capsys.readouterr().err


def test_ids_outside_the_vocabulary(cfg: ModelConfig, write: Callable[..., IndexedDataset]) -> None:
    message = (
        r"foreign\.bin holds the id 512, and model\.vocab_size=512 ends at 511; set "
        r"model\.vocab_size=640, or use data made with a smaller tokenizer"
    )
    with pytest.raises(UserError, match=message):
        open_foreign(cfg, write, 512)
    with pytest.raises(UserError, match=r"foreign\.bin holds the id -1; ids are never negative"):
        open_foreign(cfg, write, -1)
    with pytest.raises(UserError, match=r"foreign\.bin holds float32 numbers"):
        open_foreign(cfg, write, 1, "float32")


def test_a_tokenizer_larger_than_the_model(cfg: ModelConfig, prepared: Callable[..., str]) -> None:
    cfg = changed(cfg, {"data.data_prefix": prepared("a"), "vocab_size": 300})
    size = json.loads(Path(f"{cfg.data.data_prefix}.json").read_text())["vocab_size"]
    message = (
        rf"model\.vocab_size=300 is smaller than the tokenizer, which has {size} ids; set "
        rf"model\.vocab_size={-(-size // 128) * 128}$"
    )
    with pytest.raises(UserError, match=message):
        open_data(cfg)


def test_another_tokenizer_than_that_of_the_data(
    cfg: ModelConfig, prepared: Callable[..., str], byte: Tokenizer, bpe: Tokenizer, tmp_path: Path
) -> None:
    a, b = prepared("a", byte), prepared("b", bpe)
    bpe.save(tmp_path / "bpe")
    cfg = changed(cfg, {"data.data_prefix": a, "tokenizer.path": str(tmp_path / "bpe")})
    message = (
        rf"data was made with another tokenizer \(fingerprint {byte.fingerprint[:12]}\) than "
        rf"model\.tokenizer\.path \({bpe.fingerprint[:12]}\); set model\.tokenizer\.path=null"
    )
    with pytest.raises(UserError, match=message):
        open_data(cfg)
    cfg = changed(cfg, {"tokenizer.path": None, "data.data_prefix": [1, a, 1, b]})
    with pytest.raises(UserError, match=r"another tokenizer .* than .*a.data .*prepare one of"):
        open_data(cfg)
    cfg = changed(cfg, {"data.data_prefix": a, "data.validation_prefix": b})
    with pytest.raises(UserError, match=r"another tokenizer"):
        open_data(cfg)


def test_fim_without_sentinels(cfg: ModelConfig, write: Callable[..., IndexedDataset]) -> None:
    cfg = changed(cfg, {"data.fim_rate": 0.1})
    with pytest.raises(UserError, match=r"fim_rate=0\.1 needs a tokenizer with the tokens"):
        open_foreign(cfg, write, 300)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0])
def test_fractions(cfg: ModelConfig, fraction: float) -> None:
    cfg = changed(cfg, {"data.validation_fraction": fraction})
    with pytest.raises(UserError, match=rf"validation_fraction={fraction} must be at least 0 and"):
        open_data(cfg)


def test_missing_files(cfg: ModelConfig, tmp_path: Path) -> None:
    cfg = changed(cfg, {"data.data_prefix": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match=r"nothing\.idx does not exist; make it with prepare-data"):
        open_data(cfg)
