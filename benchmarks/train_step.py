"""Training steps and decoding beside what others train DeepSeek-V3 with, same weights: a table.

    make bench                                  all of it; under 15 minutes on two free cores
    python benchmarks/train_step.py --cases S F "decode, batch 8" --rounds 3
    python benchmarks/train_step.py --quick     one small model; a minute
    python benchmarks/train_step.py --decoding  decoding alone, with more lengths of context
    python benchmarks/train_step.py --device cuda

Each side runs in a process of its own, so that its allocator setting and its peak memory are its
own, and they take turns, A B A B ..., so that a machine whose speed drifts slows all alike; the
figure is the median of the ratios, round by round. Hugging Face transformers runs as it is best on
a CPU: grouped_mm experts and SDPA attention; ``shipped`` leaves the C library's allocator as it is,
``tuned`` gives it the setting that we make for ourselves. ``automodel`` is NVIDIA's AutoModel in
NeMo's environment (``make .venv-nemo/.ready``), tuned, with its fastest experts, in one case. What
is not installed is told, and left out. torchtitan (0.3.0, beside torch 2.13) has no training step
on a CPU: it refuses SDPA ("no longer supported for language models"), varlen attention has no
kernel there, FlexAttention "does not support backward on CPU", and its experts multiply in bf16
alone; ``make gpu-check`` has it on a GPU.

A whole step is timed: forward, backward, global norm, clipping, AdamW. 8 and 128 experts take turns
with each other, too: ``speed of the first`` is of one run. bf16 is left out where its products are
slower than those of fp32. ``benchmarks/results.json`` keeps what is printed, case by case, with the
machine, its load and its rates of products in the same run, and where our steps' time goes
(``breakdown.py``).

Two shares of a rate are given, both in CPU time: ``share`` is of a large square product, ``own`` of
torch's own products in the shapes of the step, under balanced routing (``products.py``). Memory is
the most that was resident within a run, ours / theirs. ``besides`` is that ratio without what both
must have: what was resident before the model was made, and weights, gradients and AdamW's moments,
16 bytes a parameter. What is left are activations, room that kernels work in, and freed memory in
pieces that nothing fits in.

On a GPU it is the same code: memory is what torch's allocator has given out, there is one setting
of it, steps end when the device is done, bf16 comes second, and shares are not told. **No GPU has
run it yet.**
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import products
import torch
from cases import CASES, DECODING, QUICK, Case, chosen
from results import RESULTS, conditions, keep, results_file, whole
from sides import ROOT, Run, left_out, worker

from deepseek.commands.entry import guarded
from deepseek.config.cost import flops_per_token
from deepseek.config.errors import UserError

HF = ("shipped", "tuned")
"""Settings of transformers, which is beside us in every case."""
SHARES = ("share_of_rate", "share_of_own_rate", "besides")


def main(arguments: list[str] | None = None) -> None:
    """Print the table, keep it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small model, two rounds")
    parser.add_argument("--decoding", action="store_true", help="decoding at more lengths")
    parser.add_argument("--cases", nargs="+", default=[], help="that begin so", metavar="WORDS")
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=whole)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=results_file, default=str(RESULTS))
    args = parser.parse_args(arguments)
    try:
        asked = chosen(QUICK if args.quick else DECODING if args.decoding else CASES, args.cases)
    except ValueError as error:
        parser.error(str(error))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    torch.set_num_threads(args.threads)
    rounds, on_cpu = args.rounds or (2 if args.quick else 5), args.device == "cpu"
    rates = {dtype: product_rate(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    dtypes = [d for d, rate in rates.items() if not on_cpu or rate >= rates["float32"]]
    without, told = left_out(), conditions(args.device)
    if set(HF) <= set(without):
        parser.error(f"nobody to compare with: {without[HF[0]]}")
    gflops = {dtype: round(rate / 1e9, 1) for dtype, rate in rates.items()}
    print(f"{told['machine']}: {args.threads} threads, GFLOP in a CPU second {gflops}")
    for peer, why in without.items():
        print(f"{peer} is left out: {why}")
    if len(dtypes) == 1:
        print("bf16 is left out: its products are slower here than those of fp32")
    print(
        f"{'case':<20} {'dtype':<9} {'peer':<9} {'ours':>9} {'theirs':>9}"
        "  times  share    own besides load memory"
    )
    own: dict[tuple[str, str], float] = {}  # seconds
    for _, members in groupby(asked, key=lambda case: case.group or case.name):
        group = list(members)
        told, rows = conditions(args.device), dict[str, list[Any]]()
        for case, row in measure(group, dtypes, args.threads, rounds, args.device, without):
            if not case.decodes and on_cpu:
                flops = case.tokens * flops_per_token(case.model, case.length, False)
                dtype, rate = row["dtype"], flops / row["ours_cpu_s"]
                # The machine's rate drifts; the best that it was seen at is no less than a step's.
                rates[dtype] = max(rates[dtype], product_rate(getattr(torch, dtype)))
                if (case.name, dtype) not in own:
                    took = products.seconds(
                        products.of_step(case), getattr(torch, dtype), time.process_time
                    )
                    own[case.name, dtype] = sum(took.values())
                row["share_of_rate"] = round(rate / rates[dtype], 3)
                row["share_of_own_rate"] = round(own[case.name, dtype] / row["ours_cpu_s"], 3)
            rows.setdefault(case.name, []).append(row)
            show(case, row)
        gflops = {dtype: round(rate / 1e9, 1) for dtype, rate in rates.items()}
        for case in group:
            found = told | {"gflops": gflops, "left_out": without, "rows": rows[case.name]}
            if case.apart and on_cpu:
                found["breakdown"] = breakdown(case, args.threads)
            keep(args.output, f"train_step {args.device}", case.name, found)
    print(f"kept in {args.output}")


def breakdown(case: Case, threads: int) -> Any:
    """Printed, and as it is kept: one step of ours, by what takes the time."""
    command = [sys.executable, ROOT / "benchmarks/breakdown.py", case.name]
    # Of Ctrl-C it need not know: it ends with this process's wait.
    done = subprocess.run(
        [*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True, process_group=0
    )
    if done.returncode:
        raise UserError(f"{case.name}: the breakdown failed; what it said is above")
    *table, found = done.stdout.splitlines()
    print("\n".join(table), flush=True)
    return json.loads(found)


def show(case: Case, row: dict[str, Any]) -> None:
    """One line; tokens a second, shares of the rates of products and of the peer's memory besides
    states, the load, peak memory ours / theirs. A second one beside the group's first case."""
    shares = [f"{row[s]:6.2f}" if s in row else "     -" for s in SHARES]
    print(
        f"{case.name:<20} {row['dtype']:<9} {row['peer']:<9} {row['ours_tok_s']:>9,.1f} "
        f"{row['theirs_tok_s']:>9,.1f} {row['times_faster']:6.2f} {' '.join(shares)}  "
        f"{row['load']:4.1f} {row['ours_peak_gib']:.2f} / {row['theirs_peak_gib']:.2f} GiB",
        flush=True,
    )
    if "ours_of_first" in row:
        print(
            f"{'':<20} speed of the first: ours {row['ours_of_first']:.3f}, "
            f"theirs {row['theirs_of_first']:.3f}",
            flush=True,
        )


def measure(
    group: list[Case],
    dtypes: list[str],
    threads: int,
    rounds: int,
    device: str,
    left_out: Container[str],
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Both sides of all cases of a group in turn, in fp32 and where asked in bf16, against each
    peer.

    All begin anew for each peer, whose memory and ours then hold the same history. Decoding has one
    peer, in fp32: it allocates little.
    """
    first = group[0]
    hf = HF[1:] if first in QUICK or first.decodes or device != "cpu" else HF
    for peer in [*hf, *(other for other in first.peers if other not in left_out)]:
        with ExitStack() as stack:
            sides = [
                (case, side, stack.enter_context(worker(side, case, threads, device)))
                for case in group
                for side in ("ours", peer)
            ]
            for dtype in dtypes if first.half and peer in hf else dtypes[:1]:
                turns = [[run(dtype == "bfloat16") for *_, run in sides] for _ in range(rounds + 1)]
                ours, theirs = (
                    list(zip(*(t[side::2] for t in turns[1:]), strict=True)) for side in (0, 1)
                )
                for case, mine, others in zip(group, ours, theirs, strict=True):
                    row = compared(case, dtype, peer, mine, others)
                    if case is not first:
                        row["ours_of_first"] = times(ours[0], mine)
                        row["theirs_of_first"] = times(theirs[0], others)
                    yield case, row


def compared(
    case: Case, dtype: str, peer: str, ours: tuple[Run, ...], theirs: tuple[Run, ...]
) -> dict[str, Any]:
    """A row of the table."""
    found: dict[str, Any] = {"dtype": dtype, "peer": peer} | {
        name: conditions()[name] for name in ("threads", "load")
    }
    for name, runs in (("ours", ours), ("theirs", theirs)):
        seconds = statistics.median(run.seconds for run in runs)
        found[f"{name}_tok_s"] = round(case.tokens / seconds, 2)
        found[f"{name}_cpu_s"] = round(statistics.median(run.cpu_seconds for run in runs), 4)
        found[f"{name}_peak_gib"] = round(max(run.peak_bytes for run in runs) / 2**30, 3)
    found["times_faster"] = times(theirs, ours)
    found["times_faster_cpu"] = round(
        statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in zip(ours, theirs, strict=True)),
        3,
    )
    if not case.decodes:
        most = [max(run.besides_bytes for run in runs) for runs in (ours, theirs)]
        found |= {
            f"{name}_besides_gib": round(bytes_ / 2**30, 3)
            for name, bytes_ in zip(("ours", "theirs"), most, strict=True)
        }
        found["besides"] = round(most[0] / most[1], 3)
    mine, other = ours[0].first_loss, theirs[0].first_loss
    assert abs(mine - other) <= 1e-4 * abs(other), f"{case.name}: losses {mine} and {other}"
    return found


def times(slower: tuple[Run, ...], faster: tuple[Run, ...]) -> float:
    """How often as long the one takes: the median of the rounds' ratios."""
    ratios = (a.seconds / b.seconds for a, b in zip(slower, faster, strict=True))
    return round(statistics.median(ratios), 3)


def product_rate(dtype: torch.dtype) -> float:
    """FLOP of a large matrix product in a second of CPU time, the best of some."""
    x_SS = torch.ones(1024, 1024, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        begin = time.process_time()  # of all threads: what else runs here does not count
        torch.mm(x_SS, x_SS)
        best = min(best, time.process_time() - begin)
        if best > 1:  # bf16 on a CPU that has no such products
            break
    return 2 * 1024**3 / best


if __name__ == "__main__":
    guarded(main)
