"""Who holds what: ranks, axes, stages and experts as plain numbers.

    dense  = (pp, dp_replicate, dp_shard, tp)
    sparse = (pp, dp_replicate, edp, ep)        edp = dp_shard * tp / ep

are two views of the same ranks. The innermost axis varies fastest with the rank, so a TP group, and
an EP group, is made of neighbouring ranks. Experts borrow their ranks from TP and data parallelism,
never from the pipeline.

A mesh has axes; a tensor has dims. ``layout_rules.py`` refuses the layouts that do not work out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.config.weights import Weight, block_weights

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "tp")
SPARSE_AXES = ("pp", "dp_replicate", "edp", "ep")

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


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, in ranks.

    Raises:
        ValueError: EP does not divide the ranks that it borrows.
    """

    pp: int = 1
    """Ranks of a pipeline."""
    dp_replicate: int = 1
    """Groups of ranks that each hold the whole model."""
    dp_shard: int = 1
    """Ranks with batches of their own that share the memory of each weight."""
    tp: int = 1
    """Ranks that divide each sequence, and most matrices, among them."""
    ep: int = 1
    """Ranks that divide the routed experts among them."""

    def __post_init__(self) -> None:
        if self.dp_shard * self.tp % self.ep:
            raise ValueError(f"EP {self.ep} does not divide {self.dp_shard} x {self.tp} ranks")

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
        return cls(pp, replicate, shard, tp, model.expert_model_parallel_size)

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
        return self.dp_replicate * self.dp_shard

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold the same pipeline stages."""
        return self.dp * self.tp

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
        return Coordinate(pp, replicate, shard, tp, edp, ep)


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
    """All axes; the first four are one view of the ranks, the last two part of the other."""
    return [
        Axis("PP", layout.pp, layout.stage_ranks),
        Axis("replicas", layout.dp_replicate, layout.dp_shard * layout.tp),
        Axis("data shards", layout.dp_shard, layout.tp),
        Axis("TP", layout.tp, 1),
        Axis("EP", layout.ep, 1),
        Axis("expert shards", layout.edp, layout.ep),
    ]


def world_size(run: RunConfig) -> int:
    """All ranks: one process each."""
    return run.trainer.devices * run.trainer.num_nodes


def data_parallel_size(model: ModelConfig, world: int) -> int | None:
    """Ranks with batches of their own among ``world``; None where TP x PP does not divide it."""
    return _share(world, model.tensor_model_parallel_size * model.pipeline_model_parallel_size)


def data_shards(model: ModelConfig, world: int, tp: int | None = None) -> int | None:
    """Ranks of one replica with batches of their own, which share the memory of each weight.

    Args:
        model: has the sizes.
        world: all ranks.
        tp: another TP than the model's.

    Returns:
        None where the sizes do not divide ``world``.
    """
    tp = model.tensor_model_parallel_size if tp is None else tp
    inside = tp * model.pipeline_model_parallel_size * model.data_parallel_replicate_size
    return _share(world, inside)


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


# -- pipeline stages --


class StageSlice(NamedTuple):
    """What one pipeline stage holds of the model."""

    layers: range
    """Its blocks."""
    first: bool
    """Has the embedding."""
    last: bool
    """Has final norm, head, MTP modules, and a copy of the embedding for them."""


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
    if model.pipeline_schedule in V_SCHEDULES and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def stages_of_rank(model: ModelConfig, pp_rank: int) -> list[int]:
    """The stages a pipeline rank holds, ascending."""
    return [s for s in range(num_stages(model)) if stage_rank(model, s) == pp_rank]


def split_layers(model: ModelConfig) -> list[StageSlice]:
    """The parts of each stage: by hand, or so that the costliest stage costs least."""
    stages = num_stages(model)
    sizes = model.pipeline_layers_per_stage or balanced_sizes(
        layer_costs(model), last_stage_cost(model), stages
    )
    starts = [sum(sizes[:stage]) for stage in range(stages + 1)]
    return [
        StageSlice(range(starts[s], starts[s + 1]), s == 0, s == stages - 1) for s in range(stages)
    ]


def layer_costs(model: ModelConfig) -> list[int]:
    """Multiplications in each block's forward pass for one token, attention over half the sequence
    included."""
    costs = {moe: _block_cost(model, moe) for moe in (False, True)}
    return [costs[model.is_moe_layer(layer)] for layer in range(model.num_hidden_layers)]


def last_stage_cost(model: ModelConfig) -> int:
    """The same of what the last stage has besides its blocks: the head, MTP with its own pass."""
    head, depth = model.vocab_size * model.hidden_size, model.num_nextn_predict_layers
    return head + depth * (head + 2 * model.hidden_size**2 + _block_cost(model, moe=True))


def balanced_sizes(costs: list[int], last: int, stages: int) -> list[int]:
    """Sizes of consecutive groups, none empty, whose largest sum is smallest.

    Among equals, the most even split (least sum of squares); among those, the one whose early
    groups are small: they hold the activations of more micro-batches.

    Args:
        costs: of each layer, in any unit.
        last: added to the last group, in the same unit.
        stages: number of groups, at most ``len(costs)``.
    """
    count = len(costs)
    total = [sum(costs[:i]) for i in range(count + 1)]

    def cost(start: int, end: int, group: int) -> int:
        return total[end] - total[start] + (last if group == stages else 0)

    # least[end] is the smallest possible largest sum of the first groups, up to layer `end`
    least: list[float] = [0, *[math.inf] * count]
    for group in range(1, stages + 1):
        least = [
            min((max(least[cut], cost(cut, end, group)) for cut in range(end)), default=math.inf)
            for end in range(count + 1)
        ]
    bound = least[count]
    even: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for group in range(1, stages + 1):
        even = {
            end: min(options)
            for end in range(group, count + 1)
            if (
                options := [
                    (even[cut][0] + cost(cut, end, group) ** 2, [*even[cut][1], end - cut])
                    for cut in range(group - 1, end)
                    if cut in even and cost(cut, end, group) <= bound
                ]
            )
        }
    return even[count][1]


def _share(ranks: int, inside: int) -> int | None:
    return ranks // inside if ranks % inside == 0 else None


def _block_cost(model: ModelConfig, moe: bool) -> int:
    """Attention with the norms of its latents, and the feed-forward without router."""
    length, heads = model.data.seq_length, model.num_attention_heads
    cost = length * heads * (model.qk_head_dim + model.v_head_dim) // 2
    for weight in block_weights(model, moe):
        if weight.adapter or weight.name.startswith(("attn_norm", "ffn_norm", "ffn.gate")):
            continue
        size = math.prod(weight.shape)
        if weight.routed:
            size = size // model.n_routed_experts * model.num_experts_per_tok
        cost += size
    return cost
