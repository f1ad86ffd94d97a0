"""From a configuration to this rank's part of the model: what is parallel is made so here.

The model is single-device code. ``parallelize`` changes it from outside, in one order, while it is
on the meta device and has no numbers yet; only what stays on this rank is ever filled.

Gradients are summed, never averaged: the loss is already divided by the labels of the whole step,
and an average over the dense mesh and one over the expert mesh would weigh the two differently.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from deepseek.config.errors import UserError
from deepseek.config.layout import StageSlice, compiles, split_layers, stages_of_rank
from deepseek.config.memory import reduces_gradients, reshards
from deepseek.config.schema import ModelConfig
from deepseek.config.weights import OUTPUT
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.feed_forward import RMSNorm
from deepseek.models.components.moe import MoE
from deepseek.models.components.router import Router
from deepseek.models.transformer import Stage, Transformer
from deepseek.parallel import cpu_memory
from deepseek.parallel.context import shard_sequences
from deepseek.parallel.expert_dispatcher import build_dispatcher
from deepseek.parallel.mesh import Meshes, SingleProcess, local, local_slices, placed
from deepseek.parallel.pipeline import MicroBatches, Pipeline, Sequential
from deepseek.parallel.tensor import shard_parameter, shard_tensors

log = logging.getLogger("deepseek.parallel")


class Parallelized(NamedTuple):
    """What a rank works with."""

    model: Transformer
    """The parts that are here, their parameters DTensors under the names of the whole model; in one
    process the whole model, its parameters plain."""
    micro_batches: MicroBatches
    """How to run them."""


def parallelize(
    config: ModelConfig,
    meshes: Meshes | SingleProcess,
    device: torch.device,
    seed: int,
    dtype: torch.dtype = torch.float32,
    products: torch.dtype | None = None,
) -> Parallelized:
    """This rank's part of the model, with its start values, and how to run it.

    Nothing larger than one matrix is ever whole on a rank. Each step says what it has applied, at
    the level INFO of the logger ``deepseek.parallel``.

    Args:
        config: the model.
        meshes: where this rank stands; in one process, the sizes in ``config`` do not count.
        device: where the weights go.
        seed: of the start values, which do not depend on the layout.
        dtype: of the parameters.
        products: that autocast will compute them in. Weights are gathered, and hidden states sent
            between stages, in it; None: in ``dtype``.

    Raises:
        UserError: a weight that TP or EP has divided cannot be divided further, or the installed
            torch cannot run the pipeline schedule.
    """
    if isinstance(meshes, SingleProcess):
        return _in_one_process(config, device, seed, dtype)
    layout = meshes.layout
    # 1. the layers of this rank
    parts = split_layers(config)
    here = stages_of_rank(config, meshes.coordinate.pp)
    with torch.device("meta"):
        model = Transformer(config, [parts[index] for index in here]).to(dtype)
    # 2. TP: each rank keeps a part of every matrix but the experts'
    if layout.tp > 1:
        shard_tensors(model, meshes)
        log.info(f"TP {layout.tp}: matrices, vocabulary and sequences are divided")
    # 3. CP: each rank keeps a part of every sequence
    if layout.cp > 1:
        shard_sequences(model, meshes)
        log.info(f"CP {layout.cp}: sequences are divided, the latents of attention gathered")
    # 4. EP: each rank keeps some of the experts, and tokens travel to them
    if layout.ep > 1:
        shard_experts(model, meshes)
        total = config.n_routed_experts
        log.info(f"EP {layout.ep}: {total // layout.ep} of {total} experts of a layer here")
    # 5. PP: layers are run in stages
    stages = {index: Stage(model, parts[index]) for index in here}
    if layout.pp > 1:
        log.info(f"PP {layout.pp}: stages {here} of {len(parts)}, {config.pipeline_schedule}")
    # 6. FSDP: ranks that would hold the same weights divide them
    reshard = reshards(config, layout)
    units = shard_data_parallel(model, list(stages.values()), meshes, reshard, products)
    gathered = "" if products is None else f" {str(products).removeprefix('torch.')}"
    log.info(
        f"FSDP {layout.dp_shard} (experts {layout.edp}) x {layout.dp_replicate} replicas: {units} "
        f"units,{gathered} weights {'given back' if reshard else 'kept'} after the forward pass"
    )
    # 7. numbers, for what is left here
    give_memory(model, device)
    fill(model, seed)
    log.info(f"{sum(local(p).numel() for p in model.parameters()):,} weights here, on {device}")
    if layout.pp > 1:
        return Parallelized(model, Pipeline(stages, config, meshes, products or dtype))
    reduces = reduces_gradients(config, layout)
    return Parallelized(model, Sequential(stages[0], config.micro_batch_size, reshard, reduces))


def _in_one_process(
    config: ModelConfig, device: torch.device, seed: int, dtype: torch.dtype
) -> Parallelized:
    """The whole model, whatever sizes the configuration asks for."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    give_memory(model, device)
    model.init_weights(seed)
    everything = StageSlice(range(config.num_hidden_layers), first=True, output=OUTPUT)
    return Parallelized(model, Sequential(Stage(model, everything), config.micro_batch_size))


