"""Steps of small models, timed, and the constants of the model of time that explain them best."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from deepseek.config import RunConfig, load_config
from deepseek.parallel.link_speed import gloo_speed, meet, shared_memory_speed
from deepseek.planner.cpu import CpuMachine, Links, Speed, cores
from deepseek.planner.step_time import predict_step
from deepseek.training.phases import resident_bytes
from deepseek.training.step import DeepSeekModel

TINY = "deepseek_v3_tiny"
STEPS = 3
"""Of each model that are timed, after one that is not."""
PULL = 0.03
"""Of a constant towards its first guess, against the error of a step."""

PROBES: tuple[tuple[str, ...], ...] = (
    (),
    ("model.data.seq_length=64", "model.micro_batch_size=1", "model.global_batch_size=1"),
    (
        "model.data.seq_length=64",
        "model.micro_batch_size=1",
        "model.global_batch_size=1",
        "model.num_hidden_layers=8",
    ),
    ("model.data.seq_length=128", "model.micro_batch_size=2", "model.global_batch_size=8"),
    ("model.data.seq_length=1024", "model.micro_batch_size=1", "model.global_batch_size=1"),
    (
        "model.hidden_size=512",
        "model.intermediate_size=1280",
        "model.moe_intermediate_size=256",
        "model.num_hidden_layers=3",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
    ),
)
"""Changes of ``deepseek_v3_tiny``: sizes, depth, length, micro-batches."""


def measured(rank: int) -> CpuMachine:
    """This machine; a collective of its processes, of which this is number ``rank``."""
    import deepseek.commands.fit  # noqa: F401  # a process that trains has it in memory

    own = resident_bytes()
    runs = [
        load_config(TINY, ["trainer.precision=32", "trainer.accelerator=cpu", *changes])
        for changes in PROBES
    ]
    steps = [_stepper(run) for run in runs]
    alone = None
    if rank == 0:
        torch.set_num_threads(cores())
        alone = _speed(runs, steps, lambda: None)
    meet()
    torch.set_num_threads(1)
    together = _speed(runs, steps, meet)
    gloo, shared = gloo_speed(), shared_memory_speed()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name = f"{platform.machine()}, {cores()} cores, torch {torch.__version__}"
    speeds = alone or together, together
    return CpuMachine(name, cores(), memory, own, *speeds, Links(*gloo, *shared))


def _stepper(run: RunConfig) -> Callable[[], object]:
    """A training step of a configuration, as ``train`` takes it, on random tokens."""
    model = run.model
    module = DeepSeekModel(model, seed=run.seed)
    optimizer = module.configure_optimizers()
    shape = model.global_batch_size, model.data.seq_length
    tokens = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "positions": torch.arange(shape[1]).expand(shape).contiguous(),
        "documents": torch.zeros(shape, dtype=torch.int32),
    }
    return lambda: module.train_step(batch, optimizer)


def _speed(
    runs: Sequence[RunConfig], steps: Sequence[Callable[[], object]], begin: Callable[[], None]
) -> Speed:
    rows, inner = torch.ones(512, 1024), torch.ones(1024, 1024)
    products = 2 * 512 * 1024 * 1024 / _seconds(lambda: rows @ inner, begin, 20)
    three = [torch.ones(1 << 22) for _ in range(3)]
    add = _seconds(lambda: torch.add(three[0], three[1], out=three[2]), begin, 8)
    first = Speed(products, 12 * (1 << 22) / add / 0.75, 0.5, 1.0, 1e-3, 1e-9, 1e-3)
    return explained(runs, [_seconds(step, begin, STEPS) for step in steps], first)


def _seconds(work: Callable[[], object], begin: Callable[[], None], times: int) -> float:
    """Median; ``begin`` is called before each."""
    work()
    took = []
    for _ in range(times):
        begin()
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


PARTS = {
    "products": ("dense products", "experts"),
    "attention": ("attention",),
    "glue": ("memory-bound glue",),
    "host": ("host",),
    "update": ("optimizer",),
    "step": ("around the step",),
}
"""Of a step, by the constant that they are proportional to, or to its inverse."""


def explained(runs: Sequence[RunConfig], seconds: Sequence[float], first: Speed) -> Speed:
    """The constants of steps that take so long, in one process each.

    Least squares of relative errors, by factors on ``first`` that are drawn towards 1 and never
    below a hundredth.
    """
    machine = CpuMachine("", 1, 0.0, 0.0, first, first, Links(1.0, 0.0, 1.0, 0.0))
    matrix = []
    for run, took in zip(runs, seconds, strict=True):
        parts = predict_step(run, machine.device(1), 1).parts
        matrix.append([sum(parts[part] for part in names) / took for names in PARTS.values()])
    rows = np.array([*matrix, *(PULL * np.eye(len(PARTS)))])
    wanted = np.array([1.0] * len(runs) + [PULL] * len(PARTS))
    factors = np.ones(len(PARTS))
    for _ in range(2000):  # one by one, each at its best
        for index, column in enumerate(rows.T):
            rest = wanted - rows @ factors + column * factors[index]
            factors[index] = max(0.01, column @ rest / (column @ column))
    products, attention, *other = map(float, factors)
    last = first.glue, first.host, first.update, first.step
    return Speed(
        first.products / products,
        first.memory,
        first.attention / attention * products,
        *(value * factor for value, factor in zip(last, other, strict=True)),
    )
