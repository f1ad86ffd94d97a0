"""Where a training step's time goes, by component, and how near each comes to its limit.

    python benchmarks/breakdown.py "S: 32 wide experts" [--threads 2]

Steps of a case of ``train_step.py``, in fp32 on a CPU, after some that warm up, under torch's
profiler: what an operator or a kernel takes is counted once, for its component. The kernels must be
there (``deepseek doctor``): they are what tells the components apart. ``of limit`` is the time that
a limit allows over the time that was taken. The limit of products is the rate of a large square
one, that of AdamW and of the gradients' norm what memory gives to an addition in place of two large
tensors, both timed here with as many threads; what has few products and few bytes has none. ``of
own`` is the time of torch's own products in the shapes of the step (``products.py``) over the time
that was taken; steps and these take turns, and it is the median of their ratios. Of the whole step
both are shares of the machine's rate: what its products alone would take over what it took. The
table is for people, the last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import products
import torch
from cases import CASES, QUICK, Case
from results import whole as at_least_one
from sides import our_step
from torch.profiler import ProfilerActivity, profile, record_function
from train_step import product_rate

from deepseek.commands.entry import guarded
from deepseek.config.cost import count_parameters, flops_per_token
from deepseek.config.schema import ModelConfig
from deepseek.ops.native import build
from deepseek.parallel.cpu_memory import keep_freed_memory

WARM, STEPS = 2, 3
NORM = "norm of gradients"
COMPONENTS = {
    products.DENSE: ("aten::mm", "aten::addmm", "aten::bmm", "dense_linear"),
    products.EXPERTS: ("grouped_",),
    products.ATTENTION: ("attention",),
    "AdamW": ("adamw", "Optimizer.step"),
    NORM: ("sums_of_squares",),
    "softmax of the head": ("softmax_loss",),
    "rows to and from experts": ("take_", "add_rows", "spread_", "sort_", "row_starts", "align_"),
    "norms, SwiGLU, heads": ("rms_norm", "swiglu", "turn_heads", "lay_keys"),
    "router": ("largest_places", "weigh_experts", "sequence_sums", "count_experts", "balance_loss"),
}
"""By how names of kernels and operators begin; the head's products are among the dense ones."""
REST = "rest"
"""Additions, gradients that are added up, Python."""
WHOLE = "the whole step"
SHARES = "of_limit", "of_own"
ADAMW_BYTES, NORM_BYTES = 28, 4
"""Of a parameter: weight, gradient and two moments are read, all but the gradient written. The norm
reads gradients, but for those of routed experts, whose squares are taken when they are written."""


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {case.name: case for case in CASES + QUICK if not case.decodes}
    parser.add_argument("case", choices=cases)
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    case = cases[args.case]
    before = product_rate(torch.float32), memory_rate()
    steps, own = taken(case)
    after = product_rate(torch.float32), memory_rate()
    flops, bytes_ = map(max, before, after)  # a machine's rates drift
    rows = told(steps, own, limits(case, args.threads * flops, bytes_))
    print(f"{case.name}: a step of {rows[WHOLE]['ms']:,.0f} ms, {args.threads} threads")
    for name, row in rows.items():
        of_limit, of_own = (
            "     -" if row[share] is None else f"{row[share]:6.2f}" for share in SHARES
        )
        print(
            f"  {name:<26}{row['ms']:>9,.1f} ms {row['share']:6.1%} of limit {of_limit} "
            f"of own {of_own}"
        )
    print(json.dumps(rows))


Seconds = dict[str, float]
"""Of each component, and of the whole step."""


def told(steps: list[Seconds], own: list[Seconds], least: Seconds) -> dict[str, dict[str, Any]]:
    """A row for each component: medians of the steps and of their ratios.

    Args:
        own: of the library's products, as many as steps.
        least: what the limits allow.
    """
    whole, rows = statistics.median(step[WHOLE] for step in steps), {}
    for name in steps[0]:
        took = statistics.median(step[name] for step in steps)
        of_own = [
            mine[name] / step[name] for mine, step in zip(own, steps, strict=True) if name in mine
        ]
        rows[name] = {
            "ms": round(1e3 * took, 1),
            "share": round(took / whole, 3),
            "of_limit": round(least[name] / took, 2) if name in least else None,
            "of_own": round(statistics.median(of_own), 2) if of_own else None,
        }
    return rows


