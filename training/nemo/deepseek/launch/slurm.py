"""A job for Slurm, an array of jobs, and the same through NeMo-Run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from deepseek.config import RunConfig, UserError
from deepseek.launch.cluster_job import LEAST_SECONDS_TO_SAVE, Job, JobSettings
from deepseek.launch.processes import torchrun

QUICK_SECONDS, QUICK_REQUEUES = 600, 3
"""A job that fails so soon has an error that comes again, and is queued again so often only."""
MOST_MINUTES = 2**32 - 2
"""That a time limit of Slurm can have."""
CONTRARY = ("array", "mem-per-cpu", "mem-per-gpu", "no-requeue", "ntasks", "wrap")
"""Options of sbatch that say otherwise than the job's own."""


def slurm_script(job: Job) -> str:
    """The job: one task a node, a torchrun, which starts the processes there.

    Raises:
        UserError: a setting Slurm would not take.
    """
    limit = job.seconds_to_save
    return _script(
        job,
        {"nodes": job.nodes, "ntasks-per-node": 1},
        f"TERM@{limit}",
        "%x-%j.log",
        about=[
            "Written by: deepseek launch --slurm. NOT RUN by a real Slurm yet. Submit with sbatch",
            "where torchrun is on the PATH, that of the Python with deepseek, or with a container.",
            "If a rank is lost, torchrun starts all anew from the newest checkpoint. If that does",
            "not help, if a node fails, and after the time limit, the job is queued again and goes",
            "on from there. Before the limit the processes get SIGTERM:",
            job.about_saving + ".",
        ],
        script=[
            *(f"export {name}={shlex.quote(text)}" for name, text in job.environment.items()),
            "# torchrun passes SIGTERM on and kills after this time (before torch 2.13: 30 s).",
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={limit}",
            "cancelled=",
            "trap 'cancelled=yes' TERM  # scancel tells this shell too, the time limit only srun",
            "code=0",
            " ".join(["srun", *_srun(job), *_train(job), "|| code=$?"]),
            'if [ "$code" = 0 ] || [ -n "$cancelled" ]; then exit "$code"; fi',
            f'if [ "$SECONDS" -ge {QUICK_SECONDS} ] || '
            f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {QUICK_REQUEUES} ]; then',
            '  echo "srun ended with code $code after $SECONDS s: the job is queued again" >&2',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
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
    job = Job.of(run, "", (), settings)
    if job.nodes > 1:
        raise UserError(
            f"trainer.num_nodes={job.nodes}: the runs of a job array have one node each; "
            "write each job with `deepseek launch --slurm`"
        )
    return _script(
        job,
        {"array": f"0-{runs - 1}", "nodes": 1, "ntasks": 1},
        f"B:TERM@{job.seconds_to_save}",
        "%x-%A_%a.log",
        about=[
            "Written by: deepseek sweep --slurm. Submit with sbatch where `deepseek` is on the",
            "PATH; again to go on with runs that were stopped. Then compare the runs with",
            f"  {command}",
        ],
        script=[f"exec {command} --only $SLURM_ARRAY_TASK_ID"],
    )


def submit(job: Job) -> None:
    """Submit through NeMo-Run from a login node.

    Written after the documentation of NeMo-Run 0.11; it has not been run against a real cluster.
    """
    try:
        import nemo_run
    except ImportError as error:
        raise UserError(
            f"--nemo-run needs NeMo-Run ({error}); pip install nemo_run, or use --slurm"
        ) from error
    settings = job.settings
    if settings.account is None:
        raise UserError("--nemo-run needs an account to charge; add --account NAME")
    executor = nemo_run.SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        time=settings.time or "01:00:00",
        nodes=job.nodes,
        ntasks_per_node=1,
        gpus_per_node=job.gpus or None,
        exclusive=job.is_exclusive,
        container_image=settings.container,
        container_mounts=list(settings.mounts),
        env_vars=dict(job.environment),
        signal=f"TERM@{job.seconds_to_save}",
        additional_parameters={"requeue": True},
        packager=nemo_run.Packager(),  # `deepseek` is on the PATH there; nothing to send
    )
    with nemo_run.Experiment(job.name) as experiment:
        script = nemo_run.Script(inline=" ".join(_train(job)))
        experiment.add(script, executor=executor, name=job.name)
        experiment.run(detach=True)


