"""``deepseek launch``: a run on a cluster, as a job for Slurm or through NeMo-Run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek.config import RunConfig, UserError, load_config
from deepseek.console import say
from deepseek.files import write_new
from deepseek.launch.processes import torchrun

SECONDS_TO_SAVE = 120
"""How long before the time limit the processes are told to save and stop."""


@dataclass(frozen=True)
class JobSettings:
    """What the configuration does not know of a cluster; None: the cluster's default."""

    time: str | None = None
    """Time limit as Slurm writes it, such as ``24:00:00`` or ``2-00:00:00``."""
    partition: str | None = None
    account: str | None = None
    job_name: str | None = None
    """None: the run's name."""


def launch(
    config: str,
    overrides: Sequence[str] = (),
    settings: JobSettings | None = None,
    slurm: bool = False,
    nemo_run: bool = False,
    output: Path | None = None,
) -> None:
    """Write the job for Slurm, or submit the run through NeMo-Run.

    Raises:
        ConfigError: every problem of the configuration at once.
        UserError: neither or both ways chosen, a setting Slurm would not take, a file that exists
            or cannot be written, NeMo-Run not installed.
    """
    if slurm == nemo_run:
        what = "both were given" if slurm else "neither was given"
        raise UserError(f"choose --slurm (a job for sbatch) or --nemo-run: {what}")
    run = load_config(config, overrides)
    settings = settings or JobSettings()
    _check(settings)
    if nemo_run:
        _submit(run, config, overrides, settings)
        return
    script = slurm_script(run, config, overrides, settings)
    if output is None:
        say(script.rstrip())
        return
    write_new(output, script)
    say(f"wrote {output}; submit it with: sbatch {shlex.quote(str(output))}")


def slurm_script(
    run: RunConfig, config: str, overrides: Sequence[str], settings: JobSettings
) -> str:
    """The job: one task a node, a torchrun, which starts the processes there."""
    return _job(
        run,
        settings,
        {"nodes": run.trainer.num_nodes, "ntasks-per-node": 1},
        f"TERM@{SECONDS_TO_SAVE}",
        "%x-%j.log",
        about=[
            "Written by: deepseek launch --slurm. Submit with sbatch where torchrun is on the",
            f"PATH, that of the Python with deepseek. {SECONDS_TO_SAVE} seconds before the time",
            "limit the processes get SIGTERM, save a checkpoint and end; submit the same file",
            "again to go on. A job whose node fails is queued again by Slurm.",
        ],
        script=[
            "# torchrun passes SIGTERM on and kills after this time (before torch 2.13: 30 s).",
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={SECONDS_TO_SAVE}",
            f"srun --kill-on-bad-exit=1 --cpus-per-task={_cpus(run)} "
            f"{_train(run, config, overrides)}",
        ],
    )


def array_script(run: RunConfig, command: str, runs: int, settings: JobSettings) -> str:
    """A job array: task ``i`` does run ``i`` of a sweep on one node, which starts its processes.

    Args:
        run: configuration of the first run; all have its sizes.
        command: the sweep, quoted for a shell.
        runs: of the grid.
        settings: what the configuration does not know of a cluster.

    Raises:
        UserError: a setting Slurm would not take, or runs of several nodes.
    """
    _check(settings)
    trainer = run.trainer
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: the runs of a job array have one node each; "
            "write each job with `deepseek launch --slurm`"
        )
    return _job(
        run,
        settings,
        {"array": f"0-{runs - 1}", "nodes": 1, "ntasks": 1},
        f"B:TERM@{SECONDS_TO_SAVE}",
        "%x-%A_%a.log",
        about=[
            "Written by: deepseek sweep --slurm. Submit with sbatch where `deepseek` is on the",
            "PATH; again to go on with runs that were stopped. Then compare the runs with",
            f"  {command}",
        ],
        script=[f"exec {command} --only $SLURM_ARRAY_TASK_ID"],
    )


