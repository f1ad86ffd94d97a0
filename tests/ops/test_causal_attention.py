"""``causal_attention`` against the reference that holds all scores."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.ops import causal_attention as attention
from deepseek.ops import document_attention
from deepseek.ops.causal_attention import causal_attention, causal_attention_slow, document_mask
from deepseek.ops.document_attention import (
    Chunks,
    attend_in_blocks,
    chunk_blocks,
    document_blocks,
)
from support.live_bytes import LiveBytes

TOLERANCE = {
    torch.float64: dict(rtol=1e-11, atol=1e-11),
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=3e-2, atol=3e-2),
}


def tensors(shape: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k (B, N, S, H) and v (B, N, S, V), with gradient."""
    generator = torch.Generator().manual_seed(sum(shape))
    made = [torch.randn(*shape, dim, generator=generator) for dim in (dims[0], *dims)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def compare(
    shape: tuple[int, int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    documents_BS: Tensor | None,
    without: int = 0,
) -> None:
    """Of all tokens, or of the queries of all but the first ``without``."""
    results = []
    for function in (causal_attention, causal_attention_slow):
        q, k, v = tensors(shape, dims, dtype)
        largest_BNS = torch.empty(*shape[:2], shape[2] - without, dtype=torch.float64)
        y_BNSV = function(q[:, :, without:], k, v, scale, documents_BS, largest_BNS)
        wanted = (*shape[:2], shape[2] - without, dims[1])
        assert y_BNSV.shape == wanted and y_BNSV.dtype == dtype
        y_BNSV.backward(torch.linspace(-1, 1, y_BNSV.numel()).view_as(y_BNSV).to(dtype))
        results.append((y_BNSV, q.grad, k.grad, v.grad, largest_BNS.to(dtype)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, **TOLERANCE[dtype])


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.1, 1.0, 2.5]),
    block=st.sampled_from([1, 2, 4, attention.BLOCK]),
    most_scores=st.sampled_from([1, attention.MOST_SCORES]),
    data=st.data(),
)
def test_equals_all_scores(
    shape: tuple[int, int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    block: int,
    most_scores: int,
    data: st.DataObject,
) -> None:
    batch, _, length = shape
    documents_BS = None
    if data.draw(st.booleans(), label="isolated"):
        steps = st.lists(st.integers(0, 1), min_size=length, max_size=length)
        rows = [data.draw(steps, label="border") for _ in range(batch)]
        documents_BS = torch.tensor(rows).cumsum(1)
    without = data.draw(st.integers(0, length - 1), label="queries left out")
    sizes = dict(BLOCK=block, MOST_SCORES=most_scores)
    with mock.patch.multiple(attention, **sizes):
        compare(shape, dims, dtype, scale, documents_BS, without)


@pytest.mark.parametrize("isolated", [True, False])
def test_memory_grows_with_the_tokens_and_not_with_their_square(isolated: bool) -> None:
    """Of forward and backward pass; of what is kept between them and of what is computed with."""
    peaks = []
    for length in (1024, 2048, 4096):
        documents_BM = (torch.arange(length) // 300).unsqueeze(0) if isolated else None
        q, k, v = tensors((1, 2, length), (6, 4), torch.float32)
        with mock.patch.object(attention, "MOST_SCORES", 1 << 16), LiveBytes() as live:
            causal_attention(q, k, v, 0.5, documents_BM).sum().backward()
        peaks.append(live.peak)
    assert peaks[2] / peaks[1] < 2.05 and peaks[1] / peaks[0] < 2.05, peaks


def test_no_more_scores_at_a_time_than_allowed() -> None:
    """And with documents only those of keys that one of the queries may see."""
    documents_BM = torch.arange(40).div(5, rounding_mode="floor").expand(3, -1)
    with mock.patch.multiple(attention, BLOCK=10, MOST_SCORES=2 * 10 * 40):
        sizes = [
            [(b.rows.stop - b.rows.start, b.keys.stop - b.keys.start) for b in blocks]
            for blocks in (
                attention._blocks((3, 1, 40, 40), torch.float32, None),
                attention._blocks((3, 1, 40, 40), torch.float32, documents_BM),
            )
        ]
    assert sizes == [[(2, n) for n in (10, 20, 30, 40)] * 2, [(1, 10)] * 12]


@pytest.mark.parametrize("function", [causal_attention, causal_attention_slow])
@pytest.mark.parametrize("isolated", [False, True])
def test_fewer_queries_are_those_of_the_last_tokens(function: object, isolated: bool) -> None:
    documents_BS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]) if isolated else None
    q, k, v = tensors((2, 2, 5), (4, 3), torch.float64)
    whole = function(q, k, v, 0.5, documents_BS)  # type: ignore[operator]
    last = function(q[:, :, 3:], k, v, 0.5, documents_BS)  # type: ignore[operator]
    torch.testing.assert_close(last, whole[:, :, 3:])


