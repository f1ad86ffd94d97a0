"""Expert parallelism over machines: a token travels once to each that has experts of its.

Between machines there is a tenth of the bandwidth that there is inside, and of V3's 8 experts of a
token those of one machine are two or more: its router chooses from 4 of 8 machines
(arXiv:2412.19437 section 3.2.2). So a token's row goes once to each of them, to the rank that
stands there as the sender does here, with all its choices; that rank sends a row to each of its
experts. On the way back it adds up what they give, and one row goes home.

T tokens, K choices per token, M machines, g ranks of each, e experts of a rank, P pairs of a token
and a machine sent, Q received, R rows sent inside a machine, S received, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.dispatcher import Dispatched
from deepseek.models.components.recompute import keep
from deepseek.ops.autocast import as_products
from deepseek.ops.rows import add_rows, count_rows, inverse_permutation, permute_rows, take_rows
from deepseek.parallel.collectives import all_to_all_rows, all_to_all_weighted_rows


class NodeDispatcher:
    """``TokenDispatcher`` in two exchanges each way: between machines, then inside of each.

    It computes what ``AllToAllDispatcher`` does, but for the order in which a token's results are
    added up. The host waits twice a layer. What the caller computes meanwhile runs beside the
    exchange between machines.

    Args:
        num_experts: all experts; EP rank ``i // e`` has expert ``i``.
        across: the ranks that stand in their machines where this one does, by machine.
        inside: the EP ranks of this machine.
        fp8: see ``AllToAllDispatcher``.
    """

    def __init__(
        self,
        num_experts: int,
        across: dist.ProcessGroup,
        inside: dist.ProcessGroup,
        fp8: bool = False,
    ) -> None:
        self.across, self.inside, self.fp8 = across, inside, fp8
        self.nodes, self.ranks = dist.get_world_size(across), dist.get_world_size(inside)
        self.experts_per_node = num_experts // self.nodes

    @torch.compiler.disable
    def dispatch(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Dispatched:
        """Send each token to the machines of its experts, and there to these."""
        plan = keep(lambda: self.plan(expert_ids_TK))
        # 1. between machines: a row with the weights of all its experts there
        sent = plan.token_P, plan.slots_TM
        rows_PD = as_products(take_rows(x_TD, *sent))
        weights_PK = take_rows(weights_TK, *sent) * plan.chosen_PK
        rows_QD, weights_QK, computed = all_to_all_weighted_rows(
            rows_PD,
            weights_PK,
            plan.to_nodes,
            plan.from_nodes,
            self.across,
            meanwhile,
            self.fp8,
            passed_on=True,
        )
        # 2. inside: a row to each expert
        slots_N1 = plan.slots_QK.view(-1, 1)
        rows_RD = take_rows(rows_QD, plan.pair_R, plan.slots_QK)
        weights_R = take_rows(weights_QK.reshape(-1, 1), plan.choice_R, slots_N1).squeeze(1)
        rows_SD, weights_S, _ = all_to_all_weighted_rows(
            rows_RD, weights_R, plan.to_ranks, plan.from_ranks, self.inside, fp8=self.fp8
        )
        arrival = plan.arrival_S, plan.inverse_S
        return Dispatched(
            permute_rows(rows_SD, *arrival),
            permute_rows(weights_S, *arrival),
            plan.counts_e,
            plan,
            computed,
        )

    @torch.compiler.disable
    def combine(self, y_SD: Tensor, sent: Dispatched) -> Tensor:
        """Add a token's results up in each machine, bring the sums home, and add these up."""
        plan: NodePlan = sent.state
        y_SD = permute_rows(y_SD, plan.inverse_S, plan.arrival_S)
        y_RD = all_to_all_rows(y_SD, plan.from_ranks, plan.to_ranks, self.inside, self.fp8)
        y_QD = add_rows(y_RD, plan.slots_QK, plan.pair_R)
        y_PD = all_to_all_rows(y_QD, plan.from_nodes, plan.to_nodes, self.across, self.fp8)
        return add_rows(y_PD, plan.slots_TM, plan.token_P)

    def plan(self, expert_ids_TK: Tensor) -> NodePlan:
        """How the rows go; the host waits for the sizes of each of the two exchanges."""
        tokens, choices = expert_ids_TK.shape
        node_TK, device = expert_ids_TK // self.experts_per_node, expert_ids_TK.device
        # 1. pairs of token and machine, by machine
        goes_TM = torch.zeros(tokens, self.nodes, dtype=torch.bool, device=device)
        goes_TM.scatter_(1, node_TK, True)
        to_nodes, from_nodes = self._both(goes_TM.sum(dim=0), self.across).tolist()
        goes = goes_TM.mT.flatten()
        order_P = goes.logical_not().to(torch.uint8).argsort(stable=True)[: sum(to_nodes)]
        token_P, node_P = order_P % max(tokens, 1), order_P // max(tokens, 1)
        place = goes.cumsum(0) - 1
        slots_TM = place.where(goes, len(order_P)).unflatten(0, (self.nodes, -1)).mT.contiguous()
        # 2. what they have chosen there; no expert is the one after the last
        chosen_PK = node_TK[token_P] == node_P.unsqueeze(1)
        none = self.experts_per_node
        local_PK = (expert_ids_TK % none)[token_P].where(chosen_PK, none)
        local_QK = local_PK.new_empty(sum(from_nodes), choices)
        dist.all_to_all_single(local_QK, local_PK, from_nodes, to_nodes, group=self.across)
        # 3. rows inside, by expert; then as any rows of experts
        local_N = local_QK.flatten()
        order_N = local_N.argsort(stable=True)
        both_2E = self._both(count_rows(local_N, none + 1)[:none], self.inside)
        both_2ge = both_2E.unflatten(1, (self.ranks, -1))
        to_ranks, from_ranks = both_2ge.sum(dim=2).tolist()
        choice_R = order_N[: sum(to_ranks)]
        slots_QK = inverse_permutation(order_N).clamp(max=len(choice_R)).view_as(local_QK)
        received_ge = both_2ge[1]
        experts = torch.arange(received_ge.shape[1], device=device).repeat(self.ranks)
        expert_S = experts.repeat_interleave(received_ge.flatten(), output_size=sum(from_ranks))
        arrival_S = expert_S.argsort(stable=True)
        return NodePlan(
            token_P,
            slots_TM,
            chosen_PK,
            to_nodes,
            from_nodes,
            choice_R,
            choice_R // choices,
            slots_QK,
            to_ranks,
            from_ranks,
            arrival_S,
            inverse_permutation(arrival_S),
            received_ge.sum(dim=0),
        )

    @staticmethod
    def _both(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
        """What goes to the ranks of a group, and what comes from them, as many numbers each."""
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        return torch.stack([counts, received])


@dataclass(frozen=True)
class NodePlan:
    """How a dispatch divides the rows, and ``combine`` undoes it."""

    token_P: Tensor
    """Of each row that leaves for a machine."""
    slots_TM: Tensor
    """The row of each token for each machine; P for none."""
    chosen_PK: Tensor
    """Which of a token's choices lie there."""
    to_nodes: list[int]
    from_nodes: list[int]
    choice_R: Tensor
    """Row x K + choice, of each row sent inside."""
    pair_R: Tensor
    """The row that it is a copy of."""
    slots_QK: Tensor
    """Its copies; R for none."""
    to_ranks: list[int]
    from_ranks: list[int]
    arrival_S: Tensor
    inverse_S: Tensor
    counts_e: Tensor
