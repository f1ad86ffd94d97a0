"""``metrics.jsonl``: whole lines, numbers that every JSON parser takes, nothing lost."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.config.errors import UserError
from deepseek.models.deepseek_model import StepMetrics, ValidationMetrics
from deepseek.monitoring.metrics_log import MetricsLog, drop_partial_line, read_metrics


class Logger:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.told.append((step, metrics))


def step(number: int, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "loss": 5.5, "mtp_loss": None, "balance_loss": 0.1, "grad_norm": 2.0, "lr": 0.1,
        "tokens": 8, "skipped": False}  # fmt: skip
    return StepMetrics(number, **(values | changes))


def module(**changes: Any) -> Any:
    values = {"finished_steps": 0, "step_metrics": None, "validation_metrics": None}
    return SimpleNamespace(**(values | changes))


def trainer(logger: Logger | None = None) -> Any:
    return SimpleNamespace(loggers=[logger] if logger else [], sanity_checking=False)


def strict(line: str) -> dict[str, Any]:
    """Parse as a strict parser does: NaN and Infinity are no JSON."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    row = json.loads(line, parse_constant=refuse)
    assert isinstance(row, dict)
    return row


def test_a_row_a_step_and_one_a_validation(tmp_path: Path) -> None:
    log, logger = MetricsLog(tmp_path / "m.jsonl"), Logger()
    log.on_train_batch_start(trainer(logger), module())
    log.on_train_batch_end(trainer(logger), module(step_metrics=step(1)))
    log.on_validation_end(
        trainer(logger), module(validation_metrics=ValidationMetrics(1, 5.25, None))
    )
    first, second = (strict(line) for line in log.path.read_text().splitlines())
    assert first.pop("seconds") >= 0
    assert first == {
        "step": 1, "loss": 5.5, "mtp_loss": None, "balance_loss": 0.1, "grad_norm": 2.0, "lr": 0.1,
        "tokens": 8, "skipped": False}  # fmt: skip
    assert second == {"step": 1, "val_loss": 5.25, "val_bits_per_byte": None}
    # Loggers get the numbers that there are.
    assert [number for number, _ in logger.told] == [1, 1]
    assert logger.told[0][1].keys() == {
        "loss", "balance_loss", "grad_norm", "lr", "tokens", "skipped", "seconds"}  # fmt: skip
    assert logger.told[1][1] == {"val_loss": 5.25}


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
    assert [row["loss"] for row in read_metrics(log.path)] == values


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
    assert [strict(line) for line in lines] == [
        {"step": 1}, {"step": 2}, {"event": "resumed", "step": 2}]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("{}", ""),
        ("{}\n", "{}\n"),
        ('{}\n{"a": 1}\n', '{}\n{"a": 1}\n'),
        ('{}\n{"a": 1', "{}\n"),
        ("\n\n{", "\n\n"),
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
    log = MetricsLog(tmp_path / "m.jsonl")
    log.on_fit_start(trainer(), module())
    assert not log.path.exists()


def test_of_a_step_trained_twice_the_later_row_counts(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "val_loss": 9.0},
        {"step": 3, "loss": 3.0},
        {"event": "resumed", "step": 1},
        {"step": 2, "loss": 2.5},
        {"step": 2, "val_loss": 9.5},
    ]
    for row in rows:
        log.write(row)
    with log.path.open("a") as file:
        file.write('{"step": 3')
    assert read_metrics(log.path) == [rows[0], rows[3], rows[4], rows[5], rows[6]]


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    log = MetricsLog(tmp_path / "m.jsonl")
    log.on_fit_start(trainer(), module())
    with pytest.raises(UserError, match="m.jsonl: Is a directory; make room or mend it"):
        log.write({"step": 1})


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
    assert log.path.stat().st_size == 20
    # The next start cuts the half off before it writes.
    log.on_fit_start(trainer(), module(finished_steps=1))
    assert [row["step"] for row in read_metrics(log.path)] == [1, 1]


def test_a_check_of_the_validation_before_training_is_no_validation(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    checking = SimpleNamespace(loggers=[], sanity_checking=True)
    log.on_validation_end(checking, module(validation_metrics=ValidationMetrics(0, 1.0, None)))
    log.on_validation_end(trainer(), module())
    assert not log.path.exists()
