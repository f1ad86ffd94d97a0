"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Placement: expert ``i`` lives on EP rank ``i // experts_per_rank``. Every (token, choice) travels as
a row of its own, and the rows are weighed at home. ``AllToAllDispatcher`` runs anywhere;
``DeepEPDispatcher`` computes the same over DeepEP's GPU kernels.

T tokens, K choices per token, R = T*K rows sent, Q rows received, E experts, e local experts,
n ranks, D model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.models.components.dispatcher import Dispatched, TokenDispatcher, weighted_sum
from deepseek.ops.rows import count_rows, expand_rows, inverse_permutation, permute_rows
from deepseek.parallel.collectives import LinearMap, all_to_all_rows


def build_dispatcher(
    num_experts: int, group: dist.ProcessGroup, device_type: str, kind: str
) -> TokenDispatcher:
    """The dispatcher that ``model.moe_token_dispatcher_type`` asks for.

    ``auto`` is all-to-all, also where DeepEP is installed, until a GPU has run both.

    Raises:
        UserError: DeepEP is not installed, knows no group of this size, or there is no GPU.
    """
    if kind != "deepep":
        return AllToAllDispatcher(num_experts, group)
    size = dist.get_world_size(group)
    try:
        assert device_type == "cuda", "this process computes on a CPU"
        from deep_ep import Buffer

        Buffer.get_dispatch_config(size)
        Buffer.get_combine_config(size)
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"model.moe_token_dispatcher_type=deepep with model.expert_model_parallel_size={size}: "
            f"DeepEP cannot be used here ({error}); install DeepEP (github.com/deepseek-ai/DeepEP) "
            "and use an EP size that it knows, or use auto or alltoall"
        ) from error
    return DeepEPDispatcher(num_experts, group)


class AllToAllDispatcher:
    """``TokenDispatcher`` over an EP group; a rank may send, receive or own nothing.

    Two uneven all-to-alls a layer, one each way, after one of the counts; the backward pass makes
    the same two in reverse. The host waits for the device once, for the sizes of the buffers.

    Every rank of the group calls ``dispatch`` and ``combine`` in the same order, whatever it holds.

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
        """Send each token to its experts; rows arrive sorted by local expert.

        Under autocast they travel and arrive in autocast's dtype: the experts compute in it.
        """
        # 1. sort by expert, and so by the rank that holds it
        expert_ids_R = expert_ids_TK.flatten()
        order_R = expert_ids_R.argsort(stable=True)
        inverse_R = inverse_permutation(order_R)
        # 2. tell every rank how many rows come for each of its experts
        counts_2ne = self.exchange_counts(expert_ids_R)
        # The one wait for the device.
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
        handle = _Handle(
            order_R, inverse_R, arrival_Q, arrival_inverse_Q, send_counts, receive_counts
        )
        return Dispatched(rows_QD, received_ne.sum(dim=0), handle)

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Bring the results back and add them up with their weights, at home and in full."""
        handle: _Handle = sent.state
        y_QD = permute_rows(y_RD, handle.arrival_inverse_Q, handle.arrival_Q)
        y_RD = all_to_all_rows(y_QD, handle.receive_counts, handle.send_counts, self.group)
        return weighted_sum(permute_rows(y_RD, handle.inverse_R, handle.order_R), weights_TK)

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
class _Handle:
    """How a dispatch has ordered and divided the rows, for ``combine`` to undo it."""

    order_R: Tensor
    inverse_R: Tensor
    arrival_Q: Tensor
    arrival_inverse_Q: Tensor
    send_counts: list[int]
    receive_counts: list[int]


def as_experts_compute(rows_RD: Tensor) -> Tensor:
    """Rows in the dtype that the experts will cast them to, for half the bytes on the way.

    Each row is cast, not each token: the gradients of a token's K rows are then added in the dtype
    of the token, as without expert parallelism.
    """
    device = rows_RD.device.type
    if torch.is_autocast_enabled(device):
        return rows_RD.to(torch.get_autocast_dtype(device))
    return rows_RD


# -- DeepEP --


