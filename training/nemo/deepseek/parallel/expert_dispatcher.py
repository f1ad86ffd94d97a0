"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Placement: expert ``i`` lives on EP rank ``i // experts_per_rank``. Every (token, choice) travels as
a row of its own, and its routing weight with it. ``AllToAllDispatcher`` runs anywhere;
``NodeDispatcher`` sends less between machines, and ``DeepEPDispatcher`` sends by DeepEP's kernels.

T tokens, K choices per token, R = T*K rows sent, Q rows received, E experts, e local experts,
n ranks, D model.
"""

from __future__ import annotations

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
from deepseek.parallel import cpu_exchange
from deepseek.parallel.collectives import all_to_all_rows, all_to_all_weighted_rows
from deepseek.parallel.deepep_dispatcher import MOST_CHOICES, DeepEPDispatcher, deep_ep_buffer
from deepseek.parallel.mesh import Meshes
from deepseek.parallel.node_dispatcher import NodeDispatcher


def build_dispatcher(num_experts: int, meshes: Meshes, config: ModelConfig) -> TokenDispatcher:
    """The dispatcher that ``model.moe_*`` ask for.

    ``auto`` is all-to-all, also where DeepEP is installed, until a GPU has run both.

    Raises:
        UserError: DeepEP is not installed, or older than 2.0, or there is no GPU.
    """
    group, fp8 = meshes.ep, config.moe_dispatch_fp8
    if meshes.ep_across is not None and meshes.ep_inside is not None:
        return NodeDispatcher(num_experts, meshes.ep_across, meshes.ep_inside, fp8)
    if config.moe_token_dispatcher_type != "deepep":
        return AllToAllDispatcher(num_experts, group, fp8)
    try:
        assert meshes.device_type == "cuda", "this process computes on a CPU"
        assert config.num_experts_per_tok <= MOST_CHOICES, (
            f"its kernels know {MOST_CHOICES} choices of a token, and "
            f"model.num_experts_per_tok={config.num_experts_per_tok}"
        )
        deep_ep_buffer()
    except (ImportError, AssertionError) as error:
        raise UserError(
            f"model.moe_token_dispatcher_type=deepep: DeepEP cannot be used here ({error}); "
            "install its version 2 (github.com/deepseek-ai/DeepEP), or use auto or alltoall"
        ) from error
    return DeepEPDispatcher.of(num_experts, meshes, config)


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
        send_ne = send_E.view(self.num_ranks, self.experts_per_rank)
        one_each = [1] * self.num_ranks
        exchange = cpu_exchange.all_to_all([send_ne], one_each, one_each, self.group)
        return torch.stack([send_ne, *exchange.wait()])


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
