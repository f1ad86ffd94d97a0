"""Seconds of one training step, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from deepseek.config.layout import INTERLEAVED_SCHEDULES
from deepseek.config.memory import in_half
from deepseek.config.schema import RunConfig
from deepseek.planner.flops import Convention, flops_per_token
from deepseek.planner.hardware import Device, Efficiency
from deepseek.planner.job import Job, Stage, System, job_of_run
from deepseek.planner.layer_time import (
    MEMORY,
    NETWORK,
    NVLINK,
    BlockTime,
    BlockTimes,
    Breakdown,
    block_times,
    sent_to_experts,
)
from deepseek.planner.pipeline_timeline import (
    StageTime,
    Timeline,
    busy_seconds,
    even_seconds,
    interleaved_bound,
    interleaved_seconds,
    pipeline_seconds,
    play,
)

OPTIMIZER_BYTES = 60
"""Read and written for each parameter that a rank updates: gradient and norm, moments, weights."""


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
    device: Device

    def kinds(self) -> dict[str, float]:
        """Seconds of the pipeline by the kind of an interval, and of the bubble, mean of ranks."""
        line, seconds = self.timeline(), dict.fromkeys(("F", "B", "I", "W", "FB"), 0.0)
        for interval in line.intervals:
            seconds[interval.kind] += (interval.end - interval.start) / line.ranks
        return {**seconds, "bubble": line.bubble * line.seconds}

    def timeline(self) -> Timeline:
        """Every interval of the pipeline, for pictures."""
        return _played(self.job, self.stages, _hop(self.job, self.device))


def predict_step(run: RunConfig, device: Device, gpus: int, least: bool = False) -> StepEstimate:
    """A step of a sound configuration on ``gpus`` GPUs, whatever its trainer section counts.

    ``least`` as in ``predict``.
    """
    job = job_of_run(run, gpus)
    if device.cpu:  # whose exchanges take the cores that would compute meanwhile
        half = in_half(run) and str(run.trainer.precision) != "auto"
        system = replace(job.system, pairs_passes=False)
        job = replace(job, precision="bf16" if half else "fp32", system=system)
    return predict(job, device, least=least)


def predict(
    job: Job,
    device: Device,
    convention: Convention | None = None,
    efficiency: Efficiency | None = None,
    least: bool = False,
) -> StepEstimate:
    """A step of any job.

    Args:
        job: what is computed, and by whom.
        device: on what.
        convention: how FLOPs are counted; None: causal, and MTP modules where there are any.
        efficiency: the constants; None: those of ``device``, or the fitted ones.
        least: what the step takes at least, where a pipeline would have to be played, for searches.
    """
    convention = convention or Convention()
    blocks = block_times(job, device, efficiency)
    ranks, count = job.ranks, job.micro_batches
    system = job.system
    dual = job.schedule.startswith("DualPipe") and system.pairs_passes
    kinds = {stage: _together(stage, blocks) for stage in set(job.stages)}  # most are alike
    of_kind = {stage: _stage_time(block, system, dual) for stage, block in kinds.items()}
    whole = [kinds[stage] for stage in job.stages]
    times = [of_kind[stage] for stage in job.stages]
    each = max(1, count // job.flushes)
    hop = _hop(job, device)
    full = job.schedule != "DualPipe" or (each % 2 == 0 and each >= 2 * ranks.pp)
    if ranks.pp > 1 and job.imbalance > 1 and full:
        pipeline = _played(job, times, hop).seconds * count / each
    elif 1 < ranks.pp <= each and job.schedule in INTERLEAVED_SCHEDULES and len(of_kind) > 1:
        seconds_of = interleaved_bound if least else _interleaved_seconds
        pipeline = seconds_of(job.schedule, ranks.pp, tuple(times), each, hop) * count / each
    else:
        pipeline = pipeline_seconds(job.schedule, job.held, times, each, hop) * count / each
    loads = [busy_seconds(job.schedule, times, held) for held in job.held]
    most = max(range(ranks.pp), key=loads.__getitem__)
    split = Breakdown()
    for stage in job.held[most]:
        split = split + whole[stage].forward + whole[stage].backward
    lent = 0.0
    if dual and system.always_dedicated:
        lent = split.compute * (1 / (1 - system.dedicated_sms) - 1)
    elif dual:
        lent = split.all_to_all * system.dedicated_sms
    worked = count / 2 if job.schedule == "DualPipe" else count
    if device.cpu and device.cpu.crowded > 1:  # while one waits, another has its core
        work = sum(loads) / ranks.pp * worked * device.cpu.crowded
        pipeline = max(pipeline, work)
    optimizer, exchange = _outside(job, device)
    around = device.cpu.outside.around if device.cpu else 0.0
    seconds = pipeline + optimizer + exchange + around
    named = {
        "dense products": split.products * worked,
        "attention": split.attention * worked,
        "experts": split.experts * worked,
        "memory-bound glue": split.glue * worked,
        "host": split.host * worked,
        "given to exchanges": lent * worked,
        "exchanges exposed": max(0.0, loads[most] - split.compute - lent) * worked,
        "pipeline bubble": pipeline - loads[most] * worked,
        "optimizer": optimizer,
        "data-parallel exchange exposed": exchange,
    } | ({"around the step": around} if around else {})
    tokens = job.global_batch * job.seq_length / ranks.world / seconds
    flops = _flops(job, convention) * tokens
    return StepEstimate(
        seconds,
        named,
        tokens,
        flops / 1e12,
        flops / device.bf16,
        convention,
        tuple(times),
        job,
        device,
    )


def _played(job: Job, times: Sequence[StageTime], hop: float) -> Timeline:
    """Until the pipeline runs empty. Natural routing leaves some micro-batches balanced, and some
    twice as far from it as the mean."""
    count = max(1, job.micro_batches // job.flushes)
    return play(job.schedule, job.ranks.pp, times, count, hop, job.imbalance - 1)


@lru_cache(maxsize=4096)
def _interleaved_seconds(
    schedule: str, ranks: int, times: tuple[StageTime, ...], micro_batches: int, hop: float
) -> float:
    """Asked again for each way to share weights."""
    return interleaved_seconds(schedule, ranks, times, micro_batches, hop)


def even_pipeline_seconds(job: Job, device: Device, pp: int, held: int) -> float:
    """Seconds of a pipeline without what comes after it, if all stages were alike.

    No split of the blocks leaves the busiest rank less. Ramps of interleaved stages, whose time is
    played, are left out: a short first stage may make them shorter.

    Args:
        job: its stages do not matter; its ranks may be one of the pipeline's.
        device: on what.
        pp: ranks of the pipeline that the model is divided over.
        held: stages of each.
    """
    blocks, arch, system = block_times(job, device), job.architecture, job.system
    whole = _whole(blocks, arch.layers - arch.moe_layers, arch.moe_layers, arch.mtp)
    dual = job.schedule.startswith("DualPipe") and system.pairs_passes
    time = StageTime(*(value / (pp * held) for value in _stage_time(whole, system, dual)))
    count, hop = job.micro_batches, _hop(job, device)
    if job.schedule in INTERLEAVED_SCHEDULES:
        return busy_seconds(job.schedule, [time] * held, range(held)) * count
    each = max(1, count // job.flushes)
    return even_seconds(job.schedule, job.ranks.pp, held, time, each, hop) * count / each


@lru_cache(maxsize=4096)
def _whole(blocks: BlockTimes, dense: int, moe: int, mtp: int) -> BlockTime:
    return _together(Stage(dense, moe, True, 1 + mtp, mtp), blocks)


def _together(stage: Stage, blocks: BlockTimes) -> BlockTime:
    """All that a stage holds, one after the other."""
    forward, backward, weight = Breakdown(), Breakdown(), 0.0
    counts = (stage.dense, stage.moe, stage.head, stage.mtp)
    for count, block in zip(counts, blocks, strict=True):
        if count:
            forward, backward = forward + block.forward * count, backward + block.backward * count
            weight += block.weight * count
    return BlockTime(forward, backward, weight)


def _stage_time(block: BlockTime, system: System, dual: bool) -> StageTime:
    """Exchanges that are hidden, by no more than there is to compute, take their share of the
    compute units: as long as they last, in DeepSeek's DualPipe all the time."""
    slow = 1 / (1 - system.dedicated_sms) if dual and system.always_dedicated else 1.0

    def seconds(part: Breakdown) -> float:
        hidden = 0.0 if dual else min(system.hidden_all_to_all * part.all_to_all, part.compute)
        exchange = part.all_to_all - hidden * (1 - system.dedicated_sms)
        return part.compute * slow + exchange + part.other_links

    forward, backward = seconds(block.forward), seconds(block.backward)
    if not dual:
        return StageTime(forward, backward, block.weight)
    lent = 0.0 if system.always_dedicated else system.dedicated_sms
    parts = block.forward, block.backward
    hidden = [part.all_to_all * (1 - lent) for part in parts]
    links = [part.all_to_all + part.beside for part in parts]
    return StageTime(forward, backward, block.weight * slow, *hidden, *links)


