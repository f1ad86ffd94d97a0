"""``deepseek calibrate``: how fast this machine's CPU is, for ``estimate`` and ``plan``.

Steps of small models are timed, in one process with all cores and in one process a core at once,
and what processes exchange. The constants of the model of time are those that explain the steps
best; large products and memory are timed by themselves and pull them.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

from deepseek.commands.device import calibration_file
from deepseek.console import say
from deepseek.files import atomic_open, write_new
from deepseek.launch.processes import Processes, join, leave, quiet
from deepseek.launch.supervisor import supervise, worker_command
from deepseek.planner.cpu import cores, machine_text


def calibrate(output: Path | None = None) -> None:
    """Measure, and write it down.

    Args:
        output: new file; None: this user's, which ``--gpu cpu`` and ``train`` read.

    Raises:
        UserError: ``output`` exists.
    """
    processes = Processes.from_environment()
    quiet(processes)
    if processes.started_by == "none":
        if output is not None:
            write_new(output, "")  # refused now, if it exists
            output.unlink()
        count = max(2, cores())
        say(f"processes    {count}, to measure this machine; other work on it disturbs")
        code = supervise(worker_command(), count, 0, say)
        if code:
            raise SystemExit(code)
        return
    from deepseek.commands.cpu_speed import measured  # it imports torch

    join(processes, "cpu", timedelta(minutes=10))
    start = time.monotonic()
    machine = measured(processes.rank)
    if processes.rank == 0:
        file = output or calibration_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(file) as opened:
            opened.write(machine_text(machine).encode())
        for title, speed in (("alone", machine.alone), ("together", machine.together)):
            say(
                f"{title:<12} {speed.products / 1e9:,.0f} GFLOP/s, {speed.memory / 1e9:,.1f} GB/s, "
                f"{1e3 * speed.host:.2f} ms a block, {1e3 * speed.step:.1f} ms a step"
            )
        links = machine.links
        say(
            f"{'links':<12} gloo {links.gloo / 1e9:.2f} GB/s and "
            f"{1e6 * links.gloo_message:,.0f} us, "
            f"shared memory {links.shared_memory / 1e9:.2f} GB/s and "
            f"{1e6 * links.shared_message:,.0f} us"
        )
        say(f"wrote {file} in {time.monotonic() - start:.0f} s")
    leave()
