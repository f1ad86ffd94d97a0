"""``metrics.jsonl``: whole lines, numbers that every JSON parser takes, nothing lost."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.config.errors import UserError
from deepseek.monitoring.record import metrics_log
from deepseek.monitoring.record.metrics_log import (
    SCALARS,
    MetricsLog,
    drop_partial_line,
)
from deepseek.training.phases import Memory
from deepseek.training.step import SaveRecord, StepRecord, ValidationRecord
from support.fake_clock import FakeClock
from support.log_rows import all_rows


class Logger:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.told.append((step, metrics))


def step(number: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "loss": 5.5, "mtp_loss": None, "balance_loss": 0.1, "grad_norm": 2.0,
        "grad_norm_dense": 1.5, "grad_norm_expert": 1.2, "grad_norm_router": 0.5, "lr": 0.1,
        "tokens": 8, "skipped": False}  # fmt: skip
    return StepRecord(number, **(values | changes))


def module(**changes: Any) -> Any:
    values = {
        "finished_steps": 0, "max_steps": 9, "step_record": None, "validation_record": None,
        "save_record": None, "stop_signal": None}  # fmt: skip
    return SimpleNamespace(**(values | changes))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(metrics_log, "time", fake)
    return fake


def events(log: MetricsLog) -> list[dict[str, Any]]:
    return [row for row in map(strict, log.path.read_text().splitlines()) if "event" in row]


def trainer(logger: Logger | None = None) -> Any:
    return SimpleNamespace(loggers=[logger] if logger else [], sanity_checking=False)


def strict(line: str) -> dict[str, Any]:
    """Parse as a strict parser does: NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    row = json.loads(line, parse_constant=refuse)
    assert isinstance(row, dict)
    return row


def test_a_row_a_step_and_one_a_validation(tmp_path: Path, clock: FakeClock) -> None:
    log, logger = MetricsLog(tmp_path / "m.jsonl", 1e3, 1e5), Logger()
    measured = step(1, data_seconds=0.1234567, monitor_seconds=0.25, dead_experts=0)
    run, here = trainer(logger), module(step_record=measured)
    log.on_train_start(run, here)
    clock.now += 2.0
    log.on_train_batch_end(run, here)
    log.on_validation_start(run, here)
    clock.now += 50.0
    log.on_validation_end(run, module(validation_record=ValidationRecord(1, 5.25, None)))
    clock.now += 4.0
    log.on_train_batch_end(run, module(step_record=step(2)))
    log.on_train_end(run, module(finished_steps=9))
    first, second, third, _ = (strict(line) for line in log.path.read_text().splitlines())
    assert first == {
        "step": 1, "loss": 5.5, "mtp_loss": None, "balance_loss": 0.1, "grad_norm": 2.0,
        "grad_norm_dense": 1.5, "grad_norm_expert": 1.2, "grad_norm_router": 0.5, "lr": 0.1,
        "tokens": 8, "skipped": False, "data_seconds": 0.123457, "dead_experts": 0,
        "monitor_seconds": 0.25, "seconds": 2.0, "time": 1.7e9 + 102, "tokens_per_second": 4.0,
        # 4 tokens a second of 1,000 operations each, of 100,000 that the devices could do.
        "mfu": 0.04}  # fmt: skip
    assert second == {"step": 1, "val_loss": 5.25, "val_bits_per_byte": None}
    assert (third["seconds"], third["tokens_per_second"]) == (4.0, 2.0)  # the validation is not in
    # Loggers get the numbers that there are, and nothing that grows with the model.
    assert [number for number, _ in logger.told] == [1, 1, 2]
    assert logger.told[0][1].keys() == first.keys() - {"step", "time", "mtp_loss"}
    assert logger.told[1][1] == {"val_loss": 5.25}
    assert len(SCALARS) <= 60


def test_mfu_is_unknown_without_a_denominator(tmp_path: Path, clock: FakeClock) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", 1e3, None)
    log.on_train_start(trainer(), module())
    clock.now += 1.0
    log.on_train_batch_end(trainer(), module(step_record=step(1)))
    assert strict(log.path.read_text())["mfu"] is None


