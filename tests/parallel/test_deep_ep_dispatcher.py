"""DeepEP behind the seam: on CPU against a stand-in for its documented interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.models.components.dispatcher import TokenDispatcher
from deepseek.parallel.deep_ep_dispatcher import DeepEPDispatcher
from deepseek.parallel.expert_dispatcher import AllToAllDispatcher, build_dispatcher
from support.ranks import run_ranks

EXPERTS, TOP_K, DIM = 8, 3, 16


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class StandIn:
    """``deep_ep.Buffer`` on gloo: a token goes once to each rank that has one of its experts.

    Rows arrive by source rank; ``combine`` adds up what all ranks made of a token, without weights.
    """

    made: list[tuple[int, int]] = []

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group = group
        self.made.append((num_nvl_bytes, num_rdma_bytes))

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda row_bytes, ranks: 10 * row_bytes * ranks,
            get_rdma_buffer_size_hint=lambda row_bytes, ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> Any:
        ranks = dist.get_world_size(self.group)
        chosen_RE = torch.zeros(len(topk_idx), num_experts, dtype=torch.int32)
        chosen_RE.scatter_(1, topk_idx, 1)
        is_in_rank = chosen_RE.unflatten(1, (ranks, -1)).amax(dim=-1).bool()
        per_rank = is_in_rank.sum(dim=0).to(torch.int32)
        return per_rank, None, chosen_RE.sum(dim=0).to(torch.int32), is_in_rank, None

    def dispatch(self, x: Tensor, handle: Any = None, **kwargs: Any) -> Any:
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] % 8 == 0
        if handle is not None:
            assert not kwargs
            return self._send(x, handle["is_in_rank"])[0], None, None, None, None, None
        ids, weights = kwargs["topk_idx"], kwargs["topk_weights"]
        assert ids.dtype == torch.int64 and weights.dtype == torch.float32
        rows, counts = self._send(x, kwargs["is_token_in_rank"])
        assert torch.equal(kwargs["num_tokens_per_rank"], kwargs["is_token_in_rank"].sum(dim=0))
        local = len(kwargs["num_tokens_per_expert"]) // dist.get_world_size(self.group)
        ids = self._send(ids, kwargs["is_token_in_rank"])[0] - local * dist.get_rank(self.group)
        ids = ids.where((ids >= 0) & (ids < local), -1)
        per_expert = [int((ids == expert).sum()) for expert in range(local)]
        handle = {"is_in_rank": kwargs["is_token_in_rank"], "received": counts}
        return rows, ids, weights, per_expert, handle, None

    def combine(self, x: Tensor, handle: Any) -> Any:
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        is_in_rank = handle["is_in_rank"]
        there = is_in_rank.sum(dim=0).tolist()
        back = x.new_empty(sum(there), x.shape[1])
        dist.all_to_all_single(back, x, there, handle["received"], group=self.group)
        total = torch.zeros(len(is_in_rank), x.shape[1])
        for mine, part in zip(is_in_rank.unbind(1), back.split(there), strict=True):
            total[mine] += part.float()
        return total.bfloat16(), None, None

    def _send(self, x: Tensor, is_in_rank: Tensor) -> tuple[Tensor, list[int]]:
        there = is_in_rank.sum(dim=0)
        received = torch.empty_like(there)
        dist.all_to_all_single(received, there, group=self.group)
        rows = torch.cat([x[mine] for mine in is_in_rank.unbind(1)])
        out = x.new_empty(int(received.sum()), x.shape[1])
        dist.all_to_all_single(out, rows, received.tolist(), there.tolist(), group=self.group)
        return out, received.tolist()


def install() -> None:
    """In a rank, which ends with its test."""
    module = ModuleType("deep_ep")
    module.Buffer = StandIn  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module


def inputs(rank: int, dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts, and fp32 weights; some ranks get few."""
    generator = torch.Generator().manual_seed(rank)
    tokens = [5, 0, 9, 2][rank]
    scores_TE = torch.rand(tokens, EXPERTS, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(TOP_K, dim=-1, sorted=False)
    return torch.randn(tokens, dim, generator=generator).to(dtype), ids_TK, weights_TK


def through(
    dispatcher: TokenDispatcher, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, autocast: bool
) -> tuple[Tensor, ...]:
    """Rows and counts at the experts, the result, and gradients of tokens and weights."""
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sent = dispatcher.dispatch(x_TD, ids_TK)
        y_TD = dispatcher.combine(sent.rows_RD.square(), weights_TK, sent)
    y_TD.float().square().sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    return sent.rows_RD.detach(), sent.counts_e, y_TD.detach(), x_TD.grad, weights_TK.grad


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "autocast", "dim", "over_deep_ep"),
    [
        (torch.bfloat16, False, DIM, True),
        (torch.float32, True, DIM, True),
        (torch.float32, False, DIM, False),
        (torch.bfloat16, False, 4, False),
    ],
    ids=["bf16", "autocast", "fp32 goes over all-to-all", "short rows go over all-to-all"],
)
def test_bitwise_as_all_to_all(
    world_size: int, dtype: torch.dtype, autocast: bool, dim: int, over_deep_ep: bool
) -> None:
    def work(rank: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
        install()
        StandIn.made = []
        case = inputs(rank, dtype, dim)
        ours = through(DeepEPDispatcher(EXPERTS, group()), *case, autocast=autocast)
        theirs = through(AllToAllDispatcher(EXPERTS, group()), *case, autocast=autocast)
        return ours, theirs, len(StandIn.made)

    for ours, theirs, num_buffers in run_ranks(world_size, work):
        assert num_buffers == int(over_deep_ep)
        for got, wanted in zip(ours, theirs, strict=True):
            assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_layers_share_a_buffer() -> None:
    def work(rank: int) -> list[tuple[int, int]]:
        install()
        StandIn.made = []
        for _ in range(3):
            DeepEPDispatcher(EXPERTS, group()).dispatch(*inputs(rank, torch.bfloat16)[:2])
        return StandIn.made

    assert run_ranks(2, work) == [[(10 * 2 * DIM * 2, 0)]] * 2


def test_which_dispatcher_is_built() -> None:
    """DeepEP only where it is installed, on GPUs, in a group of a size that it knows."""

    def work(rank: int) -> list[str]:
        names = [type(build_dispatcher(EXPERTS, group(), "cuda")).__name__]
        install()
        for device_type in ("cpu", "cuda"):
            names.append(type(build_dispatcher(EXPERTS, group(), device_type)).__name__)
        return names

    ours, deep_ep = "AllToAllDispatcher", "DeepEPDispatcher"
    assert run_ranks(2, work) == [[ours, ours, deep_ep]] * 2
    assert run_ranks(1, work) == [[ours, ours, ours]]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs with DeepEP")
def test_on_gpus(tmp_path: Path) -> None:
    pytest.importorskip("deep_ep")
    torch.multiprocessing.spawn(on_one_gpu, args=(f"file://{tmp_path}/store",), nprocs=2)


def on_one_gpu(rank: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=2)
    case = [tensor.cuda() for tensor in inputs(2 * rank, torch.bfloat16)]
    ours = through(DeepEPDispatcher(EXPERTS, group()), *case, autocast=False)
    theirs = through(AllToAllDispatcher(EXPERTS, group()), *case, autocast=False)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)
    dist.destroy_process_group()
