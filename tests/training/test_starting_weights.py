"""``model.restore_from``: runs that start from the weights of others, in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint.manifest import step_name
from deepseek.commands.versions import made_folder
from deepseek.config.errors import UserError
from support.launchers import by_itself, layout
from support.micro_runs import MicroRuns

ONE_STEP = ["trainer.max_steps=1", "trainer.val_check_interval=0"]


@pytest.fixture(scope="module")
def model(micro: MicroRuns) -> Path:
    """A trained model that went out to Hugging Face's files and came back."""
    micro.train("taught", "trainer.max_steps=4").assert_done()
    micro.cli("hf", "export", "taught", "files").assert_done()
    ran = micro.cli("hf", "import", "files", "model").assert_done()
    assert "train it     deepseek train --config model/config.yaml" in ran.out
    return micro.folder / "model"


def weights(micro: MicroRuns, name: str) -> dict[str, torch.Tensor]:
    found = micro.tensors(name)
    return {key: tensor for key, tensor in found.items() if key.startswith("model.")}


def first_loss(micro: MicroRuns, name: str) -> float:
    return float(micro.rows(name)[0]["loss"])


def test_the_weights_are_those_that_went_out(micro: MicroRuns, model: Path) -> None:
    before, after = weights(micro, "taught"), weights(micro, "model")
    assert before.keys() == after.keys() == micro.tensors("model").keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.framework
def test_a_run_starts_from_them(micro: MicroRuns, model: Path) -> None:
    """At step 0: as the run that made them, and much better than from random ones."""
    ran = micro.train("from_model", *ONE_STEP, f"model.restore_from={model}").assert_done()
    assert f"started from the weights of {model}/checkpoints/{step_name(0)}" in ran.out
    micro.train("from_run", *ONE_STEP, "model.restore_from=taught").assert_done()
    place = Path("taught", "checkpoints", step_name(4))
    micro.train("from_step", *ONE_STEP, f"model.restore_from={place}").assert_done()
    losses = [first_loss(micro, name) for name in ("from_model", "from_run", "from_step")]
    assert losses[0] == losses[1] == losses[2] < first_loss(micro, "taught") - 0.1
    assert micro.differences("from_run", "from_step") == []
    row = micro.rows("from_model")[0]
    assert row["step"] == 1

    resumed = micro.train(
        "from_model", "trainer.max_steps=2", f"model.restore_from={model}"
    ).assert_done()
    assert f"model.restore_from={model} is ignored: the run goes on from its own" in resumed.out
    assert [row["step"] for row in micro.rows("from_model")] == [1, 2]


@pytest.mark.parametrize("sizes", [layout(2, ep=2), layout(2, pp=2)], ids=["EP2", "PP2"])
def test_in_other_layouts(micro: MicroRuns, model: Path, sizes: list[str]) -> None:
    name = f"parallel{sizes[2][-1]}"
    settings = [*ONE_STEP, f"model.restore_from={model}", *sizes]
    ran = by_itself(micro, name, *settings).wait().assert_done()
    assert ran.out.count("started from the weights of") == 1
    micro.train(f"{name}_alone", *ONE_STEP, f"model.restore_from={model}").assert_done()
    assert first_loss(micro, name) == pytest.approx(first_loss(micro, f"{name}_alone"), rel=1e-5)


def test_other_settings_are_told(micro: MicroRuns, model: Path) -> None:
    settings = [f"model.restore_from={model}", "model.rope_theta=50000.0", "model.optim.lr=1e-4"]
    ran = micro.train("theta", *ONE_STEP, *settings).assert_done()
    assert "were made with model.rope_theta=10000.0, this run has 50000.0" in ran.out
    assert "model.optim.lr" not in ran.out


def test_without_the_mtp_module(micro: MicroRuns, model: Path) -> None:
    settings = [f"model.restore_from={model}", "model.num_nextn_predict_layers=0"]
    ran = micro.train("no_mtp", *ONE_STEP, *settings).assert_done()
    assert "tensors of MTP modules, which this model lacks" in ran.out


def test_other_models_are_refused(micro: MicroRuns, model: Path) -> None:
    start = f"model.restore_from={model}"
    micro.train("wider", *ONE_STEP, start, "model.n_routed_experts=16").assert_refused(
        "does not fit", "has shape [8,", f"--config {model}/config.yaml has the model section"
    )
    micro.train("shallower", *ONE_STEP, start, "model.num_hidden_layers=1").assert_refused(
        "weights that this model does not have", f"--config {model}/config.yaml"
    )
    micro.train("deeper", *ONE_STEP, start, "model.num_nextn_predict_layers=2").assert_refused(
        "does not fit", "model.mtp.1", "missing"
    )
    started = [micro.folder / name for name in ("wider", "shallower", "deeper")]
    assert not any(folder.exists() for folder in started)  # nothing was written


def test_a_failed_start_takes_back_the_folders_it_made(tmp_path: Path) -> None:
    with pytest.raises(UserError), made_folder(tmp_path / "runs" / "name"):
        (tmp_path / "runs" / "name" / "events.out").touch()
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError), made_folder(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        raise UserError("failed later")
    with pytest.raises(UserError), made_folder(tmp_path / "run"):
        raise UserError("it was there before")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_an_imported_folder_is_no_run_to_go_on_with(micro: MicroRuns, model: Path) -> None:
    micro.train("model", "trainer.max_steps=2").assert_refused(
        "holds imported weights and is no run to be continued", f"model.restore_from={model}"
    )


def test_a_source_that_was_damaged(micro: MicroRuns, model: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model, tmp_path / "model")
    place = tmp_path / "model" / "checkpoints" / step_name(0)
    (place / "__0_0.distcp").write_bytes(b"")
    ran = micro.train("damaged_import", *ONE_STEP, f"model.restore_from={tmp_path / 'model'}")
    ran.assert_refused("no checkpoint in", "is sound")


def test_commands(micro: MicroRuns, model: Path) -> None:
    micro.cli("generate", "model", "--max-new-tokens", "3").assert_done()
    data = f"d={micro.folder / 'data'}"
    micro.cli("experts", "model", "--data", data, "--output", "r.json").assert_done()
    found: dict[str, Any] = json.loads((micro.folder / "r.json").read_text())
    assert found["step"] == 0
    micro.cli("ls", "model").assert_done()
    micro.cli("hf", "import", "files", "model").assert_refused("model exists already")
    micro.cli("hf", "export", "nowhere", "never").assert_refused("nowhere does not exist")
