"""The line a step."""

from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.monitoring.record import progress
from deepseek.monitoring.record.progress import BAR_COLUMNS, Progress, clock, fitted, step_parts
from deepseek.training.step import StepRecord, ValidationRecord
from support.fake_clock import FakeClock


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "loss": 5.4321, "mtp_loss": 5.6, "balance_loss": 0.0, "grad_norm": 1.2,
        "grad_norm_dense": 1.0, "grad_norm_expert": 0.6, "grad_norm_router": 0.2, "lr": 2.2e-4,
        "tokens": 1000, "skipped": False}  # fmt: skip
    return StepRecord(step, **(values | changes))


def module(step: int, max_steps: int = 10, finished: int = 0) -> Any:
    return SimpleNamespace(
        step_record=record(step) if step else None,
        validation_record=ValidationRecord(step, 4.5, 2.25),
        max_steps=max_steps,
        finished_steps=finished,
    )


class Bar:
    """Stands in for a bar on a terminal."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def start(self) -> None:
        self.calls.append(("start", None))

    def stop(self) -> None:
        self.calls.append(("stop", None))

    def add_task(self, description: str, total: int, completed: int) -> int:
        self.calls.append(("add", (total, completed)))
        return 0

    def update(self, task: int, completed: int, description: str) -> None:
        self.calls.append(("update", (completed, description)))


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


MEASURED: dict[str, Any] = {
    "mfu": 0.314, "memory_bytes": 3 * 2**29, "load_max_over_mean": 1.316, "dead_experts": 2,
    "all_to_all_seconds": 0.25, "seconds": 2.0}  # fmt: skip


def test_step_line() -> None:
    line = fitted(step_parts(record(12), 400, 3210.4, 41), 0)
    assert line == (
        "step     12/400 loss 5.4321 | 3,210 tok/s | 0:41 left | mtp 5.6000 | grad 1.200 | "
        "lr 2.20e-04"
    )
    line = fitted(step_parts(record(12, mtp_loss=None, **MEASURED), 400, 3210.4, 41), 0)
    assert line == (
        "step     12/400 loss 5.4321 | 3,210 tok/s | 0:41 left | grad 1.200 | lr 2.20e-04 | "
        "load 1.32 dead 2 | mfu 31.4% | mem 1.5G | a2a 12%"
    )
    # Alone, on an unknown GPU, without experts.
    alone = record(12, mtp_loss=None, memory_bytes=2**30, seconds=2.0)
    assert fitted(step_parts(alone, 400, 3210.4, 41), 0).endswith("lr 2.20e-04 | mem 1.0G")
    parts = step_parts(record(1, skipped=True, grad_norm=float("nan")), 1, 0.0, 0.0)
    assert parts[1] == "SKIPPED, gradient nan"


@pytest.mark.parametrize(
    ("columns", "end"),
    [
        (80, "| 12:34:56 left | mtp 10.7321"),
        (100, "| 12:34:56 left | epoch 1.23/2.47 | mtp 10.7321"),
        (120, "| epoch 1.23/2.47 | mtp 10.7321 | grad 1.200 | a2a 12%"),
        (160, "| grad 1.200 | lr 2.20e-04 | load 1.32 dead 2 | mfu 31.4%"),
    ],
)
def test_a_long_line_fits(columns: int, end: str) -> None:
    """Loss, speed and time left stay; what follows one that has no room may still have it."""
    long = record(1234567, loss=10.5594, mtp_loss=10.7321, **MEASURED)
    line = fitted(step_parts(long, 2469134, 123456.7, 45296, lambda n: n * 1e-6), columns)
    assert line.startswith("step 1234567/2469134 loss 10.5594 | 123,457 tok/s | 12:34:56 left")
    assert line.endswith(end)
    assert len(line) <= columns


def test_epochs_are_told_when_data_are_passed_more_than_once() -> None:
    assert "epoch 0.50/2.00" in step_parts(record(100), 400, 1.0, 0.0, lambda n: n / 200)
    assert not [
        part
        for part in step_parts(record(100), 400, 1.0, 0.0, lambda n: n / 400)
        if "epoch" in part
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3723, "1:02:03"),
     (100 * 3600, "100:00:00")],
)  # fmt: skip
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_lines_speed_and_time_left(capsys: pytest.CaptureFixture[str], time: FakeClock) -> None:
    shown = Progress(every_n_steps=2)
    shown.on_train_start(None, module(0))
    for step in range(1, 4):
        time.now += 2.0
        shown.on_train_batch_end(None, module(step, max_steps=3))
    lines = capsys.readouterr().out.splitlines()
    # Steps 2 and 3: every second one, and the last. Two steps of 1000 tokens in 4 s, one in 2 s.
    assert [line.split("loss")[0].split() for line in lines] == [["step", "2/3"], ["step", "3/3"]]
    assert "| 500 tok/s | 0:02 left" in lines[0]
    assert "| 500 tok/s | 0:00 left" in lines[1]


def test_elsewhere_than_on_a_terminal_lines_are_whole_unless_columns_are_set(
    capsys: pytest.CaptureFixture[str], time: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {}
    for columns in (None, "wide", "80", "60"):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        shown = Progress(every_n_steps=1)
        shown.on_train_start(None, module(0))
        time.now += 1.0
        shown.on_train_batch_end(None, module(1))
        widths[columns] = len(capsys.readouterr().out.rstrip("\n"))
    assert widths[None] == widths["wide"] > 80 >= widths["80"] > 60 >= widths["60"]


def test_a_resumed_run_counts_its_own_steps_for_the_time_left(
    capsys: pytest.CaptureFixture[str], time: FakeClock
) -> None:
    shown = Progress(every_n_steps=1)
    shown.on_train_start(None, module(0, max_steps=10, finished=6))
    time.now += 5.0
    shown.on_train_batch_end(None, module(7))
    assert "| 0:15 left" in capsys.readouterr().out


def test_validation_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(every_n_steps=1)
    shown.on_validation_end(None, module(3))
    assert capsys.readouterr().out == "step      3 val loss 4.5000  2.2500 bits/byte\n"
    without = SimpleNamespace(validation_record=ValidationRecord(3, 4.5, None))
    shown.on_validation_end(None, without)
    assert capsys.readouterr().out == "step      3 val loss 4.5000\n"
    shown.on_validation_end(None, SimpleNamespace(validation_record=None))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, time: FakeClock, end: str
) -> None:
    bar = Bar()
    monkeypatch.setattr(progress, "progress_bar", lambda columns, shows_time: bar)
    monkeypatch.setenv("COLUMNS", "100")
    shown = Progress(every_n_steps=5)
    shown.on_train_start(None, module(0, finished=2))
    time.now += 1.0
    shown.on_train_batch_end(None, module(3))
    shown.on_validation_end(None, module(3))
    time.now += 1.0
    shown.on_train_batch_end(None, module(4))
    getattr(shown, end)(*[None, None, ValueError()][: 3 if end == "on_exception" else 2])
    kinds = [kind for kind, _ in bar.calls]
    assert kinds == ["start", "add", "update", "update", "stop"]
    assert bar.calls[1][1] == (10, 2)
    completed, text = bar.calls[3][1]
    assert completed == 4 and "1,000 tok/s" in text
    assert text.endswith("left | val loss 4.5000  2.2500 bits/byte")
    assert len(text) <= 100 - BAR_COLUMNS - 1
    assert capsys.readouterr().out == ""  # the bar alone writes
