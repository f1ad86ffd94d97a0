"""``deepseek calibrate``: how fast this machine's CPU is, for ``estimate`` and ``plan``.

What a step is made of is timed piece by piece, in one process with all cores, then in more and more
at once, as many as there are cores or four: each has less of the memory, and they exchange.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from deepseek.commands.device import calibration_file
from deepseek.console import say
from deepseek.files import atomic_open, write_new
from deepseek.launch.processes import Processes, join, leave, quiet
from deepseek.launch.supervisor import supervise, worker_command
from deepseek.planner.cpu import (
    DISTURBED,
    CpuMachine,
    Crew,
    cores,
    crew_of,
    machine_name,
    machine_text,
)

PART = "DEEPSEEK_CALIBRATION_PART"
"""File for what a crew has measured, of the processes that measure."""
MOST = 16
"""Processes at once: more are taken to be like these."""


def calibrate(output: Path | None = None) -> None:
    """Measure, and write it down.

    Args:
        output: new file; None: this user's, which ``--gpu cpu`` and ``train`` read.

    Raises:
        UserError: ``output`` exists.
    """
    processes = Processes.from_environment()
    quiet(processes)
    if PART in os.environ:
        _measure(processes, Path(os.environ[PART]))
        return
    if output is not None:
        write_new(output, "")  # refused now, if it exists
        output.unlink()
    start = time.monotonic()
    crews: list[Crew] = []
    with _other_work() as others:
        for count in crew_sizes(cores()):
            say(f"{_processes(count):<14}")
            crew = _crew(count)
            if count > cores():  # they compute as those do that have a core each
                crew = replace(crew, forward=crews[-1].forward, backward=crews[-1].backward)
            crews.append(crew)
    machine = CpuMachine(
        machine_name(),
        cores(),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        others[0],
        tuple(crews),
    )
    file = output or calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(file) as opened:
        opened.write(machine_text(machine).encode())
    for crew in crews:
        _tell(crew)
    if machine.disturbed > DISTURBED:
        say(
            f"note         other work took {machine.disturbed:.0%} of this machine meanwhile: what "
            "is predicted will be too slow; calibrate again when it is idle"
        )
    say(f"wrote {file} in {time.monotonic() - start:.0f} s")


def crew_sizes(cores_here: int) -> list[int]:
    """Numbers of processes that are measured: powers of two up to the cores, and four at least."""
    most = min(MOST, max(4, cores_here))
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _crew(count: int) -> Crew:
    with tempfile.TemporaryDirectory() as folder:
        os.environ[PART] = str(Path(folder) / "part.json")
        try:
            code = supervise(worker_command(), count, 0, say)
            if code:
                raise SystemExit(code)
            return crew_of(json.loads(Path(os.environ[PART]).read_text(encoding="utf-8")))
        finally:
            del os.environ[PART]


def _measure(processes: Processes, part: Path) -> None:
    from deepseek.commands.cpu_speed import measured  # it imports torch

    if processes.world_size > 1:
        join(processes, "cpu", timedelta(minutes=5))
    crew = measured(processes, part.parent / "run", lambda what: say(f"{'':<12} {what} ..."))
    if processes.rank == 0:
        machine = CpuMachine("", 1, 1, 0, (crew,))
        part.write_text(machine_text(machine), encoding="utf-8")
    leave()


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _tell(crew: Crew) -> None:
    say(
        f"{_processes(crew.processes):<12} {1e-9 / crew.forward.flop:,.0f} GFLOP/s each, "
        f"{1e3 * (crew.forward.block + crew.backward.block):.2f} ms a block, "
        f"{1e3 * (crew.forward.moe + crew.backward.moe):.2f} ms a MoE layer, "
        f"{1e3 * (crew.outside.step + crew.outside.around):.1f} ms a step"
    )
    for links in crew.links if crew.processes > 1 else ():
        say(
            f"{'':<12} among {links.ranks}: {1e6 * links.shared:,.0f} us and "
            f"{1e-9 / links.shared_byte:.2f} GB/s shared, {1e6 * links.rows:,.0f} us and "
            f"{1e-9 / links.rows_byte:.2f} GB/s through gloo"
        )


@contextmanager
def _other_work() -> Iterator[list[float]]:
    """Share of the machine that other programs take meanwhile, where the system says."""
    found = [0.0]
    before, mine = _busy(), sum(os.times()[:4])
    yield found
    after = _busy()
    if before and after and after[1] > before[1]:
        ticks = os.sysconf("SC_CLK_TCK")
        others = (after[0] - before[0]) / ticks - (sum(os.times()[:4]) - mine)
        found[0] = min(1.0, max(0.0, others * ticks / (after[1] - before[1])))


def _busy() -> tuple[int, int] | None:
    """Ticks of all cores that were worked in, and all of them."""
    try:
        ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
