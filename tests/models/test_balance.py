"""Balance losses by their equations, and how they enter: in the backward pass, once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepseek.models.components.balance import (
    attach,
    count_assignments,
    router_z,
    sequence_balance,
)

REAL = torch.ones(1, 4, dtype=torch.bool)


def random_scores(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return scores.requires_grad_()


def by_hand(scores_BSE: Tensor, top_k: int, real_BS: Tensor) -> Tensor:
    """Eq 17-20 without alpha, one sequence and one expert at a time, times its length."""
    total = torch.zeros((), dtype=torch.float64)
    for scores_SE, real_S in zip(scores_BSE, real_BS, strict=True):
        kept = [s for s, real in zip(scores_SE, real_S.tolist(), strict=True) if real]
        if not kept:
            continue
        experts = len(kept[0])
        for i in range(experts):
            hits = sum(i in s.detach().topk(top_k).indices.tolist() for s in kept)
            f = experts / (top_k * len(kept)) * hits
            p = sum(s[i] / s.sum() for s in kept) / len(kept)
            total = total + len(kept) * f * p
    return total


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_its_equations(top_k: int) -> None:
    scores_BSE = random_scores(3, 5, 4)
    real_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    got, wanted = (f(scores_BSE, top_k, real_BS) for f in (sequence_balance, by_hand))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, scores_BSE), torch.autograd.grad(wanted, scores_BSE)
    )


def test_balanced_and_collapsed() -> None:
    """1 per token if each expert takes its share; E / K times the score of one that takes all."""
    turns = torch.eye(4, dtype=torch.float64).unsqueeze(0) * 0.6 + 0.1
    assert sequence_balance(turns, 1, REAL).item() == pytest.approx(4.0)
    collapsed = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(1, 4, 4).double()
    assert sequence_balance(collapsed, 1, REAL).item() == pytest.approx(4 * 4 * 0.7)


def test_scores_count_by_their_share() -> None:
    """Eq 19: a token with scores ten times as large weighs no more."""
    scores_BSE = random_scores(1, 4, 4).detach()
    louder = scores_BSE.clone()
    louder[0, 2] *= 10
    got, wanted = (sequence_balance(s, 2, REAL) for s in (louder, scores_BSE))
    torch.testing.assert_close(got, wanted)


def test_sequences_are_balanced_one_by_one() -> None:
    """Two sequences, each collapsed to another expert: balanced together, but not one by one."""
    one = torch.tensor([0.9, 0.1]).expand(3, 2)
    scores_BSE = torch.stack((one, one.flip(1))).double()
    real_BS = torch.ones(2, 3, dtype=torch.bool)
    together = sequence_balance(scores_BSE, 1, real_BS)
    assert together.item() == pytest.approx(2 * 3 * 2 * 0.9)


def test_router_z() -> None:
    logits_BSE = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [50.0, 50.0]]], dtype=torch.float64)
    real_BS = torch.tensor([[True, True, False]])
    wanted = math.log(math.exp(1) + math.exp(2)) ** 2 + math.log(2) ** 2
    assert router_z(logits_BSE, real_BS).item() == pytest.approx(wanted)
    everything = router_z(logits_BSE, torch.ones_like(real_BS)).item()
    assert everything == pytest.approx(wanted + (50 + math.log(2)) ** 2)


def test_count_assignments() -> None:
    ids_TK = torch.tensor([[0, 3], [3, 1], [3, 0], [1, 0]])
    real_T = torch.tensor([True, True, True, False])
    counts_E = count_assignments(ids_TK, real_T, 5)
    assert counts_E.dtype == torch.int64 and counts_E.tolist() == [2, 1, 0, 3, 0]
    assert count_assignments(ids_TK[:0], real_T[:0], 2).tolist() == [0, 0]


def test_attach() -> None:
    """Identity forward; backward: the loss is differentiated too, and the totals grow."""
    weights, other = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    total_loss, total_counts = torch.zeros(()), torch.zeros(2, dtype=torch.int64)
    counts = torch.tensor([4, 2])
    loss = 5.0 * other.square().sum()
    out = attach(weights, loss, counts, total_loss, total_counts)
    assert torch.equal(out, weights)
    assert not total_loss and not total_counts.any(), "counted before the backward pass"
    (3.0 * out).sum().backward()
    assert torch.equal(weights.grad, torch.full((3, 2), 3.0))
    torch.testing.assert_close(other.grad, 10.0 * other)
    assert total_counts.tolist() == [4, 2]
    assert total_loss.item() == pytest.approx(loss.item())


def test_the_attached_gradient_does_not_depend_on_the_training_loss() -> None:
    """A loss divided by a million labels leaves the balance loss as strong."""
    found = []
    for scale in (1.0, 1e-6, 0.0):
        other = torch.ones(2, requires_grad=True)
        weights = torch.ones(2, requires_grad=True)
        totals = torch.zeros(()), torch.zeros(2, dtype=torch.int64)
        attached = attach(weights, other.sum(), torch.tensor([1, 1]), *totals)
        (scale * attached.sum()).backward()
        found.append(other.grad.tolist())
    assert found == [[1.0, 1.0]] * 3
