"""What 128 experts must take longer than 8, by the bytes of their states alone.

    python benchmarks/fine_experts.py [--rounds 9] [--threads 2]    half a minute

Both have four experts a token, and so the same multiplications; what 128 have more are parameters.
AdamW reads 16 bytes of each, weight, gradient and two moments: in a pass of its own, since the norm
of all gradients must be known before the first weight changes. That, at the rate at which this
machine reads, is the least that a step of 128 takes longer. What AdamW writes comes on
top, as far as it does not travel beside what is read, and so do the weights that products read and
the gradients that they write, as far as these do not beside multiplications. Steps of both take
turns in one process, and the ratio is the median of the rounds' own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import CASES
from results import whole
from sides import CPU, our_step

from deepseek.commands.entry import guarded
from deepseek.config.cost import count_parameters
from deepseek.ops.squares import square_sums
from deepseek.parallel.cpu_memory import keep_freed_memory

READ_BYTES = 16
"""Of a parameter, by AdamW. Squares for the norm are taken when gradients are written."""
NUMBERS = 1 << 27
"""Of the tensor whose reading is timed: half a GiB, more than caches hold."""


def main(arguments: list[str] | None = None) -> None:
    """Print the ratio, the least difference and what it leaves of the ratio; the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole, default=9)
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    few, many = (case for case in CASES if case.group == "experts")
    steps = [our_step(case) for case in (few, many)]
    x = torch.ones(NUMBERS)
    rounds = [[seconds(run) for run in (*steps, lambda: read(x))] for _ in range(args.rounds + 1)]
    more = count_parameters(many.model).trained - count_parameters(few.model).trained
    found = told(rounds[1:], more, x.nbytes)
    print(
        f"{few.name} {found['few_ms']:,.1f} ms, {many.name} {found['many_ms']:,.1f} ms: "
        f"{found['ratio']:.2f} of the speed, at most {found['bound']:.2f}\n"
        f"{more / 1e6:,.1f} million parameters more, {READ_BYTES} bytes of each at "
        f"{found['gb_per_s']:.1f} GB/s: {found['least_ms']:,.1f} of {found['more_ms']:,.1f} ms more"
    )
    print(json.dumps(found))


def told(rounds: list[list[float]], more: int, bytes_: int) -> dict[str, Any]:
    """What seconds tell: of few experts, of many and of reading so many bytes, by rounds."""
    few, many, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
    rate = bytes_ / min(seconds for *_, seconds in rounds)
    least = READ_BYTES * more / rate
    return {
        "few_ms": round(1e3 * few, 1),
        "many_ms": round(1e3 * many, 1),
        "ratio": round(statistics.median(a / b for a, b, _ in rounds), 3),
        "gb_per_s": round(rate / 1e9, 1),
        "least_ms": round(1e3 * least, 1),
        "more_ms": round(1e3 * (many - few), 1),
        "bound": round(few / (few + least), 3),
    }


def seconds(run: Callable[[], object]) -> float:
    """That one call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def read(x: torch.Tensor) -> None:
    """By the kernel of the gradients' norm, which only reads."""
    square_sums([[(x.view(-1, 512), 1)]], CPU)


if __name__ == "__main__":
    guarded(main)
