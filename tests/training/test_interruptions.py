"""A run ended at the worst moments, then continued, leaves what the uninterrupted one leaves."""

import json
import re
import signal
from typing import Any

import pytest

from support.micro_runs import MicroRuns

framework = pytest.mark.framework  # what its loop calls, and when

# The process kills itself before the n-th of the calls named, at or after step 4, when a log row, a
# validation of two batches and a checkpoint follow each other.
KILL_AT = """
import os, signal
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.training.step import DeepSeekModel
from deepseek.monitoring.record.metrics_log import MetricsLog
calls = []
def deadly(owner, name, killed_after=False):
    call = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if started:
            calls.append(name)
            if len(calls) == {n} and not killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
        result = call(*args, **kwargs)
        if len(calls) == {n} and killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)
started = []
deadly(MetricsLog, "write")
deadly(DeepSeekModel, "validation_step")
deadly(CheckpointManager, "save")
step = DeepSeekModel.training_step
def training_step(self, batch, batch_idx):
    if self.finished_steps == 3:
        started.append(True)
    return step(self, batch, batch_idx)
DeepSeekModel.training_step = training_step
"""
ORDER = ["write", "validation_step", "validation_step", "write", "save", "write", "write"]
"""The row of step 4, its validation, the validation's row, the checkpoint, its event, the row of
step 5."""

SIGNAL_AT = """
import os, signal
from deepseek.training.step import DeepSeekModel
def signalling(call):
    def wrapped(self, *args, **kwargs):
        if self.finished_steps == {finished}:
            for number in {signals}:
                os.kill(os.getpid(), number)
        return call(self, *args, **kwargs)
    return wrapped
DeepSeekModel.{name} = signalling(DeepSeekModel.{name})
"""


def events(micro: MicroRuns, name: str) -> list[dict[str, Any]]:
    """Of the log, without their times."""
    lines = (micro.folder / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if '"event"' in line]
    return [{k: v for k, v in row.items() if k not in ("time", "seconds")} for row in rows]


def terminate_at(name: str, finished: int) -> str:
    return SIGNAL_AT.format(name=name, finished=finished, signals="[15]")


@pytest.mark.parametrize(
    "n",
    [
        3,
        pytest.param(5, marks=framework),
        7,
        *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 2, 4, 6)),
    ],
)
def test_a_kill_between_log_validation_and_checkpoint_loses_nothing(
    micro: MicroRuns, whole: str, n: int
) -> None:
    name = f"killed{n}"
    assert micro.train(name, before=KILL_AT.format(n=n)).code == -signal.SIGKILL
    saved = "save" in ORDER[: n - 1]
    assert micro.steps(name) == ([4] if saved else [])
    again = micro.train(name).assert_done()
    assert ("resumed from" in again.out) == saved
    assert micro.differences(whole, name) == []


def test_the_moments_of_the_kills_are_those_named(micro: MicroRuns) -> None:
    log = KILL_AT.format(n=0) + "import atexit; atexit._clear()\n"
    watch = "import os; _exit = os._exit\n"
    watch += "def leave(code): print('CALLS', *calls[:7], flush=True); _exit(code)\n"
    ran = micro.train("watched", before=log + watch + "os._exit = leave\n").assert_done()
    assert ran.out.splitlines()[-1].split() == ["CALLS", *ORDER]


def test_a_line_cut_short_by_a_kill_is_dropped(micro: MicroRuns, whole: str) -> None:
    micro.train("cut", before=KILL_AT.format(n=6))
    log = micro.folder / "cut" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 5, "loss": 5.')
    micro.train("cut").assert_done()
    assert [json.loads(line) for line in log.read_text().splitlines()]  # every line is whole
    assert micro.differences(whole, "cut") == []


