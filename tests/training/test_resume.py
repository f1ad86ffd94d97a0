"""Kill a run at random moments and continue it: losses and weights are bitwise the uninterrupted.

python tests/training/test_resume.py 20      # a table of 20 kills, for the record
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.checkpoint.folder import newest_sound

SOURCE = Path(__file__).resolve().parents[2] / "training" / "nemo"
SMALL = (
    "model.hidden_size=32 model.num_hidden_layers=2 model.num_attention_heads=2 "
    "model.intermediate_size=32 model.moe_intermediate_size=16 model.data.seq_length=32 "
    "model.vocab_size=400 model.data.data_prefix=data trainer.limit_val_batches=2 "
    "exp_manager.create_tensorboard_logger=false"
).split()
ENV = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


class Runs:
    """Runs of one small configuration in one folder."""

    def __init__(self, folder: Path, steps: int, every: int, *more: str) -> None:
        self.folder, self.steps = folder, steps
        texts = folder / "texts"
        texts.mkdir(parents=True)
        text = "".join(path.read_text() for path in sorted(SOURCE.rglob("*.py")))
        for i in range(60):
            (texts / f"{i}.txt").write_text(text[i * 3000 : (i + 1) * 3000])
        self.command("prepare-data", "texts", "--output", "data", "--vocab-size", "400")
        self.settings = [
            f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={steps // 4}",
            f"exp_manager.checkpoint_callback_params.every_n_train_steps={every}",
            *SMALL,
            *more,
        ]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run to the end; must succeed."""
        ran = subprocess.run(
            [sys.executable, "-m", "deepseek", *words],
            cwd=self.folder,
            env=ENV,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran

    def train(self, name: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Train to the end."""
        return self.command("train", "--run-dir", name, *self.settings, *more)

    def stop(self, name: str, number: int, delay: float) -> int | None:
        """Start, wait for some new steps and ``delay`` seconds, send a signal; exit code."""
        log = self.folder / name / "metrics.jsonl"
        rows = log.read_bytes().count(b"\n") if log.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "deepseek", "train", "--run-dir", name, *self.settings],
            cwd=self.folder,
            env=ENV,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= rows + 5:
                break
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)
        return process.wait(timeout=120)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Every tensor of the last checkpoint."""
        checkpoint = newest_sound(self.folder / name / "checkpoints", print)
        assert checkpoint is not None and checkpoint.step == self.steps
        dtypes = checkpoint.tensor_dtypes()
        tensors = {
            key: torch.empty(shape, dtype=dtypes[key])
            for key, shape in checkpoint.tensor_shapes().items()
        }
        checkpoint.load(tensors)
        return tensors

    def rows(self, name: str) -> dict[tuple[str, int], dict[str, Any]]:
        """Rows of the log without times; a step trained twice must have the same row twice."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for line in (self.folder / name / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "event" in row:
                continue
            row.pop("seconds", None)
            key = ("validation" if "val_loss" in row else "step", row["step"])
            assert found.setdefault(key, row) == row
        return found

    def differences(self, one: str, other: str) -> list[str]:
        """Names of tensors and rows that are not bitwise equal."""
        a, b = self.tensors(one), self.tensors(other)
        assert a.keys() == b.keys()
        rows_a, rows_b = self.rows(one), self.rows(other)
        wrong = [name for name in a if not torch.equal(a[name], b[name])]
        keys = rows_a.keys() | rows_b.keys()
        return wrong + [str(key) for key in keys if rows_a.get(key) != rows_b.get(key)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_runs_continue_bitwise(tmp_path: Path, optimizer: str) -> None:
    runs = Runs(tmp_path / "work", 60, 3, f"model.optim.name={optimizer}")
    runs.train("whole")
    assert runs.stop("killed", signal.SIGKILL, 0.0) == -signal.SIGKILL
    (tmp_path / "work" / "killed" / "metrics.jsonl").open("a").write('{"step": 9, "lo')
    runs.stop("killed", signal.SIGKILL, 0.1)
    out = runs.train("killed", "model.data.num_workers=1").stdout
    assert "resumed from" in out and "changed since the checkpoint: model.data.num_workers" in out
    assert runs.differences("whole", "killed") == []


def test_asked_to_stop_it_saves_and_later_goes_on(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "work", 60, 1000)
    runs.train("whole")
    assert runs.stop("stopped", signal.SIGTERM, 0.0) == 0
    assert list((tmp_path / "work" / "stopped" / "checkpoints").glob("step_*"))
    assert "resumed from" in runs.train("stopped").stdout
    assert runs.differences("whole", "stopped") == []
    # 1. complete: says so, changes nothing
    assert "is complete: 60 of 60 steps" in runs.train("stopped").stdout
    # 2. other settings: refused or reported
    refused = {
        "seed=5": "seed 1234 -> 5",
        "model.hidden_size=48": "model.hidden_size 32 -> 48",
        "model.global_batch_size=4": "model.global_batch_size 8 -> 4",
    }
    for setting, message in refused.items():
        words = [*runs.settings, "trainer.max_steps=61", setting]
        ran = subprocess.run(
            [sys.executable, "-m", "deepseek", "train", "--run-dir", "stopped", *words],
            cwd=runs.folder,
            env=ENV,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 2 and message in ran.stderr, ran.stderr
        assert "Traceback" not in ran.stderr
    # 3. a damaged newest checkpoint is named, the one before it is used
    runs.steps = 62
    runs.train("stopped", "trainer.max_steps=62")
    newest = tmp_path / "work" / "stopped" / "checkpoints" / "step_00000062" / "__0_0.distcp"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(bytes(data))
    ran = runs.train("stopped", "trainer.max_steps=63")
    assert "step_00000062" in ran.stdout and "at step 60" in ran.stdout


def sweep(kills: int) -> None:
    """Kill one run many times and print what differs from an uninterrupted one."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder) / "work", 400, 7)
        runs.train("whole")
        moments = random.Random(7)
        done = 0
        while done < kills:
            done += runs.stop("killed", signal.SIGKILL, moments.uniform(0, 0.8)) != 0
        runs.train("killed")
        wrong = runs.differences("whole", "killed")
        print(f"{done} kills, {len(runs.tensors('whole'))} tensors, {len(runs.rows('whole'))} rows")
        print(f"{len(wrong)} differences {wrong[:5]}")


if __name__ == "__main__":
    sweep(int(sys.argv[1]))
