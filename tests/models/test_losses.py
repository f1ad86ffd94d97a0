"""Losses are sums: divided by the global label count they do not depend on how a batch is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.models.transformer import Head, loss_sums, shift
from deepseek.ops.cross_entropy import IGNORE_INDEX

DIM, VOCAB = 6, 9


def head() -> Head:
    made = Head(DIM, VOCAB).double()
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(7))
    return made


def hidden(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(count, *shape, DIM, generator=generator, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in made]


def random_labels(sequences: int, length: int, unlabelled: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCAB, (sequences, length), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < unlabelled] = IGNORE_INDEX
    return labels


def by_hand(
    states: Tensor, weight: Tensor, labels: Tensor, depth: int, documents: Tensor
) -> Tensor:
    """Sum of -log p of label i + depth, position by position."""
    total = torch.zeros((), dtype=torch.float64)
    rows, length = labels.shape
    for row in range(rows):
        for i in range(length - depth):
            label = int(labels[row, i + depth])
            if label != IGNORE_INDEX and documents[row, i] == documents[row, i + depth]:
                total = total - torch.log_softmax(weight @ states[row, i], 0)[label]
    return total


@pytest.mark.parametrize("depths", [0, 1, 3])
@pytest.mark.parametrize("isolated", [False, True])
def test_equals_a_loop(depths: int, isolated: bool) -> None:
    labels = random_labels(2, 6)
    documents = torch.zeros_like(labels)
    if isolated:
        documents = torch.tensor([[0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 4, 5]])
    main, *mtp = hidden(depths + 1, 2, 6)
    shared = head()
    sums = loss_sums(main, mtp, shared, labels, documents if isolated else None)
    wanted_main = by_hand(main, shared.weight, labels, 0, documents)
    torch.testing.assert_close(sums.main, wanted_main)
    wanted = [
        by_hand(states, shared.weight, labels, depth, documents)
        for depth, states in enumerate(mtp, start=1)
    ]
    if not depths:
        assert sums.mtp == 0 and sums.mtp.dtype == torch.float64
        return
    torch.testing.assert_close(sums.mtp, sum(wanted) / depths)
    leaves = (shared.weight, main, *mtp)
    torch.testing.assert_close(
        torch.autograd.grad(sums.main + 0.3 * sums.mtp, leaves),
        torch.autograd.grad(wanted_main + 0.3 * sum(wanted) / depths, leaves),
    )


def test_sums_and_not_means() -> None:
    """Twice the batch, twice the loss; unlabelled positions add nothing."""
    (states,) = hidden(1, 2, 5)
    labels = random_labels(2, 5)
    shared = head()
    once = loss_sums(states, [], shared, labels).main
    twice = loss_sums(torch.cat((states, states)), [], shared, torch.cat((labels, labels))).main
    torch.testing.assert_close(twice, 2 * once)
    wanted = F.cross_entropy(shared(states).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(once, wanted)


@given(
    cuts=st.lists(st.integers(1, 3), min_size=1, max_size=5),
    labelled=st.lists(st.integers(0, 5), min_size=15, max_size=15),
    depths=st.integers(0, 2),
)
def test_any_cut_gives_the_same_gradient(cuts: list[int], labelled: list[int], depths: int) -> None:
    """Sequences with none, few and all labels, in micro-batches of any sizes."""
    sequences = sum(cuts)
    labels = random_labels(sequences, 5, unlabelled=0.0)
    for row, count in enumerate(labelled[:sequences]):
        labels[row, count:] = IGNORE_INDEX
    num_labels = (labels != IGNORE_INDEX).sum().clamp(min=1)
    states = hidden(depths + 1, sequences, 5)
    found = []
    for sizes in ([sequences], cuts):
        shared = head()
        total, start = torch.zeros((), dtype=torch.float64), 0
        for size in sizes:
            rows = slice(start, start + size)
            micro = [state[rows] for state in states]
            sums = loss_sums(micro[0], micro[1:], shared, labels[rows])
            total = total + (sums.main + 0.3 * sums.mtp) / num_labels
            start += size
        found.append((total, *torch.autograd.grad(total, (shared.weight, *states))))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def test_no_label_at_all() -> None:
    main, mtp = hidden(2, 2, 3)
    labels = torch.full((2, 3), IGNORE_INDEX)
    shared = head()
    sums = loss_sums(main, [mtp], shared, labels)
    assert sums.main == 0 and sums.mtp == 0
    (sums.main + sums.mtp).backward()
    assert not shared.weight.grad.any()


def test_shift() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert shift(ids, 1, -100).tolist() == [[2, 3, 4, -100], [6, 7, 8, -100]]
    assert shift(ids, 3, 0).tolist() == [[4, 0, 0, 0], [8, 0, 0, 0]]
    for places in (4, 9):
        assert shift(ids, places, 0).tolist() == [[0] * 4] * 2
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_shift_stops_at_document_borders() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert shift(ids, 1, 0, documents).tolist() == [[2, 3, 0, 5, 0, 0]]
    assert shift(ids, 2, 0, documents).tolist() == [[3, 0, 0, 0, 0, 0]]
    assert shift(ids, 7, 0, documents).tolist() == [[0] * 6]


def test_head() -> None:
    """Logits without a bias; its loss is that of its logits."""
    shared = head()
    assert [name for name, _ in shared.named_parameters()] == ["weight"]
    (states,) = hidden(1, 2, 4)
    labels = random_labels(2, 4)
    wanted = F.cross_entropy(
        (states @ shared.weight.T).flatten(0, 1), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(shared.loss_sum(states, labels), wanted)
