"""Weak scaling: training steps of two processes with twice the batch of one, a thread each.

    OMP_NUM_THREADS=1 python benchmarks/weak_scaling.py

Each layout has processes of its own. A round takes a few steps of one process with no parallel
code, while the other waits; then of both like that, side by side; then of the layout. The first
step of a block is not counted: it finds the caches full of another model. A time is that of the
slowest rank.

``scaling`` is the tokens per second of two processes over twice those of one: 1 would be no cost at
all. ``machine`` is the same of two processes that know nothing of each other: what cores, caches
and memory leave of it before any parallel code does anything; ``of_machine`` is the layout against
these two. The median of the rounds' own ratios
counts, so that a machine whose speed drifts slows both sides alike; the rounds' fastest times give
a second figure, which what else runs on the machine disturbs least.

Routers that nothing has trained send one rank more rows than the other, which then waits:
``busiest_rank`` is its rows over their mean. In a layout named ``balanced`` tokens go to all
experts in turn, in one process too, so that what is left is the cost of the code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251
import torch.multiprocessing as mp
from cases import EIGHT, FINE, WIDE
from results import whole
from torch import Tensor

from deepseek.commands.entry import guarded
from deepseek.config.layout import Layout
from deepseek.config.schema import DataConfig, ModelConfig
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.parallel.mesh import Meshes, SingleProcess
from deepseek.training.step import DeepSeekModel

RANKS = 2
BLOCK = 2
"""Steps that are counted of each block."""
BATCHES = (4, 12)
"""Sequences of one process: what is exchanged is the same, what is computed is not."""
LAYOUTS: dict[str, dict[str, int]] = {
    "fsdp2": {},
    "fsdp2_ep2": {"expert_model_parallel_size": 2},
    "fsdp2_ep2_balanced": {"expert_model_parallel_size": 2},
}

EIGHT_LAYERS = replace(
    EIGHT,
    num_hidden_layers=8,
    num_experts_per_tok=2,
    routed_scaling_factor=1.0,
    moe_aux_loss_coeff=1e-4,
    max_position_embeddings=4096,
    micro_batch_size=4,
    global_batch_size=4,
    data=DataConfig(seq_length=256),
)
MODELS = {
    "small": EIGHT_LAYERS,
    # The experts of ``train_step.py``, fewer layers, so that a step takes a few seconds.
    "S": replace(WIDE, num_hidden_layers=3, data=DataConfig(seq_length=512)),
    "F": replace(FINE, num_hidden_layers=4, data=DataConfig(seq_length=512)),
}


def main(arguments: list[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--batches", type=whole, nargs="+", default=BATCHES)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    asked = parser.parse_args(arguments)
    load, config = os.getloadavg()[0], MODELS[asked.model]
    result = {
        "what": f"{config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.n_routed_experts} experts top-{config.num_experts_per_tok}, fp32, AdamW, "
        "1 thread a process",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rounds": asked.rounds,
        "load": load,
        "tokens_of_a_process": {
            batch * config.data.seq_length: measured(config, asked.layouts, asked.rounds, batch)
            for batch in asked.batches
        },
        "load_after": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))


def measured(
    config: ModelConfig, layouts: Sequence[str], rounds: int, batch: int
) -> dict[str, Any]:
    """Of each layout, with so many sequences a process."""
    found = {}
    for name in layouts:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(one_rank, args=(folder, config, rounds, batch, name), nprocs=RANKS)
            with open(os.path.join(folder, "result")) as file:
                one, beside, two, busiest = json.load(file)
            found[name] = scaling(one, beside, two) | {"busiest_rank": round(busiest, 3)}
    return found


def scaling(one: list[float], beside: list[float], two: list[float]) -> dict[str, float]:
    """Twice the work in what part of the time; median of the rounds and of the fastest."""
    return {
        "scaling": round(ratio(one, two), 3),
        "scaling_of_fastest": round(min(one) / min(two), 3),
        "machine": round(ratio(one, beside), 3),
        "machine_of_fastest": round(min(one) / min(beside), 3),
        "of_machine": round(ratio(beside, two), 3),
        "of_machine_of_fastest": round(min(beside) / min(two), 3),
        "seconds_of_one": round(statistics.median(one), 4),
        "seconds_of_two": round(statistics.median(two), 4),
    }


def ratio(one: list[float], other: list[float]) -> float:
    """Median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def one_rank(
    rank: int, folder: str, config: ModelConfig, rounds: int, batch: int, layout: str
) -> None:
    """Rank 0 leaves the seconds of every round in a file: of one process, of two of them, of two
    that work together. And how many rows the busiest EP rank has."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as ``deepseek train`` does
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    alone = replace(config, micro_batch_size=batch, global_batch_size=batch)
    together = replace(alone, global_batch_size=RANKS * batch, **LAYOUTS[layout])
    meshes = Meshes(Layout.of(together, RANKS), "cpu", timedelta(minutes=5))
    balanced = layout.endswith("balanced")
    module = model(together, meshes, balanced)
    one = steps(model(alone, SingleProcess(), balanced), batch)
    runs = [one if rank == 0 else lambda: None, one, steps(module, batch)]
    times: list[list[float]] = [[] for _ in runs]
    for round_number in range(rounds + 1):
        for found, run in zip(times, runs, strict=True):
            seconds = timed(run)
            if round_number:  # the first warms up
                found.append(seconds)
    if rank == 0:
        with open(os.path.join(folder, "result"), "w") as file:
            json.dump([*times, busiest_rank(module)], file)
    dist.barrier()
    dist.destroy_process_group()


def model(config: ModelConfig, meshes: Meshes | SingleProcess, balanced: bool) -> Any:
    """A module on these ranks."""
    module: Any = DeepSeekModel(config, max_steps=1000, parallelize_later=True)
    module.parallelize(meshes, torch.device("cpu"))
    for router in module.model.routers().values() if balanced else ():
        router.choose = partial(all_in_turn, top_k=config.num_experts_per_tok)
    return module


def all_in_turn(scores_TE: Tensor, top_k: int) -> Tensor:
    """(T, K) experts, of which each gets as many tokens as any other."""
    number, num_experts = scores_TE.shape
    return torch.arange(number * top_k).remainder(num_experts).view(number, top_k)


def steps(module: Any, batch: int) -> Callable[[], None]:
    """Takes one optimiser step, each on other tokens."""
    chance = torch.Generator().manual_seed(module.meshes.data_rank)
    shape = (batch, module.config.data.seq_length)
    optimizer = module.configure_optimizers()

    def step() -> None:
        tokens_BS = torch.randint(module.config.vocab_size, shape, generator=chance)
        module.train_step(whole_batch(tokens_BS), optimizer)

    return step


def busiest_rank(module: Any) -> float:
    """Rows of the EP rank that has most over the mean, of the last step, mean of the layers."""
    ratios = []
    for router in module.model.routers().values():
        rows_n = router.tokens_per_expert.view(module.meshes.layout.ep, -1).sum(dim=1).double()
        ratios.append((rows_n.max() / rows_n.mean()).item())
    return statistics.mean(ratios)


def whole_batch(tokens_BS: Tensor) -> dict[str, Tensor]:
    """One document in each row, no padding."""
    return {
        "tokens": tokens_BS,
        "labels": tokens_BS.roll(-1, 1),
        "positions": torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).contiguous(),
        "documents": torch.zeros_like(tokens_BS, dtype=torch.int32),
    }


def timed(run: Callable[[], None]) -> float:
    """Seconds of a step, on the slowest rank."""
    run()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(BLOCK):
        run()
    seconds = torch.tensor((time.perf_counter() - start) / BLOCK)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


if __name__ == "__main__":
    guarded(main)