def _script(
    job: Job,
    tasks: Mapping[str, object],
    signal: str,
    output: str,
    *,
    about: Sequence[str],
    script: Sequence[str],
) -> str:
    """A script for sbatch: comments, options, commands."""
    settings = job.settings
    _check_time(job)
    options = {
        "job-name": job.name,
        **tasks,
        "gpus-per-node": job.gpus or None,
        # A node of one's own is had whole: srun is told how many CPUs that is.
        "exclusive": "" if job.is_exclusive else None,
        "mem": 0 if job.is_exclusive else None,
        "cpus-per-task": None if job.is_exclusive else job.cpus,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "signal": signal,
        "output": output,
        "open-mode": "append",
        "requeue": "",
    }
    lines = [
        f"#SBATCH --{key}{'=' * (value != '')}{value}"
        for key, value in options.items()
        if value is not None
    ]
    for option in settings.sbatch:
        name = option[2:].partition("=")[0]
        if options.get(name) is not None:
            raise UserError(
                f"--sbatch {option}: the job has --{name}={options[name]} already; set that by "
                "the configuration or by the option of `deepseek launch`"
            )
        if name in CONTRARY:
            raise UserError(
                f"--sbatch {option}: contradicts what the job itself says; leave it out"
            )
        lines.append(f"#SBATCH {option}")
    comments = [f"# {line}" for line in about]
    return "\n".join(["#!/bin/bash", *comments, *lines, "", "set -euo pipefail", *script, ""])


def _srun(job: Job) -> list[str]:
    """Its options, for a shell inside the job."""
    cpus = '"$SLURM_CPUS_ON_NODE"' if job.is_exclusive else str(job.cpus)
    words = ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"]
    if job.settings.container:  # of pyxis and enroot
        words.append(f"--container-image={job.settings.container}")
        if job.settings.mounts:
            words.append(shlex.quote(f"--container-mounts={','.join(job.settings.mounts)}"))
    return words


def _train(job: Job) -> list[str]:
    """The command of every node, for a shell inside the job."""
    head = 'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 1q'
    endpoint = f'"$({head}):$((15000 + SLURM_JOB_ID % 5000))"'  # jobs may share a node
    start = torchrun(job.run.trainer.devices, job.nodes, endpoint)
    return [start, f"--max-restarts {job.run.trainer.max_restarts}", shlex.join(job.words)]


_TIME = re.compile(
    r"(?:(?P<days>\d{1,9})-)?(?P<first>\d{1,9})(?::(?P<second>\d{1,9}))?(?::(?P<third>\d{1,9}))?\Z",
    re.ASCII,
)


def _check_time(job: Job) -> None:
    """The limit must leave time to train."""
    time = job.settings.time
    if time is None:
        return
    match = _TIME.match(time)
    if match is None:
        raise UserError(
            f"--time {time!r} is no time limit of Slurm; write HH:MM:SS, such as 24:00:00, or "
            "D-HH:MM:SS"
        )
    seconds, kept = _seconds(match), job.seconds_to_save
    if seconds > 60 * MOST_MINUTES:
        raise UserError(
            f"--time {time} is longer than {MOST_MINUTES:,} minutes, the most that Slurm counts; "
            "leave it out for the partition's own limit"
        )
    if seconds <= kept:
        why = f" ({job.about_saving})" if kept > LEAST_SECONDS_TO_SAVE else ""
        minutes = max(10, 2 * kept // 60)
        raise UserError(
            f"--time {time} is {seconds} seconds, and the last {kept} are kept for saving a "
            f"checkpoint{why}; use {minutes // 60:02d}:{minutes % 60:02d}:00 or more"
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
