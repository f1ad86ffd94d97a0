"""The most bytes that a rank needs at a time, of all that there is in a step.

A step is a row of moments: a block goes forward or back while micro-batches wait, the head makes
logits, an embedding gets its gradient. Which one is the fullest depends on sizes, layout and
schedule, so each that may be is told, and the largest one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
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
from deepseek.config.cost import CHUNK_TOKENS
from deepseek.config.layout import V_SCHEDULES, Layout, StageSlice, rank_stages
from deepseek.config.memory import (
    Numbers,
    in_half,
    largest_trained,
    packed_bytes,
    reduces_gradients,
    reshards,
    stage_groups,
    states_of_groups,
)
from deepseek.config.schema import ModelConfig, RunConfig

T = TypeVar("T")

LOOKUP_COLUMNS = 1024
"""Of an embedding's gradient, that are added up at a time."""
SHORT = 0.05
"""What is told may be so much less than what is needed: what fits has that room besides."""


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
    """That stages of a pipeline receive in: one in each direction is under way. DeepEP's too: rows
    of bf16 for all tokens that EP ranks may send, the least it asks for."""
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
    moments = _Moments(model, layout, pp_rank, micro_batches, half)
    return max(moments.all(), key=lambda need: need.total)


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


class _Unit(NamedTuple):
    """Bytes of the weights that FSDP gathers at a time: of a block or an MTP module."""

    gathered: int = 0
    """As computed with."""
    gradient: int = 0
    """The whole one, in fp32."""
    beside: int = 0
    """Of ``gathered``, without experts that are a unit of their own: what two blocks in a row have
    at a time."""
    beside_gradient: int = 0
    """Of ``gradient``, likewise."""
    part: int = 0
    """Of the gradient, what this rank keeps."""


def _units(groups: list[tuple[Numbers, int, bool]], half: bool, packed: float) -> list[list[_Unit]]:
    """Embedding, last norm and head, which are gathered together; and the units, in their order.

    ``packed``: bytes of a number of a packed matrix.
    """
    number, found = 2 if half else 4, list[list[_Unit]](([], []))
    for numbers, times, is_unit in groups:
        gathered = number * numbers.gathered + (4 - number) * numbers.exact
        beside = number * numbers.beside
        found[is_unit] += times * [
            _Unit(
                gathered - round((number - packed) * numbers.packed_gathered),
                4 * numbers.whole,
                beside - round((number - packed) * numbers.packed_beside),
                4 * numbers.beside,
                4 * numbers.trained,
            )
        ]
    return found


