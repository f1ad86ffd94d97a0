"""Runs that save in the background leave what other runs leave, however they end."""

import signal

import pytest

from support.micro_runs import MicroRuns

pytestmark = pytest.mark.framework

ASYNC = "exp_manager.checkpoint_callback_params.async_save=true"
EVERY_TWO = "exp_manager.checkpoint_callback_params.every_n_train_steps=2"

# The thread writes when training has gone on for a step, as the lines said show.
SLOW_WRITES = """
import threading, time
from deepseek.checkpoint import manager
from deepseek.training.step import DeepSeekModel
write, step = manager.write_shards, DeepSeekModel.training_step
trained = threading.Event()
def slow_write(*args):
    in_thread = threading.current_thread() is not threading.main_thread()
    trained.clear()
    print("writing", "in a thread" if in_thread else "at once", flush=True)
    if in_thread:
        trained.wait(60)
        time.sleep(0.1)
    written = write(*args)
    print("written", flush=True)
    return written
manager.write_shards = slow_write
def told_step(self, batch, batch_idx):
    step(self, batch, batch_idx)
    print("trained", self.finished_steps, flush=True)
    trained.set()
DeepSeekModel.training_step = told_step
"""

KILL_IN_WRITE = """
import os, signal
from deepseek.checkpoint import manager
write_in = manager.write_shards
count = 0
def deadly(*args):
    global count
    count += 1
    written = write_in(*args)
    if count == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
manager.write_shards = deadly
"""

SIGNAL_IN_STEP = """
import os
from deepseek.training.step import DeepSeekModel
inner = DeepSeekModel.training_step
def signalled(self, batch, batch_idx):
    if self.finished_steps == 2:
        os.kill(os.getpid(), 15)
    inner(self, batch, batch_idx)
DeepSeekModel.training_step = signalled
"""

FULL_DISK = """
import shutil
usage = shutil.disk_usage
from deepseek.training.step import DeepSeekModel
step = DeepSeekModel.training_step
def filling(self, batch, batch_idx):
    if self.finished_steps == 3:
        shutil.disk_usage = lambda path: type("Usage", (), {"total": 9, "used": 9, "free": 0})
    step(self, batch, batch_idx)
DeepSeekModel.training_step = filling
"""


def told(out: str) -> list[str]:
    return [s for s in out.splitlines() if s.split(" ")[0] in ("writing", "written", "trained")]


def test_training_goes_on_meanwhile_and_the_end_waits(micro: MicroRuns, whole: str) -> None:
    ran = micro.train("background", ASYNC, before=SLOW_WRITES).assert_done()
    lines = told(ran.out)
    first, done = lines.index("writing in a thread"), lines.index("written")
    assert lines[first - 1] == "trained 4" and lines[first + 1 : done]
    assert all(line.startswith("trained ") for line in lines[first + 1 : done])
    # Saved on the way after steps 4 and 8; the last step at once, after the one under way.
    assert lines.count("writing in a thread") == 2 and lines.count("written") == 3
    assert lines[-2:] == ["writing at once", "written"]
    assert micro.steps("background") == [8, 12]
    assert micro.differences(whole, "background") == []


@pytest.mark.parametrize("n", [1, 2])
def test_a_kill_in_the_middle_leaves_the_checkpoint_before(
    micro: MicroRuns, whole: str, n: int
) -> None:
    name = f"killed_in_background{n}"
    code = KILL_IN_WRITE.format(n=n)
    assert micro.train(name, ASYNC, EVERY_TWO, before=code).code == -signal.SIGKILL
    assert micro.steps(name) == list(range(2, 2 * n, 2))
    assert any((micro.folder / name / "checkpoints").glob(".tmp-*"))
    again = micro.train(name, ASYNC, EVERY_TWO).assert_done()
    assert ("at step 2" in again.out) == (n == 2)
    assert not any((micro.folder / name / "checkpoints").glob(".tmp-*"))
    assert micro.differences(whole, name) == []


def test_a_stop_waits_for_the_save_under_way(micro: MicroRuns) -> None:
    code = SLOW_WRITES + SIGNAL_IN_STEP
    ran = micro.train("stopped_in_background", ASYNC, EVERY_TWO, before=code).assert_stopped()
    assert told(ran.out) == [
        "trained 1",
        "trained 2",
        "writing in a thread",
        "trained 3",
        "written",
        "writing at once",
        "written",
    ]
    assert micro.steps("stopped_in_background") == [2, 3]


def test_a_full_disk_ends_the_run_with_the_checkpoint_before(micro: MicroRuns) -> None:
    ran = micro.train("full", ASYNC, EVERY_TWO, before=FULL_DISK)
    assert ran.code == 2
    assert "the checkpoint of step 4 needs about" in ran.err and "has 0.0 MB free" in ran.err
    assert "Traceback" not in ran.err
    assert micro.steps("full") == [2]
