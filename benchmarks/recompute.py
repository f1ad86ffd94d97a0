"""What recomputation saves and costs on a CPU: peak memory and time of a step under each policy.

    python benchmarks/recompute.py                     a minute on two free cores
    python benchmarks/recompute.py --cases F           a case of ``cases.py``

Every policy has a process of its own, and they take turns, so that a machine whose speed drifts
slows all alike; times are the medians of the ratios to the policy that keeps everything. Memory is
the most that was resident within a step, without imports, weights, gradients and moments.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from cases import CASES, chosen
from results import RESULTS, conditions, keep, results_file, whole
from sides import Run
from variants import in_turn, memory

from deepseek.commands.entry import guarded

POLICIES: dict[str, dict[str, Any]] = {
    "null": {},
    "selective": {"activations_checkpoint_granularity": "selective"},
    "full": {"activations_checkpoint_granularity": "full"},
}


def main() -> None:
    """Print a line for each policy, keep it as JSON."""
    cases = [case for case in CASES if not case.decodes]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["sequence"], help="that begin so")
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--output", type=results_file, default=str(RESULTS))
    args = parser.parse_args()
    try:
        asked = chosen(cases, args.cases)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    for case in asked:
        told = conditions()
        ways = {
            name: (replace(case, model=replace(case.model, **change)), as_it_is)
            for name, change in POLICIES.items()
        }
        runs = in_turn(ways, args.threads, args.rounds)
        found = {name: beside(mine, runs["null"]) for name, mine in runs.items()}
        print(f"{case.name}, {args.threads} threads, load {told['load']}")
        for name, row in found.items():
            print(
                f"{name:<10} {row['seconds']:.2f} s, {row['times']:.2f} times as long, "
                f"{row['gib']:.2f} GiB"
            )
        keep(args.output, "recompute", case.name, told | {"policies": found})


def beside(runs: list[Run], whole: list[Run]) -> dict[str, float]:
    """Time and memory of a policy, and its time beside that of keeping everything."""
    ratios = (a.seconds / b.seconds for a, b in zip(runs, whole, strict=True))
    return {
        "seconds": round(statistics.median(run.seconds for run in runs), 3),
        "times": round(statistics.median(ratios), 3),
        "gib": memory(whole, runs)["gib"],
    }


def as_it_is() -> None:
    """Nothing to prepare."""


if __name__ == "__main__":
    guarded(main)
