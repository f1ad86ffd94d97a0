"""Alarms: what is wrong with a run, as far as its numbers tell; said once, and kept in the log.

One detector for each kind of trouble: it is shown every step and says what is new, and says a thing
again only after it was over. Detectors know numbers alone: no trainer, no files.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deepseek.config.schema import ModelConfig
from deepseek.console import say
from deepseek.frameworks import Trainer
from deepseek.monitoring.load_metrics import DeadSince, effective_experts
from deepseek.monitoring.record.expert_monitor import ExpertMonitor, ExpertRecord
from deepseek.monitoring.record.metrics_log import MetricsLog
from deepseek.monitoring.record.rank_monitor import RankMonitor, RankRecord
from deepseek.training.step import DeepSeekCallback, DeepSeekModel

MOST_SHOWN = 3
"""Alarms of one kind that are shown of one step; the log has all."""


class Alarms(DeepSeekCallback):
    """Shows every step to the detectors. On rank 0, after the monitors and the log.

    Args:
        log: where the events go.
        experts: its newest record is looked at; None: there is none.
        ranks: the same.
        settled_step: until which routers are only judged by a complete collapse.
    """

    def __init__(
        self,
        log: MetricsLog,
        experts: ExpertMonitor | None,
        ranks: RankMonitor | None,
        settled_step: int = 0,
    ) -> None:
        self._log = log
        self._experts, self._ranks = experts, ranks
        self._detectors = detectors(settled_step)

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Look at the step that has ended."""
        begin = time.perf_counter()
        record = module.step_record
        assert record is not None
        experts = self._experts.latest if self._experts else None
        ranks = self._ranks.latest if self._ranks else None
        seen = Seen(
            record.step,
            record.loss,
            record.grad_norm,
            record.skipped,
            experts if experts and experts.step == record.step else None,
            ranks if ranks and ranks.step == record.step else None,
        )
        alarms = [alarm for detector in self._detectors for alarm in detector.look(seen)]
        for alarm in alarms:
            told = {"kind": alarm.kind, "message": alarm.message, "remedy": alarm.remedy}
            self._log.event("alarm", record.step, **told, **alarm.numbers)
        for line in shown(record.step, alarms):
            say(line)
        self._log.add_cost(time.perf_counter() - begin)


def shown(step: int, alarms: list[Alarm]) -> list[str]:
    """Lines for people, a few of each kind."""
    lines: list[str] = []
    count: Counter[str] = Counter()
    for alarm in alarms:
        count[alarm.kind] += 1
        if count[alarm.kind] <= MOST_SHOWN:
            lines.append(f"ALARM        step {step}, {alarm.kind}: {alarm.message}")
            lines.append(f"             {alarm.remedy}")
    for kind, number in count.items():
        if number > MOST_SHOWN:
            lines.append(f"ALARM        step {step}, {kind}: {number - MOST_SHOWN} more in the log")
    return lines


COLLAPSED_SHARE = 0.75
"""Of the way from all experts in use to one token's choice of experts being everybody's. Untrained
routers without any balancing stay below a half."""
COLLAPSED_RECORDS = 5
"""In a row: a single batch of odd tokens is no collapse."""
COMPLETE_SHARE = 0.9999
"""The same while routers settle: all tokens go to the same choice of experts."""
SETTLED_BIAS = 0.3
"""What the correction bias must be able to reach before it is judged, in units of the scores: loads
of new routers swing widely until then, and come to rest by themselves."""
LEAST_LOAD = 8.0
"""Assignments per expert below which a layer's counts say too little."""
DEAD_RECORDS = 20
"""In a row without a token."""
DEAD_MISSED = 100.0
"""Assignments that a fair share would have been meanwhile. An expert that gets a tenth of its share
stays without any that long in one of e^10 cases."""
STRAGGLER_RATIO = 1.25
"""Seconds of computation over the median of the others: above what uneven experts of a balanced
model, or the clocks of equal machines, account for."""
STRAGGLER_SECONDS = 0.01
"""More than the others in a step: below it, the operating system's own moments count."""
STRAGGLER_RECORDS = 20
"""Of which the median is taken: one slow step is no straggler."""
SPIKE_SIGMA = 8.0
"""Above the median loss of the steps before, in robust standard deviations."""
SPIKE_NATS = 0.2
"""And so many nats: where the loss hardly varies, a trifle is many deviations."""
SPIKE_WINDOW = 100
"""Steps before."""
SPIKE_LEAST = 30
"""Steps before any spike is called one."""
CALM_STEPS = 20
"""Without a non-finite number, after which the next one is told again."""
CREEP_BLOCKS = 10
CREEP_RECORDS = 50
"""Medians of so many blocks of so many records must all ascend: a cache that fills ends sooner."""
CREEP_SHARE = 0.03
"""Growth over all blocks, and ..."""
CREEP_BYTES = 64 * 2**20
"""... in bytes, below which nobody runs out of memory in a day."""


