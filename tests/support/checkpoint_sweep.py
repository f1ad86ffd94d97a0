"""Checkpoints between random pairs of layouts, and along longer chains of them.

    python -m support.checkpoint_sweep --pairs 30 --chains 5 --seed 0

A line per chain. Ends with 1 if one fails or its losses differ from those of one uninterrupted
process by more than is allowed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from support.chains import draw_chains, worst_of_chain
from support.ranks import RankFailed

ALLOWED = 1e-10


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--chains", type=int, default=5, help="of three layouts")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    drawn = draw_chains(asked.pairs, 2, asked.seed) + draw_chains(asked.chains, 3, asked.seed)
    worst, failed = (0.0, "nothing"), 0
    for number, chain in enumerate(drawn):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            try:
                error, what = worst_of_chain(chain, Path(name))
            except (RankFailed, AssertionError) as failure:
                failed += 1
                print(f"{number:3d} FAILED   {chain}\n{failure}", flush=True)
                continue
        failed += not error <= ALLOWED
        worst = max(worst, (error, f"{what}: {chain}"))
        word = "ok" if error <= ALLOWED else "TOO FAR"
        took = time.perf_counter() - began
        print(f"{number:3d} {word} {took:5.1f} s {error:.1e} {what}: {chain}", flush=True)
    print(f"{len(drawn)} chains, {failed} failed, worst {worst[0]:.1e} {worst[1]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
