"""Expert parallelism over DeepEP's GPU kernels (github.com/deepseek-ai/DeepEP, ``deep_ep.Buffer``).

No GPU has run this file yet. It is written to the documented interface of DeepEP 1.x, which 2.x
keeps, and tested on CPU against a stand-in for it.

Every (token, choice) travels as a row of its own, and the rows are weighed at home, as with
``AllToAllDispatcher``: the numbers are the same. DeepEP could send a token once to a rank that has
several of its experts; for that the routing weights would have to travel too.

T tokens, K choices per token, R = T*K rows sent, Q rows received, e local experts, D model.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.dispatcher import Dispatched, weighted_sum
from deepseek.ops.rows import inverse_permutation, permute_rows
from deepseek.parallel.expert_dispatcher import AllToAllDispatcher, as_experts_compute

ROW_MULTIPLE = 8
"""DeepEP copies 16 bytes at a time: 8 numbers of bf16."""


class DeepEPDispatcher:
    """``TokenDispatcher`` over DeepEP for rows of bf16; over all-to-all for others.

    Arguments and order of calls as ``AllToAllDispatcher``; ``deep_ep`` must be importable.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group
        self.all_to_all = AllToAllDispatcher(num_experts, group)

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatched:
        """Send each token to its experts; rows arrive sorted by local expert."""
        num_tokens, num_choices = expert_ids_TK.shape
        dim = x_TD.shape[1]
        x_RD = x_TD.unsqueeze(1).expand(-1, num_choices, -1).reshape(num_tokens * num_choices, dim)
        x_RD = as_experts_compute(x_RD)
        if x_RD.dtype != torch.bfloat16 or dim % ROW_MULTIPLE:
            return self.all_to_all.dispatch(x_TD, expert_ids_TK)
        way = _Way(buffer(self.group, dim), self.num_experts, expert_ids_TK.reshape(-1, 1))
        rows_QD = _There.apply(x_RD, way)
        arrival_Q = way.local_expert_Q.argsort(stable=True)
        inverse_Q = inverse_permutation(arrival_Q)
        counts_e = torch.tensor(way.counts, device=x_TD.device)
        return Dispatched(
            permute_rows(rows_QD, arrival_Q, inverse_Q),
            counts_e,
            _Journey(way, arrival_Q, inverse_Q),
        )

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Bring the results back and add them up with their weights."""
        journey = sent.state
        if not isinstance(journey, _Journey):
            return self.all_to_all.combine(y_RD, weights_TK, sent)
        y_QD = permute_rows(y_RD, journey.inverse_Q, journey.arrival_Q)
        return weighted_sum(_Back.apply(y_QD, journey.way), weights_TK)


def supported(group: dist.ProcessGroup) -> bool:
    """Whether DeepEP is installed and has a configuration for as many ranks."""
    try:
        from deep_ep import Buffer

        Buffer.get_dispatch_config(dist.get_world_size(group))
        Buffer.get_combine_config(dist.get_world_size(group))
    except (ImportError, AssertionError):
        return False
    return True


@functools.cache
def buffer(group: dist.ProcessGroup, dim: int) -> Any:
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


class _Way:
    """One exchange of rows: out first, then back and out again as often as autograd asks.

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

    def out(self, x_RD: Tensor) -> Tensor:
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

    def back(self, y_QD: Tensor) -> Tensor:
        """(Q, D) -> (R, D): each row returns from the one rank that it was sent to."""
        y_RD, *_ = self.buffer.combine(y_QD.contiguous(), self.handle)
        return y_RD


@dataclass(frozen=True)
class _Journey:
    """How the rows went out, so that they find back."""

    way: _Way
    arrival_Q: Tensor
    inverse_Q: Tensor


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.out(x_RD)

    @staticmethod
    def backward(ctx: Any, grad_QD: Tensor) -> tuple[Tensor, None]:
        return ctx.way.back(grad_QD), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_QD: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return way.back(y_QD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.way.out(grad_RD), None
