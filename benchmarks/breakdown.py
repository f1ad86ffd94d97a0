"""Where a training step's time goes, by component, and how near each comes to its limit.

    python benchmarks/breakdown.py "S: 32 wide experts" [--threads 2]

Steps of a case of ``train_step.py``, in fp32 on a CPU, after some that warm up, under torch's
profiler: what an operator or a kernel takes is counted once, for its component. The kernels must be
there (``deepseek doctor``): they are what tells the components apart. The limit of products is the
rate of a large square one, that of AdamW and of the gradients' norm what memory gives to an
addition in place of two large tensors, both timed here with as many threads. ``of limit`` is the
time that these allow over the time that was taken; what has few products and few bytes has none.
The table is for people, the last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from cases import CASES, QUICK, Case
from sides import our_step
from torch.profiler import ProfilerActivity, profile, record_function
from train_step import product_rate

from deepseek.config.cost import count_parameters, flops_per_token
from deepseek.config.schema import ModelConfig
from deepseek.ops.native import build
from deepseek.parallel.cpu_memory import keep_freed_memory

WARM, STEPS = 2, 2
NORM = "norm of gradients"
COMPONENTS = {
    "dense products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "routed experts": ("grouped_",),
    "attention": ("attention",),
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
ADAMW_BYTES, NORM_BYTES = 28, 4
"""Of a parameter: weight, gradient and two moments are read, all but the gradient written."""


def main() -> None:
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {case.name: case for case in CASES + QUICK if not case.decodes}
    parser.add_argument("case", choices=cases)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    case = cases[args.case]
    before = product_rate(torch.float32), memory_rate()
    seconds, whole = taken(case)
    after = product_rate(torch.float32), memory_rate()
    flops, bytes_ = map(max, before, after)  # a machine's rates drift
    least = limits(case, args.threads * flops, bytes_)
    rows = {
        name: {
            "ms": round(1e3 * took, 1),
            "share": round(took / whole, 3),
            "of_limit": round(least[name] / took, 2) if name in least and took else None,
        }
        for name, took in seconds.items()
    }
    print(f"{case.name}: a step of {1e3 * whole:,.0f} ms, {args.threads} threads")
    for name, row in rows.items():
        of_limit = "     -" if row["of_limit"] is None else f"{row['of_limit']:6.2f}"
        print(f"  {name:<26}{row['ms']:>9,.1f} ms {row['share']:6.1%} of limit {of_limit}")
    print(json.dumps(rows))


def taken(case: Case) -> tuple[dict[str, float], float]:
    """Seconds of each component and of the whole, means of some steps."""
    assert build.why_not() is None, build.why_not()
    build.function = spans(build.function)
    step = our_step(case)
    for _ in range(WARM):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        begin = time.perf_counter()
        for _ in range(STEPS):
            step()
        whole = (time.perf_counter() - begin) / STEPS
    seconds = dict.fromkeys(COMPONENTS, 0.0)
    for event in profiled.key_averages():
        for name, starts in COMPONENTS.items():
            if event.key.startswith(starts):
                seconds[name] += event.self_cpu_time_total / 1e6 / STEPS
    missing = [name for name, took in seconds.items() if not took]
    assert not missing, f"no span begins as these do: {missing}"
    return seconds | {REST: whole - sum(seconds.values())}, whole


def spans(find: Callable[..., Any]) -> Callable[..., Any]:
    """What finds kernels, each of whose calls is a span of the profile."""

    @cache
    def found(name: str, arguments: str) -> Callable[..., None]:
        run = find(name, arguments)

        def recorded(*given: Any) -> None:
            with record_function(name):
                run(*given)

        return recorded

    return found


def limits(case: Case, flops: float, bytes_: float) -> dict[str, float]:
    """The least seconds of what has a limit, at so many FLOP and bytes a second."""
    model, tokens = case.model, case.batch * case.length
    products = tokens * flops_per_token(model, case.length, False)
    experts, scores = tokens * expert_flops(model), tokens * score_flops(model, case.length)
    parameters = count_parameters(model).trained
    return {
        "dense products": (products - experts - scores) / flops,
        "routed experts": experts / flops,
        "attention": scores / flops,
        "AdamW": ADAMW_BYTES * parameters / bytes_,
        NORM: NORM_BYTES * parameters / bytes_,
    }


def expert_flops(model: ModelConfig) -> float:
    """Of a token, forward and backward, in its routed experts."""
    layers = model.num_hidden_layers - model.first_k_dense_replace
    matrices = 3 * model.hidden_size * model.moe_intermediate_size
    return 6.0 * layers * model.num_experts_per_tok * matrices


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
    main()
