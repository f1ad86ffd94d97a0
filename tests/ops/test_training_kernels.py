"""The kernels of a training step against their twins in fp64: values, gradients, order of sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.models.components.balance import count_assignments
from deepseek.models.components.heads import (
    head_keys,
    head_keys_slow,
    head_queries,
    head_queries_slow,
)
from deepseek.models.components.rope import rotate, rotate_slow, rotation
from deepseek.ops import routing, rows
from deepseek.ops.causal_attention import causal_attention_slow
from deepseek.ops.cross_entropy import IGNORE_INDEX, softmax_loss, softmax_loss_slow
from deepseek.ops.fused_attention import fused_attention, takes_heads
from deepseek.ops.grouped_feed_forward import grouped_feed_forward, grouped_feed_forward_slow
from deepseek.ops.native import build
from deepseek.ops.rms_norm import rms_norm, rms_norm_slow
from deepseek.ops.squares import square_sums, square_sums_slow
from deepseek.ops.swiglu import swiglu, swiglu_slow
from support.kernels import kernels_asked_for, without_kernels

Compute = Callable[..., Tensor | tuple[Tensor, ...]]
WIDTHS = st.sampled_from([1, 2, 7, 16, 33, 64])


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return scale * torch.randn(*shape, generator=generator)


def passes(compute: Compute, given: Sequence[Tensor]) -> list[Tensor]:
    """Results, and gradients of what was given."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in given]
    made = compute(*leaves)
    results = made if isinstance(made, tuple) else (made,)
    upstream = [drawn(*y.shape, seed=7).to(y.dtype) for y in results]
    torch.autograd.backward(results, upstream)
    return [*(y.detach() for y in results), *(x.grad for x in leaves if x.grad is not None)]


def compare(
    fast: Compute, slow: Compute, *given: Tensor, kernel: str, tolerance: float = 2e-6
) -> None:
    """Kernel against the twin in fp64, relative to the largest number; and on three threads the
    same, bit by bit."""
    wide = [x.double() if x.is_floating_point() else x for x in given]
    with asked_for(kernel):
        got = passes(fast, given)
    for one, other in zip(got, passes(slow, wide), strict=True):
        assert one.shape == other.shape
        largest = other.abs().max().item() if other.numel() else 1.0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * (largest + 1))
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, passes(fast, given), got))
    finally:
        torch.set_num_threads(1)


@contextmanager
def asked_for(name: str) -> Iterator[None]:
    """The kernel must be called inside."""
    with kernels_asked_for() as names:
        yield
    assert build.why_not() is None
    assert name in names


@given(count=st.integers(1, 70), width=st.sampled_from([7, 16, 33, 64]), strided=st.booleans())
def test_rms_norm(count: int, width: int, strided: bool) -> None:
    step = 1 + strided
    x, weight = drawn(count, 2, width + 3 * strided), drawn(step * width, seed=1)

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x[..., :width], weight[::step], 1e-6)

    def slow(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_slow(x[..., :width], weight[::step], 1e-6)

    compare(fast, slow, x, weight, kernel="rms_norm_backward", tolerance=1e-5)


@given(count=st.integers(1, 40), width=WIDTHS, scale=st.sampled_from([1.0, 40.0]))
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(count: int, width: int, scale: float, weighted: bool) -> None:
    gate, up = drawn(count, width, scale=scale), drawn(count, width, seed=1)
    weights = [drawn(count, 1, seed=2)] * weighted
    compare(swiglu, swiglu_slow, gate, up, *weights, kernel="swiglu_backward", tolerance=5e-6)


def test_swiglu_of_extremes() -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.5, -87.0, 0.0, 87.0, 88.5, 100.0, 1e4, float("nan")]])
    with asked_for("swiglu"):
        got, wanted = swiglu(gate, torch.ones_like(gate)), torch.nn.functional.silu(gate)
    torch.testing.assert_close(got, wanted, equal_nan=True)


