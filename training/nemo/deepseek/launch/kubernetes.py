"""A PyTorchJob for Kubernetes with Kubeflow's training operator (v1)."""

from __future__ import annotations

import re
from typing import Any

from deepseek.config import UserError
from deepseek.config.yaml_file import dump_yaml
from deepseek.launch.cluster_job import Job

PORT = 23456
JOB_RESTARTS = 10
"""Of pods that fail, beyond the restarts of their processes."""


def pytorch_job(job: Job) -> str:
    """The job as YAML: one pod a node, in each a torchrun that the operator tells of the others.

    Raises:
        UserError: no image, or nowhere for the run folder that all pods see.
    """
    settings = job.settings
    if settings.container is None:
        raise UserError("--kubernetes needs an image that has deepseek; add --container IMAGE")
    if not settings.mounts:
        raise UserError(
            "--kubernetes needs a volume that all pods see, for the run folder and the data; add "
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
        "command": ["torchrun", *map(_as_it_is, job.words)],
        "env": [{"name": key, "value": _as_it_is(value)} for key, value in job.environment.items()],
        "volumeMounts": mounts,
    }
    if job.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus}}
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
                    "template": {
                        "spec": {
                            "terminationGracePeriodSeconds": job.seconds_to_save,
                            "containers": [container],
                            "volumes": volumes,
                        }
                    },
                }
            },
        },
    }
    return (
        "# Written by: deepseek launch --kubernetes. NOT RUN: no cluster has taken it yet, only\n"
        "# the schema of PyTorchJob (Kubeflow training operator 1.x). kubectl apply -f starts it.\n"
        "# A configuration that is a file must lie in the image or on a volume.\n"
        f"# {job.about_saving}.\n" + dump_yaml(tree)
    )


def _label(name: str) -> str:
    """As Kubeflow wants names of jobs (RFC 1035), short enough for the pods', which end longer."""
    letters = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not letters[:1].isalpha():
        letters = f"run-{letters}"
    return letters[:50].strip("-")


def _as_it_is(text: str) -> str:
    """Kubernetes puts variables in for ``$(NAME)``, in commands and environments."""
    return text.replace("$", "$$")