def taken(case: Case) -> tuple[list[Seconds], list[Seconds]]:
    """Of some steps, and before each of them of the library's products."""
    assert build.why_not() is None, build.why_not()
    counts: list[list[int]] = []
    build.function = spans(build.function, counts)
    step = our_step(case)
    for _ in range(WARM):
        step()
    steps, own = [], []
    for _ in range(STEPS):
        shapes = products.of_step(case, counts[-case.model.num_moe_layers :])
        mine = products.seconds(shapes, torch.float32, time.perf_counter)
        own.append(mine | {WHOLE: sum(mine.values())})
        steps.append(profiled(step))
    return steps, own


def profiled(step: Callable[[], Any]) -> Seconds:
    """What a step takes."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begin = time.perf_counter()
        step()
        whole = time.perf_counter() - begin
    seconds = dict.fromkeys(COMPONENTS, 0.0)
    for event in seen.key_averages():
        for name, starts in COMPONENTS.items():
            if event.key.startswith(starts):
                seconds[name] += event.self_cpu_time_total / 1e6
    missing = [name for name, took in seconds.items() if not took]
    assert not missing, f"no span begins as these do: {missing}"
    return seconds | {REST: whole - sum(seconds.values()), WHOLE: whole}


def spans(find: Callable[..., Any], counts: list[list[int]]) -> Callable[..., Any]:
    """What finds kernels, each of whose calls is a span of the profile.

    Args:
        counts: rows of each expert are added to it, whenever rows are sorted.
    """

    @cache
    def found(name: str, arguments: str) -> Callable[..., None]:
        run = find(name, arguments)

        def recorded(*given: Any) -> None:
            with record_function(name):
                run(*given)
            if name == "sort_rows":
                counts.append(given[2].tolist())

        return recorded

    return found


def limits(case: Case, flops: float, bytes_: float) -> Seconds:
    """The least seconds of what has a limit, at so many FLOP and bytes a second; of the whole step
    those of its products."""
    model, tokens = case.model, case.batch * case.length
    needed = tokens * flops_per_token(model, case.length, False)
    experts, scores = tokens * expert_flops(model), tokens * score_flops(model, case.length)
    parameters = count_parameters(model).trained
    return {
        products.DENSE: (needed - experts - scores) / flops,
        products.EXPERTS: experts / flops,
        products.ATTENTION: scores / flops,
        "AdamW": ADAMW_BYTES * parameters / bytes_,
        NORM: NORM_BYTES * (parameters - expert_parameters(model)) / bytes_,
        WHOLE: needed / flops,
    }


def expert_flops(model: ModelConfig) -> float:
    """Of a token, forward and backward, in its routed experts."""
    return 6.0 * expert_parameters(model) * model.num_experts_per_tok / model.n_routed_experts


def expert_parameters(model: ModelConfig) -> int:
    """Of all routed experts; the cases have no MTP module."""
    matrices = 3 * model.hidden_size * model.moe_intermediate_size
    return model.num_moe_layers * model.n_routed_experts * matrices


def score_flops(model: ModelConfig, length: int) -> float:
    """Of a token, forward and backward, of causal scores and of the sum they weigh."""
    widths = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    return 3.0 * model.num_hidden_layers * model.num_attention_heads * widths * length


def memory_rate() -> float:
    """Bytes a second of an addition in place, as AdamW's updates are: two tensors are read, one is
    written. What is written elsewhere would be read, too."""
    a, b = torch.ones(2, 1 << 24).unbind()
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        a.add_(b)
        best = min(best, time.perf_counter() - begin)
    return 3 * a.nbytes / best


if __name__ == "__main__":
    guarded(main)