@given(tokens=st.integers(0, 20), choices=st.integers(1, 4), width=WIDTHS, data=st.data())
def test_rows_to_experts_and_back(
    tokens: int, choices: int, width: int, data: st.DataObject
) -> None:
    experts = data.draw(st.integers(1, 6))
    drawn_ids = st.lists(st.integers(0, experts - 1), min_size=tokens * choices)
    ids_R = torch.tensor(data.draw(drawn_ids)[: tokens * choices], dtype=torch.int64)
    sorts = [rows.sort_by_expert(ids_R, experts)]
    for least in (False, True):
        sorts.append(rows.aligned_slots(sorts[0][2], len(ids_R), least))
    with without_kernels():
        twins = [rows.sort_by_expert(ids_R, experts)]
        for least in (False, True):
            twins.append(rows.aligned_slots(twins[0][2], len(ids_R), least))
    for one, other in zip(sorts, twins, strict=True):
        assert all(map(torch.equal, one, other))
    order_R, inverse_R, _ = sorts[0]
    _, slots_R = sorts[1]
    num_slots = rows.most_slots(len(ids_R), experts)

    def way(x_TD: Tensor) -> Tensor:
        x_RD = rows.expand_rows(x_TD, order_R, inverse_R)
        x_RD = rows.gather_rows(rows.spread_rows(x_RD, slots_R, num_slots) * 2, slots_R)
        return rows.combine_rows(
            rows.permute_rows(x_RD, order_R, inverse_R), inverse_R, inverse_R, choices
        )

    def twin(x_TD: Tensor) -> Tensor:
        with without_kernels():
            return way(x_TD)

    if tokens:
        compare(way, twin, drawn(tokens, width), kernel="spread_rows")
    wide_PD = rows.spread_rows(drawn(len(ids_R), width), slots_R, num_slots)
    assert not wide_PD[torch.ones(num_slots).index_fill(0, slots_R, 0).bool()].any()


@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 15, 40]), min_size=1, max_size=4),
    sizes=st.tuples(WIDTHS, WIDTHS),
    frozen=st.sets(st.sampled_from([1, 2, 3, 4])),
)
def test_feed_forward_of_experts(
    counts: list[int], sizes: tuple[int, int], frozen: set[int]
) -> None:
    """Any of what is given may ask for no gradient."""
    dim, width = sizes
    counts_E, rows_of_all = torch.tensor(counts), sum(counts)
    stacks = [(len(counts), width, dim)] * 2 + [(len(counts), dim, width)]
    weights = [drawn(*shape, seed=i, scale=shape[2] ** -0.5) for i, shape in enumerate(stacks)]
    given_ = drawn(rows_of_all, dim), drawn(rows_of_all, seed=1), *weights

    def way(compute: Any) -> Compute:
        def run(*tensors: Tensor) -> Tensor:
            x_RD, weights_R, w1, w3, w2 = (
                x.detach() if i in frozen else x for i, x in enumerate(tensors)
            )
            return compute(x_RD, weights_R, counts_E, w1, w3, w2)

        return run

    fast, slow = way(grouped_feed_forward), way(grouped_feed_forward_slow)
    if rows_of_all:
        compare(fast, slow, *given_, kernel="swiglu_backward", tolerance=1e-5)
    else:
        assert fast(*given_).shape == (0, dim)


def test_feed_forward_of_experts_takes_what_fits_alone() -> None:
    """Kernels check nothing: other shapes, strides and dtypes go the way where PyTorch does."""
    x_RD, weights_R, counts_E = drawn(5, 8), drawn(5), torch.tensor([2, 3])
    w1, w3, w2 = drawn(2, 4, 8), drawn(2, 4, 8), drawn(2, 8, 4)
    fits = [x_RD, weights_R, counts_E, w1, w3, w2]
    assert grouped_feed_forward(*fits) is not None
    strided = torch.cat((w1, w1), dim=-1)[..., :8]
    others = {0: [x_RD[:, :4], x_RD[:4], x_RD.double()], 1: [weights_R[:4], weights_R.double()]}
    others |= {2: [counts_E[:1]], 3: [w1[:1], w1[:, :3], strided], 4: [w3[:, :3], w3[..., :4]]}
    others |= {5: [w2.mT, w2[:1], w2.mT.contiguous().mT]}
    for place, tensors in others.items():
        for tensor in tensors:
            given_ = [tensor if i == place else x for i, x in enumerate(fits)]
            assert grouped_feed_forward(*given_) is None, (place, tensor.shape)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3)),
    plain=st.integers(0, 9),
    pairs=st.integers(1, 9),
    values=st.integers(1, 17),
)
def test_heads(shape: tuple[int, int, int], plain: int, pairs: int, values: int) -> None:
    sequences, tokens, _ = shape
    cos, sin = rotation(torch.arange(tokens).expand(sequences, tokens), 2 * pairs, 1e4, None)

    def with_angles(compute: Compute) -> Compute:
        return lambda x: compute(x, cos.to(x.dtype), sin.to(x.dtype))

    q = drawn(*shape, plain + 2 * pairs)
    compare(with_angles(head_queries), with_angles(head_queries_slow), q, kernel="turn_heads")
    compare(
        with_angles(lambda x, *angles: rotate(x[..., plain:], *angles)),
        with_angles(lambda x, *angles: rotate_slow(x[..., plain:], *angles)),
        q,
        kernel="turn_heads",
    )
    compare(
        lambda *given: head_keys(*given, values),
        lambda *given: head_keys_slow(*given, values),
        drawn(*shape, plain + values),
        drawn(sequences, tokens, 2 * pairs),
        kernel="lay_keys_backward",
    )