def give_memory(model: Transformer, device: torch.device) -> None:
    """As ``to_empty``, part by part: of whole DTensors torch searches how each such call is
    divided over ranks."""
    model._apply(lambda tensor: placed(torch.empty_like(local(tensor), device=device), tensor))


def shard_experts(model: Transformer, meshes: Meshes) -> None:
    """Divide the experts of ``model`` (on the meta device) over the EP ranks, in place.

    Raises:
        UserError: the configured dispatcher cannot be had here.
    """
    mesh = meshes.sparse["ep"]
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        experts, num_experts = module.experts, len(module.experts.w1)
        for name, stack in list(experts.named_parameters()):
            setattr(experts, name, shard_parameter(stack, 0, mesh))
        experts.local = local
        module.dispatcher = build_dispatcher(num_experts, meshes, model.config)


def shard_data_parallel(
    model: Transformer,
    stages: Sequence[Stage],
    meshes: Meshes,
    reshard: bool,
    products: torch.dtype | None = None,
) -> int:
    """FSDP2 over blocks, MTP modules and stages, in place; the stages become ``FSDPModule``s.

    A unit of FSDP is what is gathered together. A block is one, so that it can give its weights
    back, and so that the next one's are gathered while it computes. Its experts are a unit of their
    own where they are divided over other ranks than the rest of the block. So are norms and router
    where the others are gathered in the dtype of products: what they compute in fp32, they know in
    fp32. Gradients are added up in the dtype of the parameters.

    Args:
        model: what this rank holds.
        stages: the same, as it is run.
        meshes: where this rank stands.
        reshard: each unit gives gathered weights back after its forward pass.
        products: see ``parallelize``.

    Returns:
        The number of units.

    Raises:
        UserError: a weight that TP or EP has divided cannot be divided further.
    """
    # torch's None: all but the outermost unit, which the backward pass begins with.
    after_forward = None if reshard else False
    size_of = {parameter: local(parameter).nbytes for parameter in model.parameters()}
    # Without EP and TP the experts are divided over the same ranks as their block, and are gathered
    # with it: one wait for the other ranks instead of two.
    expert_units = _Units(meshes.expert_shards, after_forward, products)
    whole_here: set[nn.Parameter] = set()
    if meshes.layout.ep > 1 or meshes.layout.tp > 1:
        for module in model.modules():
            if isinstance(module, DeepSeekBlock) and isinstance(module.ffn, MoE):
                if meshes.layout.keeps_experts:
                    whole_here.update(module.ffn.experts.parameters())
                else:
                    expert_units.add(module.ffn.experts)
    # Experts that no other rank has a part of are left to the optimiser as they are: FSDP over one
    # rank would copy them for each step, and their gradients three times.
    dense_units = _Units(meshes.dense_shards, after_forward, products, whole_here)
    exact_units = _Units(meshes.dense_shards, after_forward)
    compiled = compiles(model.config, meshes.device_type == "cuda")
    # Where weights are kept and nothing runs beside the computation, one unit for all blocks is
    # enough: the ranks wait for each other twice a step instead of twice a block.
    if reshard or meshes.layout.pp > 1 or meshes.device_type != "cpu":
        for module in [*model.layers.values(), *model.mtp]:
            if products is not None:
                exact_units.add(*_in_fp32(module), around=module if compiled else None)
            dense_units.add(module)
    for stage in stages:
        if products is not None and (left := _in_fp32(stage)):
            exact_units.add(*left, around=stage if compiled else None)
        dense_units.add(stage)
    units = [m for stage in stages for m in stage.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        # Else the divide factor is sent as PREMUL_SUM, which gloo does not have.
        unit.set_force_sum_reduction_for_comms(True)
    if meshes.device_type == "cpu":
        gathered = sum(size for parameter, size in size_of.items() if parameter not in whole_here)
        gathered *= max(expert_units.ranks, dense_units.ranks)
        cpu_memory.use_in_fsdp(units, None if reshard else gathered)
    return len(units)


def _in_fp32(module: nn.Module) -> list[nn.Module]:
    """What computes in fp32 whatever products do, and is in no unit yet."""
    kinds = (RMSNorm, Router)
    return [m for m in module.modules() if isinstance(m, kinds) and not isinstance(m, FSDPModule)]


class _Units:
    """Units of FSDP over one mesh.

    Args:
        mesh: over whose last axis weights are divided; over another one they are replicated.
        reshard: ``reshard_after_forward`` of ``fully_shard``.
        products: what weights are gathered in; None: their own dtype.
        ignored: parameters that FSDP leaves alone.

    Attributes:
        ranks: among which a weight is divided.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        reshard: bool | None,
        products: torch.dtype | None = None,
        ignored: Collection[nn.Parameter] = (),
    ) -> None:
        self.mesh = mesh
        self.ranks = mesh.size(mesh.ndim - 1)
        self.reshard = reshard
        self.ignored = set(ignored)
        # Not the inputs, and without a dtype of the sums they would be in that of the products.
        wide = None if products is None else torch.float32
        self.precision = MixedPrecisionPolicy(products, wide, cast_forward_inputs=False)

    def add(self, *modules: nn.Module, around: nn.Module | None = None) -> None:
        """Make one unit of ``modules``, of what is in no unit yet.

        It is gathered when the first of them begins, or ``around``, which they are in: a hook
        inside of a block that is compiled would cut its graph at each of them.
        """
        names = {p: name for module in modules for name, p in module.named_parameters()}
        fully_shard(
            list(modules) if len(modules) > 1 else modules[0],
            mesh=self.mesh,
            reshard_after_forward=self.reshard,
            mp_policy=self.precision,
            shard_placement_fn=lambda parameter: self._placement(names[parameter], parameter),
            ignored_params=self.ignored,
        )
        if around is not None:
            state = cast(FSDPModule, modules[0])._get_fsdp_state()
            for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
                handle.remove()
            around.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
            around.register_forward_hook(state._post_forward)

    def _placement(self, name: str, parameter: nn.Parameter) -> Shard:
        """The dim to divide: the first, or for parts of a matrix the first that divides evenly."""
        if not isinstance(parameter, DTensor):
            return Shard(0)
        shape = parameter.to_local().shape
        whole_rows = not parameter.is_floating_point()  # packed, with their scales
        for dim, size in enumerate(shape[:-1] if whole_rows else shape):
            if size % self.ranks == 0:
                return Shard(dim)
        raise UserError(
            f"{name}: the part {list(shape)} of {list(parameter.shape)} that TP or EP leaves to a "
            f"rank cannot be divided over {self.ranks} data-parallel ranks along any dim; use a "
            f"model.data_parallel_replicate_size that leaves a divisor of {math.gcd(*shape)}, or "
            "another TP or EP size"
        )


def fill(model: Transformer, seed: int) -> None:
    """Give every weight that lies here its start value, the same in any layout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            here = local_slices(parameter)
            value = model.start_value(name, parameter.shape, here, seed)
            local(parameter).copy_(value)
        for buffer in model.buffers():
            buffer.zero_()
