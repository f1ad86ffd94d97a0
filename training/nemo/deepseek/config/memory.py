"""Bytes: the states of a model, a rank's share of them, and all that a step needs besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from deepseek.config.activations import (
    Waiting,
    ahead_activations,
    blocks_of_stage,
    gone_in_turn,
    head_activations,
    hidden_bytes,
    host_activations,
    in_flight,
    norm_bytes,
    stage_activations,
    stage_passes,
    tokens_of_part,
    waiting,
    working_bytes,
)
from deepseek.config.cost import CHUNK_TOKENS, count_parameters
from deepseek.config.layout import V_SCHEDULES, Layout, StageSlice, kept_shape, rank_stages
from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.config.weights import (
    OUTPUT,
    PACKED_BLOCKS,
    Weight,
    block_weights,
    model_weights,
    once_per_shape,
    packed_row_bytes,
)

T = TypeVar("T")

KEPT_BYTES = 1 << 30
"""Gathered weights of less stay gathered for a whole step, if nobody says otherwise."""
LOOKUP_COLUMNS = 1024
"""Of an embedding's gradient, that are added up at a time."""
SHORT = 0.05
"""What is told may be so much less than what is needed: what fits has that room besides."""


@dataclass(frozen=True)
class StateMemory:
    """Training states, activations not included."""

    parameters: int
    """Numbers, without correction biases."""
    weights: int
    """Bytes of weights, adapters and correction biases: fp32, but for packed ones."""
    gradients: int
    """Bytes of fp32 gradients of what is trained."""
    optimizer: int
    """Bytes of moments or momentum, on the device."""
    on_host: int
    """The same in the host's memory."""

    @property
    def total(self) -> int:
        """Bytes of all states, on the device."""
        return self.weights + self.gradients + self.optimizer


def state_memory(model: ModelConfig, optimizer: str = "adamw") -> StateMemory:
    """Bytes of weights, gradients and optimiser states, summed over all ranks.

    Everything is fp32, but for moments if so configured, under ``bf16-mixed`` too: that precision
    casts inside matrix products and keeps fp32 weights, the master weights, as the only ones. AdamW
    holds two moments (16 bytes per parameter in all); Muon holds one momentum for hidden matrices
    (12 bytes) and AdamW's moments for embedding, head and norms. With adapters, they alone have
    gradients and moments.

    Args:
        model: the sizes.
        optimizer: ``adamw`` or ``muon``.
    """
    everything = StageSlice(range(model.num_hidden_layers), first=True, output=OUTPUT)
    return _states(model, _groups(model, Layout(), [everything]), optimizer)


def checkpoint_bytes(model: ModelConfig, optimizer: str) -> int:
    """Of one checkpoint: the weights that are trained, in fp32, and their optimiser states."""
    states = state_memory(model, optimizer)
    return states.optimizer + states.on_host + 4 * count_parameters(model).trained


def rank_memory(
    model: ModelConfig, layout: Layout, pp_rank: int, optimizer: str = "adamw"
) -> StateMemory:
    """States of one rank at a place of the pipeline; of ranks that differ, the largest.

    Args:
        model: the sizes.
        layout: divides each weight.
        pp_rank: place in the pipeline.
        optimizer: ``adamw`` or ``muon``; see ``state_memory``.

    Returns:
        Activations and gathered weights are not included.
    """
    return _states(model, _groups(model, layout, rank_stages(model, pp_rank)), optimizer)


def _states(
    model: ModelConfig, groups: list[tuple[_Numbers, int, bool]], optimizer: str
) -> StateMemory:
    parameters = biases = trained = hidden = packed = 0
    for numbers, times, _ in groups:
        parameters += times * numbers.kept
        packed += times * numbers.packed
        biases += times * numbers.biases
        trained += times * numbers.trained
        hidden += times * numbers.hidden
    moments = 2 * trained - (hidden if optimizer == "muon" else 0)
    number = 2 if model.optim.moments_dtype == "bf16" else 4
    weights = 4 * (parameters + biases) - round(packed * (4 - _packed_bytes(model)))
    bytes_of_moments = (number * moments, 0)
    if model.optim.cpu_offload:
        bytes_of_moments = (0, number * moments)
    return StateMemory(parameters, weights, 4 * trained, *bytes_of_moments)


