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

Embedding and head are split by the vocabulary: each rank holds V/tp consecutive rows of both. The
embedding gives each rank its part of the sequence, and the head takes one.

Shapes: ``models/__init__.py``, with s = S/tp and v = V/tp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from deepseek.config.weights import TP_DIMS
from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.feed_forward import FeedForward, Linear
from deepseek.models.components.lora import LoraLinear
from deepseek.models.components.moe import MoE
from deepseek.models.transformer import Embedding, Head, Transformer
from deepseek.ops.autocast import lookup
from deepseek.ops.cross_entropy import IGNORE_INDEX, SoftmaxLoss, linear_cross_entropy
from deepseek.parallel.collectives import gather_sequence, scatter_sequence_sum, sum_forward
from deepseek.parallel.mesh import Meshes, local


class ShardedLinear(Linear):
    """A linear map of which this rank has some rows or columns."""

    def forward(self, x: Tensor) -> Tensor:
        """With a part of the outputs, or a partial sum of all of them."""
        return self.product(x, local(self.weight))


class ShardedLoraLinear(LoraLinear):
    """The same with an adapter, of which one of the two matrices is divided as the weight is."""

    def forward(self, x: Tensor) -> Tensor:
        """With a part of the outputs, or a partial sum of all of them."""
        weight, a, b = map(local, (self.weight, self.lora_a, self.lora_b))
        return self.adapted(x, weight, a, b)


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
                    _shard_feed_forward(
                        module.ffn.shared_experts, "ffn.shared_experts", mesh, group
                    )
            else:
                assert isinstance(module.ffn, FeedForward)
                _shard_feed_forward(module.ffn, "ffn", mesh, group)
    config = model.config
    for name in ("embed", "mtp_embed"):
        if getattr(model, name) is not None:
            embed = VocabularyEmbedding(config.vocab_size, config.hidden_size, group)
            embed.weight = shard_parameter(getattr(model, name).weight, 0, mesh)
            setattr(model, name, embed)
    for name in ("head", "mtp_head"):
        if getattr(model, name) is not None:
            head = VocabularyHead(config.hidden_size, config.vocab_size, group)
            head.weight = shard_parameter(getattr(model, name).weight, 0, mesh)
            setattr(model, name, head)


def shard_parameter(weight: Tensor, dim: int, mesh: DeviceMesh) -> nn.Parameter:
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
    _shard_matrices(attn, "attn", mesh)
    if attn.q_lora_rank is None:
        attn.wq.register_forward_pre_hook(_gather_input(group))
    else:
        attn.wq_a.register_forward_hook(_gather_output(group))
    attn.wkv_a.register_forward_hook(_gather_output(group))
    attn.wo.register_forward_hook(_scatter_output(group))


def _shard_feed_forward(
    ffn: FeedForward, name: str, mesh: DeviceMesh, group: dist.ProcessGroup
) -> None:
    """The hidden width is divided."""
    _shard_matrices(ffn, name, mesh)
    ffn.register_forward_pre_hook(_gather_input(group))
    ffn.register_forward_hook(_scatter_output(group))


