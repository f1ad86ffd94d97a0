"""Random layouts against one process, many of them.

    python tests/parallel/sweep.py --cases 200 --dtype float64 --seed 0

A line per case, then the worst errors. Ends with 1 if a case fails or is further off than allowed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import torch
from draw import draw_cases
from layouts import Case, compare, worst
from ranks import RankFailed

ALLOWED = {"float64": 1e-12, "float32": 1e-5}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--dtype", choices=ALLOWED, default="float64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument("--verbose", action="store_true", help="the largest errors of each case")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    allowed = ALLOWED[asked.dtype]
    drawn = draw_cases(asked.cases, getattr(torch, asked.dtype), asked.seed)
    numbers = range(len(drawn)) if asked.only is None else asked.only
    by_kind: dict[str, list[float]] = {}
    failed: list[int] = []
    start = time.perf_counter()
    for number in numbers:
        began = time.perf_counter()
        try:
            errors = compare(drawn[number])
        except (RankFailed, AssertionError) as error:
            failed.append(number)
            print(f"{number:4d} FAILED   {drawn[number]}\n{error}", flush=True)
            continue
        name, error = worst(errors)
        if not error <= allowed:
            failed.append(number)
        word = "ok" if error <= allowed else "TOO FAR"
        took = time.perf_counter() - began
        print(f"{number:4d} {word} {took:5.1f} s {error:.1e} {name}  {drawn[number]}", flush=True)
        if asked.verbose or not error <= allowed:
            for name, value in sorted(errors.items(), key=lambda item: -item[1])[:12]:
                print(f"       {value:.1e} {name}", flush=True)
        for name, value in errors.items():
            by_kind.setdefault(name.partition(".")[0], []).append(value)
    report(drawn, by_kind)
    print(
        f"{len(numbers)} cases in {asked.dtype}, {len(failed)} failed {failed or ''}, allowed "
        f"{allowed:g}, {time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}"
    )
    return 1 if failed else 0


def report(drawn: list[Case], by_kind: dict[str, list[float]]) -> None:
    """The errors of each quantity over all cases."""
    print(f"{'':16s} {'largest':>9s} {'median':>9s} {'compared':>9s}")
    for kind, values in by_kind.items():
        median = statistics.median(values)
        print(f"{kind:16s} {max(values):9.1e} {median:9.1e} {len(values):9d}")


if __name__ == "__main__":
    sys.exit(main())
