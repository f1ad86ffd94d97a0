"""A CPU as a cluster: costs from timed pieces, the file, and what it predicts."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek.commands import calibrate as calibration
from deepseek.commands import cpu_speed
from deepseek.commands.cpu_speed import (
    ATTENTION,
    BLOCKS,
    GROUPED,
    HEADS,
    LINEAR,
    TINY,
    attention_of,
    explained,
)
from deepseek.commands.estimate import estimate
from deepseek.commands.forecast import forecast
from deepseek.commands.plan import plan
from deepseek.config import UserError, load_config
from deepseek.config.processor import cores
from deepseek.config.schema import changed
from deepseek.models.components.block import DeepSeekBlock
from deepseek.ops.causal_attention import BLOCK
from deepseek.planner.architecture import Architecture, Product
from deepseek.planner.cpu import (
    CpuMachine,
    Crew,
    machine_name,
    machine_text,
    read_machine,
    resident_bytes,
)
from deepseek.planner.cpu_time import (
    QUERIES,
    Links,
    Outside,
    Work,
    block,
    ends,
    grouped,
    product,
    scores,
)
from deepseek.planner.step_time import predict_step
from deepseek.training.step import DeepSeekModel
from support.kernels import cache_with_kernels, kernels_asked_for, without_kernels
from support.micro_runs import MicroRuns

COSTS = Work(
    flop=1.2e-11,
    weight=2e-10,
    row=1e-10,
    product=5e-6,
    expert=3e-6,
    score_flop=1e-11,
    score=2e-9,
    score_block=1.5e-4,
    block=5e-4,
    number=2e-10,
    moe=2e-3,
    choice=4e-8,
    row_order=1e-7,
    head=1e-4,
    logit=2e-9,
    table=3e-10,
)
OUTSIDE = Outside(1.2e-9, 2e-5, 3e-4, 4e-3, 1e-3, 2e-9)
LINKS = Links(2, 1e-4, 3e-10, 2e-4, 1e-9, 1e-4, 1e-9, 2e-4, 1e-9)


def crew(processes: int, speed: float = 1.0) -> Crew:
    costs = COSTS * (1 / speed)
    return Crew(processes, 1, 4e8, costs, costs * 1.2, OUTSIDE, (LINKS,))


MACHINE = CpuMachine("a test", 2, 8e9, 0.0, (crew(1, 1.8), crew(2), crew(4)))


def seconds(*settings: str, machine: CpuMachine = MACHINE) -> float:
    layout = ["model.global_batch_size=8", "model.micro_batch_size=1", *settings]
    run = load_config(TINY, ["trainer.precision=32", "trainer.accelerator=cpu", *layout])
    return predict_step(run, machine.device(run.trainer.devices), run.trainer.devices).seconds


def test_costs_are_found_from_pieces_of_work() -> None:
    works = [product(rows, Product(inner, outer))[0] for rows, inner, outer in LINEAR]
    works += [grouped(rows, Product(inner, outer), n)[0] for n, rows, inner, outer in GROUPED]
    works += [scores(b, s, s, n, width + values) for b, n, s, width, values in ATTENTION]
    for sequences, length, changes in BLOCKS:
        arch = Architecture.of_model(load_config(TINY, changes).model)
        works += [block(arch, moe, sequences, length, 1, 1, 1)[0].total for moe in (False, True)]
    for tokens, vocabulary, width in HEADS:
        arch = replace(arch, vocab=vocabulary, hidden=width)
        works.append(ends(arch, 1, tokens, 1, 1)[0].total)
    found = explained([(work, work.seconds(COSTS)) for work in works])
    assert found.flop == pytest.approx(COSTS.flop, rel=0.1)
    for work in works:
        assert work.seconds(found) == pytest.approx(work.seconds(COSTS), rel=0.05)
    assert min(explained([(work, 1e-6) for work in works])) > 0


@pytest.mark.parametrize("moe", [False, True])
def test_work_is_that_of_the_real_block(moe: bool) -> None:
    model = load_config(TINY).model
    real = DeepSeekBlock(model, int(moe))
    passes, _ = block(Architecture.of_model(model), moe, 3, 64, 1, 1, 1)
    whole = sum(p.numel() for p in real.parameters() if p.dim() == 2)
    assert passes.products.flop == pytest.approx(2 * 3 * 64 * whole)
    if moe:
        experts = sum(p.numel() for p in real.parameters() if p.dim() == 3)
        assert passes.experts.weight == experts
        half, _ = block(Architecture.of_model(model), moe, 3, 64, 1, 1, 2)
        assert half.experts.weight == experts / 2
    parted, _ = block(Architecture.of_model(model), moe, 3, 64, 2, 1, 1)
    assert passes.products.flop / 2 <= parted.products.flop < passes.products.flop
    assert QUERIES == BLOCK


def test_attention_is_timed_as_a_step_takes_it() -> None:
    sequences, heads, length, _, values = ATTENTION[0]
    with kernels_asked_for() as names:
        attention_of(*ATTENTION[0])().sum().backward()
    assert names == {"attention", "attention_backward"}
    with without_kernels():
        y_BNSU = attention_of(*ATTENTION[0])()
        y_BNSU.sum().backward()
    assert y_BNSU.shape == (sequences, heads, length, values)


def test_calibrate_writes_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "_crew", lambda count, before: crew(count))
    monkeypatch.setattr(calibration, "_other_work", lambda: nullcontext([0.5]))
    monkeypatch.setattr(calibration, "cores", lambda: 2)
    calibration.calibrate(tmp_path / "loaded.json")
    found, out = read_machine(tmp_path / "loaded.json"), capsys.readouterr().out
    assert found.name == machine_name() and [c.processes for c in found.crews] == [1, 2, 4]
    assert found.disturbed == 0.5
    assert "other work took 50% of this machine" in out and "83 GFLOP/s each" in out
    assert out.count("50% of this machine: once more") == 3
    monkeypatch.setattr(calibration, "_other_work", lambda: nullcontext([0.05]))
    calibration.calibrate(tmp_path / "idle.json")
    assert "other work" not in capsys.readouterr().out
    with pytest.raises(UserError, match="idle.json"):
        calibration.calibrate(tmp_path / "idle.json")
    # 100 s on 2 cores of 2, then of 8: where others find room elsewhere, they disturb nothing
    assert calibration.share_of_others(100, 200, 100, 2) == 0.5
    assert calibration.share_of_others(100, 800, 100, 2) == 0
    assert calibration.share_of_others(700, 800, 100, 2) == 0.5


def test_exchanges_do_not_take_longer_on_a_machine_that_has_slowed_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps are twice as long as those that compute alone, at either rate."""
    asked: list[tuple[object, ...]] = []

    def taken(seconds: float) -> Links:
        def steps(*modules: object, rounds: int) -> list[tuple[float, float]]:
            asked.append(modules)
            return [(2 * seconds, 0.0), (seconds, 0.0)]

        monkeypatch.setattr(cpu_speed, "_steps", steps)
        return cpu_speed._in_steps(crew(2), LINKS)

    monkeypatch.setattr(cpu_speed, "_on_ranks", lambda model, count: (model, count))
    monkeypatch.setattr(cpu_speed, "DeepSeekModel", lambda model, seed: model)
    fast, slow = taken(0.2), taken(0.35)
    assert fast == slow and fast.rows > 10 * LINKS.rows and fast.shared > 10 * LINKS.shared
    for (parted, count), alone in asked:  # type: ignore[misc]
        assert count == 2 and parted.hidden_size == alone.hidden_size
        # each process computes for as many sequences as alone, of its half of the heads or experts
        groups = 1 if parted.tensor_model_parallel_size == 2 else 2
        assert parted.global_batch_size == groups * alone.global_batch_size


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_real_calibration_is_near_a_real_step(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "deepseek", "calibrate", "--output", str(file)]
    subprocess.run(command, check=True)
    run = load_config(TINY, ["trainer.precision=32", "model.data.seq_length=64"])
    predicted = predict_step(run, read_machine(file).device(1), 1)
    module = DeepSeekModel(run.model, seed=1)
    optimizer, length = module.configure_optimizers(), run.model.data.seq_length
    tokens = torch.randint(run.model.vocab_size, (run.model.global_batch_size, length))
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "positions": torch.arange(length).expand(tokens.shape).contiguous(),
        "documents": torch.zeros(tokens.shape, dtype=torch.int32),
    }
    took = []
    for _ in range(6):
        start = time.perf_counter()
        module.train_step(batch, optimizer)
        took.append(time.perf_counter() - start)
    assert predicted.seconds / 3 < min(took) < 3 * predicted.seconds


