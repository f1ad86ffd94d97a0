"""Gradients after the backward pass: what several ranks hold is added up; norm and clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from deepseek.config.layout import split_layers, stage_rank
from deepseek.models.transformer import COPIES, Transformer
from deepseek.ops.squares import square_sums
from deepseek.parallel.mesh import Meshes, SingleProcess, local


def finish_gradients(model: Transformer, meshes: Meshes | SingleProcess) -> None:
    """Make every gradient the one of the whole step, once all micro-batches are done."""
    if meshes.tp is not None and meshes.layout.tp > 1:
        _sum_over_tensor_ranks(model, meshes.tp)
    _sum_copies(model, meshes)


Number = TypeVar("Number", Tensor, float)


class GradientNorms(NamedTuple, Generic[Number]):
    """Global 2-norms, fp64 scalars, equal on every rank."""

    total: Number
    dense: Number
    """Of what is neither a routed expert nor a router."""
    expert: Number
    """Of the routed experts."""
    router: Number
    """Of the routers."""


def gradient_norms(
    named: Sequence[tuple[str, Tensor]], meshes: Meshes | SingleProcess
) -> GradientNorms[Tensor]:
    """Norms of all gradients, and of each kind of weight, of parameters with their names.

    ``torch.nn.utils.get_total_norm`` refuses gradients of several meshes. Each rank squares what
    it holds and divides by the number of ranks that hold the same.
    """
    kinds: tuple[list[tuple[Tensor, int]], ...] = ([], [], [])
    for name, parameter in named:
        grad, kind = parameter.grad, _kind(name)
        if grad is not None and kind is not None:
            kinds[kind].append((local(grad), _holders(parameter, meshes)))
    squares = square_sums(kinds, named[0][1].device)
    sum_over(squares, meshes.world)
    return GradientNorms(squares.sum().sqrt(), *squares.sqrt())


@cache
def _kind(name: str) -> int | None:
    """Which of ``GradientNorms`` a parameter counts in, the total aside; None: it is a copy."""
    if name in COPIES:  # count once
        return None
    return 1 if ".experts." in name else 2 if name.endswith("gate.weight") else 0


def clip_factor(largest: float, norm: float) -> float:
    """What brings gradients of this norm to a norm of at most ``largest``; 0: whatever it is."""
    factor = largest / (norm + 1e-6)
    return factor if 0 < factor < 1 else 1.0


def multiply_gradients(parameters: Sequence[Tensor], factor: float) -> None:
    """In place, as ``torch.nn.utils.clip_grad_norm_`` rounds. Times 1 they are left alone."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if factor != 1 and gradients:  # a stage without a layer has none, if adapters are trained
        torch._foreach_mul_(gradients, factor)


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over a group, in place; None: this rank alone."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def max_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Largest over a group, in place, element by element; None: this rank alone."""
    if group is not None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor


def sum_over_all(tensor: Tensor) -> Tensor:
    """Sum over every rank, in place; without a process group, this one alone."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _axes(tensor: Tensor) -> tuple[str, ...]:
    return tuple(tensor.device_mesh.mesh_dim_names or ()) if isinstance(tensor, DTensor) else ()


def _holders(parameter: Tensor, meshes: Meshes | SingleProcess) -> int:
    """How many ranks of the stage hold the same part."""
    if not isinstance(parameter, DTensor):
        return meshes.layout.stage_ranks
    # Not is_shard(): it is False for the strided shards of FSDP over TP.
    parts = math.prod(
        parameter.device_mesh.size(axis)
        for axis, placement in enumerate(parameter.placements)
        if placement != Replicate()
    )
    return meshes.layout.stage_ranks // parts


def _sum_over_tensor_ranks(model: Transformer, group: dist.ProcessGroup) -> None:
    """Weights that are whole on every TP rank have seen a part of the tokens or heads on each."""
    gradients = [
        local(parameter.grad)
        for parameter in model.parameters()
        if parameter.grad is not None and not {"tp", "ep", "edp"} & set(_axes(parameter))
    ]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _sum_copies(model: Transformer, meshes: Meshes | SingleProcess) -> None:
    """Two stages may each have seen one use of the embedding, and two of the head."""
    config = model.config
    if isinstance(meshes, SingleProcess) or meshes.layout.pp == 1:
        return
    if config.num_nextn_predict_layers == 0:
        return
    stages, here = split_layers(config), meshes.coordinate.pp

    def rank_of(has: str) -> int:
        return stage_rank(config, next(i for i, s in enumerate(stages) if getattr(s, has)))

    both_here, received, operations = [], [], []
    for name, users in (("embed", ("first", "ahead")), ("head", ("main", "last"))):
        copies = [getattr(model, name), getattr(model, f"mtp_{name}")]
        gradients = [
            local(copy.weight.grad) for copy in copies if copy and copy.weight.grad is not None
        ]
        ranks = [rank_of(has) for has in users]
        if len(gradients) == 2:
            both_here.append(gradients)
        elif gradients and here in ranks and ranks[0] != ranks[1]:
            mine = gradients[0].contiguous()
            theirs, peer = torch.empty_like(mine), sum(ranks) - here
            received.append((gradients[0], theirs))
            if mine.numel():
                operations += [
                    dist.P2POp(what, tensor, group=meshes.pp, group_peer=peer)
                    for what, tensor in ((dist.isend, mine), (dist.irecv, theirs))
                ]
    for one, two in both_here:
        one.copy_(one + two)
        two.copy_(one)
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()
    for gradient, theirs in received:
        gradient += theirs
