"""A mixture of experts in training, on a CPU in fp32, all experts in this process, as one node of
autograd's graph, with the norm before it and the residual addition behind.

Step by step it is seven nodes, and autograd adds up the gradients of their common input, a pass
over it for each. Here the parts of those nodes follow one another: the router's
(``router_node.py``), the shared experts' (``ops/feed_forward_node.py``), the routed ones'
(``ops/grouped_feed_forward.py``), and rows are added to what is there as they come back. The twin
is ``MoE`` without it. h is the residual stream, and x what the norm makes of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.models.components.router import Router
from deepseek.models.components.router_node import Decision, decide, decided_back
from deepseek.ops.feed_forward_node import FeedForwardValues, fed_back, fed_forward
from deepseek.ops.grouped_feed_forward import (
    ExpertValues,
    experts_back,
    experts_forward,
    takes_stacks,
)
from deepseek.ops.native import build
from deepseek.ops.rms_norm import norm_gradients, normed
from deepseek.ops.rows import Room, as_rows, row_starts, sort_by_expert, summed, taken


class Parts(NamedTuple):
    """Of a mixture, besides its weights."""

    router: Router
    norm_eps: float
    balance_coeff: float
    room: Room
    """For rows sorted by expert."""


def moe_node(
    h_BSD: Tensor,
    parts: Parts,
    real_BS: Tensor,
    balance_scale: Tensor,
    of_router: tuple[Tensor, Tensor],
    stacks: tuple[Tensor, Tensor, Tensor],
    shared: tuple[Tensor, ...],
) -> Tensor | None:
    """``h + moe(norm(h))``, (B, S, D); None: there are no kernels, or they do not take these.

    The backward pass differentiates the balance loss, too, and adds loss and counts to the router's
    totals, see ``router_node``.

    Args:
        real_BS: False for padding.
        balance_scale: the balance loss is multiplied with it; scalar, fp32.
        of_router: the norm's weight, and the router's matrix.
        stacks: ``w1``, ``w3`` and ``w2`` of the routed experts.
        shared: the same of the shared ones; or nothing.
    """
    given = h_BSD, balance_scale, *of_router, *shared
    if not build.takes_in_training(*given) or not h_BSD.numel() or not takes_stacks(*stacks):
        return None
    return _Mixture.apply(h_BSD, parts, real_BS, balance_scale, *of_router, *stacks, *shared)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_BSD: Tensor,
        parts: Parts,
        real_BS: Tensor,
        balance_scale: Tensor,
        norm_D: Tensor,
        w_ED: Tensor,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        *shared: Tensor,
    ) -> Tensor:
        h_BSD, router = h_BSD.contiguous(), parts.router
        h_TD = as_rows(h_BSD)
        x_TD, scale_T1 = normed(h_TD, norm_D, parts.norm_eps)
        counted = real_BS, parts.balance_coeff, balance_scale
        weights_TK, decision, ctx.counted = decide(x_TD, w_ED, router, *counted)
        ids_R = decision.ids_TK.flatten()
        order_R, inverse_R, counts_E = sort_by_expert(ids_R, router.num_experts)
        rows_RD = taken(x_TD, order_R, router.top_k, parts.room)
        weights_R = taken(weights_TK.flatten(), order_R)
        others_TD, of_shared = None, tuple[Tensor, ...]()
        if shared:
            others_TD, of_shared = fed_forward(x_TD, shared)
        stacks, starts = (w1_EFD, w3_EFD, w2_EDF), row_starts(counts_E, len(order_R))
        y_RD, of_experts = experts_forward(rows_RD, weights_R, *stacks, starts)
        ctx.shared = len(shared)
        of_norm, orders = (h_TD, norm_D, scale_T1), (order_R, inverse_R)
        ctx.save_for_backward(
            *of_norm, x_TD, w_ED, *orders, *decision, *of_experts, *shared, *of_shared
        )
        return summed(y_RD, inverse_R, router.top_k, others_TD, h_BSD)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, norm_D, scale_T1, x_TD, w_ED, order_R, inverse_R, *rest = ctx.saved_tensors
        decided, rest = _split(rest, len(Decision._fields))
        of_experts, rest = _split(rest, len(ExpertValues._fields))
        shared, of_shared = _split(rest, ctx.shared)
        _, _, _, _, needs_norm, needs_w, *needs = ctx.needs_input_grad
        grad_TD, router = as_rows(grad_BSD).contiguous(), ctx.counted.router
        decision = Decision(*decided)
        by_x_TD, by_shared = None, list[Tensor | None]()
        if shared:
            values = FeedForwardValues(*of_shared)
            by_x_TD, *by_shared = fed_back(grad_TD, x_TD, shared, values, [True, *needs[3:]])
        by_rows_RD, by_weights_R, *by_stacks = experts_back(
            taken(grad_TD, order_R, router.top_k), ExpertValues(*of_experts), True, needs[:3]
        )
        assert by_rows_RD is not None and by_weights_R is not None, "asked for"
        by_x_TD = summed(by_rows_RD, inverse_R, router.top_k, by_x_TD)
        by_weights_TK = taken(by_weights_R, inverse_R).view(decision.ids_TK.shape)
        ctx.counted.add()
        by_logits_TE = decided_back(by_weights_TK, decision, router)
        by_x_TD.addmm_(by_logits_TE, w_ED)
        by_w_ED = by_logits_TE.t() @ x_TD if needs_w else None
        of_norm = h_TD, norm_D, scale_T1, needs_norm
        by_h_TD, by_norm_D = norm_gradients(by_x_TD, *of_norm, plus=grad_TD)
        by_h_BSD = by_h_TD.view(grad_BSD.shape)
        return by_h_BSD, None, None, None, by_norm_D, by_w_ED, *by_stacks, *by_shared


def _split(tensors: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    return tensors[:count], tensors[count:]
