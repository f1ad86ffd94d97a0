"""NeMo where it works, Lightning otherwise, and nothing silent in between."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from deepseek.config.schema import ModelConfig, SchedConfig
from deepseek.data.loader import StepBatches
from deepseek.frameworks import NEMO_TARGET, USES_NEMO, ModelBase, Trainer, attach_loggers, pl
from deepseek.training.optim import learning_rate
from deepseek.training.step import DeepSeekModel
from support.micro_runs import MicroRuns

pytestmark = pytest.mark.framework

SMALL = ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, kv_lora_rank=8)
PRETEND = """
import importlib.metadata as metadata
import sys
real = metadata.version
metadata.version = lambda name: {versions}.get(name) or real(name)
for name in list(sys.modules):
    if name == "deepseek.frameworks" or name.split(".")[0] == "nemo":
        del sys.modules[name]
sys.modules.update(dict.fromkeys({blocked}))  # what is None there cannot be imported
import deepseek.frameworks as f
print(f.framework_name(), f.pl.__name__)
"""


def pretend(
    micro: MicroRuns, versions: dict[str, str], blocked: list[str], choice: str = "auto"
) -> tuple[str, str]:
    """Import the frameworks where these versions are said to be installed."""
    code = PRETEND.format(versions=versions, blocked=blocked)
    env = {"DEEPSEEK_FRAMEWORK": choice}
    ran = micro.cli.start("--version", before=code, env=env).wait()
    return ran.out, ran.err.strip().splitlines()[-1] if ran.err.strip() else ""


def test_nemo_with_a_lightning_too_new_for_it_is_an_error(micro: MicroRuns) -> None:
    _, error = pretend(micro, {"nemo_toolkit": "3.0.0", "lightning": "2.6.6"}, [])
    assert "needs lightning>2.2.1,<=2.4.0; installed is 2.6.6" in error
    assert "DEEPSEEK_FRAMEWORK=lightning" in error


def test_a_broken_nemo_is_an_error_and_not_a_fallback(micro: MicroRuns) -> None:
    versions = {"nemo_toolkit": "3.0.0", "lightning": "2.4.0"}
    _, error = pretend(micro, versions, ["nemo", "nemo.core"])
    assert "nemo_toolkit 3.0.0 is installed but does not import" in error
    out, error = pretend(micro, versions, ["nemo", "nemo.core"], choice="lightning")
    assert "PyTorch Lightning" in out, error


def test_asking_for_the_impossible(micro: MicroRuns) -> None:
    assert "must be auto, nemo or lightning" in pretend(micro, {}, [], choice="jax")[1]


def test_one_namespace() -> None:
    assert issubclass(ModelBase, pl.LightningModule)
    assert Trainer is pl.Trainer
    if USES_NEMO:
        assert pl.__name__ == "lightning.pytorch"
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    assert USES_NEMO == ("nemo-toolkit" in installed or "nemo_toolkit" in installed)


@pytest.mark.parametrize("form", [dict, OmegaConf.create, ModelConfig])
def test_the_model_section_may_have_any_form(form: type) -> None:
    values = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
    cfg = form(**values) if form is ModelConfig else form(values)
    assert DeepSeekModel(cfg).config.hidden_size == 16


def test_the_loader_has_the_length_of_what_is_left() -> None:
    batches = StepBatches(8, 20, start_step=12)
    assert len(batches) == len(list(batches)) == 8


def test_the_length_of_the_schedule_is_not_overwritten() -> None:
    sched = SchedConfig(max_steps=20, min_lr=0.1)
    assert learning_rate(10, 1.0, sched, trainer_steps=10) > 0.5
    assert learning_rate(20, 1.0, sched, trainer_steps=10) == 0.1


def test_loggers_make_no_error_and_leave_the_run_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for _ in range(2):
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False
        )
        attach_loggers(trainer, tmp_path / "logs", tensorboard=True)
        assert [type(logger).__name__ for logger in trainer.loggers] == ["TensorBoardLogger"]
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    errors = list((tmp_path / "logs").rglob("nemo_error_log.txt"))
    assert all(path.read_text() == "" for path in errors)
    assert bool(errors) == USES_NEMO


@pytest.mark.skipif(not USES_NEMO, reason="restored by NeMo")
def test_nemo_file_round_trip(tmp_path: Path) -> None:
    model = DeepSeekModel(SMALL, seed=5)
    assert model.cfg.target == NEMO_TARGET
    model.save_to(str(tmp_path / "model.nemo"))
    again = DeepSeekModel.restore_from(str(tmp_path / "model.nemo"), map_location="cpu")
    assert type(again) is DeepSeekModel
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_gpu_that_is_not_there(micro: MicroRuns) -> None:
    words = micro.words("no_gpu", "trainer.accelerator=gpu")
    ran = micro.cli.start(*words, env={"CUDA_VISIBLE_DEVICES": ""}).wait()
    ran.assert_refused("torch finds no GPU here")
