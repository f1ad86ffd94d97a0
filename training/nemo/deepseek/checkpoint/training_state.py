"""What a checkpoint of a training run holds, by global name.

Tensors: ``model.<name>`` (weights and the correction bias) and ``optim.<name>.<state>`` (optimiser
state per parameter, never a flat bucket), under the names they have in the whole model, whichever
rank has them. Everything else is JSON: step, consumed samples, seed, configuration, fingerprints.
The learning rate and the data order are functions of the step and are not stored, and neither is
the layout: any one loads what any other wrote.

With adapters (LoRA) the weights below them are left out, being frozen: ``base`` says which
checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manifest import MANIFEST
from deepseek.config.batch_ramp import consumed_samples
from deepseek.config.errors import UserError
from deepseek.config.weights import packed_columns
from deepseek.files import sha256_of
from deepseek.models.components.lora import is_adapter
from deepseek.models.transformer import global_name
from deepseek.ops.packed import pack_rows
from deepseek.parallel.mesh import local, local_slices
from deepseek.training.adamw import AdamW


def collect_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor here that the next step depends on.

    Copies are left out: the rank with the embedding itself has the same numbers.
    """
    # First the state_dict: it makes FSDP put back the shards, which after a validation in a
    # pipeline are still gathered, and are then other parameters than the optimiser's.
    tensors = {
        f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if name == global_name(name) and _is_kept(name, model)
    }
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        if name == global_name(name):
            tensors |= {f"optim.{name}.{key}": value for key, value in state.items()}
    return tensors


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimiser in place; a collective, as each rank may have a part of them.

    Raises:
        UserError: a tensor is missing, unknown to all ranks, or of another shape; on all ranks,
            and nothing has been changed then.
    """
    saved, dtypes = checkpoint.tensor_shapes(), checkpoint.tensor_dtypes()
    places = _weights(model, lambda name: _is_kept(name, model))
    parameters: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parameters.setdefault(global_name(name), []).append(parameter)
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, shape in saved.items():
        if not name.startswith("optim."):
            continue
        parameter_name, key = name.removeprefix("optim.").rsplit(".", 1)
        # A copy gets a state of its own: shared, it would be updated twice a step.
        for parameter in parameters.get(parameter_name, []):
            state = _empty_state(parameter, shape, dtypes[name], optimizer)
            states.setdefault(parameter, {})[key] = state
            places.setdefault(name, []).append(state)
    known = checkpoint.ranks.together(lambda: list(places))
    _refuse_unknown(checkpoint, known)
    without = [
        name
        for name, copies in parameters.items()
        if copies[0].requires_grad and copies[0] not in states
    ]
    checkpoint.ranks.together(lambda: _refuse_missing(checkpoint, without))
    _load(checkpoint, places)
    optimizer.state.clear()
    for parameter, state_of in states.items():
        wanted = getattr(optimizer, "moments", None) or parameter.dtype
        optimizer.state[parameter] = {
            key: state
            if key == "step" or state.dtype == wanted
            else _empty_state(parameter, tuple(state.shape), wanted, optimizer).copy_(state)
            for key, state in state_of.items()
        }


def load_weights(checkpoint: Checkpoint, model: Any) -> None:
    """Fill the model alone, all but its adapters; a collective."""
    packed: dict[str, int] = getattr(model, "packed", {})
    _load(checkpoint, _weights(model, lambda name: not is_adapter(name) and name not in packed))
    groups: dict[str, list[str]] = {}
    for name in packed:
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    # A block at a time: in fp32 it is some times what it is packed.
    in_turn = list(groups.values())
    turns = max(checkpoint.ranks.together(lambda: len(in_turn)))
    held = dict(model.named_parameters())
    for names in in_turn + [[]] * (turns - len(in_turn)):
        kind = model.config.peft.base_dtype
        wide = {name: _unpacked_place(held[name], packed[name], kind) for name in names}
        checkpoint.load({f"model.{name}": place for name, place in wide.items()})
        for name, place in wide.items():
            local(held[name]).detach().copy_(pack_rows(local(place), kind))


def _unpacked_place(packed: Tensor, columns: int, kind: str) -> Tensor:
    """Room in fp32 for the weights of packed rows, divided as these are."""
    shape = torch.Size((*packed.shape[:-1], columns))
    part = packed_columns(local_slices(packed)[-1], columns, kind)
    here = torch.empty(*local(packed).shape[:-1], part.stop - part.start, device=packed.device)
    if not isinstance(packed, DTensor):
        return here
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        here, packed.device_mesh, packed.placements, run_check=False, shape=shape, stride=stride
    )


def load_adapters(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fill the adapters alone; a collective."""
    _load(checkpoint, _weights(model, is_adapter))