def _hop(job: Job, device: Device) -> float:
    """Seconds of a micro-batch's activations from one rank of a pipeline to the next."""
    ranks = job.ranks
    if ranks.pp == 1:
        return 0.0
    number = 4 if job.precision == "fp32" else 2
    sent = number * job.micro_batch * job.seq_length / ranks.cp / ranks.tp
    sent *= job.architecture.hidden
    if device.cpu:
        return device.cpu.hop(sent)
    inside = ranks.world <= device.domain
    return sent / (device.nvlink * NVLINK if inside else device.network * NETWORK)


def traffic(job: Job, device: Device) -> dict[str, tuple[float, float]]:
    """Bytes that the busiest GPU sends in a step by what for: over the network, and over NVLink.

    Data-parallel exchange is counted as crossing the network unless all GPUs share a domain.
    """
    ranks, count = job.ranks, job.micro_batches
    tokens = job.micro_batch * job.seq_length / ranks.cp / ranks.tp
    moe = max(sum(job.stages[s].moe + job.stages[s].mtp for s in held) for held in job.held)
    far, near = sent_to_experts(
        job.architecture, device, ranks.ep, tokens, job.precision, job.system
    )
    times = 2 * moe * count / (2 if job.schedule == "DualPipe" else 1)  # forward and backward
    inside = ranks.world <= device.domain
    hops = 2 * 2 * tokens * job.architecture.hidden * count * max(map(len, job.held))
    hops *= ranks.pp > 1
    dense, experts = _held_weights(job)
    data = _data_parallel_bytes(job, dense, experts)
    return {
        "experts": (far * times, near * times),
        "pipeline": (0.0, hops) if inside else (hops, 0.0),
        "data parallel": (0.0, data) if inside else (data, 0.0),
    }


