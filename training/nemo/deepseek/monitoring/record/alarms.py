"""Alarms: what is wrong with a run, as far as its numbers tell; said once, and kept in the log.

One detector for each kind of trouble: it is shown every step, and tells the beginning and the end
of each trouble once. Detectors know numbers and the configuration alone: no trainer, no files.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.console import say
from deepseek.frameworks import Trainer
from deepseek.monitoring.load_metrics import DeadSince, nats_of
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
        run: the configuration, which the detectors go by; None: any.
    """

    def __init__(
        self,
        log: MetricsLog,
        experts: ExpertMonitor | None,
        ranks: RankMonitor | None,
        run: RunConfig | None = None,
    ) -> None:
        self._log = log
        self._experts, self._ranks = experts, ranks
        self._detectors = detectors(run)

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
        found = [one for detector in self._detectors for one in detector.look(seen)]
        for one in found:
            told: dict[str, Any] = {"kind": one.kind, "message": one.message}
            if isinstance(one, Alarm):
                self._log.event("alarm", seen.step, **told, remedy=one.remedy, **one.numbers)
            else:
                self._log.event("alarm_over", seen.step, **told, since=one.since, **one.place)
        if found:
            for line in shown(seen.step, found):
                say(line)
        self._log.add_cost(time.perf_counter() - begin)


def shown(step: int, found: Sequence[Alarm | Over]) -> list[str]:
    """Lines for people, a few of each kind."""
    lines: list[str] = []
    count: Counter[tuple[str, str]] = Counter()
    for one in found:
        word = "ALARM       " if isinstance(one, Alarm) else "ALARM OVER  "
        count[word, one.kind] += 1
        if count[word, one.kind] > MOST_SHOWN:
            continue
        end = "" if isinstance(one, Alarm) else f" (alarm of step {one.since})"
        lines.append(f"{word} step {step}, {one.kind}: {one.message}{end}")
        if isinstance(one, Alarm):
            lines.append(f"             {one.remedy}")
    for (word, kind), number in count.items():
        if number > MOST_SHOWN:
            lines.append(f"{word} step {step}, {kind}: {number - MOST_SHOWN} more in the log")
    return lines


