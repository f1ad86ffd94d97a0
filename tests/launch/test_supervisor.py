"""Workers that crash, are killed, give up or hang: small scripts, no training."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import deepseek
from deepseek.config.errors import UserError
from deepseek.config.processor import cores
from deepseek.launch import supervisor
from deepseek.launch.supervisor import (
    supervise,
    worker_command,
    worker_environment,
    worker_threads,
)

PRELUDE = """
import json, os, pathlib, signal, sys, time
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def note(text):
    pathlib.Path(f"{text}.{rank}.{attempt}").touch()
note("started")
def wait_for(name):
    while not pathlib.Path(name).exists():
        time.sleep(0.01)
"""
DRIVER = """
import sys
from deepseek.launch.supervisor import supervise
report = lambda text: print(text, flush=True)
sys.exit(supervise([sys.executable, "worker.py"], 2, 3, report))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Writes the worker's script; the test runs in its folder, with short times to wait."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 1.0)

    def write(body: str) -> list[str]:
        Path("worker.py").write_text(PRELUDE + body)
        return [sys.executable, "worker.py"]

    return write


def noted(text: str) -> list[str]:
    """``rank.attempt`` of those that made this note."""
    return sorted(path.name[len(text) + 1 :] for path in Path().glob(f"{text}.*"))


