"""Compiled blocks on several ranks: their graphs are whole, and the losses those of eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek.config.schema import OptimConfig, SchedConfig
from support.layouts import Case, Driven, batches, small_config, spread
from support.ranks import run_in_turn


def compiled(driven: Driven) -> list[int]:
    """Compile its blocks: traced as always, and run by torch, not by generated code. Gets a number
    for each graph."""
    graphs: list[int] = []

    def noted(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compile_whole = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f: compile_whole(f, backend=noted))
        driven.module.model.compile_blocks()
    return graphs


def train(rank: int, case: Case) -> tuple[list[float], int, int]:
    """Losses, graphs, and the breaks between them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    driven = spread(case)
    graphs = compiled(driven) if case.config.torch_compile else []
    driven.run(batches(case))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return [record.loss for record in driven.metrics], len(graphs), breaks


def case(**changes: Any) -> Case:
    optim = OptimConfig(lr=1e-3, sched=SchedConfig(min_lr=1e-3))
    sizes = dict(num_hidden_layers=3, initializer_range=0.1, reshard_after_forward=True)
    config = small_config(optim=optim, **(sizes | changes))
    return Case(config, 2, dtype=torch.float32, autocast=True)


@pytest.mark.filterwarnings("default")  # the compiler warns of its own doings
def test_blocks_in_bf16() -> None:
    """Weights are gathered in bf16, norms and routers in fp32, before the block and not inside of
    it: a dense block, those with experts and MTP's are a graph each. Of the latter two dispatch and
    combine are breaks. Losses are within 0.5 % of eager ones'."""
    plain = case(torch_compile=False)
    others = [case(torch_compile=True), case(torch_compile=True, expert_model_parallel_size=2)]
    results = run_in_turn(2, train, [plain, *others])
    (wanted, *_), *_ = results[0]
    assert [graphs for _, graphs, _ in results[1]] == [3, 3]
    for ranks, breaks in zip(results[1:], (0, 4), strict=True):
        for losses, _, between in ranks:
            assert losses == pytest.approx(wanted, rel=5e-3)
            assert between == breaks


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("changes", "within", "breaks"),
    [
        # Emulated products take longer to trace. Rounded tiles tell apart what bf16 does not.
        (dict(fp8_recipe="blockwise", expert_model_parallel_size=2), 2e-2, 4),
        # Units are there already when a block is recomputed.
        (dict(activations_checkpoint_granularity="full"), 5e-3, 0),
        # They are gathered once, and go back for each micro-batch.
        (dict(pipeline_model_parallel_size=2, reshard_after_forward=None), 5e-3, 0),
    ],
)
def test_blocks_of_other_layouts(changes: dict[str, Any], within: float, breaks: int) -> None:
    both = [case(torch_compile=compiles, **changes) for compiles in (False, True)]
    plain, other = run_in_turn(2, train, both)
    for (wanted, *_), (losses, _, between) in zip(plain, other, strict=True):
        assert losses == pytest.approx(wanted, rel=within)
        assert between == breaks