def attention_slow(
    q_BSNH: Tensor, kv_BSNH: Tensor, k_rope_BSH: Tensor, *rest: Any, values: int
) -> Tensor:
    """Reference of ``fused_attention``."""
    cos, sin, *others = rest
    k, v = head_keys_slow(kv_BSNH, k_rope_BSH, values)
    q = head_queries_slow(q_BSNH, cos.to(q_BSNH.dtype), sin.to(q_BSNH.dtype))
    return causal_attention_slow(q, k, v, *others).transpose(1, 2)


@given(
    shape=st.tuples(
        st.integers(1, 3), st.one_of(st.integers(1, 80), st.just(300)), st.integers(1, 3)
    ),
    plain=st.integers(0, 40),
    pairs=st.integers(1, 9),
    values=st.integers(1, 40),
    documents=st.integers(1, 4),
    packed=st.booleans(),
)
def test_fused_attention(
    shape: tuple[int, int, int], plain: int, pairs: int, values: int, documents: int, packed: bool
) -> None:
    sequences, tokens, heads = shape
    ids = torch.randint(documents, (sequences, tokens))
    ids = ids.sort(dim=1).values if packed else ids
    documents_BS = ids if documents > 1 else None
    largest, wanted = drawn(sequences, heads, tokens), drawn(sequences, heads, tokens).double()
    angles = rotation(torch.arange(tokens).expand(sequences, tokens), 2 * pairs, 1e4, None)
    compare(
        lambda *given: fused_attention(*given, *angles, 0.3, documents_BS, largest),
        lambda *given: attention_slow(*given, *angles, 0.3, documents_BS, wanted, values=values),
        drawn(*shape, plain + 2 * pairs),
        drawn(*shape, plain + values, seed=1),
        drawn(sequences, tokens, 2 * pairs, seed=2),
        kernel="attention_backward",
        tolerance=1e-5,
    )
    torch.testing.assert_close(largest.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", [32, 36])
def test_attention_of_more_than_the_caches_hold(values: int) -> None:
    """Results are written past the caches, if their rows are whole vectors."""
    tokens, heads, pairs = 210, 40, 8
    assert 2 * tokens * heads * values > 1 << 19
    angles = rotation(torch.arange(tokens).expand(2, tokens), 2 * pairs, 1e4, None)
    compare(
        lambda *given: fused_attention(*given, *angles, 0.3),
        lambda *given: attention_slow(*given, *angles, 0.3, values=values),
        drawn(2, tokens, heads, 16 + 2 * pairs),
        drawn(2, tokens, heads, 16 + values, seed=1),
        drawn(2, tokens, 2 * pairs, seed=2),
        kernel="attention_backward",
        tolerance=1e-5,
    )


def test_attention_follows_scores_that_grow_without_end() -> None:
    """Each token's own key outweighs all before, by more than numbers can tell."""
    tokens = 200
    q, k = torch.zeros(1, tokens, 1, 2), torch.ones(1, tokens, 1, 1)
    kv = torch.cat((100.0 * torch.arange(tokens).view(1, -1, 1, 1) * k, drawn(1, tokens, 1, 3)), -1)
    q = torch.cat((k, q), -1)
    turned = drawn(1, tokens, 2), torch.ones(1, tokens, 1), torch.zeros(1, tokens, 1)
    y, by_q, by_kv = passes(lambda *given: fused_attention(*given, *turned, 1.0), (q, kv))
    assert torch.equal(y, kv[..., 1:])
    nothing = torch.zeros(1, tokens, 1, 3)
    torch.testing.assert_close(by_q, nothing, rtol=0, atol=1e-2)
    torch.testing.assert_close(by_kv[..., :1], nothing[..., :1], rtol=0, atol=1e-5)


def test_a_document_does_not_see_another_bit_by_bit() -> None:
    """Whatever the other holds, and however many sequences and heads there are."""
    documents_BS = torch.arange(50).div(20, rounding_mode="floor").expand(2, -1)
    given_ = [drawn(2, 50, 3, 24), drawn(2, 50, 3, 30), drawn(2, 50, 8)]
    angles = rotation(torch.arange(50).expand(2, -1), 8, 1e4, None)

    def middle(given: Sequence[Tensor], heads: int = 3) -> list[Tensor]:
        part = [x[1:, :, :heads] if x.dim() == 4 else x[1:] for x in given]
        one = [*(x[1:] for x in angles), 0.3, documents_BS[1:]]
        found = passes(lambda *inputs: fused_attention(*inputs, *one), part)
        return [x[:, 20:40] for x in found[: 3 if heads == 3 else 2]]

    other = [torch.cat((x[:, :20] * 3, x[:, 20:40], x[:, 40:] - 1), dim=1) for x in given_]
    assert all(map(torch.equal, middle(given_), middle(other)))
    everything = fused_attention(*given_, *angles, 0.3, documents_BS)
    assert torch.equal(everything[1:, 20:40], middle(given_)[0])
    assert torch.equal(everything[1:, 20:40, :1], middle(given_, heads=1)[0])


def test_attention_of_the_last_tokens_goes_by_blocks() -> None:
    q, kv = drawn(1, 3, 1, 8), drawn(1, 3, 1, 8)
    assert takes_heads(q, kv)
    assert not takes_heads(q[:, 1:], kv)
    with without_kernels():
        assert not takes_heads(q, kv)


@given(tokens=st.integers(1, 30), experts=st.sampled_from([2, 4, 6, 16]), data=st.data())
def test_routing(tokens: int, experts: int, data: st.DataObject) -> None:
    choices = data.draw(st.integers(1, experts))
    scores_TE = drawn(tokens, experts).sigmoid()
    ids_TK = routing.largest_places(scores_TE, choices)
    assert torch.equal(ids_TK, scores_TE.topk(choices).indices)
    normalises = data.draw(st.booleans())
    compare(
        lambda scores: routing.expert_weights(scores, ids_TK, normalises, 2.5),
        lambda scores: routing.expert_weights_slow(scores, ids_TK, normalises, 2.5),
        scores_TE,
        kernel="weigh_experts_backward",
    )
    real_BS = drawn(2, tokens) > -0.5
    compare(
        lambda scores: routing.sequence_sums(scores, choices, real_BS),
        lambda scores: routing.sequence_sums_slow(scores, choices, real_BS),
        drawn(2, tokens, experts).sigmoid(),
        kernel="sequence_sums_backward",
    )
    counts_E = count_assignments(ids_TK, real_BS[0], experts)
    with without_kernels():
        assert torch.equal(counts_E, count_assignments(ids_TK, real_BS[0], experts))


@pytest.mark.parametrize("layers, tokens, experts, choices", [(1, 1, 2, 1), (3, 65, 40, 8)])
def test_margins_of_routers(layers: int, tokens: int, experts: int, choices: int) -> None:
    """Also where a token's groups have no other expert, and of scores that are no numbers."""
    choice_LTE = drawn(layers, tokens, experts)
    choice_LTE[0, ::3, :2] = float("nan")
    ids_LTK = choice_LTE.topk(choices, dim=2, sorted=False).indices
    few_TE = torch.full((tokens, experts), -torch.inf).scatter(1, ids_LTK[-1], 1.0)
    choice_LTE[-1, 1::2] = few_TE[1::2]
    given = [list(x) for x in (choice_LTE, ids_LTK, drawn(layers, tokens) > -0.5)]
    with asked_for("margin_sums"):
        sums_L2 = routing.margin_sums(*given)
    torch.testing.assert_close(sums_L2, routing.margin_sums_slow(*given), rtol=1e-12, atol=0)
    with without_kernels():
        assert torch.equal(routing.margin_sums(*given), routing.margin_sums_slow(*given))


def test_second_derivatives_are_refused() -> None:
    """What a kernel has filled has no history: they would miss a part, and nobody would notice."""
    x, weight = drawn(2, 8).requires_grad_(), drawn(8, seed=1).requires_grad_()
    y = rms_norm(x, weight, 1e-6).square().sum()
    with pytest.raises(RuntimeError, match="rms_norm_backward: a kernel has no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


def test_places_of_equal_scores_and_of_none() -> None:
    """The first of equal ones; NaN before all, as torch's."""
    nan, less = float("nan"), float("-inf")
    scores_TE = torch.tensor([[1.0, 2.0, 2.0, 0.0], [less, 0.0, nan, 5.0], [less] * 4])
    assert routing.largest_places(scores_TE, 2).tolist()[:2] == [[1, 2], [2, 3]]
    every = routing.largest_places(scores_TE, 4)
    assert all(sorted(row) == [0, 1, 2, 3] for row in every.tolist())


@given(count=st.integers(1, 9), width=st.sampled_from([1, 5, 64, 1500]), wants=st.booleans())
def test_softmax_loss(count: int, width: int, wants: bool) -> None:
    logits = drawn(count, width, scale=5.0)
    labels = torch.arange(count) % width
    labels[::3] = IGNORE_INDEX
    labelled = labels != IGNORE_INDEX
    fast, slow = logits.clone(), logits.double()
    with asked_for("softmax_loss"):
        losses = softmax_loss(fast, labels, wants)
    wanted = softmax_loss_slow(slow, labels, wants)
    torch.testing.assert_close(losses.double()[labelled], wanted[labelled], rtol=2e-6, atol=2e-6)
    if wants:
        torch.testing.assert_close(fast.double(), slow, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("label", [3, 1 << 40, -1, -(1 << 40)])
@pytest.mark.parametrize("wants", [False, True])
def test_a_label_outside_of_the_head_touches_nothing_else(label: int, wants: bool) -> None:
    memory = drawn(6, 3)
    before, labels = memory.clone(), torch.tensor([0, label, IGNORE_INDEX, 2])
    losses = softmax_loss(memory[1:5], labels, wants)
    assert losses.isnan().tolist() == [False, True, False, False]
    assert torch.equal(memory[[0, 5]], before[[0, 5]])


def test_square_sums_of_nothing_lie_on_the_device_that_is_asked_for() -> None:
    """A stage without gradients adds zeros to the others', which may lie on GPUs."""
    assert square_sums([[], []], torch.device("meta")).device.type == "meta"
    assert square_sums([[], []], torch.device("cpu")).tolist() == [0, 0]


@pytest.mark.parametrize("rows", [1, 3, 4, 255, 256, 263, 600])
@pytest.mark.parametrize("width", [1, 15, 16, 100])
def test_square_sums_of_any_rows(rows: int, width: int) -> None:
    """Some are read beside others, and what is left of rows and of vectors alone."""
    x = drawn(rows, width)
    with asked_for("sums_of_squares"):
        (found,) = square_sums([[(x, 1)]], torch.device("cpu"))
    torch.testing.assert_close(found, x.double().square().sum(), rtol=1e-6, atol=0)


def test_square_sums() -> None:
    shapes = [[(3, 4), (5,), (2, 600, 3)], [], [(0, 4), (1, 1)]]
    groups = [[(drawn(*shape), 1 + i) for i, shape in enumerate(group)] for group in shapes]
    with asked_for("sums_of_squares"):
        sums = square_sums(groups, torch.device("cpu"))
    wanted = square_sums_slow(groups, torch.device("cpu"))
    torch.testing.assert_close(sums, wanted, rtol=1e-7, atol=0)
    with without_kernels():
        assert torch.equal(square_sums(groups, torch.device("cpu")), wanted)


def test_square_sums_are_the_same_on_any_threads() -> None:
    """Whose shares end anywhere: in a tensor, between two, in one that is smaller than both."""
    shapes = [(3,), (1023,), (0, 4), (1, 1), (2000, 50), (300, 40), (256, 10), (700,)]
    groups = [[(drawn(*shape, seed=i), 1)] for i, shape in enumerate(shapes)]
    wanted = square_sums(groups, torch.device("cpu"))
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(square_sums(groups, torch.device("cpu")), wanted)
    finally:
        torch.set_num_threads(1)