@dataclass(frozen=True)
class Seen:
    """One step; a part that was not recorded in it is None."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool
    experts: ExpertRecord | None = None
    ranks: RankRecord | None = None


@dataclass(frozen=True)
class Alarm:
    """One finding, for people and for the log."""

    kind: str
    message: str
    """What, where, and the numbers."""
    remedy: str
    """What is likely to help."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """``layer``, ``rank`` and others, for programs."""


class Detector(Protocol):
    """Looks for one kind of trouble."""

    def look(self, seen: Seen) -> list[Alarm]:
        """What begins with this step; steps ascend."""
        ...


def detectors(settled_step: int = 0) -> list[Detector]:
    """One of each kind."""
    return [
        NonFinite(),
        LossSpike(),
        RouterCollapse(settled_step),
        DeadExperts(settled_step),
        Straggler(),
        MemoryCreep(),
    ]


def settled_step(model: ModelConfig) -> int:
    """From which on the routers of a run should be balanced: after the warm-up, and the steps that
    the correction bias needs to reach ``SETTLED_BIAS``."""
    rate = model.moe_router_bias_update_rate or ModelConfig.moe_router_bias_update_rate
    return model.optim.sched.warmup_steps + round(SETTLED_BIAS / rate)


class NonFinite:
    """``non_finite``: a loss or a gradient that is no number."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._count = 0

    def look(self, seen: Seen) -> list[Alarm]:
        """See ``Detector``."""
        if math.isfinite(seen.loss) and math.isfinite(seen.grad_norm) and not seen.skipped:
            return []
        is_new = seen.step - self._last > CALM_STEPS
        self._last = seen.step
        self._count += 1
        if not is_new:
            return []
        changed = "no weight was changed" if seen.skipped else "the weights were changed"
        return [
            Alarm(
                "non_finite",
                f"loss {seen.loss:g}, gradient norm {seen.grad_norm:g}; {changed}, "
                f"this is the {_ordinal(self._count)} such step since the start",
                "one alone is harmless; if they come again, lower model.optim.lr, or look at the "
                "data of these steps",
                {"count": self._count},
            )
        ]


