"""Tensor parallelism (TP), applied to a finished model: each rank keeps a part of every matrix.

Between the matrices the TP ranks share each sequence (sequence parallelism): norms, routers and
residual sums work on S/tp tokens. Where a matrix is split by its outputs (queries, keys and values
by head, SwiGLU's hidden width) the tokens are gathered first; where it is split by its inputs, the
partial sums are added and scattered again. The down-projections of MLA are whole on every rank and
see S/tp tokens: what is gathered is their small result, the latents.

Experts are not split: a MoE layer routes the S/tp tokens of its rank, and expert parallelism uses
the TP ranks as well.

Weights that are whole on every TP rank get partial gradients, each rank's from its own tokens or
heads; ``gradients.py`` adds them up, once per step.

B batch, S sequence, s = S/tp, D model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.feed_forward import FeedForward
from deepseek.models.components.lora import LoraLinear, lora_linear
from deepseek.models.components.moe import MoE
from deepseek.models.transformer import Transformer
from deepseek.parallel.collectives import gather_sequence, scatter_sequence_sum, sum_forward
from deepseek.parallel.gradients import local
from deepseek.parallel.mesh import Meshes
from deepseek.parallel.vocabulary import VocabularyEmbedding, VocabularyHead


class ShardedLinear(nn.Linear):
    """A linear map of which this rank has some rows or columns."""

    def forward(self, x: Tensor) -> Tensor:
        """With a part of the outputs, or a partial sum of all of them."""
        return F.linear(x, local(self.weight))


class ShardedLoraLinear(LoraLinear):
    """The same with an adapter, of which one of the two matrices is divided as the weight is."""

    def forward(self, x: Tensor) -> Tensor:
        """With a part of the outputs, or a partial sum of all of them."""
        weight, a, b = map(local, (self.weight, self.lora_a, self.lora_b))
        return lora_linear(x, weight, a, b, self.scale)


def shard_tensors(model: Transformer, meshes: Meshes) -> None:
    """Split the matrices of ``model`` (on the meta device) over the TP ranks, in place."""
    mesh, group = meshes.dense["tp"], meshes.tp
    if meshes.layout.tp == 1:
        return
    for module in model.modules():
        if isinstance(module, DeepSeekBlock):
            _shard_attention(module.attn, mesh, group)
            if isinstance(module.ffn, MoE):
                _share_sequences(module.ffn, group)
                if module.ffn.shared_experts is not None:
                    _shard_feed_forward(module.ffn.shared_experts, mesh, group)
            else:
                assert isinstance(module.ffn, FeedForward)
                _shard_feed_forward(module.ffn, mesh, group)
    config = model.config
    for name in ("embed", "mtp_embed"):
        if getattr(model, name) is not None:
            embed = VocabularyEmbedding(config.vocab_size, config.hidden_size, group)
            embed.weight = split(getattr(model, name).weight, 0, mesh)
            setattr(model, name, embed)
    if model.head is not None:
        head = VocabularyHead(config.hidden_size, config.vocab_size, group)
        head.weight = split(model.head.weight, 0, mesh)
        model.head = head


def split(weight: Tensor, dim: int, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's equal part of a meta weight along ``dim``, as a DTensor over ``mesh``."""
    shape = list(weight.shape)
    shape[dim] //= mesh.size()
    part = torch.empty(shape, dtype=weight.dtype, device="meta")
    whole = DTensor.from_local(
        part, mesh, [Shard(dim)], run_check=False, shape=weight.shape, stride=weight.stride()
    )
    return nn.Parameter(whole, requires_grad=weight.requires_grad)


def _shard_attention(
    attn: MultiHeadLatentAttention, mesh: DeviceMesh, group: dist.ProcessGroup
) -> None:
    """Heads are divided; latents and rotary keys are gathered, as they are small."""
    if attn.q_lora_rank is None:
        attn.wq = _sharded(attn.wq, 0, mesh)
        attn.wq.register_forward_pre_hook(_gather_input(group))
    else:
        attn.wq_a.register_forward_hook(_gather_output(group))
        attn.wq_b = _sharded(attn.wq_b, 0, mesh)
    attn.wkv_a.register_forward_hook(_gather_output(group))
    attn.wkv_b = _sharded(attn.wkv_b, 0, mesh)
    attn.wo = _sharded(attn.wo, 1, mesh)
    attn.wo.register_forward_hook(_scatter_output(group))


def _shard_feed_forward(ffn: FeedForward, mesh: DeviceMesh, group: dist.ProcessGroup) -> None:
    """The hidden width is divided."""
    ffn.w1, ffn.w3 = _sharded(ffn.w1, 0, mesh), _sharded(ffn.w3, 0, mesh)
    ffn.w2 = _sharded(ffn.w2, 1, mesh)
    ffn.register_forward_pre_hook(_gather_input(group))
    ffn.register_forward_hook(_scatter_output(group))


def _share_sequences(moe: MoE, group: dist.ProcessGroup) -> None:
    """The layer sees S/tp tokens: its padding mask is cut, its sequence statistics are summed."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def cut_mask(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BsD, context = args
        if context.real_BS is not None:
            context = replace(context, real_BS=context.real_BS.chunk(size, dim=1)[rank])
        return x_BsD, context

    moe.register_forward_pre_hook(cut_mask)
    moe.sum_over_sequence = lambda part: sum_forward(part, group)


def _sharded(linear: nn.Linear, dim: int, mesh: DeviceMesh) -> nn.Linear:
    """``dim`` 0: a part of the outputs; 1: a part of the inputs."""
    sizes = linear.in_features, linear.out_features
    with torch.device("meta"):
        if isinstance(linear, LoraLinear):
            made: nn.Linear = ShardedLoraLinear(*sizes, linear.rank, linear.scale)
            assert isinstance(made, LoraLinear)
            made.lora_a, made.lora_b = linear.lora_a, linear.lora_b
            if dim == 0:
                made.lora_b = split(linear.lora_b, 0, mesh)
            else:
                made.lora_a = split(linear.lora_a, 1, mesh)
        else:
            made = ShardedLinear(*sizes, bias=False)
    made.weight = split(linear.weight, dim, mesh)
    return made


def _gather_input(group: dist.ProcessGroup) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather_sequence(args[0], group), *args[1:])

    return hook


def _gather_output(group: dist.ProcessGroup) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], out_BsD: Tensor) -> Tensor:
        return gather_sequence(out_BsD, group)

    return hook


def _scatter_output(group: dist.ProcessGroup) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], out_BSD: Tensor) -> Tensor:
        return scatter_sequence_sum(out_BSD, group)

    return hook
