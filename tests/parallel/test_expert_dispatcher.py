"""Experts on several ranks against all experts in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseek.config import ModelConfig, UserError
from deepseek.config.layout import Layout
from deepseek.config.schema import DataConfig
from deepseek.models.components.dispatcher import LocalDispatcher, TokenDispatcher
from deepseek.models.components.moe import GroupedExperts, MoE
from deepseek.models.components.recompute import recomputed
from deepseek.models.components.router import Router
from deepseek.ops.autocast import as_products
from deepseek.ops.fp8_linear import round_rows
from deepseek.parallel import collectives, cpu_exchange
from deepseek.parallel.deepep_dispatcher import DeepEPDispatcher
from deepseek.parallel.expert_dispatcher import AllToAllDispatcher, build_dispatcher
from deepseek.parallel.node_dispatcher import NodeDispatcher
from support import false_deep_ep
from support.device_waits import watched
from support.exchanges import without_shared_memory
from support.ranks import run_ranks

DIM, HIDDEN, LENGTH = 16, 8, 3


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


# -- the whole layer --


@dataclass(frozen=True)
class Case:
    """A layer, and how many sequences each rank feeds it."""

    experts_per_rank: int
    top_k: int
    sequences: list[int]
    idle: frozenset[int] = frozenset()
    """Experts that no token may choose."""
    per_node: int | None = None
    """Ranks of a machine, to which a token travels once."""

    @property
    def num_experts(self) -> int:
        return self.experts_per_rank * len(self.sequences)

    def layer(self, dtype: torch.dtype) -> MoE:
        router = Router(
            dim=DIM,
            num_experts=self.num_experts,
            top_k=self.top_k,
            num_groups=1,
            top_k_groups=1,
            scoring="sigmoid",
            topk_method="noaux_tc",
            normalise=self.top_k > 1,  # a single weight would be 1, its gradient all rounding
            scaling_factor=2.5,
        )
        layer = MoE(
            dim=DIM,
            hidden_dim=HIDDEN,
            num_shared_experts=1,
            router=router,
            balance_coeff=0.1,
            z_coeff=0.1,
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(0.0, 0.4, generator=generator)
            assert router.bias is not None
            router.bias[list(self.idle)] = -10.0
        return layer.to(dtype)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [
            torch.randn(count, LENGTH, DIM, generator=generator, dtype=torch.float64).to(dtype)
            for count in self.sequences
        ]


@dataclass(frozen=True)
class Seen:
    """What a layer computed."""

    y_BSD: Tensor
    grad_BSD: Tensor
    gradients: dict[str, Tensor]
    tokens_per_expert: Tensor
    balance_loss: Tensor


def see(layer: MoE, x_BSD: Tensor) -> Seen:
    """Forward and backward; the loss bends, so that every row's gradient differs."""
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD = layer(x_BSD, balance_scale=torch.tensor(0.25))
    y_BSD.square().sum().backward()
    assert x_BSD.grad is not None
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(layer.parameters()))
    gate = layer.gate
    return Seen(y_BSD.detach(), x_BSD.grad, gradients, gate.tokens_per_expert, gate.balance_loss)


def layer_of(rank: int, case: Case, dtype: torch.dtype) -> MoE:
    """With this rank's experts."""
    layer = case.layer(dtype)
    mine = slice(rank * case.experts_per_rank, (rank + 1) * case.experts_per_rank)
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(weight.detach()[mine].clone()))
    layer.dispatcher = dispatcher_of(rank, case.num_experts, case.per_node)
    return layer


def on_one_rank(rank: int, case: Case, dtype: torch.dtype) -> Seen:
    return see(layer_of(rank, case, dtype), case.inputs(dtype)[rank])


def dispatcher_of(
    rank: int, num_experts: int, per_node: int | None, fp8: bool = False
) -> AllToAllDispatcher | NodeDispatcher:
    """Between all ranks, so many of which stand in one machine."""
    if per_node is None:
        return AllToAllDispatcher(num_experts, group(), fp8)
    ranks_MG = torch.arange(dist.get_world_size()).view(-1, per_node)
    across, inside = (
        {member: made for members in part.tolist() for made in [dist.new_group(members)]
         for member in members}[rank]
        for part in (ranks_MG.mT, ranks_MG)
    )  # fmt: skip
    return NodeDispatcher(num_experts, across, inside, fp8)


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    error = (got - wanted).abs().max() if wanted.numel() else torch.zeros(())
    assert error <= tolerance * max(wanted.abs().max().item() if wanted.numel() else 0.0, 1e-30)


