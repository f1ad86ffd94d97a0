"""Bytes of weights, gradients and moments: of a model, and a rank's share of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from deepseek.config.activations import blocks_of_stage
from deepseek.config.cost import count_parameters
from deepseek.config.layout import Layout, StageSlice, kept_shape, rank_stages
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

KEPT_BYTES = 1 << 30
"""Gathered weights of less stay gathered for a whole step, if nobody says otherwise."""


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
    return states_of_groups(model, stage_groups(model, Layout(), [everything]), optimizer)


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
    return states_of_groups(
        model, stage_groups(model, layout, rank_stages(model, pp_rank)), optimizer
    )


def states_of_groups(
    model: ModelConfig, groups: list[tuple[Numbers, int, bool]], optimizer: str
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
    weights = 4 * (parameters + biases) - round(packed * (4 - packed_bytes(model)))
    bytes_of_moments = (number * moments, 0)
    if model.optim.cpu_offload:
        bytes_of_moments = (0, number * moments)
    return StateMemory(parameters, weights, 4 * trained, *bytes_of_moments)


def packed_bytes(model: ModelConfig) -> float:
    """Of a number of a frozen matrix, its share of a scale included."""
    kind = model.peft.base_dtype if model.peft is not None else None
    if kind is None:
        return 4
    return packed_row_bytes(PACKED_BLOCKS[kind], kind) / PACKED_BLOCKS[kind]


def gathered_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes of copies of weights that the fullest rank has while it computes, if in fp32.

    Of experts that no other rank has a part of, there is none: it computes with what it keeps.
    """
    ranks = (
        stage_groups(model, layout, rank_stages(model, pp_rank)) for pp_rank in range(layout.pp)
    )
    return 4 * max(sum(times * numbers.gathered for numbers, times, _ in rank) for rank in ranks)


def largest_unit(model: ModelConfig, layout: Layout, stages: Sequence[StageSlice]) -> int:
    """Numbers of the weights that FSDP gathers at a time, of some stages at most: of a block with
    its experts, an MTP module, or embedding, last norm and head together."""
    groups = stage_groups(model, layout, stages)
    root = sum(times * numbers.gathered for numbers, times, is_unit in groups if not is_unit)
    return max([root, *(numbers.gathered for numbers, times, is_unit in groups if times)])


class Numbers(NamedTuple):
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


def stage_groups(
    model: ModelConfig, layout: Layout, stages: Sequence[StageSlice]
) -> list[tuple[Numbers, int, bool]]:
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
def _numbers(model: ModelConfig, layout: Layout) -> dict[str, Numbers]:
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
        found[name] = Numbers(
            kept, biases, trained, hidden, whole, gathered, packed, packed_gathered, packed_beside,
            exact, beside, alone,
        )  # fmt: skip
    return found


def largest_trained(model: ModelConfig, layout: Layout) -> int:
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


def in_half(run: RunConfig) -> bool:
    """Whether products are taken to be computed in 2 bytes; of ``auto``, on anything but a CPU."""
    precision = str(run.trainer.precision)
    return precision == "bf16-mixed" or (precision == "auto" and run.trainer.accelerator != "cpu")
