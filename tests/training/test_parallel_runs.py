"""Runs in several processes, through the command line, against the same run in one process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.commands.launch import launch
from support.forked import FORK_WORKERS, Ran, Started, children, environment_for_tests
from support.launchers import (
    by_itself,
    by_slurm,
    by_torchrun,
    by_variables,
    ended,
    layout,
    log_distance,
    relative,
    tensor_distance,
)
from support.micro_runs import OF_THE_LAYOUT, MicroRuns

SAME = 1e-5
"""Relative, in fp32: sums are taken in another order. Measured: 4e-7 for rows of the log, 2e-6 for
weights and moments after 12 steps."""
EP2 = layout(2, ep=2, micro=2)
PP2 = layout(2, pp=2)
EP2_PP2 = layout(4, ep=2, pp=2)
TP2_EP2 = layout(4, tp=2, ep=2)
TP2_PP2_EP2 = layout(8, tp=2, pp=2, ep=2)
ONE = layout(1, micro=2)
FOUR_STEPS = "trainer.max_steps=4"


def assert_same_run(runs: MicroRuns, whole: str, name: str) -> None:
    assert log_distance(runs, whole, name) <= SAME
    distance, key = tensor_distance(runs, whole, name)
    assert distance <= SAME, key


def assert_one_error(ran: Ran, *parts: str) -> None:
    """Exit code 2 and one message, however many processes have it."""
    ran.assert_refused(*parts)
    assert ran.err.count("error: ") == 1, ran.err
    assert ran.err.count(parts[0]) == 1, ran.err


# -- every launcher --


@pytest.mark.framework
@pytest.mark.parametrize(
    "sizes", [EP2, pytest.param(TP2_EP2, marks=pytest.mark.nightly)], ids=["2", "4"]
)
def test_it_starts_its_processes_itself(micro: MicroRuns, whole: str, sizes: list[str]) -> None:
    name = f"itself{sizes[0]}"
    ran = by_itself(micro, name, *sizes).wait().assert_done()
    assert ran.err == ""
    assert_same_run(micro, whole, name)
    # One voice: nothing is said twice, and it is what one process says, and what the layout is.
    lines = ran.out.splitlines()
    assert len([line for line in lines if line.startswith("step  ")]) == 1 + 12 + 3
    processes, _, threads = lines[0].partition("; threads of each: ")
    assert processes == f"processes    {sizes[0][-1]}, started and watched by this one"
    assert threads == "1"
    assert len([line for line in lines if line.startswith("layout  ")]) == 1
    assert lines[-1].startswith("sample it    deepseek generate")
    again = by_itself(micro, name, *sizes).wait().assert_done()
    assert "is complete: 12 of 12 steps" in again.out and "processes" not in again.out


@pytest.fixture(scope="module")
def four_steps(micro: MicroRuns) -> str:
    """In one process, with a validation and a checkpoint at the end."""
    micro.train("four_steps", FOUR_STEPS).assert_done()
    return "four_steps"


def test_torchrun_starts_4(micro: MicroRuns, four_steps: str) -> None:
    ran = by_torchrun(micro, "torchrun", 4, *EP2_PP2, FOUR_STEPS).wait().assert_done()
    assert "DP 2, PP 2 (1F1B, 2 stages), EP 2" in ran.out
    assert_same_run(micro, four_steps, "torchrun")


@pytest.mark.parametrize(
    ("ranks", "sizes"), [(4, TP2_EP2), pytest.param(8, TP2_PP2_EP2, marks=pytest.mark.nightly)]
)
def test_ranks_of_2_nodes(micro: MicroRuns, four_steps: str, ranks: int, sizes: list[str]) -> None:
    name, nodes = f"nodes{ranks}", [f"trainer.devices={ranks // 2}", "trainer.num_nodes=2"]
    rans = ended(by_variables(micro, name, ranks, *sizes, *nodes, FOUR_STEPS, nodes=2))
    for ran in rans:
        ran.assert_done()
        assert ran.err == ""
    assert [bool(ran.out) for ran in rans] == [True] + (ranks - 1) * [False]
    assert_same_run(micro, four_steps, name)


def test_the_job_for_slurm_trains_on_2_nodes_and_survives_a_loss(
    micro: MicroRuns, whole: str, tmp_path: Path
) -> None:
    sizes = [*EP2_PP2, "trainer.devices=2", "trainer.num_nodes=2", "exp_manager.exp_dir=jobs"]
    settings = [str(word) for word in micro.words(None, *sizes) if "=" in str(word)]
    job = tmp_path / "train.sbatch"
    launch(str(micro.config), settings, targets=["slurm"], output=job)
    nodes = by_slurm(micro, job, nodes=2)
    name = "jobs/micro/version_0"
    log = micro.folder / name / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > 6)
    os.kill(children(nodes[1].pid)[1], signal.SIGKILL)
    outputs = "".join(ran.assert_done().out for ran in ended(nodes))
    assert re.search(r"resumed from .* at step [48]\b", outputs)
    assert_same_log_and_weights_after_a_loss(micro, whole, name)


def test_a_lost_rank(micro: MicroRuns, whole: str) -> None:
    started = by_itself(micro, "lost", *EP2)
    kill_rank_1(micro.folder / "lost", started.pid)
    ran = started.wait().assert_done()
    assert_came_back(micro, whole, "lost", ran.out, ran.err)


@pytest.mark.nightly
def test_real_interpreters_and_a_lost_rank(micro: MicroRuns, whole: str) -> None:
    """Nothing forked: the program as a user starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "deepseek", *map(str, micro.words("real", *EP2))],
        cwd=micro.folder,
        env=environment_for_tests(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    kill_rank_1(micro.folder / "real", process.pid)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert_came_back(micro, whole, "real", out, err)


def kill_rank_1(folder: Path, supervisor: int) -> None:
    """After 6 steps."""
    log = folder / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > 6)
    os.kill(children(supervisor)[1], signal.SIGKILL)


