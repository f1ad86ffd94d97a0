"""What ``config/layout.py`` and ``cost.py`` say of a rank against what the parallel code builds.

The ranks beside the one that is looked at are not there: torch's ``fake`` backend stands in. Each
rank has a process of its own: torch remembers by mesh what a rank holds, and tests that fork later
would inherit it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepseek.config import RunConfig, changed, load_config
from deepseek.config.layout import Layout, kept_shape, split_layers, stages_of_rank
from deepseek.config.memory import rank_memory
from deepseek.config.schema import PeftConfig
from deepseek.config.weights import model_weights
from deepseek.parallel.mesh import Meshes, local
from deepseek.parallel.parallelize import parallelize

SMALL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=4",
    "model.vocab_size=512",
    "model.tokenizer.vocab_size=512",
    "model.data.seq_length=64",
]


@contextmanager
def meshes_of(layout: Layout, rank: int) -> Iterator[Meshes]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        yield Meshes(layout, "cpu", timedelta(minutes=1))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported")
@pytest.mark.parametrize(
    ("name", "ranks", "overrides"),
    [
        ("deepseek_v3_2gpu", [0], []),
        ("deepseek_v3_8gpu", [0], []),
        ("deepseek_v3_32gpu", [0, 16], []),
        ("deepseek_v3_32gpu", [0], ["model.data_parallel_replicate_size=2"]),
        ("deepseek_v3_32gpu", [0, 16], ["model.pipeline_schedule=DualPipeV"]),
        ("deepseek_v3_tiny", [0], ["trainer.devices=3", "model.global_batch_size=12"]),
    ],
)
def test_the_first_ranks_of_a_stage_keep_what_was_planned(
    name: str, ranks: list[int], overrides: list[str]
) -> None:
    run = load_config(name, [*SMALL, *overrides])
    assert_as_planned(run, ranks)


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported")
@pytest.mark.parametrize(
    ("name", "ranks", "targets"),
    [
        ("deepseek_v3_32gpu", [0, 16], ["attention", "feed_forward", "experts"]),
        ("deepseek_v3_2gpu", [0], ["wkv_a", "w2", "experts.w3"]),
    ],
)
def test_with_adapters(name: str, ranks: list[int], targets: list[str]) -> None:
    run = load_config(name, SMALL)
    run = changed(run, {"model.peft": PeftConfig(dim=4, target_modules=targets)})
    assert_as_planned(run, ranks)


def assert_as_planned(run: RunConfig, ranks: list[int]) -> None:
    layout, parts = Layout.of_run(run), split_layers(run.model)
    for rank in ranks:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            found = process.submit(built, run, layout, rank).result()
        kept, numbers, biases, trained = found
        pp = layout.coordinate(rank).pp
        planned = {
            weight.name: kept_shape(weight, layout)
            for stage in stages_of_rank(run.model, pp)
            for weight in model_weights(run.model, *parts[stage])
            if not weight.buffer
        }
        assert kept == planned
        memory = rank_memory(run.model, layout, pp)
        assert (memory.parameters, memory.weights) == (numbers, 4 * (numbers + biases))
        assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)


def built(
    run: RunConfig, layout: Layout, rank: int
) -> tuple[dict[str, tuple[int, ...]], int, int, int]:
    """Shapes that are kept, and how many numbers: of weights, of biases, trained."""
    with meshes_of(layout, rank) as meshes:
        model = parallelize(run.model, meshes, torch.device("cpu"), seed=1).model
        kept = {name: tuple(local(p).shape) for name, p in model.named_parameters()}
        numbers = sum(local(p).numel() for p in model.parameters())
        buffers = dict(model.named_buffers())  # beside the biases: the counters of a step
        biases = sum(b.numel() for name, b in buffers.items() if name.endswith("gate.bias"))
        trained = sum(local(p).numel() for p in model.parameters() if p.requires_grad)
    return kept, numbers, biases, trained
