"""What each change of the training step on CPUs is worth: the step without it, beside the step.

    python benchmarks/ablations.py              S, F, 4,096 tokens, a small model: under an hour
    python benchmarks/ablations.py --cases F --only "kernel of AdamW" "kept memory"

One thing at a time goes back to its twin, PyTorch's way. Steps with everything and steps without
something take turns in one process: of two processes that do the same one may be slower by some
percent all along, by where its memory lies. ``times`` is how often as long a step takes without,
the median over rounds, in seconds and in CPU seconds. ``GiB`` is the most that is resident besides
imports, weights, gradients and moments, of the step and without, in processes of their own; what is
decided when a process starts is timed there, too (``--part processes``). A kernel that a fused node
calls can't be missed there: the node is then off on both sides, which is told behind it.
``benchmarks/results.json`` keeps what is printed. Losses are the same, or it is an error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import variants
from cases import CASES, SHAKESPEARE, Case, chosen
from results import RESULTS, conditions, keep, results_file, whole
from sides import Call, our_step

from deepseek.commands.entry import guarded
from deepseek.ops.cross_entropy import linear_cross_entropy_slow
from deepseek.ops.native import build
from deepseek.parallel.cpu_memory import keep_freed_memory

EVERYTHING = "everything"


def nothing(*_: Any) -> None:
    """Stands for a node that does not take what it is given, or a setting that is not made."""


@dataclass(frozen=True)
class Ablation:
    """What goes back to PyTorch's way."""

    kernels: tuple[str, ...] = ()
    """That are not there."""
    replaced: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """By its name, what stands for what."""
    beside: tuple[str, ...] = ()
    """Other ablations that both sides have: nodes that could not do without."""
    at_start: bool = False
    """A step can't be without it when its process, or its first step, was with it."""