def _packed_bytes(model: ModelConfig) -> float:
    """Of a number of a frozen matrix, its share of a scale included."""
    kind = model.peft.base_dtype if model.peft is not None else None
    if kind is None:
        return 4
    return packed_row_bytes(PACKED_BLOCKS[kind], kind) / PACKED_BLOCKS[kind]


def gathered_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes of copies of weights that the fullest rank has while it computes, if in fp32.

    Of experts that no other rank has a part of, there is none: it computes with what it keeps.
    """
    ranks = (_groups(model, layout, rank_stages(model, pp_rank)) for pp_rank in range(layout.pp))
    return 4 * max(sum(times * numbers.gathered for numbers, times, _ in rank) for rank in ranks)


class _Numbers(NamedTuple):
    """How many numbers a rank has of a group of weights."""

    kept: int
    """Of parameters, between steps."""
    biases: int
    """Of correction biases."""
    trained: int
    """Of ``kept``, what has gradients."""
    hidden: int
    """Of ``trained``, matrices of blocks, for which Muon has one momentum."""
    whole: int
    """What is computed with, if other ranks keep a part of it."""
    gathered: int
    """The same with FSDP's padding: 16 experts over 32 ranks take the bytes of 32."""
    packed: int
    """Of ``kept``, in packed rows."""
    packed_gathered: int
    """Of ``gathered``."""
    packed_beside: int
    """Of ``beside``."""
    exact: int
    """Of ``gathered``, norms and routers: in fp32 whatever products are computed in."""
    beside: int
    """Of ``gathered``, without experts that are a unit of FSDP of their own: what two blocks in a
    row have at a time."""
    alone: int
    """Of experts that are kept in whole."""


def _groups(
    model: ModelConfig, layout: Layout, stages: Sequence[StageSlice]
) -> list[tuple[_Numbers, int, bool]]:
    """What some stages have: a group of weights, how often, and whether it is a unit of FSDP."""
    numbers, found = _numbers(model, replace(layout, pp=1)), []
    for part in stages:
        dense, moe = blocks_of_stage(model, part)
        found += [(numbers["dense"], dense, True), (numbers["moe"], moe, True)]
        if part.first or part.output:
            found.append((numbers[_ends(part.first, part.output)], 1, False))
        if part.ahead:
            found.append((numbers["mtp"], model.num_nextn_predict_layers, True))
    return found


def _ends(first: bool, output: range) -> str:
    """What the group of all but the blocks and MTP modules of a stage is called."""
    return f"{'first ' if first else ''}{output.start}:{output.stop}" if output else f"{first}"


@once_per_shape
def _weights_of_groups(model: ModelConfig) -> dict[str, list[Weight]]:
    """Of one block (``dense``, ``moe``), one MTP module (``mtp``), and what stages have besides."""
    outputs = [range(start, end) for end in range(4) for start in range(end)] + [range(0)]
    ends = {
        _ends(first, output): model_weights(model, (), first, output)
        for first in (False, True)
        for output in outputs
    }
    groups = {
        "dense": block_weights(model, moe=False),
        "moe": block_weights(model, moe=True),
        "mtp": [
            weight for weight in ends[_ends(False, OUTPUT)] if weight.name.startswith("mtp.0.")
        ],
    }
    for name, weights in ends.items():
        groups[name] = [weight for weight in weights if not weight.name.startswith("mtp.")]
    return groups


