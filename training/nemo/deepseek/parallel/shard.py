"""Where the weights lie: experts over the EP ranks, everything over the data-parallel ranks.

FSDP2 shards what a rank holds of the model over the ranks that hold the same. Where experts have a
mesh of their own for that, they are a unit of their own.

Gradients are summed, never averaged: the loss is already divided by the labels of the whole step,
and an average over the dense mesh and one over the expert mesh would weigh the two differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from deepseek.config.errors import UserError
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.moe import MoE
from deepseek.models.transformer import Stage, Transformer, initial_weight
from deepseek.parallel import cpu_memory
from deepseek.parallel.expert_dispatcher import build_dispatcher
from deepseek.parallel.mesh import Meshes, local, local_slices
from deepseek.parallel.tensor import split


def shard_experts(model: Transformer, meshes: Meshes) -> None:
    """Divide the experts of ``model`` (on the meta device) over the EP ranks, in place."""
    if meshes.layout.ep == 1:
        return
    mesh = meshes.sparse["ep"]
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        experts, num_experts = module.experts, len(module.experts.w1)
        for name, stack in list(experts.named_parameters()):
            setattr(experts, name, split(stack, 0, mesh))
        experts.local = local
        module.dispatcher = build_dispatcher(num_experts, meshes.ep, meshes.device_type)


def shard_data_parallel(
    model: Transformer, stages: Sequence[Stage], meshes: Meshes, reshards: bool
) -> None:
    """FSDP2 over blocks, MTP modules and stages, in place; the stages become ``FSDPModule``s.

    Args:
        model: what this rank holds.
        stages: the same, as it is run.
        meshes: where this rank stands.
        reshards: each unit gives gathered weights back after its forward pass.

    Raises:
        UserError: a weight that TP or EP has divided cannot be divided further.
    """
    # torch's None: all but the outermost unit, which the backward pass begins with.
    reshard = None if reshards else False
    experts = _Sharding(meshes.expert_shards, reshard)
    # Spread over the ranks of their block, experts are gathered with it: fewer waits for others.
    apart = meshes.layout.ep > 1 or meshes.layout.tp > 1
    size_of = {parameter: local(parameter).nbytes for parameter in model.parameters()}
    # Experts that no other rank has a part of stay as they are: FSDP over one rank would copy them
    # for each step, and their gradients three times.
    kept: set[nn.Parameter] = set()
    for module in model.modules():
        if apart and isinstance(module, DeepSeekBlock) and isinstance(module.ffn, MoE):
            if meshes.layout.keeps_experts:
                kept.update(module.ffn.experts.parameters())
            else:
                experts.apply(module.ffn.experts)
    dense = _Sharding(meshes.dense_shards, reshard, kept)
    # A block is a unit so that it can give its weights back, and so that the next one's come while
    # it computes. Where they stay and nothing runs beside the computation, one unit is enough: the
    # ranks wait for each other twice a step instead of twice a block.
    if reshards or meshes.layout.pp > 1 or meshes.device_type != "cpu":
        for module in [*model.layers.values(), *model.mtp]:
            dense.apply(module)
    for stage in stages:
        dense.apply(stage)
    units = [m for stage in stages for m in stage.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        # Else the divide factor is sent as PREMUL_SUM, which gloo does not have.
        unit.set_force_sum_reduction_for_comms(True)
    if meshes.device_type == "cpu":
        gathered = sum(size for parameter, size in size_of.items() if parameter not in kept)
        cpu_memory.use_in_fsdp(
            units, None if reshards else gathered * max(experts.size, dense.size)
        )


def fill(model: Transformer, seed: int) -> None:
    """Give every weight that lies here its start value, the same in any layout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            here = local_slices(parameter)
            value = initial_weight(name, parameter.shape, here, model.config, seed)
            local(parameter).copy_(value)
        for buffer in model.buffers():
            buffer.zero_()


def whole_matrices(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``function`` of matrices (..., rows, columns), for tensors that may be spread over ranks.

    Where a rank has whole matrices of a stack, it takes them as they are; else the tensor is
    gathered, and each rank keeps its part of the result. Then a collective.
    """

    def apply(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return function(tensor)
        part = local(tensor)
        if _cuts_matrices(tensor):
            part = function(tensor.full_tensor())[local_slices(tensor)].contiguous()
        elif part.numel():
            part = function(part)
        return DTensor.from_local(
            part,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    return apply


def _cuts_matrices(tensor: DTensor) -> bool:
    """True if some rank has only a part of a matrix; the same on every rank.

    Not told from what is here: of a matrix of one row, one rank has everything.
    """
    placed = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    # Not is_shard(): it is False for the strided shards of FSDP over TP.
    return any(
        size > 1 and placement != Replicate() and cast(Shard, placement).dim >= tensor.dim() - 2
        for placement, size in placed
    )


class _Sharding:
    """``fully_shard`` over one mesh, of all but the parameters that stay as they are."""

    def __init__(
        self,
        mesh: torch.distributed.device_mesh.DeviceMesh,
        reshard: bool | None,
        kept: Collection[nn.Parameter] = (),
    ) -> None:
        self.mesh = mesh
        self.size = mesh.size(mesh.ndim - 1)
        self.reshard = reshard
        self.kept = set(kept)

    def apply(self, module: nn.Module) -> None:
        names = {parameter: name for name, parameter in module.named_parameters()}
        choose: Callable[[nn.Parameter], Shard] = lambda p: self._placement(names[p], p)  # noqa: E731
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=self.reshard,
            shard_placement_fn=choose,
            ignored_params=self.kept,
        )

    def _placement(self, name: str, parameter: nn.Parameter) -> Shard:
        """The dim to divide: the first, or for parts of a matrix the first that divides evenly."""
        if not isinstance(parameter, DTensor):
            return Shard(0)
        shape = parameter.to_local().shape
        for dim, size in enumerate(shape):
            if size % self.size == 0:
                return Shard(dim)
        raise UserError(
            f"{name}: the part {list(shape)} of {list(parameter.shape)} that TP or EP leaves to a "
            f"rank cannot be divided over {self.size} data-parallel ranks along any dim; use a "
            f"model.data_parallel_replicate_size that leaves a divisor of {math.gcd(*shape)}, or "
            "another TP or EP size"
        )