def test_processes_share_what_there_is() -> None:
    one, two = seconds(), seconds("trainer.devices=2")
    ep = "model.expert_model_parallel_size=2"
    assert one / 2 < two < 1.1 * one
    assert seconds("trainer.devices=4") > 0.9 * two  # two cores have no more to give
    slow = replace(MACHINE, crews=(crew(1), replace(crew(2), links=(replace(LINKS, rows=0.1),))))
    assert seconds("trainer.devices=2", ep, machine=slow) > 3 * seconds("trainer.devices=2", ep)
    tp = "model.tensor_model_parallel_size=2"
    assert seconds("trainer.devices=2", tp, machine=slow) == seconds("trainer.devices=2", tp)
    deep = "model.pipeline_model_parallel_size=4"
    crowd, room = seconds("trainer.devices=4", deep), replace(MACHINE, cores=4)
    assert seconds("trainer.devices=4", deep, machine=room) < crowd
    recompute = "model.activations_checkpoint_granularity=full"
    assert 1.15 * one < seconds(recompute) < 1.5 * one
    assert [calibration.crew_sizes(n) for n in (1, 2, 8, 12, 64)] == [
        [1, 2, 4],
        [1, 2, 4],
        [1, 2, 4, 8],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 16],
    ]


def test_fsdp_needs_flat_tensors_besides() -> None:
    settings = ["model.micro_batch_size=1", "model.global_batch_size=8"]
    one, two = (load_config(TINY, [*settings, f"trainer.devices={n}"]) for n in (1, 2))
    device = MACHINE.device(2)
    beside = resident_bytes(two, device) - resident_bytes(one, device)
    weights = 4 * 10e6
    assert weights < beside < 4 * weights