@once_per_shape
def _numbers(model: ModelConfig, layout: Layout) -> dict[str, _Numbers]:
    """Of each of ``_weights_of_groups``, whatever the pipeline."""
    found = {}
    for name, weights in _weights_of_groups(model).items():
        kept = biases = trained = hidden = whole = gathered = exact = beside = alone = 0
        packed = packed_gathered = packed_beside = 0
        for weight in weights:
            count = math.prod(kept_shape(weight, layout))
            if weight.buffer:
                biases += count
                continue
            kept += count
            is_packed = model.peft is not None and model.peft.base_dtype and weight.lora
            packed += count if is_packed else 0
            if model.peft is None or weight.adapter:
                trained += count
                if len(weight.shape) > 1 and name in ("dense", "moe", "mtp"):
                    hidden += count
            here = math.prod(weight.divided(layout.tp, layout.ep))
            if weight.routed and layout.keeps_experts:
                alone += here
            else:
                padded = count * (layout.edp if weight.routed else layout.dp_shard)
                whole += here
                gathered += padded
                packed_gathered += padded if is_packed else 0
                if len(weight.shape) == 1 or weight.name.endswith("gate.weight"):
                    exact += padded
                apart = weight.routed and layout.ep * layout.tp > 1
                beside += 0 if apart else padded
                packed_beside += padded if is_packed and not apart else 0
        found[name] = _Numbers(
            kept, biases, trained, hidden, whole, gathered, packed, packed_gathered, packed_beside,
            exact, beside, alone,
        )  # fmt: skip
    return found


def _largest_trained(model: ModelConfig, layout: Layout) -> int:
    """Numbers that a rank keeps of the weight of which it keeps most."""
    return max(
        math.prod(kept_shape(weight, layout))
        for weights in _weights_of_groups(model).values()
        for weight in weights
        if not weight.buffer and (model.peft is None or weight.adapter)
    )


def reshards(model: ModelConfig, layout: Layout) -> bool:
    """Whether FSDP drops gathered weights after the forward pass, to gather them once more.

    As ``model.reshard_after_forward`` says; of itself only without a pipeline, and where they take
    more than ``KEPT_BYTES``.
    """
    if model.reshard_after_forward is not None:
        return model.reshard_after_forward
    return layout.pp == 1 and gathered_bytes(model, layout) > KEPT_BYTES


def reduces_gradients(model: ModelConfig, layout: Layout) -> bool:
    """Whether data-parallel ranks add up and divide gradients after every micro-batch.

    As ``model.reduce_gradients`` says; of itself where weights are given back, too. Else a rank
    holds whole gradients, in fp32, from the first micro-batch to the last.
    """
    if model.reduce_gradients is not None:
        return model.reduce_gradients
    return reshards(model, layout)


class RankNeed(NamedTuple):
    """Most bytes that one rank has at a time, by what they are for.

    Routing is taken to be balanced, and gradients, weights and moments are fp32. Activations are
    those of GPUs, with a flash kernel; the test of this class follows every tensor of a fake step.
    """

    states: int
    """Weights and moments, as kept between steps."""
    gathered: int
    """Weights as computed with, of several ranks."""
    gradients: int
    """As held between micro-batches, or of the units that are under way."""
    activations: int
    """Of the micro-batches that wait for their backward pass."""
    buffers: int
    """That stages of a pipeline receive in: one in each direction is under way."""
    working: int
    """What one backward pass needs besides, its recomputation and the experts' exchange included.
    """

    @property
    def total(self) -> int:
        """All of it; a device's context and NCCL's own buffers, 1 to 2 GiB, are not counted."""
        return sum(self)