def run_state(
    module: Any, config: dict[str, Any], fingerprint: str, data_sha256: Sequence[str | None] = ()
) -> dict[str, Any]:
    """The JSON part.

    Args:
        module: the model and how far it has come.
        config: the resolved configuration.
        fingerprint: of the data.
        data_sha256: of each of its files, as far as they are known.
    """
    base = {"base": asdict(module.base)} if module.base is not None else {}
    skipped = {"skipped_in_a_row": module.skipped_in_a_row} if module.skipped_in_a_row else {}
    return {
        **base,
        **skipped,
        "step": module.finished_steps,
        "consumed_samples": consumed_samples(
            module.finished_steps, module.config.global_batch_size, module.config.rampup_batch_size
        ),
        "seed": module.seed,
        "config": config,
        "data": fingerprint,
        "data_sha256": list(data_sha256),
    }


@dataclass(frozen=True)
class Base:
    """The checkpoint whose weights lie below adapters."""

    path: str
    sha256: str
    """Of its manifest, and so of all its files; of a ``.nemo`` file, its own."""

    @classmethod
    def of(cls, path: Path) -> Base:
        """The checkpoint in the folder ``path``, or the ``.nemo`` file ``path``."""
        return cls(str(path.absolute()), sha256_of(path if path.is_file() else path / MANIFEST))


def _is_kept(name: str, model: Any) -> bool:
    """Whether a checkpoint holds the weight ``name``: with adapters, only these."""
    return model.config.peft is None or is_adapter(name)


def _weights(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, list[Tensor]]:
    """Weights and buffers by global name; two where a copy is here as well."""
    places: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not wanted(name):
            continue
        places.setdefault(f"model.{global_name(name)}", []).append(tensor)
    return places


def _load(checkpoint: Checkpoint, places: dict[str, list[Tensor]]) -> None:
    checkpoint.load({name: copies[0] for name, copies in places.items()})
    with torch.no_grad():
        for first, *others in places.values():
            for other in others:
                other.copy_(first)


def _empty_state(
    parameter: nn.Parameter,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """A tensor of the optimiser, where and how it is to lie."""
    if shape == tuple(parameter.shape):
        if isinstance(optimizer, AdamW):
            return optimizer.room(parameter, dtype)
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    # The step count: fused AdamW wants it beside its parameter.
    return torch.zeros(shape, device=parameter.device)


def _refuse_unknown(checkpoint: Checkpoint, known: list[list[str]]) -> None:
    """Every tensor saved has a place on some rank; ``known`` are those of each rank."""
    unknown = sorted(set(checkpoint.tensor_names()).difference(*known))
    states = [name for name in unknown if name.startswith("optim.")]
    if states:
        raise UserError(
            f"{checkpoint.path}: optimiser state {states[0]} belongs to no parameter of this "
            "model; the model configuration differs from the one the checkpoint was written with"
        )
    if unknown:
        raise UserError(
            f"{checkpoint.path} holds {len(unknown)} tensors this model does not have, such as "
            f"{unknown[0]}; use the configuration it was written with"
        )


def _refuse_missing(checkpoint: Checkpoint, without: list[str]) -> None:
    """Parameters may lack optimiser state all together (no step was made), not some of them."""
    saved = checkpoint.tensor_names()
    lost = [name for name in without if f"model.{name}" in saved]
    if lost and any(name.startswith("optim.") for name in saved):
        raise UserError(
            f"{checkpoint.path} holds no optimiser state for {len(lost)} parameters, such as "
            f"{lost[0]}; use the configuration it was written with, or another checkpoint"
        )
