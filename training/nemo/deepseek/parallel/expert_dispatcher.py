"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Placement: expert ``e`` lives on EP rank ``e // experts_per_rank``. Two uneven all-to-alls a layer,
one each way, after one of the counts.

T tokens, K choices per token, R rows sent, Q rows received, E experts, e local experts, D model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.dispatcher import Dispatched, weighted_sum
from deepseek.ops.permute import expand_rows, inverse_permutation, permute_rows
from deepseek.parallel.comm import all_to_all_rows


@dataclass(frozen=True)
class _Journey:
    """How the rows went out, so that they find back."""

    order_R: Tensor
    inverse_R: Tensor
    arrival_Q: Tensor
    arrival_inverse_Q: Tensor
    send_counts: list[int]
    receive_counts: list[int]


class AllToAllDispatcher:
    """``TokenDispatcher`` over an EP group; a rank may send, receive or own nothing.

    Args:
        num_experts: all experts; a multiple of the group's size.
        group: the EP group.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.experts_per_rank = num_experts // self.num_ranks

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatched:
        """Send each token to its experts; rows arrive sorted by local expert."""
        expert_ids_R = expert_ids_TK.flatten()
        # 1. sort by expert, and so by the rank that holds it
        order_R = expert_ids_R.argsort(stable=True)
        inverse_R = inverse_permutation(order_R)
        counts_E = torch.bincount(expert_ids_R, minlength=self.num_experts)
        # 2. tell every rank how many rows come for each of its experts
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        send_counts = counts_E.view(self.num_ranks, -1).sum(dim=1).tolist()
        received_ne = received_E.view(self.num_ranks, self.experts_per_rank)
        receive_counts = received_ne.sum(dim=1).tolist()
        # 3. send the rows
        rows_RD = expand_rows(x_TD, order_R, inverse_R)
        rows_QD = all_to_all_rows(rows_RD, send_counts, receive_counts, self.group)
        # 4. they arrive by source rank, then by expert: sort by expert
        local = torch.arange(self.experts_per_rank, device=x_TD.device).repeat(self.num_ranks)
        local_expert_Q = local.repeat_interleave(received_E)
        arrival_Q = local_expert_Q.argsort(stable=True)
        arrival_inverse_Q = inverse_permutation(arrival_Q)
        rows_QD = permute_rows(rows_QD, arrival_Q, arrival_inverse_Q)
        journey = _Journey(
            order_R, inverse_R, arrival_Q, arrival_inverse_Q, send_counts, receive_counts
        )
        return Dispatched(rows_QD, received_ne.sum(dim=0), journey)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Bring the results back and add them up with their weights."""
        journey: _Journey = sent.state
        y_QD = permute_rows(y_RD, journey.arrival_inverse_Q, journey.arrival_Q)
        y_RD = all_to_all_rows(y_QD, journey.receive_counts, journey.send_counts, self.group)
        return weighted_sum(permute_rows(y_RD, journey.inverse_R, journey.order_R), weights_TK)
