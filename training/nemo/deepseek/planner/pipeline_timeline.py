"""When which rank of a pipeline works on what: schedules played from the times of their stages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class StageTime(NamedTuple):
    """Seconds of one stage on one micro-batch."""

    forward: float
    backward: float
    """Gradients of inputs and weights."""
    weight: float = 0.0
    """Of ``backward``, what schedules that split it may do later."""
    hidden_forward: float = 0.0
    """Of ``forward``, what exchanges no longer add where a schedule pairs it with an opposite pass,
    which hides them."""
    hidden_backward: float = 0.0
    """The same of ``backward``."""
    links_forward: float = 0.0
    """All exchanges of ``forward``: the two passes of a pair take no less than both's."""
    links_backward: float = 0.0
    """The same of ``backward``."""


class Interval(NamedTuple):
    """What a rank does for a while."""

    rank: int
    kind: str
    """F, B (whole), I (gradients of inputs), W (of weights) or FB (both passes, overlapped)."""
    stage: int
    micro_batch: int
    start: float
    end: float


class Timeline(NamedTuple):
    """A pipeline's step, without optimiser."""

    intervals: tuple[Interval, ...]
    seconds: float
    ranks: int

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        busy = sum(i.end - i.start for i in self.intervals)
        return 1 - busy / (self.ranks * self.seconds)


class Op(NamedTuple):
    """One piece of a rank's work; ``also`` is the backward pass that a forward one overlaps."""

    kind: str
    stage: int
    micro_batch: int
    also: tuple[int, int] | None = None


def play(
    schedule: str,
    ranks: int,
    times: Sequence[StageTime],
    micro_batches: int,
    hop: float = 0.0,
    spread: float = 0.0,
) -> Timeline:
    """Every interval of a step.

    Args:
        schedule: as ``pipeline_schedule``, or DualPipe.
        ranks: of the pipeline.
        times: of all stages, in the model's order.
        micro_batches: of a step.
        hop: seconds from one rank to the next.
        spread: share by which passes are longer or shorter than the mean, at random: who waits for
            a long one does not win that back from a short one.
    """
    work = orders(schedule, ranks, len(times), micro_batches)
    return _played(work, times, ranks, hop, spread)


