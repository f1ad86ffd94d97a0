"""What ``trainer.precision=auto`` is on a CPU."""

from __future__ import annotations

import json
import pwd
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek.commands import fit
from deepseek.config import load_config
from deepseek.training import precision
from deepseek.training.precision import cpu_speedup


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What measurements find; one is taken away by each. The cache is not there yet."""
    values = [2.0, 3.0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "_measured_speedup", lambda: values.pop(0))
    return values


def test_measured_once(measured: list[float]) -> None:
    assert [cpu_speedup(), cpu_speedup()] == [2.0, 2.0] and measured == [3.0]


def test_another_machine_or_a_damaged_file_is_measured_anew(
    measured: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cpu_speedup() == 2.0
    with monkeypatch.context() as patch:
        patch.setattr(precision, "_cpu_name", lambda: "another")
        assert cpu_speedup() == 3.0
    assert cpu_speedup() == 2.0  # as with a number of threads, which come and go
    (machine,) = (
        name for name in json.loads(kept_in(tmp_path).read_text()) if "another" not in name
    )
    values = (float("nan"), float("inf"), -2, 0, 10**400, True, "2.0", None, [2.0])
    wrong = [json.dumps({machine: value}) for value in values]
    whole = "", "[]", "null", '"text"', "[" * 10**5, '{"a": []}', json.dumps({"another": 1})
    for damage in (*whole, *wrong):
        kept_in(tmp_path).write_text(damage)
        measured.append(7.0)
        assert cpu_speedup() == 7.0
        assert cpu_speedup() == 7.0  # kept


def kept_in(folder: Path) -> Path:
    return folder / "deepseek" / "precision.json"


def test_a_cache_that_cannot_be_written_does_not_matter(
    measured: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deepseek").write_text("")
    assert cpu_speedup() == 2.0
    (tmp_path / "deepseek").unlink()
    kept_in(tmp_path).mkdir(parents=True)
    assert cpu_speedup() == 3.0
    assert [path.name for path in (tmp_path / "deepseek").iterdir()] == ["precision.json"]
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # nobody knows this user
    measured.append(4.0)
    assert cpu_speedup() == 4.0


def test_the_measurement_itself() -> None:
    """Any machine: a number, and no more time than a start may take."""
    assert 0 < precision._measured_speedup() < float("inf")


@pytest.mark.parametrize(
    ("setting", "speedup", "wanted", "told"),
    [
        ("auto", 2.1, "bf16-mixed", "precision    bf16-mixed, since products in bf16 run at 2.1 "),
        ("auto", 1.2, "32-true", "precision    32, since products in bf16 run at 1.2 times the"),
        ("auto", 0.01, "32-true", "at 0.01 times the rate of fp32 on this CPU"),
        ("bf16-mixed", 0.01, "bf16-mixed", "in bf16 take 100 times as long as in fp32; 32 or auto"),
        ("bf16-mixed", 2.0, "bf16-mixed", ""),
        ("32", None, "32-true", ""),
    ],
)
def test_what_a_run_takes_and_says(
    setting: str,
    speedup: float | None,
    wanted: str,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def found() -> Any:
        assert speedup is not None, "nothing needs to be measured"
        return speedup

    monkeypatch.setattr(fit, "cpu_speedup", found)
    run = load_config("deepseek_v3_tiny", [])
    run = replace(run, trainer=replace(run.trainer, precision=setting))
    assert fit._precision(run, on_gpu=False) == wanted
    out = capsys.readouterr().out
    assert (told in out) if told else not out
    assert fit._precision(run, on_gpu=True) == ("32-true" if setting == "32" else "bf16-mixed")
