"""Schedules played piece by piece, against their known bubbles and against the closed form."""

from __future__ import annotations

import random

import pytest

from deepseek.config import load_config
from deepseek.config.schema import changed
from deepseek.planner.hardware import GPUS
from deepseek.planner.pipeline_timeline import (
    ROUNDS,
    StageTime,
    busy_seconds,
    interleaved_bound,
    interleaved_seconds,
    pipeline_seconds,
    play,
)
from deepseek.planner.step_time import predict_step

V3 = load_config("deepseek_v3_671b")

HELD = {
    "GPipe": 1,
    "1F1B": 1,
    "Interleaved1F1B": 3,
    "InterleavedZeroBubble": 2,
    "ZBVZeroBubble": 2,
    "DualPipe": 1,
    "DualPipeV": 2,
}


def even(schedule: str, ranks: int) -> list[StageTime]:
    return [StageTime(1.0, 2.0, 1.0, 0.3, 0.3)] * (ranks * HELD[schedule])


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("gpu", ["H800", "B200"])
def test_ranks_of_v3_wait_little_for_the_busiest(schedule: str, gpu: str) -> None:
    """By seconds, beside what the schedule itself lets ranks wait."""
    run = changed(
        V3,
        {
            "model.pipeline_schedule": schedule,
            "model.virtual_pipeline_model_parallel_size": 1 + schedule.startswith("Interleaved"),
        },
    )
    step = predict_step(run, GPUS[gpu], 2048)
    loads = [busy_seconds(schedule, step.stages, held) for held in step.job.held]
    assert 1 - sum(loads) / len(loads) / max(loads) < 0.065


@pytest.mark.parametrize("schedule", HELD)
def test_every_piece_runs_once_and_no_rank_does_two_at_a_time(schedule: str) -> None:
    for ranks, count in ((2, 8), (4, 16), (8, 32)):
        line = play(schedule, ranks, even(schedule, ranks), count)
        stages = ranks * HELD[schedule]
        forward = [i for i in line.intervals if i.kind in ("F", "FB")]
        backward = [i for i in line.intervals if i.kind in ("B", "I", "FB")]
        assert len(forward) == len(backward) == stages * count
        for rank in range(ranks):
            mine = sorted((i for i in line.intervals if i.rank == rank), key=lambda i: i.start)
            assert all(a.end <= b.start + 1e-9 for a, b in zip(mine, mine[1:], strict=False))
        assert 0 <= line.bubble < 0.5


def test_known_bubbles() -> None:
    """(PP - 1)(F + B) of 1F1B, over the stages of a rank when interleaved (arXiv:2104.04473)."""
    for ranks, count in ((4, 16), (8, 32)):
        line = play("1F1B", ranks, even("1F1B", ranks), count)
        assert line.seconds == pytest.approx(3 * (count + ranks - 1))
        line = play("Interleaved1F1B", ranks, even("Interleaved1F1B", ranks), count)
        assert line.seconds == pytest.approx(3 * 3 * count + 3 * (ranks - 1))


@pytest.mark.parametrize("backward", [2.0, 2.4, 3.0])
@pytest.mark.parametrize("schedule", HELD)
def test_closed_form_agrees(schedule: str, backward: float) -> None:
    """Where gradients of inputs take longer than those of weights, too."""
    for ranks, count in ((2, 16), (4, 16), (8, 64)):
        times = [time._replace(backward=backward) for time in even(schedule, ranks)]
        played = play(schedule, ranks, times, count).seconds
        held = HELD[schedule]
        if schedule == "DualPipe":
            mine = [(rank, ranks - 1 - rank) for rank in range(ranks)]
        elif schedule in ("ZBVZeroBubble", "DualPipeV"):
            mine = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
        else:
            mine = [tuple(range(rank, ranks * held, ranks)) for rank in range(ranks)]
        closed = pipeline_seconds(schedule, mine, times, count)
        assert closed == pytest.approx(played, rel=0.035), (ranks, count)


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble"])
def test_uneven_stages_of_interleaved_schedules(schedule: str) -> None:
    """Drawn ones: told without intervals as they are played, and never less than their bound."""
    draw = random.Random(0)
    for _ in range(60):
        ranks, held, rounds = draw.choice((2, 3, 4, 8)), draw.choice((2, 3)), draw.choice((1, 2, 5))
        count = rounds * (ranks + draw.randrange(-(-ranks // rounds)))
        spread, hop = draw.choice((0.1, 0.3, 0.6)), draw.choice((0.0, 0.02, 0.1))
        times = []
        for _ in range(ranks * held):
            forward = 1 + spread * draw.uniform(-1, 1)
            times.append(StageTime(forward, draw.uniform(1.8, 3) * forward, forward))
        played = play(schedule, ranks, times, count, hop).seconds
        assert interleaved_seconds(schedule, ranks, times, count, hop) == pytest.approx(played)
        assert interleaved_bound(schedule, ranks, times, count, hop) <= played * (1 + 1e-9)
    count = 3 * ROUNDS * ranks  # of so many rounds, most are not played
    played = play(schedule, ranks, times, count, hop).seconds
    assert interleaved_seconds(schedule, ranks, times, count, hop) == pytest.approx(
        played, rel=0.01
    )
