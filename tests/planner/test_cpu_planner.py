"""A CPU as a cluster: constants from timed steps, the file, and what it predicts."""

from __future__ import annotations

import json
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from deepseek.commands.cpu_speed import PROBES, TINY, explained
from deepseek.commands.estimate import estimate
from deepseek.commands.forecast import forecast
from deepseek.commands.plan import plan
from deepseek.config import UserError, load_config
from deepseek.config.schema import changed
from deepseek.planner.cpu import CpuMachine, Links, Speed, cores, machine_text, read_machine
from deepseek.planner.step_time import predict_step
from support.micro_runs import MicroRuns

SPEED = Speed(60e9, 20e9, 0.4, 2.0, 2e-3, 3e-9, 5e-3)
MACHINE = CpuMachine("a test", 2, 8e9, 5e8, SPEED, SPEED, Links(1e9, 2e-4, 3e9, 5e-5))


def seconds(*settings: str, machine: CpuMachine = MACHINE) -> float:
    layout = ["model.global_batch_size=8", "model.micro_batch_size=1", *settings]
    run = load_config(TINY, ["trainer.precision=32", "trainer.accelerator=cpu", *layout])
    return predict_step(run, machine.device(run.trainer.devices), run.trainer.devices).seconds


def test_constants_are_found_from_steps() -> None:
    runs = [load_config(TINY, ["trainer.precision=32", *changes]) for changes in PROBES]
    took = [predict_step(run, MACHINE.device(1), 1).seconds for run in runs]
    first = Speed(70e9, 20e9, 0.5, 1.0, 1e-3, 1e-9, 1e-3)
    found = explained(runs, took, first)
    assert found.products == pytest.approx(SPEED.products, rel=0.1)
    assert found.host == pytest.approx(SPEED.host, rel=0.2)
    other = replace(MACHINE, alone=found)
    for run, measured in zip(runs, took, strict=True):
        assert predict_step(run, other.device(1), 1).seconds == pytest.approx(measured, rel=0.05)
    assert min(astuple(explained(runs, [1e-6] * len(runs), first))) > 0


def test_processes_share_what_there_is() -> None:
    one, two = seconds(), seconds("trainer.devices=2")
    ep = "model.expert_model_parallel_size=2"
    assert one / 2 < two < one
    assert seconds("trainer.devices=4") > 0.9 * two  # two cores have no more to give
    assert seconds("trainer.devices=2", ep) != two
    slow = replace(MACHINE, links=replace(MACHINE.links, gloo=1e7))
    assert seconds("trainer.devices=2", ep, machine=slow) > 2 * seconds("trainer.devices=2", ep)
    fast = replace(MACHINE, alone=replace(SPEED, products=120e9))
    assert seconds(machine=fast) < one
    assert seconds("trainer.devices=2", machine=fast) == two
    deep = "model.pipeline_model_parallel_size=4"
    crowd, room = seconds("trainer.devices=4", deep), replace(MACHINE, cores=4)
    assert seconds("trainer.devices=4", deep, machine=room) < crowd


def test_estimate_and_plan_take_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(machine_text(MACHINE))
    assert read_machine(file) == MACHINE
    settings = ["model.micro_batch_size=1", "model.global_batch_size=8"]
    estimate(TINY, settings, str(file), 2, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["gpu"] == "CPU" and told["resident_bytes"] > 5e8
    assert told["step_time_s"] == pytest.approx(sum(told["seconds"].values()))
    estimate(TINY, settings, str(file), 2)
    out = capsys.readouterr().out
    assert "60 GFLOP/s, the measured rate of fp32 products" in out and "resident" in out
    plan(TINY, settings[1:], str(file), nodes=1, gpus_per_node=2, top=2)
    assert "0.466 for the program" in capsys.readouterr().out


def test_train_tells_what_it_expected_beside_what_it_took(
    micro: MicroRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "deepseek" / "cpu.json"
    file.parent.mkdir()
    file.write_text(machine_text(replace(MACHINE, cores=cores())))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = ["trainer.max_steps=4", "trainer.precision=32", "trainer.num_threads=0"]
    run = load_config(micro.config, settings)
    expected = forecast(run, None)
    assert expected is not None and expected.bytes > MACHINE.process
    assert forecast(changed(run, {"trainer.precision": "bf16-mixed"}), None) is None
    assert forecast(run, "an unknown GPU") is None and forecast(run, "NVIDIA H100 80GB") is not None
    words = micro.words("forecast", *settings)
    started = micro.cli.start(*words, env={"XDG_CACHE_HOME": str(tmp_path)})
    ran = started.wait().assert_done().out
    assert re.search(r"expected +\S+ s a step, .* as predicted", ran)
    assert re.search(r"took +\S+ s a step, .*; predicted .* of the time", ran)
    facts = json.loads((micro.folder / "forecast" / "environment.json").read_text())
    assert facts["predicted_seconds"] == pytest.approx(expected.seconds)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, r"cannot be read: No such file .*; make it with `deepseek calibrate`"),
        ("{", "is no calibration"),
        ("[]", "is no calibration"),
        ('{"format": 2}', "format 2, not 1"),
        ('{"format": 1, "alone": {}}', "KeyError"),
    ],
)
def test_files_that_are_no_calibration(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "cpu.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=why):
        plan(TINY, gpu=str(file))


def test_numbers_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(machine_text(MACHINE).replace("0.002", "-1"))
    with pytest.raises(UserError, match="a negative or infinite number"):
        estimate(TINY, gpu=str(file))