@pytest.mark.parametrize("dims", [(6, 4), (4, 4), (3, 8)])
@pytest.mark.parametrize("isolated", [False, True])
def test_equals_all_scores_in_bf16(dims: tuple[int, int], isolated: bool) -> None:
    documents_BS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]) if isolated else None
    with mock.patch.object(attention, "BLOCK", 2):
        compare((2, 2, 5), dims, torch.bfloat16, 0.5, documents_BS)


def test_by_hand() -> None:
    """Two tokens: the first sees itself; the second weighs both by softmax(2 * 1, 2 * 3)."""
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[1.0], [3.0]]]])
    v = torch.tensor([[[[10.0, 0.0], [0.0, 10.0]]]])
    weight = 1 / (1 + torch.e**4)
    wanted = torch.tensor([[10.0, 0.0], [10 * weight, 10 * (1 - weight)]])
    for function in (causal_attention, causal_attention_slow):
        torch.testing.assert_close(function(q, k, v, 2.0)[0, 0], wanted)


@pytest.mark.parametrize("function", [causal_attention, causal_attention_slow])
@pytest.mark.parametrize("isolated", [False, True])
def test_what_a_token_may_see(function: object, isolated: bool) -> None:
    """Gradient of every output with respect to every value: nonzero exactly where allowed."""
    documents = [0, 0, 1, 1, 1]
    documents_BS = torch.tensor([documents]) if isolated else None
    q, k, v = tensors((1, 1, 5), (4, 3), torch.float64)
    y_BNSV = function(q, k, v, 0.5, documents_BS)  # type: ignore[operator]
    for i in range(5):
        (gradient,) = torch.autograd.grad(y_BNSV[0, 0, i].sum(), v, retain_graph=True)
        seen = [bool(row.any()) for row in gradient[0, 0]]
        assert seen == [j <= i and (not isolated or documents[i] == documents[j]) for j in range(5)]


def test_document_mask() -> None:
    documents = torch.tensor([[7, 7, 3], [-1, 5, -1]])
    mask = document_mask(documents, 3)
    assert torch.equal(document_mask(documents, 2), mask[:, :, 1:])
    assert mask.shape == (2, 1, 3, 3) and mask.dtype == torch.bool
    assert mask[:, 0].int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [0, 1, 0], [1, 0, 1]],
    ]