@framework
@pytest.mark.parametrize(
    ("hook", "finished", "saved"),
    [
        # between two validations: none is added
        pytest.param("training_step", 4, 5, marks=pytest.mark.nightly),
        ("training_step", 3, 4),  # where a validation is due: it takes place
        ("on_validation_epoch_start", 4, 5),  # in a validation: it ends first, and one step more
        ("on_validation_epoch_start", 12, 12),  # after the last step
    ],
)
def test_asked_to_stop_it_validates_where_the_whole_run_does(
    micro: MicroRuns, whole: str, hook: str, finished: int, saved: int
) -> None:
    name = f"terminated_{hook}_{finished}"
    never = "exp_manager.checkpoint_callback_params.every_n_train_steps=0"
    code = terminate_at(hook, finished)
    ran = micro.train(name, never, before=code)
    assert ran.code == (143 if saved < 12 else 0), ran.err
    assert "SIGTERM: saving a checkpoint after this step" in ran.out
    assert micro.steps(name) == [saved]
    until = [row for row in micro.rows(whole) if row["step"] <= saved]
    assert micro.rows(name) == until
    if saved < 12:
        assert f"stopped at step {saved} of 12; run the same command again to go on" in ran.out
        again = micro.train(name).assert_done().out
        assert f"at step {saved}" in again
    assert micro.differences(whole, name) == []


def test_a_stop_where_a_validation_is_due_saves_first(micro: MicroRuns) -> None:
    code = terminate_at("training_step", 3)
    code += KILL_AT.format(n=3)  # after row and checkpoint: the first batch of the validation
    assert micro.train("preempted", before=code).code == -signal.SIGKILL
    assert micro.steps("preempted") == [4]


@framework
def test_a_second_signal_stops_at_once(micro: MicroRuns) -> None:
    twice = SIGNAL_AT.format(name="training_step", finished=5, signals="[2, 2]")
    ran = micro.train("twice", before=twice)
    assert ran.code == 130 and "Traceback" not in ran.err
    assert micro.steps("twice") == [4]
    assert events(micro, "twice")[-1]["reason"].startswith("SIGINT, a second one")


def test_signals_of_one_moment_are_one_request(micro: MicroRuns) -> None:
    """Slurm and torchrun both send SIGTERM; a Ctrl-C comes with others."""
    both = SIGNAL_AT.format(name="training_step", finished=5, signals="[15, 15, 2]")
    assert micro.train("one_moment", before=both).code == 143
    assert micro.steps("one_moment") == [4, 6]


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_every_signal_saves_and_says_so(micro: MicroRuns, whole: str, name: str) -> None:
    number = getattr(signal, name)
    code = SIGNAL_AT.format(name="training_step", finished=5, signals=[int(number)])
    ran = micro.train(name, before=code)
    assert ran.code == 128 + number and "Traceback" not in ran.err
    assert f"{name}: saving a checkpoint after this step, then stopping" in ran.out
    assert micro.steps(name) == [4, 6]
    assert events(micro, name)[-1] == {"event": "stopped", "step": 6, "reason": name}
    if name == "SIGHUP":
        micro.train(name).assert_done()
        assert micro.differences(whole, name) == []


def test_what_nohup_ignores_stays_ignored(micro: MicroRuns) -> None:
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += SIGNAL_AT.format(name="training_step", finished=5, signals="[1]")
    micro.train("nohup", "trainer.max_steps=7", before=code).assert_done()


@framework
def test_without_checkpoints_a_signal_ends_the_run_too(micro: MicroRuns) -> None:
    code = terminate_at("training_step", 2)
    ran = micro.train("none", "exp_manager.create_checkpoint_callback=false", before=code)
    assert ran.code == 143 and "ending without a checkpoint after this step" in ran.out
    assert "stopped at step 3 of 12; nothing is saved, as exp_manager.create" in ran.out
    assert events(micro, "none")[-1]["reason"] == "SIGTERM"


