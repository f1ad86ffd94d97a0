"""``deepseek ls`` and ``rm``: how runs stand, what is deleted, and what is never."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek.commands.runs import RunState, runs_below, size_of, state_of
from deepseek.config.load import load_config
from deepseek.locks import LOCK, Lock, is_locked
from deepseek.monitoring.run_log import LogEnd
from support.forked import Forked
from support.micro_runs import MicroRuns


@pytest.fixture
def copy(micro: MicroRuns, tmp_path: Path) -> Path:
    """A copy of the finished run of 12 steps, in a folder of its own."""
    return Path(shutil.copytree(micro.folder / "run", tmp_path / "runs" / "copy"))


def written(folder: Path, rows: list[dict[str, Any]], max_steps: int = 12) -> RunState:
    """The state of a run that left these rows."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"trainer:\n  max_steps: {max_steps}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return state_of(folder, folder.name)


# -- ls --


def test_a_folder_of_runs(cli: Forked, micro: MicroRuns, copy: Path) -> None:
    shutil.copytree(micro.folder / "run", copy.parent / "more" / "lr=[1e-3,2],seed=2")
    out = cli("ls", copy.parent).assert_done().out
    lines = out.splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines) and "2 runs" in lines[-1]
    (row,) = [line.split() for line in lines if line.startswith("copy ")]
    assert row[1:3] == ["finished", "12/12"] and row[-1] == "12" and float(row[3]) > 0
    assert "lr=[1e-3,2],seed=2" in out
    told = [json.loads(line) for line in cli("ls", copy.parent, "--json").out.splitlines()]
    assert [run["name"] for run in told] == ["copy", "more/lr=[1e-3,2],seed=2"]
    first = told[0]
    assert (first["state"], first["step"], first["max_steps"]) == ("finished", 12, 12)
    assert first["checkpoint"] == 12 and first["damaged"] == []
    assert first["size"] == size_of(copy) > 10_000
    last = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    assert first["seen"] == last["time"]
    assert first["loss"] == pytest.approx(micro.rows("run")[-2]["loss"], abs=1.0)


def test_names_that_are_long_or_hostile(cli: Forked, copy: Path) -> None:
    long = "x" * 200
    shutil.copytree(copy, copy.with_name(long))
    shutil.copytree(copy, copy.with_name("red\x1b[31m[bold]"))
    ran = cli("ls", copy.parent).assert_done()
    assert "\x1b" not in ran.out and r"red\x1b[31m[bold]" in ran.out
    assert all(len(line.rstrip()) <= 80 for line in ran.out.splitlines())
    assert sum(line.split(" ")[0].count("x") for line in ran.out.splitlines()) >= 200


def test_a_run_and_a_checkpoint(cli: Forked, copy: Path, tmp_path: Path) -> None:
    """Sizes are compared at once; digests when they are asked for."""
    out = cli("ls", copy).assert_done().out
    assert [step in out for step in (" 12 ", " 8 ")] == [True, True] and out.count(" whole ") == 2
    assert cli("ls", copy / "checkpoints").out.count(" whole ") == 2
    assert cli("ls", copy, "--verify").assert_done().out.count(" sound ") == 2
    step = copy / "checkpoints" / "step_00000012"
    shard = step / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert cli("ls", copy).out.count(" whole ") == 2
    out = cli("ls", copy, "--verify").out
    assert out.count(" sound ") == 1 and "damaged" in out
    assert "damaged" in cli("ls", step, "--verify").assert_done().out
    (told,) = map(json.loads, cli("ls", step, "--json").assert_done().out.splitlines())
    assert told["step"] == 12 and told["problem"] is None and not told["verified"]
    assert state_of(copy, "copy", verify=True).damaged == [12]
    assert state_of(copy, "copy", verify=True).checkpoint == 8
    for path in ("nowhere", tmp_path / "nowhere", copy / "config.yaml", copy / "tokenizer"):
        cli("ls", path).assert_refused("is no run folder")
    cli("ls", "--verify").assert_refused("--verify would be ignored without a folder")


