"""Expert parallelism over DeepEP's GPU kernels (github.com/deepseek-ai/DeepEP, version 2).

A token's row goes once to each rank that has experts of its, with all its choices; between machines
DeepEP's hybrid mode sends it once to each of these. There a row is made for each local expert, and
what these give is added up before it goes home.

Written to the interface that 2.0 has as ``ElasticBuffer`` and 2.5 as ``EPBuffer``; no GPU has run
it yet. Tests run it on CPUs over a stand-in that takes what the original takes, and no more.

T tokens, K choices per token, Q tokens received, e local experts, R rows of experts, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.config.schema import ModelConfig
from deepseek.models.components.dispatcher import Dispatched
from deepseek.models.components.recompute import keep
from deepseek.ops.autocast import as_products
from deepseek.ops.rows import add_rows, inverse_permutation, take_rows
from deepseek.parallel.collectives import LinearMap
from deepseek.parallel.mesh import Meshes

MOST_CHOICES = 32
"""Of a token, in DeepEP's kernels."""


def deep_ep_buffer() -> Any:
    """The class of buffers of the DeepEP that is installed.

    Raises:
        ImportError: none is, or one older than 2.0.
    """
    import deep_ep

    for name in ("EPBuffer", "ElasticBuffer"):
        if hasattr(deep_ep, name):
            return getattr(deep_ep, name)
    version = getattr(deep_ep, "__version__", "of an unknown version")
    raise ImportError(f"deep_ep {version} has no EPBuffer or ElasticBuffer, as 2.0 and later have")


