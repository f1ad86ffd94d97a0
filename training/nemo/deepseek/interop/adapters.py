"""Models from checkpoints, whole: where a checkpoint holds adapters, they are merged into their
base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manifest import MANIFEST
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.training_state import Base, load_adapters, load_weights
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.interop.nemo_file import open_weights
from deepseek.models.components.lora import merged_state
from deepseek.models.transformer import Transformer


def load_whole(checkpoint: Checkpoint, config: ModelConfig, device: str = "cpu") -> Transformer:
    """The model that a checkpoint is of, for inference; a run's adapters are merged.

    Args:
        checkpoint: of a run.
        config: the run's.
        device: where the weights go.

    Raises:
        UserError: the base of adapters is gone, or is not what they were trained on.
    """
    if config.peft is None:
        model = _blank(config, device)
        load_weights(checkpoint, model)
        return model
    adapted = load_adapted(checkpoint, config, device)
    model = _blank(replace(config, peft=None), device)
    model.load_state_dict(merged_state(adapted), assign=True)
    return model


def load_adapted(checkpoint: Checkpoint, config: ModelConfig, device: str = "cpu") -> Transformer:
    """The base with the adapters of ``checkpoint`` beside it. Raises as ``load_whole``."""
    model = _blank(config, device)
    load_weights(open_base(base_of(checkpoint), checkpoint.ranks, config.restore_from), model)
    load_adapters(checkpoint, model)
    return model


def base_of(checkpoint: Checkpoint) -> Base:
    """Which checkpoint lies below these adapters."""
    recorded = checkpoint.state().get("base")
    if recorded is None:
        raise UserError(f"{checkpoint.path} does not say what its adapters were trained on")
    return Base(**recorded)


def open_base(base: Base, ranks: Ranks, given: str | None) -> Checkpoint:
    """The checkpoint below adapters, as it was when they were trained.

    Args:
        base: what is recorded.
        ranks: that open it together.
        given: ``model.restore_from``, where it is looked for if it is not where it was.

    Raises:
        UserError: it is gone, or has changed.
    """
    return open_weights(ranks.lead(lambda: _found(base, given)), ranks)


def _found(base: Base, given: str | None) -> Path:
    places = [Path(base.path)]
    if given is not None:
        places += [Path(given), *sorted(Path(given).glob("checkpoints/step_*"))]
    there = [place for place in places if place.is_file() or (place / MANIFEST).is_file()]
    for place in there:
        if Base.of(place).sha256 == base.sha256:
            return place
    if there:
        raise UserError(
            f"{there[0]} is not the checkpoint that the adapters were trained on: its digest is "
            f"{Base.of(there[0]).sha256[:12]} instead of {base.sha256[:12]}; put the one of "
            f"{base.path} back, or set model.restore_from to where it is"
        )
    raise UserError(
        f"the adapters were trained on top of the weights in {base.path}, and there is no "
        "checkpoint there; put it back, or set model.restore_from to where it is"
    )


def _blank(config: ModelConfig, device: str) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    return model.to_empty(device=device)
