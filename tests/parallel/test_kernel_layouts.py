"""Two ranks in fp32, by the kernels of a training step on CPUs, compute what one process computes.

Layouts are compared in fp64 elsewhere, which has no kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from deepseek.config.schema import DataConfig, OptimConfig, SchedConfig
from deepseek.ops.native import build
from support.draw import ADAM_EPS, WEIGHTS
from support.kernels import kernels_asked_for
from support.layouts import Case, errors_of, in_one_process, small_config, work_of_rank
from support.ranks import run_ranks

ROUNDING = 5e-6
"""Relative, of each tensor as a whole; the largest that is found is a fifth of it."""
SPLIT = {"pipeline_schedule": "ZBVZeroBubble", "num_hidden_layers": 4, "moe_z_loss_coeff": 0.0}
"""Gradients of inputs and of weights are computed apart, and a router is one node of the graph."""
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tensor_model_parallel_size": 2},
    {"expert_model_parallel_size": 2},
    {"context_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, **SPLIT},
)
EACH = {"rms_norm_backward", "swiglu_backward", "grouped_outer", "sums_of_squares", "adamw"}
"""Kernels of every layout. Some are for what not all have: under tensor parallelism the vocabulary
is in parts, and queries that do not begin their sequence meet its keys in blocks."""


def case_of(layout: dict[str, Any]) -> Case:
    """Widths and lengths that fill no vector and no tile; one micro-batch of a rank has weights'
    gradients added to those of another."""
    sched = SchedConfig(min_lr=1e-3)
    sizes: dict[str, Any] = dict(
        hidden_size=24,
        moe_intermediate_size=20,
        num_hidden_layers=2,
        global_batch_size=4,
        initializer_range=WEIGHTS[torch.float32],
        optim=OptimConfig(lr=1e-2, eps=ADAM_EPS[torch.float32], sched=sched),
        data=DataConfig(seq_length=20),
    )
    case = Case(small_config(**sizes | layout), 2, torch.float32, seed=1)
    assert case.problems() == []
    return case


def worked(rank: int, cases: list[Case]) -> list[tuple[Any, set[str]]]:
    """Of each case what it has come to on this rank, and the kernels it took."""
    found = []
    for case in cases:
        with kernels_asked_for() as names:
            (result,) = work_of_rank(rank, [case])
        found.append((result, names))
    return found


def test_two_ranks_by_kernels() -> None:
    """Losses, gradients, weights and AdamW's moments after two steps."""
    cases = [case_of(layout) for layout in LAYOUTS]
    with kernels_asked_for() as alone:
        for case in cases:
            in_one_process(case)
    assert build.why_not() is None
    by_case = [*zip(*run_ranks(2, worked, cases), strict=True)]
    for case, ranks in zip(cases, by_case, strict=True):
        assert all(names >= EACH for _, names in ranks), str(case)
        errors = errors_of(case, tuple(result for result, _ in ranks))
        too_far = {name: error for name, error in errors.items() if not error <= ROUNDING}
        assert not too_far, str(case)
        assert {"loss", "all.gradient", "all.weight", "all.exp_avg_sq"} <= errors.keys()
    assert alone <= {name for ranks in by_case for _, names in ranks for name in names}
