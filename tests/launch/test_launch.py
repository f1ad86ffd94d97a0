"""``deepseek launch``: the job it writes, run under a false ``srun``; what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.config import ConfigError, UserError, load_config
from deepseek.launch.slurm import JobSettings, launch
from support.launchers import arguments_of_srun

AWKWARD = [
    'name=it\'s a "run" of $HOME `now` 100%',
    "model.data.cache_dir=some folder/with 'quotes' & more; exit 1",
    "exp_manager.exp_dir=a\\b not#a comment* ~",
]


def written(tmp_path: Path, *overrides: str, **settings: str) -> Path:
    path = tmp_path / "a job.sbatch"
    launch("deepseek_v3_32gpu", overrides, JobSettings(**settings), slurm=True, output=path)
    return path


def options(script: str) -> dict[str, str]:
    """The ``#SBATCH`` lines; Slurm stops reading them at the first command."""
    head = script.partition("\nset ")[0]
    assert script.count("#SBATCH") == head.count("#SBATCH")
    found = re.findall(r"(?m)^#SBATCH --([a-z-]+)(?:=(.*))?$", head)
    assert len(found) == len(dict(found)) == head.count("#SBATCH")
    return dict(found)


def test_the_job_is_shell_and_asks_for_the_processes(tmp_path: Path) -> None:
    path = written(tmp_path, time="1-12:00:00", partition="gpu", account="lab", job_name="v3")
    subprocess.run(["bash", "-n", str(path)], check=True)
    script = path.read_text()
    assert script.startswith("#!/bin/bash\n")
    assert options(script) == {
        "job-name": "v3",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "24",
        "time": "1-12:00:00",
        "partition": "gpu",
        "account": "lab",
        "signal": "TERM@120",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
    }
    assert str(Path.home()) not in script and str(tmp_path) not in script


def test_what_is_not_given_is_left_to_the_cluster(tmp_path: Path) -> None:
    found = options(written(tmp_path, "trainer.accelerator=cpu").read_text())
    assert found["job-name"] == "deepseek_v3_32gpu"
    assert not {"time", "partition", "account", "gpus-per-node"} & found.keys()


def test_srun_gets_every_override_as_it_was_given(tmp_path: Path) -> None:
    path = written(tmp_path, *AWKWARD)
    subprocess.run(["bash", "-n", str(path)], check=True)
    given = arguments_of_srun(path, tmp_path)
    overrides = given[-len(AWKWARD) :]
    assert given == [
        *("--kill-on-bad-exit=1", "--cpus-per-task=24"),
        *("torchrun", "--nnodes", "4", "--nproc-per-node", "8"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:15077"),
        *("-m", "deepseek", "train", "--config", "deepseek_v3_32gpu", *AWKWARD),
    ]
    assert load_config("deepseek_v3_32gpu", overrides) == load_config("deepseek_v3_32gpu", AWKWARD)
    assert re.fullmatch(r"[\w.-]+", options(path.read_text())["job-name"])


def test_without_a_file_the_job_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, *AWKWARD)
    assert capsys.readouterr().out == f"wrote {path}; submit it with: sbatch '{path}'\n"
    launch("deepseek_v3_32gpu", AWKWARD, slurm=True)
    assert capsys.readouterr().out == path.read_text()


def test_the_command_line(tmp_path: Path) -> None:
    words = ["launch", "deepseek_v3_8gpu", "--slurm", "--time", "2:00:00", "--job-name", "a"]
    env = os.environ | {"COLUMNS": "200"}
    ran = subprocess.run(
        [sys.executable, "-m", "deepseek", *words, "--seed=5", "trainer.max_steps=3"],
        capture_output=True,
        text=True,
        env=env,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("--config deepseek_v3_8gpu --seed=5 trainer.max_steps=3\n")
    assert options(ran.stdout)["time"] == "2:00:00"
    ran = subprocess.run([sys.executable, "-m", "deepseek", *words[:2]], capture_output=True)
    assert ran.returncode == 2 and b"choose --slurm" in ran.stderr and b"Trace" not in ran.stderr


@pytest.mark.parametrize("time", ["3", "2:01", "0:2:1", "0-1", "1-0:0", "0-0:2:1", "1440"])
def test_times_that_slurm_reads(tmp_path: Path, time: str) -> None:
    assert options(written(tmp_path, time=time).read_text())["time"] == time


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": "soon"}, "--time 'soon' is no time limit of Slurm; write HH:MM:SS"),
        ({"time": "1:2:3:4"}, "is no time limit"),
        ({"time": "10:00\n#SBATCH --nodes=99"}, "is no time limit"),
        ({"time": "2"}, "--time 2 is 120 seconds, and the last 120 are kept for saving"),
        ({"time": "0:1:30"}, "is 90 seconds"),
        ({"time": "0-0:1"}, "is 60 seconds"),
        ({"partition": "a b"}, "--partition 'a b': a name of letters, digits"),
        ({"account": ""}, "--account ''"),
        ({"job_name": "x\n#SBATCH --nodes=99"}, "--job-name 'x"),
    ],
)
def test_settings_that_slurm_would_not_take(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        written(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_what_launch_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither was given"):
        launch("deepseek_v3_8gpu")
    with pytest.raises(UserError, match="both were given"):
        launch("deepseek_v3_8gpu", slurm=True, nemo_run=True)
    with pytest.raises(ConfigError, match="is not a multiple"):
        launch("deepseek_v3_8gpu", ["trainer.devices=3"], slurm=True)
    path = written(tmp_path)
    before = path.read_text()
    with pytest.raises(UserError, match="exists already and nothing is overwritten"):
        written(tmp_path, "seed=1")
    assert path.read_text() == before
    with pytest.raises(UserError, match="cannot write"):
        launch("deepseek_v3_8gpu", slurm=True, output=tmp_path / "no" / "file")


# -- NeMo-Run, of which a stand-in records what it is told --


def test_nemo_run_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(UserError, match="pip install nemo_run, or use --slurm"):
        launch("deepseek_v3_8gpu", settings=JobSettings(account="lab"), nemo_run=True)


def test_nemo_run_is_told_the_same_as_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    class Experiment:
        def __init__(self, name: str) -> None:
            told["name"] = name

        def __enter__(self) -> Experiment:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def add(self, task: str, executor: dict[str, Any], name: str) -> None:
            told["task"] = task
            told.update(executor)

        def run(self, detach: bool) -> None:
            told["detach"] = detach

    stand_in = SimpleNamespace(
        Experiment=Experiment,
        SlurmExecutor=lambda **fields: fields,
        Packager=lambda: "nothing",
        Script=lambda inline: inline,
    )
    monkeypatch.setitem(sys.modules, "nemo_run", stand_in)
    with pytest.raises(UserError, match="--account NAME"):
        launch("deepseek_v3_32gpu", nemo_run=True)
    assert told == {}
    settings = JobSettings(account="lab", partition="gpu", time="4:00:00")
    launch("deepseek_v3_32gpu", ["name=a b"], settings, nemo_run=True)
    assert told == {
        "name": "a_b",
        "task": 'torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$('
        'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 1q):$((15000 + SLURM_JOB_ID % 5000))" '
        "-m deepseek train --config deepseek_v3_32gpu 'name=a b'",
        "account": "lab",
        "partition": "gpu",
        "time": "4:00:00",
        "nodes": 4,
        "ntasks_per_node": 1,
        "gpus_per_node": 8,
        "signal": "TERM@120",
        "additional_parameters": {"requeue": True},
        "packager": "nothing",
        "detach": True,
    }
