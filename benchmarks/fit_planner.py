"""Fits the planner's constants to published runs, and predicts systems that were left out.

    python benchmarks/fit_planner.py published_runs.json [--leave program|gpu|release|model]

The file is a list of rows as ``deepseek estimate --published`` reads them. Loss: the mean squared
logarithm of predicted over measured throughput, every group of rows of one program, GPU, model and
precision with the same weight, since most rows repeat a layout in another release.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from deepseek.commands.entry import guarded
from deepseek.config.errors import UserError
from deepseek.planner.hardware import Efficiency
from deepseek.planner.published import Reading, measured_rate, read_row
from deepseek.planner.step_time import predict


class Known:
    """A row with its throughput."""

    def __init__(self, row: dict[str, object], reading: Reading, rate: float) -> None:
        self.name, self.reading, self.rate = str(row["name"]), reading, rate
        job = reading.job
        self.program = job.system.name
        self.group = (self.program, reading.device.name, str(row["model"]), job.precision)
        self.keys = {
            "program": self.program,
            "gpu": reading.device.name,
            "release": f"{self.program} {job.system.release:.2f}",
            "model": str(row["model"]),
            "layout": f"{reading.device.name} {job.ranks}",
        }

    def error(self, efficiency: Efficiency) -> float:
        """Logarithm of predicted over measured step time."""
        reading = self.reading
        step = predict(reading.job, reading.device, reading.convention, efficiency)
        return math.log(self.rate / step.tokens_per_s_per_gpu)


def known_rows(path: Path) -> list[Known]:
    """Rows with a layout and a throughput."""
    found = []
    for row in json.loads(path.read_text()):
        try:
            reading = read_row(row)
        except UserError:
            continue
        rate = measured_rate(row)
        if rate and not any(a.startswith(("tp", "pp", "ep", "gpus")) for a in reading.assumed):
            found.append(Known(row, reading, rate))
    return found


def loss(rows: Sequence[Known], efficiency: Efficiency) -> float:
    """Mean squared error, groups weighing the same; and a pull towards the first guess."""
    groups: dict[object, list[float]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row.error(efficiency) ** 2)
    fit = sum(sum(g) / len(g) for g in groups.values()) / len(groups)
    first = astuple(Efficiency())
    pull = sum(math.log(a / b) ** 2 for a, b in zip(astuple(efficiency), first, strict=True))
    return fit + 0.001 * pull


def fitted(rows: Sequence[Known]) -> Efficiency:
    """The constants with the least loss, by Nelder and Mead's method on their logarithms."""

    def at(point: Sequence[float]) -> float:
        return loss(rows, Efficiency(*map(math.exp, point)))

    return Efficiency(*map(math.exp, _least(at, [math.log(x) for x in astuple(Efficiency())])))


def _least(
    function: Callable[[Sequence[float]], float], start: list[float], steps: int = 130
) -> list[float]:
    size = len(start)
    corners = [start] + [
        [x + (0.15 if i == j else 0.0) for j, x in enumerate(start)] for i in range(size)
    ]
    ranked = sorted((function(c), c) for c in corners)
    for _ in range(steps):
        worst = ranked[-1]
        centre = [sum(c[j] for _, c in ranked[:-1]) / size for j in range(size)]

        def moved(by: float) -> tuple[float, list[float]]:
            point = [m + by * (m - w) for m, w in zip(centre, worst[1], strict=True)]  # noqa: B023
            return function(point), point

        found = moved(1.0)
        if found < ranked[0]:
            found = min(found, moved(2.0))
        elif found >= ranked[-2]:
            found = min(moved(0.5), moved(-0.5))
        if found < worst:
            ranked[-1] = found
        else:
            best = ranked[0][1]
            shrunk = [[(a + b) / 2 for a, b in zip(best, c, strict=True)] for _, c in ranked[1:]]
            ranked[1:] = [(function(c), c) for c in shrunk]
        ranked.sort()
    return ranked[0][1]


def main() -> None:
    """Fit, leave out, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--leave", action="append", default=[])
    options = parser.parse_args()
    rows = known_rows(options.file)
    best = fitted(rows)
    print({f.name: round(v, 6) for f, v in zip(fields(best), astuple(best), strict=True)})
    told("all rows fitted", [(row, math.exp(row.error(best)) - 1) for row in rows])
    for kind in options.leave or ["program"]:
        errors = []
        for key in sorted({row.keys[kind] for row in rows}):
            kept = fitted([row for row in rows if row.keys[kind] != key])
            left = [(r, math.exp(r.error(kept)) - 1) for r in rows if r.keys[kind] == key]
            told(f"  without {kind} {key}", left, short=True)
            errors += left
        told(f"leave one {kind} out", errors)


def told(what: str, errors: list[tuple[Known, float]], short: bool = False) -> None:
    """Print mean and worst, and every row unless it is short."""
    sizes = [abs(error) for _, error in errors]
    print(f"{what}: {len(errors)} rows, mean {sum(sizes) / len(sizes):.1%}, worst {max(sizes):.1%}")
    for row, error in [] if short else errors:
        print(f"    {error:+7.1%} {row.name}")


if __name__ == "__main__":
    guarded(main)
