"""Hugging Face files: kills, full disks, memory, and every refusal with its message."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.manifest import step_name
from deepseek.checkpoint.shards import TensorSpec
from deepseek.commands.convert import export_hf, import_hf
from deepseek.config import load_config
from deepseek.config.errors import ConfigError, UserError
from deepseek.interop import hf_export as exporting
from deepseek.interop import hf_import as importing
from deepseek.interop.hf_config import hf_config
from deepseek.interop.hf_export import TensorFileWriter
from deepseek.interop.hf_import import HfFolder, TensorFile
from deepseek.interop.huggingface import to_hf
from support.forked import TESTS
from support.hf_folders import small, weights, write_folder, write_tensors
from support.micro_runs import MicroRuns

CFG = small(num_nextn_predict_layers=1)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four files."""
    write_folder(tmp_path / "hf", CFG, weights(CFG), shards=4)
    return tmp_path / "hf"


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def killed(work: Callable[[], None]) -> None:
    """Run in a child, which kills itself."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def nth_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """``function`` that kills the process in its ``number``-th call, half-way."""
    calls = []

    def call(path: Path, pieces: Any) -> Any:
        calls.append(path)
        if len(calls) == number:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(path, pieces)

    return call


# -- cut short --


def test_a_killed_import_goes_on(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, target = source.with_name("whole"), source.with_name("run")
    import_hf(source, whole)
    write = importing.write_chunks
    monkeypatch.setattr(importing, "write_chunks", nth_call(write, 3))
    killed(lambda: import_hf(source, target))
    assert not target.exists()
    step = partial(target) / "checkpoints" / step_name(0)
    done = {p.name: p.stat().st_ino for p in step.glob("__0_[01].distcp")}
    assert len(done) == 2 and (step / "__0_2.distcp").read_bytes() == b"half"

    written: list[str] = []
    monkeypatch.setattr(
        importing,
        "write_chunks",
        lambda path, pieces: (written.append(path.name), write(path, pieces))[1],
    )
    import_hf(source, target)
    assert written == ["__0_2.distcp", "__0_3.distcp"]
    place = target / "checkpoints" / step_name(0)
    assert done == {p.name: p.stat().st_ino for p in place.glob("__0_[01].distcp")}
    assert not partial(target).exists()
    mine, wanted = content(target), content(whole)
    for files in (mine, wanted):  # the name of the run is the folder's
        files["config.yaml"] = files["config.yaml"].replace(b"name: whole", b"name: run")
        for name in ("state.json", "manifest.json"):
            files.pop(f"checkpoints/{step_name(0)}/{name}")
    assert mine == wanted


def test_a_changed_source_is_read_anew(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.with_name("run")
    with monkeypatch.context() as patched:
        patched.setattr(importing, "write_chunks", nth_call(importing.write_chunks, 4))
        killed(lambda: import_hf(source, target))
    shutil.rmtree(source)
    write_folder(source, CFG, weights(CFG, 1), shards=4)
    import_hf(source, target)
    again = source.with_name("again")
    import_hf(source, again)
    files = [f"checkpoints/{step_name(0)}/__0_{k}.distcp" for k in range(4)]
    mine, wanted = content(target), content(again)
    assert all(mine[name] == wanted[name] for name in files)


def test_a_killed_export_goes_on(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, whole, target = (source.with_name(name) for name in ("run", "whole", "out"))
    import_hf(source, run)
    export_hf(run, whole, shard_gb=2e-5)
    files = sorted(p.name for p in whole.glob("*.safetensors"))
    assert len(files) >= 4

    class Killing(TensorFileWriter):
        def __init__(self, path: Path, tensors: dict[str, TensorSpec]) -> None:
            super().__init__(path, tensors)
            if path.name == files[2]:
                os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "TensorFileWriter", Killing)
        killed(lambda: export_hf(run, target, shard_gb=2e-5))
    assert not target.exists()
    done = {name: (partial(target) / name).stat().st_ino for name in files[:2]}
    export_hf(run, target, shard_gb=2e-5)
    assert done == {name: (target / name).stat().st_ino for name in files[:2]}
    assert content(target) == content(whole)


@pytest.mark.parametrize("work", ["import", "export"])
def test_a_disk_that_refuses(source: Path, work: str) -> None:
    """The kernel refuses to let a file grow; later it does not."""
    run, target = source.with_name("run"), source.with_name("target")
    import_hf(source, run)

    def call() -> None:
        if work == "import":
            import_hf(source, target)
        else:
            export_hf(run, target)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with pytest.raises(UserError, match=f"{work}ing to .*target failed: File too large.*again"):
            call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not target.exists() and partial(target).is_dir()
    call()
    assert target.is_dir() and not partial(target).exists()


def test_no_room(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = source.with_name("run")
    import_hf(source, run)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="the import needs about .* and the disk has 0.0 MB free"):
        import_hf(source, source.with_name("other"))
    with pytest.raises(UserError, match="the export needs about"):
        export_hf(run, source.with_name("other"))
    assert not partial(source.with_name("other")).exists()  # nothing was written


# -- memory --


def test_memory(micro: MicroRuns, tmp_path: Path) -> None:
    """Below two files plus the largest tensor; of the export, a few of the largest tensors."""
    cfg = small(
        hidden_size=512, vocab_size=6000, num_hidden_layers=4, intermediate_size=1536,
        moe_intermediate_size=512, n_routed_experts=6,
    )  # fmt: skip
    tiny = small()
    write_folder(tmp_path / "tiny", tiny, weights(tiny), tokenizer=False)
    state = {name: tensor.bfloat16() for name, tensor in weights(cfg).items()}
    write_folder(tmp_path / "hf", cfg, state, shards=6, tokenizer=False)
    shard = max(p.stat().st_size for p in (tmp_path / "hf").glob("*.safetensors"))
    largest = max(tensor.numel() * 4 for tensor in state.values())
    del state

    driver = TESTS / "support" / "hf_memory_driver.py"
    ran = micro.cli.start(driver, tmp_path, program="python").wait().assert_done()
    bytes_in, bytes_out = map(int, ran.err.split()[-2:])
    print(f"import: {bytes_in / 1e6:.1f} MB; file {shard / 1e6:.1f}, tensor {largest / 1e6:.1f}")
    print(f"export: {bytes_out / 1e6:.1f} MB")
    assert 0 < bytes_in < 2 * shard + largest
    assert 0 < bytes_out < 4 * largest
    total = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert bytes_out < total / 2 and 2 * shard + largest < total


# -- refusals --


def refused(source: Path, message: str, **more: Any) -> None:
    target = source.with_name("refused")
    with pytest.raises(UserError, match=message):
        import_hf(source, target, **more)
    assert not target.exists() and not partial(target).exists()


def change_index(source: Path, **places: str | None) -> None:
    index = json.loads((source / INDEX).read_text())
    for name, place in places.items():
        name = name.replace("__", ".")
        index["weight_map"].pop(name, None)
        if place is not None:
            index["weight_map"][name] = place
    (source / INDEX).write_text(json.dumps(index))


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "no", "no does not exist; give the folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file is a file; give the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json; give the folder of a Hugging Face model")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", "it holds an adapter; merge it into its model first")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    refused(tmp_path / "run", "is a folder of this program already: model.restore_from")


def test_missing_file(source: Path) -> None:
    (source / "model-00002-of-000004.safetensors").unlink()
    refused(source, r"lacks 1 of 4 files that its index names: model-00002-of-000004\.safetensors")


def test_truncated_file(source: Path) -> None:
    path = source / "model-00003-of-000004.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    refused(source, f"00003-of-000004.* is cut off, or .*not fully covered.*{size - 1:,} bytes")
    os.truncate(path, 100)
    refused(source, "is cut off, or no safetensors file: .*it has 100 bytes")
    os.truncate(path, 4)
    refused(source, "is cut off, or no safetensors file: .*header too small.*it has 4 bytes")


def test_index_that_names_an_absent_tensor(source: Path) -> None:
    change_index(source, model__norm__bias="model-00001-of-000004.safetensors")
    refused(source, r"do not agree:\n  1 not where the index says: model\.norm\.bias")


def test_file_with_a_tensor_that_the_index_lacks(source: Path) -> None:
    change_index(source, model__norm__weight=None)
    refused(source, r"do not agree:\n  1 not in the index: model\.norm\.weight")


def test_index_that_leads_elsewhere(source: Path) -> None:
    change_index(source, model__norm__weight="../other.safetensors")
    refused(source, r"names files outside its folder \(\.\./other\.safetensors\)")


def test_broken_index_and_config(source: Path) -> None:
    (source / INDEX).write_text("{}")
    refused(source, "has no weight_map")
    (source / INDEX).write_text("[1]")
    refused(source, "holds a JSON list, expected an object")
    (source / "config.json").write_text("{")
    refused(source, "config.json: not JSON")


FIRST, SECOND = (f"model-0000{k}-of-000004.safetensors" for k in (1, 2))
LYING_INDEXES: dict[str, Any] = {
    "[]": "holds a JSON list",
    "null": "holds a JSON NoneType",
    '{"weight_map": null}': "has no weight_map",
    '{"weight_map": []}': "has no weight_map",
    '{"weight_map": "a"}': "has no weight_map",
    '{"weight_map": {}}': "has no weight_map",
    '{"weight_map": {"a": null}}': "lacks 1 of 1 files that its index names: None",
    '{"weight_map": {"a": 3}}': "lacks 1 of 1 files that its index names: 3",
    '{"weight_map": {"a": ""}}': "names files outside its folder",
    '{"weight_map": {"a": ".."}}': "names files outside its folder",
    '{"weight_map": {"a": "/etc/passwd"}}': "names files outside its folder",
    '{"weight_map": {"a": "sub"}}': "lacks 1 of 1 files",
    '{"weight_map": {"a": "config.json"}}': "names config.json: no safetensors files",
    json.dumps({"weight_map": {"a": FIRST}}): "do not agree:\n  1 not where the index says: a",
    '{"weight_map": {"a": "x"}, "weight_map": {}}': "weight_map stands there twice",
    '{"weight_map"': "not JSON",
    "\ufeff{}": "not JSON|has no weight_map",
}  # fmt: skip


def test_indexes_that_lie(source: Path) -> None:
    (source / "sub").mkdir()
    for text, message in LYING_INDEXES.items():
        (source / INDEX).write_text(text)
        with pytest.raises(UserError, match=message):
            HfFolder(source)


def test_two_files_with_one_tensor(source: Path) -> None:
    shutil.copy(source / FIRST, source / SECOND)
    index = json.loads((source / INDEX).read_text())
    kept = {n: p for n, p in index["weight_map"].items() if p in (FIRST, SECOND)}
    (source / INDEX).write_text(json.dumps({"weight_map": kept}))
    refused(source, "two files hold a tensor of the same name")


def test_pickles_are_not_opened(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
    refused(source, "holds pytorch_model-00001-of-00002.bin: pickles, which can run code")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (source / INDEX).write_text(json.dumps(index))
    refused(source, "names pytorch_model-00001-of-00002.bin: pickles, which can run code")
    (source / INDEX).unlink()
    (source / "pytorch_model-00001-of-00002.bin").unlink()
    refused(source, "holds no model.safetensors and no model.safetensors.index.json")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (source / name).write_bytes(b"")
        refused(source, r"has no model\.safetensors\.index\.json.* are shards; download the index")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
            r"1 missing: model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}),
            r"1 unexpected: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
            r"1 of another shape: model\.norm\.weight \(5,\) instead of \(16,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int32)}),
            r"1 tensors: model\.norm\.weight: is torch\.int32",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            r"lm_head\.weight: is FP8 and has no lm_head\.weight_scale_inv",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(3, 1)}),
            r"lm_head\.weight is torch\.float32 and needs no scales",
        ),
        (
            lambda t: t.update({"x.weight_scale_inv": torch.ones(3, 1)}),
            r"x\.weight_scale_inv: there is no x\.weight",
        ),
        (
            lambda t: t.update(
                {
                    "lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn),
                    "lm_head.weight_scale_inv": torch.ones(1, 1),
                }
            ),
            r"lm_head\.weight_scale_inv: is \(1, 1\), lm_head\.weight needs \(3, 1\)",
        ),
        (
            lambda t: t.update(
                {"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}
            ),
            r"model\.norm\.weight: is FP8, and only matrices",
        ),
        (
            lambda t: t.pop("model.layers.3.eh_proj.weight"),
            r"1 missing: model\.layers\.3\.eh_proj\.weight\n.*--mtp drop",
        ),
    ],
)
def test_tensors_that_do_not_add_up(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    theirs = to_hf(weights(CFG), CFG)
    change(theirs)
    write_tensors(tmp_path / "hf", theirs, shards=1)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf_config(CFG)))
    refused(tmp_path / "hf", message)


def test_mtp_layers_that_config_json_does_not_count(source: Path) -> None:
    (source / "config.json").write_text(json.dumps(hf_config(CFG, mtp=False)))
    refused(source, "counts num_nextn_predict_layers=0 MTP layers, .* correct it there, or")
    import_hf(source, source.with_name("run"), mtp="drop")


def test_mtp_copies_must_be_copies(tmp_path: Path) -> None:
    theirs = to_hf(weights(CFG), CFG)
    theirs["model.layers.3.shared_head.head.weight"][-1, -1] += 1
    write_tensors(tmp_path / "hf", theirs, shards=2)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf_config(CFG)))
    message = r"layers\.3\.shared_head\.head\.weight differs from lm_head\.weight.*--mtp drop"
    with pytest.raises(UserError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    import_hf(tmp_path / "hf", tmp_path / "run", mtp="drop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "DeepseekV32ForCausalLM: .*indexer"),
        ({"index_n_heads": 64}, r"indexer .*\(index_n_heads=64\)"),
        ({"hc_mult": 4}, r"hyper-connections.*\(hc_mult=4\)"),
        ({"architectures": ["DeepseekV4ForCausalLM"]}, "sliding and compressed attention"),
        ({"use_qk_norm": True}, "use_qk_norm=true: this model has no such option.*--ignore-key"),
        ({"sliding_window": 4096}, "sliding_window=4096: this model has no such option"),
        ({"head_dim": 77}, "head_dim=77: this model has no such option"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method=gptq: only fp8"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            "weight_block_size=None: FP8 weights need scales per block",
        ),
    ],
)
def test_other_models(source: Path, changes: dict[str, Any], message: str) -> None:
    (source / "config.json").write_text(json.dumps(hf_config(CFG) | changes))
    refused(source, message)


def test_a_key_that_is_known_to_be_idle(source: Path) -> None:
    extra = {"my_note": 7, "_note": 8, "sliding_window": None, "use_qk_norm": False}
    (source / "config.json").write_text(json.dumps(hf_config(CFG) | extra))
    refused(source, "my_note=7")
    refused(
        source, "--ignore-key my_notes: config.json has no.*; my_note", ignore_keys=["my_notes"]
    )
    import_hf(source, source.with_name("run"), ignore_keys=["my_note"])


def test_options_and_targets(source: Path) -> None:
    refused(source, "--mtp maybe: use keep or drop", mtp="maybe")
    run = source.with_name("run")
    import_hf(source, run)
    with pytest.raises(UserError, match="run exists already and nothing is overwritten"):
        import_hf(source, run)
    with pytest.raises(UserError, match="hf exists already and nothing is overwritten"):
        export_hf(run, source)
    new = source.with_name("new")
    with pytest.raises(UserError, match="--dtype int8: use fp32 or bf16 or fp8"):
        export_hf(run, new, dtype="int8")
    with pytest.raises(UserError, match="--shard-gb 0: give a size above 0"):
        export_hf(run, new, shard_gb=0)
    with pytest.raises(UserError, match="hf is neither a run folder"):
        export_hf(source, new)
    assert not new.exists()
    new.mkdir()  # an empty folder is as good as none
    export_hf(run, new)
    assert (new / "config.json").is_file()


def test_a_tokenizer_that_does_not_fit(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace('"id": 261', '"id": 300'))
    refused(source, "the tokenizer has 301 ids, the model 300; give the model's own")
    (source / "tokenizer.json").rename(source / "tiktoken.model")
    import_hf(source, source.with_name("run"))
    assert "imported without a tokenizer" in (out := capsys.readouterr().out)
    assert "holds tiktoken.model, which must be converted first" in out
    export_hf(source.with_name("run"), source.with_name("out"))
    assert "there is no tokenizer with this checkpoint" in capsys.readouterr().out


def test_checkpoints_that_are_not_the_model(source: Path) -> None:
    run = source.with_name("run")
    import_hf(source, run)
    state = json.loads((run / "checkpoints" / step_name(0) / "state.json").read_text())
    tensors = {f"model.{name}": tensor for name, tensor in weights(CFG).items()}
    for number, (name, tensor) in enumerate(
        {"model.new.weight": torch.ones(2), "other": torch.ones(2)}.items()
    ):
        folder = source.with_name(f"odd{number}")
        with CheckpointManager(folder / "checkpoints") as manager:
            manager.save(1, tensors | {name: tensor}, state | {"step": 1})
        message = "holds what is no weight: other" if name == "other" else "unexpected: new.weight"
        with pytest.raises(UserError, match=message):
            export_hf(folder, source.with_name("out"))


def test_two_at_once(source: Path) -> None:
    """The second one leaves the first one's work alone."""
    from deepseek.locks import LOCK, Lock

    target = source.with_name("run")
    partial(target).mkdir()
    ready, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lock = Lock(partial(target) / LOCK)
        os.write(ready[1], b"x")
        os.read(release[0], 1)
        os._exit(0 if lock.held else 1)
    os.read(ready[0], 1)
    try:
        with pytest.raises(UserError, match=f"process {child} on host .* wait for it or stop it"):
            import_hf(source, target)
    finally:
        os.write(release[1], b"x")
        assert os.waitpid(child, 0)[1] == 0
    import_hf(source, target)