@pytest.mark.parametrize("stream", [1, 2])
def test_when_nobody_reads_the_output_it_saves_and_ends(
    micro: MicroRuns, whole: str, stream: int
) -> None:
    code = f"""
import os, signal
from deepseek.training.step import DeepSeekModel
from deepseek.console import complain
def step(self, *args, call=DeepSeekModel.training_step):
    if self.finished_steps == 5:
        read, write = os.pipe()
        os.dup2(write, {stream})
        os.close(read), os.close(write)
        complain("x")
    return call(self, *args)
DeepSeekModel.training_step = step
"""
    name = f"closed_{stream}"
    ran = micro.train(name, "trainer.log_every_n_steps=1", before=code)
    assert ran.code == 141 and "Traceback" not in ran.err
    saved = 6 if stream == 2 else 7  # of step 6 it wanted to tell
    assert micro.steps(name) == [4, saved]
    assert events(micro, name)[-1]["reason"] == "SIGPIPE: nobody reads the output"
    micro.train(name).assert_done()
    assert micro.differences(whole, name) == []


def test_output_to_a_full_disk_does_not_end_the_run(micro: MicroRuns) -> None:
    code = "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
    begun = "from deepseek.training.step import DeepSeekModel as M\n"
    begun += "def start(self, call=M.train_dataloader):\n"
    begun += "".join(f"    {line}\n" for line in code.splitlines())
    begun += "    return call(self)\nM.train_dataloader = start\n"
    ran = micro.train("full_output", "trainer.max_steps=3", before=begun)
    assert "standard output: No space left on device; the run goes on without it" in ran.err
    assert micro.steps("full_output") == [3]
    for words in (["ls"], ["cat", "deepseek_v3_tiny"]):  # by rich, and by print
        micro.cli(*words, before=code).assert_refused("standard output", "No space left on device")


MOMENTS = {
    "start": ("deepseek.commands.fit", "open_data", 0, None),
    "step": ("deepseek.training.step.DeepSeekModel", "training_step", 6, 6),
    "validation": ("deepseek.training.step.DeepSeekModel", "on_validation_epoch_start", 1, 5),
    "saving": ("deepseek.checkpoint.manager.CheckpointManager", "save", 1, 5),
    "report": ("deepseek.commands.train", "write_report", 1, 12),
}
"""Where a call is made, its name, the how-maniest call the end comes with (0: the first), and the
step that the newest checkpoint must then be of."""
SIGNALS = ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "closed output"]
END_AT = """
import importlib, os, signal
where, _, last = {place!r}.rpartition(".")
try:
    owner = importlib.import_module({place!r})
except ModuleNotFoundError:
    owner = getattr(importlib.import_module(where), last)
calls, call = [], getattr(owner, {name!r})
def ending(*args, **kwargs):
    calls.append(1)
    if len(calls) == max(1, {number}):
        if {how!r} == "closed output":
            read, write = os.pipe()
            os.dup2(write, 1)
            os.close(read), os.close(write)
            from deepseek.console import say
            say("x")
        else:
            os.kill(os.getpid(), getattr(signal, {how!r}))
    return call(*args, **kwargs)
setattr(owner, {name!r}, ending)
"""


@pytest.mark.parametrize(
    ("moment", "how"),
    [
        pytest.param(
            moment,
            how,
            marks=()
            if (moment, how)
            in [("start", "SIGTERM"), ("saving", "SIGUSR1"), ("report", "closed output")]
            else pytest.mark.nightly,
        )
        for moment in MOMENTS
        for how in SIGNALS
    ],
)
def test_every_end_at_every_moment(micro: MicroRuns, whole: str, moment: str, how: str) -> None:
    """Exit code, the event in the log, the checkpoint, and that the run goes on bitwise."""
    place, call, number, saved = MOMENTS[moment]
    name = f"ended_{moment}_{how}".replace(" ", "_")
    code = END_AT.format(place=place, name=call, number=number, how=how)
    words = [*micro.words(name), *(["--report"] if moment == "report" else [])]
    ran = micro.cli(*words, before=code)
    signalled = signal.SIGPIPE if how == "closed output" else getattr(signal, how)
    assert ran.code == 128 + signalled and "Traceback" not in ran.err, (ran.code, ran.err)
    if saved is None:
        assert not (micro.folder / name).exists()  # a start that failed leaves nothing
    else:
        assert micro.steps(name)[-1] == saved
        reason = events(micro, name)[-1]["reason"]
        assert reason.startswith("complete" if saved == 12 else signalled.name), reason
    micro.train(name).assert_done()
    assert micro.differences(whole, name) == []