def assert_came_back(micro: MicroRuns, whole: str, name: str, out: str, err: str) -> None:
    assert "rank 1 was killed by SIGKILL; all start again, restart 1 of 3" in err
    assert re.search(r"resumed from .* at step [48]\b", out) and "Traceback" not in err
    assert_same_log_and_weights_after_a_loss(micro, whole, name)


def test_a_rank_that_stops_is_missed_within_the_time_of_a_step(
    micro: MicroRuns, whole: str
) -> None:
    """Not killed: nothing ends, no connection closes."""
    name = "stopped"
    log = micro.folder / name / "metrics.jsonl"
    started = by_itself(micro, name, *EP2, "trainer.step_timeout_seconds=5")
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > 6)
    os.kill(children(started.pid)[1], signal.SIGSTOP)
    ran = started.wait().assert_done()
    told = "error: contact lost with rank 1, which did not come within 5 s (trainer.coll"
    assert told in ran.err and "Traceback" not in ran.err
    assert "rank 0 lost contact with another rank; all start again, restart 1 of 3" in ran.err
    assert re.search(r"resumed from .* at step [48]\b", ran.out)
    assert_same_log_and_weights_after_a_loss(micro, whole, name)


def assert_same_log_and_weights_after_a_loss(micro: MicroRuns, whole: str, name: str) -> None:
    """Rows of repeated steps stand twice; the later one counts."""
    rows = {(row["step"], "val_loss" in row): row for row in micro.rows(name)}
    expected = {(row["step"], "val_loss" in row): row for row in micro.rows(whole)}
    assert rows.keys() == expected.keys()
    for place, row in rows.items():
        keys = row.keys() - OF_THE_LAYOUT
        assert all(relative(row[key], expected[place][key]) <= SAME for key in keys), (row, place)
    assert tensor_distance(micro, whole, name)[0] <= SAME