# -- blocks, of GPUs; a CPU computes the same without skipping, and no gradients --


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=2),
    late=st.integers(0, 5),
    ids=st.permutations([-1, 0, 1, 2]),
)
def test_blocks_equal_all_scores(lengths: list[list[int]], late: int, ids: list[int]) -> None:
    """Every visible token is in a block that is looked at, and whole blocks are visible in whole;
    documents with ids in any order, late queries among them."""
    size = max(map(sum, lengths))
    rows = [[ids[i] for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    documents_BM = torch.tensor([row + [row[-1]] * (size - len(row)) for row in rows])
    queries = max(1, size - late)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_attention, "BLOCK", 4)
        mask = document_blocks(documents_BM, queries)
        q, k, v = (x.detach() for x in tensors((len(rows), 2, size), (3, 2), torch.float64))
        q = q[:, :, -queries:]
        got = attend_in_blocks(q, k, v, 0.7, mask)
    torch.testing.assert_close(
        got, causal_attention_slow(q, k, v, 0.7, documents_BM), rtol=1e-11, atol=1e-11
    )
    seen_BSM = document_mask(documents_BM, queries)[:, 0]
    for counts, indices, holds in (
        (mask.kv_num_blocks, mask.kv_indices, None),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for b, row in enumerate(indices[:, 0].tolist()):
            for i, blocks in enumerate(row):
                for j in blocks[: int(counts[b, 0, i])]:
                    part = seen_BSM[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                    assert holds is None or bool(part.all())
                    part.zero_()
    assert not seen_BSM.any(), "visible, but in no block"


def test_a_mask_of_blocks_is_small() -> None:
    """For 128K tokens 16 MB, not 17 GB."""
    documents_BM = (torch.arange(131072) // 5000).unsqueeze(0)
    mask = document_blocks(documents_BM, 131072)
    assert sum(x.nbytes for x in mask.as_tuple() if isinstance(x, Tensor)) < 20e6


def test_blocks_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a context rank's two chunks: each sees what is behind it. One stream's first chunk, or
    whole sequences, need none, unless logits are asked for, and a CPU has no use for any."""
    tokens_BS = torch.zeros(2, 24, dtype=torch.int64)
    documents_BS = (torch.arange(24) // 5).expand(2, -1)
    assert chunk_blocks(tokens_BS, documents_BS, Chunks(4, (0, 3)), always=True) == (None, None)
    monkeypatch.setattr(document_attention, "takes_blocks", lambda device: True)
    for ids_BS, always, has in (
        (None, False, [False, True]),
        (None, True, [True, True]),
        (documents_BS, False, [True, True]),
    ):
        found = chunk_blocks(tokens_BS, ids_BS, Chunks(4, (0, 3)), always)
        assert [mask is not None for mask in found] == has
        sizes = [mask.seq_lengths for mask in found if mask is not None]
        assert sizes == [(6, 6), (6, 24)][-len(sizes) :]
    assert chunk_blocks(tokens_BS, None, Chunks(), always=False) == (None,)


@pytest.mark.filterwarnings("default")  # the compiler warns of its own doings
@pytest.mark.parametrize("isolated", [False, True])
def test_a_compiled_graph_has_the_same(isolated: bool) -> None:
    """Documents and logits too, which it holds in blocks as ever."""
    documents_BM = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]) if isolated else None
    found = []
    for compiled in (False, True):
        q, k, v = tensors((2, 3, 5), (4, 3), torch.float32)
        largest_BNS = torch.empty(2, 3, 4)

        def attend(*qkv: Tensor, largest_BNS: Tensor = largest_BNS) -> Tensor:
            return causal_attention(*qkv, 0.5, documents_BM, largest_BNS)

        if compiled:
            attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
        y_BNSU = attend(q[:, :, 1:], k, v)
        y_BNSU.backward(torch.linspace(-1, 1, y_BNSU.numel()).view_as(y_BNSU))
        found.append((y_BNSU, largest_BNS, q.grad, k.grad, v.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# -- on GPUs: no GPU has run these yet --


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("without", [0, 512])
def test_on_a_gpu(isolated: bool, without: int) -> None:
    """V3's unequal dims, documents, late queries and the largest scores, forward and backward."""
    length, shape = 1024, (2, 4, 1024)
    q, k, v = (x.detach().bfloat16().cuda() for x in tensors(shape, (192, 128), torch.float32))
    ids_BS = (torch.arange(length, device="cuda") // 300).expand(2, -1) if isolated else None
    chunks = Chunks() if without == 0 else Chunks(2, (1,))
    (blocks,) = chunk_blocks(ids_BS if isolated else q[:, 0, :, 0], ids_BS, chunks, always=False)
    found = []
    for function in (causal_attention, causal_attention_slow):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        given = (leaves[0][:, :, without:], *leaves[1:], 0.07, ids_BS)
        y_BNSU = (
            function(*given, blocks=blocks) if function is causal_attention else function(*given)
        )
        y_BNSU.sum().backward()
        found.append([y_BNSU.float(), *(x.grad.float() for x in leaves)])
    for fast, slow in zip(*found, strict=True):
        assert (fast - slow).norm() < 2e-2 * slow.norm()
    if blocks is not None:
        told = [q.new_empty(2, 4, length - without, dtype=torch.float32) for _ in range(2)]
        causal_attention(q[:, :, without:], k, v, 0.07, ids_BS, told[0], blocks)
        causal_attention_slow(q[:, :, without:], k, v, 0.07, ids_BS, told[1])
        torch.testing.assert_close(told[0], told[1], rtol=2e-2, atol=2e-2)
