"""Embedding and fused loss over parts of the vocabulary, against the whole in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from deepseek.config.cost import CHUNK_TOKENS
from deepseek.models.transformer import Head
from deepseek.ops import cross_entropy as module
from deepseek.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from deepseek.parallel.mesh import local
from deepseek.parallel.tensor import (
    VocabularyEmbedding,
    VocabularyHead,
    first_id,
    local_embedding,
    sharded_softmax_loss,
)
from support.ranks import run_ranks

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Relative to the largest number, by the dtype of the products."""


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def inputs(
    tokens: int, dim: int, vocab: int, dtype: torch.dtype = torch.float64, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels; this share of the labels is ``IGNORE_INDEX``."""
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * dim + vocab)
    hidden_TD = torch.randn(tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    labels_T[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden_TD, weight_VD, labels_T


def vocabulary_cross_entropy(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    labels_T: Tensor,
    first_id: int,
    group: dist.ProcessGroup,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:
    """As the head of this rank computes it."""
    softmax_loss = sharded_softmax_loss(first_id, group)
    return linear_cross_entropy(hidden_TD, weight_vD, labels_T, chunk, softmax_loss)


Loss = tuple[Tensor, Tensor, Tensor]
"""The loss, and its gradients by hidden state and head."""


def loss_and_gradients(
    cross_entropy: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    scale: float = 1.0,
    autocast: bool = False,
) -> Loss:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = cross_entropy(hidden, weight)
    gradients = torch.autograd.grad(loss * scale, (hidden, weight))
    return loss.detach(), *gradients


def assert_near(got: Tensor, wanted: Tensor, products: torch.dtype) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if wanted.numel():
        error = (got - wanted).abs().max().item()
        assert error <= TOLERANCE[products] * max(wanted.abs().max().item(), 1e-30)


def assert_like_one_process(
    world_size: int,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    chunk: int = 4,
    scale: float = 1.0,
    autocast: bool = False,
) -> Loss:
    def work(rank: int) -> Loss:
        start = first_id(weight_VD.shape[0], group())
        return loss_and_gradients(
            lambda h, w: vocabulary_cross_entropy(h, w, labels_T, start, group(), chunk),
            hidden_TD,
            weight_VD.chunk(world_size)[rank],
            scale,
            autocast,
        )

    whole = loss_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, labels_T, chunk),
        hidden_TD,
        weight_VD,
        scale,
        autocast,
    )
    losses, hidden, weight = zip(*run_ranks(world_size, work), strict=True)
    products = torch.bfloat16 if autocast else hidden_TD.dtype
    assert all(torch.equal(loss, losses[0]) for loss in losses), "ranks differ"
    assert_near(losses[0], whole[0], products)
    assert_near(torch.stack(hidden).sum(dim=0), whole[1], products)
    assert_near(torch.cat(weight), whole[2], products)
    return whole


@given(
    world_size=st.sampled_from([1, 2, 4]),
    tokens=st.integers(0, 9),
    dim=st.integers(1, 5),
    rows=st.integers(1, 4),
    chunk=st.integers(1, 10),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    scale=st.sampled_from([1.0, -3.5, 0.0]),
)
def test_any_sizes(
    world_size: int, tokens: int, dim: int, rows: int, chunk: int, ignored: float, scale: float
) -> None:
    case = inputs(tokens, dim, rows * world_size, ignored=ignored)
    assert_like_one_process(world_size, *case, chunk, scale)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["fp32", "fp32 under autocast", "bf16"],
)
def test_dtypes(world_size: int, dtype: torch.dtype, autocast: bool) -> None:
    whole = assert_like_one_process(world_size, *inputs(24, 16, 12, dtype), 7, autocast=autocast)
    assert [t.dtype for t in whole] == [torch.float32, dtype, dtype]


def test_no_label_at_all() -> None:
    whole = assert_like_one_process(2, *inputs(6, 3, 4, ignored=1.0))
    assert not any(tensor.any() for tensor in whole)


def test_large_logits_do_not_overflow() -> None:
    hidden_TD = torch.tensor([[300.0], [-300.0]])
    weight_VD = torch.tensor([[1.0], [0.5], [-0.5], [-1.0]])
    whole = assert_like_one_process(2, hidden_TD, weight_VD, torch.tensor([3, 3]))
    assert whole[0].item() == pytest.approx(600.0)


def test_every_label_on_one_rank() -> None:
    hidden_TD, weight_VD, _ = inputs(6, 3, 8)
    assert_like_one_process(4, hidden_TD, weight_VD, torch.full((6,), 5))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed(needs: tuple[bool, bool]) -> None:
    hidden_TD, weight_VD, labels_T = inputs(5, 3, 4)

    def work(rank: int) -> tuple[float, list[bool]]:
        leaves = [
            tensor.clone().requires_grad_(need)
            for tensor, need in zip((hidden_TD, weight_VD[2 * rank :][:2]), needs, strict=True)
        ]
        loss = vocabulary_cross_entropy(*leaves, labels_T, 2 * rank, group())
        if any(needs):
            loss.backward()
        return loss.item(), [leaf.grad is not None for leaf in leaves]

    wanted = linear_cross_entropy(hidden_TD, weight_VD, labels_T).item()
    for loss, has in run_ranks(2, work):
        assert loss == pytest.approx(wanted, rel=1e-12) and has == list(needs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_pays_for_no_gradient(mode: type) -> None:
    """Without grad mode, no (v, D) gradient is made and no softmax is turned into one."""
    hidden_TD, weight_VD, labels_T = inputs(5, 3, 4)
    weight_VD.requires_grad_()

    def forbidden(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a gradient was computed in validation")

    def work(rank: int) -> float:
        with pytest.MonkeyPatch.context() as patch, mode():
            patch.setattr(Tensor, "scatter_add_", forbidden)
            patch.setattr(torch, "zeros_like", forbidden)
            weight_vD = weight_VD[2 * rank :][:2]
            loss = vocabulary_cross_entropy(hidden_TD, weight_vD, labels_T, 2 * rank, group())
        assert not loss.requires_grad
        return loss.item()

    wanted = linear_cross_entropy(hidden_TD, weight_VD, labels_T).item()
    assert run_ranks(2, work) == pytest.approx([wanted] * 2, rel=1e-12)


def test_never_more_logits_than_a_chunk_and_two_reductions_each() -> None:
    hidden_TD, weight_VD, labels_T = inputs(11, 3, 8)

    def work(rank: int) -> tuple[list[int], list[list[int]]]:
        rows: list[int] = []
        reduced: list[list[int]] = []
        linear, all_reduce = F.linear, dist.all_reduce

        def watched_linear(x: Tensor, w: Tensor) -> Tensor:
            rows.append(x.shape[0])
            return linear(x, w)

        def watched_reduce(x: Tensor, **kwargs: Any) -> object:
            reduced.append(list(x.shape))
            return all_reduce(x, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.F, "linear", watched_linear)
            patch.setattr(dist, "all_reduce", watched_reduce)
            loss_and_gradients(
                lambda h, w: vocabulary_cross_entropy(h, w, labels_T, 4 * rank, group(), 4),
                hidden_TD,
                weight_VD[4 * rank :][:4],
            )
        return rows, reduced

    wanted = [4, 4, 3], [[4], [2, 4], [4], [2, 4], [3], [2, 3]]
    assert run_ranks(2, work) == [wanted, wanted]


# -- the embedding --


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_local_embedding(dtype: torch.dtype) -> None:
    """Every part is the whole where it holds the token, and zero elsewhere; gradients too."""
    tokens_BS = torch.tensor([[0, 5, 2, 2], [3, 3, 4, 0]])
    _, weight_VD, _ = inputs(1, 3, 6, dtype)
    upstream_BSD = inputs(8, 3, 6, dtype)[0].view(2, 4, 3)
    weight_VD.requires_grad_()
    wanted = F.embedding(tokens_BS, weight_VD)
    (gradient,) = torch.autograd.grad(wanted, weight_VD, upstream_BSD)
    parts, gradients = [], []
    for start in (0, 2, 4):
        weight_vD = weight_VD.detach()[start : start + 2].requires_grad_()
        part = local_embedding(tokens_BS, weight_vD, start)
        assert not part[(tokens_BS < start) | (tokens_BS >= start + 2)].any()
        parts.append(part)
        gradients.append(torch.autograd.grad(part, weight_vD, upstream_BSD)[0])
    assert torch.equal(torch.stack(parts).sum(dim=0), wanted)
    assert torch.equal(torch.cat(gradients), gradient)


# -- the modules, their weight a DTensor --


VOCAB, DIM = 8, 6


def split_over_tp(weight_VD: Tensor, mesh: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(weight_VD, mesh, [Shard(0)], src_data_rank=None))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_modules(world_size: int, dtype: torch.dtype) -> None:
    """Embedding -> part of the sequence -> head, the loss counted once."""
    _, weight_VD, labels_T = inputs(16, DIM, VOCAB, dtype)
    _, head_VD, tokens_T = inputs(15, DIM, VOCAB, dtype, ignored=0.0)
    tokens_BS = tokens_T[:8].view(2, 4)
    labels_BS = labels_T[:8].view(2, 4)

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mesh = init_device_mesh("cpu", (world_size,))
        embed = VocabularyEmbedding(VOCAB, DIM, mesh.get_group())
        head = VocabularyHead(DIM, VOCAB, mesh.get_group())
        embed.weight, head.weight = (split_over_tp(w, mesh) for w in (weight_VD, head_VD))
        hidden_BsD = embed(tokens_BS)
        loss = head.loss_sum(hidden_BsD.sin(), labels_BS)
        loss.backward()
        assert isinstance(embed.weight.grad, DTensor) and isinstance(head.weight.grad, DTensor)
        return hidden_BsD.detach(), loss.detach(), local(embed.weight.grad), local(head.weight.grad)

    embed, head = nn.Embedding(VOCAB, DIM), Head(DIM, VOCAB)
    embed.weight, head.weight = nn.Parameter(weight_VD), nn.Parameter(head_VD)
    hidden_BSD = embed(tokens_BS)
    loss = head.loss_sum(hidden_BSD.sin(), labels_BS)
    loss.backward()
    assert embed.weight.grad is not None and head.weight.grad is not None

    hidden, losses, embed_grads, head_grads = zip(*run_ranks(world_size, work), strict=True)
    assert torch.equal(torch.cat(hidden, dim=1), hidden_BSD.detach())
    for value in losses:
        assert_near(value, loss.detach(), dtype)
    assert_near(torch.cat(embed_grads), embed.weight.grad, dtype)
    assert_near(torch.cat(head_grads), head.weight.grad, dtype)


def test_modules_under_fsdp() -> None:
    """2 (data) x 2 (tensor): FSDP2 shards the DTensors once more and sums their gradients."""
    _, weight_VD, labels_T = inputs(16, DIM, VOCAB, torch.float32)
    _, head_VD, tokens_T = inputs(15, DIM, VOCAB, torch.float32, ignored=0.0)
    tokens_BS, labels_BS = tokens_T[:8].view(2, 4), labels_T[:8].view(2, 4)

    class Ends(nn.Module):
        def __init__(self, embed: nn.Embedding, head: Head) -> None:
            super().__init__()
            self.embed, self.head = embed, head

        def forward(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
            return self.head.loss_sum(self.embed(tokens_BS).sin(), labels_BS)

    def work(rank: int) -> tuple[float, Tensor, Tensor]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        tp = mesh["tp"]
        ends = Ends(
            VocabularyEmbedding(VOCAB, DIM, tp.get_group()),
            VocabularyHead(DIM, VOCAB, tp.get_group()),
        )
        ends.embed.weight = split_over_tp(weight_VD, tp)
        ends.head.weight = split_over_tp(head_VD, tp)
        fully_shard(ends, mesh=mesh["dp"])
        ends.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        ends.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        mine = slice(rank // 2, rank // 2 + 1)
        loss = ends(tokens_BS[mine], labels_BS[mine])
        loss.backward()
        whole = [p.grad.full_tensor() for p in (ends.embed.weight, ends.head.weight)]
        return loss.item(), *whole

    embed, head = nn.Embedding(VOCAB, DIM), Head(DIM, VOCAB)
    embed.weight, head.weight = nn.Parameter(weight_VD), nn.Parameter(head_VD)
    loss = Ends(embed, head)(tokens_BS, labels_BS)
    loss.backward()
    assert embed.weight.grad is not None and head.weight.grad is not None
    results = run_ranks(4, work)
    assert results[0][0] + results[2][0] == pytest.approx(loss.item(), rel=1e-6)
    for _, embed_grad, head_grad in results:
        assert_near(embed_grad, embed.weight.grad, torch.float32)
        assert_near(head_grad, head.weight.grad, torch.float32)


def test_logits_are_refused() -> None:
    def work(rank: int) -> str:
        with pytest.raises(NotImplementedError) as caught:
            VocabularyHead(DIM, VOCAB, group())(torch.zeros(1, 2, DIM))
        return str(caught.value)

    for message in run_ranks(2, work):
        assert "gives the loss only" in message and "tensor_model_parallel_size 1" in message