def test_states(tmp_path: Path) -> None:
    now = time.time()
    begun = {"event": "started", "step": 0, "time": now - 1000}
    step = {"step": 5, "loss": 2.5, "time": now - 900}
    stop = {"event": "stopped", "step": 5, "time": now - 890}
    run = written(tmp_path / "a", [begun, step])
    assert (run.state, run.step, run.loss, run.seen) == ("interrupted", 5, 2.5, now - 900)
    for reason in ("SIGTERM", "a signal to another rank", "KeyboardInterrupt", "SIGUSR1: x"):
        run = written(tmp_path / "b", [begun, step, stop | {"reason": reason}])
        assert (run.state, run.reason) == ("stopped", reason)
    run = written(tmp_path / "c", [begun, step, stop | {"reason": "UserError: no disk"}])
    assert (run.state, run.reason) == ("failed", "UserError: no disk")
    again = {"event": "resumed", "step": 5, "time": now - 100}
    assert written(tmp_path / "d", [step, stop | {"reason": "SIGTERM"}, again]).state == (
        "interrupted"
    )
    assert written(tmp_path / "e", [begun, step | {"step": 12}]).state == "finished"
    assert written(tmp_path / "f", [begun, step | {"time": now}]).state == "running"
    run = written(tmp_path / "g", [])
    assert (run.state, run.step, run.loss, run.checkpoint) == ("interrupted", None, None, None)
    run = written(tmp_path / "h", [step | {"loss": "NaN"}, {"step": 5, "val_loss": 9.0}])
    assert (run.step, run.loss) == (5, None)


def test_the_lock_says_what_runs(tmp_path: Path) -> None:
    row = {"step": 5, "loss": 2.5, "time": time.time()}
    lock = Lock(tmp_path / LOCK)
    assert is_locked(tmp_path / LOCK)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    held = Lock(tmp_path / "run" / "checkpoints" / LOCK)
    assert written(tmp_path / "run", [row | {"time": 1.0}]).state == "running"
    held.release()
    assert written(tmp_path / "run", [row]).state == "interrupted"
    lock.release()
    assert not is_locked(tmp_path / LOCK) and not is_locked(tmp_path / "nowhere")
    # What the dead have signed, here and, where there are no locks, elsewhere.
    (tmp_path / LOCK).write_text(f"999999999\n{socket.gethostname()}\n")
    assert not is_locked(tmp_path / LOCK)
    (tmp_path / f"{LOCK}.held").write_text("1\nanother-machine\n")
    assert is_locked(tmp_path / LOCK)


def test_the_end_of_a_long_or_damaged_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert LogEnd.read(path) == LogEnd()
    rows = [json.dumps({"step": 1, "loss": 3.5, "time": 7.0})]
    rows += [json.dumps({"step": 2, "event": "alarm", "text": "x" * 90, "time": 8.0})] * 9000
    path.write_text("\n".join([*rows, "no row", '{"step": 3, "loss": 1.0']))
    assert LogEnd.read(path) == LogEnd(1, 3.5, 8.0, None)
    path.write_bytes(b"\xff" * 200_000)
    assert LogEnd.read(path) == LogEnd()


def test_what_is_listed_while_it_changes(copy: Path) -> None:
    """Half-written, half-deleted and set-aside checkpoints, a log that is cut, a broken config."""
    steps = copy / "checkpoints"
    (steps / ".tmp-1").mkdir()
    shutil.copytree(steps / "step_00000012", steps / ".trash-1")
    shutil.copytree(steps / "step_00000012", steps / "set_aside_1_step_00000012")
    (steps / "step_00000012" / "state.json").unlink()
    (copy / "config.yaml").write_text("trainer: {max_steps: [")
    run = state_of(copy, "copy")
    assert (run.checkpoint, run.damaged, run.max_steps) == (8, [12], None)
    for path in steps.glob("step_*"):
        (path / "manifest.json").unlink()
    assert state_of(copy, "copy").checkpoint is None
    shutil.rmtree(steps)
    assert list(runs_below(copy.parent)) == [copy]
    assert state_of(copy, "copy").step == 12


def test_links_are_not_walked_in_circles(copy: Path, tmp_path: Path) -> None:
    (copy.parent / "again").symlink_to(copy.parent)
    (copy.parent / "linked").symlink_to(copy)
    assert [run.name for run in runs_below(copy.parent)] == ["copy", "linked"]
    before = size_of(copy)
    (copy / "data").symlink_to(tmp_path)
    assert size_of(copy) - before < 200


def test_imported_weights_have_no_log(copy: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    (copy / "checkpoints" / LOCK).unlink(missing_ok=True)
    assert state_of(copy, "copy").state == "no log"


# -- rm --


def test_rm_of_runs(cli: Forked, micro: MicroRuns, copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copy, copy.with_name("other")))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    (copy / "data").symlink_to(outside)
    (copy / "checkpoints" / "elsewhere").symlink_to(outside)
    ran = cli("rm", copy)
    ran.assert_refused("asks first", "add --yes")
    assert copy.exists()
    ran = cli("rm", copy, other, "--yes").assert_done()
    assert (
        "freed" in ran.out and "4.5 MB" in ran.out and "what they point to stays: data" in ran.out
    )
    assert list(copy.parent.iterdir()) == [] and (outside / "kept").exists()


