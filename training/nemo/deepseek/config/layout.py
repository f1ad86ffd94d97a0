"""Who holds what: ranks, axes, stages and experts as plain numbers.

    dense  = (pp, dp_replicate, dp_shard, tp)
    sparse = (pp, dp_replicate, edp, ep)        edp = dp_shard * tp / ep

are two views of the same ranks. The innermost axis varies fastest with the rank, so a TP group, and
an EP group, is made of neighbouring ranks. Experts borrow their ranks from TP and data parallelism,
never from the pipeline.

A mesh has axes; a tensor has dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from deepseek.config.cost import count_parameters
from deepseek.config.layout_rules import INTERLEAVED_SCHEDULES as INTERLEAVED_SCHEDULES
from deepseek.config.layout_rules import V_SCHEDULES as V_SCHEDULES
from deepseek.config.schema import ModelConfig, RunConfig

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "tp")
SPARSE_AXES = ("pp", "dp_replicate", "edp", "ep")


class Place(NamedTuple):
    """Coordinates of a rank."""

    pp: int
    dp_replicate: int
    dp_shard: int
    tp: int
    edp: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.dp_shard * self.tp % self.ep:
            raise ValueError(f"EP {self.ep} does not divide {self.dp_shard} x {self.tp} ranks")

    @classmethod
    def of(cls, model: ModelConfig, world_size: int) -> Layout:
        """The configured sizes over ``world_size`` ranks; what is left over shards the data.

        ``config/rules.py`` has checked that they divide.
        """
        pp, tp = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
        replicate = model.data_parallel_replicate_size
        shard, rest = divmod(world_size, pp * tp * replicate)
        if rest or not shard:
            raise ValueError(f"{world_size} ranks cannot be PP {pp} x TP {tp} x {replicate}")
        return cls(pp, replicate, shard, tp, model.expert_model_parallel_size)

    @classmethod
    def of_run(cls, run: RunConfig) -> Layout:
        """The layout of all processes of a run."""
        return cls.of(run.model, run.trainer.devices * run.trainer.num_nodes)

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

    def place(self, rank: int) -> Place:
        """Coordinates of a rank in both views."""
        pp, in_stage = divmod(rank, self.stage_ranks)
        replicate, in_replica = divmod(in_stage, self.dp_shard * self.tp)
        shard, tp = divmod(in_replica, self.tp)
        edp, ep = divmod(in_replica, self.ep)
        return Place(pp, replicate, shard, tp, edp, ep)


class StageParts(NamedTuple):
    """What one pipeline stage holds."""

    layers: range
    """Its blocks."""
    first: bool
    """Has the embedding."""
    last: bool
    """Has final norm, head, MTP modules, and a copy of the embedding for them."""


def num_stages(model: ModelConfig) -> int:
    """Pipeline stages over all ranks."""
    if model.pipeline_model_parallel_size == 1:
        return 1
    v_shaped = model.pipeline_schedule in V_SCHEDULES
    per_rank = 2 if v_shaped else model.virtual_pipeline_model_parallel_size
    return model.pipeline_model_parallel_size * per_rank


def stage_rank(model: ModelConfig, stage: int) -> int:
    """The pipeline rank that holds a stage: round robin, or down and up again in a V."""
    pp = model.pipeline_model_parallel_size
    if model.pipeline_schedule in V_SCHEDULES and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def stages_of_rank(model: ModelConfig, pp_rank: int) -> list[int]:
    """The stages a pipeline rank holds, ascending."""
    return [s for s in range(num_stages(model)) if stage_rank(model, s) == pp_rank]


def split_layers(model: ModelConfig) -> list[StageParts]:
    """The parts of each stage: by hand, or so that the costliest stage costs least."""
    stages = num_stages(model)
    sizes = model.pipeline_layers_per_stage or _balanced(
        layer_costs(model), last_stage_cost(model), stages
    )
    starts = [sum(sizes[:stage]) for stage in range(stages + 1)]
    return [
        StageParts(range(starts[s], starts[s + 1]), s == 0, s == stages - 1) for s in range(stages)
    ]


def layer_costs(model: ModelConfig) -> list[int]:
    """Forward products of each block for one token, attention over half the sequence included."""
    return [_block_cost(model, model.is_moe_layer(i)) for i in range(model.num_hidden_layers)]


def last_stage_cost(model: ModelConfig) -> int:
    """The same of what the last stage has besides its blocks: the head, MTP with its own pass."""
    head, depth = count_parameters(model).head, model.num_nextn_predict_layers
    return head + depth * (head + 2 * model.hidden_size**2 + _block_cost(model, moe=True))


def _block_cost(model: ModelConfig, moe: bool) -> int:
    counts = count_parameters(model)
    heads, length = model.num_attention_heads, model.data.seq_length
    scores = length * heads * (model.qk_head_dim + model.v_head_dim) // 2
    experts = model.num_experts_per_tok * counts.expert + counts.shared_experts_per_layer
    return counts.attention_per_layer + scores + (experts if moe else counts.dense_ffn_per_layer)


def _balanced(costs: list[int], last: int, stages: int) -> list[int]:
    """Sizes of consecutive groups, none empty, whose largest sum is smallest.

    ``last`` is added to the last group. Among equals, the most even split (least sum of squares);
    among those, the one whose early groups are small: they hold the activations of more
    micro-batches.
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
