"""Runs in several processes, started in the three ways there are."""

from __future__ import annotations

import math
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from support.forked import FORK_WORKERS, Ran, Started
from support.micro_runs import OF_THE_LAYOUT, MicroRuns, by_step


def layout(devices: int, *, tp: int = 1, pp: int = 1, ep: int = 1, micro: int = 1) -> list[str]:
    """Settings of a layout on ``devices`` processes; the batch stays what it is."""
    return [
        f"trainer.devices={devices}",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"model.expert_model_parallel_size={ep}",
        f"model.micro_batch_size={micro}",
    ]


def by_itself(
    runs: MicroRuns, name: str | None, *settings: str, before: str = "", config: object = None
) -> Started:
    """``deepseek train``, which becomes the supervisor."""
    words = runs.words(name, *settings, config=config)
    return runs.cli.start(*words, before=before + FORK_WORKERS)


def by_torchrun(
    runs: MicroRuns,
    name: str | None,
    processes: int,
    *settings: str,
    restarts: int = 0,
    before: str = "",
) -> Started:
    """torchrun's agent."""
    agent = ["--standalone", "--nproc-per-node", processes, "--max-restarts", restarts]
    agent += ["--monitor-interval", "0.1", "-m", "deepseek"]
    words = [*agent, *runs.words(name, *settings)]
    return runs.cli.start(*words, before=before + FORK_WORKERS, program="torchrun")


def by_variables(
    runs: MicroRuns,
    name: str | None,
    processes: int,
    *settings: str,
    nodes: int = 1,
    before: str = "",
) -> list[Started]:
    """As torchrun's agents do: every rank is told by variables who it is. Nobody watches them."""
    per_node = processes // nodes
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    words = runs.words(name, *settings)
    return [
        runs.cli.start(
            *words,
            before=before,
            env=common
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % per_node),
                "GROUP_RANK": str(rank // per_node),
            },
        )
        for rank in range(processes)
    ]


def by_slurm(runs: MicroRuns, job: Path, nodes: int) -> list[Started]:
    """The torchruns, one a node, that a job for Slurm starts."""
    words = arguments_of_srun(job, job.parent / "stand_ins")
    torchrun = words[words.index("torchrun") + 1 :]
    env = {"GLOO_SOCKET_IFNAME": "lo"}
    return [
        runs.cli.start(*torchrun, before=FORK_WORKERS, program="torchrun", env=env)
        for _ in range(nodes)
    ]


def arguments_of_srun(job: Path, folder: Path) -> list[str]:
    """What srun is given when bash runs the job; a stand-in notes it."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    noted = folder / "arguments"
    (programs / "srun").write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > {noted}\n")
    (programs / "scontrol").write_text("#!/bin/bash\nprintf 'localhost\\nother\\n'\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    variables = {"SLURM_JOB_NODELIST": "localhost,other", "SLURM_JOB_ID": "20077"}
    variables["SLURM_CPUS_ON_NODE"] = "96"
    env = os.environ | variables | {"PATH": path}
    subprocess.run(["bash", str(job)], cwd=folder, env=env, check=True)
    return noted.read_text().split("\0")[:-1]


def ended(tasks: list[Started]) -> list[Ran]:
    """All of them, in the order of their ranks."""
    return [task.wait() for task in tasks]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# -- comparing --


def log_distance(runs: MicroRuns, one: str, other: str) -> float:
    """The largest relative difference of two logs: losses, gradient norms, validations.

    Both must have one row for each step and kind, with the same keys, and equal integers.
    """
    a, b = runs.rows(one), runs.rows(other)
    assert [list(row) for row in a] == [list(row) for row in b]
    assert len(a) == len(by_step(a)) == len(by_step(b)) > 0
    return max(
        relative(value, row_b[key])
        for row_a, row_b in zip(a, b, strict=True)
        for key, value in row_a.items()
        if key not in OF_THE_LAYOUT
    )


def relative(a: Any, b: Any) -> float:
    """0 for equal values, infinity for different ones that are not floats."""
    if a == b:
        return 0.0
    if not (isinstance(a, float) and isinstance(b, float)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def tensor_distance(runs: MicroRuns, one: str, other: str) -> tuple[float, str]:
    """The largest relative difference (2-norms) of the weights of two runs, and whose it is."""
    a, b = runs.tensors(one), runs.tensors(other)
    assert a.keys() == b.keys()
    distances = {
        key: float((a[key] - b[key]).double().norm() / a[key].double().norm().clamp(min=1e-30))
        for key in a
        if a[key].is_floating_point()
    }
    worst = max(distances, key=lambda key: distances[key])
    return distances[worst], worst


def log_lines(folder: Path) -> int:
    """Lines of a log."""
    return (folder / "metrics.jsonl").read_text().count("\n")