def test_restoring_needs_a_checkpoint(source: Path) -> None:
    for path, message in (
        ("/nowhere", "there is no folder /nowhere; give a run folder"),
        (str(source), "holds Hugging Face files, which must be imported first; run `deepseek hf"),
        (str(source.parent), "holds no checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config("deepseek_v3_tiny", [f"model.restore_from={path}"])
    import_hf(source, source.with_name("run"))
    for path in ("run", f"run/checkpoints/{step_name(0)}"):
        load_config("deepseek_v3_tiny", [f"model.restore_from={source.parent / path}"])


# -- one file --


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"nonsense", "no safetensors file: .*invalid JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "invalid shape"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "invalid offset"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "invalid value"),
        (b'{"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}', "dtype F4; F64, F32"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', "not fully covered"),
        (b'{"a": 3}', "invalid type"),
        (
            b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, '
            b'"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}',
            "its header names a twice",
        ),
    ],
)
def test_broken_headers(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=message):
        TensorFile(path)


def test_numbers_at_odd_addresses(tmp_path: Path) -> None:
    """Writers that do not pad the header exist."""
    path = tmp_path / "x.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}  '
    for more in range(8):
        text = header + b" " * more
        path.write_bytes(len(text).to_bytes(8, "little") + text + struct.pack("<2f", 1, 2))
        file = TensorFile(path)
        assert file.read("a").tolist() == [[1], [2]] and file.read("a", 1).tolist() == [2]


def test_a_file_that_has_changed_since(source: Path) -> None:
    path = next(source.glob("*.safetensors"))
    file = TensorFile(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match="is cut off, or no safetensors file"):
        file.read(list(file.tensors)[-1])
