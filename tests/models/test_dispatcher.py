"""The seam: rows to their experts and back, against a dense loop."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.models.components.dispatcher import Dispatched, LocalDispatcher

choices = st.integers(1, 5).flatmap(
    lambda experts: st.tuples(
        st.just(experts),
        st.integers(1, experts).flatmap(
            lambda k: st.lists(
                st.permutations(range(experts)).map(lambda p: p[:k]), min_size=1, max_size=6
            )
        ),
    )
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def scaled(sent: Dispatched) -> Tensor:
    """Stand-in for the experts: expert e multiplies its rows by e + 1 and adds their square."""
    rows_RD, counts_e = sent.rows_RD, sent.counts_e
    factor_R1 = torch.arange(1.0, len(counts_e) + 1).repeat_interleave(counts_e).unsqueeze(1)
    return (rows_RD * factor_R1 + rows_RD.square()) * sent.weights_R.unsqueeze(1)


def through(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, experts: int) -> Tensor:
    dispatcher = LocalDispatcher(experts)
    sent = dispatcher.dispatch(x_TD, weights_TK, ids_TK)
    return dispatcher.combine(scaled(sent), sent)


def dense(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    rows = []
    for x_D, weights_K, ids_K in zip(x_TD, weights_TK, ids_TK.tolist(), strict=True):
        results = [
            weight * (x_D * (expert + 1) + x_D.square())
            for weight, expert in zip(weights_K, ids_K, strict=True)
        ]
        rows.append(torch.stack(results).sum(dim=0))
    return torch.stack(rows)


@given(case=choices)
def test_equals_a_dense_loop(case: tuple[int, list[list[int]]]) -> None:
    experts, ids = case
    ids_TK = torch.tensor(ids)
    leaves = random(len(ids), 3), random(*ids_TK.shape, seed=1)
    got, wanted = through(*leaves, ids_TK, experts), dense(*leaves, ids_TK)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = random(*got.shape, seed=2).detach()
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream),
        rtol=1e-12,
        atol=1e-12,
    )


@given(case=choices)
def test_what_an_expert_receives(case: tuple[int, list[list[int]]]) -> None:
    """Rows sorted by expert, tokens in order; zero counts for idle experts."""
    experts, ids = case
    x_TD = random(len(ids), 3)
    ids_TK = torch.tensor(ids)
    sent = LocalDispatcher(experts).dispatch(x_TD, 1.0 * ids_TK, ids_TK)
    arrivals = [[token for token, chosen in enumerate(ids) if e in chosen] for e in range(experts)]
    assert sent.counts_e.dtype == torch.int64
    assert sent.counts_e.tolist() == [len(tokens) for tokens in arrivals]
    assert torch.equal(sent.rows_RD, x_TD[[token for tokens in arrivals for token in tokens]])
    weights = [float(e) for e, tokens in enumerate(arrivals) for _ in tokens]
    assert sent.weights_R.tolist() == weights, "each row travels with the weight of its choice"


def test_gradcheck() -> None:
    ids_TK = torch.tensor([[2, 0], [0, 3], [3, 2], [0, 2]])
    assert torch.autograd.gradcheck(
        lambda x, w: through(x, w, ids_TK, 4), (random(4, 2), random(4, 2, seed=1))
    )


def test_all_tokens_to_one_expert() -> None:
    ids_TK = torch.full((5, 1), 2)
    leaves = random(5, 3), random(5, 1, seed=1)
    sent = LocalDispatcher(4).dispatch(*leaves, ids_TK)
    assert sent.counts_e.tolist() == [0, 0, 5, 0]
    torch.testing.assert_close(through(*leaves, ids_TK, 4), dense(*leaves, ids_TK))


def test_the_way_back_undoes_the_way_there() -> None:
    """Experts that change nothing and weights that sum to 1 give the tokens back."""
    ids_TK = torch.tensor([[1, 0], [2, 1], [0, 2]])
    x_TD = random(3, 4)
    weights_TK = torch.tensor([[0.25, 0.75]] * 3, dtype=torch.float64)
    dispatcher = LocalDispatcher(3)
    sent = dispatcher.dispatch(x_TD, weights_TK, ids_TK)
    weighted_RD = sent.rows_RD * sent.weights_R.unsqueeze(1)
    torch.testing.assert_close(dispatcher.combine(weighted_RD, sent), x_TD)


def test_results_are_added_in_fp32() -> None:
    """256 + 1 would be 256 if added in bf16, one by one."""
    dispatcher, ids_TK = LocalDispatcher(4), torch.arange(4).unsqueeze(0)
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16)
    sent = dispatcher.dispatch(x_TD, torch.ones(1, 4), ids_TK)
    y_RD = torch.tensor([[256.0], [1.0], [1.0], [0.0]], dtype=torch.bfloat16)
    got = dispatcher.combine(y_RD, sent)
    assert got.dtype == torch.bfloat16 and got.item() == 258.0