def start_driver() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until(met: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


Worker = Callable[[str], list[str]]


def test_workers_that_end_well(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = worker('json.dump(dict(os.environ), open(f"env.{rank}", "w"))')
    said: list[str] = []
    assert supervise(command, 3, 3, said.append) == 0
    assert said == []
    envs = [json.loads(Path(f"env.{rank}").read_text()) for rank in range(3)]
    assert [env["RANK"] for env in envs] == [env["LOCAL_RANK"] for env in envs] == ["0", "1", "2"]
    assert {env["WORLD_SIZE"] + env["LOCAL_WORLD_SIZE"] for env in envs} == {"33"}
    assert {env["MASTER_ADDR"] for env in envs} == {"127.0.0.1"}
    assert len({env["MASTER_PORT"] for env in envs}) == 1
    assert {env["OMP_NUM_THREADS"] for env in envs} == {str(max(1, cores() // 3))}


def test_the_users_number_of_threads_stays(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    command = worker('note("threads" + os.environ["OMP_NUM_THREADS"])')
    assert supervise(command, 1, 0, print) == 0
    assert noted("threads7") == ["0.0"]


@pytest.mark.parametrize("told", ["", "0", "-1", "two", "3,1", "3"])
def test_threads_that_openmp_would_not_heed_are_an_equal_share(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    threads = 3 if "3" in told else max(1, cores() // 2)
    assert worker_threads(2) == threads
    assert worker_environment(0, 2, 0, 1)["OMP_NUM_THREADS"] == str(threads)


def test_a_killed_worker_brings_all_back_at_another_port(worker: Worker) -> None:
    command = worker(
        """
note("port" + os.environ["MASTER_PORT"])
if attempt == 0:
    wait_for("started.1.0")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
    )
    said: list[str] = []
    assert supervise(command, 2, 2, said.append) == 0
    assert said == ["rank 1 was killed by SIGKILL; all start again, restart 1 of 2"]
    assert noted("started") == ["0.0", "0.1", "1.0", "1.1"]
    ports = {path.name.split(".")[0]: path.name[-1] for path in Path().glob("port*")}
    assert sorted(ports.values()) == ["0", "1"]


def test_the_others_may_ignore_sigterm(worker: Worker) -> None:
    command = worker(
        """
if rank == 0:
    signal.signal(signal.SIGTERM, lambda *_: note("told"))
    note("deaf")
    while attempt == 0:
        time.sleep(0.1)
elif attempt == 0:
    wait_for("deaf.0.0")
    sys.exit(7)
"""
    )
    said: list[str] = []
    assert supervise(command, 2, 1, said.append) == 0
    deaf = "(did not answer SIGTERM: 0)"
    assert said == [f"rank 1 ended with exit code 7 {deaf}; all start again, restart 1 of 1"]
    assert noted("told") == ["0.0"]


def test_a_stopped_worker_hears_that_it_is_to_end(worker: Worker) -> None:
    command = worker(
        """
if attempt == 0 and rank == 0:
    note("stops")
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
elif attempt == 0:
    wait_for("stops.0.0")
    sys.exit(75)
"""
    )
    said: list[str] = []
    assert supervise(command, 2, 1, said.append) == 0
    assert said == ["rank 1 lost contact with another rank; all start again, restart 1 of 1"]


def test_a_worker_that_torch_aborts_points_to_its_record(worker: Worker) -> None:
    said: list[str] = []
    assert supervise(worker("os.kill(os.getpid(), signal.SIGABRT)"), 1, 0, said.append) == 1
    assert "SIGABRT, as torch does when a collective of NCCL times out" in said[0]
    assert "flight_recorder in the run folder" in said[0]


LOST_AT_THE_END = [
    # rank 0, with nothing left to do, and with something; another rank
    ("if rank == 1: os.kill(os.getpid(), signal.SIGABRT)", 1, False),
    ("if rank == 0: os.kill(os.getpid(), signal.SIGKILL)", 0, True),
    ("sys.exit(75 if rank else 1)", 0, True),
    ("if rank == 1: sys.exit(7)\ntime.sleep(60)", 1, True),
]


@pytest.mark.parametrize(("ending", "rank", "left"), LOST_AT_THE_END)
def test_a_rank_lost_after_the_last_step_is_no_reason_to_start_again(
    worker: Worker, ending: str, rank: int, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rank, by whatever end, in whatever order; what rank 0 has not done is done."""
    monkeypatch.setattr(supervisor, "END_SECONDS", 2)
    said: list[str] = []
    concluded: list[str] = []
    command = worker(f"note('saved')\n{ending}")
    code = supervise(
        command,
        2,
        3,
        said.append,
        progress=lambda: len(noted("saved")),
        complete=lambda: len(noted("saved")) == 2,
        conclude=lambda: concluded.append("sample"),
    )
    assert code == 0 and noted("started") == ["0.0", "1.0"]
    (told,) = said
    assert told.startswith(f"rank {rank} ")
    assert told.endswith(", when the run was complete: nothing is lost")
    assert concluded == ["sample"] * left


def test_rank_0_may_end_what_follows_the_last_step(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank is lost meanwhile: nothing is shown twice."""
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 0)
    said: list[str] = []
    concluded: list[str] = []
    command = worker("if rank == 1: sys.exit(7)\ntime.sleep(1)")
    shown = dict(complete=lambda: True, conclude=lambda: concluded.append("sample"))
    assert supervise(command, 2, 3, said.append, **shown) == 0
    assert said[0].endswith(", when the run was complete: nothing is lost") and not concluded


def test_a_rank_lost_before_the_last_step_is_one(worker: Worker) -> None:
    said: list[str] = []
    command = worker("if rank == 1 and attempt == 0: os.kill(os.getpid(), signal.SIGABRT)\n"
                     "if attempt == 0: time.sleep(60)")  # fmt: skip
    assert supervise(command, 2, 1, said.append, complete=lambda: False) == 0
    assert "all start again, restart 1 of 1" in said[0] and len(noted("started")) == 4


def test_a_rank_that_hangs_after_rank_0_has_ended_well_is_ended(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.5)
    said: list[str] = []
    command = worker("if rank:\n    note('late')\n    time.sleep(60)\nwait_for('late.1.0')")
    assert supervise(command, 2, 3, said.append, complete=lambda: False) == 0
    assert said == ["rank 1 still ran, 0.5 s after rank 0: ended, nothing is lost"]
    assert noted("started") == ["0.0", "1.0"]


def test_restarts_are_used_up(worker: Worker) -> None:
    said: list[str] = []
    command = worker("if rank: os.kill(os.getpid(), signal.SIGSEGV)")
    assert supervise(command, 2, 2, said.append) == 1
    assert noted("started") == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert said[-1].startswith("rank 1 was killed by SIGSEGV; restarts are used up (2): stopping.")
    assert "The newest checkpoint is kept; the same command goes on from it" in said[-1]


def test_an_error_that_strikes_twice_without_progress_is_not_repeated(worker: Worker) -> None:
    said: list[str] = []
    command = worker("sys.exit(1)")
    assert supervise(command, 1, 5, said.append) == 1
    assert noted("started") == ["0.0", "0.1"]
    assert "exit code 1; the same happened before, without progress: stopping" in said[-1]


def test_an_error_after_progress_is_a_new_one(worker: Worker) -> None:
    said: list[str] = []
    command = worker("sys.exit(1)")
    assert supervise(command, 1, 3, said.append, progress=lambda: len(noted("started"))) == 1
    assert len(noted("started")) == 4


def test_an_error_of_the_user_is_not_repeated(worker: Worker) -> None:
    said: list[str] = []
    command = worker("if rank == 0:\n    wait_for('started.1.0')\n    sys.exit(2)\ntime.sleep(60)")
    assert supervise(command, 2, 3, said.append) == 2
    assert said == [] and noted("started") == ["0.0", "1.0"]


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(2)"])
def test_the_cause_is_not_the_rank_that_lost_contact(worker: Worker, ending: str) -> None:
    command = worker(
        f"""
if attempt == 1: sys.exit(0)
if rank == 0: sys.exit(75)
time.sleep(0.3)
{ending}
"""
    )
    said: list[str] = []
    code = supervise(command, 2, 1, said.append)
    if "exit" in ending:
        assert (code, said) == (2, [])
    else:
        assert (code, said) == (
            0,
            ["rank 1 was killed by SIGKILL; all start again, restart 1 of 1"],
        )


def test_what_a_worker_started_ends_with_it(worker: Worker) -> None:
    command = worker(
        """
import subprocess
child = subprocess.Popen(["sleep", "60"])
pathlib.Path(f"child.{child.pid}").touch()
if attempt == 0: os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    assert supervise(command, 1, 1, lambda text: None) == 0
    pids = [int(path.suffix[1:]) for path in Path().glob("child.*")]
    assert len(pids) == 2
    wait_until(lambda: not any(map(running, pids)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_waited_for(worker: Worker, number: int) -> None:
    worker(
        """
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: (note(f"told{number}"), told.append(number)))
told = []
note("ready")
while not told:
    time.sleep(0.01)
time.sleep(0.3)
note("saved")
sys.exit(len(told) - 1)
"""
    )
    driver = start_driver()
    wait_until(lambda: len(noted("ready")) == 2)
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=20)
    assert (driver.returncode, out) == (0, "")
    assert noted(f"told{int(number)}") == noted("saved") == ["0.0", "1.0"]


def test_a_second_signal_kills(worker: Worker) -> None:
    worker("signal.signal(signal.SIGINT, lambda *_: note('told'))\nnote('ready')\nwait_for('x')")
    driver = start_driver()
    wait_until(lambda: len(noted("ready")) == 2)
    driver.send_signal(signal.SIGINT)
    wait_until(lambda: len(noted("told")) == 2)
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=20)
    assert (driver.returncode, out) == (128 + signal.SIGINT, "")


def test_workers_that_obey_a_signal_of_their_own_are_not_started_again(worker: Worker) -> None:
    worker("time.sleep(0.2 * int(os.environ['RANK']))\nsys.exit(128 + signal.SIGUSR1)")
    driver = start_driver()
    out, _ = driver.communicate(timeout=20)
    assert (driver.returncode, out) == (128 + signal.SIGUSR1, "")
    assert noted("started") == ["0.0", "1.0"]


def test_workers_that_die_of_the_signal_are_not_started_again(worker: Worker) -> None:
    worker("note('ready')\nwait_for('x')")
    driver = start_driver()
    wait_until(lambda: len(noted("ready")) == 2)
    driver.terminate()
    out, _ = driver.communicate(timeout=20)
    assert (driver.returncode, out) == (128 + signal.SIGTERM, "")
    assert noted("started") == ["0.0", "1.0"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel for it")
def test_a_killed_supervisor_leaves_no_orphans(worker: Worker) -> None:
    worker(
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "pathlib.Path(f'pid.{os.getpid()}').touch()\ntime.sleep(60)"
    )
    driver = start_driver()
    wait_until(lambda: len(noted("pid")) == 2)
    pids = [int(pid) for pid in noted("pid")]
    assert all(map(running, pids))
    driver.kill()
    driver.communicate()
    wait_until(lambda: not any(map(running, pids)))


def test_handlers_are_given_back(worker: Worker) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert supervise(worker(""), 1, 0, print) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_command_line_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        __spec__ = None

    monkeypatch.setitem(sys.modules, "__main__", Module)  # type: ignore[arg-type]
    python = sys.executable
    command = ["train", "a.b=c"]
    assert worker_command(["/usr/bin/deepseek", *command]) == [python, "-m", "deepseek", *command]
    script = tmp_path / "train_deepseek.py"
    script.touch()
    assert worker_command([str(script), "x=1"]) == [python, str(script), "x=1"]
    for program in ("", "-c"):
        with pytest.raises(UserError, match="put the code into a script, or start it with torch"):
            worker_command([program])

    class Spec:
        name = "deepseek.__main__"

    monkeypatch.setattr(Module, "__spec__", Spec)
    here = str(Path(deepseek.__file__).with_name("__main__.py"))
    assert worker_command([here, *command]) == [python, "-m", "deepseek", *command]
    monkeypatch.setattr(Spec, "name", "my.training")
    assert worker_command(["/my/training.py", "1"]) == [python, "-m", "my.training", "1"]
