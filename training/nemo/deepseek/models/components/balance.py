"""Balance losses and token counts: kept out of the forward value, added in the backward pass.

A balance loss is a scalar made deep inside the model. Rather than carrying it to the end, its
gradient is injected where it is made: ``attach`` is the identity on the routing weights, and its
backward pass feeds the scalar a gradient of 1. That backward pass runs exactly once per token,
also when the forward pass runs twice (activation recomputation) or as a dry run (shape inference),
so the token counts are taken there too.

Source: arXiv:2412.19437 eq 17-20.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.native.build import kernel
from deepseek.ops.routing import sequence_sums

SumOverSequence = Callable[[Tensor], Tensor]
"""Adds up what the ranks that share a sequence have found in their parts of it; its backward pass
hands the gradient of the sum to each part. On one rank: the identity."""


def whole(part: Tensor) -> Tensor:
    """``SumOverSequence`` of a rank that has all of each sequence."""
    return part


def sequence_balance(
    scores_BSE: Tensor,
    top_k: int,
    real_BS: Tensor,
    sum_over_sequence: SumOverSequence = whole,
) -> Tensor:
    """Sum over sequences of T_seq * sum_i f_i P_i (eq 17-20, without alpha), scalar.

    f_i counts the tokens whose K best *unbiased* scores contain expert i, P_i is the mean
    normalised score. Padding is neither counted nor averaged.

    Args:
        scores_BSE: unbiased scores with gradient.
        top_k: K.
        real_BS: bool, False for padding.
        sum_over_sequence: where a rank has only a part of each sequence.
    """
    sums = sum_over_sequence(sequence_sums(scores_BSE, top_k, real_BS))
    return _Products.apply(sums, scores_BSE.shape[-1], top_k)


def router_z(
    logits_BSE: Tensor,
    real_BS: Tensor,
    sum_over_sequence: SumOverSequence = whole,
) -> Tensor:
    """Sum over real tokens of logsumexp(logits)^2, scalar (arXiv:2202.08906 eq 5)."""
    return sum_over_sequence((logits_BSE.logsumexp(dim=-1).square() * real_BS).sum())


def count_assignments(expert_ids_TK: Tensor, real_T: Tensor, num_experts: int) -> Tensor:
    """How many real tokens chose each expert, int64 (E,)."""
    if run := kernel("count_experts", "pppnnn", expert_ids_TK, real_T):
        counts_E = expert_ids_TK.new_empty(num_experts)
        tokens, top_k = expert_ids_TK.shape
        run(counts_E, expert_ids_TK, real_T.contiguous(), tokens, num_experts, top_k)
        return counts_E
    real_TK = real_T.to(torch.int64).unsqueeze(-1).expand_as(expert_ids_TK)
    counts_E = expert_ids_TK.new_zeros(num_experts)
    return counts_E.scatter_add_(0, expert_ids_TK.flatten(), real_TK.flatten())


def attach(
    weights_TK: Tensor, loss: Tensor, counts_E: Tensor, total_loss: Tensor, total_counts_E: Tensor
) -> Tensor:
    """``weights`` unchanged; the backward pass differentiates ``loss`` too and adds up the totals.

    Args:
        weights_TK: any tensor on the path to the training loss.
        loss: scalar, already scaled; its gradient is 1.
        counts_E: added to ``total_counts_E`` in the backward pass.
        total_loss: running sum, in place.
        total_counts_E: running sum, in place.
    """
    return _Attach.apply(weights_TK, loss, counts_E, total_loss, total_counts_E)


def loss_of_sums(sums: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """T * sum_i f_i P_i of all sequences, and its gradient by ``sums``, a number each.

    With f_i = chosen_i E / (K T) and P_i = share_i / T one T is left to divide by, and the gradient
    by a share is what it is multiplied with.
    """
    if run := kernel("balance_loss", "pppnnn", sums):
        loss, by_sums = sums.new_empty(()), torch.empty_like(sums)
        run(loss, by_sums, sums.contiguous(), len(sums), num_experts, top_k)
        return loss, by_sums
    chosen_BE, share_BE, length_B1 = sums.split([num_experts, num_experts, 1], dim=-1)
    by_share_BE = chosen_BE / length_B1.clamp(min=1) * (num_experts / top_k)
    return (by_share_BE * share_BE).sum(), F.pad(by_share_BE, (num_experts, 1))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, num_experts: int, top_k: int) -> Tensor:
        loss, by_sums = loss_of_sums(sums, num_experts, top_k)
        ctx.save_for_backward(by_sums)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (by_sums,) = ctx.saved_tensors
        return by_sums * grad, None, None


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights_TK: Tensor,
        loss: Tensor,
        counts_E: Tensor,
        total_loss: Tensor,
        total_counts_E: Tensor,
    ) -> Tensor:
        ctx.loss = loss.detach()
        ctx.counts_E = counts_E
        ctx.totals = (total_loss, total_counts_E)
        return weights_TK.view_as(weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        total_loss, total_counts_E = ctx.totals
        total_loss += ctx.loss.to(total_loss.dtype)
        total_counts_E += ctx.counts_E
        return grad_TK, torch.ones_like(ctx.loss), None, None, None