COLLAPSED_SHARE = 0.75
"""Of the way from all experts in use to one token's choice of experts being everybody's. Untrained
routers without any balancing stay below a half."""
COLLAPSED_RECORDS = 5
"""In a row: a single batch of odd tokens is no collapse."""
COMPLETE_SHARE = 0.9999
"""The same while routers settle: all tokens go to the same choice of experts, ..."""
SETTLING_RECORDS = 30
"""... and to the same one so often in a row. While tokens still look alike, as in the first hundred
steps, layers send all to one choice, until the bias has moved them on to another one; ..."""
SETTLING_BIAS = 0.03
"""... it has had to move this far in no sound run; a slower bias takes more records."""
SETTLED_BIAS = 0.3
"""What the correction bias must be able to reach before it is judged, in units of the scores: loads
of new routers swing widely until then, and come to rest by themselves, ..."""
SETTLED_STEPS = 300
"""... but not before their tokens differ, however fast the bias is."""
CALM_RECORDS = 20
"""Without a collapse, after which it is over."""
LEAST_LOAD = 8.0
"""Assignments per expert below which a layer's counts say too little."""
DEAD_RECORDS = 20
"""In a row without a token."""
RETURNED_SHARE = 0.05
"""Of a fair share, over as many records and assignments: then a dead expert is back."""
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
    """The beginning of a trouble, for people and for the log."""

    kind: str
    message: str
    """What, where, and the numbers."""
    remedy: str
    """What is likely to help."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """``layer``, ``rank`` and others, for programs."""


@dataclass(frozen=True)
class Over:
    """The end of a trouble."""

    kind: str
    message: str
    """What is seen now."""
    since: int
    """Step of its alarm."""
    place: dict[str, Any] = field(default_factory=dict)
    """``layer`` or ``rank``, as the alarm has it."""


class Detector:
    """Looks for one kind of trouble.

    Attributes:
        kind: its name.
    """

    kind = ""

    def __init__(self) -> None:
        self._told: dict[Any, int] = {}  # troubles that are not over: place, step of the alarm

    def look(self, seen: Seen) -> list[Alarm | Over]:
        """What begins and what ends with this step; steps ascend."""
        return list(self._look(seen))

    def _look(self, seen: Seen) -> Iterator[Alarm | Over]:
        raise NotImplementedError

    def _over(self, place: Any, message: str, **name: Any) -> Over:
        return Over(self.kind, message, self._told.pop(place), name)


def detectors(run: RunConfig | None = None) -> list[Detector]:
    """One of each kind, with remedies that the user of this configuration can follow.

    Args:
        run: None: nothing is known of it.
    """
    if run is None:
        return [
            NonFinite(),
            LossSpike(),
            RouterCollapse(),
            DeadExperts(),
            Straggler(),
            MemoryCreep(),
        ]
    settling, balance = Settling.of(run.model), _balance(run.model)
    calmer = f"model.optim.lr={run.model.optim.lr / 2:g} (it is {run.model.optim.lr:g})"
    clip = run.trainer.gradient_clip_val
    return [
        NonFinite(calmer),
        LossSpike(f"{calmer} or trainer.gradient_clip_val={clip / 2 if clip else 1.0:g}"),
        RouterCollapse(settling, balance),
        DeadExperts(settling, balance),
        Straggler(),
        MemoryCreep(run.model.data.num_workers),
    ]


@dataclass(frozen=True)
class Settling:
    """How routers are judged before they should be balanced."""

    until_step: int = 0
    records: int = SETTLING_RECORDS
    """In a row, of a complete collapse."""

    @staticmethod
    def of(model: ModelConfig) -> Settling:
        """Through the warm-up and ``SETTLED_STEPS``, or what the correction bias needs to reach
        ``SETTLED_BIAS``."""
        rate = model.moe_router_bias_update_rate or ModelConfig.moe_router_bias_update_rate
        return Settling(
            model.optim.sched.warmup_steps + max(SETTLED_STEPS, round(SETTLED_BIAS / rate)),
            max(DEAD_RECORDS, round(SETTLING_BIAS / rate)),
        )


BALANCE = "more of model.moe_router_bias_update_rate or model.moe_aux_loss_coeff"


def _balance(model: ModelConfig) -> str:
    """What balances the routers of this model: only what its configuration lets act."""
    loss, rate = model.moe_aux_loss_coeff, model.moe_router_bias_update_rate
    more = f"model.moe_aux_loss_coeff={max(10 * loss, 1e-3):g} (it is {loss:g})"
    if model.topk_method != "noaux_tc":  # no correction bias
        return more
    faster = 2 * rate or ModelConfig.moe_router_bias_update_rate
    return f"model.moe_router_bias_update_rate={faster:g} (it is {rate:g}) or {more}"


class NonFinite(Detector):
    """``non_finite``: a loss or a gradient that is no number."""

    kind = "non_finite"

    def __init__(self, calmer: str = "a lower model.optim.lr") -> None:
        super().__init__()
        self._calmer = calmer
        self._last = 0
        self._count = 0

    def _look(self, seen: Seen) -> Iterator[Alarm | Over]:
        if math.isfinite(seen.loss) and math.isfinite(seen.grad_norm) and not seen.skipped:
            if self._told and seen.step - self._last >= CALM_STEPS:
                yield self._over(None, f"loss {seen.loss:.4f}, {CALM_STEPS} sound steps in a row")
            return
        self._last = seen.step
        self._count += 1
        if self._told:
            return
        self._told[None] = seen.step
        changed = "no weight was changed" if seen.skipped else "the weights were changed"
        yield Alarm(
            self.kind,
            f"loss {seen.loss:g}, gradient norm {seen.grad_norm:g}; {changed}, "
            f"this is the {_ordinal(self._count)} such step since the start",
            f"one alone is harmless; if they come again, continue with {self._calmer}, or look at "
            "the data of these steps",
            {"count": self._count},
        )


class LossSpike(Detector):
    """``loss_spike``: a loss far above those before it."""

    kind = "loss_spike"

    def __init__(self, calmer: str = "a lower model.optim.lr or trainer.gradient_clip_val") -> None:
        super().__init__()
        self._calmer = calmer
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._before = (0.0, 0.0)  # of the spike: the median, and what was far above it

    def _look(self, seen: Seen) -> Iterator[Alarm | Over]:
        if not math.isfinite(seen.loss):
            return
        if self._told:
            median, far = self._before
            if seen.loss - median < far / 2:
                yield self._over(None, f"loss {seen.loss:.4f} again, before it {median:.4f}")
            elif seen.step - self._told[None] >= SPIKE_WINDOW:  # the new level is what is usual now
                yield self._over(None, f"loss {seen.loss:.4f} has stayed, before it {median:.4f}")
        elif len(self._losses) >= SPIKE_LEAST:
            losses = list(self._losses)  # of so few, numpy's median takes longer
            median = statistics.median(losses)
            if seen.loss - median > SPIKE_NATS:
                yield from self._spike(seen, losses, median)
        self._losses.append(seen.loss)

    def _spike(self, seen: Seen, losses: list[float], median: float) -> Iterator[Alarm]:
        # Of the differences from step to step: a loss that falls quickly does not hide a spike.
        steps = [abs(one - other) for one, other in pairwise(losses)]
        sigma = 1.4826 * statistics.median(steps) / math.sqrt(2)
        far = max(SPIKE_SIGMA * sigma, SPIKE_NATS)
        if seen.loss - median > far:
            self._told[None], self._before = seen.step, (median, far)
            yield self._alarm(seen, median, sigma, len(losses))

    def _alarm(self, seen: Seen, median: float, sigma: float, steps: int) -> Alarm:
        times = f", {(seen.loss - median) / sigma:.1f} sigma above it" if sigma else ""
        return Alarm(
            self.kind,
            f"loss {seen.loss:.4f}, the median of the last {steps} steps is {median:.4f}{times}; "
            f"gradient norm {seen.grad_norm:.3g}",
            f"if the loss does not come back within {SPIKE_WINDOW} steps: go back to the "
            "checkpoint before it (deepseek train ... --resume-from STEP --resume-with-changes) "
            f"with {self._calmer}",
            {"loss": seen.loss, "median": median, "sigma": sigma},
        )


class RouterCollapse(Detector):
    """``router_collapse``: a layer sends nearly everything to a few experts."""

    kind = "router_collapse"

    def __init__(self, settling: Settling = Settling(), balance: str = BALANCE) -> None:
        super().__init__()
        self._settling, self._balance = settling, balance
        self._before: ExpertRecord | None = None
        self._in_a_row: Counter[str] = Counter()  # collapsed records
        self._calm: Counter[str] = Counter()  # others

    def _look(self, seen: Seen) -> Iterator[Alarm | Over]:
        record = seen.experts
        if record is None or record.tokens_LE.size == 0:
            return
        experts, top_k = record.tokens_LE.shape[1], record.top_k
        if experts <= 2 * top_k:  # half of the experts for every token is no collapse
            return
        is_settled = seen.step > self._settling.until_step
        most = COLLAPSED_SHARE if is_settled else COMPLETE_SHARE
        needed = COLLAPSED_RECORDS if is_settled else self._settling.records
        before, self._before = self._before, record
        for row, (layer, counts) in enumerate(zip(record.layers, record.counts, strict=True)):
            total = sum(counts)
            effective = math.exp(nats_of(counts)) if total else math.nan
            way = (experts - effective) / (experts - top_k)
            is_collapsed = way > most and total >= LEAST_LOAD * experts
            if not is_collapsed:
                self._in_a_row[layer] = 0
                self._calm[layer] += 1
                if layer in self._told and self._calm[layer] >= CALM_RECORDS:
                    now = f"{layer} uses {effective:.1f} of {experts} experts"
                    yield self._over(layer, now, layer=layer)
                continue
            self._calm[layer] = 0
            goes_on = is_settled or before is None or _hottest(before, row) == _hottest(record, row)
            self._in_a_row[layer] = self._in_a_row[layer] + 1 if goes_on else 1
            if self._in_a_row[layer] >= needed and layer not in self._told:
                self._told[layer] = seen.step
                yield self._alarm(record, row, effective)

    def _alarm(self, record: ExpertRecord, row: int, effective: float) -> Alarm:
        tokens_E = record.tokens_LE[row]
        layer, experts = record.layers[row], len(tokens_E)
        few = max(1, round(effective))
        hottest = np.argsort(-tokens_E)[:few]
        share = tokens_E[hottest].sum() / tokens_E.sum()
        return Alarm(
            self.kind,
            f"{layer} uses {effective:.1f} of {experts} experts: {_listed(hottest)} take "
            f"{share:.0%} of its tokens, for {self._in_a_row[layer]} records in a row",
            f"continue with {self._balance}; if that does not help, from a checkpoint before it "
            "(deepseek train ... --resume-from STEP --resume-with-changes) with a lower "
            "model.optim.lr",
            {"layer": layer, "effective_experts": round(effective, 2), "experts": experts},
        )


def _hottest(record: ExpertRecord, row: int) -> set[int]:
    """The experts of a layer that most tokens go to, as many as a token has."""
    return set(np.argsort(-record.tokens_LE[row])[: record.top_k].tolist())


@dataclass
class _Dead:
    """Experts of a layer that one alarm told of, and what they got in the records of late."""

    experts: list[int]
    got_e: np.ndarray
    fair: float = 0.0
    records: int = 0


class DeadExperts(Detector):
    """``dead_experts``: experts that no token has been sent to for long."""

    kind = "dead_experts"

    def __init__(self, settling: Settling = Settling(), balance: str = BALANCE) -> None:
        super().__init__()
        self._settling, self._balance = settling, balance
        self._since = DeadSince()
        self._missed_LE = np.zeros((0, 0))
        self._dead: dict[tuple[int, int], _Dead] = {}  # by row and step of the alarm

    def _look(self, seen: Seen) -> Iterator[Alarm | Over]:
        record = seen.experts
        if record is None or record.tokens_LE.size == 0:
            return
        tokens_LE = record.tokens_LE
        if self._missed_LE.shape != tokens_LE.shape:
            self._missed_LE = np.zeros(tokens_LE.shape)
        self._since.add(record.step, tokens_LE)
        if tokens_LE.all():
            self._missed_LE.fill(0)
        else:
            self._missed_LE += tokens_LE.sum(axis=1, keepdims=True) / tokens_LE.shape[1]
            self._missed_LE *= tokens_LE == 0
        for place in [place for place in self._dead if self._is_back(tokens_LE, place)]:
            experts, layer = self._dead.pop(place).experts, record.layers[place[0]]
            verb = "have" if len(experts) > 1 else "has"
            now = f"{layer}: {_listed(experts)} {verb} tokens again"
            yield self._over(place, now, layer=layer)
        is_settled = seen.step > self._settling.until_step
        needed = DEAD_RECORDS if is_settled else self._settling.records
        dead = {
            (one.layer, one.expert): one.since
            for one in self._since.experts(needed)
            if self._missed_LE[one.layer, one.expert] >= DEAD_MISSED
        }
        if not dead:
            return
        if not is_settled:
            count = Counter(layer for layer, _ in dead)
            least = tokens_LE.shape[1] - record.top_k
            dead = {at: since for at, since in dead.items() if count[at[0]] >= least}
        told = {(row, expert) for (row, _), one in self._dead.items() for expert in one.experts}
        new = sorted(dead.keys() - told)
        for row in sorted({row for row, _ in new}):
            since = {expert: dead[row, expert] for at, expert in new if at == row}
            self._dead[row, seen.step] = _Dead(list(since), np.zeros(len(since)))
            self._told[row, seen.step] = seen.step
            yield self._alarm(record, row, since)

    def _is_back(self, tokens_LE: np.ndarray, place: tuple[int, int]) -> bool:
        row, one = place[0], self._dead[place]
        one.got_e += tokens_LE[row, one.experts]
        one.fair += tokens_LE[row].mean()
        one.records += 1
        if one.records < DEAD_RECORDS or one.fair < DEAD_MISSED:
            return False
        is_back = bool((one.got_e >= RETURNED_SHARE * one.fair).all())
        one.got_e[:], one.fair, one.records = 0, 0.0, 0
        return is_back

    def _alarm(self, record: ExpertRecord, row: int, since: dict[int, int]) -> Alarm:
        layer, first = record.layers[row], min(since.values())
        return Alarm(
            self.kind,
            f"{layer}: {_listed(since)} without a token since step {first}, "
            f"{len(since)} of {record.tokens_LE.shape[1]}",
            f"continue with {self._balance}",
            {"layer": layer, "experts": sorted(since), "since": first},
        )


class Straggler(Detector):
    """``straggler``: a rank that computes longer than those with the same work."""

    kind = "straggler"

    def __init__(self) -> None:
        super().__init__()
        self._seconds: deque[np.ndarray] = deque(maxlen=STRAGGLER_RECORDS)

    def _look(self, seen: Seen) -> Iterator[Alarm | Over]:
        record = seen.ranks
        if record is None or len(record.ranks_RM) < 2:
            return
        self._seconds.append(record.column("compute_seconds"))
        if len(self._seconds) < STRAGGLER_RECORDS:
            return
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
        for rank, ratio in enumerate(ratio_R.tolist()):
            is_slow = ratio > STRAGGLER_RATIO and more_R[rank] > STRAGGLER_SECONDS
            if is_slow and rank not in self._told:
                self._told[rank] = seen.step
                yield self._alarm(rank, seconds_SR, others_SR, ratio)
            elif rank in self._told and not ratio > (1 + STRAGGLER_RATIO) / 2:
                now = f"rank {rank} computes {ratio:.2f} times as long as the others"
                yield self._over(rank, now, rank=rank)

    def _alarm(
        self, rank: int, seconds_SR: np.ndarray, others_SR: np.ndarray, ratio: float
    ) -> Alarm:
        own, others = np.median(seconds_SR[:, rank]), np.median(others_SR[:, rank])
        return Alarm(
            self.kind,
            f"rank {rank} computes {ratio:.2f} times as long as the ranks with the same work: "
            f"{own:.4g} s a step, their median is {others:.4g} s, over {STRAGGLER_RECORDS} records",
            "if its experts have more tokens than the others (deepseek report), balance them; else "
            "look at what else runs on its machine, at its clock and its temperature (top, "
            "nvidia-smi), or leave the machine out",
            {"rank": rank, "ratio": round(ratio, 3)},
        )


class MemoryCreep(Detector):
    """``memory_creep``: a rank's memory grows and does not stop."""

    kind = "memory_creep"

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self._workers = f" (model.data.num_workers=0, it is {num_workers}, tells)"
        if not num_workers:
            self._workers = ""
        self._recent: list[np.ndarray] = []
        self._medians: deque[np.ndarray] = deque(maxlen=CREEP_BLOCKS)

    def _look(self, seen: Seen) -> Iterator[Alarm | Over]:
        record = seen.ranks
        if record is None:
            return
        self._recent.append(record.column("memory_bytes"))
        if len(self._recent) < CREEP_RECORDS:
            return
        self._medians.append(np.median(self._recent, axis=0))
        self._recent.clear()
        if len(self._medians) < CREEP_BLOCKS:
            return
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
        for rank in [rank for rank in self._told if not creeps_R[rank]]:
            now = f"the memory of rank {rank} is {blocks_BR[-1, rank] / 2**30:.2f} GiB, and rests"
            yield self._over(rank, now, rank=rank)
        new = [r for r in np.flatnonzero(creeps_R).tolist() if r not in self._told]
        self._told |= dict.fromkeys(new, seen.step)
        if new:
            yield self._alarm(new, blocks_BR)

    def _alarm(self, new: list[int], blocks_BR: np.ndarray) -> Alarm:
        growth_R = blocks_BR[-1] - blocks_BR[0]
        rank = max(new, key=lambda r: growth_R[r])
        per_record = growth_R[rank] / ((CREEP_BLOCKS - 1) * CREEP_RECORDS)
        others = f", so did {len(new) - 1} more ranks" if len(new) > 1 else ""
        total = CREEP_BLOCKS * CREEP_RECORDS
        return Alarm(
            self.kind,
            f"the memory of rank {rank} grew without a stop, from "
            f"{blocks_BR[0, rank] / 2**30:.2f} to {blocks_BR[-1, rank] / 2**30:.2f} GiB over "
            f"{total} records, {per_record / 2**20:.2f} MiB each{others}",
            f"something keeps tensors or rows: a callback, a logger, a loader's worker"
            f"{self._workers}; until it is found, restart from checkpoints before memory runs out",
            {"rank": rank, "bytes_per_record": int(per_record)},
        )


def _listed(experts: Any) -> str:
    """``experts 3, 17, 40, ... (9)``."""
    numbers = sorted(int(expert) for expert in experts)
    text = ", ".join(map(str, numbers[:8])) + (f", ... ({len(numbers)})" if numbers[8:] else "")
    return f"expert{'s' if len(numbers) > 1 else ''} {text}"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0)
    return f"{number}{ending or 'th'}"