def _outside(job: Job, device: Device) -> tuple[float, float]:
    """Seconds of the optimiser, and of the exposed part of the data-parallel exchange."""
    ranks = job.ranks
    dense, experts = _held_weights(job)
    kept = dense / (ranks.dp * ranks.cp) + experts / ranks.expert_dp
    if device.cpu:
        return device.cpu.outside_passes(job, kept, dense, experts)
    sent = _data_parallel_bytes(job, dense, experts)
    inside = ranks.world <= device.domain
    exchange = sent / (device.nvlink * NVLINK if inside else device.network * NETWORK)
    each = OPTIMIZER_BYTES / (device.hbm * MEMORY)
    return kept * each, exchange * (1 - job.system.hidden_data_parallel)


def _data_parallel_bytes(job: Job, dense: float, experts: float) -> float:
    """Gradients and weights of what other ranks hold too."""
    ranks = job.ranks
    shared = dense * (ranks.dp * ranks.cp > 1) + experts * (1 - 1 / ranks.expert_dp)
    return job.system.exchanged_bytes * job.exchanges * shared


def _held_weights(job: Job) -> tuple[float, float]:
    """Numbers of the fullest rank, data parallelism not applied: dense, and of routed experts."""
    arch, ranks = job.architecture, job.ranks
    kinds: dict[Stage, tuple[float, float]] = {}
    for stage in set(job.stages):
        moe = stage.moe + stage.mtp
        tables = (stage.embedding + bool(stage.head)) * arch.vocab * arch.hidden
        dense = moe * arch.block_size[True] + stage.dense * arch.block_size[False] + tables
        experts = moe * arch.experts * arch.expert_size
        kinds[stage] = dense / ranks.tp, experts / ranks.ep
    most = (0.0, 0.0)
    for held in job.held:
        mine = [kinds[job.stages[stage]] for stage in held]
        most = max(most, (sum(d for d, _ in mine), sum(e for _, e in mine)), key=sum)
    return most


@lru_cache(maxsize=4096)
def _cached_flops(architecture: object, seq_length: int, convention: Convention) -> int:
    return flops_per_token(architecture, seq_length, convention)  # type: ignore[arg-type]


def _flops(job: Job, convention: Convention) -> int:
    return _cached_flops(job.architecture, job.seq_length, convention)