class LossSpike:
    """``loss_spike``: a loss far above those before it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._high = False

    def look(self, seen: Seen) -> list[Alarm]:
        """See ``Detector``."""
        if not math.isfinite(seen.loss):
            return []
        found = []
        if len(self._losses) >= SPIKE_LEAST:
            losses = np.array(self._losses)
            median = float(np.median(losses))
            # Of the differences from step to step: a loss that falls quickly does not hide a spike.
            sigma = 1.4826 * float(np.median(np.abs(np.diff(losses)))) / math.sqrt(2)
            above = seen.loss - median
            if above > max(SPIKE_SIGMA * sigma, SPIKE_NATS):
                if not self._high:
                    found.append(self._alarm(seen, median, sigma, len(losses)))
                self._high = True
            elif above < max(SPIKE_SIGMA * sigma, SPIKE_NATS) / 2:
                self._high = False
        self._losses.append(seen.loss)
        return found

    def _alarm(self, seen: Seen, median: float, sigma: float, steps: int) -> Alarm:
        times = f", {(seen.loss - median) / sigma:.1f} sigma above it" if sigma else ""
        return Alarm(
            "loss_spike",
            f"loss {seen.loss:.4f}, the median of the last {steps} steps is {median:.4f}{times}; "
            f"gradient norm {seen.grad_norm:.3g}",
            "if the loss does not come back within some hundred steps: go on from the checkpoint "
            "before it with a lower model.optim.lr or trainer.gradient_clip_val",
            {"loss": seen.loss, "median": median, "sigma": sigma},
        )


class RouterCollapse:
    """``router_collapse``: a layer sends nearly everything to a few experts."""

    def __init__(self, settled_step: int = 0) -> None:
        self._in_a_row: dict[str, int] = {}
        self._settled_step = settled_step

    def look(self, seen: Seen) -> list[Alarm]:
        """See ``Detector``."""
        record = seen.experts
        if record is None or record.tokens_LE.size == 0:
            return []
        experts = record.tokens_LE.shape[1]
        total_L = record.tokens_LE.sum(axis=1)
        top_k = record.top_k
        if experts <= 2 * top_k:  # half of the experts for every token is no collapse
            return []
        found = []
        is_settled = seen.step > self._settled_step
        most = COLLAPSED_SHARE if is_settled else COMPLETE_SHARE
        effective_L = effective_experts(record.tokens_LE) * experts
        for row, layer in enumerate(record.layers):
            way = (experts - effective_L[row]) / (experts - top_k)
            if total_L[row] < LEAST_LOAD * experts or not way > most:
                self._in_a_row[layer] = 0
                continue
            self._in_a_row[layer] = self._in_a_row.get(layer, 0) + 1
            if self._in_a_row[layer] == COLLAPSED_RECORDS:
                found.append(self._alarm(record, row, float(effective_L[row])))
        return found

    def _alarm(self, record: ExpertRecord, row: int, effective: float) -> Alarm:
        tokens_E = record.tokens_LE[row]
        layer, experts = record.layers[row], len(tokens_E)
        few = max(1, round(effective))
        hottest = np.argsort(-tokens_E)[:few]
        share = tokens_E[hottest].sum() / tokens_E.sum()
        return Alarm(
            "router_collapse",
            f"{layer} uses {effective:.1f} of {experts} experts: {_listed(hottest)} take "
            f"{share:.0%} of its tokens, for {COLLAPSED_RECORDS} records in a row",
            "raise model.moe_router_bias_update_rate or model.moe_aux_loss_coeff, lower "
            "model.optim.lr, and go on from a checkpoint before it",
            {"layer": layer, "effective_experts": round(effective, 2), "experts": experts},
        )


class DeadExperts:
    """``dead_experts``: experts that no token has been sent to for long."""

    def __init__(self, settled_step: int = 0) -> None:
        self._settled_step = settled_step
        self._since = DeadSince()
        self._missed_LE = np.zeros((0, 0))
        self._told: set[tuple[int, int]] = set()

    def look(self, seen: Seen) -> list[Alarm]:
        """See ``Detector``."""
        record = seen.experts
        if record is None or record.tokens_LE.size == 0:
            return []
        tokens_LE = record.tokens_LE
        if self._missed_LE.shape != tokens_LE.shape:
            self._missed_LE = np.zeros(tokens_LE.shape)
        self._since.add(record.step, tokens_LE)
        fair_L1 = tokens_LE.mean(axis=1, keepdims=True)
        self._missed_LE = np.where(tokens_LE == 0, self._missed_LE + fair_L1, 0.0)
        if not (self._missed_LE >= DEAD_MISSED).any():
            self._told.clear()
            return []
        dead = {
            (one.layer, one.expert): one.since
            for one in self._since.experts()
            if one.steps >= DEAD_RECORDS and self._missed_LE[one.layer, one.expert] >= DEAD_MISSED
        }
        if seen.step <= self._settled_step:
            count = Counter(layer for layer, _ in dead)
            least = tokens_LE.shape[1] - record.top_k
            dead = {at: since for at, since in dead.items() if count[at[0]] >= least}
        new = dead.keys() - self._told
        self._told = set(dead)
        return [
            self._alarm(record, layer, {e: dead[layer, e] for at, e in sorted(new) if at == layer})
            for layer in sorted({layer for layer, _ in new})
        ]

    def _alarm(self, record: ExpertRecord, row: int, since: dict[int, int]) -> Alarm:
        layer, first = record.layers[row], min(since.values())
        return Alarm(
            "dead_experts",
            f"{layer}: {_listed(since)} without a token since step {first}, "
            f"{len(since)} of {record.tokens_LE.shape[1]}",
            "raise model.moe_router_bias_update_rate: a correction bias of a few hundredths more "
            "brings them back",
            {"layer": layer, "experts": sorted(since), "since": first},
        )


class Straggler:
    """``straggler``: a rank that computes longer than those with the same work."""

    def __init__(self) -> None:
        self._seconds: deque[np.ndarray] = deque(maxlen=STRAGGLER_RECORDS)
        self._slow: set[int] = set()

    def look(self, seen: Seen) -> list[Alarm]:
        """See ``Detector``."""
        record = seen.ranks
        if record is None or len(record.ranks_RM) < 2:
            return []
        self._seconds.append(record.column("compute_seconds"))
        if len(self._seconds) < STRAGGLER_RECORDS:
            return []
        seconds_SR = np.array(self._seconds)
        stages_R = np.array(record.stages)
        others_SR = np.full(seconds_SR.shape, np.nan)
        for rank, stage in enumerate(stages_R):
            same = (stages_R == stage) & (np.arange(len(stages_R)) != rank)
            if same.any():
                others_SR[:, rank] = np.median(seconds_SR[:, same], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio_R = np.median(seconds_SR / others_SR, axis=0)
        more_R = np.median(seconds_SR - others_SR, axis=0)
        is_slow = (ratio_R > STRAGGLER_RATIO) & (more_R > STRAGGLER_SECONDS)
        slow = set(np.flatnonzero(is_slow).tolist())
        found = [
            self._alarm(rank, seconds_SR, others_SR, float(ratio_R[rank]))
            for rank in sorted(slow - self._slow)
        ]
        calm = set(np.flatnonzero(~(ratio_R > (1 + STRAGGLER_RATIO) / 2)).tolist())
        self._slow = (self._slow | slow) - calm
        return found

    def _alarm(
        self, rank: int, seconds_SR: np.ndarray, others_SR: np.ndarray, ratio: float
    ) -> Alarm:
        own, others = np.median(seconds_SR[:, rank]), np.median(others_SR[:, rank])
        return Alarm(
            "straggler",
            f"rank {rank} computes {ratio:.2f} times as long as the ranks with the same work: "
            f"{own:.4g} s a step, their median is {others:.4g} s, over {STRAGGLER_RECORDS} records",
            "if its experts have more tokens than the others, balance them; else look at its "
            "clock, its temperature and what else runs there, or leave the machine out",
            {"rank": rank, "ratio": round(ratio, 3)},
        )


class MemoryCreep:
    """``memory_creep``: a rank's memory grows and does not stop."""

    def __init__(self) -> None:
        self._recent: list[np.ndarray] = []
        self._medians: deque[np.ndarray] = deque(maxlen=CREEP_BLOCKS)
        self._creeping: set[int] = set()

    def look(self, seen: Seen) -> list[Alarm]:
        """See ``Detector``."""
        record = seen.ranks
        if record is None:
            return []
        self._recent.append(record.column("memory_bytes"))
        if len(self._recent) < CREEP_RECORDS:
            return []
        self._medians.append(np.median(self._recent, axis=0))
        self._recent.clear()
        if len(self._medians) < CREEP_BLOCKS:
            return []
        blocks_BR = np.array(self._medians)
        growth_R = blocks_BR[-1] - blocks_BR[0]
        steps_BR = np.diff(blocks_BR, axis=0)
        creeps_R = (
            (steps_BR > 0).all(axis=0)
            # What fills up and ends grows less and less.
            & (steps_BR[-3:].mean(axis=0) > 0.5 * steps_BR.mean(axis=0))
            & (growth_R > CREEP_SHARE * blocks_BR[0])
            & (growth_R > CREEP_BYTES)
        )
        creeping = set(np.flatnonzero(creeps_R).tolist())
        new, self._creeping = creeping - self._creeping, creeping
        if not new:
            return []
        rank = max(new, key=lambda r: growth_R[r])
        per_record = growth_R[rank] / ((CREEP_BLOCKS - 1) * CREEP_RECORDS)
        others = f", so did {len(new) - 1} more ranks" if len(new) > 1 else ""
        total = CREEP_BLOCKS * CREEP_RECORDS
        return [
            Alarm(
                "memory_creep",
                f"the memory of rank {rank} grew without a stop, from "
                f"{blocks_BR[0, rank] / 2**30:.2f} to {blocks_BR[-1, rank] / 2**30:.2f} GiB over "
                f"{total} records, {per_record / 2**20:.2f} MiB each{others}",
                "something keeps tensors or rows: a callback, a logger, a loader's worker "
                "(model.data.num_workers=0 tells); until it is found, restart from checkpoints "
                "before memory runs out",
                {"rank": rank, "bytes_per_record": int(per_record)},
            )
        ]


def _listed(experts: Any) -> str:
    """``experts 3, 17, 40, ... (9)``."""
    numbers = sorted(int(expert) for expert in experts)
    text = ", ".join(map(str, numbers[:8])) + (f", ... ({len(numbers)})" if numbers[8:] else "")
    return f"expert{'s' if len(numbers) > 1 else ''} {text}"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0)
    return f"{number}{ending or 'th'}"