class _Moments:
    """Those of a rank's step that may be its fullest; see ``rank_need`` for the arguments."""

    def __init__(
        self, model: ModelConfig, layout: Layout, pp_rank: int, micro_batches: int, half: bool
    ) -> None:
        self.model, self.layout, self.half, self.micro_batches = model, layout, half, micro_batches
        self.stages = rank_stages(model, pp_rank)
        self.several = len(self.stages) > 1  # whose schedules gather before they begin
        self.parted, self.trains = layout.world_size > 1, model.peft is None
        self.at_once = micro_batches == 1 and layout.pp == 1
        self.reduces = (reduces_gradients(model, layout) or self.at_once) and (
            self.parted and self.trains
        )
        self.gives_back = reshards(model, layout)
        self.hidden = hidden_bytes(model, layout, half)
        hands_on = pp_rank == layout.pp - 1 and model.pipeline_schedule in V_SCHEDULES
        # The end of a V hands from one of its stages to the other.
        ends = sum((not part.first) + (not part.last) for part in self.stages) - 2 * hands_on
        senders = layout.ep * (model.moe_token_dispatcher_type == "deepep")
        self.buffers = (ends + senders) * self.hidden
        self._weights_and_gradients()
        self.of_one = [stage_activations(model, layout, part, half) for part in self.stages]
        self.of_one[-1] -= self.hidden * hands_on  # what the stage before has sent, too
        self.waits = waiting(model, layout, pp_rank, micro_batches, half, self.of_one)
        # Where all go forward first there is no gradient yet, and one less waits when there is.
        held = in_flight(model, pp_rank, micro_batches).values()
        self.forward_first = len(self.waits) == 1 and all(n == micro_batches for n in held)
        self.less = sum(self.of_one) if self.forward_first and micro_batches > 1 else 0
        self._passes()
        self.outputs = [index for index, part in enumerate(self.stages) if part.output]
        self._vocabulary()

    def _weights_and_gradients(self) -> None:
        model, layout = self.model, self.layout
        self.groups = stage_groups(model, layout, self.stages)
        self.states = states_of_groups(model, self.groups, model.optim.name)
        roots, self.units = _units(self.groups, self.half, packed_bytes(model))
        self.root = _Unit(*map(sum, zip(_Unit(), *roots, strict=True)))
        *_, self.second, self.largest = _Unit(), _Unit(), *sorted(self.units)
        # What is gathered at once, of a block or of its experts.
        self.newest = self.largest.gathered - self.largest.beside or self.largest.gathered
        self.gradients, self.of_block = self.states.gradients, 0
        if self.reduces:
            self.of_block = self.second.beside_gradient  # of the block before, on its way
        elif self.parted and self.trains:  # experts in whole are not gathered, nor their gradients
            alone = sum(4 * times * numbers.alone for numbers, times, _ in self.groups)
            self.gradients = alone + self.root.gradient + sum(unit.gradient for unit in self.units)

    def _passes(self) -> None:
        """What a block works in: ``forward``, and ``main``, the costliest backward pass."""
        model, layout, stages = self.model, self.layout, self.stages
        both = stage_passes(model, layout, stages, self.half, self.reduces)
        self.forward, self.main = both.forward, both.backward
        if layout.pp > 1 and all(len(part.layers) < 2 for part in stages):
            self.main -= self.hidden  # the gradient that the only block is given has been received
        self.turn, self.overlaps = 0, self.several and model.overlap_moe_expert_parallel_comm
        if self.overlaps:
            self.main = both.in_turn
            self.turn = min(
                gone_in_turn(model, layout, stages[a], stages[b], self.half)
                for a, b in ((0, 1), (1, 0))
            )

    def _vocabulary(self) -> None:
        """What embedding and head make, both of as many numbers."""
        model, layout, half = self.model, self.layout, self.half
        self.numbers_of_head = model.vocab_size // layout.tp * model.hidden_size
        # The gradient of an embedding, which is added up in fp32: for bf16 some columns at a time.
        number = 2 if half and self.parted else 4
        self.of_table = number * self.numbers_of_head * self.trains
        columns = min(LOOKUP_COLUMNS, model.hidden_size) * (half and self.parted)
        in_fp32 = 4 * self.numbers_of_head * self.trains * columns // model.hidden_size
        self.looked_up = self.of_table + in_fp32
        self.chunk = self.depth = self.of_embedding = self.table = 0
        if not self.outputs:
            return
        self.end = self.stages[self.outputs[-1]]
        self.heads = self.end.heads(model)
        self.depth = model.num_nextn_predict_layers * self.end.ahead
        self.table = 4 * self.numbers_of_head * self.trains * (self.heads > 0)
        self.chunk = self._logits() * (self.heads > 0)
        # In bf16 till the stage is through, or till the same table has looked up its own tokens.
        joint = any(part.first and part.ahead for part in self.stages)
        stays = self.depth > 0 and (joint or (half and self.parted))
        self.of_embedding = self.of_table * stays

    def _logits(self) -> int:
        """In bf16 and what becomes of them in fp32; or in bf16, beside what they have become and
        the summand of the head's gradient."""
        half, numbers = self.half, self.numbers_of_head
        tokens = tokens_of_part(self.model, self.layout)
        logits = self.model.vocab_size // self.layout.tp * min(tokens, CHUNK_TOKENS)
        chunk = (6 * logits + 2 * numbers * self.trains) if half else 4 * logits
        chunk += 2 * numbers * (not self.parted) * half  # the head in bf16
        # of all tokens, gathered
        return chunk + self.hidden * self.layout.tp * (self.layout.tp > 1)

    def all(self) -> Iterator[RankNeed]:
        """Every one."""
        yield from self._blocks()
        if self.outputs:
            yield from self._output()
        yield from self._first_blocks()
        yield from self._embedding()
        if self.reduces:
            yield from self._added_up()
        if self.model.optim.cpu_offload:
            # Two parameters' moments are here, those in bf16 once in fp32 too.
            here = 16 * largest_trained(self.model, self.layout)
            yield self._moment(0, self.states.gradients, 0, here)._replace(gathered=0)

    def _moment(self, blocks: int, gradients: int, activations: int, working: int) -> RankNeed:
        """While a block works, or none: of those that give their weights back, gathered are its
        own and the next one's, but for experts that come later; with 1 the next one's alone."""
        largest = self.largest.gathered
        there = (0, largest, largest + self.second.beside)[blocks]
        if not self.gives_back:
            there = sum(unit.gathered for unit in self.units)
        gathered = (self.root.gathered + there) * self.parted
        states = self.states.weights + self.states.optimizer
        return RankNeed(states, gathered, gradients, activations, self.buffers, working)

    def _twice(self, moment: RankNeed) -> RankNeed:
        """What is gathered last is there twice till something else is."""
        return moment._replace(gathered=moment.gathered + self.newest * self.parted)

    def _made(self, wait: Waiting) -> int:
        """Of the gradients, those of stages that have begun with theirs."""
        if not self.parted or not self.trains:
            return self.gradients
        if self.reduces:
            return self.gradients * (not self.at_once)
        return self.gradients - sum(self._whole[stage] for stage in wait.unbegun)

    @cached_property
    def _whole(self) -> list[int]:
        """Of each stage, its gradients."""
        return [
            4 * sum(times * (n.whole + n.alone) for n, times, _ in groups)
            for groups in (stage_groups(self.model, self.layout, [part]) for part in self.stages)
        ]

    def _back(self, *stages: StageSlice) -> int:
        """Of the costliest backward pass of these."""
        return stage_passes(self.model, self.layout, stages, self.half, self.reduces).backward

    # -- blocks of a rank that has nothing of the output --

    def _blocks(self) -> Iterator[RankNeed]:
        """They go back and forward while others wait. With the output that is told there."""
        for wait in self.waits:
            if self.outputs and (len(self.waits) == 1 or wait.goes_back in self.outputs):
                continue
            back = self.main if wait.goes_back is None else self._back(self.stages[wait.goes_back])
            size = wait.size - self.less - self.turn
            yield self._moment(2, self._made(wait) + self.of_block, size, back)
        if self.outputs:
            return
        if self.less:
            yield self._moment(2, self.of_block, self.waits[0].size, self.main)
        if not self.overlaps:
            for wait in self.waits:
                made = 0 if self.forward_first else self._made(wait)
                yield self._moment(2, made, wait.size, self.forward)

    # -- the output, from the head to the stage's blocks --

    def _output(self) -> Iterator[RankNeed]:
        """While most waits: each that has gone back leaves less to wait."""
        model, layout, half, depth = self.model, self.layout, self.half, self.depth
        wait = max(
            (wait for wait in self.waits if wait.at_head),
            key=lambda wait: self._made(wait) + wait.size,
        )
        before = 0 if self.forward_first else self._made(wait)
        under_way, waits = self._made(wait) + self.of_block, wait.size - self.turn
        yield self._moment(0, before, waits, self.chunk)
        # Before the last block its MTP or, of weights in bf16, the last norm is gathered again.
        scaled = self.table + self.table // 2 * (half and self.parted)
        yield self._moment(int(depth > 0 or not half), before, waits, scaled)
        waits -= self.less
        of_heads, last = self.heads * self.table, self.outputs[-1]
        others = [*self.stages[:last], *self.stages[last + 1 :]]
        if others and wait.goes_back is None:
            # Another stage goes back: of DualPipeV after the head has gone forward.
            gone = of_heads * (self.overlaps or model.pipeline_schedule != "DualPipeV")
            other = self.main if self.overlaps else self._back(*others)
            yield self._moment(2, under_way, waits - gone, other)
        # Now what the heads have made is added up, with the embedding's gradient of every depth.
        waits -= of_heads
        if half and self.parted:  # in bf16 till the stage is through, and then added up in fp32
            under_way += self.table // 2
        elif self.reduces:
            under_way += self.table
        yield from self._ahead_back(under_way - self.of_block * (depth == 1), waits)
        waits -= depth * ahead_activations(model, layout, half)
        yield self._moment(2, under_way, waits, self.looked_up * (depth > 0))
        norm = norm_bytes(model, layout, half) * self.end.main
        yield self._moment(1, under_way, waits, norm)
        waits -= head_activations(model, layout, half) * self.end.main
        yield from self._last_blocks_back(under_way, waits)
        # Before the head, the last block goes forward, and those of MTP.
        alone = stage_activations(model, layout, self.end._replace(output=range(0)), half)
        size = wait.size - self.turn - self.of_one[last] + alone
        blocks = self._moment(1, before, size, self.forward)
        if self.gives_back:
            blocks = self._twice(blocks)
        yield blocks
        if depth:
            yield blocks._replace(activations=wait.size - of_heads)

    def _ahead_back(self, gradients: int, waits: int) -> Iterator[RankNeed]:
        """MTP goes back; of one depth nothing is on its way yet."""
        model, layout, half, of_table = self.model, self.layout, self.half, self.of_table
        working, recomputes = 0, model.activations_checkpoint_granularity is not None
        if self.depth:
            most = working_bytes(model, layout, {True}, half, self.reduces, ahead=True)
            working = most.backward
        joined = of_table * (self.depth > 1)
        yield self._moment(2, gradients, waits, working + joined)
        offloads = model.cpu_offloading_activations
        if self.depth and recomputes and self.gives_back and not offloads:
            # All of it is made again before its experts go back, which are gathered for that as
            # in a forward pass.
            plain = replace(model, activations_checkpoint_granularity=None)
            again = working_bytes(plain, layout, {True}, half).till_experts + self.hidden
            again += ahead_activations(plain, layout, half) - ahead_activations(model, layout, half)
            yield self._twice(self._moment(1, gradients, waits, again + joined))

    def _last_blocks_back(self, under_way: int, waits: int) -> Iterator[RankNeed]:
        """Of the stage with the output."""
        own = self._back(self.end)
        if self.less:  # the first micro-batch to go back makes the first gradients, while all wait
            yield self._moment(2, self.table, waits + self.less, own + self.of_embedding)
        if self.reduces and self.layout.pp == 1:
            yield from self._in_turn(under_way - self.of_block)
        else:
            back = self.main if self.overlaps else own
            yield self._moment(2, under_way, waits, back + self.of_embedding)

    def _in_turn(self, made_before: int) -> Iterator[RankNeed]:
        """Each hands its gradients on: they lie there whole till the next one is through, and from
        then on in parts, of a single micro-batch where there was none."""
        model, layout, half, part = self.model, self.layout, self.half, self.stages[-1]
        for place in _turns(model, part):
            done = sum(unit.part for unit in self.units[place + 1 :]) * self.at_once
            on_way = self.of_block * (
                model.num_nextn_predict_layers > 0 or place + 1 < len(part.layers)
            )
            till = part._replace(layers=part.layers[: place + 1], output=range(0))
            turn = self._moment(
                2 if place else 1,
                made_before + done + on_way,
                stage_activations(model, layout, till, half),
                self._back(till) + self.of_embedding,
            )
            if self.at_once and not self.gives_back:  # weights are not needed again either
                gathered = sum(unit.gathered for unit in self.units[: place + 1])
                turn = turn._replace(gathered=(self.root.gathered + gathered) * self.parted)
            yield turn

    # -- the ends of a step --

    def _first_blocks(self) -> Iterator[RankNeed]:
        """A micro-batch begins."""
        if self.parted and not self.several:
            # What embedding and head are gathered in stays till the first block's weights are
            # there, but for experts that come later.
            later = self.gives_back and self.micro_batches > 1
            waits = (self.waits[0].size - sum(self.of_one)) * later
            begins = self._moment(0, self._made(self.waits[0]) * later, waits, self.hidden)
            entry = self.units[0].beside if self.units else 0
            yield begins._replace(gathered=2 * (self.root.gathered + entry))
        if not self.gives_back and self.units:
            working = 0 if self.several else max(self.forward, self.chunk)
            waits = 0 if self.several else sum(self.of_one)
            yield self._twice(self._moment(2, 0, waits, working))

    def _embedding(self) -> Iterator[RankNeed]:
        """Its gradient is made, on a rank that has the first stage."""
        for part, one in zip(self.stages, self.of_one, strict=True):
            if not part.first:
                continue
            steady = [wait for wait in self.waits if not wait.unbegun] or self.waits
            fullest = max(steady, key=lambda wait: self._made(wait) + wait.size)
            waits = fullest.size - one if self.layout.pp > 1 else 0
            # Of the first micro-batch to go back the gradient is the one that is made here.
            first = self.forward_first and not self.reduces and self.trains
            own = 4 * self.numbers_of_head * first
            there = self._made(fullest) + self.of_block - own
            there += (self.gradients - self.root.part) * (self.reduces and self.at_once)
            there += 4 * self.numbers_of_head * (self.reduces and part.last)  # the head's
            # What several look-ups have made is added up in place of them.
            made = max(self.looked_up + self.of_embedding, 3 * self.of_embedding)
            yield self._moment(0, there, waits, made)
            if own and self.micro_batches > 1:  # one micro-batch later it has been made
                yield self._moment(0, there + own, max(0, waits - one), made)

    def _added_up(self) -> Iterator[RankNeed]:
        """The embedding's gradients come last, when no weights are gathered any more."""
        root, joined = self.root, self.layout.dp_replicate > 1 and not self.at_once
        # Of several replicas, what they have added up stays till all of a micro-batch is.
        twice_there = (self.gradients - root.part) * joined
        if twice_there:
            first_block = self.stages[0]._replace(layers=self.stages[0].layers[:1], output=range(0))
            one = stage_activations(self.model, self.layout, first_block, self.half)
            there = self._made(self.waits[0]) + self.of_block + twice_there
            there -= self.units[0].part if self.units else 0
            yield self._moment(2, there, one, self.main)
        sent = root.gradient + root.part * (1 + (self.layout.dp_shard == 1))
        number = 2 if self.half else 4
        sent = max((4 + number) * root.gradient // 4, sent)
        last = self.gradients + twice_there - root.part * self.at_once + sent
        yield self._moment(0, last, 0, 0)._replace(gathered=0)


def _turns(model: ModelConfig, part: StageSlice) -> set[int]:
    """Of a stage's blocks, from 0: what goes back last, first, and beside another kind. Between
    them all grows evenly."""
    dense, moe = blocks_of_stage(model, part)
    places = {0, 1, dense - 1, dense, dense + 1, dense + moe - 2, dense + moe - 1}
    if model.activations_checkpoint_num_layers is not None:
        places |= {model.activations_checkpoint_num_layers + step for step in (-1, 0)}
    return places & set(range(dense + moe))
