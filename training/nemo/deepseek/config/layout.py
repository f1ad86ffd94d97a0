"""Who holds what: ranks, axes, stages and experts as plain numbers.

    dense  = (pp, dp_replicate, dp_shard, tp)
    sparse = (pp, dp_replicate, edp, ep)        edp = dp_shard * tp / ep

are two views of the same ranks. The innermost axis varies fastest with the rank, so a TP group, and
an EP group, is made of neighbouring ranks. Experts borrow their ranks from TP and data parallelism,
never from the pipeline. CP is no axis of its own: for weights its ranks are data shards like any
other, and ``cp`` neighbours of ``dp_shard`` read the same sequences.

A mesh has axes; a tensor has dims. ``layout_rules.py`` refuses the layouts that do not work out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, permutations
from typing import NamedTuple

from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.config.weights import OUTPUT, Weight, block_weights, once_per_shape

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "tp")
SPARSE_AXES = ("pp", "dp_replicate", "edp", "ep")

PLANNED = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.micro_batch_size",
    "model.activations_checkpoint_granularity",
    "model.pipeline_schedule",
    "model.virtual_pipeline_model_parallel_size",
    "model.data_parallel_replicate_size",
    "model.reshard_after_forward",
    "model.reduce_gradients",
)
"""Keys that may be ``auto``: the planner chooses their values, in this order."""
DEVICES = "trainer.devices"
"""May be ``auto``, too: as many as there are."""

V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
"""Schedules in which a rank holds two stages, and the first rank the first and the last stage."""
INTERLEAVED_SCHEDULES = ("Interleaved1F1B", "InterleavedZeroBubble")
"""Schedules in which a rank holds ``virtual_pipeline_model_parallel_size`` stages."""
SPLIT_BACKWARD_SCHEDULES = ("InterleavedZeroBubble", *V_SCHEDULES)
"""Schedules that compute the gradients of inputs and of weights apart."""


class Coordinate(NamedTuple):
    """Where a rank stands along each axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int
    edp: int
    ep: int
    cp: int
    """Which part of each sequence it has; ``dp_shard`` counts on over these."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, in ranks.

    Raises:
        ValueError: EP or CP does not divide the ranks that it borrows.
    """

    pp: int = 1
    """Ranks of a pipeline."""
    dp_replicate: int = 1
    """Groups of ranks that each hold the whole model."""
    dp_shard: int = 1
    """Ranks that share the memory of each weight, and have tokens of their own."""
    tp: int = 1
    """Ranks that divide each sequence, and most matrices, among them."""
    ep: int = 1
    """Ranks that divide the routed experts among them."""
    cp: int = 1
    """Neighbours in ``dp_shard`` that divide each sequence among them."""
    ep_node: int | None = None
    """Neighbours in ``ep`` to which a token travels as one row; None: one for each expert."""

    def __post_init__(self) -> None:
        if self.dp_shard * self.tp % self.ep:
            raise ValueError(f"EP {self.ep} does not divide {self.dp_shard} x {self.tp} ranks")
        if self.dp_shard % self.cp:
            raise ValueError(f"CP {self.cp} does not divide {self.dp_shard} data shards")

    @classmethod
    def of(cls, model: ModelConfig, world: int) -> Layout:
        """The configured sizes over ``world`` ranks; what is left over shards the data.

        Raises:
            ValueError: they do not divide, which ``layout_rules.py`` tells people first.
        """
        pp, tp = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
        replicate, shard = model.data_parallel_replicate_size, data_shards(model, world)
        if not shard:
            raise ValueError(f"{world} ranks cannot be PP {pp} x TP {tp} x {replicate}")
        ep, cp = model.expert_model_parallel_size, model.context_parallel_size
        return cls(pp, replicate, shard, tp, ep, cp, model.moe_ranks_per_node)

    @classmethod
    def of_run(cls, run: RunConfig) -> Layout:
        """The layout of all processes of a run."""
        return cls.of(run.model, world_size(run))

    @property
    def edp(self) -> int:
        """Ranks that share the shards of each expert."""
        return self.dp_shard * self.tp // self.ep

    @property
    def keeps_experts(self) -> bool:
        """Whether EP leaves every expert of a stage on one rank, in whole."""
        return self.ep > 1 and self.edp * self.dp_replicate == 1

    @property
    def dp(self) -> int:
        """Ranks with batches of their own."""
        return self.dp_replicate * self.dp_shard // self.cp

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the same pipeline stages."""
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.stage_ranks

    @property
    def dense_sizes(self) -> tuple[int, ...]:
        """Sizes along ``DENSE_AXES``."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.tp)

    @property
    def sparse_sizes(self) -> tuple[int, ...]:
        """Sizes along ``SPARSE_AXES``."""
        return (self.pp, self.dp_replicate, self.edp, self.ep)

    def coordinate(self, rank: int) -> Coordinate:
        """Of a rank in both views."""
        pp, in_stage = divmod(rank, self.stage_ranks)
        replicate, in_replica = divmod(in_stage, self.dp_shard * self.tp)
        shard, tp = divmod(in_replica, self.tp)
        edp, ep = divmod(in_replica, self.ep)
        return Coordinate(pp, replicate, shard, tp, edp, ep, shard % self.cp)


