"""A router in training, on a CPU in fp32, as one node of autograd's graph.

Scores, the choice, weights, balance loss and counts are ten nodes of little arithmetic, operator by
operator. The twin is ``Router`` with ``sequence_balance`` and ``attach``, whose kernels these are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Decision(NamedTuple):
    """What the backward pass is given again."""

    scores_TE: Tensor
    ids_TK: Tensor
    real_BS: Tensor
    by_sums: Tensor | None
    """Of the balance loss, by what it is made of; None: it has none."""


class Counted:
    """What a pass through a router adds to its totals, in the backward pass, and there once."""

    def __init__(self, router: Router, counts_E: Tensor, loss: Tensor | None) -> None:
        self.router, self._counts_E, self._loss = router, counts_E, loss
        self._is_added = False

    def add(self) -> None:
        """To the router's, unless that is done."""
        if self._is_added:
            return
        self._is_added = True
        self.router.tokens_per_expert += self._counts_E
        if self._loss is not None:
            self.router.balance_loss += self._loss


def decide(
    x_TD: Tensor,
    w_ED: Tensor,
    router: Router,
    real_BS: Tensor,
    coefficient: float,
    scale: Tensor,
) -> tuple[Tensor, Decision, Counted]:
    """Weights (T, K) of each token's experts, see ``router_node``; without gradient."""
    logits_TE, real_BS = x_TD @ w_ED.t(), real_BS.contiguous()
    sigmoid = router.scoring == "sigmoid"
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)
    ids_TK = keep(lambda: router.choose(scores_TE))
    router.tell(scores_TE, ids_TK, real_BS)
    # The bias chooses but does not weigh: the weights come from the unbiased scores.
    weights_TK = weigh(scores_TE, ids_TK, router.normalise, router.scaling_factor)
    loss, by_sums = None, None
    if coefficient:
        scores_BSE = scores_TE.view(*real_BS.shape, -1)
        sums = add_up(scores_BSE, router.top_k, real_BS)
        loss, by_sums = loss_of_sums(sums, router.num_experts, router.top_k)
        scale = scale * coefficient
        loss, by_sums = loss * scale, by_sums.mul_(scale)
    counts_E = count_assignments(ids_TK, real_BS.flatten(), router.num_experts)
    decision = Decision(scores_TE, ids_TK, real_BS, by_sums)
    return weights_TK, decision, Counted(router, counts_E, loss)


def decided_back(grad_TK: Tensor, decision: Decision, router: Router) -> Tensor:
    """Gradient of the logits, (T, E), from that of the weights and from the balance loss."""
    scores_TE, ids_TK, real_BS, by_sums = decision
    settings = router.normalise, router.scaling_factor
    by_scores_TE = weigh_back(grad_TK, scores_TE, ids_TK, *settings)
    if by_sums is not None:
        scores_BSE = scores_TE.view(*real_BS.shape, -1)
        by_scores_TE += add_up_back(by_sums, scores_BSE, real_BS).view(by_scores_TE.shape)
    if router.scoring == "sigmoid":
        return torch.ops.aten.sigmoid_backward(by_scores_TE, scores_TE)
    return torch._softmax_backward_data(by_scores_TE, scores_TE, -1, torch.float32)


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
        given = x_TD, w_ED, router, real_BS, coefficient, scale
        weights_TK, decision, ctx.counted = decide(*given)
        ctx.save_for_backward(x_TD, w_ED, *decision)
        ctx.mark_non_differentiable(decision.ids_TK)
        return weights_TK, decision.ids_TK

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_ED, *decision = ctx.saved_tensors
        ctx.counted.add()
        by_logits_TE = decided_back(grad_TK, Decision(*decision), ctx.counted.router)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        by_x = by_logits_TE @ w_ED if needs_x else None
        by_w = by_logits_TE.t() @ x_TD if needs_w else None
        return by_x, by_w, None, None, None, None