def _job(
    run: RunConfig,
    settings: JobSettings,
    tasks: Mapping[str, object],
    signal: str,
    output: str,
    *,
    about: Sequence[str],
    script: Sequence[str],
) -> str:
    """A script for sbatch: comments, options, commands."""
    options = {
        "job-name": _job_name(run, settings),
        **tasks,
        "gpus-per-node": None if run.trainer.accelerator == "cpu" else run.trainer.devices,
        "cpus-per-task": _cpus(run),
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "signal": signal,
        "output": output,
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    comments = [f"# {line}" for line in about]
    start = ["#SBATCH --requeue", "", "set -euo pipefail"]
    return "\n".join(["#!/bin/bash", *comments, *lines, *start, *script, ""])


def _cpus(run: RunConfig) -> int:
    return run.trainer.devices * (max(1, run.trainer.num_threads) + run.model.data.num_workers)


def _train(run: RunConfig, config: str, overrides: Sequence[str]) -> str:
    """The command of every node, for a shell inside the job."""
    head = 'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 1q'
    endpoint = f'"$({head}):$((15000 + SLURM_JOB_ID % 5000))"'  # jobs may share a node
    start = torchrun(run.trainer.devices, run.trainer.num_nodes, endpoint)
    words = ["-m", "deepseek", "train", "--config", config, *overrides]
    return f"{start} {shlex.join(words)}"


def _job_name(run: RunConfig, settings: JobSettings) -> str:
    return settings.job_name or re.sub(r"[^\w.-]+", "_", run.name)


_TIME = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?\Z", re.ASCII
)


def _check(settings: JobSettings) -> None:
    """No setting may break out of its line, or leave no time to train."""
    for key in ("partition", "account", "job_name"):
        value = getattr(settings, key)
        if value is not None and not re.fullmatch(r"[\w.,:@+-]+", value):
            option = key.replace("_", "-")
            raise UserError(
                f"--{option} {value!r}: a name of letters, digits and . , : @ + - _; use one word"
            )
    if settings.time is None:
        return
    match = _TIME.match(settings.time)
    if match is None:
        raise UserError(
            f"--time {settings.time!r} is no time limit of Slurm; write HH:MM:SS, such as "
            "24:00:00, or D-HH:MM:SS"
        )
    seconds = _seconds(match)
    if seconds <= SECONDS_TO_SAVE:
        raise UserError(
            f"--time {settings.time} is {seconds} seconds, and the last {SECONDS_TO_SAVE} are kept "
            "for saving a checkpoint; use 00:10:00 or more"
        )


def _seconds(match: re.Match[str]) -> int:
    """Slurm reads M, M:S, H:M:S and, after days, H, H:M, H:M:S."""
    parts = [int(part) for part in match.group("first", "second", "third") if part is not None]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    minutes, seconds = [*parts, 0][:2]
    return minutes * 60 + seconds


def _submit(run: RunConfig, config: str, overrides: Sequence[str], settings: JobSettings) -> None:
    """Submit through NeMo-Run from a login node.

    Written after the documentation of NeMo-Run 0.11; it has not been run against a real cluster.
    """
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(
            f"--nemo-run needs NeMo-Run ({error}); pip install nemo_run, or use --slurm"
        ) from error
    if settings.account is None:
        raise UserError("--nemo-run needs an account to charge; add --account NAME")
    executor = nemo_run.SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        time=settings.time or "01:00:00",
        nodes=run.trainer.num_nodes,
        ntasks_per_node=1,
        gpus_per_node=None if run.trainer.accelerator == "cpu" else run.trainer.devices,
        signal=f"TERM@{SECONDS_TO_SAVE}",
        additional_parameters={"requeue": True},
        packager=nemo_run.Packager(),  # `deepseek` is on the PATH there; nothing to send
    )
    name = _job_name(run, settings)
    with nemo_run.Experiment(name) as experiment:
        script = nemo_run.Script(inline=_train(run, config, overrides))
        experiment.add(script, executor=executor, name=name)
        experiment.run(detach=True)
