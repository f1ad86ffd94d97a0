"""Cross-entropy of a linear head without ever holding all logits.

The logits of a V = 129,280 vocabulary are the largest tensor of a step. Here the head is applied to
a chunk of tokens at a time; the chunk's loss and its gradients are computed at once and the logits
are dropped. The backward pass then only scales the stored gradients.

The head may be a part of a larger one, with the other rows on other ranks: then only the softmax
needs to know (``softmax_loss``; ``parallel/tensor.py`` has the one for tensor-parallel ranks).

Shapes: ``models/__init__.py``, with t the tokens of a chunk and V the rows that are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.cost import CHUNK_TOKENS

IGNORE_INDEX = -100
"""Label of a position that has none."""

SoftmaxLoss = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
"""From logits (t, V), labels (t,) and whether a gradient is wanted to ``-log softmax[label]`` (t,)
and, if wanted, its gradient by the logits (t, V); both are anything where there is no label. The
logits may be overwritten."""


def softmax_loss(
    logits_tV: Tensor, labels_t: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """``SoftmaxLoss`` of a head that is here in whole."""
    index_t1 = labels_t.where(labels_t != IGNORE_INDEX, 0).unsqueeze(-1)
    # Less the largest, so that no exponential overflows.
    logits_tV = logits_tV.sub_(logits_tV.amax(dim=-1, keepdim=True))
    label_t = logits_tV.gather(-1, index_t1).squeeze(-1)
    exp_tV = logits_tV.exp_()
    sum_t1 = exp_tV.sum(dim=-1, keepdim=True)
    loss_t = sum_t1.squeeze(-1).log() - label_t
    if not needs_gradient:
        return loss_t, None
    # d loss / d logits = softmax - onehot(label)
    grad_tV = exp_tV.mul_(sum_t1.reciprocal())
    return loss_t, grad_tV.scatter_add_(-1, index_t1, torch.full_like(sum_t1, -1.0))


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
    softmax_loss: SoftmaxLoss = softmax_loss,
) -> Tensor:
    """Sum over labelled tokens of ``-log softmax(hidden @ weight.T)[label]``.

    Args:
        hidden_TD: any float dtype; under autocast the products run in autocast's dtype.
        weight_VD: the head, or the rows of it that are here.
        labels_T: int64; ``IGNORE_INDEX`` where there is no label.
        chunk_tokens: how many tokens' logits exist at one time.
        softmax_loss: of a chunk; knows about rows of the head that are elsewhere.

    Returns:
        Scalar, fp32 (fp64 for fp64 input): a sum, to be divided by the global label count. Its
        gradient by ``hidden`` is what the rows that are here contribute.
    """
    if not torch.is_grad_enabled():  # an autograd function's needs_input_grad ignores no_grad
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, chunk_tokens, softmax_loss)


def linear_cross_entropy_slow(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Reference implementation of ``linear_cross_entropy``: holds all logits."""
    logits_TV = F.linear(hidden_TD, weight_VD)
    logits_TV = logits_TV.to(_sum_dtype(logits_TV.dtype))
    return F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        chunk_tokens: int,
        softmax_loss: SoftmaxLoss,
    ) -> Tensor:
        device = hidden_TD.device.type
        product_dtype = hidden_TD.dtype
        if torch.is_autocast_enabled(device):
            product_dtype = torch.get_autocast_dtype(device)
        sum_dtype = _sum_dtype(product_dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]

        loss = torch.zeros((), dtype=sum_dtype, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_weight else None
        with torch.autocast(device, enabled=False):
            w_VD = weight_VD.to(product_dtype)
            for start in range(0, hidden_TD.shape[0], chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                h_tD = hidden_TD[chunk].to(product_dtype)
                logits_tV = F.linear(h_tD, w_VD).to(sum_dtype)
                has_label_t = labels_T[chunk] != IGNORE_INDEX
                loss_t, grad_tV = softmax_loss(
                    logits_tV, labels_T[chunk], needs_hidden or needs_weight
                )
                loss += (loss_t * has_label_t).sum()
                if grad_tV is None:
                    continue
                grad_tV = grad_tV.mul_(has_label_t.unsqueeze(-1)).to(product_dtype)
                if grad_hidden_TD is not None:
                    grad_hidden_TD[chunk] = grad_tV @ w_VD
                if grad_weight_VD is not None:
                    if product_dtype == sum_dtype:
                        grad_weight_VD.addmm_(grad_tV.t(), h_tD)
                    else:
                        grad_weight_VD += grad_tV.t() @ h_tD
        # Saved, not attributes: those live as long as the loss does, which the schedule of a
        # pipeline keeps of every micro-batch to the end of the step.
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        if grad_hidden_TD is not None:
            grad_hidden_TD = grad_hidden_TD * grad.to(grad_hidden_TD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None
