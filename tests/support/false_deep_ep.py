"""A stand-in for DeepEP 2 on gloo: it takes what the original takes, and no more.

Signatures are those of 2.0's ``ElasticBuffer`` and 2.5's ``EPBuffer``, for the layout of a row for
each received token. It is as strict, and promises as little: tokens arrive in a random order, but
for a second dispatch by the same handle; what is under way holds nothing that could be taken for
numbers until it is waited for; weights of choices that lie elsewhere arrive too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64
NEVER = float("nan")


@dataclass
class Handle:
    """``EPHandle``, of which only the counts are read by others."""

    num_experts: int
    num_max_tokens_per_rank: int
    topk_idx: Tensor
    version: int
    """Of ``topk_idx``, which must not change."""
    num_recv_tokens_per_expert_list: list[int]
    token_P: Tensor
    """Of each row sent, by rank."""
    sent: list[int]
    received: list[int]
    order_Q: Tensor
    """In which rows are laid down."""
    local_QK: Tensor


class Event:
    """``EventOverlap``: what was under way is there once it was waited for."""

    def __init__(self, arriving: list[tuple[Tensor, Tensor]]) -> None:
        self.arriving = arriving

    def current_stream_wait(self) -> None:
        with torch.no_grad():  # as a kernel would
            for empty, found in self.arriving:
                empty.detach().copy_(found)
        self.arriving = []


class _Buffer:
    made: list[tuple[int, ...]]

    def _begin(
        self, group: dist.ProcessGroup, tokens: int, hidden: int, top_k: int, seconds: Any
    ) -> None:
        assert tokens > 0 and hidden > 0 and 0 < top_k <= 32
        told: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(told, (tokens, hidden, top_k), group=group)
        assert len(set(told)) == 1, "ranks disagree on the buffer"
        self.group, self.tokens, self.hidden, self.top_k = group, tokens, hidden, top_k
        self.made.append((tokens, hidden, top_k, *seconds))

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        assert num_experts % dist.get_world_size(self.group) == 0
        return 2 * num_topk

    def _dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_experts: int | None,
        num_max_tokens_per_rank: int | None,
        expert_alignment: int | None,
        num_sms: int,
        under_way: bool,
        handle: Handle | None,
    ) -> Any:
        ids_TK = handle.topk_idx if topk_idx is None and handle else topk_idx
        assert ids_TK is not None
        if num_sms == 0:  # counted before the handle is looked at
            num_sms = self.get_theoretical_num_sms(num_experts, ids_TK.shape[1])  # type: ignore[arg-type]
        assert num_max_tokens_per_rank in (None, self.tokens) and expert_alignment in (None, 1)
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] == self.hidden
        assert x.shape[1] * 2 % 16 == 0 and x.shape[0] <= self.tokens
        assert ids_TK.dtype == topk_idx_t and ids_TK.is_contiguous()
        assert ids_TK.shape == (len(x), self.top_k)
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
            assert topk_weights.shape == ids_TK.shape
        local_QK = None
        if handle is None:
            assert num_experts is not None
            handle = self._handle(ids_TK, num_experts)
            local_QK = handle.local_QK
        else:
            assert topk_idx is None and ids_TK._version == handle.version
        found = [self._to(x, handle), local_QK]
        found.append(None if topk_weights is None else self._to(topk_weights, handle))
        if not under_way:
            return *found, handle, Event([])
        empty = [
            None if one is None else torch.full_like(one, -7 if one is local_QK else NEVER)
            for one in found
        ]
        arriving = [(a, b) for a, b in zip(empty, found, strict=True) if a is not None]
        return *empty, handle, Event(arriving)  # type: ignore[arg-type]

    def _handle(self, ids_TK: Tensor, num_experts: int) -> Handle:
        ranks, me = dist.get_world_size(self.group), dist.get_rank(self.group)
        local = num_experts // ranks
        goes_nT = torch.stack([(ids_TK // local == rank).any(dim=1) for rank in range(ranks)])
        token_P = torch.cat([goes_T.nonzero().flatten() for goes_T in goes_nT])
        sent = goes_nT.sum(dim=1).tolist()
        received = self._exchange(torch.tensor(sent), [1] * ranks, [1] * ranks).tolist()
        ids_QK = self._exchange(ids_TK[token_P], sent, received)
        _order.manual_seed(_order.initial_seed() + 1)
        order_Q = torch.randperm(len(ids_QK), generator=_order)
        here = ids_QK // local == me
        local_QK = torch.where(here, ids_QK % local, -1)[order_Q]
        counts = torch.bincount(local_QK[local_QK >= 0], minlength=local).tolist()
        version = ids_TK._version
        return Handle(
            num_experts, self.tokens, ids_TK, version, counts, token_P, sent, received, order_Q,
            local_QK,
        )  # fmt: skip

    def _combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None) -> Any:
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        assert x.shape == (len(handle.order_Q), self.hidden)
        assert handle.topk_idx._version == handle.version
        y_TD = self._home(x.float(), handle).to(x.dtype)
        if topk_weights is None:
            return y_TD, None, Event([])
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert topk_weights.shape == handle.local_QK.shape
        assert not topk_weights[handle.local_QK < 0].any(), "gradients of choices elsewhere"
        return y_TD, self._home(topk_weights, handle), Event([])

    def _to(self, x: Tensor, handle: Handle) -> Tensor:
        return self._exchange(x[handle.token_P], handle.sent, handle.received)[handle.order_Q]

    def _home(self, y: Tensor, handle: Handle) -> Tensor:
        y_Q = torch.empty_like(y).index_copy_(0, handle.order_Q, y)
        y_P = self._exchange(y_Q, handle.received, handle.sent)
        total = y.new_zeros(len(handle.topk_idx), *y.shape[1:])
        return total.index_add_(0, handle.token_P, y_P)

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group)
        return out


_order = torch.Generator().manual_seed(0)


class ElasticBuffer(_Buffer):
    """Of 2.0."""

    made = []

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_bytes is None and explicitly_destroy, "its destructor waits for all ranks"
        seconds = num_cpu_timeout_secs, num_gpu_timeout_secs
        self._begin(group, num_max_tokens_per_rank, hidden, num_topk, seconds)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Handle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> Any:
        assert not do_expand and (handle is None or not do_cpu_sync)
        return self._dispatch(
            x, topk_idx, topk_weights, num_experts, num_max_tokens_per_rank, expert_alignment,
            num_sms, async_with_compute_stream, handle,
        )  # fmt: skip

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        return self._combine(x, handle, topk_weights)


class EPBuffer(_Buffer):
    """Of 2.5."""

    made = []

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        lb_allocation_plan_or_num_bytes: Any = 0,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int | None = None,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_bytes is None and explicitly_destroy, "its destructor waits for all ranks"
        seconds = num_cpu_timeout_secs, num_gpu_timeout_secs
        self._begin(group, num_max_tokens_per_rank, hidden, num_topk, seconds)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Handle | None = None,
        do_handle_copy: bool = False,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        defer_epilogue: bool = False,
    ) -> Any:
        assert not do_handle_copy and not do_expand and not defer_epilogue
        assert handle is None or not do_cpu_sync
        return self._dispatch(
            x, topk_idx, topk_weights, num_experts, num_max_tokens_per_rank, expert_alignment,
            num_sms, async_with_compute_stream, handle,
        )  # fmt: skip

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        defer_epilogue: bool = False,
    ) -> Any:
        assert not defer_epilogue
        return self._combine(x, handle, topk_weights)


def install(version: str = "2.5") -> type[_Buffer] | None:
    """In a rank, which ends with its test. Returns the class of buffers; 1.2 has none of these."""
    module = ModuleType("deep_ep")
    module.__version__ = f"{version}.0"  # type: ignore[attr-defined]
    module.topk_idx_t = topk_idx_t  # type: ignore[attr-defined]
    kind = {"2.5": EPBuffer, "2.0": ElasticBuffer}.get(version)
    if kind is not None:
        kind.made = []
        setattr(module, kind.__name__, kind)
    sys.modules["deep_ep"] = module
    return kind
