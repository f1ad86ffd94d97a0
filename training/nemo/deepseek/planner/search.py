"""The fastest layouts of a number of GPUs, of all that the rules allow and the memory holds.

Millions of layouts are legal (5.8 million of V3 on 2048 GPUs), so that they are not looked at one
by one. Values are chosen key by key, and three things end a branch:

    a rule is broken     ``config/rules.py`` is the only judge; a rule that reads a key not yet
                         chosen is asked again further down
    it does not fit      with the cheapest values of the keys still open
    it is not fast       a bound below the step time, from what is chosen already; pipelines of
                         interleaved stages are played only once their bound is the lowest of all

The branch with the lowest bound goes first, as in A*: when a whole layout comes out, no other can
be faster, and what comes out is in order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import count
from typing import Any, NamedTuple, cast

from deepseek.config.errors import divisors
from deepseek.config.layout import INTERLEAVED_SCHEDULES, PLANNED, V_SCHEDULES, Layout, world_size
from deepseek.config.layout_rules import data_parallel_shards, expert_parallel
from deepseek.config.memory import in_half, reduces_gradients, reshards
from deepseek.config.rank_need import SHORT, RankNeed, rank_need, rank_needs
from deepseek.config.rules import RULES
from deepseek.config.schema import LEAVES, ModelConfig, RunConfig, changed, value_at
from deepseek.planner.hardware import Device
from deepseek.planner.job import Ranks, job_of_run
from deepseek.planner.step_time import StepEstimate, even_pipeline_seconds, predict_step

MARGIN = 0.85
"""Of the activations in 1F1B, the share that any schedule is taken to need."""

LEAST_PART = 4096
"""Tokens of a rank from which on context parallelism is tried: it is for long sequences."""

BY_REPLICAS = ("optimizer", "data-parallel exchange exposed")
"""Parts of a step that depend on how data-parallel ranks share weights."""

Choice = tuple[Any, ...]
"""Values of ``PLANNED`` in their order, or of the first ones."""

OVER_REPLICAS = [RULES.index(expert_parallel), RULES.index(data_parallel_shards)]
"""Numbers of the rules of how data-parallel ranks share weights."""

EXPERTS, MICRO, RECOMPUTE, SCHEDULE, VIRTUAL, REPLICAS = range(4, 10)
"""Numbers of values chosen when these keys have theirs, as the last."""


@dataclass(frozen=True)
class Plan:
    """One layout with what it takes."""

    run: RunConfig
    """The configuration with the layout."""
    estimate: StepEstimate
    needs: tuple[RankNeed, ...]
    """Of one rank at each place of the pipeline."""

    @property
    def values(self) -> dict[str, object]:
        """The layout by dotted key."""
        return {key: value_at(self.run, key) for key in PLANNED}

    @property
    def most(self) -> int:
        """Bytes of the fullest rank."""
        return max(need.total for need in self.needs)

    @property
    def balance(self) -> float:
        """Mean of the ranks' bytes over the most."""
        return sum(need.total for need in self.needs) / len(self.needs) / self.most

    def tight(self, memory: float) -> bool:
        """Whether it fits only if no more is needed than told."""
        return self.most * (1 + SHORT) > memory


def search(
    run: RunConfig, device: Device, memory: float, top: int = 10, fixed: Sequence[str] = ()
) -> list[Plan]:
    """The ``top`` fastest layouts of the devices, the model and the global batch of ``run``.

    Args:
        run: its values of ``PLANNED`` do not matter, but for those in ``fixed``.
        device: of which ``run`` has ``trainer.devices`` x ``trainer.num_nodes``.
        memory: bytes that a rank can take.
        top: number of layouts.
        fixed: of ``PLANNED``, keys that stay as they are in ``run``.

    Returns:
        The fastest first, and after them those that are tight; of those that differ in nothing but
        who shares which weights, one.
    """
    plans = _Search(run, device, memory / (1 + SHORT), top, fixed).found()
    if len(plans) == top or memory == math.inf:
        return plans
    both = _Search(run, device, memory, top, fixed).found()
    return (plans + [plan for plan in both if plan.tight(memory)])[:top]


