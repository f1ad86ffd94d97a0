"""Which tokens may be drawn, with what probability; what a user may ask for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.inference.generation import Sampling, keep_top_p, sample


def probabilities(logits: list[list[float]] | Tensor, sampling: Sampling) -> list[list[float]]:
    """What ``sample`` draws from."""
    drawn_from: list[Tensor] = []
    multinomial = torch.multinomial

    def watched(probs: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
        drawn_from.append(probs)
        return multinomial(probs, count, generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", watched)
        tokens = sample(torch.as_tensor(logits), sampling, torch.Generator().manual_seed(0))
    (probs,) = drawn_from
    assert tokens.dtype == torch.int64 and tokens.shape == (len(logits),)
    kept = probs / probs.sum(dim=-1, keepdim=True)
    assert all(row[token] > 0 for row, token in zip(kept, tokens, strict=True))
    return kept.tolist()


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def renormalised(probs: list[float], kept: set[int]) -> list[float]:
    total = sum(probs[i] for i in kept)
    return [p / total if i in kept else 0.0 for i, p in enumerate(probs)]


distinct = st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=1, max_size=9, unique=True)


@given(logits=distinct, temperature=st.sampled_from([0.3, 1.0, 2.0]))
def test_temperature(logits: list[float], temperature: float) -> None:
    got = probabilities([logits], Sampling(temperature))
    assert got[0] == pytest.approx(softmax(logits, temperature), rel=1e-4, abs=1e-7)


@given(logits=distinct, top_k=st.integers(0, 12), temperature=st.sampled_from([0.5, 1.0]))
def test_top_k(logits: list[float], top_k: int, temperature: float) -> None:
    """Exactly the k most probable, in their own proportions; 0 and too many: all."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = set(order[: top_k or None])
    wanted = renormalised(softmax(logits, temperature), kept)
    got = probabilities([logits], Sampling(temperature, top_k=top_k))[0]
    assert {i for i, p in enumerate(got) if p > 0} == kept
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@given(
    logits=distinct,
    top_p=st.integers(1, 200).map(lambda i: i / 200),
    temperature=st.sampled_from([0.5, 1.0]),
)
def test_top_p(logits: list[float], top_p: float, temperature: float) -> None:
    """The smallest set of most probable tokens that reaches p: the one that crosses p is in."""
    probs = softmax(logits, temperature)
    kept: set[int] = set()
    reached = 0.0
    for i in sorted(range(len(logits)), key=lambda i: -probs[i]):
        if reached >= top_p:
            break
        if abs(reached - top_p) < 1e-5:  # rounding decides
            return
        kept.add(i)
        reached += probs[i]
    got = probabilities([logits], Sampling(temperature, top_p=top_p))[0]
    assert {i for i, p in enumerate(got) if p > 0} == kept or top_p == 1
    assert got == pytest.approx(renormalised(probs, kept), rel=1e-4, abs=1e-6)
    if top_p < 1:  # whether the first few reach it or not
        probs_BV = torch.tensor([probs, [1.0 / len(probs)] * len(probs)])
        few_BV, all_BV = (keep_top_p(probs_BV, top_p, first) for first in (2, len(probs)))
        assert torch.equal(few_BV[0], all_BV[0])
        assert (few_BV[1] > 0).sum() == (all_BV[1] > 0).sum()


def test_top_p_of_what_top_k_left() -> None:
    """k = 2 leaves 2/3 and 1/3; p = 0.6 of that is the first alone."""
    logits = [math.log(p) for p in (0.4, 0.2, 0.2 - 1e-3, 0.2 + 1e-3)]
    assert probabilities([logits], Sampling(top_k=2, top_p=0.6))[0] == [1.0, 0.0, 0.0, 0.0]
    both = probabilities([logits], Sampling(top_k=2, top_p=0.7))[0]
    assert [p > 0 for p in both] == [True, False, False, True]


def test_the_most_probable_token_is_always_kept() -> None:
    assert probabilities([[0.0, 5.0, 1.0]], Sampling(top_p=1e-6)) == [[0.0, 1.0, 0.0]]
    assert probabilities([[0.0, 5.0, 1.0]], Sampling(top_k=1)) == [[0.0, 1.0, 0.0]]


def test_rows_are_cut_one_by_one() -> None:
    got = probabilities([[3.0, 2.0, 0.0], [0.0, 2.0, 3.0]], Sampling(top_k=2))
    assert [[p > 0 for p in row] for row in got] == [[True, True, False], [False, True, True]]
    flat_and_sharp = probabilities([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]], Sampling(top_p=0.9))
    assert [sum(p > 0 for p in row) for row in flat_and_sharp] == [3, 1]


def test_tied_tokens_stay_together() -> None:
    """Which of two equal logits comes first is the kernel's accident; neither is left out."""
    got = probabilities([[1.0, 2.0, 2.0, 0.0]], Sampling(top_k=1))[0]
    assert got == pytest.approx([0.0, 0.5, 0.5, 0.0])


def test_temperature_zero_is_greedy() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    before = torch.Generator().manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    for sampling in (Sampling(0.0), Sampling(0.0, top_k=2, top_p=0.5)):
        assert sample(logits_BV, sampling, generator).tolist() == [1, 0]
    assert torch.equal(before.get_state(), generator.get_state())


def test_bf16_logits_are_cooled_in_fp32() -> None:
    """8 / 0.3 and 7.96875 / 0.3 are 0.104 apart, and 0.125 once rounded to bf16."""
    logits = [8.0, 7.96875]
    got = probabilities(torch.tensor([logits], dtype=torch.bfloat16), Sampling(0.3))
    assert got[0] == pytest.approx(softmax(logits, 0.3), rel=1e-5)


def test_draws_follow_the_probabilities() -> None:
    """4,000 rows of 1/2, 1/3, 1/6: counts within five standard deviations."""
    logits_BV = torch.tensor([[math.log(3), math.log(2), 0.0]]).expand(4000, 3)
    tokens = sample(logits_BV, Sampling(), torch.Generator().manual_seed(0))
    for token, p in enumerate((1 / 2, 1 / 3, 1 / 6)):
        count = int((tokens == token).sum())
        assert abs(count - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(temperature=-0.5), r"temperature=-0\.5: must be 0 \(greedy\) or more"),
        (dict(temperature=math.nan), r"temperature=nan: must be 0 \(greedy\) or more"),
        (dict(top_k=-1), r"top_k=-1: must be 0 \(off\) or more"),
        (dict(top_p=0.0), r"top_p=0\.0: must be above 0 and at most 1 \(off\)"),
        (dict(top_p=1.5), r"top_p=1\.5: must be above 0 and at most 1 \(off\)"),
        (dict(top_p=math.nan), r"top_p=nan: must be above 0 and at most 1 \(off\)"),
    ],
)
def test_impossible_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_borders_of_the_settings() -> None:
    assert Sampling(0.0, 0, 1.0) == Sampling(temperature=0.0)
    assert Sampling() == Sampling(1.0, 0, 1.0)
