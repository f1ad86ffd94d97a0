"""Our own training step in several ways, beside each other: a process each, in turn.

Taking turns slows all alike where a machine's speed drifts. The processes are forks of one that has
imported all and computed nothing, so that a way costs no imports.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from cases import Case
from sides import CPU, Run, answer, ended, our_step

from deepseek.config.errors import UserError
from deepseek.parallel import cpu_memory

CONTEXT: Any = multiprocessing.get_context("forkserver")

Prepare = Callable[[], None]
"""Called in the process before anything is computed; found by name there."""
Ask = Callable[[object], Any]


def in_turn(
    ways: Mapping[str, tuple[Case, Prepare]], threads: int, rounds: int
) -> dict[str, list[Run]]:
    """The runs of each way, all of a round one after the other; the first of each warms up and
    is left out.

    Raises:
        ValueError: another way has another loss.
        UserError: a process has ended by itself.
    """
    with ExitStack() as stack:
        asks = [
            stack.enter_context(process(f"'{name}'", case, _serve, prepare, threads))
            for name, (case, prepare) in ways.items()
        ]
        runs = [[Run(**ask(False)) for ask in asks] for _ in range(rounds + 1)][1:]
    return of_one_loss(dict(zip(ways, map(list, zip(*runs, strict=True)), strict=True)))


def one_by_one(ways: Mapping[str, tuple[Case, Prepare]], threads: int) -> dict[str, list[Run]]:
    """As ``in_turn``, of one round, but a process begins when the one before it has ended."""
    runs = {name: in_turn({name: way}, threads, rounds=1)[name] for name, way in ways.items()}
    return of_one_loss(runs)


def of_one_loss(found: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """``found``.

    Raises:
        ValueError: one way has another loss than the first.
    """
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


@contextmanager
def process(name: str, case: Case, serve: Callable[..., None], *more: Any) -> Iterator[Ask]:
    """A process of its own; it ends with what the caller does, however that ends.

    Args:
        name: what it is called if it fails.
        case: what it computes.
        serve: run in it, with its end of a pipe, the case, and ``more``.

    Yields:
        Sends a word and returns the answer. It raises UserError if the process has ended by itself.
    """
    here, there = CONTEXT.Pipe()
    made = CONTEXT.Process(target=serve, args=(there, case, *more))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it need not know of Ctrl-C either
    made.start()
    signal.signal(signal.SIGINT, before)
    there.close()

    def ask(word: object) -> Any:
        try:
            here.send(word)
            return here.recv()
        except (EOFError, OSError):
            made.join()
            raise UserError(ended(name, case, made.exitcode)) from None

    try:
        yield ask
        with suppress(OSError):  # it has ended
            here.send(None)
    except BaseException:
        made.kill()
        raise
    finally:
        here.close()
        made.join()


def _serve(pipe: Connection, case: Case, prepare: Prepare, threads: int) -> None:
    prepare()
    cpu_memory.keep_freed_memory()  # by its module: one of the ways is without
    torch.set_num_threads(threads)
    answer(pipe, case, lambda: our_step(case), CPU)
