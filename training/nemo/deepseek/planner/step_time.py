"""Seconds of one training step, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from deepseek.config.cost import rank_need
from deepseek.config.layout import Layout
from deepseek.config.schema import RunConfig
from deepseek.planner.flops import Convention, flops_per_token
from deepseek.planner.hardware import Gpu
from deepseek.planner.job import Job, Stage, job_of_run
from deepseek.planner.layer_time import (
    FITTED,
    BlockTime,
    Efficiency,
    Parts,
    StageParts,
    stage_parts,
)
from deepseek.planner.pipeline_timeline import StageTime, Timeline, pipeline_seconds, play


@dataclass(frozen=True)
class StepEstimate:
    """What the model of time says of one step."""

    seconds: float
    parts: dict[str, float]
    """Seconds by what takes them, on the rank that takes longest; they sum to ``seconds``."""
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    mfu: float
    """Of the dense bf16 peak, whatever precision is computed in."""
    convention: Convention
    """By which FLOPs are counted."""
    stages: tuple[StageTime, ...]
    """Seconds of every pipeline stage on one micro-batch."""
    job: Job
    gpu: Gpu
    run: RunConfig | None = None

    @cached_property
    def peak_bytes(self) -> int:
        """Of the worst rank; made when asked for, since it takes longer than all the rest."""
        assert self.run is not None, "memory is of a configuration"
        return _peak_bytes(self.run, self.job.ranks.world)

    def timeline(self) -> Timeline:
        """Every interval of the pipeline, for pictures."""
        job = self.job
        return play(job.schedule, job.ranks.pp, self.stages, job.micro_batches)


def predict_step(run: RunConfig, gpu: Gpu, gpus: int) -> StepEstimate:
    """A step of a sound configuration on ``gpus`` GPUs, whatever its trainer section counts."""
    estimate = predict(job_of_run(run, gpus), gpu)
    object.__setattr__(estimate, "run", run)
    return estimate


def predict(
    job: Job, gpu: Gpu, convention: Convention | None = None, efficiency: Efficiency = FITTED
) -> StepEstimate:
    """A step of any job.

    Args:
        job: what is computed, and by whom.
        gpu: on what.
        convention: how FLOPs are counted; None: causal, and MTP modules where there are any.
        efficiency: the fitted constants.
    """
    convention = convention or Convention()
    parts = stage_parts(job, gpu, efficiency)
    ranks, count = job.ranks, job.micro_batches
    kinds = {stage: _together(stage, parts) for stage in set(job.stages)}  # most are alike
    whole = [kinds[stage] for stage in job.stages]
    hidden = job.system.hidden_all_to_all
    dual = job.schedule.startswith("DualPipe")
    times = [_stage_time(block, hidden, dual, job.system.dedicated_sms) for block in whole]
    pipeline = pipeline_seconds(job.schedule, ranks.pp, times, count)
    parts_of = _parts_of_busiest(job, whole, times, count)
    busy = sum(parts_of.values())
    optimizer, exchange = _outside(job, gpu, efficiency)
    seconds = pipeline + optimizer + exchange
    named = {
        **parts_of,
        "pipeline bubble": pipeline - busy,
        "optimizer": optimizer,
        "data-parallel exchange exposed": exchange,
    }
    tokens = job.global_batch * job.seq_length / ranks.world / seconds
    flops = _flops(job, convention) * tokens
    return StepEstimate(
        seconds, named, tokens, flops / 1e12, flops / gpu.bf16, convention, tuple(times), job, gpu
    )


def _together(stage: Stage, parts: StageParts) -> BlockTime:
    """All that a stage holds, one after the other."""
    forward, backward, weight = Parts(), Parts(), 0.0
    counts = (stage.dense, stage.moe, stage.head, stage.mtp)
    for count, block in zip(counts, parts, strict=True):
        if count:
            forward, backward = forward + block.forward * count, backward + block.backward * count
            weight += block.weight * count
    return BlockTime(forward, backward, weight)


def _stage_time(block: BlockTime, hidden: float, dual: bool, sms: float) -> StageTime:
    forward, backward = block.forward, block.backward
    if dual:
        slow = 1 / (1 - sms)
        return StageTime(
            forward.compute * slow + forward.all_to_all + forward.other_links,
            backward.compute * slow + backward.all_to_all + backward.other_links,
            block.weight,
            forward.all_to_all,
            backward.all_to_all,
        )
    shown = 1 - hidden
    return StageTime(
        forward.compute + forward.all_to_all * shown + forward.other_links,
        backward.compute + backward.all_to_all * shown + backward.other_links,
        block.weight,
    )


def _parts_of_busiest(
    job: Job, whole: Sequence[BlockTime], times: Sequence[StageTime], count: int
) -> dict[str, float]:
    """Seconds by kind on the rank with most work."""
    pp = job.ranks.pp
    if job.schedule in ("ZBVZeroBubble", "DualPipeV"):
        held = [(r, 2 * pp - 1 - r) for r in range(pp)]
    else:
        held = [tuple(range(r, len(times), pp)) for r in range(pp)]  # type: ignore[misc]
    most = max(held, key=lambda stages: sum(times[s].forward + times[s].backward for s in stages))
    parts = Parts()
    for s in most:
        parts += whole[s].forward + whole[s].backward
    shown = sum(times[s].forward + times[s].backward for s in most) - parts.compute
    return {
        "dense products": parts.products * count,
        "attention": parts.attention * count,
        "experts": parts.experts * count,
        "memory-bound glue": parts.glue * count,
        "exchanges exposed": shown * count,
    }


def _outside(job: Job, gpu: Gpu, efficiency: Efficiency) -> tuple[float, float]:
    """Seconds of the optimiser, and of the exposed part of the data-parallel exchange."""
    arch, ranks = job.architecture, job.ranks
    blocks = max((s.moe + s.mtp for s in job.stages), default=0)
    held = len(job.stages) // ranks.pp
    experts = held * blocks * arch.experts * arch.expert_size / ranks.ep if arch.experts else 0.0
    dense: float = arch.parameters - arch.moe_layers * arch.experts * arch.expert_size
    dense /= ranks.pp * ranks.tp
    kept = dense / ranks.dp + experts / ranks.expert_dp
    optimizer = kept * 28 / (gpu.hbm * efficiency.memory)
    sent = 6 * (dense * (ranks.dp > 1) + experts * (ranks.expert_dp > 1))
    inside = ranks.world <= gpu.domain
    link = (gpu.nvlink if inside else gpu.network) * efficiency.network
    return optimizer, sent / link * (1 - job.system.hidden_data_parallel)


@lru_cache(maxsize=4096)
def _cached_flops(architecture: object, seq_length: int, convention: Convention) -> int:
    return flops_per_token(architecture, seq_length, convention)  # type: ignore[arg-type]


def _flops(job: Job, convention: Convention) -> int:
    return _cached_flops(job.architecture, job.seq_length, convention)


def _peak_bytes(run: RunConfig, gpus: int) -> int:
    model = run.model
    layout = Layout.of(model, gpus)
    half = str(run.trainer.precision) != "32"
    count = model.global_batch_size // (model.micro_batch_size * layout.dp)
    return max(rank_need(model, layout, pp, count, half).total for pp in range(layout.pp))
