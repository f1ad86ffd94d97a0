"""A router in training, on a CPU in fp32, as one node of autograd's graph.

Scores, the choice, weights, balance loss and counts are ten nodes of little arithmetic, operator by
operator. The twin is ``Router`` with ``sequence_balance`` and ``attach``, whose kernels these are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.models.components.balance import count_assignments, loss_of_sums
from deepseek.models.components.recompute import keep
from deepseek.models.components.router import Router
from deepseek.ops.native import build
from deepseek.ops.routing import add_up, add_up_back, weigh, weigh_back


def router_node(
    router: Router, x_TD: Tensor, real_BS: Tensor, coefficient: float, scale: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Weights and ids of each token's experts, (T, K); None: there are no kernels, or they do not
    take these.

    The backward pass differentiates the balance loss, too, and adds loss and counts to the totals
    of ``router``, see ``attach``: once, since pipelines whose backward pass is split come by twice.

    Args:
        real_BS: False for padding.
        coefficient: of the balance loss; 0: it has none.
        scale: the loss is multiplied with it; scalar, fp32.
    """
    if not build.takes_in_training(x_TD, router.weight, scale) or not x_TD.numel():
        return None
    return _Router.apply(x_TD, router.weight, router, real_BS, coefficient, scale)


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_ED: Tensor,
        router: Router,
        real_BS: Tensor,
        coefficient: float,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logits_TE, real_BS = x_TD @ w_ED.t(), real_BS.contiguous()
        ctx.sigmoid = router.scoring == "sigmoid"
        scores_TE = logits_TE.sigmoid() if ctx.sigmoid else logits_TE.softmax(dim=-1)
        ids_TK = keep(lambda: router.choose(scores_TE))
        # The bias chooses but does not weigh: the weights come from the unbiased scores.
        ctx.settings = router.normalise, router.scaling_factor
        weights_TK = weigh(scores_TE, ids_TK, *ctx.settings)
        ctx.loss, by_sums = None, None
        if coefficient:
            scores_BSE = scores_TE.view(*real_BS.shape, -1)
            sums = add_up(scores_BSE, router.top_k, real_BS)
            loss, by_sums = loss_of_sums(sums, router.num_experts, router.top_k)
            scale = scale * coefficient
            ctx.loss, by_sums = loss * scale, by_sums.mul_(scale)
        ctx.router, ctx.is_counted = router, False
        ctx.counts_E = count_assignments(ids_TK, real_BS.flatten(), router.num_experts)
        ctx.save_for_backward(x_TD, w_ED, scores_TE, ids_TK, real_BS, by_sums)
        ctx.mark_non_differentiable(ids_TK)
        return weights_TK, ids_TK

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_ED, scores_TE, ids_TK, real_BS, by_sums = ctx.saved_tensors
        by_scores_TE = weigh_back(grad_TK, scores_TE, ids_TK, *ctx.settings)
        if by_sums is not None:
            scores_BSE = scores_TE.view(*real_BS.shape, -1)
            by_scores_TE += add_up_back(by_sums, scores_BSE, real_BS).view(by_scores_TE.shape)
        if not ctx.is_counted:
            ctx.is_counted = True
            ctx.router.tokens_per_expert += ctx.counts_E
            if ctx.loss is not None:
                ctx.router.balance_loss += ctx.loss
        if ctx.sigmoid:
            by_logits_TE = torch.ops.aten.sigmoid_backward(by_scores_TE, scores_TE)
        else:
            given = by_scores_TE, scores_TE, -1, torch.float32
            by_logits_TE = torch._softmax_backward_data(*given)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        by_x = by_logits_TE @ w_ED if needs_x else None
        by_w = by_logits_TE.t() @ x_TD if needs_w else None
        return by_x, by_w, None, None, None, None
