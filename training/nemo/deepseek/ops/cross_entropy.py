"""Cross-entropy of a linear head without ever holding all logits.

The logits of a V = 129,280 vocabulary are the largest tensor of a step. Here the head is applied to
a chunk of tokens at a time; the chunk's loss and its gradients are computed at once and the logits
are dropped. The backward pass then only scales the stored gradients.

The head may be a part of a larger one, with the other rows on other ranks: then only the softmax
needs to know (``softmax_loss``; ``parallel/tensor.py`` has the one for tensor-parallel ranks).

Shapes: ``models/__init__.py``, with t the tokens of a chunk and V the rows that are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.cost import CHUNK_TOKENS
from deepseek.ops.added_gradients import goes_back_once
from deepseek.ops.native.build import kernel
from deepseek.ops.rows import row_blocks

IGNORE_INDEX = -100
"""Label of a position that has none."""

SoftmaxLoss = Callable[[Tensor, Tensor, bool], Tensor]
"""From logits (t, V), labels (t,) and whether a gradient is wanted to ``-log softmax[label]`` (t,),
anything where there is no label. The logits are overwritten; if wanted by the loss's gradient, 0
where there is no label."""


def softmax_loss(logits_tV: Tensor, labels_t: Tensor, needs_gradient: bool) -> Tensor:
    """``SoftmaxLoss`` of a head that is here in whole; on a CPU one kernel."""
    run = _kernel(logits_tV, labels_t)
    if run is None:
        return softmax_loss_slow(logits_tV, labels_t, needs_gradient)
    loss_t, sizes = logits_tV.new_empty(len(logits_tV)), logits_tV.shape
    run(loss_t, logits_tV, labels_t, *sizes, int(needs_gradient), torch.get_num_threads())
    return loss_t


def softmax_loss_slow(logits_tV: Tensor, labels_t: Tensor, needs_gradient: bool) -> Tensor:
    """Reference implementation of ``softmax_loss``."""
    labelled_t1 = (labels_t != IGNORE_INDEX).unsqueeze(-1)
    index_t1 = labels_t.unsqueeze(-1).where(labelled_t1, 0)
    # Less the largest, so that no exponential overflows.
    logits_tV = logits_tV.sub_(logits_tV.amax(dim=-1, keepdim=True))
    label_t = logits_tV.gather(-1, index_t1).squeeze(-1)
    exp_tV = logits_tV.exp_()
    sum_t1 = exp_tV.sum(dim=-1, keepdim=True)
    loss_t = sum_t1.squeeze(-1).log() - label_t
    if needs_gradient:  # d loss / d logits = softmax - onehot(label)
        grad_tV = exp_tV.mul_(sum_t1.reciprocal() * labelled_t1)
        grad_tV.scatter_add_(-1, index_t1, -labelled_t1.to(grad_tV.dtype))
    return loss_t


def _kernel(logits_tV: Tensor, labels_t: Tensor) -> Callable[..., None] | None:
    is_one_piece = logits_tV.is_contiguous() and labels_t.is_contiguous()
    return kernel("softmax_loss", "pppnnnn", logits_tV, labels_t) if is_one_piece else None


def _blocks(logits_tV: Tensor, labels_t: Tensor, softmax_loss: SoftmaxLoss) -> Iterator[slice]:
    """Rows that ``softmax_loss`` is given at one time; all, where it waits for other ranks, or goes
    row by row itself."""
    if softmax_loss is not _WHOLE_HEAD or _kernel(logits_tV, labels_t):
        return iter((slice(None),))
    return row_blocks(logits_tV)


_WHOLE_HEAD = softmax_loss


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


def _logits(h_tD: Tensor, w_VD: Tensor) -> Tensor:
    """``h w^T``; in fp32 on a CPU by a kernel: of so many columns MKL's product takes 1.04 to 1.13
    times as long (512 tokens, 32,000 ids, AVX-512), 0.97 to 1.02 with AVX2."""
    fits = h_tD.shape[1] == w_VD.shape[1] and h_tD.is_contiguous() and w_VD.is_contiguous()
    run = kernel("dense_linear", "pppnnnn", h_tD, w_VD) if fits else None
    if run is None:
        return F.linear(h_tD, w_VD)
    logits_tV = h_tD.new_empty(len(h_tD), len(w_VD))
    run(logits_tV, h_tD, w_VD, *logits_tV.shape, w_VD.shape[1], torch.get_num_threads())
    return logits_tV


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
        grad_weight_VD: Tensor | None = None
        with torch.autocast(device, enabled=False):
            w_VD = weight_VD.to(product_dtype)
            for start in range(0, hidden_TD.shape[0], chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                h_tD = hidden_TD[chunk].to(product_dtype)
                logits_tV, labels_t = _logits(h_tD, w_VD), labels_T[chunk]
                losses: list[Tensor] = []
                for rows in _blocks(logits_tV, labels_t, softmax_loss):
                    logits_rV = logits_tV[rows]
                    grad_rV = logits_rV.to(sum_dtype)  # becomes it; mostly where it lies
                    losses.append(
                        softmax_loss(grad_rV, labels_t[rows], needs_hidden or needs_weight)
                    )
                    if grad_rV is not logits_rV:
                        logits_rV.copy_(grad_rV)
                loss += (torch.cat(losses) * (labels_t != IGNORE_INDEX)).sum()
                if grad_hidden_TD is not None:
                    grad_hidden_TD[chunk] = logits_tV @ w_VD
                if needs_weight:
                    if grad_weight_VD is None:
                        grad_weight_VD = (logits_tV.t() @ h_tD).to(sum_dtype)
                    elif product_dtype == sum_dtype:
                        grad_weight_VD.addmm_(logits_tV.t(), h_tD)
                    else:
                        grad_weight_VD += logits_tV.t() @ h_tD
                del logits_tV, logits_rV, grad_rV  # before the next chunk makes its own
        if needs_weight and grad_weight_VD is None:  # no token
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype)
        # Saved, not attributes: those live as long as the loss does, which the schedule of a
        # pipeline keeps of every micro-batch to the end of the step.
        ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        # Where they lie, if nobody comes back: a head's gradient is as large as the head.
        times = Tensor.mul_ if goes_back_once() else Tensor.mul
        if grad_hidden_TD is not None:
            grad_hidden_TD = times(grad_hidden_TD, grad.to(grad_hidden_TD.dtype))
        if grad_weight_VD is not None:
            grad_weight_VD = times(grad_weight_VD, grad).to(ctx.weight_dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None
