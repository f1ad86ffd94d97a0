"""``deepseek launch``: a run on a cluster, as a file for what starts it there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from deepseek.config import UserError, load_config
from deepseek.console import say
from deepseek.files import write_new
from deepseek.launch.cluster_job import Job, JobSettings
from deepseek.launch.kubernetes import job_set, pytorch_job
from deepseek.launch.skypilot import sky_task
from deepseek.launch.slurm import slurm_script, submit


class _Target(NamedTuple):
    write: Callable[[Job], str]
    start: str
    """The command that takes the file."""
    idle: tuple[str, ...]
    """Settings that it has no use for."""


_IDLE_IN_KUBERNETES = ("time", "partition", "account", "sbatch", "exclusive", "gpu")
TARGETS = {
    "slurm": _Target(slurm_script, "sbatch", ("gpu",)),
    "kubernetes": _Target(pytorch_job, "kubectl apply -f", _IDLE_IN_KUBERNETES),
    "jobset": _Target(job_set, "kubectl apply -f", _IDLE_IN_KUBERNETES),
    "skypilot": _Target(
        sky_task,
        "sky jobs launch",
        ("time", "partition", "account", "sbatch", "exclusive", "save_bandwidth"),
    ),
}


def launch(
    config: str,
    overrides: Sequence[str] = (),
    settings: JobSettings | None = None,
    targets: Collection[str] = (),
    output: Path | None = None,
) -> None:
    """Write the job for one of ``TARGETS``, or submit the run through ``nemo-run``.

    Raises:
        ConfigError: every problem of the configuration at once.
        UserError: no target or several, a setting the target would not take or has no use for, a
            file that exists or cannot be written, NeMo-Run not installed.
    """
    if len(targets) != 1:
        given = " and ".join(f"--{target}" for target in targets) or "none"
        raise UserError(
            "choose one of --slurm (a job for sbatch), --kubernetes, --jobset, --skypilot and "
            f"--nemo-run: {given} given"
        )
    (name,) = targets
    settings = settings or JobSettings()
    idle = TARGETS[name].idle if name in TARGETS else ("sbatch", "gpu")
    for key in idle:
        if getattr(settings, key) != getattr(JobSettings, key):
            raise UserError(
                f"--{key.replace('_', '-')} would be ignored with --{name}; leave it out"
            )
    if settings.mounts and settings.container is None and name in ("slurm", "nemo-run"):
        raise UserError("--mount would be ignored without --container; leave it out")
    job = Job.of(load_config(config, overrides), config, overrides, settings)
    if name == "nemo-run":
        if output is not None:
            raise UserError("--output would be ignored with --nemo-run; leave it out")
        submit(job)
        return
    text = TARGETS[name].write(job)
    if output is None:
        say(text.rstrip())
        return
    write_new(output, text)
    say(f"wrote {output}; submit it with: {TARGETS[name].start} {shlex.quote(str(output))}")
