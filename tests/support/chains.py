"""Trains a few steps in one layout, saves, loads in another, trains on; and compares with one
process that was never interrupted."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.training_state import collect_tensors, restore
from deepseek.models.transformer import global_name
from deepseek.parallel.mesh import Meshes, SingleProcess, local, local_slices
from support.layouts import Case, Driven, batches, small_config
from support.ranks import run_ranks

STEPS = 2
"""Of a link; the second has moments."""


def _layout(world: int, **changes: Any) -> Case:
    short = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "replicate": "data_parallel_replicate_size",
        "schedule": "pipeline_schedule",
        "virtual": "virtual_pipeline_model_parallel_size",
        "split": "pipeline_layers_per_stage",
        "output": "pipeline_output_stages",
        "micro": "micro_batch_size",
    }
    on_host = changes.pop("on_host", False)
    named = {short[name]: value for name, value in changes.items()}
    config = small_config(global_batch_size=24, **named)
    config = replace(config, optim=replace(config.optim, cpu_offload=on_host))
    case = Case(config, world, steps=STEPS)
    assert not case.problems(), (world, changes, case.problems())
    return case


LAYOUTS = {
    "one process": _layout(1, micro=12),
    "dp2": _layout(2, micro=6),
    "dp3": _layout(3, micro=4, on_host=True),  # 16 rows in parts of 6, 6 and 4
    "dp6": _layout(6, micro=2),  # 8 rows in parts of 2 for four ranks, none for two
    "replicate2": _layout(2, replicate=2, micro=6),
    "ep2": _layout(2, ep=2, micro=6),
    "ep8": _layout(8, ep=8, micro=3),
    "dp8 ep4": _layout(8, ep=4, micro=3),
    "tp2": _layout(2, tp=2, micro=12),
    "tp4 ep2": _layout(4, tp=4, ep=2, micro=12),
    "tp2 dp2": _layout(4, tp=2, micro=6),
    "tp2 dp2 ep4": _layout(4, tp=2, ep=4, micro=6),
    "replicate2 dp2 ep2": _layout(4, replicate=2, ep=2, micro=3),
    "replicate2 dp2 tp2 ep4": _layout(8, replicate=2, tp=2, ep=4, micro=3),
    "GPipe pp2": _layout(2, pp=2, schedule="GPipe", micro=6),
    "GPipe pp4": _layout(4, pp=4, schedule="GPipe", micro=6),
    "1F1B pp4": _layout(4, pp=4, micro=6),
    "1F1B pp2 by hand": _layout(2, pp=2, split=[1, 3], micro=6),
    "1F1B pp2 dp2 ep2": _layout(4, pp=2, ep=2, micro=3),
    "1F1B pp2 replicate2 tp2 ep2": _layout(8, pp=2, replicate=2, tp=2, ep=2, micro=3),
    "Interleaved1F1B pp2": _layout(2, pp=2, schedule="Interleaved1F1B", virtual=2, micro=6),
    "InterleavedZeroBubble pp2 dp2": _layout(
        4, pp=2, schedule="InterleavedZeroBubble", virtual=2, micro=3
    ),
    "ZBVZeroBubble pp2": _layout(2, pp=2, schedule="ZBVZeroBubble", micro=6, on_host=True),
    "1F1B pp4, output shared": _layout(4, pp=4, output=3, micro=6),
    "Interleaved1F1B pp2, output shared": _layout(
        2, pp=2, schedule="Interleaved1F1B", virtual=2, output=3, micro=6
    ),
    "ZBVZeroBubble pp2 tp2, output shared": _layout(
        4, pp=2, tp=2, schedule="ZBVZeroBubble", output=2, micro=6
    ),
    "ZBVZeroBubble pp2 dp2 tp2 ep4": _layout(
        8, pp=2, tp=2, ep=4, schedule="ZBVZeroBubble", micro=3
    ),
    "DualPipeV pp2 dp2 ep2": _layout(4, pp=2, ep=2, schedule="DualPipeV", micro=3),
    "DualPipeV pp2 dp2 tp2 ep4": _layout(8, pp=2, tp=2, ep=4, schedule="DualPipeV", micro=3),
}
"""One model in many layouts; each reads the same global batches, in few micro-batches."""


@dataclass(frozen=True)
class Chain:
    """Layouts one after the other, by their names in ``LAYOUTS``."""

    names: tuple[str, ...]
    optimizer: str
    in_background: bool

    def __str__(self) -> str:
        how = "async" if self.in_background else "sync"
        return f"{' -> '.join(self.names)}, {self.optimizer}, {how}"

    def case(self, link: int) -> Case:
        return _with_optimizer(LAYOUTS[self.names[link]], self.optimizer)


def draw_chains(count: int, length: int, seed: int, largest_world: int = 8) -> list[Chain]:
    """Different chains, the same for the same seed; neighbours differ."""
    chance = random.Random(seed)
    names = [name for name, case in LAYOUTS.items() if case.world <= largest_world]
    chains: list[Chain] = []
    while len(chains) < count:
        drawn = tuple(chance.choices(names, k=length))
        chain = Chain(drawn, chance.choice(("adamw", "adamw", "muon")), chance.random() < 0.5)
        if all(a != b for a, b in zip(drawn, drawn[1:], strict=False)) and drawn not in [
            c.names for c in chains
        ]:
            chains.append(chain)
    return chains


def worst_of_chain(chain: Chain, folder: Path, timeout: float = 120.0) -> tuple[float, str]:
    """Largest relative error over all ranks, of every loss and norm and, after each link, of every
    weight, bias and state of the optimiser; and what it is of."""
    found = (0.0, "nothing")
    for link in range(len(chain.names)):
        case = chain.case(link)
        arguments = (case, folder, link, chain.in_background)
        if case.world == 1:
            results = [work_of_rank(0, *arguments)]
        else:
            results = run_ranks(case.world, work_of_rank, *arguments, timeout=timeout)
        metrics, tensors = uninterrupted(chain.optimizer, len(chain.names))[link]
        seen = {
            name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in tensors.items()
        }
        for its_metrics, parts in results:
            for ours, theirs in zip(its_metrics, metrics, strict=True):
                for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "step"):
                    a, b = getattr(ours, key), getattr(theirs, key)
                    found = max(found, (abs(a - b) / abs(b), f"{key} of step {theirs.step}"))
            for name, part, numbers in parts:
                seen[name][part] = True
                here, whole = tensors[name][part], tensors[name].double().norm().item()
                error = (numbers.double() - here.double()).norm().item() / (whole or 1.0)
                found = max(found, (error, f"{name} after link {link}"))
        assert all(mask.all() for mask in seen.values())
    return found


def work_of_rank(
    rank: int, case: Case, folder: Path, link: int, in_background: bool
) -> tuple[list[Any], list[tuple[str, tuple[slice, ...], Tensor]]]:
    """Load, train, validate, save; metrics and what is here of each tensor."""
    driven = drive(case)
    module = driven.module
    with CheckpointManager(folder) as manager:
        if link > 0:
            checkpoint = manager.newest_sound(fail)
            assert checkpoint is not None
            restore(checkpoint, module.model, driven.optimizer)
            module.finished_steps = checkpoint.step
        train(driven, link)
        save = manager.save_in_background if in_background else manager.save
        save(module.finished_steps, collect_tensors(module.model, driven.optimizer), {})
    return driven.metrics, parts_of(driven)


def drive(case: Case) -> Driven:
    """A model in the layout of the process group, or in this process alone."""
    if case.world == 1:
        return Driven(case, SingleProcess())
    return Driven(case, Meshes(case.layout, "cpu", timedelta(seconds=60)))


def train(driven: Driven, link: int) -> None:
    """The steps of one link of a chain, and a validation, as before a checkpoint of a run."""
    driven.run(batches(replace(driven.case, seed=link)))
    micro = next(batches(driven.case))
    rows = driven.case.config.micro_batch_size
    driven.module.micro_batches.evaluate({name: t[:rows] for name, t in micro.items()})


def parts_of(driven: Driven) -> list[tuple[str, tuple[slice, ...], Tensor]]:
    """Global name, part and numbers of weights, biases and optimiser state; copies as well."""
    parts = []
    for name, tensor in driven.tensors().items():
        kind, _, rest = name.partition(".")
        if kind not in ("gradient", "load"):
            here = local(tensor).detach().clone()
            parts.append((f"{kind}.{global_name(rest)}", local_slices(tensor), here))
    return parts


@cache
def uninterrupted(optimizer: str, links: int) -> list[tuple[list[Any], dict[str, Tensor]]]:
    """Metrics and tensors of each link in one process, without any checkpoint."""
    driven = Driven(_with_optimizer(LAYOUTS["one process"], optimizer), SingleProcess())
    results = []
    for link in range(links):
        train(driven, link)
        tensors = {name: part for name, _, part in parts_of(driven)}
        results.append((driven.metrics[link * STEPS :], tensors))
    return results


def fail(message: str) -> None:
    """Nothing is to be reported."""
    raise AssertionError(message)


def _with_optimizer(case: Case, name: str) -> Case:
    optim = replace(case.config.optim, name=name)
    return replace(case, config=replace(case.config, optim=optim))