class DeepEPDispatcher:
    """``TokenDispatcher`` over DeepEP, for rows of bf16.

    The host waits once a layer, for the counts. Arguments and order of calls as
    ``AllToAllDispatcher``.

    Args:
        num_experts: all experts; a multiple of the group's size.
        group: the EP group.
        most_tokens: T of any rank, at most; the same on all of them.
        seconds: after which a rank that does not come is given up.
    """

    def __init__(
        self, num_experts: int, group: dist.ProcessGroup, most_tokens: int, seconds: int
    ) -> None:
        self.num_experts, self.group = num_experts, group
        self.most_tokens, self.seconds = most_tokens, seconds

    @classmethod
    def of(cls, num_experts: int, meshes: Meshes, config: ModelConfig) -> DeepEPDispatcher:
        """For the tokens that a rank has of a micro-batch."""
        tokens = config.micro_batch_size * config.data.seq_length
        most_tokens = -(-tokens // (meshes.layout.tp * meshes.layout.cp))
        return cls(num_experts, meshes.ep, most_tokens, int(meshes.step_timeout.total_seconds()))

    @torch.compiler.disable
    def dispatch(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Dispatched:
        """Send each token to the ranks of its experts; rows are sorted by local expert."""
        x_TD = as_products(x_TD)
        assert x_TD.dtype == torch.bfloat16, "config/layout_rules.py refuses other precisions"
        # DeepEP promises no order of what arrives, but for another dispatch by the same handle.
        exchange = keep(lambda: self._exchange(x_TD, expert_ids_TK))
        rows_QD, weights_QK = _Dispatch.apply(x_TD, weights_TK.float(), exchange)
        computed = meanwhile()
        exchange.wait()
        plan = keep(exchange.plan)
        slots_N1 = plan.slots_QK.view(-1, 1)
        return Dispatched(
            take_rows(rows_QD, plan.token_R, plan.slots_QK),
            take_rows(weights_QK.reshape(-1, 1), plan.choice_R, slots_N1).squeeze(1),
            plan.counts_e,
            (exchange, plan),
            computed,
        )

    @torch.compiler.disable
    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """Add a token's results up on each rank, bring the sums home, and add these up."""
        exchange, plan = sent.state
        y_QD = add_rows(y_RD, plan.slots_QK, plan.token_R)
        return LinearMap.apply(y_QD, exchange.combine, exchange.send)

    def _exchange(self, x_TD: Tensor, expert_ids_TK: Tensor) -> _Exchange:
        dim, top_k = x_TD.shape[1], expert_ids_TK.shape[1]
        buffer = _buffer(self.group, self.most_tokens, dim, top_k, self.seconds)
        return _Exchange(buffer, self.num_experts, expert_ids_TK)


@functools.cache
def _buffer(group: dist.ProcessGroup, most_tokens: int, dim: int, top_k: int, seconds: int) -> Any:
    """The communication buffer of a group, one for all layers; making it is a collective."""
    return deep_ep_buffer()(
        group,
        num_max_tokens_per_rank=most_tokens,
        hidden=dim,
        num_topk=top_k,
        num_cpu_timeout_secs=seconds,
        num_gpu_timeout_secs=seconds,
        # It lasts as long as the process. Its destructor would wait for all ranks, also where one
        # is lost, and after the process group has gone.
        explicitly_destroy=True,
    )


class _Exchange:
    """One exchange of rows: dispatched first, then combined and dispatched as autograd asks.

    Attributes:
        handle: DeepEP's, once it has been dispatched; by it any other rows go the same ways.
        local_QK: the local expert of each choice of a received token; -1 where it lies elsewhere.
        weights_QK: the weights of these choices.
    """

    def __init__(self, buffer: Any, num_experts: int, expert_ids_TK: Tensor) -> None:
        import deep_ep

        self.buffer = buffer
        self.num_experts = num_experts
        self.expert_ids_TK = expert_ids_TK.to(deep_ep.topk_idx_t).contiguous()
        # Of an own call: DeepEP counts them by the experts, which a handle alone does not tell it.
        self.num_sms = buffer.get_theoretical_num_sms(num_experts, expert_ids_TK.shape[1])
        self.handle: Any = None
        self.local_QK: Tensor
        self.weights_QK: Tensor
        self._under_way: Any = None

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D), (T, K) -> (Q, D), (Q, K), to be used after ``wait``."""
        x_TD = x_TD.contiguous()
        if self.handle is None:
            rows_QD, self.local_QK, weights_QK, self.handle, self._under_way = self.buffer.dispatch(
                x_TD,
                topk_idx=self.expert_ids_TK,
                topk_weights=weights_TK.contiguous(),
                num_experts=self.num_experts,
                num_sms=self.num_sms,
                async_with_compute_stream=True,
            )
            self.weights_QK = weights_QK.detach()
        else:  # in a recomputation; the weights are those of the first time, and few
            rows_QD, _, _, _, self._under_way = self.buffer.dispatch(
                x_TD, handle=self.handle, num_sms=self.num_sms, async_with_compute_stream=True
            )
        return rows_QD, self.weights_QK.detach()

    def wait(self) -> None:
        """Until what was dispatched has arrived: for the stream of the GPU, not for the host."""
        self._under_way.current_stream_wait()
        self._under_way = None

    def plan(self) -> _Plan:
        """Which rows of experts the received tokens become; after ``wait``."""
        counts = self.handle.num_recv_tokens_per_expert_list
        local_N = self.local_QK.flatten().long()
        # Choices that lie elsewhere come last, and are cut off.
        order_N = local_N.where(local_N >= 0, len(counts)).argsort(stable=True)
        choice_R = order_N[: sum(counts)]
        slots_QK = inverse_permutation(order_N).clamp(max=len(choice_R)).view_as(self.local_QK)
        token_R = torch.div(choice_R, self.local_QK.shape[1], rounding_mode="floor")
        counts_e = torch.tensor(counts, device=local_N.device)
        return _Plan(token_R, choice_R, slots_QK, counts_e)

    def send(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (Q, D): other rows, as the first were dispatched."""
        rows_QD, *_ = self.buffer.dispatch(
            x_TD.contiguous(), handle=self.handle, num_sms=self.num_sms
        )
        return rows_QD

    def combine(self, y_QD: Tensor) -> Tensor:
        """(Q, D) -> (T, D): the sum of what the ranks have for a token."""
        y_TD, *_ = self.buffer.combine(y_QD.contiguous(), self.handle, num_sms=self.num_sms)
        return y_TD

    def combine_weighted(self, y_QD: Tensor, weights_QK: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, D), (Q, K) -> (T, D), (T, K); 0 for choices that lie elsewhere."""
        y_TD, weights_TK, _ = self.buffer.combine(
            y_QD.contiguous(),
            self.handle,
            topk_weights=weights_QK.contiguous(),
            num_sms=self.num_sms,
        )
        return y_TD, weights_TK


class _Dispatch(torch.autograd.Function):
    """Rows and their weights, both ways."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, exchange: _Exchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        return exchange.dispatch(x_TD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_QD: Tensor, grad_QK: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.exchange.combine_weighted(grad_QD, grad_QK), None


@dataclass(frozen=True)
class _Plan:
    """How received tokens become rows of experts, and these tokens again."""

    token_R: Tensor
    """The received token of each row."""
    choice_R: Tensor
    """Token x K + choice, of each."""
    slots_QK: Tensor
    """A token's rows; R for choices that lie elsewhere."""
    counts_e: Tensor
