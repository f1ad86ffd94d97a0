"""``deepseek launch``: the job it writes, run under a false ``srun``; what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.commands.launch import launch
from deepseek.config import ConfigError, UserError, load_config
from deepseek.config.yaml_file import read_yaml
from deepseek.launch.cluster_job import JobSettings
from support.launchers import arguments_of_srun

AWKWARD = [
    'name=it\'s a "run" of $HOME `now` 100%',
    "model.data.cache_dir=some folder/with 'quotes' & more; exit 1",
    "exp_manager.exp_dir=a\\b not#a comment* ~",
]


def written(tmp_path: Path, *overrides: str, to: str = "slurm", **settings: Any) -> Path:
    path = tmp_path / f"a job.{to}"
    launch("deepseek_v3_32gpu", overrides, JobSettings(**settings), [to], path)
    return path


def options(script: str) -> dict[str, str]:
    """The ``#SBATCH`` lines, as Slurm reads them: up to the first command, a blank ends an option
    and # the line, unless in quotes."""
    head = script.partition("\nset ")[0]
    assert script.count("#SBATCH") == head.count("#SBATCH")
    lines = [line[7:] for line in head.splitlines() if line.startswith("#SBATCH")]
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    found = [(word[2:].split("=", 1) + [""])[:2] for word in words if word.startswith("--")]
    assert len(found) == len({name for name, _ in found}) == len(lines) == len(words)
    return {name: value for name, value in found}


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
        "exclusive": "",
        "mem": "0",
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
        *("--kill-on-bad-exit=1", "--cpus-per-task=96"),
        *("torchrun", "--nnodes", "4", "--nproc-per-node", "8"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:15077"),
        *("--max-restarts", "3"),
        *("-m", "deepseek", "train", "--config", "deepseek_v3_32gpu", *AWKWARD),
    ]
    assert load_config("deepseek_v3_32gpu", overrides) == load_config("deepseek_v3_32gpu", AWKWARD)
    assert re.fullmatch(r"[\w.-]+", options(path.read_text())["job-name"])


def test_without_a_file_the_job_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, *AWKWARD)
    assert capsys.readouterr().out == f"wrote {path}; submit it with: sbatch '{path}'\n"
    launch("deepseek_v3_32gpu", AWKWARD, targets=["slurm"])
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
    assert "--config deepseek_v3_8gpu --seed=5 trainer.max_steps=3 || code" in ran.stdout
    assert options(ran.stdout)["time"] == "2:00:00"
    ran = subprocess.run([sys.executable, "-m", "deepseek", *words[:2]], capture_output=True)
    assert (
        ran.returncode == 2
        and b"choose one of --slurm" in ran.stderr
        and b"Trace" not in ran.stderr
    )


