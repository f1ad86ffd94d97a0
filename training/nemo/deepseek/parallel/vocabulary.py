"""Vocabulary parallelism: each rank of a TP group holds some rows of the embedding and the head.

Outside of these two modules the sequence is split over the same group: the embedding gives a part
of it, and the head takes one.

B batch, S sequence, s = S/n part of one of n ranks, T = B*S tokens, C tokens of a chunk, D model,
V vocabulary, v = V/n part of one rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek.models.components.head import Head
from deepseek.ops.cross_entropy import CHUNK_TOKENS, IGNORE_INDEX
from deepseek.parallel.collectives import gather_sequence, scatter_sequence_sum


class VocabularyEmbedding(nn.Embedding):
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
        partial_BSD = local_embedding(tokens_BS, local_part(self.weight), self.first_id)
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
        weight_vD = local_part(self.weight)
        return vocabulary_cross_entropy(
            hidden_TD, weight_vD, labels_BS.flatten(), self.first_id, self.group
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
    return F.embedding(index_BS, weight_vD).masked_fill(~mine_BS.unsqueeze(-1), 0.0)


def vocabulary_cross_entropy(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    labels_T: Tensor,
    first_id: int,
    group: dist.ProcessGroup,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """``ops.linear_cross_entropy`` with the head's rows spread over the ranks of ``group``.

    Two small all-reduces per chunk of tokens: the largest logit, then the sum of exponentials
    together with the label's logit.

    Args:
        hidden_TD: the same on every rank; any float dtype; under autocast the products run in
            autocast's dtype.
        weight_vD: rows ``first_id ...`` of the head.
        labels_T: int64, the same on every rank; ``IGNORE_INDEX`` where there is no label.
        chunk_tokens: how many tokens' logits exist at one time; the same on every rank.

    Returns:
        Scalar, fp32 (fp64 for fp64 input), the same on every rank. Its gradient by the head is that
        of the local rows; its gradient by ``hidden`` is a part, to be summed over the ranks.
    """
    if not torch.is_grad_enabled():  # an autograd function's needs_input_grad ignores no_grad
        hidden_TD, weight_vD = hidden_TD.detach(), weight_vD.detach()
    return _VocabularyCrossEntropy.apply(
        hidden_TD, weight_vD, labels_T, first_id, group, chunk_tokens
    )


def first_id(vocab_size: int, group: dist.ProcessGroup) -> int:
    """The first token id whose row this rank holds."""
    return dist.get_rank(group) * (vocab_size // dist.get_world_size(group))


def local_part(weight: Tensor) -> Tensor:
    """This rank's rows of a DTensor sharded over the TP mesh, with gradient."""
    return cast(DTensor, weight).to_local()


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        labels_T: Tensor,
        first_id: int,
        group: dist.ProcessGroup,
        chunk_tokens: int,
    ) -> Tensor:
        device = hidden_TD.device.type
        product_dtype = hidden_TD.dtype
        if torch.is_autocast_enabled(device):
            product_dtype = torch.get_autocast_dtype(device)
        sum_dtype = torch.promote_types(product_dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]

        loss = torch.zeros((), dtype=sum_dtype, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_vD = torch.zeros_like(weight_vD, dtype=sum_dtype) if needs_weight else None
        with torch.autocast(device, enabled=False):
            w_vD = weight_vD.to(product_dtype)
            for start in range(0, hidden_TD.shape[0], chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                h_CD = hidden_TD[chunk].to(product_dtype)
                has_label_C = labels_T[chunk] != IGNORE_INDEX
                index_C, mine_C = _local_index(labels_T[chunk], weight_vD.shape[0], first_id)
                index_C1 = index_C.unsqueeze(-1)
                # 1. logits less the largest of the whole vocabulary
                logits_Cv = F.linear(h_CD, w_vD).to(sum_dtype)
                largest_C = logits_Cv.amax(dim=-1)
                dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=group)
                logits_Cv = logits_Cv.sub_(largest_C.unsqueeze(-1))
                # 2. the sum of exponentials, and the label's logit from the rank that has it
                picked_C = logits_Cv.gather(-1, index_C1).squeeze(-1).where(mine_C, 0.0)
                exp_Cv = logits_Cv.exp_()
                sums_2C = torch.stack([exp_Cv.sum(dim=-1), picked_C])
                dist.all_reduce(sums_2C, group=group)
                z_C, picked_C = sums_2C
                loss += ((z_C.log() - picked_C) * has_label_C).sum()
                if not (needs_hidden or needs_weight):
                    continue
                # 3. d loss / d logits = softmax - onehot(label), 0 where there is no label
                grad_Cv = exp_Cv.div_(z_C.unsqueeze(-1))
                grad_Cv.scatter_add_(-1, index_C1, -mine_C.unsqueeze(-1).to(sum_dtype))
                grad_Cv = grad_Cv.mul_(has_label_C.unsqueeze(-1)).to(product_dtype)
                if grad_hidden_TD is not None:
                    grad_hidden_TD[chunk] = grad_Cv @ w_vD
                if grad_weight_vD is not None:
                    if product_dtype == sum_dtype:
                        grad_weight_vD.addmm_(grad_Cv.t(), h_CD)
                    else:
                        grad_weight_vD += grad_Cv.t() @ h_CD
        ctx.grad_hidden_TD = grad_hidden_TD
        ctx.grad_weight_vD = grad_weight_vD
        ctx.weight_dtype = weight_vD.dtype
        return loss

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden_TD, grad_weight_vD = ctx.grad_hidden_TD, ctx.grad_weight_vD
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD * grad.to(grad_hidden_TD.dtype)
        if grad_weight_vD is not None:
            grad_weight_vD = (grad_weight_vD * grad).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_vD, None, None, None, None


def _local_index(ids: Tensor, num_local: int, first_id: int) -> tuple[Tensor, Tensor]:
    """Local row of each id (0 if another rank has it, or none), and whether it is here."""
    index = ids - first_id
    mine = (index >= 0) & (index < num_local)
    return index.where(mine, 0), mine
