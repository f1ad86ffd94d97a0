"""Random layouts against one process, many of them.

    python -m support.sweep --cases 200 --dtype float64 --seed 0

A line per case, then the worst errors. Ends with 1 if a case fails or is further off than allowed.
A tensor may be, and is listed as ``rounded``: if one process, its start weights changed in
the last bit, moves by as much. So may in fp32 a metric or a sum over tensors, by a stricter rule
(``ill_conditioned``).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from dataclasses import replace

import torch

from support.draw import draw_cases
from support.layouts import METRICS, Case, compare, conditioning, in_one_process, rounding, worst
from support.ranks import RankFailed

MOST_SHOWN = 12
"""Of the tensors of one case that are too far off."""
ALLOWED = {"float64": 1e-12, "float32": 1e-5}
ROUNDED_MOST = {torch.float64: 1e-9, torch.float32: 1e-4}
"""A tensor that one process computes worse than that is no matter of rounding."""
NOTHING = 1e-14
"""Of the whole gradient: what rounding leaves of a sum that is zero."""


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--dtype", choices=ALLOWED, default="float64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    allowed = ALLOWED[asked.dtype]
    drawn = draw_cases(asked.cases, getattr(torch, asked.dtype), asked.seed)
    numbers = range(len(drawn)) if asked.only is None else asked.only
    by_kind: dict[str, list[float]] = {}
    failed: list[int] = []
    rounded: list[str] = []
    start = time.perf_counter()
    for number in numbers:
        case = drawn[number]
        began = time.perf_counter()
        try:
            errors = compare(case)
        except (RankFailed, AssertionError) as error:
            failed.append(number)
            print(f"{number:4d} FAILED  {case}\n{error}", flush=True)
            continue
        far = too_far(errors, allowed)
        ill = ill_conditioned(case, far, allowed)
        word = "ok"
        if far:
            word = "rounded" if set(far) <= set(ill) else "TOO FAR"
        if word == "TOO FAR":
            failed.append(number)
        name, error = worst(errors)
        took = time.perf_counter() - began
        print(f"{number:4d} {word} {took:5.1f} s {error:.1e} {name}  {case}", flush=True)
        for name, value in sorted(far.items(), key=lambda item: -item[1])[:MOST_SHOWN]:
            line = f"case {number}: {value:.1e} {name}"
            if name in ill:
                rounded.append(f"{line}; one process itself moves by {ill[name]:.1e}")
            print(f"       {line}", flush=True)
        for name, value in errors.items():
            by_kind.setdefault(kind_of(name), []).append(value)
    report(by_kind)
    if rounded:
        print(f"{len(rounded)} tensors further off than {allowed:g}, as is rounding itself:")
        print("\n".join(rounded))
    print(
        f"{len(numbers)} cases in {asked.dtype}, {len(failed)} failed {failed or ''}, allowed "
        f"{allowed:g}, {time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}"
    )
    return 1 if failed else 0


def too_far(errors: dict[str, float], allowed: float) -> dict[str, float]:
    """The errors above ``allowed``, or not a number."""
    return {name: error for name, error in errors.items() if not error <= allowed}


def ill_conditioned(case: Case, far: dict[str, float], allowed: float) -> dict[str, float]:
    """Which of these are as inexact in one process, within a factor of 3, if its start weights
    differ in the last bit: small sums of large terms, which no order adds up better. A sum of
    nothing but rounding errors, as the gradient of a query that sees one key, has no digit that
    holds, and neither has what the optimiser keeps of it.

    In fp32 metrics, and all tensors of a kind together, have a stricter rule: such a change of the
    start weights must move them, in exact arithmetic, by more than ``allowed``, and by half of
    their error at least.
    """
    if not far:
        return {}
    own, found = rounding(case), dict[str, float]()
    exact = conditioning(case) if case.dtype == torch.float32 else {}
    most = ROUNDED_MOST[case.dtype]
    noise = without_gradient(case)
    for name in far.keys() & own.keys():
        if exact and (name in METRICS or name.startswith("all.")):
            moved, factor = exact[name], 2
            excused = allowed < moved <= most / 2
        else:
            moved, factor = max(own[name], exact.get(name, 0.0)), 3
            excused = 3 * moved <= most or moved > 1
        if (excused and far[name] <= factor * moved) or weight_of(name) in noise:
            found[name] = moved
    return found


def without_gradient(case: Case) -> set[str]:
    """Weights whose gradient is zero by the function that is computed, as that of a query which
    sees one key: what one process in fp64 has of it is as small as rounding errors are."""
    tensors = in_one_process(replace(case, dtype=torch.float64)).tensors()
    norms = {
        weight_of(name): tensor.double().norm().item()
        for name, tensor in tensors.items()
        if name.startswith("gradient.")
    }
    most = NOTHING * math.hypot(*norms.values())
    return {name for name, norm in norms.items() if norm <= most}


def weight_of(name: str) -> str:
    """The weight that a gradient or a state of the optimiser is of."""
    return name.partition(".")[2]


def kind_of(name: str) -> str:
    """What to report an error under."""
    return name if name.startswith("all.") else name.partition(".")[0]


def report(by_kind: dict[str, list[float]]) -> None:
    """The errors of each quantity over all cases."""
    print(f"{'':20s} {'largest':>9s} {'median':>9s} {'compared':>9s}")
    for kind, values in sorted(by_kind.items()):
        median = statistics.median(values)
        print(f"{kind:20s} {max(values):9.1e} {median:9.1e} {len(values):9d}")


if __name__ == "__main__":
    sys.exit(main())
