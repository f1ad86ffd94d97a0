"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Placement: expert ``i`` lives on EP rank ``i // experts_per_rank``. Two uneven all-to-alls a layer,
one each way, after one of the counts; the backward pass makes the same two journeys in reverse.

T tokens, K choices per token, R rows sent, Q rows received, E experts, e local experts, n ranks,
D model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.dispatcher import Dispatched, TokenDispatcher, weighted_sum
from deepseek.ops.rows import count_rows, expand_rows, inverse_permutation, permute_rows
from deepseek.parallel.collectives import all_to_all_rows


class AllToAllDispatcher:
    """``TokenDispatcher`` over an EP group; a rank may send, receive or own nothing.

    Every rank of the group calls ``dispatch`` and ``combine`` in the same order, whatever it holds.

    Args:
        num_experts: all experts; a multiple of the group's size.
        group: the EP group.

    Attributes:
        last_sent: rows sent to each rank of the group by the last ``dispatch``, for monitoring.
        last_received: rows received from each rank.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.experts_per_rank = num_experts // self.num_ranks
        self.last_sent = [0] * self.num_ranks
        self.last_received = [0] * self.num_ranks

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatched:
        """Send each token to its experts; rows arrive sorted by local expert.

        Under autocast they travel and arrive in autocast's dtype: the experts compute in it.
        """
        # 1. sort by expert, and so by the rank that holds it
        expert_ids_R = expert_ids_TK.flatten()
        order_R = expert_ids_R.argsort(stable=True)
        inverse_R = inverse_permutation(order_R)
        # 2. tell every rank how many rows come for each of its experts
        counts_2ne = self.exchange_counts(expert_ids_R)
        # The one wait for the device: the sizes of the buffers must be known here.
        send_counts, receive_counts = counts_2ne.sum(dim=2).tolist()
        # 3. send the rows
        rows_RD = as_experts_compute(expand_rows(x_TD, order_R, inverse_R))
        rows_QD = all_to_all_rows(rows_RD, send_counts, receive_counts, self.group)
        # 4. they arrive by source rank, then by expert: sort by expert
        received_ne = counts_2ne[1]
        local = torch.arange(self.experts_per_rank, device=x_TD.device).repeat(self.num_ranks)
        local_expert_Q = local.repeat_interleave(
            received_ne.flatten(), output_size=sum(receive_counts)
        )
        arrival_Q = local_expert_Q.argsort(stable=True)
        arrival_inverse_Q = inverse_permutation(arrival_Q)
        rows_QD = permute_rows(rows_QD, arrival_Q, arrival_inverse_Q)
        self.last_sent, self.last_received = send_counts, receive_counts
        journey = _Journey(
            order_R, inverse_R, arrival_Q, arrival_inverse_Q, send_counts, receive_counts
        )
        return Dispatched(rows_QD, received_ne.sum(dim=0), journey)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Bring the results back and add them up with their weights, at home and in full."""
        journey: _Journey = sent.state
        y_QD = permute_rows(y_RD, journey.arrival_inverse_Q, journey.arrival_Q)
        y_RD = all_to_all_rows(y_QD, journey.receive_counts, journey.send_counts, self.group)
        return weighted_sum(permute_rows(y_RD, journey.inverse_R, journey.order_R), weights_TK)

    def exchange_counts(self, expert_ids_R: Tensor) -> Tensor:
        """int64 (2, n, e): rows for each expert of each rank, rows from each rank for ours.

        All on the device; ``dispatch`` brings the sums to the host.
        """
        send_E = count_rows(expert_ids_R, self.num_experts)
        receive_E = torch.empty_like(send_E)
        dist.all_to_all_single(receive_E, send_E, group=self.group)
        counts_2E = torch.stack([send_E, receive_E])
        return counts_2E.unflatten(1, (self.num_ranks, self.experts_per_rank))


@dataclass(frozen=True)
class _Journey:
    """How the rows went out, so that they find back."""

    order_R: Tensor
    inverse_R: Tensor
    arrival_Q: Tensor
    arrival_inverse_Q: Tensor
    send_counts: list[int]
    receive_counts: list[int]


def build_dispatcher(
    num_experts: int, group: dist.ProcessGroup, device_type: str
) -> TokenDispatcher:
    """DeepEP on GPUs where it is installed and knows the group's size; all-to-all elsewhere."""
    if device_type == "cuda":
        from deepseek.parallel.deep_ep_dispatcher import DeepEPDispatcher, supported

        if supported(group):
            return DeepEPDispatcher(num_experts, group)
    return AllToAllDispatcher(num_experts, group)


def as_experts_compute(rows_RD: Tensor) -> Tensor:
    """Rows in the dtype that the experts will cast them to, for half the bytes on the way.

    Each row is cast, not each token: the gradients of a token's K rows are then added in the dtype
    of the token, as without expert parallelism.
    """
    device = rows_RD.device.type
    if torch.is_autocast_enabled(device):
        return rows_RD.to(torch.get_autocast_dtype(device))
    return rows_RD
