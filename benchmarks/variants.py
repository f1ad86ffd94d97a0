"""Our own training step in several ways, beside each other: a process each, in turn.

Taking turns slows all alike where a machine's speed drifts. The processes are forks of one that has
imported all and computed nothing, so that a way costs no imports.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from cases import Case
from sides import CPU, Run, answer, our_step

from deepseek.parallel import cpu_memory

CONTEXT: Any = multiprocessing.get_context("forkserver")

Prepare = Callable[[], None]
"""Called in the process before anything is computed; found by name there."""


def in_turn(
    ways: Mapping[str, tuple[Case, Prepare]], threads: int, rounds: int
) -> dict[str, list[Run]]:
    """The runs of each way, all of a round one after the other; the first of each warms up and
    is left out.

    Raises:
        ValueError: another way has another loss.
    """
    with ExitStack() as stack:
        pipes = []
        for case, prepare in ways.values():
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(there, case, prepare, threads))
            process.start()
            stack.callback(_end, here, process)
            there.close()
            pipes.append(here)
        runs = [[_run(pipe) for pipe in pipes] for _ in range(rounds + 1)][1:]
    found = dict(zip(ways, map(list, zip(*runs, strict=True)), strict=True))
    losses = {name: mine[0].first_loss for name, mine in found.items()}
    first = next(iter(losses.values()))
    if any(abs(loss - first) > 1e-5 * abs(first) for loss in losses.values()):
        raise ValueError(f"these should have one loss: {losses}")
    return found


def memory(whole: list[Run], others: list[Run]) -> dict[str, float]:
    """Most that was resident besides imports, weights, gradients and moments, in GiB."""
    most = (max(run.besides_bytes for run in runs) for runs in (whole, others))
    return {
        name: round(bytes_ / 2**30, 3)
        for name, bytes_ in zip(("with_gib", "gib"), most, strict=True)
    }


def _end(pipe: Connection, process: Any) -> None:
    with suppress(BrokenPipeError):  # it has ended by an error
        pipe.send(None)
    process.join()


def _run(pipe: Connection) -> Run:
    pipe.send(False)
    return Run(**pipe.recv())


def _serve(pipe: Connection, case: Case, prepare: Prepare, threads: int) -> None:
    prepare()
    cpu_memory.keep_freed_memory()  # by its module: one of the ways is without
    torch.set_num_threads(threads)
    answer(pipe, case, lambda: our_step(case), CPU)