def test_rm_of_checkpoints(cli: Forked, copy: Path) -> None:
    steps = copy / "checkpoints"
    cli("rm", steps / "step_00000012", "-y").assert_done()
    assert [path.name for path in steps.glob("*step*")] == ["step_00000008"]
    assert not list(steps.glob(".trash*"))
    (steps / "step_00000008" / "manifest.json").unlink()  # damaged ones too
    ran = cli("rm", steps / "step_00000008", "-y").assert_done()
    assert "the only one of its run" in ran.out
    assert "holds no checkpoint yet" in cli("generate", copy).err


def test_rm_of_checkpoints_behind_a_link(cli: Forked, copy: Path, tmp_path: Path) -> None:
    """A run whose checkpoints lie on another disk: the link goes, they stay."""
    disk = Path(shutil.move(copy / "checkpoints", tmp_path / "disk"))
    (copy / "checkpoints").symlink_to(disk)
    assert "12" in cli("ls", copy).assert_done().out
    ran = cli("rm", copy, "--yes").assert_done()
    assert "checkpoints" in ran.out and not copy.exists() and (disk / "step_00000012").is_dir()


def test_rm_refuses(cli: Forked, copy: Path, tmp_path: Path) -> None:
    refused = "is neither a run folder nor a checkpoint"
    for path in ("nowhere", tmp_path, copy / "tokenizer", copy / "config.yaml"):
        cli("rm", path, "--yes").assert_refused(refused)
    cli("rm", copy.parent, "--yes").assert_refused(refused, "it holds 1 run: name it")
    (tmp_path / "project" / "checkpoints").mkdir(parents=True)  # some other program's
    (tmp_path / "project" / "main.py").touch()
    cli("rm", tmp_path / "project", "--yes").assert_refused(refused)
    (tmp_path / "link").symlink_to(copy)
    cli("rm", tmp_path / "link", "--yes").assert_refused("is a link; give", str(copy))
    cli("rm", copy, "--yes", cwd=copy / "tokenizer").assert_refused("the folder you are in")
    cli("rm").assert_refused("Missing argument")
    # Nothing is deleted if one of several is refused.
    cli("rm", copy, "nowhere", "--yes").assert_refused(refused)
    assert (copy / "checkpoints" / "step_00000012").is_dir()


def test_rm_refuses_what_runs_or_is_read(cli: Forked, copy: Path) -> None:
    from deepseek.checkpoint.checkpoint import Checkpoint

    held = Lock(copy / "checkpoints" / LOCK)
    step = copy / "checkpoints" / "step_00000012"
    for path in (copy, step):
        cli("rm", path, "--yes").assert_refused("is running", "stop it first")
    held.release()
    reader = Checkpoint.open(step)
    cli("rm", step, "--yes").assert_refused("is being read")
    reader.release()
    cli("rm", step, "--yes").assert_done()


def test_a_running_run_is_listed_and_not_deleted(micro: MicroRuns) -> None:
    run = micro.start("listed", "trainer.max_steps=100000")
    try:
        run.wait_for("step     20")
        (told,) = [
            json.loads(line)
            for line in micro.cli("ls", ".", "--json").assert_done().out.splitlines()
            if '"listed"' in line
        ]
        assert told["state"] == "running" and told["step"] >= 20 and told["damaged"] == []
        micro.cli("rm", "listed", "--yes").assert_refused("is running")
    finally:
        run.signal(signal.SIGKILL)
        run.wait()
    assert state_of(micro.folder / "listed", "listed").state == "interrupted"
    micro.cli("rm", "listed", "--yes").assert_done()
    assert not (micro.folder / "listed").exists()


# -- cp --


@pytest.mark.parametrize("stem", ["mine", "2 runs", "007", "yes", "a: b"])
def test_cp_names_the_run_after_its_file(cli: Forked, tmp_path: Path, stem: str) -> None:
    target = tmp_path / f"{stem}.yaml"
    cli("cp", "deepseek_v3_tiny", target).assert_done()
    assert load_config(str(target)).name == stem
    cli("cp", target, tmp_path / "again.yaml").assert_done()
    assert load_config(str(tmp_path / "again.yaml")).name == "again"
    text = (tmp_path / "again.yaml").read_text()
    assert text.count("\nname:") == 1 and "# str: name of the run" in text


def test_rm_leaves_a_run_that_can_be_removed_again(copy: Path, monkeypatch: Any) -> None:
    """Whatever file the removal is cut short at."""
    from deepseek.commands import runs

    entry, seen = runs._remove_entry, []

    def until(path: Path) -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(path)
        entry(path)

    monkeypatch.setattr(runs, "_remove_entry", until)
    with pytest.raises(KeyboardInterrupt):
        runs.remove([copy], yes=True)
    assert runs.is_run(copy) and not os.path.exists(seen[0])
    monkeypatch.setattr(runs, "_remove_entry", entry)
    runs.remove([copy], yes=True)
    assert not copy.exists()
