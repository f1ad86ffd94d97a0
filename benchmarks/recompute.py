"""What recomputation saves and costs on a CPU: peak memory and time of a step under each policy.

    python benchmarks/recompute.py                     a minute on two free cores
    python benchmarks/recompute.py --only F            a case of ``train_step.py``

Every policy has a process of its own, and they take turns, so that a machine whose speed drifts
slows all alike; times are the medians of the ratios to the policy that keeps everything. Memory is
the most that was resident within a step, without imports, weights, gradients and moments.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from train_step import CASES, Case, our_step

from deepseek.config.memory import state_memory
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.training.phases import resident_bytes

POLICIES: dict[str, dict[str, Any]] = {
    "null": {},
    "selective": {"activations_checkpoint_granularity": "selective"},
    "full": {"activations_checkpoint_granularity": "full"},
}


def main() -> None:
    """Print a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="sequence", help="how the case's name begins")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    case = next(case for case in CASES if case.name.startswith(args.only))
    context, pipes = multiprocessing.get_context("spawn"), []
    with ExitStack() as stack:
        for change in POLICIES.values():
            here, there = context.Pipe()
            changed = replace(case, model=replace(case.model, **change))
            process = context.Process(target=serve, args=(there, changed, args.threads))
            process.start()
            stack.callback(process.join)
            stack.callback(here.close)
            there.close()
            pipes.append(here)
        rounds = [[step(pipe) for pipe in pipes] for _ in range(args.rounds + 1)][1:]
    print(f"{case.name}, {args.threads} threads")
    for name, runs in zip(POLICIES, zip(*rounds, strict=True), strict=True):
        ratio = statistics.median(
            run[0] / first[0][0] for run, first in zip(runs, rounds, strict=True)
        )
        seconds = statistics.median(run[0] for run in runs)
        most = max(run[1] for run in runs) / 2**30
        print(f"{name:<10} {seconds:.2f} s, {ratio:.2f} times as long, {most:.2f} GiB")


def step(pipe: Any) -> tuple[float, int]:
    """Seconds and bytes of one."""
    pipe.send(None)
    return pipe.recv()


def serve(pipe: Any, case: Case, threads: int) -> None:
    """A step whenever it is asked for, until the pipe is closed."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    owed = resident_bytes() + state_memory(case.model).total
    call = our_step(case)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        begin = time.perf_counter()
        _, peak = call()
        pipe.send((time.perf_counter() - begin, peak - owed))


if __name__ == "__main__":
    main()