def wait_until(met: Callable[[], bool], seconds: float = 250.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


# -- from layout to layout --


def test_a_run_goes_on_in_other_layouts(micro: MicroRuns, whole: str) -> None:
    """1 process -> EP 2 -> PP 2 -> 1 process, three steps each."""
    never = "exp_manager.checkpoint_callback_params.every_n_train_steps=0"
    schedule = "model.optim.sched.max_steps=12"
    for number, sizes in enumerate([ONE, EP2, PP2, ONE], 1):
        steps = f"trainer.max_steps={3 * number}"
        ran = by_itself(micro, "wander", *sizes, schedule, steps, never).wait().assert_done()
        assert ("resumed from" in ran.out) == (number > 1)
        assert micro.steps("wander")[-1] == 3 * number
    assert "changed since the checkpoint: model.pipeline_model_parallel_size 2 -> 1" in ran.out
    assert_same_run(micro, whole, "wander")


# -- the run folder --


def test_all_ranks_choose_one_version(micro: MicroRuns) -> None:
    def version(*settings: str) -> str:
        places = ["exp_manager.exp_dir=versions", "model.optim.sched.max_steps=12"]
        rans = ended(by_variables(micro, None, 2, *EP2, *places, *settings))
        folders = re.findall(r"^run folder   .*/(.*)$", rans[0].assert_done().out, re.MULTILINE)
        assert len(set(folders)) == 1 and rans[1].assert_done().out == ""
        return str(folders[0])

    short, fresh = "trainer.max_steps=1", "exp_manager.resume_if_exists=false"
    assert version(short) == "version_0"
    assert version("trainer.max_steps=2") == "version_0"
    assert version(short, fresh) == "version_1"
    supervised = [*EP2, "exp_manager.exp_dir=versions", short, fresh]
    ran = by_itself(micro, None, *supervised).wait().assert_done()
    assert "versions/micro/version_2" in ran.out
    names = sorted(path.name for path in (micro.folder / "versions" / "micro").iterdir())
    assert names == ["version_0", "version_1", "version_2"]


def test_two_runs_in_one_folder(micro: MicroRuns) -> None:
    settings = [*EP2, "trainer.max_steps=100000"]
    first = by_itself(micro, "both", *settings)
    first.wait_for("step      1/")
    second = by_itself(micro, "both", *settings).wait()
    assert_one_error(second, "writes here already; wait for it or stop it")
    first.signal(signal.SIGTERM)
    first.wait().assert_stopped()
    assert micro.cli.orphans() == []


# -- what does not fit --


def test_a_layout_that_does_not_fit(micro: MicroRuns) -> None:
    three = layout(3, tp=2)
    parts = ["devices 3 x nodes 1 = 3 processes is not a multiple of tensor 2 x pipeline 1 = 2"]
    parts += ["use trainer.devices=2"]
    ran = by_itself(micro, "three", *three).wait()
    assert_one_error(ran, *parts)
    assert "processes  " not in ran.out
    first, *others = by_variables(micro, "three", 3, *three)
    assert_one_error(first.wait(), *parts)
    end(others)


def end(others: list[Started]) -> None:
    """As every launcher ends the other ranks when one has ended: they say nothing."""
    for other in others:
        other.signal(signal.SIGTERM)
        assert other.wait() == Ran(-signal.SIGTERM, "", "")


def test_torchrun_with_another_number_of_processes(micro: MicroRuns) -> None:
    ran = by_torchrun(micro, "other", 4, *EP2).wait()
    message = "torchrun started 4 processes, trainer.devices=2 x trainer.num_nodes=1 = 2"
    assert ran.code == 1  # torchrun's own, after its own report
    assert ran.err.count(f"error: {message}: set trainer.devices=4, or") == 1
    assert not (micro.folder / "other").exists()
    assert micro.cli.orphans() == []


def test_an_error_that_every_rank_finds_is_told_once(micro: MicroRuns) -> None:
    by_itself(micro, "taken", *EP2, "trainer.max_steps=2").wait().assert_done()
    fresh = "exp_manager.resume_if_exists=false"
    assert_one_error(by_itself(micro, "taken", *EP2, fresh).wait(), "already holds checkpoints")
    first, *others = by_variables(micro, "taken", 2, *EP2, fresh)
    assert_one_error(first.wait(), "already holds checkpoints")
    end(others)
    assert micro.cli.orphans() == []


# -- signals --


@pytest.mark.framework
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)]
)
def test_a_signal_to_the_supervisor(micro: MicroRuns, whole: str, number: int) -> None:
    """As in one process: a checkpoint after a whole step, and the run goes on."""
    name = f"stopped{number}"
    never = "exp_manager.checkpoint_callback_params.every_n_train_steps=0"
    slow = "from deepseek.training.step import DeepSeekModel as M; import time\n"
    slow += "step = M.training_step\n"
    slow += "def slowly(*args):\n    time.sleep(0.1)\n    return step(*args)\n"
    slow += "M.training_step = slowly\n"
    started = by_itself(micro, name, *PP2, never, before=slow)
    started.wait_for("step      3/12")
    started.signal(number)
    ran = started.wait().assert_stopped(number)
    kind = signal.Signals(number).name
    assert ran.out.count(f"{kind}: saving a checkpoint after this step, then stopping") == 1
    saved = micro.steps(name)
    assert len(saved) == 1 and 3 <= saved[0] < 12
    assert f"stopped at step {saved[0]} of 12; run the same command again to go on" in ran.out
    assert "start again" not in ran.err and micro.cli.orphans() == []
    again = by_itself(micro, name, *PP2, never).wait().assert_done()
    assert f"at step {saved[0]}" in again.out
    assert_same_run(micro, whole, name)


# -- the end --


@pytest.mark.parametrize(("rank", "place"), [(1, "leave"), (0, "_show")])
def test_a_rank_lost_when_all_is_done_starts_nothing_anew(
    micro: MicroRuns, rank: int, place: str
) -> None:
    """As its process ends, or over the sample: the last checkpoint is complete."""
    dies = f"""
import os, signal
import deepseek.commands.train as train
was = train.{place}
def dying(*args):
    if os.environ.get("RANK") == "{rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    return was(*args)
train.{place} = dying
"""
    words = [*micro.words(f"lost_in_{place}", *PP2, "trainer.max_steps=2"), "--sample"]
    ran = micro.cli.start(*words, before=dies + FORK_WORKERS).wait().assert_done()
    killed = f"rank {rank} was killed by SIGKILL, when the run was complete: nothing is lost\n"
    assert ran.err == killed and ran.out.count("layout  ") == 1
    assert ran.out.count("sample:\n") == 1 and micro.steps(f"lost_in_{place}") == [2]


