"""A job for Slurm, an array of jobs, and the same through NeMo-Run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from deepseek.config import RunConfig, UserError
from deepseek.launch.cluster_job import LEAST_SECONDS_TO_SAVE, Job, JobSettings
from deepseek.launch.processes import USUAL_FILES, store_files, torchrun

QUICK_SECONDS, QUICK_REQUEUES = 600, 3
"""A job that fails so soon has an error that comes again, and is queued again so often only."""
MOST_MINUTES = 2**32 - 2
"""That a time limit of Slurm can have."""
_STARTS_NOTHING = "sbatch would print something and start nothing"
_OTHER_TASKS = "the job has one torchrun a node, which starts the processes and shares the GPUs out"
_OTHER_MEMORY = "the job's nodes, or CPUs and GPUs of a node, bring their memory; use --mem=SIZE"
_OTHER_ENVIRONMENT = "srun would not pass on what the job sets; use --env NAME=VALUE"
REFUSED = {
    **dict.fromkeys(("help", "usage", "version", "test-only"), _STARTS_NOTHING),
    "wrap": "sbatch would run that instead of the job",
    "array": "that starts the run several times in one folder; use deepseek sweep --slurm",
    **dict.fromkeys(
        ("ntasks", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"), _OTHER_TASKS
    ),
    **dict.fromkeys(("cpus-per-gpu", "gpus", "gpus-per-socket", "gpus-per-task"), _OTHER_TASKS),
    **dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), _OTHER_MEMORY),
    **dict.fromkeys(("export", "export-file", "get-user-env"), _OTHER_ENVIRONMENT),
    "no-requeue": "the job is queued again where a restart does not help",
    "no-kill": "with fewer nodes torchrun cannot go on: a lost one must end the job",
    **dict.fromkeys(("uid", "gid"), "that submits in another's name"),
}
"""Options of sbatch that contradict the job's own, or make sbatch do something else, and why."""


def slurm_script(job: Job) -> str:
    """The job: one task a node, a torchrun, which starts the processes there.

    Raises:
        UserError: a setting Slurm would not take.
    """
    kept, limit = job.seconds_to_save, _limit_seconds(job)
    # What runs to a short limit has not failed.
    quick = QUICK_SECONDS if limit is None else min(QUICK_SECONDS, (limit - kept) // 2)
    return _script(
        job,
        {"nodes": job.nodes, "ntasks-per-node": 1},
        f"TERM@{kept}",
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
            f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={kept}",
            *_open_files(job),
            "cancelled=",
            "trap 'cancelled=yes' TERM  # scancel tells this shell too, the time limit only srun",
            "code=0",
            " ".join(["srun", *_srun(job), *_train(job), "|| code=$?"]),
            'if [ "$code" = 0 ] || [ -n "$cancelled" ]; then exit "$code"; fi',
            f'if [ "$SECONDS" -ge {quick} ] || '
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
    _limit_seconds(job)
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
    own = {name: value for name, value in options.items() if value is not None}
    lines = [f"#SBATCH {_option(name, own)}" for name in own]
    lines += [f"#SBATCH {_taken(option, own)}" for option in settings.sbatch]
    comments = [f"# {line}" for line in about]
    return "\n".join(["#!/bin/bash", *comments, *lines, "", "set -euo pipefail", *script, ""])


def _option(name: str, values: Mapping[str, object]) -> str:
    """An option of sbatch; "" stands for one without a value."""
    return f"--{name}{'=' * (values[name] != '')}{values[name]}"


def _taken(option: str, own: Mapping[str, object]) -> str:
    """An option that is added to the job's own, as sbatch reads it in a line of a script.

    Raises:
        UserError: the job has it already, or it would make another job of it.
    """
    name, has_value, value = option[2:].partition("=")
    known = (*own, *REFUSED)
    # sbatch takes the beginning of a name for it, unless that is a name of its own.
    is_whole = name in known or name == "mem"
    meant = [full for full in known if full == name or (full.startswith(name) and not is_whole)]
    if meant:
        short = "" if meant[0] == name else f" is short for --{meant[0]}, and"
        if meant[0] in own:
            raise UserError(
                f"--sbatch {option}:{short} the job has {_option(meant[0], own)} already; set that "
                "by the configuration or by the option of `deepseek launch`"
            )
        raise UserError(f"--sbatch {option}:{short} {REFUSED[meant[0]]}; leave it out")
    # A blank would end the value and # the line; in double quotes they do not.
    quoted = re.sub(r'(["\\])', r"\\\1", value)
    plain = re.fullmatch(r"[\w.,:@%+/=^~*()\[\]-]*", value)
    return f"--{name}{has_value}" + (value if plain else f'"{quoted}"')


def _open_files(job: Job) -> list[str]:
    """Raises the soft limit where so many ranks need more than the usual one; srun passes it on."""
    wanted = store_files(job.nodes * job.run.trainer.devices)
    if wanted <= USUAL_FILES:
        return []
    return [
        "# The first torchrun has a socket to each rank.",
        f'[ "$(ulimit -n)" = unlimited ] || [ "$(ulimit -n)" -ge {wanted} ] || '
        f"ulimit -Sn {wanted} || {{",
        f'  echo "the hard limit of open files, $(ulimit -Hn), must be {wanted} or more: '
        'LimitNOFILE of slurmd" >&2',
        "  exit 2",
        "}",
    ]


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


def _limit_seconds(job: Job) -> int | None:
    """Of the time limit, which must leave time to train."""
    time = job.settings.time
    if time is None:
        return None
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
    return seconds


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