@framework
@pytest.mark.parametrize("settings", [["model.optim.name=muon", "model.data.num_workers=2",
                                       "model.optim.qk_clip_threshold=1e-3",
                                       "model.rampup_batch_size=[2,2,11]",
                                       "model.data.isolate_documents=true",
                                       "model.data.fim_rate=0.5"],
                                      ["model.activations_checkpoint_granularity=full",
                                       "trainer.precision=bf16-mixed",
                                       "model.topk_method=greedy", "model.n_group=1",
                                       "model.moe_router_bias_update_rate=0"]])  # fmt: skip
def test_other_settings_continue_bitwise_too(micro: MicroRuns, settings: list[str]) -> None:
    kind = "muon" if "muon" in settings[0] else "bf16"
    micro.train(f"{kind}_whole", *settings).assert_done()
    code = terminate_at("training_step", 6)
    micro.train(f"{kind}_stopped", *settings, before=code).assert_stopped()
    micro.train(f"{kind}_stopped", *settings).assert_done()
    assert micro.differences(f"{kind}_whole", f"{kind}_stopped") == []


@framework
def test_steps_of_checkpoints_and_validations(micro: MicroRuns) -> None:
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=3"
    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    ran = micro.train("kept", every, keep, "trainer.max_steps=10", "trainer.val_check_interval=5")
    ran.assert_done()
    assert micro.steps("kept") == [3, 6, 9, 10]
    assert [row["step"] for row in micro.rows("kept") if "val_loss" in row] == [5, 10]


def test_a_longer_schedule_is_continued_as_if_never_stopped(micro: MicroRuns, whole: str) -> None:
    sched = "model.optim.sched.max_steps=12"
    micro.train("longer", sched, "trainer.max_steps=5").assert_done()
    ran = micro.train("longer", sched).assert_done()
    assert "changed since the checkpoint: trainer.max_steps 5 -> 12" in ran.out
    assert "the schedule moves" not in ran.out
    assert micro.differences(whole, "longer") == []
    # Without it the schedule ends with the run, and extending stretches it, which is said.
    micro.train("stretched", "trainer.max_steps=5").assert_done()
    ran = micro.train("stretched").assert_done()
    moved = re.search(r"learning rate of step 6 is (\S+) instead of (\S+); (\S+) keeps", ran.out)
    assert moved and moved[3] == "model.optim.sched.max_steps=5"
    rates = [row["lr"] for row in micro.rows("stretched") if "lr" in row]
    assert rates[5:] == [row["lr"] for row in micro.rows(whole) if "lr" in row][5:]
    assert rates[4] < rates[5] == pytest.approx(float(moved[1]), rel=0.01)


DEAD_LOADER = """
import multiprocessing, os, signal
from deepseek.training.step import DeepSeekModel
def step(self, *args, call=DeepSeekModel.training_step):
    if self.finished_steps == {finished} and not os.path.exists("{once}"):
        open("{once}", "w").close()
        child = multiprocessing.active_children()[0]
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    return call(self, *args)
DeepSeekModel.training_step = step
"""


def test_a_loader_of_data_that_is_killed_begins_anew(micro: MicroRuns, whole: str) -> None:
    code = DEAD_LOADER.format(finished=7, once=micro.folder / "loader_killed")
    ran = micro.train("dead_loader", "model.data.num_workers=1", before=code).assert_done()
    assert "a process that loads data died" in ran.err and "it begins anew" in ran.err
    assert micro.differences(whole, "dead_loader") == []
