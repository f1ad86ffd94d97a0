"""What a checkpoint of a training run holds, by global name.

Tensors: ``model.<name>`` (weights and the correction bias) and ``optim.<name>.<state>`` (optimiser
state per parameter, never a flat bucket). Everything else is JSON: step, consumed samples, seed,
configuration, fingerprints. The learning rate and the data order are functions of the step and are
not stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek.checkpoint.manager import Checkpoint
from deepseek.config.errors import UserError


def collect_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that the next step depends on."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optim.{names[parameter]}.{key}"] = value
    return tensors


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimiser in place.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape.
    """
    saved = checkpoint.tensor_shapes()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    for name, shape in saved.items():
        if not name.startswith("optim."):
            continue
        parameter_name, key = name.removeprefix("optim.").rsplit(".", 1)
        parameter = parameters.get(parameter_name)
        if parameter is None:
            raise UserError(
                f"{checkpoint.path}: optimiser state {name} belongs to no parameter of this model; "
                "the model configuration differs from the one the checkpoint was written with"
            )
        if tuple(shape) == tuple(parameter.shape):
            state = torch.zeros_like(parameter, requires_grad=False)
        else:
            # The step count: fused AdamW wants it beside its parameter.
            state = torch.zeros(tuple(shape), device=parameter.device)
        states.setdefault(parameter, {})[key] = state
        tensors[name] = state
    unknown = sorted(set(saved) - set(tensors))
    if unknown:
        raise UserError(
            f"{checkpoint.path} holds {len(unknown)} tensors this model does not have, such as "
            f"{unknown[0]}; use the configuration it was written with"
        )
    checkpoint.load(tensors)
    optimizer.state.clear()
    for parameter, state_of in states.items():
        optimizer.state[parameter] = state_of


def load_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fill the model alone, for inference."""
    checkpoint.load({f"model.{name}": tensor for name, tensor in model.state_dict().items()})


def run_state(module: Any, config: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """The JSON part."""
    return {
        "step": module.finished_steps,
        "consumed_samples": module.finished_steps * module.config.global_batch_size,
        "seed": module.seed,
        "config": config,
        "data": fingerprint,
    }