def test_its_own_cost_is_in_the_row_that_follows(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.on_train_start(trainer(), module())
    write = log.write

    def slow(row: dict[str, Any]) -> None:
        write(row)
        clock.now += 0.5

    monkeypatch.setattr(log, "write", slow)
    for number in (1, 2):
        clock.now += 1.0
        log.on_train_batch_end(trainer(), module(step_record=step(number)))
        log.add_cost(0.125)
    rows = [strict(line) for line in log.path.read_text().splitlines()]
    assert [row["monitor_seconds"] for row in rows] == [0.0, 0.625]
    assert [row["seconds"] for row in rows] == [1.0, 1.5]


def test_what_is_not_finite_is_said_in_words(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    row = strict(log.path.read_text())
    assert row == {"step": 1, "loss": "nan", "grad_norm": "inf", "lr": "-inf"}
    assert math.isnan(float(row["loss"])) and float(row["lr"]) == -math.inf


def test_numbers_come_back_bit_by_bit(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 123456789.123456789]
    for number, value in enumerate(values):
        log.write({"step": number, "loss": value})
    assert [row["loss"] for row in all_rows(log.path)] == values


def test_each_row_is_written_at_once_and_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    for number in range(3):
        log.write({"step": number})
        assert len(log.path.read_bytes().splitlines()) == number + 1  # nothing is kept back


def test_a_resumed_run_drops_the_line_cut_short_and_says_so(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    log.on_fit_start(trainer(), module(finished_steps=2))
    lines = log.path.read_text().splitlines()
    rows = [strict(line) for line in lines]
    assert rows[2].pop("time") > 1.7e9
    assert rows == [{"step": 1}, {"step": 2}, {"event": "resumed", "step": 2}]


def test_each_start_says_of_what_kind_it_is(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "m.jsonl"
    MetricsLog(path).on_fit_start(trainer(), module())
    MetricsLog(path, attempt=2).on_fit_start(trainer(), module(finished_steps=7))
    MetricsLog(path, attempt=1).on_fit_start(trainer(), module())  # lost before a checkpoint
    now = {"time": 1.7e9 + 100}
    restart = {"event": "restart", "step": 7, "attempt": 2, "reason": "restart 2"}
    assert [strict(line) for line in path.read_text().splitlines()] == [
        {"event": "started", "step": 0} | now,
        restart | now,
        {"event": "resumed", "step": 7} | now,
        restart | {"step": 0, "attempt": 1, "reason": "restart 1"} | now,
        {"event": "started", "step": 0} | now,
    ]


def test_checkpoints_are_events(tmp_path: Path, clock: FakeClock) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.on_train_batch_start(trainer(), module(finished_steps=3))
    for finished in (4, 5):  # of step 4 alone
        saved = SaveRecord(4, 0.75, Memory(1, 2, 3))
        log.on_train_batch_start(trainer(), module(finished_steps=finished, save_record=saved))
    log.on_train_end(trainer(), module(finished_steps=9, save_record=saved._replace(step=9)))
    assert events(log) == [
        {"event": "checkpoint", "step": 4, "time": 1.7e9 + 100, "seconds": 0.75},
        {"event": "checkpoint", "step": 9, "time": 1.7e9 + 100, "seconds": 0.75},
        {"event": "stopped", "step": 9, "time": 1.7e9 + 100, "reason": "complete"},
    ]


@pytest.mark.parametrize(
    ("finished", "number", "reason"),
    [(9, None, "complete"), (9, 15, "complete"), (4, 15, "SIGTERM")],
)
def test_the_end_has_a_reason(
    tmp_path: Path, finished: int, number: int | None, reason: str
) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.on_train_end(trainer(), module(finished_steps=finished, stop_signal=number))
    assert [(e["event"], e["step"], e["reason"]) for e in events(log)] == [
        ("stopped", finished, reason)]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("not finite\nmore"), "UserError: not finite"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_an_end_by_an_error_has_one_too(tmp_path: Path, error: BaseException, reason: str) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.on_fit_start(trainer(), module(finished_steps=4))
    log.on_exception(trainer(), module(finished_steps=4), error)
    last = events(log)[-1]
    assert (last["event"], last["step"], last["reason"]) == ("stopped", 4, reason)


def test_an_error_is_not_hidden_by_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    MetricsLog(tmp_path / "m.jsonl").on_exception(trainer(), module(), ValueError("first"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("{}", ""),
        ("{}\n", "{}\n"),
        ('{}\n{"a": 1}\n', '{}\n{"a": 1}\n'),
        ('{}\n{"a": 1', "{}\n"),
        ("\n\n{", "\n\n"),
        ("{}\n" + "x" * 200_000, "{}\n"),
        ("x" * 200_000, ""),
        ("{}\n" + "x" * (2**16 - 1) + "\n" + "y" * 2**16, "{}\n" + "x" * (2**16 - 1) + "\n"),
    ],
)
def test_only_what_follows_the_last_newline_is_dropped(
    tmp_path: Path, before: str, after: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(before)
    drop_partial_line(path)
    assert path.read_text() == after


def test_a_fresh_run_has_no_file_yet(tmp_path: Path) -> None:
    drop_partial_line(tmp_path / "m.jsonl")
    assert not (tmp_path / "m.jsonl").exists()


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    log = MetricsLog(tmp_path / "m.jsonl")
    for write in (lambda: log.on_fit_start(trainer(), module()), lambda: log.write({"step": 1})):
        with pytest.raises(UserError, match="m.jsonl: Is a directory; make room or mend it"):
            write()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        MetricsLog(Path("/dev/full")).write({"step": 1})


def test_a_disk_that_takes_half_a_line(tmp_path: Path) -> None:
    import resource

    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(UserError, match="No space left on device"):
            log.write({"step": 2, "loss": 5.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # With room again, the event that tells of it does not continue the half line.
    log.event("stopped", 1)
    assert [row["step"] for row in all_rows(log.path)] == [1, 1]


def test_a_check_of_the_validation_before_training_is_no_validation(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    checking = SimpleNamespace(loggers=[], sanity_checking=True)
    log.on_validation_end(checking, module(validation_record=ValidationRecord(0, 1.0, None)))
    log.on_validation_end(trainer(), module())
    assert not log.path.exists()