def test_estimate_and_plan_take_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cpu.json"
    file.write_text(machine_text(MACHINE))
    assert read_machine(file) == MACHINE
    settings = ["model.micro_batch_size=1", "model.global_batch_size=8"]
    estimate(TINY, settings, str(file), 2, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["gpu"] == "CPU" and told["resident_bytes"] > 4e8
    assert told["step_time_s"] == pytest.approx(sum(told["seconds"].values()))
    estimate(TINY, settings, str(file), 2)
    out = capsys.readouterr().out
    assert "83 GFLOP/s, the measured rate of fp32 products" in out and "resident" in out
    plan(TINY, settings[1:], str(file), nodes=1, gpus_per_node=2, top=2)
    assert "0.373 for the program" in capsys.readouterr().out


def test_train_tells_what_it_expected_beside_what_it_took(
    micro: MicroRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, cache = tmp_path / "deepseek" / "cpu.json", cache_with_kernels(tmp_path)
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores())
    here = replace(
        MACHINE, name=machine_name(), cores=cores(), crews=(replace(crew(1), threads=threads),)
    )
    file.write_text(machine_text(here))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = ["trainer.max_steps=4", "trainer.precision=32", "trainer.num_threads=0"]
    run = load_config(micro.config, settings)
    expected = forecast(run, None)
    assert expected is not None and expected.bytes > 4e8
    otherwise: list[dict[str, object]] = [
        {"trainer.precision": "bf16-mixed"},
        {"model.optim.name": "muon"},
        {"model.torch_compile": True},
    ]
    assert [forecast(changed(run, change), None) for change in otherwise] == [None] * 3
    assert forecast(run, "an unknown GPU") is None and forecast(run, "NVIDIA H100 80GB") is not None
    words = micro.words("forecast", *settings)
    started = micro.cli.start(*words, env=cache)
    ran = started.wait().assert_done().out
    assert re.search(r"expected +\S+ s a step, .* as predicted", ran)
    assert re.search(r"took +\S+ s a step, .*; predicted .* of the time", ran)
    facts = json.loads((micro.folder / "forecast" / "environment.json").read_text())
    assert facts["predicted_seconds"] == pytest.approx(expected.seconds)
    for spoilt in (replace(here, disturbed=0.5), replace(here, name="another")):
        file.write_text(machine_text(spoilt))
        assert forecast(run, None) is None
    with pytest.raises(UserError, match="was measured on another; this is .* run `deepseek cal"):
        estimate(TINY, gpu="cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads + 1))
    file.write_text(machine_text(here))
    assert forecast(run, None) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, r"cannot be read: No such file .*; make it with `deepseek calibrate`"),
        ("{", "is no calibration .*; make one with `deepseek calibrate --output"),
        (machine_text(MACHINE)[:900], "is no calibration"),
        ("[]", "is no calibration"),
        ('{"format": 1}', "format 1, not 2"),
        ('{"format": 2, "crews": []}', "no 'name'"),
        (machine_text(replace(MACHINE, crews=())), "nothing was measured"),
    ],
)
def test_files_that_are_no_calibration(tmp_path: Path, text: str | None, why: str) -> None:
    file = tmp_path / "cpu.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=why):
        plan(TINY, gpu=str(file))


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True, None])
def test_numbers_that_cannot_be(tmp_path: Path, value: object) -> None:
    file = tmp_path / "cpu.json"
    tree = json.loads(machine_text(MACHINE))
    tree["crews"][1]["forward"]["flop"] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="flop is .*, not a number above 0"):
        estimate(TINY, gpu=str(file))
