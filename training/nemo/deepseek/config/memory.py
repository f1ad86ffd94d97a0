"""Bytes: the states of a model, a rank's share of them, and all that a step needs besides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from deepseek.config.activations import (
    Waiting,
    ahead_activations,
    backward_bytes,
    blocks_of_stage,
    experts_at_work,
    hidden_bytes,
    in_flight,
    stage_activations,
    waiting,
    working_bytes,
)
from deepseek.config.cost import CHUNK_TOKENS, count_parameters
from deepseek.config.layout import Layout, StageSlice, kept_shape, rank_stages
from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.config.weights import (
    PACKED_BLOCKS,
    Weight,
    block_weights,
    model_weights,
    once_per_shape,
    packed_row_bytes,
)

KEPT_BYTES = 1 << 30
"""Gathered weights of less stay gathered for a whole step, if nobody says otherwise."""
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
    everything = StageSlice(range(model.num_hidden_layers), first=True, last=True)
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
        if part.first or part.last:
            ends = "both ends" if part.first and part.last else "first" if part.first else "last"
            found.append((numbers[ends], 1, False))
        if part.last:
            found.append((numbers["mtp"], model.num_nextn_predict_layers, True))
    return found


@once_per_shape
def _weights_of_groups(model: ModelConfig) -> dict[str, list[Weight]]:
    """Of one block (``dense``, ``moe``), one MTP module (``mtp``), and what stages have besides."""
    ends = {
        name: model_weights(model, (), first, last)
        for name, first, last in (
            ("first", True, False),
            ("last", False, True),
            ("both ends", True, True),
        )
    }
    groups = {
        "dense": block_weights(model, moe=False),
        "moe": block_weights(model, moe=True),
        "mtp": [weight for weight in ends["last"] if weight.name.startswith("mtp.0.")],
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
    root = roots_gradient = roots_part = alone = 0
    units: list[tuple[int, int, int, int]] = []
    number, packed = 2 if half else 4, _packed_bytes(model)
    for numbers, times, unit in groups:
        alone += 4 * times * numbers.alone
        gathered = number * numbers.gathered + (4 - number) * numbers.exact
        gathered -= round((number - packed) * numbers.packed_gathered)
        side = number * numbers.beside - round((number - packed) * numbers.packed_beside)
        if unit:
            units += times * [(gathered, 4 * numbers.whole, side, 4 * numbers.beside)]
        else:
            roots_gradient += 4 * times * numbers.whole
            roots_part += 4 * times * numbers.trained
            root += times * gathered
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
    waits = waiting(model, layout, pp_rank, micro_batches, half, of_one)
    whole = [
        4 * sum(times * (n.whole + n.alone) for n, times, _ in _groups(model, layout, [part]))
        for part in stages
        if any(wait.unbegun for wait in waits)
    ]

    def made(wait: Waiting) -> int:
        """Of the gradients, those of stages that have begun with theirs."""
        if not parted or not trains or reduces:
            return gradients
        return gradients - sum(whole[stage] for stage in wait.unbegun)

    hidden = hidden_bytes(model, layout, half)
    ends = sum((not part.first) + (not part.last) for part in stages)
    gives_back = reshards(model, layout)

    def moment(blocks: int, gradients: int, activations: int, working: int) -> RankNeed:
        """While a block works, or none: of those that give their weights back, gathered are its
        own and the next one's, but for experts that come later."""
        there = blocks * (units[-1][0] + beside) if units else 0
        if not gives_back:
            there = sum(unit[0] for unit in units)
        gathered = (root + there) * parted
        states = kept.weights + kept.optimizer
        return RankNeed(states, gathered, gradients, activations, ends * hidden, working)

    # Where all go forward first there is no gradient yet, and one less waits when there is.
    forward_first = len(waits) == 1 and all(n == micro_batches for n in held.values())
    less = sum(of_one) if forward_first and micro_batches > 1 else 0
    main = backward_bytes(model, layout, stages, half)
    if half and parted and trains and units:  # some of a block's gradients in bf16
        main += units[-1][1] // 4
    of_embedding = 0
    moments = [moment(1, made(wait) + of_block, wait.size - less, main) for wait in waits]
    if not any(part.last for part in stages):
        if less:
            moments.append(moment(1, of_block, waits[0].size, main))
    else:
        if len(waits) == 1:  # the same is told below, in more detail
            moments.clear()
        wait = max(
            (wait for wait in waits if wait.at_head), key=lambda wait: made(wait) + wait.size
        )
        before = 0 if forward_first else made(wait)
        under_way, held_back = made(wait) + of_block, wait.size
        depth = model.num_nextn_predict_layers
        numbers_of_head = model.vocab_size // layout.tp * model.hidden_size
        table = 4 * numbers_of_head * trains
        # A head in bf16 and its gradient's summand; logits and what they become.
        chunk = 8 * model.vocab_size // layout.tp * CHUNK_TOKENS
        if half and not trains and len(stages) == 1:  # the chunk before is still there
            chunk += chunk // 2
        chunk += 2 * numbers_of_head * (trains + (not parted)) * half
        chunk += hidden * layout.tp * (layout.tp > 1)  # of all tokens, gathered
        scaled = table + table // 2 * (half and parted)
        moments += [moment(0, before, held_back, chunk), moment(1, before, held_back, scaled)]
        held_back -= less
        # Now what the heads have made is added up, with the embedding's gradient of every depth;
        # not while another stage works.
        of_head = table if reduces else 0
        if half and parted:  # in bf16 till the stage is through, and then added up in fp32
            of_head = table // 2 * (len(stages) == 1)
        held_back -= (1 + depth) * table * (len(stages) == 1)
        ahead = working_bytes(model, layout, {True}, half) if depth else 0
        under_way += of_head
        moments.append(moment(1, under_way, held_back, ahead + table * (depth > 1)))
        if len(stages) > 1:  # another stage goes back: of DualPipeV after the head has gone forward
            of_head = (1 + depth) * table * (model.pipeline_schedule != "DualPipeV")
            moments.append(moment(1, under_way, held_back - of_head, main))
        held_back -= depth * ahead_activations(model, layout, half)
        of_embedding = table * (depth > 0)
        own = backward_bytes(model, layout, stages[-1:], half)
        moments.append(moment(1, under_way, held_back, own + of_embedding))
    if gives_back and units:  # what experts are gathered into is there twice till they have run
        at_work = experts_at_work(model, layout, half) + of_embedding
        experts = units[-1][0] - units[-1][2]
        last = moments[-1]
        moments.append(last._replace(gathered=last.gathered + experts * parted, working=at_work))
    if reduces:  # the embedding comes last
        moments.append(moment(0, gradients - roots_part + (4 + number) * roots_gradient // 4, 0, 0))
    if model.optim.cpu_offload:  # two parameters' moments are here, those in bf16 once in fp32 too
        update = moment(0, kept.gradients, 0, 16 * _largest_trained(model, layout))
        moments.append(update._replace(gathered=0))
    return max(moments, key=lambda need: need.total)


def rank_needs(run: RunConfig) -> list[RankNeed]:
    """Of the ranks at each place of the pipeline."""
    model, layout = run.model, Layout.of_run(run)
    micro_batches = model.global_batch_size // (model.micro_batch_size * layout.dp)
    half = in_half(run)
    return [rank_need(model, layout, pp, micro_batches, half) for pp in range(layout.pp)]


def in_half(run: RunConfig) -> bool:
    """Whether products are taken to be computed in 2 bytes; of ``auto``, on anything but a CPU."""
    precision = str(run.trainer.precision)
    return precision == "bf16-mixed" or (precision == "auto" and run.trainer.accelerator != "cpu")
