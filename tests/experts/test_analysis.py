"""Every figure of the routing analysis against plain loops over tokens."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from deepseek.experts import analysis as metrics
from deepseek.experts.analysis import (
    BINS,
    DomainSize,
    Histogram,
    KeptChoices,
    LayerRouting,
    RoutingAnalysis,
    RoutingCounts,
    dump,
    layer_routes,
    summary,
)

EXPERTS, TOP_K, VOCAB = 9, 3, 12


class Routed:
    """Random tokens and choices, as one router might make them: experts 0 and 1 like each other,
    expert 8 is never chosen, and every token has a taste."""

    def __init__(self, count: int, seed: int) -> None:
        chance = np.random.default_rng(seed)
        self.tokens = chance.integers(0, VOCAB, count) ** 2 % VOCAB
        taste = np.random.default_rng(7).random((VOCAB, EXPERTS))
        self.scores = chance.random((count, EXPERTS)).astype(np.float32) * 0.5
        self.scores += 0.4 * taste[self.tokens].astype(np.float32)
        self.scores[:, 1] = self.scores[:, 0] * 0.99
        self.choice = self.scores + np.linspace(-0.1, 0.1, EXPERTS, dtype=np.float32)
        self.choice[:, 8] = -np.inf
        order = np.argsort(-self.choice, axis=1)[:, :TOP_K]
        self.experts = chance.permuted(order, axis=1)


@pytest.fixture
def parts() -> list[Routed]:
    """Batches of two domains: 0, 1, 0, 1."""
    return [Routed(count, seed) for seed, count in enumerate((40, 70, 1, 130))]


@pytest.fixture
def counts(parts: list[Routed]) -> RoutingCounts:
    made = RoutingCounts(["layers.1", "mtp.0.block"], EXPERTS, TOP_K, 2, np.arange(2, VOCAB))
    for number, part in enumerate(parts):
        seen = (part.tokens, part.experts, part.scores, part.choice)
        made.add(number % 2, LayerRouting("mtp.0.block", *seen))
    return made


def rows(parts: list[Routed]) -> list[tuple[int, int, set[int]]]:
    """(domain, token, chosen experts) of every token."""
    return [
        (number % 2, int(token), set(map(int, chosen)))
        for number, part in enumerate(parts)
        for token, chosen in zip(part.tokens, part.experts, strict=True)
    ]


def test_co_activation(parts: list[Routed], counts: RoutingCounts) -> None:
    got = metrics.co_activation(counts.pairs_LEE[1])
    for i, j in itertools.product(range(EXPERTS), repeat=2):
        of_i = [chosen for *_, chosen in rows(parts) if i in chosen]
        if not of_i:
            assert i == 8 and math.isnan(got[i, j])
            continue
        assert got[i, j] == pytest.approx(sum(j in chosen for chosen in of_i) / len(of_i))
    assert not counts.pairs_LEE[0].any()


def test_co_activation_counts_every_pair_not_only_neighbours() -> None:
    counts = RoutingCounts(["a"], 4, 3, 1, np.empty(0, np.int64))
    none = np.zeros((1, 4), np.float32)
    counts.add(0, LayerRouting("a", np.array([0]), np.array([[0, 1, 3]]), none, none))
    assert counts.pairs_LEE[0].tolist() == [[1, 1, 0, 1], [1, 1, 0, 1], [0] * 4, [1, 1, 0, 1]]


def test_load_and_domain_specialisation(parts: list[Routed], counts: RoutingCounts) -> None:
    got = metrics.domain_specialisation(counts.tokens_LGE[1], counts.seen_LG[1])
    for domain, expert in itertools.product(range(2), range(EXPERTS)):
        mine = [chosen for d, _, chosen in rows(parts) if d == domain]
        assert got[domain, expert] == pytest.approx(sum(expert in c for c in mine) / len(mine))
        assert counts.tokens_LGE[1, domain, expert] == sum(expert in c for c in mine)
    assert got.sum(axis=1) == pytest.approx([TOP_K, TOP_K])
    empty = metrics.domain_specialisation(counts.tokens_LGE[0], counts.seen_LG[0])
    assert np.isnan(empty).all()


def test_vocabulary_specialisation(parts: list[Routed], counts: RoutingCounts) -> None:
    got = metrics.vocabulary_specialisation(counts.words_LEX[1], counts.seen_LX[1])
    assert counts.counted_ids.tolist() == list(range(2, VOCAB))
    for x, token in enumerate(counts.counted_ids):
        mine = [chosen for _, t, chosen in rows(parts) if t == token]
        assert counts.seen_LX[1, x] == len(mine)
        for expert in range(EXPERTS):
            if mine:
                want = sum(expert in chosen for chosen in mine) / len(mine)
                assert got[expert, x] == pytest.approx(want)
            else:
                assert math.isnan(got[expert, x])


@pytest.mark.parametrize("minimum", [1, 20, 1000])
def test_top_tokens(parts: list[Routed], counts: RoutingCounts, minimum: int) -> None:
    got = metrics.top_tokens(
        counts.words_LEX[1], counts.seen_LX[1], counts.counted_ids, minimum, count=3
    )
    favourites = []
    for expert in range(EXPERTS):
        found = []
        for token in range(2, VOCAB):
            mine = [chosen for _, t, chosen in rows(parts) if t == token]
            share = sum(expert in chosen for chosen in mine) / max(1, len(mine))
            if len(mine) >= minimum and share > 0:
                found.append((-share, -len(mine), token))
        want = [(token, pytest.approx(-share), -seen) for share, seen, token in sorted(found)[:3]]
        assert [tuple(entry) for entry in got[expert]] == want
        favourites += want
    assert bool(favourites) == (minimum < 1000)


@pytest.mark.parametrize("minimum", [1, 20, 1000])
def test_mean_top_share(parts: list[Routed], counts: RoutingCounts, minimum: int) -> None:
    best = []
    for token in range(2, VOCAB):
        mine = [chosen for _, t, chosen in rows(parts) if t == token]
        if mine and len(mine) >= minimum:
            best.append(max(sum(e in c for c in mine) for e in range(EXPERTS)) / len(mine))
    got = metrics.mean_top_share(counts.words_LEX[1], counts.seen_LX[1], minimum)
    assert got == (pytest.approx(sum(best) / len(best)) if best else None)


def test_saturation() -> None:
    one, other = Routed(90, 1).experts, Routed(90, 2).experts
    want = sum(len(set(a) & set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True))
    assert metrics.saturation(one, other) == pytest.approx(want / 90 / TOP_K)
    assert metrics.saturation(one, one[:, ::-1]) == 1.0
    assert metrics.saturation(np.array([[0, 1]]), np.array([[2, 3]])) == 0.0


def test_saturation_of_streamed_choices_weighs_every_token_alike(parts: list[Routed]) -> None:
    """Over domains of different lengths, each kept up to a limit, in batches of any size."""
    limit = 60
    mine, theirs = KeptChoices(limit), KeptChoices(limit)
    wanted = {0: 0, 1: 0}
    taken = {0: 0, 1: 0}
    for number, part in enumerate(parts):
        other = Routed(len(part.tokens), 50 + number)
        mine.add("a", number % 2, part.experts)
        for cut in np.array_split(other.experts, 3):
            theirs.add("a", number % 2, cut)
        for a, b in zip(part.experts.tolist(), other.experts.tolist(), strict=True):
            if taken[number % 2] < limit:
                taken[number % 2] += 1
                wanted[number % 2] += len(set(a) & set(b))
    assert taken == {0: 41, 1: 60}
    got = metrics.mean_saturation(mine, theirs, "a", 2)
    assert got == pytest.approx(sum(wanted.values()) / sum(taken.values()) / TOP_K)
    with pytest.raises(KeyError):
        mine.of("b", 0)


def test_margin(parts: list[Routed]) -> None:
    part = parts[-1]
    part.choice[3, 3:] = -np.inf  # exactly three eligible experts
    got = metrics.router_margin(part.choice, TOP_K)
    for token, row in enumerate(part.choice.tolist()):
        best = sorted(row, reverse=True)
        if best[TOP_K] == -math.inf:
            assert token == 3 and math.isnan(got[token])
        else:
            assert got[token] == pytest.approx(best[TOP_K - 1] - best[TOP_K]) and got[token] >= 0
    assert np.isnan(metrics.router_margin(part.choice, EXPERTS)).all()


def test_histograms_of_margins_and_scores(parts: list[Routed], counts: RoutingCounts) -> None:
    for histogram, values in (
        (counts.margins[1], [metrics.router_margin(p.choice, TOP_K) for p in parts]),
        (counts.best[1], [p.scores.max(axis=1) for p in parts]),
        (counts.scores[1], [p.scores.ravel() for p in parts]),
    ):
        every = np.concatenate(values).astype(np.float64)
        assert histogram.counts_H.sum() == len(every)
        assert histogram.mean == pytest.approx(every.mean())
        for share in (0.05, 0.5, 0.95):
            want = sorted(every)[math.ceil(share * len(every)) - 1]
            assert histogram.quantile(share) == pytest.approx(want, abs=1 / BINS)
        coarse = summary(histogram)
        assert sum(coarse["counts"]) == len(every)
        for k, count in enumerate(coarse["counts"]):
            edges = np.array([k, k + 1]) / len(coarse["counts"]) * coarse["upper"]
            inside = (every >= edges[0]) & (every < edges[1])
            inside |= (every >= 1) & (k == len(coarse["counts"]) - 1) & (coarse["upper"] == 1)
            assert count == inside.sum() or abs(count - inside.sum()) <= 1  # rounding at an edge
    assert Histogram().mean is None and Histogram().quantile(0.5) is None
    assert sum(summary(Histogram())["counts"]) == 0


@pytest.mark.parametrize("seed", range(5))
def test_clusters_stand_together(seed: int) -> None:
    """Three groups of experts that are always chosen together, in shuffled order."""
    chance = np.random.default_rng(seed)
    names = chance.permutation(12)
    groups = [set(names[:5].tolist()), set(names[5:9].tolist()), set(names[9:].tolist())]
    counts = RoutingCounts(["a"], 12, 3, 1, np.empty(0, np.int64))
    none = np.zeros((1, 12), np.float32)
    for _ in range(300):
        group = sorted(groups[chance.integers(3)])
        if chance.random() < 0.1:
            group = list(range(12))
        chosen = chance.choice(group, (1, 3), replace=False)
        counts.add(0, LayerRouting("a", np.array([0]), chosen, none, none))
    order = metrics.cluster_order(counts.pairs_LEE[0]).tolist()
    assert sorted(order) == list(range(12))
    of = [next(i for i, group in enumerate(groups) if expert in group) for expert in order]
    assert sum(a != b for a, b in itertools.pairwise(of)) == 2, of


def test_cluster_order_of_experts_that_were_never_chosen() -> None:
    assert sorted(metrics.cluster_order(np.zeros((4, 4), np.int64)).tolist()) == [0, 1, 2, 3]
    assert metrics.cluster_order(np.array([[5]])).tolist() == [0]


def test_the_whole_as_json(parts: list[Routed], counts: RoutingCounts) -> None:
    """Numbers that do not exist are null, for JSON has no NaN; layers keep names and order."""
    layers = layer_routes(counts, minimum=20)
    analysis = RoutingAnalysis(
        "run/step", 7, EXPERTS, TOP_K, [DomainSize("a", "x", 41), DomainSize("b", "y", 200)],
        layers, 20, [], 0, lambda token: f"<{token}>",
    )  # fmt: skip
    plain = json.loads(dump(analysis), parse_constant=lambda word: pytest.fail(word))
    assert [layer["name"] for layer in plain["layers"]] == ["layers.1", "mtp.0.block"]
    layer = plain["layers"][1]
    assert sum(layer["load"]) == 241 * TOP_K == plain["tokens"] * TOP_K
    assert layer["co_activation"][8] == [None] * EXPERTS and layer["load"][8] == 0
    assert layer["top_tokens"][8] == [] and layers[1].dead == 1
    assert layer["top_tokens"][0][0]["text"].startswith("<")
    load = np.array(layer["load"])
    assert layer["variation"] == pytest.approx(load.std() / load.mean(), abs=1e-4)
    assert layer["max_violation"] == pytest.approx(load.max() / load.mean() - 1, abs=1e-4)
    one, two, together = layers[1].closest
    found = metrics.co_activation(counts.pairs_LEE[1])
    assert together == max(
        found[i, j] for i in range(EXPERTS) for j in range(EXPERTS) if i != j and i != 8
    )
    assert found[one, two] == together and one != two
    domain, expert, above = layers[1].most_particular
    shares = layers[1].domains_GE
    assert above == pytest.approx(abs(shares[0] - shares[1]).max() / 2)
    assert shares[domain, expert] - shares[1 - domain, expert] == pytest.approx(2 * above)
