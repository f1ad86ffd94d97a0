"""``.nemo`` files: of runs in any layout, restored by NeMo, and by runs in other layouts."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from deepseek.frameworks import USES_NEMO
from deepseek.interop.nemo_file import NemoFile
from support.launchers import by_itself, layout
from support.micro_runs import MicroRuns

SAVES = "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true"
SHORT = ["trainer.max_steps=2", "trainer.val_check_interval=0"]
LAYOUTS = {
    "one": layout(1, micro=2),
    "ep2": layout(2, ep=2),
    "tp2": layout(2, tp=2),
    "pp2": layout(2, pp=2),
    "fsdp2": layout(2),
}


def weights(runs: MicroRuns, name: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in runs.tensors(name).items() if k.startswith("model.")}


def unpacked(file: Path, folder: Path) -> dict[str, torch.Tensor]:
    """As NeMo does it: the tar unpacked, its weights loaded by torch."""
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
    found: dict[str, torch.Tensor] = torch.load(folder / "model_weights.ckpt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def nemo(micro: MicroRuns) -> Path:
    """The file of a run in two processes."""
    ran = by_itself(micro, "nemo_source", *SHORT, *LAYOUTS["ep2"], SAVES).wait().assert_done()
    assert ran.out.count("micro.nemo, step 2") == 1
    return micro.folder / "nemo_source" / "micro.nemo"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name in ("ep2", "fsdp2") else [])
        for name in LAYOUTS
    ],
)
def test_of_any_layout_it_holds_the_tensors_of_the_checkpoint(
    micro: MicroRuns, name: str, tmp_path: Path
) -> None:
    by_itself(micro, f"nemo_{name}", *SHORT, *LAYOUTS[name], SAVES).wait().assert_done()
    found = unpacked(micro.folder / f"nemo_{name}" / "micro.nemo", tmp_path)
    expected = weights(micro, f"nemo_{name}")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    with zipfile.ZipFile(tmp_path / "model_weights.ckpt") as archive:
        assert archive.testzip() is None


@pytest.mark.framework
@pytest.mark.skipif(not USES_NEMO, reason="restored by NeMo")
def test_nemo_restores_it(micro: MicroRuns, nemo: Path, tmp_path: Path) -> None:
    from deepseek.training.step import DeepSeekModel

    model = DeepSeekModel.restore_from(str(nemo), map_location="cpu")
    assert type(model) is DeepSeekModel and model.config.num_nextn_predict_layers == 1
    expected = weights(micro, "nemo_source")
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[k]) for k, t in model.state_dict().items())
    config = DeepSeekModel.restore_from(str(nemo), return_config=True)
    # The file that NeMo itself writes of the same model holds the same, and is read as well.
    model.save_to(str(tmp_path / "theirs.nemo"))
    theirs = unpacked(tmp_path / "theirs.nemo", tmp_path)
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[k], expected[k]) for k in expected)
    again = DeepSeekModel.restore_from(str(tmp_path / "theirs.nemo"), return_config=True)
    assert {**config, "nemo_version": ""} == {**again, "nemo_version": ""}
    by_nemo = NemoFile.open(tmp_path / "theirs.nemo")
    assert by_nemo.step == 0 and by_nemo.tensor_names() == sorted(expected)
    tensors = {key: torch.empty_like(tensor) for key, tensor in expected.items()}
    by_nemo.load(tensors)
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["one", "tp2", "pp2"])
def test_runs_in_other_layouts_start_from_it(micro: MicroRuns, nemo: Path, name: str) -> None:
    """Steps too small for fp32: what is saved is what was read."""
    still = ["trainer.max_steps=1", "trainer.val_check_interval=0", "model.optim.lr=1e-30"]
    still.append("model.moe_router_bias_update_rate=0")
    settings = [*still, *LAYOUTS[name], f"model.restore_from={nemo}"]
    ran = by_itself(micro, f"nemo_from_{name}", *settings).wait().assert_done()
    assert ran.out.count(f"started from the weights of {nemo}") == 1
    read, expected = weights(micro, f"nemo_from_{name}"), weights(micro, "nemo_source")
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


@pytest.mark.framework
def test_other_commands_take_it(micro: MicroRuns, nemo: Path) -> None:
    micro.cli("hf", "export", nemo, "nemo_files_of_file").assert_done()
    micro.cli("hf", "export", "nemo_source", "nemo_files_of_run").assert_done()
    files = [
        micro.folder / name / "model.safetensors"
        for name in ("nemo_files_of_file", "nemo_files_of_run")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_adapters_on_it(micro: MicroRuns, nemo: Path) -> None:
    lora = ["model.peft.dim=2", "model.moe_router_bias_update_rate=0"]
    settings = [*SHORT, *lora, f"model.restore_from={nemo}"]
    micro.train("nemo_adapters", *settings, SAVES).assert_refused(
        "save_nemo_on_train_end=true", "`deepseek lora merge` and `deepseek nemo export`"
    )
    micro.train("nemo_adapters", *settings).assert_done()
    micro.cli("nemo", "export", "nemo_adapters", "nemo_adapters.nemo").assert_refused(
        "holds adapters only"
    )
    micro.cli("lora", "merge", "nemo_adapters", "nemo_merged").assert_done()
    micro.cli("nemo", "export", "nemo_merged", "nemo_merged.nemo").assert_done()
    merged = NemoFile.open(micro.folder / "nemo_merged.nemo")
    assert merged.tensor_names() == sorted(weights(micro, "nemo_merged"))


@pytest.mark.framework
def test_it_is_written_again_when_it_is_not_of_the_last_step(micro: MicroRuns, nemo: Path) -> None:
    """As after a kill while it was written, and after more steps."""
    run = micro.folder / "nemo_kept"
    sizes = [*LAYOUTS["one"], SAVES, "trainer.val_check_interval=0"]
    micro.train("nemo_kept", *sizes, "trainer.max_steps=1").assert_done()
    file = run / "micro.nemo"
    before = file.stat().st_mtime_ns
    ran = micro.train("nemo_kept", *sizes, "trainer.max_steps=1").assert_done()
    assert "is complete" in ran.out and file.stat().st_mtime_ns == before
    file.unlink()
    ran = micro.train("nemo_kept", *sizes, "trainer.max_steps=1").assert_done()
    assert "is complete" in ran.out and NemoFile.open(file).step == 1
    micro.train("nemo_kept", *sizes, "trainer.max_steps=2").assert_done()
    assert NemoFile.open(file).step == 2
    assert not list(run.glob(".*.partial"))


def test_what_is_refused(micro: MicroRuns, nemo: Path, tmp_path: Path) -> None:
    micro.cli("nemo", "export", "nemo_source", "model.bin").assert_refused("use model.bin.nemo")
    micro.cli("nemo", "export", "nemo_source", nemo).assert_refused("exists already")
    start = "model.restore_from="
    text = micro.folder / "text.jsonl"
    micro.train("nemo_never", f"{start}{text}").assert_refused("is a file, but no .nemo file")
    micro.train("nemo_never", f"{start}{tmp_path / 'no.nemo'}").assert_refused("there is no folder")

    plain = tmp_path / "plain.nemo"
    plain.write_bytes(b"no tar")
    micro.train("nemo_never", f"{start}{plain}").assert_refused("is no .nemo file")
    speech = tmp_path / "speech.nemo"
    repacked(nemo, speech, {"model_config.yaml": b"sample_rate: 16000\n"})
    micro.train("nemo_never", f"{start}{speech}").assert_refused("model of another kind")

    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return print, ("it ran",)

    torch.save({"model.embed.weight": Runs()}, tmp_path / "bad.pt")
    bad = tmp_path / "bad.nemo"
    repacked(nemo, bad, {"model_weights.ckpt": (tmp_path / "bad.pt").read_bytes()})
    ran = micro.train("nemo_never", f"{start}{bad}")
    ran.assert_refused("its weights are no file of torch.save, or damaged")
    assert "it ran" not in ran.out

    flipped = tmp_path / "flipped.nemo"
    content = bytearray(nemo.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    micro.train("nemo_never", f"{start}{flipped}").assert_refused("is damaged: the check sum of")
    cut = tmp_path / "cut.nemo"
    cut.write_bytes(nemo.read_bytes()[: len(content) // 2])
    micro.train("nemo_never", f"{start}{cut}").assert_refused("cut.nemo")
    wider = ["model.n_routed_experts=16", f"{start}{nemo}"]
    micro.train("nemo_never", *wider).assert_refused("does not fit", "has shape [8,")


def repacked(source: Path, target: Path, other: dict[str, bytes]) -> None:
    """The tar with other content under some of its names."""
    import io

    with tarfile.open(source) as old, tarfile.open(target, "w:") as new:
        for member in old.getmembers():
            stream = old.extractfile(member)
            assert stream is not None
            content = other.get(member.name.removeprefix("./"), stream.read())
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
