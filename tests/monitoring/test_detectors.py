"""Each kind of trouble, planted, is named with its numbers; healthy runs are left in peace."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.monitoring.record.alarms import (
    CALM_RECORDS,
    COLLAPSED_RECORDS,
    DEAD_RECORDS,
    SETTLING_RECORDS,
    STRAGGLER_RECORDS,
    Alarm,
    DeadExperts,
    Detector,
    LossSpike,
    MemoryCreep,
    NonFinite,
    Over,
    RouterCollapse,
    Seen,
    Settling,
    Straggler,
    detectors,
)
from deepseek.monitoring.record.expert_monitor import ExpertRecord
from deepseek.monitoring.record.rank_monitor import COLUMNS, RankRecord
from support.workloads import NAMES, workload

GIB = 2**30


def experts(step: int, tokens_LE: np.ndarray, top_k: int = 2) -> ExpertRecord:
    layers = [f"layers.{3 + row}" for row in range(len(tokens_LE))]
    nothing = np.zeros(len(layers), np.float32)
    return ExpertRecord(step, layers, top_k, tokens_LE.astype(np.int64), nothing, nothing)


def ranks(step: int, stages: list[int] | None = None, **columns: Any) -> RankRecord:
    size = len(next(iter(columns.values())))
    table = np.zeros((size, len(COLUMNS)))
    for name, values in columns.items():
        table[:, COLUMNS.index(name)] = values
    return RankRecord(step, stages or [0] * size, table)


def seen(step: int, **changes: Any) -> Seen:
    return replace(Seen(step, loss=2.0, grad_norm=1.0, skipped=False), **changes)


def all_of(detector: Detector, steps: Iterator[Seen]) -> list[tuple[int, Alarm]]:
    """Every alarm and its step."""
    return [(step, one) for step, one in told_by(detector, steps) if isinstance(one, Alarm)]


def told_by(detector: Detector, steps: Iterator[Seen]) -> list[tuple[int, Alarm | Over]]:
    """Every beginning and end, and its step."""
    return [(one.step, told) for one in steps for told in detector.look(one)]


def ends_of(
    detector: Detector, steps: Iterator[Seen]
) -> list[tuple[int, int, str, dict[str, Any]]]:
    """Of every trouble that is over: when it was, the step of its alarm, and what was said."""
    found = told_by(detector, steps)
    return [(at, x.since, x.message, x.place) for at, x in found if isinstance(x, Over)]


# -- routers --


def collapsing(steps: range, from_step: int, until: int = 10**9) -> Iterator[Seen]:
    """Row 1 of three layers sends all to experts 5 and 9 from a step on."""
    rng = np.random.default_rng(0)
    for step in steps:
        tokens_LE = rng.multinomial(4096, np.ones(32) / 32, size=3)
        if from_step <= step < until:
            tokens_LE[1] = 0
            tokens_LE[1, [5, 9]] = 2048
        yield seen(step, experts=experts(step, tokens_LE))


def test_a_collapse_is_named_by_its_layer() -> None:
    found = all_of(RouterCollapse(), collapsing(range(1, 60), 20))
    assert [step for step, _ in found] == [20 + COLLAPSED_RECORDS - 1]
    alarm = found[0][1]
    assert (alarm.kind, alarm.numbers["layer"]) == ("router_collapse", "layers.4")
    assert "layers.4 uses 2.0 of 32 experts: experts 5, 9 take 100% of its tokens" in alarm.message
    assert "model.moe_router_bias_update_rate" in alarm.remedy


def test_a_collapse_that_comes_again_is_told_again() -> None:
    detector = RouterCollapse()
    found = all_of(detector, collapsing(range(1, 40), 10, 20))
    found += all_of(detector, collapsing(range(40, 60), 50))
    assert [step for step, _ in found] == [14, 54]


def test_a_short_collapse_is_none() -> None:
    assert not all_of(RouterCollapse(), collapsing(range(1, 40), 10, 10 + COLLAPSED_RECORDS - 1))


def swinging(steps: range) -> Iterator[Seen]:
    """What new routers do: most tokens go to a few experts, to others every dozen steps."""
    rng = np.random.default_rng(0)
    for step in steps:
        tokens_LE = rng.multinomial(40, np.ones(24) / 24, size=2)
        hot = (np.arange(5) + 5 * (step // 24)) % 24
        tokens_LE[:, hot] += 800
        tokens_LE[1, 7] = 0 if 30 < step < 90 and 7 not in hot else 1
        yield seen(step, experts=experts(step, tokens_LE, top_k=2))


def test_routers_that_settle_are_left_in_peace() -> None:
    early, later = swinging(range(1, 200)), swinging(range(1, 200))
    both = [RouterCollapse(Settling(200)), DeadExperts(Settling(200))]
    assert not [alarm for one in early for detector in both for alarm in detector.look(one)]
    settled = [RouterCollapse(), DeadExperts()]
    kinds = {alarm.kind for one in later for detector in settled for alarm in detector.look(one)}
    assert kinds == {"router_collapse", "dead_experts"}, "the same would be told of later on"


def test_a_complete_collapse_is_told_while_routers_settle() -> None:
    found = all_of(RouterCollapse(Settling(1000)), collapsing(range(1, 60), 20))
    assert [step for step, _ in found] == [20 + SETTLING_RECORDS - 1]
    found = all_of(DeadExperts(Settling(1000)), collapsing(range(1, 60), 20))
    assert [step for step, _ in found] == [20 + SETTLING_RECORDS - 1]
    assert len(found[0][1].numbers["experts"]) == 30


def test_while_routers_settle_all_tokens_may_go_to_one_choice_after_another() -> None:
    """What new routers do in their first hundred steps: the bias moves all tokens on together."""

    def steps() -> Iterator[Seen]:
        for step in range(1, 200):
            tokens_LE = np.zeros((2, 16))
            tokens_LE[:, (np.arange(4) + step // (SETTLING_RECORDS - 2)) % 16] = 500
            yield seen(step, experts=experts(step, tokens_LE, top_k=4))

    assert not told_by(RouterCollapse(Settling(1000)), steps())
    assert all_of(RouterCollapse(), steps()), "later on it would be told of"


def test_a_collapse_is_over_after_calm_records() -> None:
    found = ends_of(RouterCollapse(), collapsing(range(1, 80), 20, 40))
    assert [(at, since, place) for at, since, _, place in found] == [
        (40 + CALM_RECORDS - 1, 20 + COLLAPSED_RECORDS - 1, {"layer": "layers.4"})
    ]
    assert re.fullmatch(r"layers\.4 uses (31|32)\.\d of 32 experts", found[0][2])


def test_a_collapse_that_flickers_is_told_once() -> None:
    """Ten records of every twenty: one trouble, not one every time."""
    detector, told = RouterCollapse(), []
    for begin in range(1, 200, 20):
        told += told_by(detector, collapsing(range(begin, begin + 20), begin, begin + 10))
    assert len(told) == 1


def test_when_routers_should_have_settled() -> None:
    model = ModelConfig()
    model = replace(
        model, optim=replace(model.optim, sched=replace(model.optim.sched, warmup_steps=80))
    )
    assert Settling.of(replace(model, moe_router_bias_update_rate=1e-3)) == Settling(380, 30)
    assert Settling.of(replace(model, moe_router_bias_update_rate=5e-4)) == Settling(680, 60)
    assert Settling.of(replace(model, moe_router_bias_update_rate=3e-3)) == Settling(380, 20)
    assert Settling.of(replace(model, moe_router_bias_update_rate=0.0)) == Settling(380, 30)


def test_counts_too_small_to_say_anything_are_no_collapse() -> None:
    tokens_LE = np.zeros((2, 32))
    tokens_LE[:, :2] = 3  # three tokens, two choices each
    steps = (seen(step, experts=experts(step, tokens_LE)) for step in range(100))
    assert not all_of(RouterCollapse(), steps)


def test_half_of_the_experts_for_each_token_is_no_collapse() -> None:
    tokens_LE = np.array([[500, 500, 0, 0]])
    steps = (seen(step, experts=experts(step, tokens_LE)) for step in range(100))
    assert not all_of(RouterCollapse(), steps)


def test_dead_experts_are_named_with_the_step_they_died_at() -> None:
    rng = np.random.default_rng(0)

    def steps() -> Iterator[Seen]:
        for step in range(1, 200):
            tokens_LE = 1 + rng.multinomial(1024, np.ones(16) / 16, size=2)
            tokens_LE[0, 7] = 0 if 30 <= step < 100 or step >= 150 else 5
            tokens_LE[1, [2, 3]] = 0 if step >= 40 else 5
            yield seen(step, experts=experts(step, tokens_LE))

    found = all_of(DeadExperts(), steps())
    told = [
        (step, a.numbers["layer"], a.numbers["experts"], a.numbers["since"]) for step, a in found
    ]
    assert told == [
        (30 + DEAD_RECORDS - 1, "layers.3", [7], 30),
        (40 + DEAD_RECORDS - 1, "layers.4", [2, 3], 40),
        (150 + DEAD_RECORDS - 1, "layers.3", [7], 150),
    ]
    assert "layers.4: experts 2, 3 without a token since step 40, 2 of 16" in found[1][1].message
    over = ends_of(DeadExperts(), steps())
    assert [(since, message, place) for _, since, message, place in over] == [
        (49, "layers.3: expert 7 has tokens again", {"layer": "layers.3"})
    ]
    assert 100 + DEAD_RECORDS <= over[0][0] <= 100 + 2 * DEAD_RECORDS


def test_few_tokens_make_no_expert_dead() -> None:
    """16 assignments to 64 experts: most get none, step after step."""
    rng = np.random.default_rng(0)
    steps = (
        seen(step, experts=experts(step, rng.multinomial(16, np.ones(64) / 64, size=4)))
        for step in range(1, 400)
    )
    assert not all_of(DeadExperts(), steps)


# -- ranks --


def test_a_straggler_is_named_by_its_rank() -> None:
    rng = np.random.default_rng(0)

    def steps() -> Iterator[Seen]:
        for step in range(1, 300):
            seconds = 1 + 0.03 * rng.standard_normal(8)
            seconds[5] *= 1.5 if 100 <= step < 200 or step >= 250 else 1.0
            yield seen(step, ranks=ranks(step, compute_seconds=seconds))

    found = all_of(Straggler(), steps())
    assert [(alarm.kind, alarm.numbers["rank"]) for _, alarm in found] == [("straggler", 5)] * 2
    assert 100 <= found[0][0] <= 100 + STRAGGLER_RECORDS // 2 + 1
    assert 250 <= found[1][0] <= 250 + STRAGGLER_RECORDS // 2 + 1
    assert 1.2 < found[0][1].numbers["ratio"] < 1.6
    assert "rank 5 computes 1." in found[0][1].message
    ((at, since, message, place),) = ends_of(Straggler(), steps())
    assert since == found[0][0] and 200 < at <= 200 + STRAGGLER_RECORDS
    assert message.startswith("rank 5 computes 1.") and place == {"rank": 5}


def test_one_slow_step_is_no_straggler() -> None:
    seconds = np.ones(4)
    slow = np.array([1, 9, 1, 1.0])
    steps = (
        seen(step, ranks=ranks(step, compute_seconds=slow if step % 3 == 0 else seconds))
        for step in range(1, 200)
    )
    assert not all_of(Straggler(), steps)


def test_stages_with_more_work_are_no_stragglers() -> None:
    stages, seconds = [0, 0, 1, 1], np.array([1.0, 1.0, 2.0, 2.0])
    steps = (
        seen(step, ranks=ranks(step, stages, compute_seconds=seconds)) for step in range(1, 100)
    )
    assert not all_of(Straggler(), steps)
    # Alone on its stage, a rank can be compared with nobody.
    alone = (
        seen(step, ranks=ranks(step, [0, 1], compute_seconds=np.array([1.0, 5.0])))
        for step in range(1, 100)
    )
    assert not all_of(Straggler(), alone)
    # Within its stage it can.
    slow = np.array([1.0, 1.0, 2.0, 3.0])
    steps = (seen(step, ranks=ranks(step, stages, compute_seconds=slow)) for step in range(1, 100))
    assert [alarm.numbers["rank"] for _, alarm in all_of(Straggler(), steps)] == [3]


def test_milliseconds_make_no_straggler() -> None:
    seconds = np.array([0.002, 0.002, 0.008, 0.002])
    steps = (seen(step, ranks=ranks(step, compute_seconds=seconds)) for step in range(1, 100))
    assert not all_of(Straggler(), steps)


def test_memory_that_grows_without_a_stop() -> None:
    rng = np.random.default_rng(0)

    def steps() -> Iterator[Seen]:
        for step in range(1, 2000):
            memory = 8 * GIB + 0.005 * GIB * rng.standard_normal(4)
            memory[2] += step * 2**20
            yield seen(step, ranks=ranks(step, memory_bytes=memory))

    found = all_of(MemoryCreep(), steps())
    assert [(alarm.kind, alarm.numbers["rank"]) for _, alarm in found] == [("memory_creep", 2)]
    assert 0.95 * 2**20 < found[0][1].numbers["bytes_per_record"] < 1.05 * 2**20


def test_memory_that_rests_again_is_told() -> None:
    def steps() -> Iterator[Seen]:
        for step in range(1, 1000):
            memory = GIB + min(step, 700) * 2**20
            yield seen(step, ranks=ranks(step, memory_bytes=np.full(1, memory)))

    ((at, since, message, place),) = ends_of(MemoryCreep(), steps())
    assert (since, at, place) == (500, 800, {"rank": 0})
    assert message == "the memory of rank 0 is 1.68 GiB, and rests"


@pytest.mark.parametrize("shape", ["noise", "fills", "saws", "trifle"])
def test_memory_that_fills_and_empties_is_no_creep(shape: str) -> None:
    rng = np.random.default_rng(0)

    def steps() -> Iterator[Seen]:
        for step in range(1, 3000):
            memory = 4 * GIB * np.ones(2)
            memory += {
                "noise": 0.3 * GIB * rng.standard_normal(2),
                "fills": 3 * GIB * (1 - np.exp(-step / 150)),  # a cache
                "saws": GIB * (step % 300) / 300,  # a collector of garbage
                "trifle": step * 2**10,
            }[shape]
            yield seen(step, ranks=ranks(step, memory_bytes=memory))

    assert not all_of(MemoryCreep(), steps())


# -- losses --


def test_a_spike_is_told_once() -> None:
    rng = np.random.default_rng(0)
    losses = 2 + 0.05 * rng.standard_normal(300)
    losses[150:170] += 1.5
    losses[250] += 3
    steps = (seen(step, loss=float(loss)) for step, loss in enumerate(losses))
    found = all_of(LossSpike(), steps)
    assert [(step, alarm.kind) for step, alarm in found] == [
        (150, "loss_spike"),
        (250, "loss_spike"),
    ]
    assert found[0][1].numbers["loss"] == losses[150]
    assert abs(found[0][1].numbers["median"] - 2) < 0.05
    assert 0.03 < found[0][1].numbers["sigma"] < 0.07
    steps = (seen(step, loss=float(loss)) for step, loss in enumerate(losses))
    over = ends_of(LossSpike(), steps)
    assert [(since, at) for at, since, _, _ in over] == [(150, 170), (250, 251)]
    assert "again, before it" in over[0][2]


def test_a_spike_that_stays_is_over_when_it_is_what_is_usual() -> None:
    losses = [2.0, 2.1] * 50 + [4.0, 4.1] * 80 + [9.0]
    found = told_by(LossSpike(), (seen(step, loss=x) for step, x in enumerate(losses)))
    assert [(step, type(x)) for step, x in found] == [(100, Alarm), (200, Over), (260, Alarm)]
    assert found[1][1].message == "loss 4.0000 has stayed, before it 2.0500"


def test_a_trifle_on_a_flat_loss_is_no_spike() -> None:
    losses = [2.0] * 100 + [2.15] + [2.0] * 10
    assert not all_of(LossSpike(), (seen(step, loss=x) for step, x in enumerate(losses)))


def test_a_spike_on_a_falling_loss() -> None:
    losses = np.linspace(10, 5, 200)
    losses[190] += 3
    found = all_of(LossSpike(), (seen(step, loss=float(x)) for step, x in enumerate(losses)))
    assert [step for step, _ in found] == [190]


def test_what_is_not_finite_is_told_once_and_again_after_calm() -> None:
    def steps() -> Iterator[Seen]:
        for step in range(1, 101):
            if step in (10, 11, 15, 60):
                yield seen(step, grad_norm=float("nan"), skipped=True)
            elif step == 95:
                yield seen(step, loss=float("inf"))
            else:
                yield seen(step)

    found = all_of(NonFinite(), steps())
    assert [(step, alarm.numbers["count"]) for step, alarm in found] == [(10, 1), (60, 4), (95, 5)]
    assert "gradient norm nan; no weight was changed, this is the 1st" in found[0][1].message
    assert "loss inf" in found[2][1].message and "the 5th" in found[2][1].message
    assert "the weights were changed" in found[2][1].message
    over = ends_of(NonFinite(), steps())
    assert [(since, at) for at, since, _, _ in over] == [(10, 35), (60, 80)]


# -- remedies --


def remedies(model: ModelConfig, **trainer: Any) -> dict[str, str]:
    """By the kind: of each trouble, planted, in a run of this configuration."""
    run = RunConfig(model=model)
    run = replace(run, trainer=replace(run.trainer, **trainer))
    found = {}
    nothing = np.zeros(1, np.float32)
    tokens_LE = np.array([[500] * 4 + [0] * 12])
    for detector in detectors(run):
        for step in range(1, 700):
            one = Seen(
                step, 9.0 if step == 650 else 2.0, float("nan") if step == 3 else 1.0, False,
                ExpertRecord(step, ["layers.1"], 4, tokens_LE, nothing, nothing),
                ranks(step, compute_seconds=[1.0, 3.0, 1.0], memory_bytes=GIB + step * 2**21),
            )  # fmt: skip
            found |= {x.kind: x.remedy for x in detector.look(one) if isinstance(x, Alarm)}
    assert found.keys() == {detector.kind for detector in detectors()}
    return found


def test_remedies_name_keys_of_this_run_with_values() -> None:
    model = ModelConfig(moe_router_bias_update_rate=0.001, moe_aux_loss_coeff=1e-4)
    model = replace(model, optim=replace(model.optim, lr=2e-3))
    found = remedies(model, gradient_clip_val=1.0)
    for kind in ("router_collapse", "dead_experts"):
        assert "model.moe_router_bias_update_rate=0.002 (it is 0.001)" in found[kind]
        assert "model.moe_aux_loss_coeff=0.001 (it is 0.0001)" in found[kind]
    for kind in ("non_finite", "loss_spike"):
        assert "model.optim.lr=0.001 (it is 0.002)" in found[kind]
    assert "trainer.gradient_clip_val=0.5" in found["loss_spike"]
    assert "num_workers" not in found["memory_creep"], "there are none"
    data = replace(model.data, num_workers=2)
    assert "num_workers=0, it is 2" in remedies(replace(model, data=data))["memory_creep"]
    assert "gradient_clip_val=1" in remedies(model, gradient_clip_val=0.0)["loss_spike"]


@pytest.mark.parametrize("kind", ["router_collapse", "dead_experts"])
def test_no_remedy_is_a_setting_that_would_be_ignored(kind: str) -> None:
    frozen = ModelConfig(moe_router_bias_update_rate=0.0)
    assert "model.moe_router_bias_update_rate=0.001 (it is 0)" in remedies(frozen)[kind]
    without = ModelConfig(topk_method="greedy", moe_router_bias_update_rate=0.0)
    assert "bias" not in remedies(without)[kind]
    assert "model.moe_aux_loss_coeff=0.001" in remedies(without)[kind]


# -- runs --


@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_of_two_thousand_steps_raise_no_alarm(seed: int) -> None:
    """Skewed at first, balanced later; a noisy loss that falls; ranks and memory with jitter."""
    rng = np.random.default_rng(seed)
    all_detectors = detectors()
    taste = rng.normal(0, 0.8, (4, 64))
    for step in range(1, 2001):
        share_LE = np.exp(taste * np.exp(-step / 400))
        share_LE /= share_LE.sum(axis=1, keepdims=True)
        tokens_LE = np.array([rng.multinomial(1024 * 6, share_E) for share_E in share_LE])
        loss = 2 + 8 * np.exp(-step / 150) + 0.08 * rng.standard_normal()
        memory = (
            6 * GIB + 0.5 * GIB * (1 - np.exp(-step / 50)) + 0.02 * GIB * rng.standard_normal(8)
        )
        one = Seen(
            step,
            float(loss),
            float(rng.lognormal()),
            False,
            experts(step, tokens_LE, top_k=6),
            ranks(
                step,
                compute_seconds=rng.lognormal(0, 0.1, 8) + (rng.random(8) < 0.01) * 3,
                memory_bytes=memory,
            ),
        )
        assert [alarm for detector in all_detectors for alarm in detector.look(one)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_eight_workloads(name: str) -> None:
    found = workload(name, steps=60, layers=3, tokens=400, experts=32, top_k=2, ranks=4)
    collapse, dead = RouterCollapse(), DeadExperts()
    collapsed: list[Alarm | Over] = []
    without: set[tuple[str, int]] = set()
    for step, tokens_LE in enumerate(found.tokens):
        one = seen(step, experts=experts(step, tokens_LE))
        collapsed += collapse.look(one)
        for alarm in dead.look(one):
            assert isinstance(alarm, Alarm)
            without |= {(alarm.numbers["layer"], e) for e in alarm.numbers["experts"]}
    assert not collapsed
    idle = found.tokens.sum(axis=0) == 0
    assert without == {(f"layers.{3 + layer}", expert) for layer, expert in np.argwhere(idle)}
    assert bool(without) == (name == "zero_expert_rank")