@pytest.mark.parametrize(("dies_at", "resumed"), [(0, [2, 2]), (3, [2, 3])])
def test_a_rank_lost_on_the_way_back(micro: MicroRuns, dies_at: int, resumed: list[int]) -> None:
    """Before later checkpoints are set aside the run goes back again, after that it goes on.

    One of the later checkpoints is the end of the run, which is not to be taken for this one's.
    """
    name = f"back{dies_at}"
    params = "exp_manager.checkpoint_callback_params"
    settings = [*PP2, "trainer.max_steps=4", f"{params}.every_n_train_steps=1"]
    settings.append(f"{params}.save_top_k=-1")
    by_itself(micro, name, *settings).wait().assert_done()
    dies = f"""
import os, signal
import deepseek.checkpoint.callback as callback
from deepseek.training.step import DeepSeekModel
def dies_in(owner, place):
    was = getattr(owner, place)
    def dying(*args):
        steps = 0 if place == "restore" else args[0].finished_steps
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and os.environ["RANK"] == "1" and steps == {dies_at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return was(*args)
    setattr(owner, place, dying)
dies_in(callback, "restore")
dies_in(DeepSeekModel, "training_step")
"""
    again = by_itself(micro, name, *settings, "--resume-from", "2", before=dies)
    ran = again.wait().assert_done()
    assert "rank 1 was killed by SIGKILL; all start again, restart 1 of 3" in ran.err
    assert re.findall(r"at step (\d+)\n", ran.out) == [str(n) for n in resumed][dies_at == 0 :]
    left = sorted(p.name for p in (micro.folder / name / "checkpoints").iterdir())
    steps = [f"step_{n:08d}" for n in (1, 2, 3, 4)]
    assert left == [".lock", *(f"set_aside_1_{step}" for step in steps[2:]), *steps]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_rank_that_torchrun_loses_before_the_way_back(micro: MicroRuns, devices: int) -> None:
    """Nothing in the folder says yet that the run goes back; it does, after that it goes on."""
    name = f"back_before{devices}"
    params = "exp_manager.checkpoint_callback_params"
    settings = [*layout(devices), "trainer.max_steps=3", f"{params}.every_n_train_steps=1"]
    settings.append(f"{params}.save_top_k=-1")
    by_itself(micro, name, *settings).wait().assert_done()
    dies = f"""
import os, signal
import deepseek.launch.processes as processes
import deepseek.commands.fit as fit
from deepseek.training.step import DeepSeekModel
def dies_in(owner, place, attempt, ready):
    was = getattr(owner, place)
    def dying(*args, **options):
        last = os.environ["RANK"] == "{devices - 1}"
        if last and os.environ["TORCHELASTIC_RESTART_COUNT"] == attempt and ready(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return was(*args, **options)
    setattr(owner, place, dying)
if {devices} == 1:
    dies_in(fit, "chosen_folder", "0", lambda *args: True)
else:  # once rank 0 has counted the attempt
    dies_in(processes, "agreed_attempt", "0", lambda store, *_: store.wait(["attempts"]) is None)
dies_in(DeepSeekModel, "training_step", "1", lambda model, *_: model.finished_steps == 2)
"""
    words = [*settings, "--resume-from", "1"]
    ran = by_torchrun(micro, name, devices, *words, restarts=2, before=dies).wait().assert_done()
    assert re.findall(r"at step (\d+)\n", ran.out) == ["1", "2"]


@pytest.mark.framework
def test_a_sample_and_a_report_after_a_run_in_several_processes(micro: MicroRuns) -> None:
    words = [*micro.words("sampled", *EP2, "trainer.max_steps=2"), "--sample", "--report"]
    ran = micro.cli.start(*words, before=FORK_WORKERS).wait().assert_done()
    assert ran.out.count("sample:\n") == 1 and ran.out.count("report   ") == 1
    assert ran.out.split("sample:\n")[1].strip()


@pytest.mark.framework
def test_only_rank_0_writes_the_log(micro: MicroRuns, whole: str) -> None:
    """No rank but the first opens a file of the run folder, outside of its checkpoints."""
    watch = """
import sys
def opened(event, args):
    if event == "open" and "watched_" in str(args[0]) and args[1] and set("wa+x") & set(args[1]):
        if "checkpoints" not in str(args[0]):
            print("WROTE", args[0], file=sys.stderr, flush=True)
sys.addaudithook(opened)
"""
    rans = ended(by_variables(micro, "watched_ranks", 2, *EP2, before=watch))
    assert "metrics.jsonl" in rans[0].assert_done().err
    assert rans[1].assert_done().err == ""
    lines = (micro.folder / "watched_ranks" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "loss" in row and "event" not in row]
    assert steps == list(range(1, 13))
