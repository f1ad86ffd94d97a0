"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Placement: expert ``i`` lives on EP rank ``i // experts_per_rank``. Every (token, choice) travels as
a row of its own, and its routing weight with it. ``AllToAllDispatcher`` runs anywhere;
``NodeDispatcher`` sends less between machines, ``DeepEPDispatcher`` computes the same over DeepEP's
GPU kernels.

T tokens, K choices per token, R = T*K rows sent, Q rows received, E experts, e local experts,
n ranks, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.models.components.dispatcher import Dispatched, TokenDispatcher
from deepseek.models.components.recompute import keep
from deepseek.ops.autocast import as_products
from deepseek.ops.rows import (
    combine_rows,
    count_rows,
    expand_rows,
    inverse_permutation,
    permute_rows,
)
from deepseek.parallel.collectives import LinearMap, all_to_all_rows, all_to_all_weighted_rows
from deepseek.parallel.mesh import Meshes
from deepseek.parallel.node_dispatcher import NodeDispatcher


def build_dispatcher(num_experts: int, meshes: Meshes, config: ModelConfig) -> TokenDispatcher:
    """The dispatcher that ``model.moe_*`` ask for.

    ``auto`` is all-to-all, also where DeepEP is installed, until a GPU has run both.

    Raises:
        UserError: DeepEP is not installed, knows no group of this size, or there is no GPU.
    """
    group, fp8 = meshes.ep, config.moe_dispatch_fp8
    if meshes.ep_across is not None and meshes.ep_inside is not None:
        return NodeDispatcher(num_experts, meshes.ep_across, meshes.ep_inside, fp8)
    if config.moe_token_dispatcher_type != "deepep":
        return AllToAllDispatcher(num_experts, group, fp8)
    size = dist.get_world_size(group)
    try:
        assert meshes.device_type == "cuda", "this process computes on a CPU"
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
    the same two in reverse. The host waits for the device once, for the sizes of the buffers. Rows
    travel beside what the caller computes meanwhile, and their gradients beside its backward pass.

    Every rank of the group calls ``dispatch`` and ``combine`` in the same order, whatever it holds.

    Args:
        num_experts: all experts; a multiple of the group's size.
        group: the EP group.
        fp8: rows travel to the experts in it, and so do gradients of results; results and gradients
            of rows, which are added up at home, do not (arXiv:2412.19437 section 3.3.3).
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, fp8: bool = False) -> None:
        self.num_experts = num_experts
        self.group = group
        self.fp8 = fp8
        self.num_ranks = dist.get_world_size(group)
        self.experts_per_rank = num_experts // self.num_ranks

    @torch.compiler.disable
    def dispatch(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Dispatched:
        """Send each token to its experts; rows arrive sorted by local expert.

        Under autocast they travel and arrive in autocast's dtype: the experts compute in it.
        """
        plan = keep(lambda: self.plan(expert_ids_TK))
        rows_RD = as_products(expand_rows(x_TD, plan.order_R, plan.inverse_R))
        weights_R = permute_rows(weights_TK.flatten(), plan.order_R, plan.inverse_R)
        rows_QD, weights_Q, computed = all_to_all_weighted_rows(
            rows_RD, weights_R, plan.send_counts, plan.receive_counts, self.group, meanwhile,
            self.fp8,
        )  # fmt: skip
        arrival = plan.arrival_Q, plan.arrival_inverse_Q
        return Dispatched(
            permute_rows(rows_QD, *arrival),
            permute_rows(weights_Q, *arrival),
            plan.counts_e,
            plan,
            computed,
        )

    @torch.compiler.disable
    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """Bring the results back and add them up, at home and in full."""
        plan: Plan = sent.state
        y_QD = permute_rows(y_RD, plan.arrival_inverse_Q, plan.arrival_Q)
        y_RD = all_to_all_rows(y_QD, plan.receive_counts, plan.send_counts, self.group, self.fp8)
        return combine_rows(y_RD, plan.order_R, plan.inverse_R, plan.shape[1])

    def plan(self, expert_ids_TK: Tensor) -> Plan:
        """How the rows go; the host waits for the device once, for the sizes of what arrives."""
        # 1. sort by expert, and so by the rank that holds it
        expert_ids_R = expert_ids_TK.flatten()
        order_R = expert_ids_R.argsort(stable=True)
        # 2. tell every rank how many rows come for each of its experts
        counts_2ne = self.exchange_counts(expert_ids_R)
        send_counts, receive_counts = counts_2ne.sum(dim=2).tolist()
        # 3. they will arrive by source rank, then by expert: sort by expert
        received_ne = counts_2ne[1]
        local = torch.arange(self.experts_per_rank, device=order_R.device).repeat(self.num_ranks)
        local_expert_Q = local.repeat_interleave(
            received_ne.flatten(), output_size=sum(receive_counts)
        )
        arrival_Q = local_expert_Q.argsort(stable=True)
        return Plan(
            expert_ids_TK.shape,
            order_R,
            inverse_permutation(order_R),
            arrival_Q,
            inverse_permutation(arrival_Q),
            received_ne.sum(dim=0),
            send_counts,
            receive_counts,
        )

    def exchange_counts(self, expert_ids_R: Tensor) -> Tensor:
        """int64 (2, n, e): rows for each expert of each rank, rows from each rank for ours.

        All on the device; ``plan`` brings the sums to the host.
        """
        send_E = count_rows(expert_ids_R, self.num_experts)
        receive_E = torch.empty_like(send_E)
        dist.all_to_all_single(receive_E, send_E, group=self.group)
        counts_2E = torch.stack([send_E, receive_E])
        return counts_2E.unflatten(1, (self.num_ranks, self.experts_per_rank))


@dataclass(frozen=True)
class Plan:
    """How a dispatch orders and divides the rows, and ``combine`` undoes it."""

    shape: torch.Size
    """T, K."""
    order_R: Tensor
    inverse_R: Tensor
    arrival_Q: Tensor
    arrival_inverse_Q: Tensor
    counts_e: Tensor
    send_counts: list[int]
    receive_counts: list[int]


# -- DeepEP --


class DeepEPDispatcher:
    """``TokenDispatcher`` over DeepEP, for rows of bf16.

    No GPU has run it yet (github.com/deepseek-ai/DeepEP, ``deep_ep.Buffer``): it is written to the
    documented interface of DeepEP 1.x, which 2.x keeps, and tested on CPU against a stand-in for
    it. DeepEP could send a token once to a rank that has several of its experts; this one sends
    every choice.

    Arguments and order of calls as ``AllToAllDispatcher``; ``deep_ep`` must be importable.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = group

    @torch.compiler.disable
    def dispatch(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Dispatched:
        """Send each token to its experts; rows arrive sorted by local expert."""
        num_tokens, num_choices = expert_ids_TK.shape
        dim = x_TD.shape[1]
        x_RD = x_TD.unsqueeze(1).expand(-1, num_choices, -1).reshape(num_tokens * num_choices, dim)
        x_RD = as_products(x_RD)
        assert x_RD.dtype == torch.bfloat16, "config/layout_rules.py refuses other precisions"
        exchange = _DeepEPExchange(
            _buffer(self.group, dim), self.num_experts, expert_ids_TK.reshape(-1, 1)
        )
        rows_QD, weights_Q = _DeepEPDispatch.apply(x_RD, weights_TK.flatten(), exchange)
        arrival_Q = exchange.local_expert_Q.argsort(stable=True)
        inverse_Q = inverse_permutation(arrival_Q)
        return Dispatched(
            permute_rows(rows_QD, arrival_Q, inverse_Q),
            permute_rows(weights_Q, arrival_Q, inverse_Q),
            torch.tensor(exchange.counts, device=x_TD.device),
            _DeepEPHandle(exchange, arrival_Q, inverse_Q, expert_ids_TK.shape),
            meanwhile(),
        )

    @torch.compiler.disable
    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """Bring the results back and add them up."""
        handle: _DeepEPHandle = sent.state
        y_QD = permute_rows(y_RD, handle.inverse_Q, handle.arrival_Q)
        exchange = handle.exchange
        y_RD = LinearMap.apply(y_QD, exchange.combine, exchange.send)
        return y_RD.unflatten(0, handle.shape).sum(dim=1)


class _DeepEPDispatch(torch.autograd.Function):
    """Rows and their weights, both ways."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weights_R: Tensor, exchange: _DeepEPExchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        return exchange.dispatch(x_RD, weights_R)

    @staticmethod
    def backward(ctx: Any, grad_QD: Tensor, grad_Q: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.exchange.combine_weighted(grad_QD, grad_Q), None


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

    def dispatch(self, x_RD: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D), (R,) -> (Q, D), (Q,), by source rank. DeepEP waits for the counts."""
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(
            self.expert_ids_R1, self.num_experts
        )
        rows_QD, local_expert_Q1, weights_Q1, self.counts, self.handle, _ = self.buffer.dispatch(
            x_RD.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.expert_ids_R1,
            topk_weights=weights_R.unsqueeze(1).contiguous(),
        )
        self.local_expert_Q = local_expert_Q1.flatten()
        return rows_QD, weights_Q1.flatten()

    def send(self, x_RD: Tensor) -> Tensor:
        """(R, D) -> (Q, D): other rows, as the first were dispatched."""
        rows_QD, *_ = self.buffer.dispatch(x_RD.contiguous(), handle=self.handle)
        return rows_QD

    def combine(self, y_QD: Tensor) -> Tensor:
        """(Q, D) -> (R, D): each row returns from the one rank that it was sent to."""
        y_RD, *_ = self.buffer.combine(y_QD.contiguous(), self.handle)
        return y_RD

    def combine_weighted(self, y_QD: Tensor, weights_Q: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, D), (Q,) -> (R, D), (R,)."""
        weights_Q1 = weights_Q.unsqueeze(1).contiguous()
        y_RD, weights_R1, _ = self.buffer.combine(
            y_QD.contiguous(), self.handle, topk_weights=weights_Q1
        )
        return y_RD, weights_R1.flatten()


@dataclass(frozen=True)
class _DeepEPHandle:
    """What ``combine`` needs of a dispatch."""

    exchange: _DeepEPExchange
    arrival_Q: Tensor
    inverse_Q: Tensor
    shape: torch.Size
    """T, K."""
