"""Blends: exact shares at any prefix, any place found without those before it."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config.errors import UserError
from deepseek.data.blend import Blend, BlendedDataset, parse_blend
from deepseek.data.dataset import PackedDataset
from deepseek.data.indexed import IndexedDataset

weights_lists = st.lists(st.integers(1, 500), min_size=1, max_size=7)


@given(weights_lists)
def test_shares_are_exact_at_any_prefix(weights: list[int]) -> None:
    blend = Blend(weights)
    total = sum(weights)
    counts = [0] * len(weights)
    for i in range(2 * blend.period + 3):
        dataset, local = blend.locate(i)
        assert local == counts[dataset], "samples of a dataset come in order"
        counts[dataset] += 1
        assert all(
            abs(n * total - w * (i + 1)) < total for n, w in zip(counts, weights, strict=True)
        )
        if i % 13 == 0:
            assert blend.counts(i + 1) == counts


@given(weights_lists, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_any_place_is_found_directly(weights: list[int], places: list[int]) -> None:
    used = Blend(weights)
    for place in places:
        assert used.locate(place) == Blend(weights).locate(place)
        counts = used.counts(place)
        assert sum(counts) == place
        dataset, local = used.locate(place)
        assert counts[dataset] == local


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([0.7, 0.3], [7, 3]),
        ([1, 1, 1], [1, 1, 1]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),
        ([2.5], [1]),
        ([Fraction(1, 3), Fraction(2, 3)], [1, 2]),
        ([1e-9, 1.0], [1, 999_999]),
        ([0.333333333, 0.333333333, 0.333333334], [333_333, 333_333, 333_334]),
    ],
)
def test_weights_become_whole_parts(weights: list[float], parts: list[int]) -> None:
    blend = Blend(weights)
    assert blend.parts == parts
    assert blend.shares == [part / sum(parts) for part in parts]


@given(st.lists(st.floats(1e-4, 1e3), min_size=2, max_size=9))
def test_odd_weights_are_rounded_to_millionths(weights: list[float]) -> None:
    blend = Blend(weights)
    for share, weight in zip(blend.shares, weights, strict=True):
        assert abs(share - weight / sum(weights)) <= 1e-6 * len(weights)


def test_rounded_weights_stay_within_one_sample_too() -> None:
    weights = np.random.default_rng(0).random(6)
    blend = Blend(weights.tolist())
    shares = weights / weights.sum()
    for samples in range(1, 20_000, 97):
        assert np.abs(np.array(blend.counts(samples)) - shares * samples).max() < 1.03


def test_samples_come_from_the_right_dataset(write: Callable[..., IndexedDataset]) -> None:
    parts = [write([[k] * 40] * 5, f"d{k}") for k in range(2)]
    packed = [
        PackedDataset(part, np.arange(5), seq_length=10, seed=k) for k, part in enumerate(parts)
    ]
    data = BlendedDataset(packed, Blend([0.75, 0.25]))
    seen = [int(data[i]["tokens"][0]) for i in range(400)]
    assert all(set(data[i]["tokens"]) == {seen[i]} for i in range(400))
    assert sum(seen) == 100
    blend = Blend([0.75, 0.25])
    assert seen == [blend.locate(i)[0] for i in range(400)]
    assert (data.num_documents, data.num_tokens) == (10, 400)


def test_a_finite_blend_ends_where_a_dataset_ends(write: Callable[..., IndexedDataset]) -> None:
    parts = [write([[k] * 41] * 5, f"d{k}") for k in range(2)]
    packed = [
        PackedDataset(part, np.arange(count), seq_length=8, endless=False)
        for part, count in zip(parts, (5, 1), strict=True)
    ]
    data = BlendedDataset(packed, Blend([0.5, 0.5]))
    assert [len(part) for part in packed] == [26, 5]
    assert len(data) in (10, 11)
    assert all((data[i]["documents"] >= 0).any() for i in range(len(data)))
    assert (data[len(data)]["documents"] == -1).all()


@pytest.mark.parametrize(
    ("value", "entries"),
    [
        ("p", [(Fraction(1), "p")]),
        ([0.7, "a", 0.3, "b"], [(Fraction(7, 10), "a"), (Fraction(3, 10), "b")]),
        (["30", "a", "70", "b"], [(Fraction(30), "a"), (Fraction(70), "b")]),
    ],
)
def test_blends_are_read(value: object, entries: list[tuple[Fraction, str]]) -> None:
    assert parse_blend(value, "model.data.data_prefix") == entries


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"data_prefix must be a prefix, or a blend such as \[0\.7, P1, 0\.3, P2\]; got \[\]"),
        ([0.7, "a", 0.3], r"must be a prefix, or a blend .*; got \[0\.7, 'a', 0\.3\]"),
        (3, r"must be a prefix, or a blend .*; got 3"),
        (["a", "b"], r"'a' is not a weight"),
        ([0.5, 0.5], r"0\.5 is not a prefix"),
        ([0, "a", 1, "b"], r"the weight of a is 0; weights must be above 0, leave the dataset out"),
        ([-1, "a"], r"the weight of a is -1"),
        ([float("inf"), "a"], r"inf is not a weight"),
        ([float("nan"), "a"], r"nan is not a weight"),
    ],
)
def test_bad_blends(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_blend(value, "model.data.data_prefix")


@pytest.mark.parametrize("weights", [[], [0], [1, -1]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"every weight of a blend must be above 0"):
        Blend(weights)
