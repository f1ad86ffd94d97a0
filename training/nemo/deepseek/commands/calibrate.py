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
from datetime import timedelta
from pathlib import Path

from deepseek.commands.device import calibration_file
from deepseek.config.processor import cores
from deepseek.console import say
from deepseek.files import atomic_open, write_new
from deepseek.launch.processes import Processes, join, leave, quiet
from deepseek.launch.supervisor import supervise, worker_command
from deepseek.planner.cpu import (
    DISTURBED,
    CpuMachine,
    Crew,
    crew_of,
    machine_name,
    machine_text,
)

ATTEMPTS = 2
"""At each number of processes, if other work disturbs."""
PART = "DEEPSEEK_CALIBRATION_PART"
"""File for what a crew has measured, of the processes that measure; before, of what fewer have."""
MOST = 16
"""Processes at once: more are taken to be like these."""
CREW_MEMBER = 1 << 30
"""Bytes of one of them, about."""


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
    shares = []
    for count in crew_sizes(cores()):
        say(_processes(count))
        share, crew = _least_disturbed(count, crews[-1] if crews else None)
        shares.append(share)
        crews.append(crew)
    machine = CpuMachine(
        machine_name(),
        cores(),
        _memory(),
        max(shares),
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
    most = max(1, min(MOST, max(4, cores_here), _memory() // CREW_MEMBER))
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _least_disturbed(count: int, before: Crew | None) -> tuple[float, Crew]:
    """A crew, measured again if others worked meanwhile, and their share of the machine."""
    found: list[tuple[float, Crew]] = []
    while len(found) < ATTEMPTS and (not found or found[-1][0] > DISTURBED / 2):
        if found:
            say(f"{'':<12} other work took {found[-1][0]:.0%} of this machine: once more")
        with _other_work() as others:
            crew = _crew(count, before)
        found.append((others[0], crew))
    return min(found, key=lambda pair: pair[0])


def _crew(count: int, before: Crew | None) -> Crew:
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        if before is not None:
            part.write_text(machine_text(CpuMachine("", 1, 1, 0, (before,))), encoding="utf-8")
        os.environ[PART] = str(part)
        try:
            code = supervise(worker_command(), count, 0, say)
            if code:
                raise SystemExit(code)
            return crew_of(json.loads(part.read_text(encoding="utf-8")))
        finally:
            del os.environ[PART]


def _measure(processes: Processes, part: Path) -> None:
    from deepseek.commands.cpu_speed import measured  # it imports torch

    before = None
    if part.exists():
        before = crew_of(json.loads(part.read_text(encoding="utf-8")))
    if processes.world_size > 1:
        join(processes, "cpu", timedelta(minutes=5))
    tell = lambda what: say(f"{'':<12} {what} ...")  # noqa: E731
    crew = measured(processes, part.parent / "run", before, tell)
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
            f"{1e-9 / links.rows_byte:.2f} GB/s of experts' rows"
        )


@contextmanager
def _other_work() -> Iterator[list[float]]:
    """Share of these cores that other programs take meanwhile, where the system says."""
    found = [0.0]
    before, mine, start = _busy(), sum(os.times()[:4]), time.monotonic()
    yield found
    after = _busy()
    if before and after:
        ticks = os.sysconf("SC_CLK_TCK")
        busy, there = (after[0] - before[0]) / ticks, (after[1] - before[1]) / ticks
        others = busy - (sum(os.times()[:4]) - mine)
        found[0] = share_of_others(others, there, time.monotonic() - start, cores())


def share_of_others(others: float, there: float, elapsed: float, cores_here: int) -> float:
    """Of the cores that may be used here, what other programs took.

    Where the machine has more, they are taken to have been there as long as there was room.

    Args:
        others: core seconds that they took.
        there: core seconds of the whole machine.
        elapsed: seconds.
        cores_here: that may be used here.
    """
    mine = cores_here * elapsed
    return min(1.0, max(0.0, others - max(0.0, there - mine)) / mine)


def _busy() -> tuple[int, int] | None:
    """Ticks of all cores that were worked in, and all of them."""
    try:
        ticks = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    except (OSError, ValueError):
        return None
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