def rank_need(
    model: ModelConfig, layout: Layout, pp_rank: int, micro_batches: int, half: bool
) -> RankNeed:
    """What a rank at one place of the pipeline needs.

    Args:
        model: the sizes.
        layout: divides weights and work.
        pp_rank: place in the pipeline.
        micro_batches: of a step.
        half: products are computed in 2 bytes (``bf16-mixed``).
    """
    stages, held = rank_stages(model, pp_rank), in_flight(model, pp_rank, micro_batches)
    groups = _groups(model, layout, stages)
    kept = _states(model, groups, model.optim.name)
    root = roots_gradient = roots_part = alone = entry = entry_part = 0
    units: list[tuple[int, int, int, int]] = []
    number, packed = 2 if half else 4, _packed_bytes(model)
    for numbers, times, unit in groups:
        alone += 4 * times * numbers.alone
        gathered = number * numbers.gathered + (4 - number) * numbers.exact
        gathered -= round((number - packed) * numbers.packed_gathered)
        side = number * numbers.beside - round((number - packed) * numbers.packed_beside)
        if unit:
            if times and not units:  # the first block's, but for experts that come later
                entry, entry_part = side, 4 * numbers.trained
            units += times * [(gathered, 4 * numbers.whole, side, 4 * numbers.beside)]
        else:
            roots_gradient += 4 * times * numbers.whole
            roots_part += 4 * times * numbers.trained
            root += times * gathered
    in_order = [unit[0] for unit in units]
    units.sort()
    beside, beside_gradient = units[-2][2:] if len(units) > 1 else (0, 0)
    parted, trains = layout.world_size > 1, model.peft is None
    at_once = micro_batches == 1 and layout.pp == 1
    reduces = parted and trains and (reduces_gradients(model, layout) or at_once)
    gradients, of_block = kept.gradients, 0
    if reduces:
        of_block = beside_gradient  # of the block before, on its way
    elif parted and trains:  # experts in whole are not gathered, nor their gradients
        gradients = alone + roots_gradient + sum(unit[1] for unit in units)
    of_one = [stage_activations(model, layout, part, half) for part in stages]
    if pp_rank == layout.pp - 1 and model.pipeline_schedule in V_SCHEDULES:
        of_one[-1] -= hidden_bytes(model, layout, half)  # what the stage before has sent, too
    waits = waiting(model, layout, pp_rank, micro_batches, half, of_one)
    whole = [
        4 * sum(times * (n.whole + n.alone) for n, times, _ in _groups(model, layout, [part]))
        for part in stages
        if any(wait.unbegun for wait in waits)
    ]

    def made(wait: Waiting) -> int:
        """Of the gradients, those of stages that have begun with theirs."""
        if not parted or not trains:
            return gradients
        if reduces:
            return gradients * (not at_once)
        return gradients - sum(whole[stage] for stage in wait.unbegun)

    hidden, dim = hidden_bytes(model, layout, half), model.hidden_size
    ends = sum((not part.first) + (not part.last) for part in stages)
    if pp_rank == layout.pp - 1 and model.pipeline_schedule in V_SCHEDULES:
        ends -= 2  # it hands from one of its stages to the other
    gives_back = reshards(model, layout)

    def moment(blocks: int, gradients: int, activations: int, working: int) -> RankNeed:
        """While a block works, or none: of those that give their weights back, gathered are its
        own and the next one's, but for experts that come later; with 1 the next one's alone."""
        there = (0, units[-1][0], units[-1][0] + beside)[blocks] if units else 0
        if not gives_back:
            there = sum(unit[0] for unit in units)
        gathered = (root + there) * parted
        states = kept.weights + kept.optimizer
        return RankNeed(states, gathered, gradients, activations, ends * hidden, working)

    # What is gathered at once, of a block or of its experts.
    newest = (units[-1][0] - units[-1][2] or units[-1][0]) if units else 0

    several = len(stages) > 1  # whose schedules gather before they begin

    def blocks_in_turn(made_before: int, beside: int) -> Iterator[RankNeed]:
        """Each hands its gradients on: they lie there whole till the next one is through, and from
        then on in parts, of a single micro-batch where there was none."""
        part, depth = stages[-1], model.num_nextn_predict_layers
        sizes = [4 * n.trained for n, times, unit in groups if unit for _ in range(times)]
        for place in _turns(model, part):
            done = sum(sizes[place + 1 :]) * at_once
            on_way = of_block * (depth > 0 or place + 1 < len(part.layers))
            till = part._replace(layers=part.layers[: place + 1], output=range(0))
            turn = moment(
                2 if place else 1,
                made_before + done + on_way,
                stage_activations(model, layout, till, half),
                stage_passes(model, layout, [till], half, reduces).backward + beside,
            )
            if at_once and not gives_back:  # weights are not needed again either
                turn = turn._replace(gathered=(root + sum(in_order[: place + 1])) * parted)
            yield turn

    # Where all go forward first there is no gradient yet, and one less waits when there is.
    forward_first = len(waits) == 1 and all(n == micro_batches for n in held.values())
    less = sum(of_one) if forward_first and micro_batches > 1 else 0
    both = stage_passes(model, layout, stages, half, reduces)
    forward, main = both.forward, both.backward
    if layout.pp > 1 and all(len(part.layers) < 2 for part in stages):
        main -= hidden  # the gradient that the only block is given is what has been received
    turn, overlaps = 0, several and model.overlap_moe_expert_parallel_comm
    if overlaps:
        main, pairs = both.in_turn, ((0, 1), (1, 0))
        turn = min(gone_in_turn(model, layout, stages[a], stages[b], half) for a, b in pairs)
    numbers_of_head = model.vocab_size // layout.tp * model.hidden_size
    # The gradient of an embedding, which is added up in fp32: for bf16 some columns at a time.
    of_table = (number if parted else 4) * numbers_of_head * trains
    columns = min(LOOKUP_COLUMNS, dim) * (half and parted)
    looked_up = of_table + 4 * numbers_of_head * trains * columns // dim
    of_embedding = chunk = 0
    outputs = [index for index, part in enumerate(stages) if part.output]

    def back(wait: Waiting) -> int:
        """Of the costliest backward pass that there may be."""
        if wait.goes_back is None:
            return main
        return stage_passes(model, layout, [stages[wait.goes_back]], half, reduces).backward

    moments = [
        moment(2, made(wait) + of_block, wait.size - less - turn, back(wait))
        for wait in waits
        if not (outputs and (len(waits) == 1 or wait.goes_back in outputs))  # told below
    ]
    if not outputs:
        if less:
            moments.append(moment(2, of_block, waits[0].size, main))
        moments += [
            moment(2, 0 if forward_first else made(wait), wait.size, forward)
            for wait in waits
            if not overlaps
        ]
    else:
        wait = max(
            (wait for wait in waits if wait.at_head), key=lambda wait: made(wait) + wait.size
        )
        before = 0 if forward_first else made(wait)
        under_way, held_back = made(wait) + of_block, wait.size - turn
        end, others = stages[outputs[-1]], [*stages[: outputs[-1]], *stages[outputs[-1] + 1 :]]
        heads, depth = end.heads(model), model.num_nextn_predict_layers * end.ahead
        table = 4 * numbers_of_head * trains * (heads > 0)
        # Logits, in bf16 and what becomes of them in fp32; those of the chunk before are still
        # there when they are made. Or the first ones, and the summand of the head's gradient.
        tokens = tokens_of_part(model, layout)
        logits = model.vocab_size // layout.tp * min(tokens, CHUNK_TOKENS)
        made_anew = (10 if half else 8) if tokens > CHUNK_TOKENS else 6 if half else 4
        chunk = max(made_anew * logits, (6 * logits + 2 * numbers_of_head * trains) * half)
        chunk += 2 * numbers_of_head * (not parted) * half  # the head in bf16
        chunk += hidden * layout.tp * (layout.tp > 1)  # of all tokens, gathered
        chunk *= heads > 0
        scaled = table + table // 2 * (half and parted)
        # Before the last block its MTP or, of weights in bf16, the last norm is gathered again.
        next_one = int(depth > 0 or not half)
        moments += [
            moment(0, before, held_back, chunk),
            moment(next_one, before, held_back, scaled),
        ]
        held_back -= less
        of_heads = heads * table
        if others and wait.goes_back is None:
            # Another stage goes back: of DualPipeV after the head has gone forward.
            gone = of_heads * (overlaps or model.pipeline_schedule != "DualPipeV")
            other = stage_passes(model, layout, others, half, reduces).backward
            moments.append(moment(2, under_way, held_back - gone, main if overlaps else other))
        # Now what the heads have made is added up, with the embedding's gradient of every depth.
        held_back -= of_heads
        if half and parted:  # in bf16 till the stage is through, and then added up in fp32
            under_way += table // 2
        elif reduces:
            under_way += table
        ahead, recomputes = 0, model.activations_checkpoint_granularity is not None
        if depth:
            ahead = working_bytes(model, layout, {True}, half, reduces, ahead=True).backward
        first = under_way - of_block * (depth == 1)  # nothing is on its way yet
        moments.append(moment(2, first, held_back, ahead + of_table * (depth > 1)))
        if depth and recomputes and gives_back and not model.cpu_offloading_activations:
            # All of it is made again before its experts go back, which are gathered for that as
            # in a forward pass: twice till something else is.
            plain = replace(model, activations_checkpoint_granularity=None)
            again = working_bytes(plain, layout, {True}, half).till_experts + hidden
            again += ahead_activations(plain, layout, half) - ahead_activations(model, layout, half)
            twice = moment(1, first, held_back, again + of_table * (depth > 1))
            moments.append(twice._replace(gathered=twice.gathered + newest * parted))
        held_back -= depth * ahead_activations(model, layout, half)
        # In bf16 till the stage is through, or till the same table has looked up its own tokens.
        joint = any(part.first and part.ahead for part in stages)
        of_embedding = of_table * (depth > 0 and (joint or (half and parted)))
        moments.append(moment(2, under_way, held_back, looked_up * (depth > 0)))
        moments.append(moment(1, under_way, held_back, norm_bytes(model, layout, half) * end.main))
        held_back -= head_activations(model, layout, half) * end.main
        if less:  # the first micro-batch to go back makes the first gradients, while all wait
            own = stage_passes(model, layout, [end], half, reduces).backward
            moments.append(moment(2, table, held_back + less, own + of_embedding))
        if reduces and layout.pp == 1:
            moments += blocks_in_turn(under_way - of_block, of_embedding)
        else:
            own = stage_passes(model, layout, [end], half, reduces).backward
            own = main if overlaps else own
            moments.append(moment(2, under_way, held_back, own + of_embedding))
        # Before the head, the last block goes forward, and those of MTP. What is gathered last is
        # there twice till something else is.
        blocks = (
            wait.size
            - turn
            - of_one[outputs[-1]]
            + stage_activations(model, layout, end._replace(output=range(0)), half)
        )
        twice = moment(1, before, blocks, forward)
        if gives_back and units:
            twice = twice._replace(gathered=twice.gathered + newest * parted)
        moments.append(twice)
        if depth:
            first = wait.size - of_heads
            moments.append(twice._replace(activations=first))
    if parted and not several:
        # What embedding and head are gathered in stays till the first block's weights are there.
        later = gives_back and micro_batches > 1
        waits_first = (waits[0].size - sum(of_one)) * later
        begins = moment(0, made(waits[0]) * later, waits_first, hidden)
        moments.append(begins._replace(gathered=2 * (root + entry)))
    if not gives_back and units:  # a first forward pass has what is gathered last there twice
        at_work = 0 if several else max(forward, chunk)
        begun = moment(2, 0, 0 if several else sum(of_one), at_work)
        moments.append(begun._replace(gathered=begun.gathered + newest * parted))
    for part, one in zip(stages, of_one, strict=True):
        if part.first:
            steady = [wait for wait in waits if not wait.unbegun] or waits
            fullest = max(steady, key=lambda wait: made(wait) + wait.size)
            left = fullest.size - one if layout.pp > 1 else 0
            # Of the first micro-batch to go back the gradient is the one that is made here.
            first = 4 * numbers_of_head * trains * (forward_first and not reduces)
            there = made(fullest) + of_block - first
            there += (gradients - roots_part) * (reduces and at_once)
            # What several look-ups have made is added up in place of them.
            made_here = max(looked_up + of_embedding, 3 * of_embedding)
            there += 4 * numbers_of_head * (reduces and part.last)  # the head's
            moments.append(moment(0, there, left, made_here))
            if first and micro_batches > 1:  # one micro-batch later it has been made
                moments.append(moment(0, there + first, max(0, left - one), made_here))
    if reduces:  # the embedding comes last, when no weights are gathered any more
        # Of several replicas, what they have added up stays till all of a micro-batch is.
        twice_there = gradients - roots_part if layout.dp_replicate > 1 and not at_once else 0
        if twice_there:
            first_block = stages[0]._replace(layers=stages[0].layers[:1], output=range(0))
            one = stage_activations(model, layout, first_block, half)
            under_way = made(waits[0]) + of_block + twice_there - entry_part
            moments.append(moment(2, under_way, one, main))
        sent = roots_gradient + roots_part * (1 + (layout.dp_shard == 1))
        sent = max((4 + number) * roots_gradient // 4, sent)
        last = gradients + twice_there - roots_part * at_once + sent
        moments.append(moment(0, last, 0, 0)._replace(gathered=0))
    if model.optim.cpu_offload:  # two parameters' moments are here, those in bf16 once in fp32 too
        update = moment(0, kept.gradients, 0, 16 * _largest_trained(model, layout))
        moments.append(update._replace(gathered=0))
    return max(moments, key=lambda need: need.total)


def _turns(model: ModelConfig, part: StageSlice) -> set[int]:
    """Of a stage's blocks, from 0: what goes back last, first, and beside another kind. Between
    them all grows evenly."""
    dense, moe = blocks_of_stage(model, part)
    places = {0, 1, dense - 1, dense, dense + 1, dense + moe - 2, dense + moe - 1}
    if model.activations_checkpoint_num_layers is not None:
        places |= {model.activations_checkpoint_num_layers + step for step in (-1, 0)}
    return places & set(range(dense + moe))


def rank_needs(run: RunConfig) -> list[RankNeed]:
    """Of the ranks at each place of the pipeline."""
    return _each_rank(run, rank_need)


def host_need(
    model: ModelConfig, layout: Layout, pp_rank: int, micro_batches: int, half: bool
) -> int:
    """Bytes of the host's memory that blocks of a rank keep activations in; see ``rank_need``."""
    if not model.cpu_offloading_activations:
        return 0
    parts = rank_stages(model, pp_rank)
    of_one = [host_activations(model, layout, part, half) for part in parts]
    waits = waiting(model, layout, pp_rank, micro_batches, half, of_one)
    return max(wait.size for wait in waits)


def host_needs(run: RunConfig) -> list[int]:
    """Of the ranks at each place of the pipeline."""
    return _each_rank(run, host_need)


def _each_rank(run: RunConfig, need: Callable[[ModelConfig, Layout, int, int, bool], T]) -> list[T]:
    model, layout = run.model, Layout.of_run(run)
    micro_batches = model.global_batch_size // (model.micro_batch_size * layout.dp)
    half = in_half(run)
    return [need(model, layout, pp, micro_batches, half) for pp in range(layout.pp)]


def in_half(run: RunConfig) -> bool:
    """Whether products are taken to be computed in 2 bytes; of ``auto``, on anything but a CPU."""
    precision = str(run.trainer.precision)
    return precision == "bf16-mixed" or (precision == "auto" and run.trainer.accelerator != "cpu")