def assert_like_one_process(case: Case, dtype: torch.dtype) -> Seen:
    whole = see(case.layer(dtype), torch.cat(case.inputs(dtype)))
    ranks = run_ranks(len(case.sequences), on_one_rank, case, dtype)
    assert_near(torch.cat([seen.y_BSD for seen in ranks]), whole.y_BSD, dtype)
    assert_near(torch.cat([seen.grad_BSD for seen in ranks]), whole.grad_BSD, dtype)
    for name, wanted in whole.gradients.items():
        parts = torch.stack([seen.gradients[name] for seen in ranks])
        got = parts.flatten(0, 1) if name.startswith("experts.") else parts.sum(dim=0)
        assert_near(got, wanted, dtype)
    counts = torch.stack([seen.tokens_per_expert for seen in ranks]).sum(dim=0)
    assert torch.equal(counts, whole.tokens_per_expert)
    balance = torch.stack([seen.balance_loss for seen in ranks]).sum(dim=0)
    assert_near(balance, whole.balance_loss, torch.float32)  # kept in fp32
    return whole


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_ranks = draw(st.sampled_from([2, 3, 4]))
    experts_per_rank = draw(st.integers(1, 3))
    num_experts = num_ranks * experts_per_rank
    top_k = draw(st.integers(1, min(num_experts, 4)))
    idle = draw(st.permutations(range(num_experts)))[: draw(st.integers(0, num_experts - top_k))]
    sequences = draw(st.lists(st.integers(0, 3), min_size=num_ranks, max_size=num_ranks))
    per_node = draw(st.sampled_from([None, 2])) if num_ranks == 4 else None
    sequences[0] += 1
    return Case(experts_per_rank, top_k, sequences, frozenset(idle), per_node)


@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_any_case(case: Case, dtype: torch.dtype) -> None:
    assert_like_one_process(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, [2, 2]),
        Case(2, 3, [2, 1, 3, 1]),
        Case(2, 4, [1] * 8),
        Case(1, 2, [1, 2, 1, 2]),
        Case(1, 1, [2, 2, 2, 2]),
        Case(2, 2, [2, 2], frozenset({0, 1})),
        Case(2, 2, [2, 2, 1, 1], frozenset({0, 1, 2, 3, 6, 7})),
        Case(2, 2, [0, 3]),
        Case(2, 2, [0, 3], frozenset({2, 3})),
        Case(2, 4, [2, 0, 1, 3], per_node=2),
        Case(1, 2, [1, 2, 0, 2], frozenset({0, 1}), per_node=2),
    ],
    ids=[
        "2 ranks",
        "4 ranks",
        "8 ranks",
        "one expert per rank",
        "top-1",
        "no token for rank 0",
        "all tokens for rank 2",
        "rank 0 has no tokens",
        "rank 0 has no tokens and does all the work",
        "2 machines of 2 ranks",
        "2 machines, one without work",
    ],
)
def test_named_case(case: Case, dtype: torch.dtype) -> None:
    whole = assert_like_one_process(case, dtype)
    assert not whole.tokens_per_expert[list(case.idle)].any(), "the idle experts are not idle"


# -- the seam --


