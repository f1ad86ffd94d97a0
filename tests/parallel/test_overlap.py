"""One computation goes on where the other waits, always in the same order."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch

from deepseek.parallel import overlap
from support.layouts import Case, batches, small_config, spread
from support.ranks import run_ranks

CPU = torch.device("cpu")


def test_the_order_does_not_depend_on_the_threads() -> None:
    seen: list[str] = []

    def steps(name: str, count: int) -> int:
        for number in range(count):
            assert overlap.are_in_turn()
            seen.append(f"{name}{number}")
            overlap.pause()
        return count

    for counts, order in (
        ((3, 2), "a0 b0 a1 b1 a2"),
        ((1, 3), "a0 b0 b1 b2"),
        ((2, 0), "a0 a1"),
    ):
        seen.clear()
        many, few = counts
        assert overlap.in_turn(partial(steps, "a", many), partial(steps, "b", few), CPU) == counts
        assert seen == order.split()
    overlap.pause()  # nobody to let go
    assert not overlap.are_in_turn()


@pytest.mark.parametrize("failing", ["here", "aside"])
def test_an_error_of_one_ends_both(failing: str) -> None:
    after: list[str] = []

    def work(name: str) -> None:
        overlap.pause()
        if name == failing:
            raise ValueError(f"{name} failed")
        overlap.pause()
        after.append(name)

    threads = threading.active_count()  # other tests of this process may have left some
    with pytest.raises(ValueError, match=f"{failing} failed"):
        overlap.in_turn(lambda: work("here"), lambda: work("aside"), CPU)
    assert not after and not overlap.are_in_turn() and threading.active_count() == threads


def test_the_other_thread_has_the_state_of_torch() -> None:
    def state() -> tuple[Any, ...]:
        kind = "cpu"
        return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), threading.get_ident()

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        here, aside = overlap.in_turn(state, state, CPU)
    assert here[:2] == aside[:2] == (False, True) and here[2] != aside[2]


def test_passes_of_dual_pipe_let_each_other_go() -> None:
    """Where they wait for rows."""
    config = small_config(
        pipeline_model_parallel_size=2,
        pipeline_schedule="DualPipeV",
        expert_model_parallel_size=2,
        overlap_moe_expert_parallel_comm=True,
    )
    for switches in run_ranks(4, switches_of, Case(config, 4)):
        assert {"forward", "backward"} <= set(switches)


def switches_of(rank: int, case: Case) -> list[str]:
    """Which pass paused, one after the other."""
    driven, seen = spread(case), list[str]()
    switch = overlap.InTurn.switch

    def noted(pair: overlap.InTurn) -> None:
        seen.append("forward" if threading.current_thread() is pair._aside else "backward")
        switch(pair)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap.InTurn, "switch", noted)
        driven.run(list(batches(case))[:1])
    return seen
