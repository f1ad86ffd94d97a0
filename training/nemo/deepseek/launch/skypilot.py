"""A task for SkyPilot."""

from __future__ import annotations

import re
import shlex
from typing import Any

from deepseek.config import UserError
from deepseek.config.yaml_file import dump_yaml
from deepseek.launch.cluster_job import Job
from deepseek.launch.processes import torchrun

PORT = 29500
JOB_RESTARTS = 10
"""Of the job, beyond the restarts of its processes."""


def sky_task(job: Job) -> str:
    """The task as YAML: each node runs one torchrun.

    Raises:
        UserError: the kind of GPU is missing or no name, or nowhere for the run folder that all
            nodes see.
    """
    settings = job.settings
    if job.gpus and settings.gpu is None:
        raise UserError("--skypilot needs the kind of GPU; add --gpu H100, or another")
    if settings.gpu is not None and not re.fullmatch(r"(?a:[A-Za-z][\w-]*)", settings.gpu):
        kind = "".join(re.findall(r"^(?a:[A-Za-z][\w-]*)", settings.gpu)) or "H100"
        raise UserError(
            f"--gpu {settings.gpu}: must be the name of a kind of GPU alone, since trainer.devices "
            f"says how many; use --gpu {kind}"
        )
    if not settings.mounts:
        raise UserError(
            "--skypilot needs storage that all nodes see, for the run folder and the data; add "
            "--mount BUCKET:/PATH"
        )
    resources: dict[str, Any] = {
        "job_recovery": {"max_restarts_on_errors": JOB_RESTARTS},
    }
    if job.gpus:
        resources["accelerators"] = {settings.gpu: job.gpus}
    if settings.container:
        resources["image_id"] = f"docker:{settings.container}"
    buckets = [mount.split(":", 1) for mount in settings.mounts]
    for bucket, path in buckets:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", bucket):
            raise UserError(
                f"--mount {bucket}:{path}: a bucket has a name of 3 to 63 of a to z, digits, . _ - "
                "and no more; `sky storage ls` lists them"
            )
        if "$" in path:
            raise UserError(f"--mount {bucket}:{path}: SkyPilot takes $ for a variable; rename it")
    # The first node is told by its address, which torchrun cannot take for its own everywhere.
    endpoint = f'"$(echo "$SKYPILOT_NODE_IPS" | sed 1q):{PORT}"'
    start = torchrun(job.run.trainer.devices, job.nodes, endpoint)
    is_host = '--rdzv-conf "is_host=$((SKYPILOT_NODE_RANK == 0))"'
    restarts = f"--max-restarts {job.run.trainer.max_restarts}"
    tree = {
        "name": "-".join(re.findall(r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*", job.name)) or "run",
        "num_nodes": job.nodes,
        "resources": resources,
        "envs": dict(job.environment),
        "file_mounts": {path: {"name": bucket, "mode": "MOUNT"} for bucket, path in buckets},
        "run": f"{start} {is_host} {restarts} {shlex.join(job.words)}",
    }
    return (
        "# Written by: deepseek launch --skypilot. NOT RUN: no cloud has taken it yet, only\n"
        "# SkyPilot's schema of a task. sky jobs launch FILE starts it. deepseek must be in the\n"
        "# image, or installed by a setup: of your own. A configuration that is a file must lie\n"
        "# in the image or a bucket.\n" + dump_yaml({k: v for k, v in tree.items() if v})
    )
