"""``auto`` in place of sizes: who chooses, what is told, and what stays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest

from deepseek.commands.auto_layout import auto_layout
from deepseek.commands.validate import validate
from deepseek.config import ConfigError, RunConfig, UserError, load_config
from deepseek.config.layout import DEVICES, PLANNED, Layout
from deepseek.config.rules import check
from deepseek.config.schema import LEAVES
from support.micro_runs import MicroRuns

TINY = "deepseek_v3_tiny"
EVERYTHING = [f"{key}=auto" for key in PLANNED]


def test_every_size_may_be_auto_where_a_planner_is() -> None:
    asked: list[str] = []

    def planner(run: RunConfig, auto: Sequence[str]) -> Mapping[str, object]:
        asked.extend(auto)
        assert all(LEAVES[key].problem_with("auto") is not None for key in auto)
        return {"model.micro_batch_size": 2}

    run = load_config(TINY, [*EVERYTHING, "trainer.devices=auto"], planner)
    assert asked == [*PLANNED, DEVICES] and run.model.micro_batch_size == 2


def test_without_a_planner_auto_is_told() -> None:
    with pytest.raises(ConfigError) as told:
        load_config(TINY, ["model.micro_batch_size=auto", "model.hidden_size=-1"])
    first, second = sorted(map(str, told.value.problems))
    assert "model.hidden_size=-1: must be" in first
    assert second == (
        "model.micro_batch_size=auto: is chosen where it is known what the run has: in `deepseek "
        "train` and `validate`; have `deepseek plan --write FILE` choose it, or give a value "
        "[override]"
    )
    with pytest.raises(ConfigError, match=r"num_hidden_layers=auto: must be a whole number"):
        load_config(TINY, ["model.num_hidden_layers=auto"], auto_layout())


def test_what_is_chosen_is_sound_and_keeps_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = ["trainer.accelerator=cpu", "trainer.devices=4", "exp_manager.exp_dir=nowhere"]
    run = load_config(TINY, [*EVERYTHING, *cpu], auto_layout())
    assert check(run) == [] and Layout.of_run(run).world_size == 4
    out = capsys.readouterr().out
    assert re.search(r"layout +model.tensor_model_parallel_size=\d .*: the fastest of 4 proc", out)
    assert "of the fullest rank" in out and "as predicted" in out
    two = load_config(
        TINY,
        ["model.micro_batch_size=auto", *cpu, "model.pipeline_model_parallel_size=2"],
        auto_layout(told=False),
    )
    assert two.model.pipeline_model_parallel_size == 2 and capsys.readouterr().out == ""
    one = load_config(TINY, ["trainer.devices=auto", cpu[0], cpu[2]], auto_layout(told=False))
    assert one.trainer.devices == 1


def test_nothing_can_be_chosen() -> None:
    odd = ["trainer.devices=3", "model.pipeline_model_parallel_size=1", "trainer.accelerator=cpu"]
    odd += ["model.global_batch_size=4", "model.tensor_model_parallel_size=1"]
    with pytest.raises(UserError, match=r"no layout of 3 CPU is legal with .*use .*=3 or 6"):
        load_config(TINY, [*odd, "model.micro_batch_size=auto"], auto_layout())


def test_validate_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    of_gpus = ["trainer.accelerator=gpu", "trainer.devices=8", "model.global_batch_size=16"]
    validate(TINY, [*of_gpus, "model.micro_batch_size=auto"], planner=auto_layout())
    assert "the fastest of 8 H100, which are assumed, as there is no GPU here" in (
        capsys.readouterr().out
    )


@pytest.mark.framework
def test_a_run_records_and_keeps_them(micro: MicroRuns) -> None:
    auto = ["model.micro_batch_size=auto", "model.activations_checkpoint_granularity=auto"]
    first = micro.train("auto", *auto, "trainer.max_steps=1").assert_done().out
    assert "the fastest of 1 processes of this CPU" in first
    file = micro.folder / "auto" / "config.yaml"
    config = file.read_text()
    chosen = load_config(file).model.micro_batch_size
    other = 2 if chosen != 2 else 4
    file.write_text(config.replace(f"micro_batch_size: {chosen}", f"micro_batch_size: {other}", 1))
    run = load_config(micro.config, auto, auto_layout(file.parent))
    assert run.model.micro_batch_size == other  # as the run began
    run = load_config(micro.config, auto, auto_layout(micro.folder / "elsewhere"))
    assert run.model.micro_batch_size == chosen
    two = [*auto, "trainer.devices=2"]  # other processes, other sizes
    assert load_config(micro.config, two, auto_layout(file.parent)).model.micro_batch_size <= 2
