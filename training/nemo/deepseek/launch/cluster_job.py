"""One run on a cluster, whatever starts it: what every target needs, told once.

``slurm.py``, ``kubernetes.py`` and ``skypilot.py`` write it as files of these.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepseek.config import RunConfig, UserError
from deepseek.config.memory import checkpoint_bytes

LEAST_SECONDS_TO_SAVE = 120
MOST_SECONDS_TO_SAVE = 65_535
"""So long before its end Slurm can tell a job, and no longer."""
SECONDS_OF_A_STEP = 60
"""Allowed for the step that is under way when the signal to stop comes."""
SPREAD = 2.0
"""By how much a file system may be slower than stated."""
GPU_ENVIRONMENT = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Of every run on GPUs, unless ``--env`` says otherwise: routed experts take other sizes each step,
which cuts up memory that is reserved in fixed blocks."""


@dataclass(frozen=True)
class JobSettings:
    """What the configuration does not know of a cluster; None: the cluster's default."""

    time: str | None = None
    """Time limit as Slurm writes it, such as ``24:00:00`` or ``2-00:00:00``."""
    partition: str | None = None
    account: str | None = None
    job_name: str | None = None
    """None: the run's name."""
    container: str | None = None
    """Image in which the processes run."""
    mounts: Sequence[str] = ()
    """``SOURCE:/PATH`` each: a folder, for Kubernetes a claim, for SkyPilot a bucket."""
    env: Sequence[str] = ()
    """``NAME=VALUE`` each."""
    sbatch: Sequence[str] = ()
    """More options of sbatch, ``--NAME[=VALUE]`` each."""
    exclusive: bool | None = None
    """Whole nodes; None: with several of them."""
    gpu: str | None = None
    """Kind of GPU, as SkyPilot names it."""
    save_bandwidth: float = 1.0
    """GB/s that one node writes, when all do: decides how long before the limit a run saves."""

    def __post_init__(self) -> None:
        """Raises ``UserError``: no setting may break out of its line."""
        for key in ("partition", "account", "job_name", "container", "gpu"):
            value = getattr(self, key)
            allowed = r"(?a:[\w./][\w.,:@+/#-]*)" if key == "container" else r"[\w.,:@+-]+"
            if value is not None and not re.fullmatch(allowed, value):
                raise UserError(
                    f"--{key.replace('_', '-')} {value!r}: a name of letters, digits and "
                    ". , : @ + - _; use one word"
                )
        for mount in self.mounts:
            if not re.fullmatch(r"[^:,\s]+:/[^:,\s]*", mount):
                raise UserError(f"--mount {mount!r}: write SOURCE:/PATH, without blanks or commas")
            path = mount.partition(":")[2]
            if posixpath.normpath(path) != path or path == "/":
                raise UserError(
                    f"--mount {mount!r}: {path} is no folder of its own; write its path in full, "
                    "without . and .. and a / at the end"
                )
        for text in self.env:
            if not re.fullmatch(r"(?a:[A-Za-z_]\w*)=[^\x00-\x08\x0a-\x1f\ud800-\udfff]*", text):
                raise UserError(
                    f"--env {text!r}: write NAME=VALUE, on one line, NAME of letters a to z, "
                    "digits and _"
                )
        for key, names in (
            ("mount", [mount.partition(":")[2] for mount in self.mounts]),
            ("env", [text.partition("=")[0] for text in self.env]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"--{key}: {twice} is given twice; leave out all but one")
        for option in self.sbatch:
            if not re.fullmatch(r"--[a-z][a-z0-9-]*(=[^\n]*)?", option):
                raise UserError(f"--sbatch {option!r}: write one option of sbatch, --NAME=VALUE")
        if not 0 < self.save_bandwidth < math.inf:
            raise UserError(f"--save-bandwidth {self.save_bandwidth}: GB/s, more than 0")


@dataclass(frozen=True)
class Job:
    """A run, its settings, and what follows from both."""

    run: RunConfig
    settings: JobSettings
    words: tuple[str, ...]
    """What Python runs: ``-m deepseek train ...``."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, run: RunConfig, config: str, overrides: Sequence[str], settings: JobSettings
    ) -> Job:
        """The job that trains ``config`` with ``overrides``, whose values are ``run``."""
        words = ("-m", "deepseek", "train", "--config", config, *overrides)
        defaults = {} if run.trainer.accelerator == "cpu" else GPU_ENVIRONMENT
        given = dict(text.split("=", 1) for text in settings.env)
        job = cls(run, settings, words, defaults | given)
        if job.seconds_to_save > MOST_SECONDS_TO_SAVE:
            rate = settings.save_bandwidth * job.seconds_to_save / MOST_SECONDS_TO_SAVE
            raise UserError(
                f"--save-bandwidth {settings.save_bandwidth:g}: a checkpoint of "
                f"{job.checkpoint_bytes / 1e9:,.0f} GB would take longer than the "
                f"{MOST_SECONDS_TO_SAVE:,} s that a job can be told before its end; from "
                f"{rate:.2g} GB/s on it does not"
            )
        return job

    @property
    def name(self) -> str:
        """One word, short enough for the name of a file."""
        return self.settings.job_name or re.sub(r"[^\w.-]+", "_", self.run.name)[:60]

    @property
    def nodes(self) -> int:
        return self.run.trainer.num_nodes

    @property
    def gpus(self) -> int:
        """Of a node."""
        return 0 if self.run.trainer.accelerator == "cpu" else self.run.trainer.devices

    @property
    def cpus(self) -> int:
        """Of a node that is shared: what its processes keep busy."""
        threads = max(1, self.run.trainer.num_threads) + self.run.model.data.num_workers
        # On a GPU also the backward pass, the copies to it and NCCL's proxy.
        return self.run.trainer.devices * (threads + (3 if self.gpus else 0))

    @property
    def is_exclusive(self) -> bool:
        """Whether the nodes are its own."""
        return self.nodes > 1 if self.settings.exclusive is None else self.settings.exclusive

    @property
    def checkpoint_bytes(self) -> int:
        """Weights that are trained, and their optimiser states."""
        return checkpoint_bytes(self.run.model, self.run.model.optim.name)

    @property
    def seconds_to_save(self) -> int:
        """Between the signal to stop and the end: a step, and a checkpoint."""
        write = self.checkpoint_bytes / (self.settings.save_bandwidth * 1e9 * self.nodes)
        return max(LEAST_SECONDS_TO_SAVE, math.ceil(SECONDS_OF_A_STEP + SPREAD * write))

    @property
    def about_saving(self) -> str:
        """How ``seconds_to_save`` came about."""
        size, rate = self.checkpoint_bytes / 1e9, self.settings.save_bandwidth
        return (
            f"{self.seconds_to_save} s to save {size:,.0f} GB, at {rate:g} GB/s a node "
            "(--save-bandwidth)"
        )