def orders(schedule: str, ranks: int, stages: int, count: int) -> list[list[Op]]:
    """The work of each rank, in order."""
    if schedule == "GPipe":
        return [
            [*(Op("F", r, m) for m in range(count)), *(Op("B", r, m) for m in range(count))]
            for r in range(ranks)
        ]
    if schedule in ("DualPipe", "DualPipeV"):
        return [_dual(schedule, ranks, r, count) for r in range(ranks)]
    if schedule == "ZBVZeroBubble":
        return _zero_bubble_v(ranks, count)
    return [_interleaved(schedule, ranks, r, stages // ranks, count) for r in range(ranks)]


def _interleaved(schedule: str, ranks: int, rank: int, held: int, count: int) -> list[Op]:
    """1F1B of one or several stages a rank, with whole or split backward passes."""
    rounds = max(1, count // ranks)
    size = count // rounds if held > 1 else ranks
    total = held * count

    def at(k: int, forward: bool) -> tuple[int, int]:
        if held == 1:
            return rank, k
        group, inside = divmod(k, size * held)
        local, m = divmod(inside, size)
        local = local if forward else held - 1 - local
        return local * ranks + rank, group * size + m

    split = schedule in ("InterleavedZeroBubble", "ZBVZeroBubble", "ZB1P")
    if held == 1:
        warm = ranks - 1 - rank
    elif split:
        warm = (held - 1) * size + ranks - 1 - rank
    else:
        warm = (held - 1) * size + 2 * (ranks - 1 - rank)
    warm = min(warm, total)
    ops = [Op("F", *at(k, True)) for k in range(warm)]
    done = 0
    for k in range(total):
        if warm + k < total:
            ops.append(Op("F", *at(warm + k, True)))
        if not split:
            ops.append(Op("B", *at(k, False)))
            continue
        ops.append(Op("I", *at(k, False)))
        if k - done >= rank or warm + k >= total:
            ops.append(Op("W", *at(done, False)))
            done += 1
    ops += [Op("W", *at(k, False)) for k in range(done, total)] if split else []
    return ops


def _zero_bubble_v(ranks: int, count: int) -> list[list[Op]]:
    """ZBV (arXiv:2401.10241): each rank takes what is ready, as if every piece took one tick.

    Gradients of inputs go first, then forward passes, those of the later stage first, while no more
    than ``2 * ranks`` passes wait for their weights' gradients; these fill what is left.
    """
    last = 2 * ranks - 1
    done: dict[tuple[str, int, int], int] = {}
    begun: dict[tuple[str, int], int] = {}
    work: list[list[Op]] = [[] for _ in range(ranks)]
    tick = 0

    def ready(kind: str, stage: int) -> bool:
        m = begun.get((kind, stage), 0)
        if kind == "F":
            needs = [("F", stage - 1, m)] if stage else []
        elif kind == "I":
            needs = [("F", stage, m), *([("I", stage + 1, m)] if stage < last else [])]
        else:
            needs = [("I", stage, m)]
        return m < count and all(done.get(need, tick) < tick for need in needs)

    while sum(map(len, work)) < 6 * ranks * count:
        chosen = []
        for rank in range(ranks):
            near, far = rank, last - rank
            held = sum(begun.get(("F", s), 0) - begun.get(("W", s), 0) for s in (near, far))
            options = [("I", far), ("I", near)]
            if held < 2 * ranks:
                options.append(("F", far))
                if held < 2 * ranks - 1 or begun.get(("F", near), 0) == begun.get(("F", far), 0):
                    options.append(("F", near))
            options += [("W", far), ("W", near)]
            for kind, stage in options:
                if ready(kind, stage):
                    chosen.append((rank, kind, stage))
                    break
        for rank, kind, stage in chosen:
            m = begun.get((kind, stage), 0)
            begun[kind, stage] = m + 1
            done[kind, stage, m] = tick
            work[rank].append(Op(kind, stage, m))
        tick += 1
    return work


def _dual(schedule: str, ranks: int, rank: int, count: int) -> list[Op]:
    """DualPipe: two halves of a batch that run towards each other, or the two arms of a V."""
    if schedule == "DualPipe":
        half, reach, each = min(rank, ranks - 1 - rank), ranks // 2, count // 2
        # Micro-batches that go up from the last rank are told by a stage number of `ranks` more.
        stages = [rank, ranks + ranks - 1 - rank]
        if rank >= ranks // 2:
            stages.reverse()
    else:
        half, reach, each = rank, ranks, count
        stages = [rank, 2 * ranks - 1 - rank]
    begun, ended, owed = [0, 0], [0, 0], []
    ops: list[Op] = []

    def forward(side: int) -> None:
        ops.append(Op("F", stages[side], begun[side]))
        begun[side] += 1

    def backward(side: int, split: bool = False) -> None:
        at = (stages[side], ended[side])
        ops.append(Op("I" if split else "B", *at))
        if split:
            owed.append(at)
        ended[side] += 1

    def weight() -> None:
        ops.append(Op("W", *owed.pop(0)))

    def both(side: int, other: int) -> None:
        ops.append(Op("FB", stages[side], begun[side], (stages[other], ended[other])))
        begun[side] += 1
        ended[other] += 1

    left = reach - half - 1
    for _ in range(2 * left):
        forward(0)
    for _ in range(half + 1):
        forward(0)
        forward(1)
    for _ in range(left):
        backward(1, split=True)
        weight()
        forward(1)
    for k in range(each - 2 * reach + half + 1):
        if k == 0 and left == 0:
            forward(0)
            backward(1)
        else:
            both(0, 1)
        both(1, 0)
    for _ in range(left):
        backward(1)
        both(1, 0)
    split = False
    for k in range(half + 1):
        split = split or (k == (half + 1) // 2 and half % 2 == 1)
        backward(1, split)
        split = split or (k == (half + 1) // 2 and half % 2 == 0)
        backward(0, split)
    for _ in range(left):
        weight()
        backward(0, split=True)
    while owed:
        weight()
    return ops


def _played(
    work: list[list[Op]], times: Sequence[StageTime], ranks: int, hop: float, spread: float
) -> Timeline:
    """Each rank in its order, each piece as soon as what it needs is there."""
    chance = random.Random(0)
    count = len(times)
    forward: dict[tuple[int, int], float] = {}
    backward: dict[tuple[int, int], float] = {}
    free, at = [0.0] * ranks, [0] * ranks
    intervals: list[Interval] = []

    def ready_forward(stage: int, micro: int) -> float | None:
        if stage % count == 0:
            return 0.0
        done = forward.get((stage - 1, micro))
        return None if done is None else done + hop

    def ready_backward(stage: int, micro: int) -> float | None:
        own = forward.get((stage, micro))
        if stage % count == count - 1 or own is None:
            return own
        done = backward.get((stage + 1, micro))
        return None if done is None else max(own, done + hop)

    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while at[rank] < len(work[rank]):
                op = work[rank][at[rank]]
                time = times[op.stage % count]
                if op.kind == "F":
                    ready, length = ready_forward(op.stage, op.micro_batch), time.forward
                elif op.kind in ("B", "I"):
                    ready = ready_backward(op.stage, op.micro_batch)
                    length = time.backward - (time.weight if op.kind == "I" else 0.0)
                elif op.kind == "W":
                    ready, length = 0.0, time.weight
                else:
                    assert op.also is not None
                    one = ready_forward(op.stage, op.micro_batch)
                    two = ready_backward(*op.also)
                    ready = None if one is None or two is None else max(one, two)
                    back = times[op.also[0] % count]
                    length = overlapped(time, back)
                if ready is None:
                    break
                start = max(free[rank], ready)
                end = start + length * chance.uniform(1 - spread, 1 + spread)
                intervals.append(
                    Interval(rank, op.kind, op.stage % count, op.micro_batch, start, end)
                )
                if op.kind in ("F", "FB"):
                    forward[op.stage, op.micro_batch] = end
                if op.kind in ("B", "I"):
                    backward[op.stage, op.micro_batch] = end
                if op.also is not None:
                    backward[op.also] = end
                free[rank] = end
                at[rank] += 1
                moved = True
    assert all(at[rank] == len(work[rank]) for rank in range(ranks)), "the schedule waits for ever"
    return Timeline(tuple(intervals), max(free), ranks)


def overlapped(one: StageTime, other: StageTime) -> float:
    """Seconds of a forward and a backward pass together: each hides the other's exchanges."""
    compute = one.forward - one.hidden_forward + other.backward - other.hidden_backward
    return max(compute, one.links_forward + other.links_backward)


def busy_seconds(schedule: str, times: Sequence[StageTime], held: Sequence[int]) -> float:
    """Seconds of a rank's work for one micro-batch; for one of each direction in DualPipe."""
    if schedule.startswith("DualPipe"):
        near, far = (times[stage] for stage in held)
        return overlapped(near, far) + overlapped(far, near)
    return sum(times[stage].forward + times[stage].backward for stage in held)


def pipeline_seconds(
    schedule: str,
    held: Sequence[Sequence[int]],
    times: Sequence[StageTime],
    micro_batches: int,
    hop: float = 0.0,
) -> float:
    """Seconds of a step in closed form, for searches: the busiest rank's work and the ramps.

    Args:
        schedule: as in ``play``.
        held: stages of each rank.
        times: of all stages.
        micro_batches: of a step.
        hop: seconds from one rank to the next.
    """
    loads = [busy_seconds(schedule, times, mine) for mine in held]
    most = max(range(len(held)), key=loads.__getitem__)
    alone = sum(times[stage].forward + times[stage].backward for stage in held[most]) / 2
    mean = [sum(values) / len(times) for values in list(zip(*times, strict=True))[:3]]
    load = loads[most] + _waits(schedule, len(held), times, micro_batches, loads[most])
    return _closed(schedule, len(held), len(times), micro_batches, hop, load, alone, *mean)


def interleaved_seconds(
    schedule: str, ranks: int, times: Sequence[StageTime], micro_batches: int, hop: float = 0.0
) -> float:
    """Seconds of a step of several stages a rank, as ``play`` has them, without its intervals.

    Of more than ``ROUNDS`` rounds through a rank's stages, all later ones take as long as those
    of the second half; micro-batches that rounds of one size leave over, as long as the mean.

    Args:
        schedule: Interleaved1F1B or InterleavedZeroBubble.
        ranks: of the pipeline, two or more.
        times: of all stages.
        micro_batches: of a step, one for each rank or more.
        hop: seconds from one rank to the next.
    """
    rounds, split = micro_batches // ranks, schedule == "InterleavedZeroBubble"
    size = micro_batches // rounds

    def played(rounds: int) -> float:
        return _interleaved_seconds(split, ranks, times, size, rounds, hop)

    seconds, more = played(min(rounds, ROUNDS)), max(0, rounds - ROUNDS)
    if more:
        seconds += more * (seconds - played(ROUNDS // 2)) / (ROUNDS - ROUNDS // 2)
    return seconds * micro_batches / (size * rounds)


ROUNDS = 12
"""Of stages whose times were drawn, up to 60 % from the mean, the rest is told to 0.04 %."""


def _interleaved_seconds(
    split: bool, ranks: int, times: Sequence[StageTime], size: int, rounds: int, hop: float
) -> float:
    """Each rank goes through its stages ``rounds`` times, with ``size`` micro-batches each time.

    A stage takes its micro-batches in order, and what a pass needs of its own rank is done before.
    """
    held, total = len(times) // ranks, len(times) // ranks * size * rounds
    locals_ = [local for _ in range(rounds) for local in range(held) for _ in range(size)]
    forward: list[list[float]] = [[] for _ in times]
    backward: list[list[float]] = [[] for _ in times]
    last, free = len(times) - 1, [0.0] * ranks
    ahead = [0] * ranks  # forward passes done
    back = [0] * ranks
    owed = [0] * ranks  # the first gradients of weights that are not done
    warm = [
        min(total, (held - 1) * size + (1 if split else 2) * (ranks - 1 - rank))
        for rank in range(ranks)
    ]
    lengths = [(t.forward, t.backward - (t.weight if split else 0.0), t.weight) for t in times]
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            now, f, b, w = free[rank], ahead[rank], back[rank], owed[rank]
            begun = f + b
            while True:
                if f < total and f <= warm[rank] + b:
                    stage = locals_[f] * ranks + rank
                    done = forward[stage]
                    if stage:
                        before = forward[stage - 1]
                        if len(before) == len(done):
                            break
                        now = max(now, before[len(done)] + hop)
                    now += lengths[stage][0]
                    done.append(now)
                    f += 1
                elif b < total:
                    stage = (held - 1 - locals_[b]) * ranks + rank
                    done = backward[stage]
                    if stage < last:
                        after = backward[stage + 1]
                        if len(after) == len(done):
                            break
                        now = max(now, after[len(done)] + hop)
                    now += lengths[stage][1]
                    done.append(now)
                    if split and (b - w >= rank or warm[rank] + b >= total):
                        now += lengths[(held - 1 - locals_[w]) * ranks + rank][2]
                        w += 1
                    b += 1
                else:
                    break
            moved = moved or f + b > begun
            free[rank], ahead[rank], back[rank], owed[rank] = now, f, b, w
    assert min(back) == total, "the schedule waits for ever"
    for rank in range(ranks):
        rest = locals_[owed[rank] :] if split else []
        free[rank] += sum(lengths[(held - 1 - local) * ranks + rank][2] for local in rest)
    return max(free)


def interleaved_bound(
    schedule: str, ranks: int, times: Sequence[StageTime], micro_batches: int, hop: float = 0.0
) -> float:
    """What ``interleaved_seconds`` is at least: of each rank its work, after the forward passes
    before it, and before the backward passes of a last micro-batch, where they are not split."""
    whole, least, ends = schedule == "Interleaved1F1B", 0.0, 0.0
    for rank in range(ranks):
        work = sum(time.forward + time.backward for time in times[rank::ranks])
        least = max(least, ends + micro_batches * work)
        ends += times[rank].forward + hop + (times[rank].backward + hop) * whole
    return least


def _waits(
    schedule: str, ranks: int, times: Sequence[StageTime], count: int, load: float, held: int = 2
) -> float:
    """Seconds a micro-batch in which a rank waits for others between the ramps.

    The order of ZBV is made for forward passes, gradients of inputs and of weights that take as
    long as each other. Where they do not, all ranks take as long for each as the longest; of two
    ranks, each waits half as much.
    """
    if schedule != "ZBVZeroBubble" or ranks == 1:
        return 0.0
    longest = max(max(t.forward, t.backward - t.weight, t.weight) for t in times)
    between = max(0.0, 1 - ranks / (2 * count))
    return max(0.0, 3 * held * longest - load) * between * (0.5 if ranks == 2 else 1.0)


def even_seconds(
    schedule: str, ranks: int, held: int, time: StageTime, micro_batches: int, hop: float = 0.0
) -> float:
    """The same of ``ranks`` that hold ``held`` stages each, all alike."""
    load = busy_seconds(schedule, [time] * held, range(held))
    load += _waits(schedule, ranks, [time], micro_batches, load, held)
    alone = held * (time.forward + time.backward) / 2
    return _closed(schedule, ranks, ranks * held, micro_batches, hop, load, alone, *time[:3])


def _closed(
    schedule: str,
    ranks: int,
    stages: int,
    micro_batches: int,
    hop: float,
    load: float,
    alone: float,
    forward: float,
    backward: float,
    weight: float,
) -> float:
    """``load`` is of the busiest rank, ``alone`` half of its passes without overlap; the last three
    are means of all stages."""
    if schedule.startswith("DualPipe"):
        two = schedule == "DualPipe"
        reach = ranks // 2 if two else ranks
        pair = load / 2
        count = micro_batches * (1 if two else 2)
        # Half way up, a rank does so many passes each way that nothing overlaps.
        single = min(count, 2.5 * reach - 0.5) if ranks > 1 else 0.0
        ramp = (reach - 1) * (pair + backward - 3 * weight) + 2 * (stages - 1) * hop
        return (count - single) * pair + single * alone + ramp
    ramp = (ranks - 1) * (forward + backward)
    if schedule == "InterleavedZeroBubble":
        ramp -= 2 * (ranks - 1) * weight
    elif schedule == "ZBVZeroBubble":
        ramp -= 3 * (ranks - 1) * weight
    return load * micro_batches + max(0.0, ramp) + 2 * (stages - 1) * hop