class DeepEPDispatcher:
    """``TokenDispatcher`` over DeepEP, for rows of bf16.

    No GPU has run it yet (github.com/deepseek-ai/DeepEP, ``deep_ep.Buffer``): it is written to the
    documented interface of DeepEP 1.x, which 2.x keeps, and tested on CPU against a stand-in for
    it. DeepEP could send a token once to a rank that has several of its experts; for that the
    routing weights would have to travel too.

    Arguments and order of calls as ``AllToAllDispatcher``; ``deep_ep`` must be importable.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatched:
        """Send each token to its experts; rows arrive sorted by local expert."""
        num_tokens, num_choices = expert_ids_TK.shape
        dim = x_TD.shape[1]
        x_RD = x_TD.unsqueeze(1).expand(-1, num_choices, -1).reshape(num_tokens * num_choices, dim)
        x_RD = as_experts_compute(x_RD)
        assert x_RD.dtype == torch.bfloat16, "config/layout_rules.py refuses other precisions"
        exchange = _DeepEPExchange(
            _buffer(self.group, dim), self.num_experts, expert_ids_TK.reshape(-1, 1)
        )
        rows_QD = LinearMap.apply(x_RD, exchange.dispatch, exchange.combine)
        arrival_Q = exchange.local_expert_Q.argsort(stable=True)
        inverse_Q = inverse_permutation(arrival_Q)
        return Dispatched(
            permute_rows(rows_QD, arrival_Q, inverse_Q),
            torch.tensor(exchange.counts, device=x_TD.device),
            _DeepEPHandle(exchange, arrival_Q, inverse_Q),
        )

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Bring the results back and add them up with their weights."""
        handle: _DeepEPHandle = sent.state
        y_QD = permute_rows(y_RD, handle.inverse_Q, handle.arrival_Q)
        exchange = handle.exchange
        y_RD = LinearMap.apply(y_QD, exchange.combine, exchange.dispatch)
        return weighted_sum(y_RD, weights_TK)


@functools.cache
def _buffer(group: dist.ProcessGroup, dim: int) -> Any:
    """The communication buffer of a group, one for all layers; making it is a collective."""
    from deep_ep import Buffer

    size = dist.get_world_size(group)
    row_bytes = 2 * dim
    configs = (Buffer.get_dispatch_config(size), Buffer.get_combine_config(size))
    return Buffer(
        group,
        max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs),
        max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs),
    )


class _DeepEPExchange:
    """One exchange of rows: dispatched first, then combined and dispatched as autograd asks.

    Attributes:
        counts: rows per local expert, on the host.
        local_expert_Q: of each row that has arrived.
    """

    counts: list[int]
    local_expert_Q: Tensor

    def __init__(self, buffer: Any, num_experts: int, expert_ids_R1: Tensor) -> None:
        import deep_ep

        self.buffer = buffer
        self.num_experts = num_experts
        self.expert_ids_R1 = expert_ids_R1.to(getattr(deep_ep, "topk_idx_t", torch.int64))
        self.handle: Any = None

    def dispatch(self, x_RD: Tensor) -> Tensor:
        """(R, D) -> (Q, D), by source rank. The first time DeepEP waits for the counts."""
        x_RD = x_RD.contiguous()
        if self.handle is not None:
            rows_QD, *_ = self.buffer.dispatch(x_RD, handle=self.handle)
            return rows_QD
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(
            self.expert_ids_R1, self.num_experts
        )
        rows_QD, local_expert_Q1, _, self.counts, self.handle, _ = self.buffer.dispatch(
            x_RD,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.expert_ids_R1,
            topk_weights=torch.ones_like(self.expert_ids_R1, dtype=torch.float32),
        )
        self.local_expert_Q = local_expert_Q1.flatten()
        return rows_QD

    def combine(self, y_QD: Tensor) -> Tensor:
        """(Q, D) -> (R, D): each row returns from the one rank that it was sent to."""
        y_RD, *_ = self.buffer.combine(y_QD.contiguous(), self.handle)
        return y_RD


@dataclass(frozen=True)
class _DeepEPHandle:
    """What ``combine`` needs of a dispatch."""

    exchange: _DeepEPExchange
    arrival_Q: Tensor
    inverse_Q: Tensor
