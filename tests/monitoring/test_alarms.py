"""What the detectors find stands in the log and is shown, at once and once."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deepseek.monitoring.live import frame, plain
from deepseek.monitoring.record.alarms import (
    COLLAPSED_RECORDS,
    MOST_SHOWN,
    STRAGGLER_RECORDS,
    Alarm,
    Alarms,
    shown,
)
from deepseek.monitoring.record.expert_monitor import ExpertRecord
from deepseek.monitoring.record.metrics_log import MetricsLog
from deepseek.monitoring.record.rank_monitor import COLUMNS, RankRecord
from deepseek.monitoring.report.run_panels import alarms_panel
from deepseek.monitoring.run_log import RunLog, read_run
from support.log_rows import all_rows


def module(step: int) -> Any:
    record = SimpleNamespace(step=step, loss=2.0, grad_norm=1.0, skipped=False)
    return SimpleNamespace(step_record=record)


def test_planted_troubles_are_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    experts, ranks = SimpleNamespace(latest=None), SimpleNamespace(latest=None)
    alarms: Any = Alarms(log, experts, ranks)  # type: ignore[arg-type]
    tokens_LE = np.full((3, 32), 64)
    tokens_LE[2] = 0
    tokens_LE[2, :2] = 1024
    layers = ["layers.1", "layers.2", "mtp.0.block"]
    nothing = np.zeros(3, np.float32)
    table = np.ones((4, len(COLUMNS)))
    table[1, COLUMNS.index("compute_seconds")] = 2.0
    for step in range(1, 61):
        experts.latest = ExpertRecord(step, layers, 2, tokens_LE, nothing, nothing)
        ranks.latest = RankRecord(step, [0, 0, 0, 0], table)
        alarms.on_train_batch_end(None, module(step))
    rows = all_rows(log.path)
    assert {(row["event"], row["kind"], row["step"]) for row in rows} == {
        ("alarm", "router_collapse", COLLAPSED_RECORDS),
        ("alarm", "straggler", STRAGGLER_RECORDS),
        ("alarm", "dead_experts", 20),
    }
    found = {row["kind"]: row for row in rows}
    assert found["router_collapse"]["layer"] == "mtp.0.block"
    assert found["straggler"]["rank"] == 1
    assert found["dead_experts"]["experts"] == list(range(2, 32))
    for row in rows:
        assert row["message"] and row["remedy"] and row["time"] > 1e9
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(rows)
    assert lines[0].startswith("ALARM        step 5, router_collapse: mtp.0.block uses 2.0 of 32")


def test_a_record_of_an_earlier_step_counts_once(tmp_path: Path) -> None:
    """With records every tenth step a collapse takes five of them, not five steps."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    tokens_LE = np.zeros((1, 32), np.int64)
    tokens_LE[0, :2] = 1024
    nothing = np.zeros(1, np.float32)
    experts: Any = SimpleNamespace(latest=None)
    alarms: Any = Alarms(log, experts, None)
    for step in range(1, 61):
        if step % 10 == 0:
            experts.latest = ExpertRecord(step, ["layers.1"], 2, tokens_LE, nothing, nothing)
        alarms.on_train_batch_end(None, module(step))
    steps = [row["step"] for row in all_rows(log.path) if row["kind"] == "router_collapse"]
    assert steps == [10 * COLLAPSED_RECORDS]


def test_numbers_can_be_written_as_json() -> None:
    """numpy's integers cannot: an alarm must not end a run by a TypeError."""
    from test_detectors import DeadExperts, Straggler, experts, ranks, seen

    tokens_LE = np.full((1, 8), 64)
    tokens_LE[0, 0] = 0
    dead, slow = DeadExperts(), Straggler()
    found: list[Any] = []
    for step in range(30):
        found += dead.look(seen(step, experts=experts(step, tokens_LE)))
        found += slow.look(seen(step, ranks=ranks(step, compute_seconds=np.array([1.0, 3, 1]))))
    assert len(found) == 2
    json.dumps([alarm.numbers for alarm in found])


def test_the_end_of_a_trouble_is_told_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    ranks = SimpleNamespace(latest=None)
    alarms: Any = Alarms(log, None, ranks)  # type: ignore[arg-type]
    for step in range(1, 61):
        table = np.ones((2, len(COLUMNS)))
        table[1, COLUMNS.index("compute_seconds")] = 2.0 if step < 30 else 1.0
        ranks.latest = RankRecord(step, [0, 0], table)
        alarms.on_train_batch_end(None, module(step))
    begin, end = all_rows(log.path)
    assert (begin["event"], begin["step"]) == ("alarm", STRAGGLER_RECORDS)
    assert (end["event"], end["kind"]) == ("alarm_over", "straggler")
    assert (end["since"], end["rank"]) == (STRAGGLER_RECORDS, 1)
    assert STRAGGLER_RECORDS < end["step"] <= 30 + STRAGGLER_RECORDS
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"ALARM OVER   step {end['step']}, straggler: rank 1 computes 1.00 times as long as the "
        f"others (alarm of step {STRAGGLER_RECORDS})"
    )
    log.write({"step": 60, "loss": 2.0})
    (alarm,) = read_run(tmp_path).alarms()
    assert (alarm["step"], alarm["until"]) == (STRAGGLER_RECORDS, end["step"])


def test_an_alarm_ends_with_the_process_that_watched_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    alarm = {"kind": "straggler", "message": "slow", "remedy": "look", "rank": 1}
    log.event("alarm", 3, **alarm)
    log.write({"step": 4, "loss": 2.0, "time": time.time()})
    run = RunLog(tmp_path)
    assert run.alarms()[0]["until"] is None and "goes on" in alarms_panel(run).body
    log.event("resumed", 2)  # killed after step 4, whose checkpoint is of step 2
    for step in (3, 4, 5):
        log.write({"step": step, "loss": 2.0, "time": time.time()})
    log.event("alarm", 5, **alarm)
    run.update()
    assert [(row["until"], row["with_run"]) for row in run.alarms()] == [(4, True), (None, False)]
    assert "still so at step 4, when the run ended. look" in plain(frame(run), 200)
    log.event("stopped", 5, reason="SIGTERM")
    run.update()
    assert [row["until"] for row in run.alarms()] == [4, 5]
    assert alarms_panel(run).body.count(", the run ended") == 2


def test_of_many_alarms_a_few_are_shown() -> None:
    alarms = [Alarm("router_collapse", f"layer {i}", "do this") for i in range(9)]
    lines = shown(7, [*alarms, Alarm("straggler", "rank 1", "look")])
    assert lines == [
        *(
            line
            for i in range(MOST_SHOWN)
            for line in (f"ALARM        step 7, router_collapse: layer {i}", "             do this")
        ),
        "ALARM        step 7, straggler: rank 1",
        "             look",
        "ALARM        step 7, router_collapse: 6 more in the log",
    ]