def rows(case_seed: int, tokens: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(case_seed)
    return torch.randn(tokens, DIM, generator=generator).to(dtype)


def choices(seed: int, tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Experts of each token, and fp32 weights."""
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(tokens, num_experts, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1, sorted=False)
    return ids_TK, weights_TK


def experts(first: int, count: int) -> GroupedExperts:
    """Some of the same many."""
    whole = GroupedExperts(8, DIM, HIDDEN)
    part = GroupedExperts(count, DIM, HIDDEN)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            weight.normal_(0.0, 0.4, generator=generator)
            getattr(part, name).copy_(weight[first : first + count])
    return part


Pass = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def through(
    dispatcher: TokenDispatcher,
    part: GroupedExperts,
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    autocast: bool,
) -> Pass:
    """Result, gradients of tokens and weights, gradients of the experts."""
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sent = dispatcher.dispatch(x_TD, weights_TK, ids_TK)
        y_RD = part(sent.rows_RD, sent.weights_R, sent.counts_e)
        y_TD = dispatcher.combine(y_RD, sent)
    y_TD.float().square().sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    return (
        y_TD.detach(),
        x_TD.grad,
        weights_TK.grad,
        [p.grad for p in part.parameters() if p.grad is not None],
    )


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["fp32", "autocast", "bf16"],
)
def test_bitwise_as_on_one_rank(dtype: torch.dtype, autocast: bool) -> None:
    """Given the choices, every dtype and every bit is that of ``LocalDispatcher``."""
    tokens = [5, 0, 9, 2]
    x_TD = rows(0, sum(tokens), dtype)
    ids_TK, weights_TK = choices(1, sum(tokens), 8, 3)

    def work(rank: int) -> Pass:
        mine = [part.split(tokens)[rank] for part in (x_TD, ids_TK, weights_TK)]
        weights = experts(2 * rank, 2).to(dtype)
        return through(AllToAllDispatcher(8, group()), weights, *mine, autocast=autocast)

    whole = through(
        LocalDispatcher(8), experts(0, 8).to(dtype), x_TD, ids_TK, weights_TK, autocast=autocast
    )
    ranks = run_ranks(4, work)
    assert whole[0].dtype == (torch.bfloat16 if autocast else dtype)
    for i in range(3):
        parts = [seen[i] for seen in ranks]
        assert {part.dtype for part in parts} == {whole[i].dtype}
        assert torch.equal(torch.cat(parts), whole[i])
    for i, wanted in enumerate(whole[3]):
        assert torch.equal(torch.cat([seen[3][i] for seen in ranks]), wanted)


def test_where_rows_arrive() -> None:
    """Sorted by local expert, then by source rank, then as the tokens stood."""
    ids_TK = [torch.tensor([[3, 0], [1, 3]]), torch.tensor([[0, 3], [3, 2], [3, 1]])]

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
        x_TD = 10.0 * rank + torch.arange(len(ids_TK[rank])).unsqueeze(1)
        dispatcher = AllToAllDispatcher(4, group())
        sent = dispatcher.dispatch(x_TD, torch.full(ids_TK[rank].shape, 0.5), ids_TK[rank])
        back_TD = dispatcher.combine(sent.rows_RD * sent.weights_R.unsqueeze(1), sent)
        assert torch.equal(back_TD, x_TD), "experts that do nothing give the tokens back"
        counts = sent.state.send_counts, sent.state.receive_counts
        return sent.rows_RD.flatten(), sent.counts_e, x_TD, *counts

    first, second = run_ranks(2, work)
    assert first[0].tolist() == [0, 10, 1, 12]  # expert 0, expert 1
    assert first[1].tolist() == [2, 2]
    assert second[0].tolist() == [11, 0, 1, 10, 11, 12]  # expert 2, expert 3
    assert second[1].tolist() == [1, 5]
    assert [first[3:], second[3:]] == [([2, 2], [2, 2]), ([2, 4], [2, 4])]
    assert first[1].dtype == torch.int64


def recorded(work: Callable[[], object]) -> list[tuple[torch.dtype, int]]:
    """Data type and numbers sent by each all-to-all."""
    calls = []
    send = dist.all_to_all_single

    def watched(out: Tensor, x: Tensor, *args: object, **kwargs: object) -> object:
        calls.append((x.dtype, x.numel()))
        return send(out, x, *args, **kwargs)

    with without_shared_memory(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", watched)
        work()
    return calls


def crossing(calls: list[tuple[Tensor, list[int] | None, list[int]]], rank: int) -> int:
    """Bytes of rows that leave the machine of a rank; two machines of two ranks."""
    return sum(
        to * sent.nbytes // max(len(sent), 1)
        for sent, counts, members in calls
        for member, to in zip(members, counts or [0] * len(members), strict=True)
        if member // 2 != rank // 2
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_token_travels_once_to_each_machine(autocast: bool, fp8: bool) -> None:
    """Bytes between machines: there a row for each machine of a token's experts, not for each of
    these, with all its weights and choices; home one sum. In FP8 half of those that go to experts.
    """
    ids_TK, weights_TK = choices(1, 6, 8, 4)
    dim, top_k = 256, 4

    def work(rank: int) -> list[int]:
        found, send = [], dist.all_to_all_single
        calls: list[Any] = []

        def watched(out: Tensor, x: Tensor, *sizes: Any, **named: Any) -> Any:
            counts = sizes[1] if sizes and set(sizes[1]) != {1} else None  # of rows, not the counts
            calls.append((x, counts, dist.get_process_group_ranks(named["group"])))
            return send(out, x, *sizes, **named)

        for dispatcher in (dispatcher_of(rank, 8, None, fp8), dispatcher_of(rank, 8, 2, fp8)):
            calls.clear()
            x_TD = torch.randn(len(ids_TK), dim).requires_grad_()
            with without_shared_memory(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_to_all_single", watched)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    sent = dispatcher.dispatch(x_TD, weights_TK, ids_TK)
                    y_TD = dispatcher.combine(sent.rows_RD, sent)
                found.append(crossing(calls, rank))
                calls.clear()
                (y_TD.float().square().sum() + sent.weights_R.sum()).backward()
                found.append(crossing(calls, rank))
        return found

    number = 2 if autocast else 4
    narrow = dim + dim // 128 if fp8 else number * dim
    for rank, (there, back, there_once, back_once) in enumerate(run_ranks(4, work)):
        other = ids_TK // 4 == 1 - rank // 2
        rows, once = int(other.sum()), int(other.any(dim=1).sum())
        # What two others have sent here goes home; all have sent the same, and rank by rank.
        home = 2 * int((ids_TK // 2 == rank).sum())
        home_once = int((ids_TK // 4 == rank // 2).any(dim=1).sum())
        assert once < rows and home_once < home
        assert there == rows * (narrow + 4) + home * number * dim
        assert back == rows * narrow + home * (number * dim + 4)
        assert there_once == once * (narrow + (4 + 8) * top_k) + home_once * number * dim
        assert back_once == once * narrow + home_once * (number * dim + 4 * top_k)


def test_rows_that_are_passed_on_are_not_kept() -> None:
    """By a recomputation that keeps rows: those of the experts are enough."""

    def work(rank: int) -> list[int]:
        layer = layer_of(rank, Case(2, 2, [1] * 4, per_node=2), torch.float32)
        begun: list[Any] = []
        make = collectives._UnderWay.__init__

        def noted(trip: Any, *args: Any) -> None:
            make(trip, *args)
            begun.append(trip)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives._UnderWay, "__init__", noted)
            y_BSD = recomputed(layer, "selective", DIM, rows(rank, 6, torch.float32).view(2, 3, -1))
            kept = [sum(x.untyped_storage().nbytes() for x in trip.arrived) for trip in begun]
            y_BSD.sum().backward()
        return kept

    for between, inside in run_ranks(4, work):
        assert between == 4 + 4 and inside > 6 * DIM * 4


class _Rounded(torch.autograd.Function):
    """What e4m3 leaves of rows, or of their gradients."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, there: bool) -> Tensor:
        ctx.there = there
        return round_rows(as_products(x_RD)).values().to(x_RD.dtype) if there else x_RD.clone()

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return grad_RD if ctx.there else round_rows(grad_RD).values(), None


class RoundedAtHome(AllToAllDispatcher):
    """Slow twin of FP8 dispatch: rounded before it travels, and sent as wide as ever."""

    def dispatch(self, x_TD: Tensor, *args: Any, **named: Any) -> Any:
        return super().dispatch(_Rounded.apply(x_TD, True), *args, **named)

    def combine(self, y_RD: Tensor, sent: Any) -> Tensor:
        return _Rounded.apply(super().combine(y_RD, sent), False)


@pytest.mark.parametrize("autocast", [False, True])
def test_rows_in_fp8_are_what_e4m3_leaves_of_them(autocast: bool) -> None:
    ids_TK, weights_TK = choices(1, 7, 8, 3)

    def work(rank: int) -> list[Pass]:
        return [
            through(
                dispatcher,
                experts(4 * rank, 4),
                rows(rank, 7, torch.float32),
                ids_TK,
                weights_TK,
                autocast,
            )
            for dispatcher in (RoundedAtHome(8, group()), dispatcher_of(rank, 8, None, fp8=True))
        ]

    for twin, ours in run_ranks(2, work):
        for wanted, got in zip([*twin[:3], *twin[3]], [*ours[:3], *ours[3]], strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_sent(autocast: bool) -> None:
    """Counts once, rows once each way and once each way back; in bf16 under autocast. Weights go
    with the rows in fp32, and so do their gradients."""
    ids_TK, weights_TK = choices(1, 6, 4, 2)

    def work(rank: int) -> list[tuple[torch.dtype, int]]:
        dispatcher, weights = AllToAllDispatcher(4, group()), experts(2 * rank, 2)
        x_TD = rows(rank, 6, torch.float32)
        return recorded(lambda: through(dispatcher, weights, x_TD, ids_TK, weights_TK, autocast))

    dtype = torch.bfloat16 if autocast else torch.float32
    numbers = [2 * int((ids_TK // 2 == rank).sum()) * DIM for rank in range(2)]  # both send alike
    for rank, calls in enumerate(run_ranks(2, work)):
        back, columns = (dtype, numbers[rank]), DIM + 4 // dtype.itemsize
        there_weighted, there = (dtype, 12 * columns), (dtype, 12 * DIM)
        back_weighted = (dtype, numbers[rank] // DIM * columns)
        assert calls == [(torch.int64, 4), there_weighted, back, there, back_weighted]


def test_the_same_dispatcher_twice_before_the_backward_pass() -> None:
    """Pipelined micro-batches: each journey is kept in its own state."""

    def work(rank: int) -> list[Tensor]:
        dispatcher = AllToAllDispatcher(4, group())
        inputs = [rows(10 * rank + i, 3 + i, torch.float32).requires_grad_() for i in range(2)]
        ways = [choices(10 * rank + i, 3 + i, 4, 2) for i in range(2)]
        sent = [dispatcher.dispatch(x, w, ids) for x, (ids, w) in zip(inputs, ways, strict=True)]
        outputs = [dispatcher.combine(s.rows_RD * s.weights_R.unsqueeze(1), s) for s in sent]
        for x_TD, y_TD, (_, weights_TK) in zip(inputs, outputs, ways, strict=True):
            factor_T1 = weights_TK.sum(dim=1, keepdim=True)
            torch.testing.assert_close(y_TD, x_TD * factor_T1)
            y_TD.sum().backward()
            torch.testing.assert_close(x_TD.grad, factor_T1.expand_as(x_TD))
        return outputs

    run_ranks(2, work)


def test_the_host_waits_once_a_layer() -> None:
    """For the sizes of what is exchanged; and not at all in the backward pass."""

    def work(rank: int) -> list[tuple[int, list[str]]]:
        dispatcher = AllToAllDispatcher(4, group())
        ids_TK, weights_TK = choices(rank, 6, 4, 2)
        x_TD = rows(rank, 6, torch.float32).requires_grad_()
        results: list[Tensor] = []

        def forward() -> None:
            sent = dispatcher.dispatch(x_TD, weights_TK, ids_TK)
            rows_RD = sent.rows_RD.square() * sent.weights_R.unsqueeze(1)
            results.append(dispatcher.combine(rows_RD, sent))

        forward()  # the first opens the memory that the ranks share
        results.clear()
        watches = [watched(forward), watched(lambda: results[0].sum().backward())]
        return [(watch.calls, watch.waits) for watch in watches]

    for (calls, waits), (calls_back, waits_back) in run_ranks(2, work):
        assert calls > 20 and calls_back > 5, "the watch saw nothing"
        assert waits == ["tolist"]
        assert waits_back == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("granularity", [None, "full", "selective"])
def test_the_shared_expert_computes_while_rows_travel(granularity: str | None, ranks: int) -> None:
    """Forward and backward; and in a recomputation that has kept the rows nothing travels. By the
    backend, which one rank takes, and through memory."""

    def work(rank: int) -> list[str]:
        layer = layer_of(rank, Case(4, 2, [2] * ranks), torch.float32)
        seen: list[str] = []
        exchange = cpu_exchange.all_to_all

        class Begun:
            def __init__(self, exchange: Any) -> None:
                self.exchange = exchange

            def wait(self) -> Any:
                seen.append("wait")
                return self.exchange.wait()

        def noted(sent: list[Tensor], *args: Any) -> Any:
            if not sent[0].is_floating_point():  # counts
                return exchange(sent, *args)
            seen.append("begin")
            return Begun(exchange(sent, *args))

        shared, experts = layer.shared_experts, layer.experts
        assert shared is not None
        weights = {"shared": shared.w2.weight, "experts": experts.w2}
        for name, module in (("shared", shared), ("experts", experts)):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
            weights[name].register_hook(lambda _, name=name: seen.append(f"{name} back"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_exchange, "all_to_all", noted)
            x_BSD = rows(rank, 6, torch.float32).view(2, 3, DIM).requires_grad_()
            run = layer if granularity is None else partial(recomputed, layer, granularity, DIM)
            run(x_BSD).sum().backward()
        return seen

    forward = ["begin", "shared", "wait", "experts"]
    again = {None: [], "full": forward, "selective": ["shared", "experts"]}[granularity]
    back = ["experts back", "begin", "shared back", "wait"]
    combine = ["begin", "wait"]
    for seen in run_ranks(ranks, work):
        assert seen == [*forward, *combine, *combine, *again, *back]


# -- DeepEP, for which a stand-in takes what it takes --


def deep_ep_of(most_tokens: int = 9) -> DeepEPDispatcher:
    return DeepEPDispatcher(8, group(), most_tokens, 100)


@pytest.mark.parametrize("version", ["2.0", "2.5"])
def test_over_deep_ep_exactly(version: str) -> None:
    """Of small whole numbers every sum is exact in bf16, whatever its order."""
    tokens = [5, 0, 9, 2]
    ids_TK, weights_TK = choices(1, sum(tokens), 8, 3)
    generator = torch.Generator().manual_seed(2)
    x_TD, factor_TD = torch.randint(-2, 3, (2, sum(tokens), DIM), generator=generator).bfloat16()
    weights_TK = weights_TK.mul(2).round().div(2)

    def passed(
        dispatcher: TokenDispatcher, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor,
        factor_TD: Tensor, first: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Expert ``i`` multiplies by ``1 + i % 3``."""
        inputs = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        sent = dispatcher.dispatch(*inputs, ids_TK, lambda: "computed")
        assert sent.meanwhile == "computed" and sent.weights_R.dtype == torch.float32
        expert_R = (first + torch.arange(len(sent.counts_e))).repeat_interleave(sent.counts_e)
        scale_R1 = (sent.weights_R * (1 + expert_R % 3)).unsqueeze(1)
        y_TD = dispatcher.combine((sent.rows_RD.float() * scale_R1).bfloat16(), sent)
        (y_TD.float() * factor_TD).sum().backward()
        assert inputs[0].grad is not None and inputs[1].grad is not None
        return y_TD.detach(), inputs[0].grad, inputs[1].grad

    def work(rank: int) -> tuple[Any, tuple[Tensor, ...]]:
        kind = false_deep_ep.install(version)
        mine = [part.split(tokens)[rank] for part in (x_TD, ids_TK, weights_TK, factor_TD)]
        seen = passed(deep_ep_of(), *mine, 2 * rank)
        assert kind is not None
        return kind.made, seen

    whole = passed(LocalDispatcher(8), x_TD, ids_TK, weights_TK, factor_TD, 0)
    made, ranks = zip(*run_ranks(4, work), strict=True)
    assert made == ([(9, DIM, 3, 100, 100)],) * 4
    for i, wanted in enumerate(whole):
        parts = [seen[i] for seen in ranks]
        assert {part.dtype for part in parts} == {wanted.dtype}
        assert torch.equal(torch.cat(parts), wanted) and wanted.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_over_deep_ep_as_on_one_rank(autocast: bool) -> None:
    """But for the rounding of a rank's sum to bf16 on its way home."""
    dtype = torch.float32 if autocast else torch.bfloat16
    x_TD, (ids_TK, weights_TK) = rows(0, 12, dtype), choices(1, 12, 8, 3)

    def work(rank: int) -> Pass:
        false_deep_ep.install()
        mine = [part.split(6)[rank] for part in (x_TD, ids_TK, weights_TK)]
        return through(deep_ep_of(), experts(4 * rank, 4).to(dtype), *mine, autocast=autocast)

    whole = through(
        LocalDispatcher(8), experts(0, 8).to(dtype), x_TD, ids_TK, weights_TK, autocast=autocast
    )
    ranks = run_ranks(2, work)
    together = [torch.cat([seen[i] for seen in ranks]) for i in range(3)]
    together += [torch.cat(parts) for parts in zip(*(seen[3] for seen in ranks), strict=True)]
    for got, wanted in zip(together, [*whole[:3], *whole[3]], strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).norm() <= 2**-7 * wanted.norm()


def test_recomputed_over_deep_ep() -> None:
    """Rows arrive as they did the first time, though DeepEP promises no order: what is behind them
    is not recomputed."""

    def work(rank: int) -> list[list[Tensor]]:
        seen = []
        for granularity in (None, "full", "selective"):
            false_deep_ep.install()
            false_deep_ep._order.manual_seed(0)
            layer = layer_of(rank, Case(4, 3, [1, 1]), torch.bfloat16)
            layer.dispatcher = deep_ep_of()
            x_BSD = rows(rank, 6, torch.bfloat16).view(2, 3, DIM).requires_grad_()
            run = layer if granularity is None else partial(recomputed, layer, granularity, DIM)
            run(x_BSD).float().square().sum().backward()
            seen.append([x_BSD.grad, *(p.grad for p in layer.parameters())])
        return seen  # type: ignore[return-value]

    for plain, *others in run_ranks(2, work):
        for other in others:
            for got, wanted in zip(other, plain, strict=True):
                assert torch.equal(got, wanted) and wanted.any()


def test_layers_share_a_buffer_for_the_tokens_of_a_rank() -> None:
    """Of a micro-batch; TP and CP divide them."""

    def work(rank: int) -> Any:
        kind = false_deep_ep.install()
        meshes: Any = SimpleNamespace(
            ep=group(), layout=SimpleNamespace(tp=2, cp=2), step_timeout=timedelta(seconds=7)
        )
        config = ModelConfig(micro_batch_size=3, data=DataConfig(seq_length=8))
        for _ in range(3):
            ids_TK, weights_TK = choices(rank, 5, 8, 3)
            dispatcher = DeepEPDispatcher.of(8, meshes, config)
            dispatcher.dispatch(rows(rank, 5, torch.bfloat16), weights_TK, ids_TK)
        assert kind is not None
        return kind.made

    assert run_ranks(2, work) == [[(6, DIM, 3, 7, 7)]] * 2


def test_which_dispatcher_is_built() -> None:
    """DeepEP only where it is asked for and installed, in version 2, on GPUs."""

    def work(rank: int) -> list[str]:
        built = []
        cases = [("cuda", None, 8), ("cuda", "1.2", 8), ("cpu", "2.5", 8), ("cuda", "2.5", 33)]
        for device_type, version, top_k in [*cases, ("cuda", "2.0", 8), ("cuda", "2.5", 8)]:
            if version is not None:
                false_deep_ep.install(version)
            for kind in ("auto", "alltoall", "deepep"):
                meshes: Any = SimpleNamespace(
                    ep=group(), ep_across=None, ep_inside=None, device_type=device_type,
                    layout=Layout(), step_timeout=timedelta(seconds=7),
                )  # fmt: skip
                try:
                    config = ModelConfig(moe_token_dispatcher_type=kind, num_experts_per_tok=top_k)
                    built.append(type(build_dispatcher(8, meshes, config)).__name__)
                except UserError as error:
                    built.append(str(error))
        return built

    def refusal(why: str) -> str:
        return (
            f"model.moe_token_dispatcher_type=deepep: DeepEP cannot be used here ({why}); install "
            "its version 2 (github.com/deepseek-ai/DeepEP), or use auto or alltoall"
        )

    found = [
        refusal("No module named 'deep_ep'"),
        refusal("deep_ep 1.2.0 has no EPBuffer or ElasticBuffer, as 2.0 and later have"),
        refusal("this process computes on a CPU"),
        refusal("its kernels know 32 choices of a token, and model.num_experts_per_tok=33"),
        *["DeepEPDispatcher"] * 2,
    ]
    wanted = [built for last in found for built in (*["AllToAllDispatcher"] * 2, last)]
    assert run_ranks(1, work) == [wanted]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs with DeepEP")
def test_on_gpus(tmp_path: Path) -> None:
    pytest.importorskip("deep_ep")
    torch.multiprocessing.spawn(on_one_gpu, args=(f"file://{tmp_path}/store",), nprocs=2)


def on_one_gpu(rank: int, store: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=2)
    case = rows(rank, 5, torch.bfloat16), *choices(rank, 5, 8, 3)
    on_gpu = [tensor.cuda() for tensor in case]
    weights = experts(4 * rank, 4).bfloat16().cuda()
    ours = through(deep_ep_of(5), weights, *on_gpu, autocast=False)
    theirs = through(AllToAllDispatcher(8, group()), weights, *on_gpu, autocast=False)
    for got, wanted in zip(ours[:3], theirs[:3], strict=True):
        assert (got - wanted).norm() <= 2**-7 * wanted.norm()
    dist.destroy_process_group()