@pytest.mark.parametrize("time", ["3", "2:01", "0:2:1", "0-1", "1-0:0", "0-0:2:1", "1440"])
def test_times_that_slurm_reads(tmp_path: Path, time: str) -> None:
    assert options(written(tmp_path, time=time).read_text())["time"] == time


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": "soon"}, "--time 'soon' is no time limit of Slurm; write HH:MM:SS"),
        ({"time": "9" * 5000}, "is no time limit of Slurm"),
        ({"time": "999999999-0"}, r"is longer than 4,294,967,294 minutes, .*; leave it out"),
        ({"time": "1:2:3:4"}, "is no time limit"),
        ({"time": "10:00\n#SBATCH --nodes=99"}, "is no time limit"),
        ({"time": "2"}, "--time 2 is 120 seconds, and the last 120 are kept for saving"),
        ({"time": "0:1:30"}, "is 90 seconds"),
        ({"time": "0-0:1"}, "is 60 seconds"),
        ({"partition": "a b"}, "--partition 'a b': a name of letters, digits"),
        ({"account": ""}, "--account ''"),
        ({"job_name": "x\n#SBATCH --nodes=99"}, "--job-name 'x"),
        ({"container": "a b"}, "--container 'a b'"),
        ({"container": "a", "mounts": ["/data"]}, "--mount '/data': write SOURCE:/PATH"),
        ({"container": "-a"}, "--container '-a'"),
        ({"container": "a", "mounts": ["/a:/b/../c"]}, "/b/../c is no folder of its own; write"),
        ({"container": "a", "mounts": ["/a:/c", "/b:/c"]}, "--mount: /c is given twice; leave out"),
        ({"mounts": ["/data:/data"]}, "--mount would be ignored without --container"),
        ({"env": ["1A=b"]}, "--env '1A=b': write NAME=VALUE"),
        ({"env": ["Aé=b"]}, "NAME of letters a to z, digits and _"),
        ({"env": ["A=b\nc"]}, "write NAME=VALUE, on one line"),
        ({"env": ["A=\udcff"]}, "write NAME=VALUE"),
        ({"env": ["A=b", "A=c"]}, "--env: A is given twice"),
        ({"sbatch": ["--array=0-9"]}, "--sbatch --array=0-9: that starts the run several times in"),
        ({"sbatch": ["--help"]}, "--sbatch --help: sbatch would print something and start nothing"),
        ({"sbatch": ["--test-only"]}, "start nothing; leave it out"),
        ({"sbatch": ["--vers"]}, "--sbatch --vers: is short for --version, and sbatch would print"),
        ({"sbatch": ["--wrap=ls"]}, "--wrap=ls: sbatch would run that instead of the job"),
        ({"sbatch": ["--ntasks=9"]}, "the job has one torchrun a node"),
        ({"sbatch": ["--gpus=9"]}, "--gpus=9: the job has one torchrun a node"),
        ({"sbatch": ["--export=NONE"]}, "use --env NAME=VALUE; leave it out"),
        ({"sbatch": ["--no-req"]}, "is short for --no-requeue, and the job is queued again where"),
        (
            {"sbatch": ["--job=a"]},
            "is short for --job-name, and the job has --job-name=deepseek_v3",
        ),
        ({"sbatch": ["qos=high"]}, "--sbatch 'qos=high': write one option of sbatch"),
        ({"sbatch": ["--qos=high\nrm x"]}, "write one option of sbatch"),
        ({"sbatch": ["--nodes=9"]}, "--sbatch --nodes=9: the job has --nodes=4 already"),
        ({"sbatch": ["--requeue"]}, "--sbatch --requeue: the job has --requeue already"),
        ({"gpu": "H100"}, "--gpu would be ignored with --slurm"),
        ({"save_bandwidth": 0.0}, "--save-bandwidth 0.0: GB/s, more than 0"),
        (
            {"save_bandwidth": 1e-5},
            r"--save-bandwidth 1e-05: a checkpoint of 16 GB would take longer than the 65,535 s "
            r"that a job can be told before its end; from 0.00012 GB/s on it does not",
        ),
        (
            {"save_bandwidth": 0.001, "time": "2:00:00"},
            r"--time 2:00:00 is 7200 seconds, and the last \d{4} are kept for saving a checkpoint "
            r"\(\d+ s to save 16 GB, at 0.001 GB/s a node .*; use 04:3\d:00 or more",
        ),
    ],
)
def test_settings_that_slurm_would_not_take(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        written(tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_what_launch_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of .*: none given"):
        launch("deepseek_v3_8gpu")
    with pytest.raises(UserError, match="--slurm and --nemo-run given"):
        launch("deepseek_v3_8gpu", targets=["slurm", "nemo-run"])
    with pytest.raises(ConfigError, match="is not a multiple"):
        launch("deepseek_v3_8gpu", ["trainer.devices=3"], targets=["slurm"])
    path = written(tmp_path)
    before = path.read_text()
    with pytest.raises(UserError, match="exists already and nothing is overwritten"):
        written(tmp_path, "seed=1")
    assert path.read_text() == before
    with pytest.raises(UserError, match="cannot write"):
        launch("deepseek_v3_8gpu", targets=["slurm"], output=tmp_path / "no" / "file")
    with pytest.raises(UserError, match="--output would be ignored with --nemo-run"):
        launch("deepseek_v3_8gpu", targets=["nemo-run"], output=path)


# -- what happens after srun, under stand-ins for it and for scontrol --


@pytest.mark.parametrize(
    ("srun", "restarts", "code", "requeued"),
    [
        ("exit 0", "", 0, False),
        ("exit 1", "", 1, True),
        ("exit 1", "2", 1, True),
        ("exit 1", "3", 1, False),  # it fails at once, time after time
        ("exit 143", "", 143, True),  # the time limit
        ("kill -TERM $PPID; sleep 0.2; exit 143", "", 143, False),  # scancel
    ],
)
def test_a_job_that_fails_is_queued_again(
    tmp_path: Path, srun: str, restarts: str, code: int, requeued: bool
) -> None:
    path = written(tmp_path, env=["WORD=it's"])
    stand_ins = {
        "srun": f'#!/bin/bash\necho "$WORD $PYTORCH_ALLOC_CONF"\n{srun}\n',
        "scontrol": '#!/bin/bash\n[ "$1" = show ] || echo "scontrol $@"\n',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_RESTART_COUNT": restarts,
    }
    ran = subprocess.run(["bash", str(path)], env=env, capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.startswith("it's expandable_segments:True\n")
    assert ("scontrol requeue 77" in ran.stdout) is requeued
    told = re.search(r"srun ended with code \d+ after \d+ s: the job is queued", ran.stderr)
    assert bool(told) is requeued


OPTIONS = ["--qos=high", "--comment=a 'b' \"c\\ # --test-only", "--mail-user=a@b.c"]


def test_a_container_and_more_options(tmp_path: Path) -> None:
    settings = {"container": "nvcr.io#lab/a:1", "mounts": ["/data:/data", "/run:/run"]}
    path = written(tmp_path, sbatch=[*OPTIONS, "--overcommit"], **settings)
    found = options(path.read_text())
    assert [f"--{name}={found[name]}" for name in ("qos", "comment", "mail-user")] == OPTIONS
    assert found["overcommit"] == ""
    given = arguments_of_srun(path, tmp_path)
    assert given[2:5] == [
        "--container-image=nvcr.io#lab/a:1",
        "--container-mounts=/data:/data,/run:/run",
        "torchrun",
    ]


def test_what_runs_to_a_short_limit_has_not_failed(tmp_path: Path) -> None:
    """Of 10 minutes 8 are left to train; who trains for 4 is queued again however often."""
    assert '"$SECONDS" -ge 240 ]' in written(tmp_path, time="10").read_text()
    launch("deepseek_v3_32gpu", (), JobSettings(time="1-0"), ["slurm"], tmp_path / "long")
    assert '"$SECONDS" -ge 600 ]' in (tmp_path / "long").read_text()


def test_the_first_torchrun_may_open_a_socket_to_each_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ulimit" not in written(tmp_path).read_text()
    launch("deepseek_v3_671b", targets=["slurm"])
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if "ulimit -Sn" in line)
    raised = "\n".join([*lines[first : first + 4], "ulimit -Sn"])
    for hard, code, out in ((4096, 0, "2560\n"), (1024, 2, "")):
        limited = f"ulimit -Sn 1024; ulimit -Hn {hard}\n{raised}"
        ran = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
        assert (ran.returncode, ran.stdout) == (code, out), ran.stderr
    assert "the hard limit of open files, 1024, must be 2560 or more" in ran.stderr


def test_a_node_that_is_shared_gives_what_the_processes_keep_busy(tmp_path: Path) -> None:
    found = options(written(tmp_path, exclusive=False).read_text())
    assert found["cpus-per-task"] == "48" and not {"exclusive", "mem"} & found.keys()


def test_the_time_to_save_follows_from_the_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """V3's is 8.2 TB: with 256 nodes 32 s at 1 GB/s each, doubled, and a step."""
    for bandwidth, seconds in ((1.0, 124), (0.1, 700)):
        settings = JobSettings(save_bandwidth=bandwidth)
        launch("deepseek_v3_671b", (), settings, ["slurm"])
        script = capsys.readouterr().out
        assert f"# {seconds} s to save 8,19" in script
        assert options(script)["signal"] == f"TERM@{seconds}"
        assert f"SHUTDOWN_TIMEOUT={seconds}\n" in script


# -- Kubernetes and SkyPilot: the part of their schemas that is used --

TEXT, NUMBER = str, int
POD = {
    "terminationGracePeriodSeconds": NUMBER,
    "containers": [
        {
            "name": TEXT,
            "image": TEXT,
            "command": [TEXT],
            "env": [{"name": TEXT, "value": TEXT}],
            "volumeMounts": [{"name": TEXT, "mountPath": TEXT}],
            "resources": {"limits": {"nvidia.com/gpu": NUMBER}},
        }
    ],
    "volumes": [
        {
            "name": TEXT,
            "emptyDir": {"medium": TEXT},
            "persistentVolumeClaim": {"claimName": TEXT},
        }
    ],
}
PYTORCH_JOB = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": {"name": TEXT},
    "spec": {
        "nprocPerNode": TEXT,
        "elasticPolicy": {
            "rdzvBackend": TEXT,
            "rdzvPort": NUMBER,
            "minReplicas": NUMBER,
            "maxReplicas": NUMBER,
            "maxRestarts": NUMBER,
        },
        "runPolicy": {"backoffLimit": NUMBER, "cleanPodPolicy": TEXT},
        "pytorchReplicaSpecs": {
            "Worker": {
                "replicas": NUMBER,
                "restartPolicy": TEXT,
                "template": {"spec": POD},
            }
        },
    },
}
"""Of Kubeflow's definition kubeflow.org_pytorchjobs.yaml, v1."""
JOB_SET = {
    "apiVersion": TEXT,
    "kind": TEXT,
    "metadata": {"name": TEXT},
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": NUMBER},
        "replicatedJobs": [
            {
                "name": TEXT,
                "replicas": NUMBER,
                "template": {
                    "spec": {
                        "completionMode": TEXT,
                        "parallelism": NUMBER,
                        "completions": NUMBER,
                        "backoffLimit": NUMBER,
                        "template": {"spec": {"restartPolicy": TEXT} | POD},
                    }
                },
            }
        ],
    },
}
"""Of JobSet's definition jobset.x-k8s.io_jobsets.yaml, v1alpha2."""
SKY_TASK = {
    "name": TEXT,
    "num_nodes": NUMBER,
    "resources": {
        "accelerators": {"H100": NUMBER},
        "image_id": TEXT,
        "job_recovery": {"max_restarts_on_errors": NUMBER},
    },
    "envs": {"PYTORCH_ALLOC_CONF": TEXT, "A": TEXT},
    "file_mounts": {"/shared": {"name": TEXT, "mode": TEXT}},
    "run": TEXT,
}
"""Of skypilot 0.14, ``sky/utils/schemas.py``."""


