"""One training on more and more GPUs: speed, what limits it, and what failures leave of it.

Each point is the planner's best layout of so many GPUs. With failures that come at random, of mean
time M between two of the cluster, checkpoints of C seconds every t seconds, and R seconds to start
again, a run takes M exp(R/M) (exp((t + C)/M) - 1) / t seconds for one of work (J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", 2006, equation 20).
Young's interval is sqrt(2 C M); Daly's, used here, is its higher order (equation 37).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deepseek.config.layout import world_size
from deepseek.config.schema import RunConfig, changed
from deepseek.planner.hardware import Device
from deepseek.planner.job import DEDICATED, job_of_run
from deepseek.planner.search import Plan, search
from deepseek.planner.step_time import predict, predict_step
from deepseek.planner.systems import HIDDEN

MTBF_HOURS = 50_700.0
"""Of one GPU with its part of a node: 419 unexpected interruptions in 54 days on 16,384 H100
(arXiv:2407.21783, table 5)."""


@dataclass(frozen=True)
class Failures:
    """What interrupts a run, and what it costs."""

    mtbf_hours: float = MTBF_HOURS
    """Mean time between failures of one GPU."""
    write_rate: float = 0.5e9
    """Bytes/s that one GPU writes to storage while all do: an assumption."""
    restart_seconds: float = 600.0
    """To notice, to start again, and to read a checkpoint: an assumption."""

    def of(self, gpus: int, state_bytes: float) -> Goodput:
        """What is left on so many GPUs, of which the fullest saves ``state_bytes``."""
        mean = self.mtbf_hours * 3600 / gpus
        save = state_bytes / self.write_rate
        interval = daly_interval(save, mean)
        exponent = (interval + save) / mean
        if exponent > 50:  # it never gets through one interval
            return Goodput(mean, save, interval, 0.0)
        lost = mean * math.exp(self.restart_seconds / mean) * math.expm1(exponent)
        return Goodput(mean, save, interval, interval / lost)


@dataclass(frozen=True)
class Goodput:
    """Of a cluster; times in seconds."""

    between_failures: float
    save: float
    interval: float
    """From the end of a checkpoint to the begin of the next, at best."""
    share: float
    """Of the time, what goes into steps that count."""


def young_interval(save: float, between_failures: float) -> float:
    """The first-order best time between checkpoints, in seconds."""
    return math.sqrt(2 * save * between_failures)


def daly_interval(save: float, between_failures: float) -> float:
    """The best time between checkpoints, in seconds; as long as failures are apart at most."""
    if save >= 2 * between_failures:
        return between_failures
    ratio = math.sqrt(save / (2 * between_failures))
    return young_interval(save, between_failures) * (1 + ratio / 3 + ratio**2 / 9) - save


@dataclass(frozen=True)
class Point:
    """The best layout of one size of cluster."""

    gpus: int
    plan: Plan
    gains: dict[str, float]
    """Tokens/s won by a part of the machine that is twice as fast, as a share."""
    goodput: Goodput

    @property
    def tokens_per_second(self) -> float:
        """Of the cluster, without failures."""
        return self.gpus * self.plan.estimate.tokens_per_s_per_gpu

    @property
    def limit(self) -> str:
        """The part of the machine of which more would help most."""
        return max(self.gains, key=lambda part: self.gains[part])


def scaled(
    run: RunConfig,
    device: Device,
    memory: float,
    sizes: Sequence[int],
    weak: bool,
    failures: Failures = Failures(),  # noqa: B008
) -> Iterator[Point]:
    """The best layout of each size of cluster, where there is one.

    Args:
        run: the model, and the global batch of ``trainer.devices`` x ``trainer.num_nodes`` GPUs.
        device: what the cluster is made of.
        memory: bytes that a rank can take.
        sizes: numbers of GPUs, whole nodes of ``trainer.devices``.
        weak: the batch grows with the cluster; else it stays.
        failures: of the cluster.
    """
    base, batch = world_size(run), run.model.global_batch_size
    for gpus in sizes:
        other = changed(
            run,
            {
                "trainer.num_nodes": max(1, gpus // run.trainer.devices),
                "trainer.devices": min(gpus, run.trainer.devices),
                "model.global_batch_size": max(1, batch * gpus // base) if weak else batch,
            },
        )
        for plan in search(other, device, memory, 1):
            states = max(need.states for need in plan.needs)
            yield Point(gpus, plan, gains(plan, device), failures.of(gpus, states))


def gains(plan: Plan, device: Device) -> dict[str, float]:
    """Tokens/s that a layout wins by a part of the machine that is twice as fast, as a share."""
    twice = {
        "matrix products": replace(device, bf16=2 * device.bf16, fp8=2 * device.fp8),
        "memory bandwidth": replace(device, hbm=2 * device.hbm),
        "NVLink": replace(device, nvlink=2 * device.nvlink),
        "network": replace(device, network=2 * device.network),
    }
    seconds, world = plan.estimate.seconds, world_size(plan.run)
    return {
        part: seconds / predict_step(plan.run, other, world).seconds - 1
        for part, other in twice.items()
    }


FEATURES: dict[str, dict[str, object]] = {
    "experts' exchange on a side stream (DeepEP)": {
        "hidden_all_to_all": HIDDEN,
        "dedicated_sms": DEDICATED,
        "every_copy": False,
    },
    "products in FP8": {},
    "whole steps as CUDA graphs": {"graphs": True},
    "attention in FP8": {"fp8_attention": True},
}
"""What other programs do and ours does not, by ``System``'s keys."""


def with_features(plan: Plan, device: Device) -> dict[str, float]:
    """Tokens/s of a GPU in a plan's layout: as it is, and with one more of ``FEATURES`` each time,
    of FP8 on GPUs that have it."""
    job = job_of_run(plan.run, world_size(plan.run))
    found = {"as it is": predict(job, device).tokens_per_s_per_gpu}
    for name, changes in FEATURES.items():
        if "FP8" in name and device.fp8 == device.bf16:
            continue
        system = replace(job.system, **changes)  # type: ignore[arg-type]
        job = replace(job, precision=job.precision if changes else "fp8", system=system)
        found[f"+ {name}"] = predict(job, device).tokens_per_s_per_gpu
    return found
