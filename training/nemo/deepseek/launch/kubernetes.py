"""Jobs for Kubernetes: a PyTorchJob of Kubeflow's training operator (v1), and a JobSet."""

from __future__ import annotations

import re
import shlex
from typing import Any

from deepseek.config import UserError
from deepseek.config.yaml_file import dump_yaml
from deepseek.launch.cluster_job import Job
from deepseek.launch.processes import torchrun

PORT = 23456
NODES = "nodes"
"""The name of the one job of a JobSet."""
JOB_RESTARTS = 10
"""Of pods that fail, beyond the restarts of their processes."""


def pytorch_job(job: Job) -> str:
    """The job as YAML: one pod a node, in each a torchrun that the operator tells of the others.

    Raises:
        UserError: no image, or nowhere for the run folder that all pods see.
    """
    tree = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": _label(job.name)},
        "spec": {
            "nprocPerNode": str(job.run.trainer.devices),
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "rdzvPort": PORT,
                "minReplicas": job.nodes,
                "maxReplicas": job.nodes,
                "maxRestarts": job.run.trainer.max_restarts,
            },
            "runPolicy": {"backoffLimit": JOB_RESTARTS, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": job.nodes,
                    "restartPolicy": "OnFailure",
                    "template": {"spec": _pod(job, "--kubernetes", ["torchrun", *_words(job)])},
                }
            },
        },
    }
    return _file(job, "--kubernetes", "PyTorchJob (Kubeflow training operator 1.x)", tree)


def job_set(job: Job) -> str:
    """The same without Kubeflow: a JobSet, whose pods have names that all of them know.

    If a pod fails, all start anew and go on from the newest checkpoint.

    Raises:
        UserError: as ``pytorch_job``.
    """
    name = _label(job.name)
    endpoint = f"{name}-{NODES}-0-0.{name}:{PORT}"
    start = shlex.split(torchrun(job.run.trainer.devices, job.nodes, endpoint))
    # A pod does not always know the name by which the others know it.
    here = '"is_host=$((JOB_COMPLETION_INDEX == 0))"'
    line = f"exec {shlex.join(start)} --rdzv-conf {here} {_restarts(job)} {shlex.join(job.words)}"
    tree = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": JOB_RESTARTS},
            "replicatedJobs": [
                {
                    "name": NODES,
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "parallelism": job.nodes,
                            "completions": job.nodes,
                            "backoffLimit": 0,
                            "template": {
                                "spec": {"restartPolicy": "Never"}
                                | _pod(job, "--jobset", ["sh", "-c", _as_it_is(line)])
                            },
                        }
                    },
                }
            ],
        },
    }
    return _file(job, "--jobset", "JobSet (jobset.x-k8s.io/v1alpha2)", tree)


def _restarts(job: Job) -> str:
    return f"--max-restarts {job.run.trainer.max_restarts}"


def _words(job: Job) -> list[str]:
    return [_as_it_is(word) for word in job.words]


def _file(job: Job, option: str, schema: str, tree: dict[str, Any]) -> str:
    return (
        f"# Written by: deepseek launch {option}. NOT RUN: no cluster has taken it yet, only\n"
        f"# the schema of {schema}. kubectl apply -f starts it.\n"
        "# A configuration that is a file must lie in the image or on a volume.\n"
        f"# {job.about_saving}.\n" + dump_yaml(tree)
    )


def _pod(job: Job, option: str, command: list[str]) -> dict[str, Any]:
    """Of each node."""
    settings = job.settings
    if settings.container is None:
        raise UserError(f"{option} needs an image that has deepseek; add --container IMAGE")
    if not settings.mounts:
        raise UserError(
            f"{option} needs a volume that all pods see, for the run folder and the data; add "
            "--mount CLAIM:/PATH, with the name of a PersistentVolumeClaim"
        )
    claims = [mount.split(":", 1) for mount in settings.mounts]
    for claim, path in claims:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", claim):
            raise UserError(
                f"--mount {claim}:{path}: a PersistentVolumeClaim has a name of a to z, digits, - "
                "and .; `kubectl get pvc` lists them"
            )
        if path == "/dev/shm":
            raise UserError(f"--mount {claim}:{path}: the job has memory there; use another path")
    # NCCL and the data loaders share memory there; Kubernetes gives 64 MiB otherwise.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, (claim, path) in enumerate(claims):
        volume = f"mount{number}"
        volumes.append({"name": volume, "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": volume, "mountPath": path})
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this one
        "image": settings.container,
        "command": command,
        "env": [{"name": key, "value": _as_it_is(value)} for key, value in job.environment.items()],
        "volumeMounts": mounts,
    }
    if job.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus}}
    return {
        "terminationGracePeriodSeconds": job.seconds_to_save,
        "containers": [container],
        "volumes": volumes,
    }


def _label(name: str) -> str:
    """As Kubeflow wants names of jobs (RFC 1035), short enough for the pods', which end longer."""
    letters = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not letters[:1].isalpha():
        letters = f"run-{letters}"
    return letters[:50].strip("-")


def _as_it_is(text: str) -> str:
    """Kubernetes puts variables in for ``$(NAME)``, in commands and environments."""
    return text.replace("$", "$$")
