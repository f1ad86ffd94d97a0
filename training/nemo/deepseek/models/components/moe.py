"""DeepSeekMoE: routed experts, shared experts (arXiv:2412.19437 section 2.1.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deepseek.models.components.balance import (
    SumOverSequence,
    attach,
    count_assignments,
    router_z,
    sequence_balance,
    whole,
)
from deepseek.models.components.dispatcher import LocalDispatcher, TokenDispatcher
from deepseek.models.components.feed_forward import Expert, FeedForward, RMSNorm, is_watched
from deepseek.models.components.moe_node import Parts, moe_node
from deepseek.models.components.router import Router, Routing
from deepseek.models.components.router_node import router_node
from deepseek.ops.autocast import as_products
from deepseek.ops.few_experts import decode_mixture, few_experts
from deepseek.ops.gradient_rooms import lent_room, make_gradient_room
from deepseek.ops.grouped_feed_forward import grouped_feed_forward
from deepseek.ops.grouped_linear import grouped_linear, takes_any_counts
from deepseek.ops.rows import aligned_slots, gather_rows, most_slots, spread_rows
from deepseek.ops.swiglu import swiglu


class MoE(nn.Module):
    """Mixture of experts: route, dispatch, compute, combine.

    Attributes:
        dispatcher: brings rows to their experts; replaced where these lie on several ranks.
        sum_over_sequence: replaced where several ranks share each sequence.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_shared_experts: int,
        router: Router,
        balance_coeff: float,
        z_coeff: float,
    ) -> None:
        super().__init__()
        self.gate = router
        self.experts = GroupedExperts(router.num_experts, dim, hidden_dim)
        self.shared_experts = (
            FeedForward(dim, num_shared_experts * hidden_dim) if num_shared_experts else None
        )
        self.dispatcher: TokenDispatcher = LocalDispatcher(
            router.num_experts, self.experts.room_for_rows
        )
        self.sum_over_sequence: SumOverSequence = whole
        self.balance_coeff = balance_coeff
        self.z_coeff = z_coeff

    def forward(
        self,
        x_BSD: Tensor,
        real_BS: Tensor | None = None,
        balance_scale: Tensor | None = None,
        decodes: bool = False,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        Args:
            real_BS: False for padding, which is not counted; None: all real.
            balance_scale: see ``TokenContext``; None: nothing is counted.
            decodes: the tokens follow those in a cache.
        """
        x_TD = x_BSD.flatten(0, 1)
        # 1. choose experts
        weights_TK, ids_TK = self._route(x_TD, x_BSD.shape[:2], real_BS, balance_scale)
        shared = self.shared_experts
        if decodes and type(self.dispatcher) is LocalDispatcher:
            y_TD = self.experts.few(x_TD, weights_TK, ids_TK)
            if y_TD is not None:
                y_BSD = y_TD.view_as(x_BSD)
                return y_BSD if shared is None else y_BSD + shared(x_BSD)
        # 2. bring rows to their experts, and meanwhile compute the experts that all tokens share
        sent = self.dispatcher.dispatch(
            x_TD,
            weights_TK,
            ids_TK,
            lambda: None if shared is None else shared(x_BSD),
        )
        # 3. compute; the routed experts last: what follows them needs nothing of theirs again
        y_RD = self.experts(sent.rows_RD, sent.weights_R, sent.counts_e, decodes)
        # 4. bring results back
        y_BSD = self.dispatcher.combine(y_RD, sent).view_as(x_BSD)
        return y_BSD if shared is None else y_BSD + sent.meanwhile

    def add_to(
        self,
        h_BSD: Tensor,
        norm: RMSNorm,
        real_BS: Tensor | None = None,
        balance_scale: Tensor | None = None,
        decodes: bool = False,
    ) -> Tensor:
        """``h + self(norm(h))``, where it can be as one node of the graph, or one kernel; the rest
        as in ``forward``."""
        y_BSD, trains = None, balance_scale is not None and torch.is_grad_enabled()
        if (trains or decodes) and self._is_plain(norm):
            experts, shared = self.experts, self.shared_experts
            stacks = experts.local(experts.w1), experts.local(experts.w3), experts.local(experts.w2)
            weights = stacks, () if shared is None else shared.weights
            if trains:
                assert balance_scale is not None
                y_BSD = self._in_one(h_BSD, norm, real_BS, balance_scale, *weights)
            else:
                y_BSD = self._decoded(h_BSD, norm, real_BS, *weights)
        if y_BSD is not None:
            return y_BSD
        return h_BSD + self(norm(h_BSD), real_BS, balance_scale, decodes)

    def _in_one(
        self,
        h_BSD: Tensor,
        norm: RMSNorm,
        real_BS: Tensor | None,
        balance_scale: Tensor,
        stacks: tuple[Tensor, Tensor, Tensor],
        shared: tuple[Tensor, ...],
    ) -> Tensor | None:
        """``add_to`` in training by ``moe_node``; None, where that takes none of these."""
        if self.z_coeff:
            return None
        if real_BS is None:
            real_BS = torch.ones(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)
        parts = Parts(self.gate, norm.eps, self.balance_coeff, self.experts.room_for_rows)
        weights = (norm.weight, self.gate.weight), stacks, shared
        y_BSD = moe_node(h_BSD, parts, real_BS, balance_scale, *weights)
        if y_BSD is not None:
            self.experts.tell(h_BSD.shape[:2].numel() * self.gate.top_k)
        return y_BSD

    def _decoded(
        self,
        h_BSD: Tensor,
        norm: RMSNorm,
        real_BS: Tensor | None,
        stacks: tuple[Tensor, Tensor, Tensor],
        shared: tuple[Tensor, ...],
    ) -> Tensor | None:
        """``add_to`` of few tokens by a kernel; None, where that takes none of these."""
        of_norm = norm.weight, norm.eps
        found = decode_mixture(h_BSD, of_norm, self.gate.choice, stacks, shared)
        if found is None:
            return None
        y_BSD, scores_TE, ids_TK = found
        self.gate.tell(scores_TE, ids_TK, real_BS)
        return y_BSD

    def _is_plain(self, norm: RMSNorm) -> bool:
        """Whether it is its weights and no more, as the norm before it is, all of them here, and
        no other rank shares its sequences."""
        shared, is_local = self.shared_experts, type(self.dispatcher) is LocalDispatcher
        if type(self) is not MoE or is_watched(self) or not is_local:
            return False
        if self.sum_over_sequence is not whole or not norm.is_plain:
            return False
        if shared is not None and not shared.is_plain:
            return False
        return self.gate.is_plain and self.experts.is_plain and not is_watched(self.experts)

    def _route(
        self,
        x_TD: Tensor,
        sizes: torch.Size,
        real_BS: Tensor | None,
        balance_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Weights and ids of each token's experts; in training with balance losses and counts."""
        if balance_scale is None:
            routing = self.gate(x_TD)
            self.gate.tell(routing.scores_TE, routing.expert_ids_TK, real_BS)
            return routing.weights_TK, routing.expert_ids_TK
        if real_BS is None:
            real_BS = torch.ones(sizes, dtype=torch.bool, device=x_TD.device)
        if self.sum_over_sequence is whole and not self.z_coeff and self.gate.is_plain:
            found = router_node(self.gate, x_TD, real_BS, self.balance_coeff, balance_scale)
            if found is not None:
                return found
        routing = self.gate(x_TD)
        self.gate.tell(routing.scores_TE, routing.expert_ids_TK, real_BS)
        return self._with_balance(routing, real_BS, balance_scale), routing.expert_ids_TK

    def _with_balance(self, routing: Routing, real_BS: Tensor, balance_scale: Tensor) -> Tensor:
        """The routing weights, with balance losses and counts attached to their backward pass."""
        scores_BSE = routing.scores_TE.unflatten(0, real_BS.shape)
        loss = scores_BSE.new_zeros(())
        if self.balance_coeff:
            loss = loss + self.balance_coeff * sequence_balance(
                scores_BSE, self.gate.top_k, real_BS, self.sum_over_sequence
            )
        if self.z_coeff:
            loss = loss + self.z_coeff * router_z(
                routing.logits_TE.view_as(scores_BSE), real_BS, self.sum_over_sequence
            )
        counts_E = count_assignments(
            routing.expert_ids_TK, real_BS.flatten(), self.gate.num_experts
        )
        return attach(
            routing.weights_TK,
            loss * balance_scale,
            counts_E,
            self.gate.balance_loss,
            self.gate.tokens_per_expert,
        )


class GroupedExperts(nn.Module):
    """All experts' SwiGLU weights stacked; computes what ``Expert`` computes, for all at once.

    Attributes:
        local: the part of a stack that is here; replaced where experts lie on several ranks.
        grouped: product of rows and stack; replaced where it is computed in FP8.
        listener: told how many rows there are, each time; not a hook, see ``Router``.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))  # gate
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))  # down
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))  # up
        self.local: Callable[[Tensor], Tensor] = lambda stack: stack
        self.grouped: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_linear
        self.listener: Callable[[int], None] | None = None

    def tell(self, rows: int) -> None:
        """Tell the listener how many rows are computed."""
        if self.listener is not None:
            self.listener(rows)

    def forward(
        self, rows_RD: Tensor, weights_R: Tensor, counts_e: Tensor, decodes: bool = False
    ) -> Tensor:
        """Rows sorted by expert (R, D), their weights, rows per expert (e,) -> (R, D).

        The weights multiply the hidden values, in the wider dtype: these are fewer than results.
        Rows are padded, see ``ops/rows.py``, but where products need none. Tokens that are decoded
        are few: padding would be most of the work, and bitwise isolation of sequences is not
        promised there.
        """
        self.tell(len(rows_RD))
        rows_RD = as_products(rows_RD)  # grouped products are not on autocast's list
        if self.is_plain:
            w1, w3, w2 = (self.local(stack) for stack in (self.w1, self.w3, self.w2))
            y_RD = grouped_feed_forward(rows_RD, weights_R, counts_e, w1, w3, w2)
            if y_RD is not None:
                return y_RD
        skip = rows_RD.device.type == "cpu" and not torch.is_grad_enabled()
        if takes_any_counts(rows_RD) or (decodes and skip):
            return self._weighted(rows_RD, weights_R.unsqueeze(1), counts_e)
        num_rows, num_experts = rows_RD.shape[0], counts_e.shape[0]
        padded_e, slots_R = aligned_slots(counts_e, num_rows, skip)
        num_slots = most_slots(num_rows, num_experts, skip)
        x_PD = spread_rows(rows_RD, slots_R, num_slots)
        weights_P1 = spread_rows(weights_R.unsqueeze(1), slots_R, num_slots)
        return gather_rows(self._weighted(x_PD, weights_P1, padded_e), slots_R)

    def _weighted(self, x_PD: Tensor, weights_P1: Tensor, padded_e: Tensor) -> Tensor:
        gate_PF, up_PF = (self.product(name, x_PD, padded_e) for name in ("w1", "w3"))
        return self.product("w2", swiglu(gate_PF, up_PF, weights_P1), padded_e)

    def few(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor | None:
        """What few tokens get from their experts, without bringing rows there and back; None where
        this can't be done, see ``few_experts``, products are not those of the stacks alone, or
        somebody watches."""
        if not self.is_plain or is_watched(self):
            return None
        w1, w3, w2 = (self.local(stack) for stack in (self.w1, self.w3, self.w2))
        return few_experts(x_TD, expert_ids_TK, weights_TK, w1, w3, w2)

    def make_gradient_rooms(self) -> None:
        """Memory for gradients, in which rows and hidden values lie till these are made; where our
        kernels make them, and they are given to nobody else."""
        stacks = self.w1, self.w2, self.w3
        if not self.is_plain or not takes_any_counts(*stacks):
            return
        for stack in stacks:
            if self.local(stack) is stack and stack.is_leaf and stack.requires_grad:
                make_gradient_room(stack)

    def room_for_rows(self, sizes: Sequence[int]) -> Tensor | None:
        """Memory for rows sorted by expert, where there is some, and no hook is shown the rows,
        which may keep them; see ``make_gradient_rooms``."""
        return None if is_watched(self) else lent_room(self.w2, sizes)

    @property
    def is_plain(self) -> bool:
        """Whether products are those of the stacks alone."""
        return type(self) is GroupedExperts and self.grouped is grouped_linear

    def product(self, name: str, x_PI: Tensor, padded_e: Tensor) -> Tensor:
        """Rows sorted by expert (P, I), with the stack ``name`` -> (P, O)."""
        return self.grouped(x_PI, self.matrix(name, x_PI.dtype), padded_e)

    def matrix(self, name: str, dtype: torch.dtype) -> Tensor:
        """The stack ``name`` of the experts that are here."""
        stack = self.local(getattr(self, name))
        return stack.to(dtype) if stack.is_floating_point() else stack  # packed rows

    @torch.no_grad()
    def expert(self, index: int) -> Expert:
        """A copy of one expert in its readable form."""
        _, hidden_dim, dim = self.w1.shape
        single = Expert(dim, hidden_dim).to(self.w1)
        for name in ("w1", "w2", "w3"):
            getattr(single, name).weight.copy_(getattr(self, name)[index])
        return single