class Axis(NamedTuple):
    """One axis of the meshes: its groups are ranks at equal distances."""

    name: str
    size: int
    """Ranks in a group."""
    stride: int
    """Distance of neighbours in a group."""

    def groups(self, world: int) -> Iterator[range]:
        """The ranks of each group, of ``world`` ranks in all."""
        extent = self.size * self.stride
        for block in range(0, world, extent):
            for first in range(block, block + self.stride):
                yield range(first, first + extent, self.stride)

    def crosses_nodes(self, world: int, node: int) -> bool:
        """True if some group has ranks on several nodes of ``node`` ranks."""
        repeats = min(world, math.lcm(self.size * self.stride, node))
        return any(group[0] // node != group[-1] // node for group in self.groups(repeats))


def axes(layout: Layout) -> list[Axis]:
    """All axes; the first four are one view of the ranks, the next two part of the other.

    CP is part of the data shards.
    """
    return [
        Axis("PP", layout.pp, layout.stage_ranks),
        Axis("replicas", layout.dp_replicate, layout.dp_shard * layout.tp),
        Axis("data shards", layout.dp_shard, layout.tp),
        Axis("TP", layout.tp, 1),
        Axis("EP", layout.ep, 1),
        Axis("expert shards", layout.edp, layout.ep),
        Axis("CP", layout.cp, layout.tp),
    ]


def world_size(run: RunConfig) -> int:
    """All ranks: one process each."""
    return run.trainer.devices * run.trainer.num_nodes


def data_parallel_size(model: ModelConfig, world: int) -> int | None:
    """Ranks with batches of their own among ``world``; None where TP x PP x CP does not divide
    it."""
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    return _share(world, tp * pp * model.context_parallel_size)


def data_shards(model: ModelConfig, world: int, tp: int | None = None) -> int | None:
    """Ranks of one replica that share the memory of each weight; CP's are among them.

    Args:
        model: has the sizes.
        world: all ranks.
        tp: another TP than the model's.

    Returns:
        None where the sizes do not divide ``world``.
    """
    tp = model.tensor_model_parallel_size if tp is None else tp
    inside = tp * model.pipeline_model_parallel_size * model.data_parallel_replicate_size
    shards = _share(world, inside)
    return shards if shards and shards % model.context_parallel_size == 0 else None


def kept_shape(weight: Weight, layout: Layout) -> tuple[int, ...]:
    """What a rank keeps of a weight between steps; the last ranks of an uneven cut keep less.

    A correction bias is whole on every rank that holds its router.
    """
    if weight.buffer:
        return weight.shape
    shape = list(weight.divided(layout.tp, layout.ep))
    shards = layout.edp if weight.routed else layout.dp_shard
    dim = weight.shard_dim(layout.tp, layout.ep, shards)
    assert dim is not None, f"config/layout_rules.py lets {weight.name} through"
    shape[dim] = -(-shape[dim] // shards)
    return tuple(shape)


def compiles(model: ModelConfig, gpu: bool) -> bool:
    """Whether blocks are compiled: as ``model.torch_compile`` says; of itself on GPUs, where
    nothing stands against it."""
    if model.torch_compile is not None:
        return model.torch_compile
    selective = model.activations_checkpoint_granularity == "selective"
    split = model.pipeline_schedule in SPLIT_BACKWARD_SCHEDULES
    split = split and model.pipeline_model_parallel_size > 1
    return gpu and not selective and not split and not model.cpu_offloading_activations


# -- pipeline stages --


class StageSlice(NamedTuple):
    """What one pipeline stage holds of the model."""

    layers: range
    """Its blocks."""
    first: bool
    """Has the embedding."""
    output: range
    """What it has of ``OUTPUT``: 0 is final norm, head and main loss; 1 the MTP modules, with a
    copy of the embedding; 2 their losses, with a copy of the head where 0 is elsewhere."""

    @property
    def main(self) -> bool:
        """Has final norm, head and main loss."""
        return 0 in self.output

    @property
    def ahead(self) -> bool:
        """Has the MTP modules, if there are any."""
        return 1 in self.output

    @property
    def last(self) -> bool:
        """Ends the pipeline, with MTP's losses if there are any."""
        return 2 in self.output

    def heads(self, model: ModelConfig) -> int:
        """Passes through the head: one, and one for each MTP module."""
        return self.main + model.num_nextn_predict_layers * self.last


def stages_per_rank(model: ModelConfig) -> int | None:
    """Stages of a pipeline rank; None where schedule and virtual size contradict each other."""
    schedule, virtual = model.pipeline_schedule, model.virtual_pipeline_model_parallel_size
    if schedule in INTERLEAVED_SCHEDULES:
        return virtual if virtual > 1 else None
    if virtual > 1:
        return None
    return 2 if schedule in V_SCHEDULES else 1


def num_stages(model: ModelConfig) -> int:
    """Pipeline stages over all ranks."""
    pp = model.pipeline_model_parallel_size
    if pp == 1:
        return 1
    held = stages_per_rank(model)
    assert held is not None, "config/layout_rules.py lets this schedule through"
    return pp * held


def stage_rank(model: ModelConfig, stage: int) -> int:
    """The pipeline rank that holds a stage: round robin, or down and up again in a V."""
    pp = model.pipeline_model_parallel_size
    return _holder(pp, model.pipeline_schedule in V_SCHEDULES, stage)


def _holder(pp: int, in_v: bool, stage: int) -> int:
    return 2 * pp - 1 - stage if in_v and stage >= pp else stage % pp


def stages_of_rank(model: ModelConfig, pp_rank: int) -> list[int]:
    """The stages a pipeline rank holds, ascending."""
    pp = model.pipeline_model_parallel_size
    if model.pipeline_schedule in V_SCHEDULES and pp > 1:
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return list(range(pp_rank, num_stages(model), pp))


def rank_stages(model: ModelConfig, pp_rank: int) -> list[StageSlice]:
    """What each stage of a rank has of the model, in ascending order."""
    parts = split_layers(model)
    return [parts[stage] for stage in stages_of_rank(model, pp_rank)]


def split_layers(model: ModelConfig) -> list[StageSlice]:
    """The parts of each stage: by hand, or so that the costliest rank costs least."""
    over = model.pipeline_output_stages
    if model.pipeline_layers_per_stage is not None:
        return _parts(model.pipeline_layers_per_stage, over)
    moe = model.num_moe_layers
    costs = model.num_hidden_layers - moe, moe, *_block_costs(model), tuple(output_costs(model))
    in_v = model.pipeline_schedule in V_SCHEDULES
    pp = model.pipeline_model_parallel_size
    return list(_balanced(*costs, over, pp, num_stages(model), in_v))


def most_output_stages(model: ModelConfig) -> int:
    """Stages that the output can be divided over: what one hands to the next is one tensor, and of
    several MTP modules the losses need them all."""
    depth = model.num_nextn_predict_layers
    return min((1, 3)[depth] if depth < 2 else 2, num_stages(model))


def _parts(sizes: Sequence[int], over: int) -> list[StageSlice]:
    """Stages of so many layers, the last ``over`` of which share the output."""
    ends, last = list(accumulate(sizes)), len(sizes) - 1
    parts = []
    for stage, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        at = over - 1 - (last - stage)  # among those that share the output
        output = range(at, at + 1 if stage < last else len(OUTPUT)) if at >= 0 else range(0)
        parts.append(StageSlice(range(end - size, end), stage == 0, output))
    return parts


@lru_cache(maxsize=1 << 12)
def _balanced(
    dense: int,
    moe: int,
    dense_cost: int,
    moe_cost: int,
    output: tuple[int, ...],
    over: int,
    pp: int,
    stages: int,
    in_v: bool,
) -> tuple[StageSlice, ...]:
    holders = tuple(_holder(pp, in_v, stage) for stage in range(stages))
    costs = [dense_cost] * dense + [moe_cost] * moe
    ends = [*output[: over - 1], sum(output[over - 1 :])]
    return tuple(_parts(balanced_over_ranks(costs, ends, holders), over))


def layer_costs(model: ModelConfig) -> list[int]:
    """Multiplications in each block's forward pass for one token, attention over half the sequence
    included."""
    costs = _block_costs(model)
    return [costs[model.is_moe_layer(layer)] for layer in range(model.num_hidden_layers)]


def output_costs(model: ModelConfig) -> list[int]:
    """The same of each of ``OUTPUT``: the head, the MTP modules, and the head's passes for them."""
    head, depth = model.vocab_size * model.hidden_size, model.num_nextn_predict_layers
    return [head, depth * (2 * model.hidden_size**2 + _block_costs(model)[1]), depth * head]


def stage_costs(model: ModelConfig) -> list[int]:
    """The same of all that each stage has."""
    layers, output = layer_costs(model), output_costs(model)
    return [
        sum(layers[layer] for layer in part.layers) + sum(output[index] for index in part.output)
        for part in split_layers(model)
    ]


def balanced_over_ranks(costs: list[int], ends: Sequence[int], holders: Sequence[int]) -> list[int]:
    """Sizes of consecutive groups such that the rank whose groups cost most costs least.

    The group with the first of ``ends`` may be empty, those after it are: what else they have may
    be enough for their ranks. Among equals, the most even one (least sum of squares over ranks,
    then over groups). Exact where every rank holds one group. Where it holds several, layers are
    moved one at a time as long as that is better: from the costliest rank to any group, or between
    groups of a rank.

    Args:
        costs: of each layer, in any unit.
        ends: what the last groups cost besides, in the same unit.
        holders: the rank of each group; as many as layers at most.
    """
    stages, ranks = len(holders) - len(ends) + 1, max(holders) + 1
    sums = list(accumulate(costs, initial=0))

    def weigh(sizes: list[int]) -> tuple[list[int], tuple[int, int, int]]:
        """Costs of the ranks, and what is to be least."""
        bounds = accumulate(sizes, initial=0)
        groups = [sums[end] - sums[start] for start, end in pairwise(bounds)]
        groups[-1] += ends[0]
        groups += ends[1:]
        loads = [0] * ranks
        for holder, cost in zip(holders, groups, strict=True):
            loads[holder] += cost
        return loads, (max(loads), _squares(loads), _squares(groups))

    starts = [balanced_sizes(costs, ends[0], stages)]
    if stages > 1:
        starts.append([*balanced_sizes(costs, 0, stages - 1), 0])
    sizes = min(starts, key=lambda sizes: weigh(sizes)[1])
    while ranks < len(holders):
        loads, found = weigh(sizes)
        costliest = loads.index(max(loads))
        moved = []
        for giver, taker in permutations(range(stages), 2):
            if holders[giver] not in (costliest, holders[taker]):
                continue
            if sizes[giver] > (giver < stages - 1):
                other = list(sizes)
                other[giver], other[taker] = other[giver] - 1, other[taker] + 1
                moved.append((weigh(other)[1], other))
        best = min(moved, default=(found, sizes))
        if best[0] >= found:
            break
        sizes = best[1]
    return [*sizes, *[0] * (len(ends) - 1)]


def _squares(numbers: list[int]) -> int:
    return sum(number * number for number in numbers)


def balanced_sizes(costs: list[int], last: int, stages: int) -> list[int]:
    """Sizes of consecutive groups, none empty, whose largest sum is smallest.

    Among equals, the most even split (least sum of squares); among those, the one whose early
    groups are small: they hold the activations of more micro-batches.

    Args:
        costs: of each layer, in any unit.
        last: added to the last group, in the same unit.
        stages: number of groups, at most ``len(costs)``.
    """
    sums = list(accumulate(costs, initial=0))
    count = len(costs)

    def fits(bound: int) -> bool:
        """Whether the groups, filled from the last on, are enough; larger ones can be parted."""
        groups, room = 1, bound - last
        for index, cost in enumerate(reversed(costs)):
            if cost > room:
                groups, room = groups + 1, bound
                if index == 0 or cost > room:
                    return False
            room -= cost
        return groups <= stages

    bound = bisect_left(range(sums[-1] + last + 1), True, key=fits)
    even: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for group in range(1, stages + 1):
        more = last if group == stages else 0
        starts, even = even, {}
        for end in range(group, count + 1):
            first = bisect_left(sums, sums[end] + more - bound)
            options = [
                (starts[cut][0] + (sums[end] - sums[cut] + more) ** 2, [*starts[cut][1], end - cut])
                for cut in range(first, end)
                if cut in starts
            ]
            if options:
                even[end] = min(options)
    return even[count][1]


def _share(ranks: int, inside: int) -> int | None:
    return ranks // inside if ranks % inside == 0 else None


def _block_costs(model: ModelConfig) -> tuple[int, int]:
    """Of a dense and of a MoE block: attention with the norms of its latents, and the feed-forward
    without router."""
    length, heads = model.data.seq_length, model.num_attention_heads
    scores = length * heads * (model.qk_head_dim + model.v_head_dim) // 2
    dense, moe, expert = _multiplied(model)
    return scores + dense, scores + moe + model.num_experts_per_tok * expert


@once_per_shape
def _multiplied(model: ModelConfig) -> tuple[int, int, int]:
    """Numbers of the matrices of a dense block, of a MoE block less its experts, of an expert."""
    sizes = [
        [
            (weight.routed, math.prod(weight.shape))
            for weight in block_weights(model, moe)
            if not weight.adapter
            and not weight.name.startswith(("attn_norm", "ffn_norm", "ffn.gate"))
        ]
        for moe in (False, True)
    ]
    dense, moe = (sum(size for routed, size in block if not routed) for block in sizes)
    experts = sum(size for routed, size in sizes[1] if routed)
    return dense, moe, experts // model.n_routed_experts
