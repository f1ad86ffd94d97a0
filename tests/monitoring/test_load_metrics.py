"""Every formula on counts equals slow loops over the choices, on eight workloads."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from deepseek.monitoring import load_metrics as lm
from deepseek.monitoring.record.expert_monitor import ExpertRecord, add_loads
from deepseek.training.step import StepRecord
from support.workloads import NAMES, Workload, workload


def counts(load: Workload, step: int, layer: int) -> list[int]:
    """Assignments of each expert, counted one by one."""
    found = [0] * load.experts
    for row in load.chosen[step][layer].tolist():
        assert len(set(row)) == load.top_k
        for expert in row:
            found[expert] += 1
    return found


def slow_variation(n: list[int]) -> float:
    mean = sum(n) / len(n)
    return math.sqrt(sum((x - mean) ** 2 for x in n) / len(n)) / mean


def slow_entropy(n: list[int]) -> float:
    total = sum(n)
    return -sum(x / total * math.log(x / total) for x in n if x)


ORACLES: dict[Callable[[np.ndarray], np.ndarray], Callable[[list[int]], object]] = {
    lm.utilisation: lambda n: [x / (sum(n) / len(n)) for x in n],
    lm.variation: slow_variation,
    lm.max_violation: lambda n: max(n) / (sum(n) / len(n)) - 1,
    lm.entropy: lambda n: slow_entropy(n) / math.log(len(n)),
    lm.effective_experts: lambda n: math.exp(slow_entropy(n)) / len(n),
    lm.dead: lambda n: sum(1 for x in n if x == 0),
    lm.starved: lambda n: sum(1 for x in n if x / (sum(n) / len(n)) < 0.1),
    lm.lorenz: lambda n: [sum(sorted(n)[:k]) / sum(n) for k in range(len(n) + 1)],
    lm.imbalance: lambda n: max(n) / (sum(n) / len(n)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("formula", ORACLES, ids=lambda formula: formula.__name__)
def test_a_formula_equals_its_oracle(name: str, formula: Callable) -> None:
    load = workload(name)
    found = formula(load.tokens)
    for step in range(len(load.chosen)):
        for layer in range(len(load.chosen[step])):
            expected = ORACLES[formula](counts(load, step, layer))
            np.testing.assert_allclose(found[step, layer], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_the_load_of_a_rank_is_that_of_its_experts(name: str, ranks: int) -> None:
    load = workload(name)
    found = lm.rank_load(load.tokens, ranks)
    for step in range(len(load.chosen)):
        for layer in range(len(load.chosen[step])):
            expected = [0] * ranks
            for row in load.chosen[step][layer].tolist():
                for expert in row:
                    expected[expert // (load.experts // ranks)] += 1
            assert found[step, layer].tolist() == expected


def test_ranks_that_do_not_divide_the_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="16 experts do not divide over 3 ranks"):
        lm.rank_load(workload("balanced").tokens, 3)


def test_the_workloads_are_what_their_names_say() -> None:
    loads = {name: workload(name).tokens for name in NAMES}
    assert (lm.max_violation(loads["balanced"]) == 0).all()
    assert (lm.rank_load(loads["hot_rank"], 4).argmax(axis=-1) == 1).all()
    assert (lm.max_violation(loads["hot_set"]) > 1.5).all()
    spread, hot = (lm.imbalance(lm.rank_load(loads[n], 4)) for n in ("spread", "hot_rank"))
    assert spread.max() < 1.4 < 1.9 < hot.min()
    assert len(set(loads["ragged"].sum(axis=-1)[:, 0].tolist())) > 3
    assert (lm.rank_load(loads["zero_expert_rank"], 4)[..., 3] == 0).all()
    assert lm.rank_load(loads["rotating"], 4).argmax(axis=-1)[:, 0].tolist() == [0, 1, 2, 3, 0, 1]
    assert lm.dead(loads["burst"])[:, 0].tolist() == [0, 0, 0, 14, 0, 0]


def test_a_layer_without_tokens_has_no_shares() -> None:
    nothing = np.zeros((2, 4), np.uint32)
    for formula in (lm.utilisation, lm.variation, lm.max_violation, lm.entropy):
        assert np.isnan(formula(nothing)).all(), formula.__name__
    assert np.isnan(lm.entropy(np.zeros((3, 1)))).all()
    assert lm.dead(nothing).tolist() == [4, 4]


def test_one_expert_is_balanced() -> None:
    alone = np.array([[7]], np.uint32)
    assert lm.entropy(alone).tolist() == [1.0]
    assert lm.max_violation(alone).tolist() == [0.0]


def slow_replicated_imbalance(n: list[int], ranks: int, replicas: int) -> float:
    copies = [1] * len(n)
    for _ in range(replicas):
        hottest = max(range(len(n)), key=lambda e: (n[e] / copies[e], -e))
        copies[hottest] += 1
    slots = sorted(
        (n[e] / copies[e] for e in range(len(n)) for _ in range(copies[e])), reverse=True
    )
    room = math.ceil(len(slots) / ranks)
    held: list[list[float]] = [[] for _ in range(ranks)]
    for slot in slots:
        free = [r for r in range(ranks) if len(held[r]) < room]
        held[min(free, key=lambda r: (sum(held[r]), r))].append(slot)
    loads = [sum(rank) for rank in held]
    return max(loads) / (sum(loads) / ranks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("replicas", [0, 1, 4, 8])
def test_the_what_if_equals_its_oracle(name: str, replicas: int) -> None:
    load = workload(name)
    for step in range(len(load.chosen)):
        found = lm.replicated_imbalance(load.tokens[step], load.ranks, replicas)
        for layer, value in enumerate(found):
            expected = slow_replicated_imbalance(counts(load, step, layer), load.ranks, replicas)
            assert value == pytest.approx(expected)


def test_replicas_cure_a_hot_rank() -> None:
    tokens = workload("hot_rank").tokens[0]
    as_placed = lm.imbalance(lm.rank_load(tokens, 4))
    placed_anew = lm.replicated_imbalance(tokens, 4, 0)
    assert (placed_anew < 0.6 * as_placed).all()
    one_takes_all = np.array([[1000, 1, 1, 1, 1, 1, 1, 1]])
    assert lm.replicated_imbalance(one_takes_all, 4, 0)[0] > 3.9
    assert lm.replicated_imbalance(one_takes_all, 4, 4)[0] < 1.7


def test_dead_experts_are_dated_from_their_last_token() -> None:
    watch = lm.DeadSince()
    history = [[[5, 0, 3, 0]], [[5, 0, 0, 1]], [[5, 0, 0, 0]]]
    assert watch.experts() == []
    for step, tokens in zip((10, 20, 30), history, strict=True):
        watch.add(step, np.array(tokens))
    assert [(d.layer, d.expert, d.since, d.steps) for d in watch.experts()] == [
        (0, 1, 10, 3), (0, 2, 20, 2), (0, 3, 30, 1)]  # fmt: skip
    watch.add(40, np.ones((1, 4)))
    assert watch.experts() == []


def test_the_longest_stretches_are_kept_after_they_have_ended() -> None:
    watch = lm.DeadSince()
    assert watch.longest(5) == []
    history = [[0, 0, 3], [0, 1, 3], [4, 0, 3], [4, 0, 3], [4, 0, 3], [4, 1, 3], [0, 1, 3]]
    for step, tokens in enumerate(history):
        watch.add(10 * step, np.array([tokens]))
    assert [(d.expert, d.since, d.steps) for d in watch.longest(5)] == [(1, 20, 3), (0, 0, 2)]
    assert [(d.expert, d.since, d.steps) for d in watch.longest(1)] == [(1, 20, 3)]


@pytest.mark.parametrize("name", NAMES)
def test_dead_stretches_equal_their_oracle(name: str) -> None:
    load, watch = workload(name, steps=9, tokens=20), lm.DeadSince()
    for step, tokens in enumerate(load.tokens):
        watch.add(step, tokens)
    now, ever = {}, {}
    for layer in range(len(load.chosen[0])):
        for expert in range(load.experts):
            stretches, start = [], None
            for step in range(len(load.chosen)):
                used = expert in load.chosen[step][layer]
                if used:
                    start = None
                elif start is None:
                    start = step
                if start is not None:
                    stretches.append((step - start + 1, start))
            if start is not None:
                now[layer, expert] = (start, len(load.chosen) - start)
            if stretches:
                count = max(count for count, _ in stretches)
                ever[layer, expert] = (min(s for c, s in stretches if c == count), count)
    assert {(d.layer, d.expert): (d.since, d.steps) for d in watch.experts()} == now
    assert {(d.layer, d.expert): (d.since, d.steps) for d in watch.longest(10**6)} == ever


@pytest.mark.parametrize("name", NAMES)
def test_the_bias_and_its_turns_equal_a_bias_moved_expert_by_expert(name: str) -> None:
    load, rate = workload(name, steps=7), 1e-3
    for layer in range(len(load.chosen[0])):
        bias, moved = [0.0] * load.experts, [0.0] * load.experts
        for step in range(len(load.chosen)):
            n = counts(load, step, layer)
            before, moved = moved, [0.0] * load.experts
            for e in range(load.experts):
                mean = sum(n) / len(n)
                moved[e] = rate if n[e] < mean else -rate if n[e] > mean else 0.0
                bias[e] += moved[e]
            assert lm.bias_range(np.array(bias)) == pytest.approx(max(bias) - min(bias))
            if step:
                turned = sum(1 for a, b in zip(before, moved, strict=True) if a * b < 0)
                found = lm.turns(load.tokens[step - 1], load.tokens[step])[layer]
                assert found == turned / load.experts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_numbers_of_a_row_equal_their_oracles(name: str, ranks: int) -> None:
    load, chance = workload(name), np.random.default_rng(1)
    layers = [f"layers.{i}" for i in range(len(load.chosen[0]))] + ["unused"]
    for step, tokens_LE in enumerate(load.tokens):
        bias_LE = chance.normal(size=(len(layers), load.experts)).astype(np.float32)
        margin_L = chance.random(len(layers)).astype(np.float32)
        nothing = np.zeros((1, load.experts), np.uint32)  # a layer that no token reached
        record = ExpertRecord(
            step, layers, load.top_k, np.concatenate([tokens_LE, nothing]), bias_LE, margin_L
        )
        row = StepRecord(step, 0.0, None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, False)
        add_loads(row, record, ranks)
        n_LE = [counts(load, step, layer) for layer in range(len(layers) - 1)]
        n_LR = [
            [sum(n[r * len(n) // ranks : (r + 1) * len(n) // ranks]) for r in range(ranks)]
            for n in n_LE
        ]
        mean = [sum(n) / len(n) for n in n_LE]
        used = len(n_LE)
        expected = {
            "load_max_over_mean": max(max(n) / m for n, m in zip(n_LE, mean, strict=True)),
            "load_cv": sum(map(slow_variation, n_LE)) / used,
            "load_entropy": sum(slow_entropy(n) / math.log(len(n)) for n in n_LE) / used,
            "rank_load_max_over_mean": max(max(n) / (sum(n) / ranks) for n in n_LR),
            "bias_range": max(max(bias) - min(bias) for bias in bias_LE.tolist()),
            "router_margin": sum(margin_L.tolist()[:used]) / used,
            "dead_experts": sum(x == 0 for n in n_LE for x in n),
            "starved_experts": sum(x < 0.1 * m for n, m in zip(n_LE, mean, strict=True) for x in n),
        }
        found = {name: getattr(row, name) for name in expected}
        assert found == pytest.approx(expected, abs=1e-6)
