"""Kill ranks of one run in several processes, which must come back by itself each time.

    python -m support.rank_kill_sweep --kills 10 [--devices 4] [--launcher torchrun] [--fork]
        [--stop]

prints a line a kill and then what differs from the uninterrupted run of the same layout, bitwise,
which must be nothing. ``--fork``: workers are forks instead of new interpreters, which starts them
in a tenth of the time. ``--stop``: they are stopped instead (SIGSTOP), and must be missed within
the time-out of a step.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from support.forked import FORK_WORKERS, Started, children, environment_for_tests, is_running
from support.launchers import by_itself, by_torchrun, layout
from support.micro_runs import MicroRuns

LAYOUTS = {
    2: layout(2, ep=2, micro=2),
    4: layout(4, ep=2, pp=2),
    8: layout(8, tp=2, pp=2, ep=2),
}
MOST_ROWS = 12
"""New rows a run is let write before a rank is killed: at most so many."""
STEP_SECONDS = 3
"""Time-out of a step where ranks are stopped."""
MOMENTS = ("step", "save", "start", "step")
"""What the run is doing when a rank is killed, in turn."""


@dataclass(frozen=True)
class Kill:
    """One kill."""

    moment: str
    rank: int
    rows: int
    """Lines of the log by then."""
    checkpoint: int
    """Step of the newest checkpoint, 0 if there is none."""
    seconds: float
    """Until all ranks of the next attempt are there."""


class Supervisor(Protocol):
    """The process that starts the ranks: a ``Started`` or a ``Popen`` has this."""

    @property
    def pid(self) -> int: ...


def kill_ranks(
    runs: MicroRuns,
    name: str,
    supervisor: Supervisor,
    devices: int,
    kills: int,
    seed: int,
    stop: bool = False,
) -> list[Kill]:
    """Kill a random rank at a random moment, so many times; the run must start anew each time.

    ``stop``: stop it instead, in a step.
    """
    chance = random.Random(seed)
    folder = runs.folder / name
    done: list[Kill] = []
    ranks = new_ranks(supervisor.pid, devices, set())
    for number in range(kills):
        moment = "step" if stop else MOMENTS[number % len(MOMENTS)]
        delay = chance.uniform(0.0, 0.05)
        rows = lines(folder / "metrics.jsonl") + chance.randint(2, MOST_ROWS)
        if moment == "start":  # while it imports, joins, or loads
            delay *= 30
        else:
            wait_until(lambda: lines(folder / "metrics.jsonl") >= rows, supervisor.pid)  # noqa: B023
        if moment == "save":
            wait_until(lambda: any(folder.glob("checkpoints/.tmp-*")), supervisor.pid)
            delay /= 10
        time.sleep(delay)
        rank = chance.randrange(devices)
        os.kill(ranks[rank], signal.SIGSTOP if stop else signal.SIGKILL)
        began, checkpoint = time.monotonic(), max(runs.steps(name), default=0)
        so_far = lines(folder / "metrics.jsonl")
        ranks = new_ranks(supervisor.pid, devices, set(ranks))
        seconds = time.monotonic() - began
        moment = f"{moment} + {delay * 1000:.0f} ms"
        done.append(Kill(moment, rank, so_far, checkpoint, seconds))
    return done


def new_ranks(supervisor: int, devices: int, before: set[int]) -> list[int]:
    """Process ids in the order of the ranks, once all of a new attempt are there."""
    found: list[int] = []

    def all_there() -> bool:
        found[:] = children(supervisor)
        return len(found) == devices and not before & set(found)

    wait_until(all_there, supervisor)
    return found


def wait_until(met: Callable[[], bool], supervisor: int, seconds: float = 300.0) -> None:
    """Until it is so, while the supervisor runs."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "the run has come to a stop"
        assert is_running(supervisor), "the supervisor has ended"
        time.sleep(0.002)


def lines(log: Path) -> int:
    """Lines of a log that need not be there."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def settings_of(devices: int, kills: int) -> list[str]:
    """A run long enough that so many kills do not let it end, saving often."""
    return [
        *LAYOUTS[devices],
        f"trainer.max_steps={(kills + 1) * (MOST_ROWS + 6)}",
        f"trainer.max_restarts={kills + 2}",
        "trainer.val_check_interval=10",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=5",
    ]


def start_real(runs: MicroRuns, name: str, launcher: list[str], settings: list[str]) -> Popen:
    """New interpreters, as a user has them."""
    with (runs.folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, *map(str, runs.words(name, *settings))],
            cwd=runs.folder,
            env=environment_for_tests(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


Popen = subprocess.Popen[bytes]


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--devices", type=int, default=4, choices=list(LAYOUTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", default="supervisor", choices=["supervisor", "torchrun"])
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--stop", action="store_true")
    options = parser.parse_args()
    settings = settings_of(options.devices, options.kills)
    if options.stop:
        settings.append(f"trainer.step_timeout_seconds={STEP_SECONDS}")
    with tempfile.TemporaryDirectory() as folder:
        runs = MicroRuns(Path(folder) / "runs")
        try:
            sweep(runs, options, settings)
        finally:
            runs.cli.close()


def sweep(runs: MicroRuns, options: argparse.Namespace, settings: list[str]) -> None:
    """The uninterrupted run, the killed one, and their differences."""
    began = time.monotonic()
    runs.train("whole", *settings, before=FORK_WORKERS).assert_done()
    print(f"{options.devices} processes by {options.launcher}; uninterrupted ", end="")
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    launcher = ["-m", "deepseek"]
    if options.launcher == "torchrun":
        agent = ["-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.2"]
        agent += [f"--nproc-per-node={options.devices}", f"--max-restarts={options.kills + 2}"]
        launcher = [*agent, *launcher]
    began = time.monotonic()
    process: Popen | Started
    if options.fork:
        if options.launcher == "supervisor":
            process = by_itself(runs, "killed", *settings)
        else:
            restarts = options.kills + 2
            process = by_torchrun(runs, "killed", options.devices, *settings, restarts=restarts)
    else:
        process = start_real(runs, "killed", launcher, settings)
    kills = kill_ranks(
        runs, "killed", process, options.devices, options.kills, options.seed, options.stop
    )
    print(f"{'kill':>4}  {'moment':<16} {'rank':>4} {'rows':>5} {'checkpoint':>10} {'anew':>7}")
    for number, kill in enumerate(kills, 1):
        print(f"{number:>4}  {kill.moment:<16} {kill.rank:>4} {kill.rows:>5}", end="")
        print(f" {kill.checkpoint:>10} {kill.seconds:>5.1f} s")
    ended = process.wait()
    code = ended if isinstance(ended, int) else ended.code
    print(f"ended with exit code {code} after {time.monotonic() - began:.0f} s")
    wrong = runs.differences("whole", "killed")
    tensors, rows = len(runs.tensors("whole")), len(runs.rows("whole"))
    print(f"{len(kills)} kills; compared {tensors} tensors and {rows} rows of the log, bitwise")
    print(f"{len(wrong)} differences {' '.join(wrong[:5])}".rstrip())
    if code or wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