def smallest(run: RunConfig, device: Device, fixed: Sequence[str] = ()) -> Plan | None:
    """The layout whose fullest rank needs least; None: none is legal."""
    plans = _Search(run, device, math.inf, 1, fixed, by_memory=True).found()
    return plans[0] if plans else None


class _Node(NamedTuple):
    """A branch, or a layout; the lowest bound first, whole layouts before branches."""

    bound: float
    """Seconds that no layout of the branch can be faster than; of a layout, its own."""
    open: int
    """Keys without a value."""
    bytes: int
    """Of the fullest rank of a layout, so that of equally fast ones the smallest goes first."""
    number: int
    """Each its own: nothing behind it is compared."""
    chosen: Choice
    rules: Sequence[int]
    """Numbers of those that are still undecided."""
    plan: Plan | None
    """A whole layout."""
    asked: int = 0
    """Of a shape, estimates that ``bound`` comes from: none, what it takes at least, its own."""


class _Search:
    def __init__(
        self,
        run: RunConfig,
        device: Device,
        memory: float,
        top: int,
        fixed: Sequence[str],
        by_memory: bool = False,
    ) -> None:
        self._by_memory = by_memory
        self._run, self._gpu, self._memory, self._top = run, device, memory, top
        self._world = world_size(run)
        self._judge = _Judge(run)
        self._options = _options(run, fixed)
        self._half = in_half(run)
        self._job = job_of_run(changed(run, dict.fromkeys(PLANNED[:4], 1)), self._world)
        self._numbers = count()
        self._fewest: dict[Choice, int | None] = {}
        self._fastest: dict[Choice, float] = {}
        self._mean_states: dict[Choice, int] = {}
        self._least: dict[Choice, float] = {}
        self._fullest = 0

    def found(self) -> list[Plan]:
        plans: list[Plan] = []
        shown: set[Choice] = set()
        heap = [_Node(0.0, len(PLANNED), 0, 0, (), range(len(RULES)), None)]
        while heap and len(plans) < self._top:
            node = heapq.heappop(heap)
            if node.plan is not None:
                if node.chosen[:VIRTUAL] not in shown:  # else it differs in who keeps what alone
                    shown.add(node.chosen[:VIRTUAL])
                    plans.append(node.plan)
                continue
            if node.chosen[:VIRTUAL] not in shown:
                for further in self._further(node):
                    heapq.heappush(heap, further)
        return plans

    def _further(self, node: _Node) -> Iterator[_Node]:
        """The next nodes of a branch, or itself with a better bound."""
        known = len(node.chosen)
        if known == RECOMPUTE and not self._may_hold(node.chosen):
            return
        if known == VIRTUAL and not self._by_memory:
            if node.asked == 1 and not self._may_fit(node.chosen):
                return  # takes longest, so that few are asked
            plays = node.chosen[RECOMPUTE] in INTERLEAVED_SCHEDULES
            if node.asked < 1 + plays:
                estimate = self._estimate(node.chosen, least=node.asked == 0)
                bound = estimate.seconds
                if node.chosen[1] == 1 or self._gpu.cpu:  # else its ranks share in one way only
                    bound -= sum(estimate.parts[part] for part in BY_REPLICAS)
                bound = max(node.bound, bound)
                asked = node.asked + 1
                yield node._replace(bound=bound, number=next(self._numbers), asked=asked)
                return
        for value in self._values(node.chosen):
            chosen = (*node.chosen, value)
            rules = self._judge.undecided(chosen, node.rules)
            if rules is None or (known + 1 == EXPERTS and self._replicas(chosen) is None):
                continue
            if known + 1 == MICRO and self._least_memory(chosen) > self._memory:
                return  # nor will more sequences fit
            plan, bound = None, self._bound(chosen)
            if known + 1 == len(PLANNED):
                plan = self._plan(chosen)
                if plan is None:
                    continue
                bound = plan.most if self._by_memory else plan.estimate.seconds
            left = len(PLANNED) - known - 1
            size, number = plan.most if plan else 0, next(self._numbers)
            bound = max(bound, node.bound)
            yield _Node(bound, left, size, number, chosen, rules, plan)

    def _values(self, chosen: Choice) -> Sequence[Any]:
        """Of the next key, those that differ."""
        known = len(chosen)
        values = self._options[known]
        if known < REPLICAS or len(values) == 1:
            return values
        if chosen[1] > 1:
            return values[:1]  # a pipeline keeps weights and gradients, whatever is asked for
        model = self._model(chosen)
        layout = Layout.of(model, self._world)
        usual = (reshards if known == REPLICAS else reduces_gradients)(model, layout)
        return [value for value in values if value is None or value != usual]

    # -- what a branch takes at least --

    def _bound(self, chosen: Choice) -> float:
        """Seconds, as far as the last key chosen tells more than its parent's bound.

        Of a pipeline whose stages are all alike, which leave no rank more than its share.
        """
        known = len(chosen)
        if not EXPERTS <= known <= VIRTUAL:
            return 0.0
        if self._by_memory:
            return self._least_memory(chosen) if known <= RECOMPUTE else 0.0
        tp, pp, cp, ep = chosen[:EXPERTS]
        # A sequence takes least in the largest micro-batch.
        micro = chosen[EXPERTS] if known >= MICRO else max(self._options[EXPERTS])
        recompute = chosen[MICRO] if known >= RECOMPUTE else None
        layers, dp = self._run.model.num_hidden_layers, self._world // (tp * pp * cp)
        batch = self._run.model.global_batch_size
        job = replace(
            self._job,
            micro_batch=micro,
            recompute=recompute or "none",
            ranks=Ranks(tp=tp, pp=pp, ep=ep, cp=cp, dp=dp),
        )
        if known > RECOMPUTE:
            schedule = chosen[RECOMPUTE]
            virtual = chosen[SCHEDULE] if known == VIRTUAL else layers // pp
            held = virtual if schedule in INTERLEAVED_SCHEDULES else 1 + (schedule in V_SCHEDULES)
            return even_pipeline_seconds(replace(job, schedule=schedule), self._gpu, pp, held)
        # One micro-batch on one rank, with a schedule that hides exchange and one that does not.
        alone = replace(job, ranks=job.ranks._replace(pp=1), global_batch=micro * dp)
        seconds = even_pipeline_seconds(replace(alone, schedule="1F1B"), self._gpu, pp, 1)
        if pp > 1 and "DualPipeV" in self._options[RECOMPUTE]:
            alone = replace(alone, schedule="DualPipeV")
            seconds = min(seconds, even_pipeline_seconds(alone, self._gpu, pp, 2))
        return seconds * batch / (micro * dp)

    def _replicas(self, chosen: Choice) -> int | None:
        """The fewest replicas with which EP can borrow ranks, and weights can be shared."""
        key = chosen[:EXPERTS]
        if key not in self._fewest:
            self._fewest[key] = next(self._numbers_of_replicas(key), None)
        return self._fewest[key]

    def _numbers_of_replicas(self, chosen: Choice) -> Iterator[int]:
        """All of them, the fewest first."""
        between = (_NotChosen,) * (REPLICAS - EXPERTS - 1)
        for n in self._options[REPLICAS - 1]:
            if self._judge.undecided((*chosen[:EXPERTS], *between, n), OVER_REPLICAS) == []:
                yield n

    def _may_hold(self, chosen: Choice) -> bool:
        """Whether so many sequences, recomputed so, can fit: none do if the fewest do not."""
        fewest = (*chosen[:EXPERTS], min(self._options[EXPERTS]), *chosen[MICRO:])
        return all(self._least_memory(each) <= self._memory for each in (fewest, chosen))

    def _least_memory(self, chosen: Choice) -> float:
        """Bytes that the fullest rank has at least: the mean of all ranks' states, and what the
        first one's micro-batches take in 1F1B, which holds as few as any schedule.

        Stages of other schedules are cut elsewhere, so that the latter is taken with a margin.
        """
        tp, pp, cp, ep = chosen[:EXPERTS]
        micro = chosen[EXPERTS] if len(chosen) >= MICRO else 1
        recompute = chosen[MICRO] if len(chosen) == RECOMPUTE else "full"
        asked = (tp, pp, cp, ep, micro, recompute)
        if asked in self._least:
            return self._least[asked]
        replicas = self._replicas(chosen)
        assert replicas is not None, "the branch has ended"
        layout = Layout(pp, replicas, self._world // (tp * pp * replicas), tp, ep, cp)
        model = replace(
            self._run.model,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            data_parallel_replicate_size=replicas,
            micro_batch_size=micro,
            activations_checkpoint_granularity=recompute,
            pipeline_schedule="1F1B",
            virtual_pipeline_model_parallel_size=1,
            pipeline_layers_per_stage=None,
            pipeline_output_stages=1,
        )
        batches = max(1, model.global_batch_size // (micro * layout.dp))
        first = self._need(model, layout, 0, batches)
        if pp == 1:
            kept = first.states + first.gradients + first.gathered
        elif (tp, pp, cp, ep) in self._mean_states:
            kept = self._mean_states[tp, pp, cp, ep]
        else:
            # The ranks of a pipeline keep all weights gathered, and all gradients.
            alone = replace(
                model,
                pipeline_model_parallel_size=1,
                reshard_after_forward=False,
                reduce_gradients=False,
            )
            whole = rank_need(alone, replace(layout, pp=1), 0, 2, self._half)
            kept = self._mean_states[tp, pp, cp, ep] = sum(whole[:3]) // pp
        rest = first.activations + first.buffers + first.working
        self._least[asked] = kept + MARGIN * rest
        return self._least[asked]

    def _need(self, model: ModelConfig, layout: Layout, rank: int, batches: int) -> RankNeed:
        """Of one place of the pipeline, if weights and gradients are divided as is best for it."""
        if layout.pp > 1:
            saving = replace(model, reshard_after_forward=None, reduce_gradients=None)
            return rank_need(saving, layout, rank, batches, self._half)
        ways = [
            replace(model, reshard_after_forward=True, reduce_gradients=each)
            for each in (True, False)
        ]
        needs = [rank_need(way, layout, rank, batches, self._half) for way in ways]
        return min(needs, key=lambda need: need.total)

    def _may_fit(self, chosen: Choice) -> bool:
        """Whether a shape can fit, however its data-parallel ranks share weights.

        Fewer replicas hold less of everything but FSDP's padding, which may be less in more of
        them: where the fewest do not fit by no more than what they gather, the others are asked.
        """
        tp, pp, cp, ep = chosen[:EXPERTS]
        fewest = self._replicas(chosen)
        assert fewest is not None, "the branch has ended"
        model = self._model((*chosen, fewest))

        def need(replicas: int, rank: int) -> RankNeed:
            layout = Layout(pp, replicas, self._world // (tp * pp * replicas), tp, ep, cp)
            batches = model.global_batch_size // (model.micro_batch_size * layout.dp)
            return self._need(model, layout, rank, batches)

        for rank in sorted(range(pp), key=lambda rank: rank != self._fullest % pp):
            first = need(fewest, rank)
            if first.total <= self._memory:
                continue
            if first.total - first.gathered > self._memory or all(
                need(number, rank).total > self._memory
                for number in self._numbers_of_replicas(chosen)
            ):
                self._fullest = rank
                return False
        return True

    # -- a layout --

    def _model(self, chosen: Choice) -> ModelConfig:
        keys = (path.removeprefix("model.") for path in PLANNED)
        return replace(self._run.model, **dict(zip(keys, chosen, strict=False)))

    def _estimate(self, chosen: Choice, least: bool) -> StepEstimate:
        run = replace(self._run, model=self._model((*chosen, self._replicas(chosen))))
        return predict_step(run, self._gpu, self._world, least)

    def _plan(self, chosen: Choice) -> Plan | None:
        """A whole layout; None if it does not fit, or one of its shape is as good."""
        run = replace(self._run, model=self._model(chosen))
        estimate, shape = predict_step(run, self._gpu, self._world), chosen[:VIRTUAL]
        if not self._by_memory and estimate.seconds >= self._fastest.get(shape, math.inf):
            return None
        needs = tuple(rank_needs(run))
        if max(need.total for need in needs) > self._memory:
            return None
        self._fastest[shape] = estimate.seconds
        return Plan(run, estimate, needs)


def _options(run: RunConfig, fixed: Sequence[str]) -> list[list[Any]]:
    """Values of each key that are worth a question, in the order of ``PLANNED``."""
    model, sizes, length = run.model, divisors(world_size(run)), run.model.data.seq_length
    worth: dict[str, list[Any]] = {
        "tensor_model_parallel_size": sizes,
        "pipeline_model_parallel_size": [n for n in sizes if n <= model.num_hidden_layers],
        "context_parallel_size": [n for n in sizes if n == 1 or length >= n * LEAST_PART],
        "expert_model_parallel_size": divisors(model.n_routed_experts),
        "micro_batch_size": divisors(model.global_batch_size),
        "virtual_pipeline_model_parallel_size": [
            *range(1, max(2, model.num_hidden_layers // 2 + 1))
        ],
        "data_parallel_replicate_size": sizes,
        "reshard_after_forward": [None, True, False],
        "reduce_gradients": [None, True, False],
    }
    return [
        [value_at(run, key)]
        if key in fixed
        else worth.get(key.removeprefix("model."))
        or [*[None] * LEAVES[key].optional, *LEAVES[key].choices]
        for key in PLANNED
    ]


_UNDECIDED, _SOUND, _BROKEN = range(3)


class _Judge:
    """What each rule says of values chosen so far, kept by the keys that it reads."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._reads: list[set[int]] = [set() for _ in RULES]
        self._said: list[dict[Choice, int]] = [{} for _ in RULES]

    def undecided(self, chosen: Choice, rules: Sequence[int]) -> list[int] | None:
        """Of ``rules``, by number, those that need more keys; None if one is broken.

        ``_NotChosen`` among the values stands for a key without one.
        """
        left = []
        for number in rules:
            verdict = self._verdict(number, chosen)
            if verdict == _BROKEN:
                return None
            if verdict == _UNDECIDED:
                left.append(number)
        return left

    def _verdict(self, number: int, chosen: Choice) -> int:
        reads, said, length = self._reads[number], self._said[number], len(chosen)
        # Equal values of all keys that a rule ever read make it read the same ones again.
        known = tuple(chosen[key] if key < length else _NotChosen for key in reads)
        if known in said:
            return said[known]
        values = {
            key: value
            for key, value in zip(PLANNED, chosen, strict=False)
            if value is not _NotChosen
        }
        seen: set[str] = set()
        view = _View(self._run, values, seen)
        try:
            verdict = _BROKEN if next(RULES[number](cast(RunConfig, view)), None) else _SOUND
        except _NotChosen:
            verdict = _UNDECIDED
        more = {PLANNED.index(path) for path in seen} - reads
        if more:
            reads |= more
            said.clear()
        said[tuple(chosen[key] if key < length else _NotChosen for key in reads)] = verdict
        return verdict


class _NotChosen(Exception):
    """A rule read a key that has no value yet."""


class _View:
    """A configuration with some keys chosen, that remembers which ones were read."""

    def __init__(
        self, section: object, chosen: dict[str, Any], seen: set[str], prefix: str = ""
    ) -> None:
        self._section, self._chosen, self._seen, self._prefix = section, chosen, seen, prefix

    def __getattr__(self, key: str) -> Any:
        path = f"{self._prefix}{key}"
        if path in PLANNED:
            self._seen.add(path)
            if path not in self._chosen:
                raise _NotChosen(path)
            return self._chosen[path]
        value = getattr(self._section, key)
        if is_dataclass(value):
            return _View(value, self._chosen, self._seen, f"{path}.")
        return value
