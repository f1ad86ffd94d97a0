"""Kill one run many times at random moments and compare it with the uninterrupted one.

    python -m support.kill_sweep --kills 20 [--optimizer muon] [--workers 2]

prints a line a kill and then what differs, which must be nothing.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from support.micro_runs import MicroRuns

MOST_ROWS = 9
"""New steps a run is let make before it is killed: at most so many."""


@dataclass(frozen=True)
class Kill:
    """One kill and what it left."""

    moment: str
    last_row: int
    """Step of the last row of the log, 0 if there is none."""
    checkpoint: int
    """Step of the newest checkpoint, 0 if there is none."""


def kill_often(runs: MicroRuns, name: str, kills: int, seed: int, *settings: str) -> list[Kill]:
    """Start the run, kill it at a random moment, start it again, so many times; not the last start.

    Half of the kills come after a random number of new rows and some milliseconds, every fourth
    before the first new row, while the program starts or loads a checkpoint.
    """
    chance = random.Random(seed)
    done = []
    for number in range(kills):
        started = runs.start(name, *settings)
        if number % 4 == 3:
            delay = chance.uniform(0.05, 0.4)
            moment = f"{delay * 1000:.0f} ms after the start"
        else:
            rows = chance.randint(1, MOST_ROWS)
            delay = chance.uniform(0.0, 0.04)
            moment = f"{delay * 1000:.0f} ms after {rows} rows"
            wait_for_rows(runs.folder / name / "metrics.jsonl", rows)
        time.sleep(delay)
        started.signal(signal.SIGKILL)
        ran = started.wait()
        assert ran.code == -signal.SIGKILL, ran
        log = runs.folder / name / "metrics.jsonl"
        last_row = max((row["step"] for row in runs.rows(name)), default=0) if log.exists() else 0
        done.append(Kill(moment, last_row, max(runs.steps(name), default=0)))
    return done


def wait_for_rows(log: Path, rows: int) -> None:
    """Until the log has so many lines more than now."""
    before = log.read_bytes().count(b"\n") if log.exists() else 0
    end = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < before + rows:
        assert time.monotonic() < end, f"{log} does not grow"
        time.sleep(0.002)


def settings_of(kills: int, optimizer: str, workers: int) -> list[str]:
    """A run long enough that so many kills do not let it end."""
    return [
        f"trainer.max_steps={(kills + 1) * (MOST_ROWS + 5)}",
        "trainer.val_check_interval=6",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=4",
        f"model.optim.name={optimizer}",
        f"model.data.num_workers={workers}",
    ]


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    settings = settings_of(options.kills, options.optimizer, options.workers)
    with tempfile.TemporaryDirectory() as folder:
        runs = MicroRuns(Path(folder) / "runs")
        print(runs.train("whole", *settings).assert_done().out.splitlines()[1])
        print(f"{'kill':>4}  {'moment':<24} {'last row':>8} {'checkpoint':>10}")
        kills = kill_often(runs, "killed", options.kills, options.seed, *settings)
        for number, kill in enumerate(kills, 1):
            print(f"{number:>4}  {kill.moment:<24} {kill.last_row:>8} {kill.checkpoint:>10}")
        runs.train("killed", *settings).assert_done()
        wrong = runs.differences("whole", "killed")
        tensors, rows = len(runs.tensors("whole")), len(runs.rows("whole"))
        print(f"{len(kills)} kills; compared {tensors} tensors and {rows} rows of the log")
        print(f"{len(wrong)} differences {' '.join(wrong[:5])}".rstrip())
        runs.cli.close()


if __name__ == "__main__":
    main()