_COMPONENTS = "deepseek.models.components"
ATTENTION, FEED_FORWARD, EXPERTS, ROUTER, MIXTURE = (
    f"node of {name}"
    for name in ("attention", "feed-forward", "experts", "the router", "the mixture")
)
ABLATIONS = {
    "all kernels": Ablation(
        replaced={"deepseek.ops.native.build._library": lambda: "switched off"}
    ),
    ATTENTION: Ablation(replaced={f"{_COMPONENTS}.attention.attention_node": nothing}),
    "kernel of attention": Ablation(("attention", "attention_backward"), beside=(ATTENTION,)),
    "kernel of rotations": Ablation(("turn_heads",), beside=(ATTENTION,)),
    MIXTURE: Ablation(replaced={f"{_COMPONENTS}.moe.moe_node": nothing}),
    FEED_FORWARD: Ablation(
        replaced={f"{_COMPONENTS}.feed_forward.feed_forward_node": nothing}, beside=(MIXTURE,)
    ),
    EXPERTS: Ablation(
        replaced={f"{_COMPONENTS}.moe.grouped_feed_forward": nothing}, beside=(MIXTURE,)
    ),
    "kernel of SwiGLU": Ablation(
        ("swiglu", "swiglu_backward"), beside=(FEED_FORWARD, EXPERTS, MIXTURE)
    ),
    "kernels of grouped products": Ablation(
        ("grouped_linear", "grouped_linear_back", "grouped_outer"), beside=(EXPERTS, MIXTURE)
    ),
    "kernels of rows": Ablation(("sort_rows", "take_rows", "add_rows")),
    ROUTER: Ablation(replaced={f"{_COMPONENTS}.moe.router_node": nothing}, beside=(MIXTURE,)),
    "kernels of the router": Ablation(
        (
            *("largest_places", "weigh_experts", "weigh_experts_backward"),
            *("sequence_sums", "sequence_sums_backward", "count_experts", "balance_loss"),
        ),
        beside=(ROUTER, MIXTURE),
    ),
    "kernel of norms": Ablation(("rms_norm", "rms_norm_backward")),
    "head in chunks": Ablation(
        replaced={"deepseek.models.transformer.linear_cross_entropy": linear_cross_entropy_slow}
    ),
    "kernel of the head's softmax": Ablation(("softmax_loss",)),
    "kernel of AdamW": Ablation(("adamw",)),
    "kernel of the gradients' norm": Ablation(("sums_of_squares",)),
    "moments made first": Ablation(
        replaced={"deepseek.training.step.make_room": nothing}, at_start=True
    ),
    "rooms of gradients": Ablation(
        replaced={f"{_COMPONENTS}.moe.GroupedExperts.make_gradient_rooms": nothing}, at_start=True
    ),
    "kept memory": Ablation(
        replaced={"deepseek.parallel.cpu_memory.keep_freed_memory": nothing}, at_start=True
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Print tables for each case, keep them as JSON."""
    cases = [case for case in CASES if not case.decodes]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[], help="that begin so", metavar="WORDS")
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=whole, default=3)
    parser.add_argument("--output", type=results_file, default=str(RESULTS))
    args = parser.parse_args(arguments)
    try:
        asked = chosen([*cases, SHAKESPEARE], args.cases or ["S", "F", "sequence", "characters"])
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    for case in asked:
        for part in args.part or PARTS:
            told = conditions()
            print(f"{case.name}: {told['machine']}, {args.threads} threads, load {told['load']}")
            for name, found in PARTS[part](case, args.only, args.threads, args.rounds):
                found |= {"beside": list(ABLATIONS[name].beside)}
                show(name, found)
                keep(args.output, "ablations", case.name, told | {part: {name: found}})
    print(f"kept in {args.output}")


Found = Iterator[tuple[str, dict[str, Any]]]


def in_one_process(case: Case, names: list[str], threads: int, rounds: int) -> Found:
    """Times of what a step can be without."""
    names = [name for name in names if not ABLATIONS[name].at_start]
    if not names:
        return
    with variants.process("all steps", case, _timed, names, threads, rounds) as ask:
        yield from ask("the ratios").items()


def _timed(pipe: Connection, case: Case, names: list[str], threads: int, rounds: int) -> None:
    """Two ablations at a time have a step with everything before them; the first round warms up."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    step = our_step(case)
    found: dict[str, list[tuple[Taken, Taken]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for beside, mine in by_beside(names):
            for pair in batched(mine, 2):
                whole = taken(step, case, *beside)
                for name in pair:
                    found[name].append((taken(step, case, name, *beside), whole))
    assert torch.get_num_threads() == threads, "a library has changed the number of threads"
    pipe.send({name: ratios(pairs[1:]) for name, pairs in found.items()})


def in_own_processes(case: Case, names: list[str], threads: int, rounds: int) -> Found:
    """Memory, one process after the other, since of large models few fit at once; and times of what
    is decided when a process starts, beside one with everything."""
    for beside, mine in by_beside(names):

        def way(*without: str, beside: tuple[str, ...] = beside) -> tuple[Case, variants.Prepare]:
            return case, partial(switch, *without, *beside)

        plain = {name: way(name) for name in mine if not ABLATIONS[name].at_start}
        if plain:
            runs = variants.one_by_one({EVERYTHING: way()} | plain, threads)
            for name in plain:
                yield name, variants.memory(runs[EVERYTHING], runs[name])
        for name in mine:
            if name not in plain:
                both = variants.in_turn({EVERYTHING: way(), name: way(name)}, threads, rounds)
                whole, without = both.values()
                seconds = [[(r.seconds, r.cpu_seconds) for r in runs] for runs in (without, whole)]
                times = ratios(list(zip(*seconds, strict=True)))
                yield name, variants.memory(whole, without) | times


PARTS = {"steps": in_one_process, "processes": in_own_processes}
Taken = tuple[float, float]
"""Seconds, and CPU seconds."""


def taken(step: Call, case: Case, *names: str) -> Taken:
    """By one step without these."""
    with switched(*names):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for _ in range(case.repeats):
            step()
        ended = time.perf_counter() - begin, time.process_time() - cpu_begin
    return ended[0] / case.repeats, ended[1] / case.repeats


def ratios(pairs: list[tuple[Taken, Taken]]) -> dict[str, Any]:
    """Medians of steps without and with, and of their ratios."""
    (without, whole), names = zip(*pairs, strict=True), ("", "cpu_")
    found = {}
    for place, name in enumerate(names):
        found[f"{name}seconds"] = round(statistics.median(a[place] for a in without), 4)
        found[f"{name}with"] = round(statistics.median(b[place] for b in whole), 4)
        each = (a[place] / b[place] for a, b in pairs)
        found[f"{name}times"] = round(statistics.median(each), 3)
    return found


def by_beside(names: list[str]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Those that have the same beside them."""
    return [
        (beside, [name for name in names if ABLATIONS[name].beside == beside])
        for beside in dict.fromkeys(ABLATIONS[name].beside for name in names)
    ]


def batched(names: list[str], size: int) -> Iterator[list[str]]:
    """So many at a time."""
    return (names[start : start + size] for start in range(0, len(names), size))


def show(name: str, row: dict[str, Any]) -> None:
    """One line."""
    said = [f"without {name:<30}"]
    if "times" in row:
        said += [f"{row['seconds']:.3f} s, {row['times']:.3f} times as long"]
        said += [f"CPU {row['cpu_seconds']:.3f} s, {row['cpu_times']:.3f} times"]
    if "gib" in row:
        said += [f"{row['with_gib']:.2f} to {row['gib']:.2f} GiB"]
    if row["beside"]:
        said += [f"both without {', '.join(row['beside'])}"]
    print("; ".join(said), flush=True)


def switch(*names: str) -> None:
    """Switch ablations on in this process, to its end."""
    _STAY.enter_context(switched(*names))


_STAY = ExitStack()


@contextmanager
def switched(*names: str) -> Iterator[None]:
    """Inside, ablations are on."""
    off = {kernel for name in names for kernel in ABLATIONS[name].kernels}
    find = build.function

    def function(name: str, arguments: str) -> Callable[..., None] | None:
        return None if name in off else find(name, arguments)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(build, "function", function))
        for name in names:
            for target, stands in ABLATIONS[name].replaced.items():
                stack.enter_context(mock.patch(target, stands))
        yield


if __name__ == "__main__":
    guarded(main)