def _shard_matrices(owner: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Replace the matrices of ``owner`` that the table of weights divides.

    Args:
        owner: an attention or a feed-forward.
        name: of it in its block.
        mesh: of the TP ranks.
    """
    for child, linear in list(owner.named_children()):
        dim = TP_DIMS[f"{name}.{child}.weight"]
        if dim is not None:
            assert isinstance(linear, nn.Linear)
            setattr(owner, child, _shard_linear(linear, dim, mesh))


def _share_sequences(moe: MoE, group: dist.ProcessGroup) -> None:
    """The layer sees S/tp tokens: its padding mask is cut, its sequence statistics are summed."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def cut_mask(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BsD, real_BS, *others = args
        if real_BS is not None:
            real_BS = real_BS.chunk(size, dim=1)[rank]
        return x_BsD, real_BS, *others

    moe.register_forward_pre_hook(cut_mask)
    moe.sum_over_sequence = lambda part: sum_forward(part, group)


def _shard_linear(linear: nn.Linear, dim: int, mesh: DeviceMesh) -> nn.Linear:
    """``dim`` 0: a part of the outputs; 1: a part of the inputs."""
    sizes = linear.in_features, linear.out_features
    with torch.device("meta"):
        if isinstance(linear, LoraLinear):
            made: Linear = ShardedLoraLinear(*sizes, linear.rank, linear.scale)
            assert isinstance(made, LoraLinear)
            made.lora_a, made.lora_b = linear.lora_a, linear.lora_b
            if dim == 0:
                made.lora_b = shard_parameter(linear.lora_b, 0, mesh)
            else:
                made.lora_a = shard_parameter(linear.lora_a, 1, mesh)
        else:
            made = ShardedLinear(*sizes)
    if isinstance(linear, Linear):
        made.product = linear.product
    made.weight = shard_parameter(linear.weight, dim, mesh)
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


# -- embedding and head --


class VocabularyEmbedding(Embedding):
    """Embedding of which each rank holds V/n consecutive rows; n divides V.

    Args:
        vocab_size: V, of the whole.
        dim: D.
        group: the TP group.

    Attributes:
        weight: on the meta device until the caller sets it: a DTensor (V, D), ``Shard(0)`` over the
            mesh of ``group``.
    """

    def __init__(self, vocab_size: int, dim: int, group: dist.ProcessGroup) -> None:
        super().__init__(vocab_size, dim, device="meta")
        self.group = group
        self.first_id = first_id(vocab_size, group)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """The same tokens on every rank (B, S) -> this rank's part of the sequence (B, S/n, D)."""
        partial_BSD = local_embedding(tokens_BS, local(self.weight), self.first_id)
        return scatter_sequence_sum(partial_BSD, self.group)


class VocabularyHead(Head):
    """Head of which each rank holds V/n consecutive rows; arguments as ``VocabularyEmbedding``."""

    def __init__(self, dim: int, vocab_size: int, group: dist.ProcessGroup) -> None:
        with torch.device("meta"):
            super().__init__(dim, vocab_size)
        self.group = group
        self.first_id = first_id(vocab_size, group)

    def loss_sum(self, hidden_BsD: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy summed over the labels of the whole sequence, the same on every rank.

        Args:
            hidden_BsD: this rank's part of the sequence.
            labels_BS: of the whole sequence, the same on every rank.
        """
        hidden_TD = gather_sequence(hidden_BsD, self.group).flatten(0, 1)
        softmax_loss = sharded_softmax_loss(self.first_id, self.group)
        return linear_cross_entropy(
            hidden_TD,
            local(self.weight),
            self.sequence_part(labels_BS).flatten(),
            softmax_loss=softmax_loss,
        )

    def forward(self, hidden_BsD: Tensor) -> Tensor:
        """Logits exist in parts only.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "the head is split over the tensor-parallel ranks and gives the loss only; "
            "for logits, load the checkpoint with tensor_model_parallel_size 1"
        )


def local_embedding(tokens_BS: Tensor, weight_vD: Tensor, first_id: int) -> Tensor:
    """Embeddings of the tokens in ``[first_id, first_id + v)``, zeros for others: (B, S, D).

    Summed over the ranks, each token's embedding to the last bit.
    """
    index_BS, mine_BS = _local_index(tokens_BS, weight_vD.shape[0], first_id)
    return lookup(index_BS, weight_vD).masked_fill(~mine_BS.unsqueeze(-1), 0.0)


def sharded_softmax_loss(first_id: int, group: dist.ProcessGroup) -> SoftmaxLoss:
    """``SoftmaxLoss`` of a head whose rows are spread over the ranks of ``group``.

    Two small all-reduces per chunk of tokens: the largest logit, then the sum of exponentials
    together with the label's logit. The losses are the same on every rank. Hidden states and labels
    must be, too.

    Args:
        first_id: of the rows that this rank holds.
        group: the TP group.
    """

    def softmax_loss(logits_tv: Tensor, labels_t: Tensor, needs_gradient: bool) -> Tensor:
        index_t, mine_t = _local_index(labels_t, logits_tv.shape[1], first_id)
        index_t1, mine_t1 = index_t.unsqueeze(-1), mine_t.unsqueeze(-1)
        # 1. logits less the largest of the whole vocabulary
        largest_t = logits_tv.amax(dim=-1)
        dist.all_reduce(largest_t, op=dist.ReduceOp.MAX, group=group)
        logits_tv = logits_tv.sub_(largest_t.unsqueeze(-1))
        # 2. the sum of exponentials, and the label's logit from the rank that has it
        picked_t = logits_tv.gather(-1, index_t1).squeeze(-1).where(mine_t, 0.0)
        exp_tv = logits_tv.exp_()
        sums_2t = torch.stack([exp_tv.sum(dim=-1), picked_t])
        dist.all_reduce(sums_2t, group=group)
        z_t, picked_t = sums_2t
        if needs_gradient:  # 3. d loss / d logits = softmax - onehot(label)
            grad_tv = exp_tv.mul_((z_t.reciprocal() * (labels_t != IGNORE_INDEX)).unsqueeze(-1))
            grad_tv.scatter_add_(-1, index_t1, -mine_t1.to(grad_tv.dtype))
        return z_t.log() - picked_t

    return softmax_loss


def first_id(vocab_size: int, group: dist.ProcessGroup) -> int:
    """The first token id whose row this rank holds."""
    return dist.get_rank(group) * (vocab_size // dist.get_world_size(group))


def _local_index(ids: Tensor, num_local: int, first_id: int) -> tuple[Tensor, Tensor]:
    """Local row of each id (0 if another rank has it, or none), and whether it is here."""
    index = ids - first_id
    mine = (index >= 0) & (index < num_local)
    return index.where(mine, 0), mine
