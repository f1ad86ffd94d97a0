"""What lies where in a layout, as the tables that ``deepseek validate`` prints. No ranks needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepseek.commands.validate_tables import size_text
from deepseek.config.layout import (
    Layout,
    StageParts,
    last_stage_cost,
    layer_costs,
    num_stages,
    split_layers,
    stage_rank,
    stages_of_rank,
)
from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.config.weights import Weight, block_weights, mtp_weights, table_weight

MOST_ROWS = 16
"""Longer tables are cut in the middle."""
KEPT_BYTES = 1 << 30
"""Weights of less are kept gathered for a step, if nobody says otherwise."""


class Table(NamedTuple):
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Axis(NamedTuple):
    """One axis of the meshes: its groups are ranks at equal distances."""

    name: str
    size: int
    stride: int
    """Distance of neighbours in a group."""

    def groups(self, world_size: int) -> Iterator[range]:
        """The ranks of each group."""
        extent = self.size * self.stride
        for block in range(0, world_size, extent):
            for first in range(block, block + self.stride):
                yield range(first, first + extent, self.stride)

    def crosses_nodes(self, world_size: int, node: int) -> bool:
        """True if some group has ranks on several nodes of ``node`` ranks."""
        repeats = min(world_size, math.lcm(self.size * self.stride, node))
        return any(group[0] // node != group[-1] // node for group in self.groups(repeats))


class RankMemory(NamedTuple):
    """States of one rank; of ranks that differ in the rest of a division, the largest."""

    parameters: int
    weights: int
    """Bytes of fp32 weights and correction biases."""
    gradients: int
    """Bytes."""
    optimizer: int
    """Bytes."""

    @property
    def total(self) -> int:
        """Bytes of all states."""
        return self.weights + self.gradients + self.optimizer


def placement_tables(run: RunConfig) -> list[Table]:
    """The layout of a sound configuration of more than one process."""
    model, layout = run.model, Layout.of_run(run)
    tables = [_groups(layout, run.trainer.devices)]
    if layout.pp > 1:
        tables.append(_stages(model, layout))
    if layout.ep > 1:
        tables.append(_experts(model, layout))
    return [*tables, _weights(model, layout), _memory(model, layout, run.model.optim.name)]


def placement_notes(run: RunConfig) -> list[str]:
    """What is sound and yet costs: groups of much traffic that no node holds together."""
    layout, node = Layout.of_run(run), run.trainer.devices
    notes = []
    for axis in axes(layout):
        if axis.name in ("TP", "EP") and axis.crosses_nodes(layout.world_size, node):
            what = "activations of every layer" if axis.name == "TP" else "tokens of every layer"
            rule = (
                f"is wider than a node of {node}"
                if axis.size > node
                else f"does not divide a node of {node}"
            )
            notes.append(f"{axis.name} {axis.size} {rule}: {what} travel between nodes")
    return notes


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


def stage_weights(model: ModelConfig, parts: StageParts) -> Iterator[tuple[str, Weight]]:
    """Every weight of a stage by its full name."""
    if parts.first:
        yield "embed.weight", table_weight("embed", model)
    for layer in parts.layers:
        for weight in block_weights(model, model.is_moe_layer(layer)):
            yield f"layers.{layer}.{weight.name}", weight
    if not parts.last:
        return
    yield "norm.weight", Weight("norm.weight", (model.hidden_size,))
    yield "head.weight", table_weight("head", model)
    for depth in range(model.num_nextn_predict_layers):
        for weight in mtp_weights(model):
            yield f"mtp.{depth}.{weight.name}", weight
    if model.num_nextn_predict_layers and not parts.first:
        yield "mtp_embed.weight", table_weight("mtp_embed", model)


def kept_shape(weight: Weight, layout: Layout) -> tuple[int, ...]:
    """What a rank keeps of a weight between steps; the last ranks of an uneven cut keep less."""
    shape = list(weight.divided(layout.tp, layout.ep))
    shards = layout.edp if weight.routed else layout.dp_shard
    dim = weight.shard_dim(layout.tp, layout.ep, shards)
    assert dim is not None, f"config/layout_rules.py lets {weight.name} through"
    shape[dim] = -(-shape[dim] // shards)
    return tuple(shape)


def rank_memory(
    model: ModelConfig, layout: Layout, pp_rank: int, optimizer: str = "adamw"
) -> RankMemory:
    """States of a rank of this pipeline rank, activations and gathered blocks not included."""
    parts = split_layers(model)
    parameters = trained = numbers = biases = 0
    for stage in stages_of_rank(model, pp_rank):
        for name, weight in stage_weights(model, parts[stage]):
            count = math.prod(kept_shape(weight, layout))
            muon = optimizer == "muon" and len(weight.shape) > 1
            hidden = name.split(".")[-2] not in ("embed", "mtp_embed", "head")
            parameters += count
            if model.peft is None or weight.adapter:
                trained += count
                numbers += count if muon and hidden else 2 * count
            if weight.name.endswith("gate.weight") and model.topk_method == "noaux_tc":
                biases += model.n_routed_experts
    return RankMemory(parameters, 4 * (parameters + biases), 4 * trained, 4 * numbers)


def gathered_bytes(model: ModelConfig, layout: Layout) -> int:
    """Copies of weights that the fullest rank has while it computes, fp32.

    Of experts that no other rank has a part of, there is none: it computes with what it keeps.
    """
    parts = split_layers(model)
    return max(
        4
        * sum(
            math.prod(weight.divided(layout.tp, layout.ep))
            for stage in stages_of_rank(model, pp)
            for _, weight in stage_weights(model, parts[stage])
            if not (weight.routed and layout.keeps_experts)
        )
        for pp in range(layout.pp)
    )


def reshards(model: ModelConfig, layout: Layout) -> bool:
    """Whether gathered weights go after the forward pass; see ``model.reshard_after_forward``."""
    if model.reshard_after_forward is not None:
        return model.reshard_after_forward
    return layout.pp == 1 and gathered_bytes(model, layout) > KEPT_BYTES


# -- tables --


def _groups(layout: Layout, node: int) -> Table:
    rows = [
        (
            axis.name,
            f"{axis.size:,}",
            f"{layout.world_size // axis.size:,}",
            ranks_text(range(0, axis.size * axis.stride, axis.stride)),
            "yes" if axis.crosses_nodes(layout.world_size, node) else "no",
        )
        for axis in axes(layout)
        if axis.size > 1
    ]
    nodes = -(-layout.world_size // node)
    title = f"{layout.world_size:,} ranks on {_count(nodes, 'node')} of {node:,}"
    return Table(title, ("axis", "ranks in a group", "groups", "first group", "cross nodes"), rows)


def _stages(model: ModelConfig, layout: Layout) -> Table:
    parts, costs = split_layers(model), layer_costs(model)
    sums = [sum(costs[i] for i in part.layers) for part in parts]
    sums[-1] += last_stage_cost(model)
    rows = []
    for stage, part in enumerate(parts):
        holder = stage_rank(model, stage)
        dense = sum(not model.is_moe_layer(layer) for layer in part.layers)
        kinds = [_count(dense, "dense"), _count(len(part.layers) - dense, "MoE")]
        more = ["embedding"] if part.first else []
        if part.last:
            more += ["norm", "head"]
            more += ["MTP", "a copy of the embedding"] if model.num_nextn_predict_layers else []
        first = holder * layout.stage_ranks
        rows.append(
            (
                str(stage),
                f"{ranks_text(part.layers)} ({', '.join(k for k in kinds if k[0] != '0')})",
                ", ".join(more),
                f"{ranks_text(range(first, first + layout.stage_ranks))} (PP {holder})",
                f"{100 * sums[stage] / max(sums):.0f} %",
            )
        )
    title = f"{num_stages(model)} pipeline stages ({model.pipeline_schedule})"
    columns = ("stage", "layers", "with", "ranks", "work of the costliest")
    return Table(title, columns, _shortened(rows))


def _experts(model: ModelConfig, layout: Layout) -> Table:
    each = model.n_routed_experts // layout.ep
    rows = [
        (
            ranks_text(range(ep * each, (ep + 1) * each)),
            str(ep),
            ranks_text(range(ep, layout.world_size, layout.ep)),
        )
        for ep in range(layout.ep)
    ]
    title = "experts of the MoE layers, on the ranks that hold the layer"
    return Table(title, ("experts", "EP rank", "ranks"), _shortened(rows))


def _weights(model: ModelConfig, layout: Layout) -> Table:
    """One weight of each kind; norms are left out."""
    found: dict[str, Weight] = {}
    for part in split_layers(model):
        for name, weight in stage_weights(model, part):
            if len(weight.shape) > 1 and not name.startswith("mtp.0.block"):
                found.setdefault(weight.name, weight)
    rows = [
        (
            weight.name,
            _shape(weight.shape),
            _shape(weight.divided(layout.tp, layout.ep)),
            _shape(kept_shape(weight, layout)),
        )
        for weight in found.values()
    ]
    columns = ("weight", "whole", "computed with on a rank", "kept on a rank")
    title = (
        f"shapes: TP {layout.tp} and EP {layout.ep} divide the work, {layout.dp_shard:,} data "
        f"shards and {layout.edp:,} expert shards the memory"
    )
    return Table(title, columns, rows)


def _memory(model: ModelConfig, layout: Layout, optimizer: str) -> Table:
    ranks = [rank_memory(model, layout, pp, optimizer) for pp in range(layout.pp)]
    rows = [
        (
            ranks_text(range(pp * layout.stage_ranks, (pp + 1) * layout.stage_ranks)),
            f"{memory.parameters:,}",
            size_text(memory.weights),
            size_text(memory.gradients),
            size_text(memory.optimizer),
            size_text(memory.total),
        )
        for pp, memory in enumerate(ranks)
    ]
    most = max(ranks, key=lambda memory: memory.total)
    size = size_text(most.total)
    title = f"states of one rank, at most {size}, without activations and gathered weights"
    if (layout.dp_shard > 1 or layout.edp > 1) and not reshards(model, layout):
        title += f" (kept in a step: {size_text(gathered_bytes(model, layout))})"
    columns = ("ranks", "parameters", "weights", "gradients", "optimiser", "together")
    return Table(title, columns, _shortened(rows))


# -- text --


def ranks_text(numbers: range) -> str:
    """``3``, ``0-15``, ``0, 8`` or ``0, 8, ..., 120``."""
    if len(numbers) == 1:
        return f"{numbers[0]}"
    if numbers.step == 1:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if noun == 'node' and number != 1 else ''}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _shortened(rows: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """The first and last rows of a long table."""
    if len(rows) <= MOST_ROWS:
        return rows
    half = MOST_ROWS // 2
    gap = (f"... {len(rows) - 2 * half} more", *[""] * (len(rows[0]) - 1))
    return [*rows[:half], gap, *rows[-half:]]
