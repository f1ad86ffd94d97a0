"""From a configuration to this rank's part of the model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from deepseek.config.cost import reshards
from deepseek.config.layout import StageParts, split_layers, stages_of_rank
from deepseek.config.schema import ModelConfig
from deepseek.models.transformer import Stage, Transformer
from deepseek.parallel.mesh import Alone, Meshes
from deepseek.parallel.pipeline import MicroBatches, Sequential, micro_batches_of
from deepseek.parallel.shard import fill, shard_data_parallel, shard_experts
from deepseek.parallel.tensor import shard_tensors


class Distributed(NamedTuple):
    """What a rank works with."""

    model: Transformer
    """The parts that are here, their parameters DTensors under the names of the whole model."""
    micro_batches: MicroBatches
    """How to run them."""


def build(
    config: ModelConfig,
    meshes: Meshes | Alone,
    device: torch.device,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Distributed:
    """This rank's part of the model, with its start values, and how to run it.

    In one process: the whole model, of plain parameters. Otherwise nothing larger than one matrix
    is ever whole on a rank.

    Args:
        config: the model.
        meshes: where this rank stands.
        device: where the weights go.
        seed: of the start values, which do not depend on the layout.
        dtype: of the parameters.
    """
    if isinstance(meshes, Alone):
        with torch.device("meta"):
            model = Transformer(config).to(dtype)
        model.to_empty(device=device)
        model.init_weights(seed)
        everything = StageParts(range(config.num_hidden_layers), first=True, last=True)
        return Distributed(model, Sequential(Stage(model, everything), config.micro_batch_size))
    parts = split_layers(config)
    here = stages_of_rank(config, meshes.place.pp)
    with torch.device("meta"):
        model = Transformer(config, [parts[index] for index in here]).to(dtype)
    shard_tensors(model, meshes)
    shard_experts(model, meshes)
    stages = {index: Stage(model, parts[index]) for index in here}
    resharded = reshards(config, meshes.layout)
    shard_data_parallel(model, list(stages.values()), meshes, resharded)
    model.to_empty(device=device)
    fill(model, seed)
    return Distributed(model, micro_batches_of(stages, config, meshes, resharded))