def assert_conforms(value: Any, schema: Any, path: str = "") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() <= schema.keys(), path
        for key, item in value.items():
            assert_conforms(item, schema[key], f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for item in value:
            assert_conforms(item, schema[0], path)
    else:
        assert type(value) is schema, path


def test_kubernetes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"container": "lab/deepseek:1", "mounts": ["data:/shared"], "env": ["A=b $(c)"]}
    path = written(tmp_path, *AWKWARD, to="kubernetes", **settings)
    assert f"submit it with: kubectl apply -f '{path}'" in capsys.readouterr().out
    assert "NOT RUN" in path.read_text().splitlines()[0]
    tree: Any = read_yaml(path.read_text(), "the job").tree
    assert_conforms(tree, PYTORCH_JOB)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", tree["metadata"]["name"])
    worker = tree["spec"]["pytorchReplicaSpecs"]["Worker"]
    policy = tree["spec"]["elasticPolicy"]
    assert worker["replicas"] == policy["minReplicas"] == policy["maxReplicas"] == 4
    assert tree["spec"]["nprocPerNode"] == "8" and policy["maxRestarts"] == 3
    (container,) = worker["template"]["spec"]["containers"]
    # Kubernetes puts variables in for $(NAME), and makes $ of $$.
    assert [word.replace("$$", "$") for word in container["command"]] == [
        *("torchrun", "-m", "deepseek", "train", "--config", "deepseek_v3_32gpu"),
        *AWKWARD,
    ]
    assert "$(" not in re.sub(r"\$\$", "", " ".join(container["command"]))
    assert {"name": "A", "value": "b $$(c)"} in container["env"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    with pytest.raises(UserError, match="needs an image that has deepseek; add --container"):
        written(tmp_path, to="kubernetes")
    with pytest.raises(UserError, match="needs a volume that all pods see.*--mount CLAIM:/PATH"):
        written(tmp_path, to="kubernetes", container="a")
    for mount, message in (
        ("My_Claim:/data", "has a name of a to z, digits, - and .; `kubectl get pvc` lists them"),
        ("data:/dev/shm", "the job has memory there; use another path"),
    ):
        with pytest.raises(UserError, match=message):
            written(tmp_path, to="kubernetes", container="a", mounts=[mount])
    with pytest.raises(UserError, match="--time would be ignored with --kubernetes"):
        written(tmp_path, to="kubernetes", time="1:00:00")


def test_a_job_set(tmp_path: Path) -> None:
    settings = {"container": "lab/deepseek:1", "mounts": ["data:/shared"], "job_name": "My_Run"}
    path = written(tmp_path, *AWKWARD, to="jobset", **settings)
    assert "NOT RUN" in path.read_text().splitlines()[0]
    tree: Any = read_yaml(path.read_text(), "the job").tree
    assert_conforms(tree, JOB_SET)
    (nodes,) = tree["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    *shell, line = container["command"]
    assert "$(" not in re.sub(r"\$\$", "", line)
    shown = line.replace("$$", "$").replace("exec torchrun ", "exec printf '%s\\0' ", 1)
    for index, is_host in ((0, "is_host=1"), (3, "is_host=0")):
        env = os.environ | {"JOB_COMPLETION_INDEX": str(index)}
        ran = subprocess.run([*shell, shown], env=env, capture_output=True, text=True)
        words = ran.stdout.split("\0")[:-1]
        # The pod of index 0: its name in the service that has the JobSet's.
        assert words[words.index("--rdzv-endpoint") + 1] == "my-run-nodes-0-0.my-run:23456"
        assert words[words.index("--rdzv-conf") + 1] == is_host
        assert words[-len(AWKWARD) :] == AWKWARD
    with pytest.raises(UserError, match="--jobset needs an image that has deepseek"):
        written(tmp_path, to="jobset")


@pytest.mark.parametrize(
    ("name", "label", "task"),
    [
        ("it's a $(run)", "it-s-a-run", "it_s_a_run"),
        ("2024_b.c--", "run-2024-b-c", "2024_b.c"),
        ("名前", "run", "run"),
        ("a---_b", "a-b", "a-b"),
        ("A" * 49 + "-b", "a" * 49, "A" * 49 + "-b"),
    ],
)
def test_names_that_kubeflow_and_skypilot_take(
    tmp_path: Path, name: str, label: str, task: str
) -> None:
    """RFC 1035, and SkyPilot's own rule: letters and digits between single dots or lines."""
    settings = {"gpu": "H100", "container": "lab/a:1", "mounts": ["data:/shared"]}
    for to, expected in (("kubernetes", label), ("skypilot", task)):
        own = settings if to == "skypilot" else settings | {"gpu": None}
        path = written(tmp_path, f'name="{name}"', to=to, **own)
        tree: Any = read_yaml(path.read_text(), "the job").tree
        assert (tree.get("metadata") or tree)["name"] == expected


def test_skypilot(tmp_path: Path) -> None:
    settings = {"gpu": "H100", "container": "lab/a:1", "mounts": ["data:/shared"], "env": ["A=b"]}
    path = written(tmp_path, *AWKWARD, to="skypilot", **settings)
    assert "NOT RUN" in path.read_text().splitlines()[0]
    tree: Any = read_yaml(path.read_text(), "the task").tree
    assert_conforms(tree, SKY_TASK)
    assert tree["resources"]["accelerators"] == {"H100": 8} and tree["num_nodes"] == 4
    shown = tree["run"].replace("torchrun ", "printf '%s\\0' ", 1)
    env = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "0"}
    ran = subprocess.run(
        ["bash", "-c", shown], env=os.environ | env, capture_output=True, text=True
    )
    words = ran.stdout.split("\0")[:-1]
    assert words[words.index("--rdzv-endpoint") + 1] == "10.0.0.1:29500"
    assert words[words.index("--rdzv-conf") + 1] == "is_host=1"
    assert words[-len(AWKWARD) :] == AWKWARD
    with pytest.raises(UserError, match="needs the kind of GPU; add --gpu H100"):
        written(tmp_path, to="skypilot", mounts=["data:/shared"])
    with pytest.raises(UserError, match="needs storage that all nodes see.*--mount BUCKET:/PATH"):
        written(tmp_path, to="skypilot", gpu="H100")
    for mount, message in (
        ("My_Data:/data", "a bucket has a name of 3 to 63 of a to z.*; `sky storage ls` lists"),
        ("data:/a$b", r"SkyPilot takes \$ for a variable; rename it"),
    ):
        with pytest.raises(UserError, match=message):
            written(tmp_path, to="skypilot", gpu="H100", mounts=[mount])
    with pytest.raises(UserError, match="--gpu H100:8: must be the name.*; use --gpu H100$"):
        written(tmp_path, to="skypilot", gpu="H100:8", mounts=["data:/shared"])


# -- NeMo-Run, of which a stand-in records what it is told --


def test_nemo_run_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(UserError, match="pip install nemo_run, or use --slurm"):
        launch("deepseek_v3_8gpu", (), JobSettings(account="lab"), ["nemo-run"])


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
        launch("deepseek_v3_32gpu", targets=["nemo-run"])
    assert told == {}
    settings = JobSettings(account="lab", partition="gpu", time="4:00:00", env=["A=b c"])
    launch("deepseek_v3_32gpu", ["name=a b"], settings, ["nemo-run"])
    assert told == {
        "name": "a_b",
        "task": 'torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$('
        'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 1q):$((15000 + SLURM_JOB_ID % 5000))" '
        "--max-restarts 3 -m deepseek train --config deepseek_v3_32gpu 'name=a b'",
        "account": "lab",
        "partition": "gpu",
        "time": "4:00:00",
        "nodes": 4,
        "ntasks_per_node": 1,
        "gpus_per_node": 8,
        "exclusive": True,
        "container_image": None,
        "container_mounts": [],
        "env_vars": {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "A": "b c"},
        "signal": "TERM@120",
        "additional_parameters": {"requeue": True},
        "packager": "nothing",
        "detach": True,
    }
