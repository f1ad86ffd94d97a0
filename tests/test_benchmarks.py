"""The commands that measure, in tiny sizes: what they compare computes the same, in two ways."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek.config.cost import flops_per_token
from deepseek.config.errors import UserError
from deepseek.config.schema import DataConfig
from deepseek.parallel.mesh import SingleProcess
from support.kernels import kernels_asked_for

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


Load = Callable[[str], ModuleType]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a file of ``benchmarks/``; cases are tiny."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    _forget()

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    cases = load("cases")
    for made in (cases.CASES, cases.QUICK):
        for place, case in enumerate(made):
            model = replace(case.model, **TINY, n_group=1, topk_group=1)
            made[place] = replace(case, model=model, batch=2, length=16)
    yield load
    _forget()


def _forget() -> None:
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_ablation_takes_another_way_to_the_same_loss(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablations, sides = benchmark("ablations"), benchmark("sides")
    case = replace(sides.CASES[0], model=replace(sides.CASES[0].model, moe_aux_loss_coeff=0.01))
    called: list[str] = []

    def noting(target: str, stands: Any) -> Any:
        def noted(*args: Any) -> Any:
            called.append(target)
            return stands(*args)

        return noted

    def steps() -> tuple[list[float], set[str]]:
        called.clear()
        with kernels_asked_for() as asked:
            step = sides.our_step(case)
            return [step()[0] for _ in range(2)], asked

    in_process = {n: each for n, each in ablations.ABLATIONS.items() if n != "kept memory"}
    for name, each in in_process.items():
        replaced = {target: noting(target, stands) for target, stands in each.replaced.items()}
        monkeypatch.setitem(ablations.ABLATIONS, name, replace(each, replaced=replaced))
    for beside in dict.fromkeys(each.beside for each in in_process.values()):
        with ablations.switched(*beside):
            expected, whole = steps()
        for name, each in in_process.items():
            if each.beside != beside:
                continue
            with ablations.switched(name, *beside):
                losses, _ = steps()
            assert losses == pytest.approx(expected, rel=1e-6), name
            assert set(each.kernels) <= whole, f"{name}: the step does without already"
            assert set(each.replaced) <= set(called), f"{name}: nobody asks for it"


def test_ablations_are_told_and_kept(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    """In processes of their own; a second command leaves what was found of other cases."""
    ablations = benchmark("ablations")
    monkeypatch.setattr(sys.modules["variants"], "CONTEXT", multiprocessing.get_context("fork"))
    file, names = tmp_path / "results.json", ["kernel of AdamW", "kept memory"]
    settings = ["--rounds", "1", "--threads", "1", "--output", str(file)]
    ablations.main(["--cases", "8 experts", "--only", *names, *settings])
    ablations.main(["--cases", "F", "--only", "kernel of rotations", "--part", "steps", *settings])
    kept = json.loads(file.read_text())["ablations"]
    assert list(kept) == ["8 experts", "F: 64 fine experts"]
    steps, processes = (kept["8 experts"][part] for part in ("steps", "processes"))
    assert list(steps) == names[:1] and list(processes) == names
    assert steps[names[0]]["times"] > 0 and "times" not in processes[names[0]]
    assert processes[names[1]]["cpu_times"] > 0 and processes[names[1]]["gib"] >= 0
    assert "both without node of attention" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        ablations.main(["--cases", "T"])
    assert "no case begins with 'T'" in capfd.readouterr().err


def test_an_ablation_with_another_loss_is_an_error(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants, cases = benchmark("variants"), benchmark("cases")
    monkeypatch.setattr(variants, "CONTEXT", multiprocessing.get_context("fork"))
    longer = replace(cases.CASES[0], length=24)
    ways = {"one": (cases.CASES[0], int), "other": (longer, int)}
    with pytest.raises(ValueError, match="should have one loss"):
        variants.in_turn(ways, threads=1, rounds=1)
    with pytest.raises(ValueError, match="should have one loss"):
        variants.one_by_one(ways, threads=1)


def test_the_bench_tells_and_keeps_each_case(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """Both sides in this process; cases of a group are compared with the first of them, too."""
    train_step, sides = benchmark("train_step"), benchmark("sides")
    order: list[str] = []

    @contextmanager
    def here(side: str, case: Any, threads: int, device: str) -> Iterator[Callable[[bool], Any]]:
        call = sides.import_side(side, case, torch.device(device))()

        def run(half: bool) -> Any:
            assert not half
            order.append(f"{side} {case.name}")
            return sides.Run(float(len(order)), 1.0, 2 << 30, 1 << 30, call()[0])

        yield run

    rates = {torch.float32: 2e9, torch.bfloat16: 1e9}
    monkeypatch.setattr(train_step, "worker", here)
    monkeypatch.setattr(train_step, "product_rate", rates.__getitem__)
    monkeypatch.setattr(train_step, "left_out", lambda: {"automodel": "it is not there"})
    monkeypatch.setattr(train_step, "breakdown", lambda *_: {"AdamW": 1})
    file = tmp_path / "results.json"
    settings = ["--rounds", "1", "--threads", "1", "--output", str(file)]
    train_step.main(["--cases", "8 experts", "128 experts", *settings])
    assert order[:4] == [
        "ours 8 experts",
        "shipped 8 experts",
        "ours 128 experts",
        "shipped 128 experts",
    ]
    train_step.main(["--cases", "F", "decode, batch 8", *settings])
    kept = json.loads(file.read_text())["train_step cpu"]
    assert list(kept) == ["8 experts", "128 experts", "F: 64 fine experts", "decode, batch 8"]
    assert "ours_of_first" not in kept["8 experts"]["rows"][0]
    # The second round's runs took 5, 6, 7 and 8 seconds.
    row = kept["128 experts"]["rows"][0]
    assert (row["ours_of_first"], row["theirs_of_first"]) == (0.714, 0.75)
    assert row["times_faster"] == 1.143 and row["besides"] == 1.0
    assert kept["128 experts"]["breakdown"] == {"AdamW": 1}
    assert [row["peer"] for row in kept["F: 64 fine experts"]["rows"]] == ["shipped", "tuned"]
    assert [row["peer"] for row in kept["decode, batch 8"]["rows"]] == ["tuned"]
    said = capsys.readouterr().out
    assert "automodel is left out: it is not there" in said
    assert "bf16 is left out" in said
    with pytest.raises(SystemExit):
        train_step.main(["--cases", "S", "T"])
    assert "no case begins with 'T'; there are: S: 32 wide experts" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train_step.main(["--device", "cuda"])
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


def test_a_step_is_told_by_component(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The library's products have the rows of the step, and what has products has their share."""
    breakdown, products = benchmark("breakdown"), benchmark("products")
    monkeypatch.setattr(breakdown.build, "function", breakdown.build.function)
    monkeypatch.setattr(breakdown, "keep_freed_memory", int)
    of_step, asked = products.of_step, list[Any]()

    def noted(case: Any, counts: Any) -> Any:
        asked.append(counts)
        return of_step(case, counts)

    monkeypatch.setattr(products, "of_step", noted)
    breakdown.main(["F: 64 fine experts", "--threads", "1"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(rows) == [*breakdown.COMPONENTS, breakdown.REST, breakdown.WHOLE]
    multiplied = [products.DENSE, products.EXPERTS, products.ATTENTION, breakdown.WHOLE]
    assert [name for name, row in rows.items() if row["of_own"] is not None] == multiplied
    assert len(asked) == breakdown.STEPS
    for counts in asked:  # of the one layer with experts: two choices of each of 32 tokens
        assert [(len(layer), sum(layer)) for layer in counts] == [(8, 64)]


def test_the_bytes_of_more_experts_bound_their_speed(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fine, cases = benchmark("fine_experts"), benchmark("cases").CASES
    monkeypatch.setattr(fine, "keep_freed_memory", int)
    monkeypatch.setattr(fine, "NUMBERS", 1 << 12)
    place = next(i for i, case in enumerate(cases) if case.name == "128 experts")
    cases[place] = replace(cases[place], model=replace(cases[place].model, n_routed_experts=16))
    fine.main(["--rounds", "1", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("0.0 million parameters more, 16 bytes of each at ")
    assert json.loads(lines[2])["few_ms"] > 0
    # 16 bytes of a million parameters at 8 GB/s, the best of both rounds, are 2 ms.
    rounds = [[0.007, 0.010, 0.2], [0.009, 0.018, 0.125]]
    assert fine.told(rounds, 1_000_000, 10**9) == {
        "few_ms": 8.0,
        "many_ms": 14.0,
        "ratio": 0.6,
        "gb_per_s": 8.0,
        "least_ms": 2.0,
        "more_ms": 6.0,
        "bound": 0.8,
    }


def test_the_shares_of_a_step_are_medians(benchmark: Load) -> None:
    breakdown, products = benchmark("breakdown"), benchmark("products")
    steps = [{products.DENSE: dense, breakdown.WHOLE: 4.0} for dense in (2.0, 1.0, 3.0)]
    own = [{products.DENSE: dense, breakdown.WHOLE: 3.0} for dense in (1.8, 0.6, 1.5)]
    rows = breakdown.told(steps, own, {products.DENSE: 1.0, breakdown.WHOLE: 2.4})
    assert rows == {
        products.DENSE: {"ms": 2000.0, "share": 0.5, "of_limit": 0.5, "of_own": 0.6},
        breakdown.WHOLE: {"ms": 4000.0, "share": 1.0, "of_limit": 0.6, "of_own": 0.75},
    }


def test_products_of_a_step_are_those_that_the_model_needs(benchmark: Load) -> None:
    """What the model counts, and its router; computed, of attention's, are both halves."""
    products, case = benchmark("products"), benchmark("cases").CASES[0]
    shapes = products.of_step(replace(case, length=600), [[0, 2380, 20, *5 * [0]]])
    needed = 1200 * (6 * 32 * 8 + flops_per_token(case.model, 600, False))
    assert sum(each.flop for each in shapes) == needed
    for each in shapes:
        with FlopCounterMode(display=False) as counted:
            for rows in each.rows:
                for work in each.passes(rows, torch.float32):
                    work()
        times = 2 if each.component == products.ATTENTION else 1
        assert counted.get_total_flops() == times * each.flop


def test_a_side_measures_itself(benchmark: Load) -> None:
    """What comes through the pipe, until nobody asks."""
    sides = benchmark("sides")
    case, (here, there) = replace(sides.CASES[0], repeats=2), multiprocessing.Pipe()
    for half in (False, True, None):
        here.send(half)
    losses = iter((3.0, 2.0, 1.0, 0.0))
    sides.answer(there, case, lambda: lambda: (next(losses), 0), sides.CPU)
    runs = [sides.Run(**here.recv()) for _ in range(2)]
    assert [run.first_loss for run in runs] == [3.0, 3.0]
    assert all(run.peak_bytes > run.besides_bytes and run.seconds > 0 for run in runs)


def test_the_guide_tells_what_was_measured(benchmark: Load) -> None:
    results = benchmark("results")
    guide = results.GUIDE.read_text()
    assert set(re.findall(r"table: (\w+)", guide)) == set(results.TABLES)
    assert results.written(guide, {}) == guide
    told = {"date": "2026-01-01", "machine": "one", "threads": 2, "torch": "2", "load": 0.1}
    policy = {"seconds": 1.0, "times": 1.25, "gib": 0.5}
    written = results.written(guide, {"recompute": {"S": told | {"policies": {"full": policy}}}})
    assert "| S | `full` | 1.00 | 1.25 | 0.50 |\n\n(one; threads: 2; fp32;" in written
    assert "`selective`" not in written.partition("table: recompute")[2].partition("end -->")[0]
    assert written.partition("table: recompute")[0] == guide.partition("table: recompute")[0]
    parts = {
        "AdamW": {"share": 0.05, "of_limit": 0.61, "of_own": None},
        "attention": {"share": 0.07, "of_limit": 0.4, "of_own": 0.8},
        "rest": {"share": 0.03, "of_limit": None, "of_own": None},
    }
    assert list(results.breakdown({results.CPU: {"S": told | {"breakdown": parts}}}))[2:] == [
        "| AdamW | 5%, 0.61 |",
        "| attention | 7%, 0.40, 0.80 |",
        "| rest | 3% |",
    ]


@pytest.mark.parametrize("command", ["train_step", "ablations"])
def test_arguments_are_refused_before_anything_is_measured(
    benchmark: Load, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, other = tmp_path / "damaged.json", tmp_path / "other.json"
    damaged.write_text('{"train_step": ')
    other.write_text("[]")
    for argument, value, told in (
        ("--rounds", "0", "0: a whole number of at least 1 is needed"),
        ("--threads", "two", "two: a whole number of at least 1 is needed"),
        ("--output", str(damaged), "damaged.json cannot be read: "),
        ("--output", str(other), "other.json holds no results: remove it"),
        ("--output", str(tmp_path), "cannot be read: "),
        ("--output", str(tmp_path / "none" / "x.json"), "none: no folder that can be written to"),
    ):
        with pytest.raises(SystemExit) as ended:
            benchmark(command).main([argument, value])
        assert ended.value.code == 2 and told in capsys.readouterr().err
    assert damaged.read_text() == '{"train_step": '


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("breakdown", ["small", "--threads", "0"]),
        ("weak_scaling", ["--rounds", "0"]),
        ("weak_scaling", ["--batches", "0"]),
    ],
)
def test_numbers_are_at_least_one(
    benchmark: Load, command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark(command).main(arguments)
    assert ended.value.code == 2
    assert "0: a whole number of at least 1 is needed" in capsys.readouterr().err


def test_what_was_found_of_a_case_adds_up_under_the_same_conditions(
    benchmark: Load, tmp_path: Path
) -> None:
    results, file = benchmark("results"), tmp_path / "results.json"
    told = {"date": "2026-01-01", "machine": "one", "threads": 2, "torch": "2", "load": 0.1}
    results.keep(file, "ablations", "S", told | {"without": {"a": 1}})
    results.keep(file, "ablations", "S", told | {"load": 0.2, "without": {"b": 2}})
    assert json.loads(file.read_text())["ablations"]["S"]["without"] == {"a": 1, "b": 2}
    results.keep(file, "ablations", "S", told | {"threads": 1, "without": {"c": 3}})
    assert json.loads(file.read_text())["ablations"]["S"]["without"] == {"c": 3}


def test_cases_are_kept_in_the_order_in_which_they_were_measured_last(
    benchmark: Load, tmp_path: Path
) -> None:
    results, file = benchmark("results"), tmp_path / "results.json"
    told = {"date": "2026-01-01", "machine": "one", "threads": 2, "torch": "2", "load": 0.1}
    for case in ("F", "S", "F"):
        results.keep(file, "ablations", case, told)
    assert list(json.loads(file.read_text())["ablations"]) == ["S", "F"]


def test_a_configuration_that_is_not_there_is_told_before_a_run(
    benchmark: Load, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark("loop_overhead").main(["5", "--config", "nope"])
    assert ended.value.code == 2
    assert "there is no file nope" in capsys.readouterr().err


def test_tokens_in_turn_make_no_rank_the_busiest(benchmark: Load) -> None:
    weak, cases = benchmark("weak_scaling"), benchmark("cases")
    config = replace(cases.CASES[0].model, data=DataConfig(seq_length=16), micro_batch_size=2)
    found = []
    for balanced in (False, True):
        module = weak.model(replace(config, global_batch_size=2), SingleProcess(), balanced)
        weak.steps(module, batch=2)()
        found.append([router.tokens_per_expert for router in module.model.routers().values()])
    (plain,), (in_turn,) = found
    assert in_turn.tolist() == 8 * [2 * 16 * 2 // 8] != plain.tolist()


@pytest.mark.parametrize("code", [3, -9])
def test_a_side_whose_process_ends_is_told(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    """Its pipe is closed; how it ended is known once it has been waited for."""
    sides = benchmark("sides")
    ends = "exit(3)" if code > 0 else "import os; os.kill(os.getpid(), 9)"
    (script := tmp_path / "side.py").write_text(ends)
    monkeypatch.setattr(sides, "__file__", str(script))
    told = {3: "ended with exit code 3; what it said", -9: "ended by SIGKILL. Mostly memory"}[code]
    with (
        pytest.raises(UserError, match=f"S: 32 wide experts: the process of tuned {told}"),
        sides.worker("tuned", sides.CASES[0], threads=1) as run,
    ):
        run(False)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C means something, also where a shell runs the suite in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_who_interrupts_leaves_no_process(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A side that would compute for long, and one that a fork makes."""
    sides, variants = benchmark("sides"), benchmark("variants")
    (script := tmp_path / "side.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sides, "__file__", str(script))
    monkeypatch.setattr(variants, "CONTEXT", multiprocessing.get_context("fork"))
    made: list[Any] = []
    started = sides.subprocess.Popen

    def noted(*args: Any, **settings: Any) -> Any:
        made.append(started(*args, **settings))
        return made[-1]

    monkeypatch.setattr(sides.subprocess, "Popen", noted)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), sides.worker("ours", sides.CASES[0], threads=1):
        assert os.getpgid(made[0].pid) != os.getpgid(0)  # Ctrl-C does not reach it
        raise KeyboardInterrupt
    with (
        pytest.raises(KeyboardInterrupt),
        variants.process("all", sides.CASES[0], sleep) as ask,
    ):
        assert ask("ready")
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        raise KeyboardInterrupt
    assert made[0].returncode == -9 and not multiprocessing.active_children()
    assert time.monotonic() - begin < 30


def sleep(pipe: Any, case: Any) -> None:
    """In a process, which Ctrl-C does not end."""
    os.kill(os.getpid(), signal.SIGINT)
    pipe.send(pipe.recv())
    time.sleep(60)


def test_a_process_that_ends_by_itself_is_told(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants, cases = benchmark("variants"), benchmark("cases")
    monkeypatch.setattr(variants, "CONTEXT", multiprocessing.get_context("fork"))
    with (
        pytest.raises(UserError, match="the process of 'kept memory' ended with exit code 7"),
        variants.process("'kept memory'", cases.CASES[0], end) as ask,
    ):
        ask(False)


def end(pipe: Any, case: Any) -> None:
    """In a process, before it has answered."""
    os._exit(7)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_what_has_been_kept(tmp_path: Path) -> None:
    """The command as it is called, with one case: its processes end with it."""
    file = tmp_path / "results.json"
    file.write_text('{"train_step cpu": {"S": {"rows": []}}}')
    asked = ["--cases", "decode, batch 1", "--threads", "1", "--output", str(file)]
    command = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "train_step.py"), *asked],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert command.stdout is not None
    while not command.stdout.readline().startswith("case "):  # then the sides are started
        assert command.poll() is None
    os.killpg(command.pid, signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 130 and err.strip() == "interrupted"
    assert json.loads(file.read_text()) == {"train_step cpu": {"S": {"rows": []}}}


def test_peers_that_are_not_installed_are_told(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    sides, train_step = benchmark("sides"), benchmark("train_step")
    monkeypatch.setattr(sides, "find_spec", lambda _: None)
    monkeypatch.setitem(sides.PYTHON, "automodel", tmp_path / ".venv-none/bin/python")
    assert sides.left_out() == {
        "shipped": "no transformers here; pip install transformers installs it",
        "tuned": "no transformers here; pip install transformers installs it",
        "automodel": ".venv-none has no nemo_automodel; make .venv-none/.ready installs it",
    }
    with pytest.raises(SystemExit) as ended:
        train_step.main(["--output", str(tmp_path / "x.json")])
    assert ended.value.code == 2
    assert "nobody to compare with: no transformers here; pip inst" in capsys.readouterr().err


def test_results_of_another_version_are_told(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = benchmark("results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(results, "GUIDE", tmp_path / "guide.md")
    results.GUIDE.write_text("<!-- table: recompute -->\n<!-- end -->\n")
    told = {"date": "2026-01-01", "machine": "one", "threads": 2, "torch": "2", "load": 0.1}
    older = {"recompute": {"S": told | {"policies": {"full": {"seconds": 1.0}}}}}
    for kept, why in (
        (None, "nothing has been measured; run benchmarks/train_step.py first"),
        ('{"cases": [', "results.json cannot be read: .*; remove it"),
        ('{"torch": "2.13", "cases": []}', "results.json holds no results: remove it"),
        (json.dumps(older), r"recompute has kept gives no table of recompute \(KeyError\('times'"),
    ):
        if kept is not None:
            results.RESULTS.write_text(kept)
        with pytest.raises(UserError, match=why):
            results.main()
    assert results.GUIDE.read_text() == "<!-- table: recompute -->\n<!-- end -->\n"


def test_a_machine_that_has_slowed_down_is_no_error_of_the_planner(
    benchmark: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """Three times as slow as one process was predicted: so is the layout that follows it."""
    planner = benchmark("cpu_planner")
    predictions = {1: 0.5, 2: 0.4}
    trained: list[int] = []

    def measure(_: Path, layout: list[str]) -> dict[str, float]:
        trained.append(2 if "trainer.devices=2" in layout else 1)
        return {"measured_s": 3 * predictions[trained[-1]], "measured_bytes": 2e8}

    def predicted(run: Any, _: Any) -> dict[str, float]:
        return {"predicted_s": predictions[run.trainer.devices], "predicted_bytes": 1e8}

    monkeypatch.setattr(planner, "measure", measure)
    monkeypatch.setattr(planner, "predicted", predicted)
    monkeypatch.setattr(planner, "read_machine", lambda _: None)
    file, found = tmp_path / "cpu.json", tmp_path / "found.json"
    asked = ["--calibration", str(file), "--json", str(found), "--only", "^(1 process|2, FSDP)$"]
    planner.main(asked)
    one, both, mean = capsys.readouterr().out.splitlines()
    assert trained == [1, 1, 2]
    assert "0.500 s   1.500 s  -66.7%" in one and "0.400 s   1.200 s   +0.0%" in both
    assert mean == "mean error: time 33.3%, memory 50.0%"
    planner.main([*asked, "--measured", str(found)])
    assert capsys.readouterr().out.splitlines()[-1] == mean and len(trained) == 3
