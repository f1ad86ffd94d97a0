"""What a step is made of, timed piece by piece, and the costs that explain the times best."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.commands.fit import fit
from deepseek.config import RunConfig, load_config
from deepseek.config.layout import Layout
from deepseek.config.processor import cores
from deepseek.config.rank_need import rank_needs
from deepseek.config.schema import ModelConfig
from deepseek.launch.processes import Processes
from deepseek.models.components.block import DeepSeekBlock, TokenContext
from deepseek.models.components.heads import head_keys
from deepseek.models.components.rope import rotation
from deepseek.models.transformer import Head
from deepseek.ops.causal_attention import causal_attention
from deepseek.ops.fused_attention import fused_attention, takes_heads
from deepseek.ops.grouped_linear import grouped_linear
from deepseek.parallel.link_speed import (
    begun_together,
    fastest,
    link_costs,
    mean_of_processes,
)
from deepseek.parallel.mesh import Meshes
from deepseek.planner.architecture import Architecture, Product
from deepseek.planner.cpu import CpuMachine, Crew, exchange_bytes, flat_bytes
from deepseek.planner.cpu_time import (
    Links,
    Outside,
    Passes,
    Work,
    block,
    ends,
    grouped,
    product,
    scores,
)
from deepseek.planner.step_time import predict_step
from deepseek.training.step import DeepSeekModel

TINY = "deepseek_v3_tiny"
UNKNOWN = 1e-18
"""Seconds of what is not measured, or explains nothing."""
NONE = Links(1, *[UNKNOWN] * 8)
_NOTHING = Outside(*[UNKNOWN] * 6)
ROUNDS = 4
"""Of each piece: the fastest counts, since whatever else runs makes the others slower."""

LINEAR = (
    (16, 256, 128),
    (64, 64, 384),
    (64, 512, 1536),
    (256, 256, 80),
    (256, 1024, 1024),
    (1024, 640, 256),
    (1024, 128, 256),
)
"""Rows, inputs and outputs of products."""
GROUPED = ((4, 256, 256, 128), (16, 1024, 256, 128), (64, 1024, 128, 64), (16, 512, 128, 512))
"""Experts, rows of all of them, inputs and outputs."""
ATTENTION = ((1, 4, 64, 48, 32), (4, 8, 256, 48, 32), (1, 6, 1024, 96, 64), (2, 2, 512, 192, 128))
"""Sequences, heads, length, width of queries and of values."""
SCALE = 0.1
"""Of their scores."""
BLOCKS: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (1, 64, ()),
    (2, 256, ()),
    (4, 64, ("model.hidden_size=512", "model.moe_intermediate_size=192")),
    (1, 512, ("model.n_routed_experts=64", "model.num_experts_per_tok=6")),
    (1, 96, ("model.n_routed_experts=64", "model.n_group=8", "model.topk_group=4")),
    (4, 128, ("model.hidden_size=128", "model.n_routed_experts=8", "model.num_experts_per_tok=2")),
)
"""Sequences, their length and changes of ``deepseek_v3_tiny``."""
HEADS = ((128, 4096, 256), (1024, 4096, 128), (512, 16384, 192))
"""Tokens, vocabulary and width."""
STEPS = (
    (32, 1024, 1),
    (32, 1024, 6),
    (192, 16384, 1),
)
"""Width, vocabulary and layers of models whose whole step is timed."""


def measured(
    processes: Processes, folder: Path, before: Crew | None, say: Callable[[str], None]
) -> Crew:
    """This machine, with so many processes at once; a collective of all of them.

    Args:
        processes: this one among them.
        folder: new, for a run.
        before: what was measured of fewer processes.
        say: what is measured now.
    """
    count = processes.world_size
    say("a trainer")
    around, resident = _trainer(processes, folder)
    if before is not None and count > cores():  # which compute as fast, in turn
        forward, backward = before.forward, before.backward
    else:
        say("products, attention, blocks")
        twice = [list(_pieces()) for _ in range(2)]  # what disturbs is mostly over by then
        pieces = [
            (works, tuple(map(min, took, again)))
            for (works, took), (_, again) in zip(*twice, strict=True)
        ]
        forward, backward = (
            explained([(works[way], took[way]) for works, took in pieces]) for way in (0, 1)
        )
    say("passes in a row")
    crew = Crew(count, torch.get_num_threads(), resident, forward, backward, _NOTHING, (NONE,))
    slower = math.prod(_slower(crew, *changes) for changes in WHOLE) ** (1 / len(WHOLE))
    crew = replace(crew, forward=forward * slower, backward=backward * slower)
    say("steps")
    crew = replace(crew, outside=_outside(count, around))
    if count == 1:
        return crew
    say("exchanges")
    sizes = sorted({2, count})
    crew = replace(crew, links=tuple(Links(ranks=size, **link_costs(size)) for size in sizes))
    return replace(crew, links=tuple(_in_steps(crew, links) for links in crew.links))


def _slower(crew: Crew, *changes: str) -> float:
    """How much longer passes of a process alone take in a step than piece by piece: caches hold
    what comes again, and more processes than cores take turns."""
    run = _run(1, *changes, *_batch(1))
    ((measured, _),) = _steps(DeepSeekModel(run.model, seed=1))
    return measured / _passes(crew, run, 1)


def _in_steps(crew: Crew, links: Links) -> Links:
    """Exchanges as they are in a step, where processes come to them at different times.

    What a step of tensor parallelism, or of experts on several ranks, takes longer than its
    computation is put down to them. That is told beside a model which each process has alone, and
    whose steps take turns with it: exchanges are a small part of a step, and a machine whose rate
    is another one than when computation was timed would make much or nothing of them.
    """
    one = _run(1, *WHOLE[0], *_batch(1))
    for axis, names in (("tensor", ("shared", "sum")), ("expert", ("rows",))):
        size = f"model.{axis}_model_parallel_size={links.ranks}"
        groups = crew.processes // (links.ranks if axis == "tensor" else 1)
        run = _run(crew.processes, *WHOLE[0], *_batch(groups), size)
        (parted, _), (alone, _) = _steps(
            _on_ranks(run.model, crew.processes),
            DeepSeekModel(one.model, seed=1),
            rounds=2 * ROUNDS,
        )
        took = parted / alone * _passes(crew, one, 1)
        free: dict[str, Any] = dict.fromkeys(names, UNKNOWN)
        without = _passes(replace(crew, links=(replace(links, **free),)), run, crew.processes)
        expected = _passes(replace(crew, links=(links,)), run, crew.processes) - without
        longer = max(1.0, (took - without) / max(expected, UNKNOWN))
        slow: dict[str, Any] = {name: longer * getattr(links, name) for name in names}
        links = replace(links, **slow)
    return links


def _passes(crew: Crew, run: RunConfig, processes: int) -> float:
    """Seconds that are expected of a step without its optimiser."""
    machine = CpuMachine("", cores(), 1, 0, (crew,))
    estimate = predict_step(run, machine.device(max(processes, crew.processes)), processes)
    return estimate.seconds - estimate.parts["optimizer"] - crew.outside.around


def _batch(groups: int) -> tuple[str, str]:
    """Two micro-batches of two sequences, of each of so many groups."""
    return "model.micro_batch_size=2", f"model.global_batch_size={4 * groups}"


def _trainer(processes: Processes, folder: Path) -> tuple[float, float]:
    """Seconds around the steps of a run, and bytes of a process besides what its model needs: the
    program, its libraries, and what the heap cannot use again."""
    count = processes.world_size
    run = _run(
        count,
        "trainer.max_steps=12",
        "trainer.val_check_interval=0",
        "exp_manager.create_checkpoint_callback=false",
        "exp_manager.monitor.peak_tflops=0.1",
        "model.num_hidden_layers=3",
        "model.data.seq_length=128",
        "model.micro_batch_size=1",
        f"model.global_batch_size={count}",
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        fit(run, folder, processes)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    rows = [row for row in log if "loss" in row][2:]
    parts = ("forward_backward_seconds", "optimizer_seconds")
    around = statistics.median(row["seconds"] - sum(row[p] for p in parts) for row in rows)
    held = max(row["memory_bytes"] for row in rows)
    needed = max(need.total for need in rank_needs(run)) + flat_bytes(run) + exchange_bytes(run)
    return max(around, UNKNOWN), held - needed


def _run(processes: int, *changes: str) -> RunConfig:
    settings = ["trainer.precision=32", "trainer.accelerator=cpu", f"trainer.devices={processes}"]
    return load_config(TINY, [*settings, *changes])


def _sizes(width: int, vocabulary: int, layers: int) -> list[str]:
    return [
        f"model.hidden_size={width}",
        f"model.vocab_size={vocabulary}",
        f"model.tokenizer.vocab_size={min(vocabulary, 4096)}",
        f"model.num_hidden_layers={layers}",
        "model.num_attention_heads=2",
        "model.data.seq_length=32",
        "model.micro_batch_size=1",
    ]


# -- the passes --

Measured = tuple[tuple[Work, Work], tuple[float, float]]
"""Work and seconds, forward and backward."""


def _pieces() -> Iterator[Measured]:
    for rows, inner, outer in LINEAR:
        weight = nn.Parameter(torch.randn(outer, inner))
        x = torch.randn(rows, inner, requires_grad=True)
        yield (
            product(rows, Product(inner, outer)),
            _both_ways(partial(F.linear, x, weight)),
        )
    for count, rows, inner, outer in GROUPED:
        stack = nn.Parameter(torch.randn(count, outer, inner))
        x = torch.randn(rows, inner, requires_grad=True)
        counts = torch.full((count,), rows // count)
        yield (
            grouped(rows, Product(inner, outer), count),
            _both_ways(partial(grouped_linear, x, stack, counts)),
        )
    for sequences, heads, length, width, values in ATTENTION:
        work = scores(sequences, length, length, heads, width + values)
        yield (work, work), _both_ways(attention_of(sequences, heads, length, width, values))
    for sequences, length, changes in BLOCKS:
        model = _run(1, *changes, f"model.data.seq_length={length}").model
        arch = Architecture.of_model(model)
        for moe in (False, True):
            works = block(arch, moe, sequences, length, 1, 1, 1)
            yield _totals(works), _both_ways(_block_of(model, moe, sequences, length))
    for tokens, vocabulary, width in HEADS:
        model = _run(1, *_sizes(width, vocabulary, 1)).model
        works = ends(Architecture.of_model(model), 1, tokens, 1, 1)
        yield _totals(works), _both_ways(_ends_of(tokens, vocabulary, width))


def _totals(works: tuple[Passes, Passes]) -> tuple[Work, Work]:
    return works[0].total, works[1].total


def attention_of(
    sequences: int, heads: int, length: int, width: int, values: int
) -> Callable[[], Tensor]:
    """Its core as a step takes it: by the kernel where there is one, else by blocks of products."""
    rope = width // 3 // 2 * 2
    tokens = sequences, length
    q, kv, k_rope = (
        torch.randn(*tokens, *sizes, requires_grad=True)
        for sizes in ((heads, width), (heads, width - rope + values), (rope,))
    )
    angles = torch.ones(*tokens, rope // 2), torch.zeros(*tokens, rope // 2)
    if takes_heads(q, kv):
        return partial(fused_attention, q, kv, k_rope, *angles, SCALE)
    k, v = head_keys(kv.detach(), k_rope.detach(), values)
    q, k, v = (x.contiguous().requires_grad_() for x in (q.detach().transpose(1, 2), k, v))
    return partial(causal_attention, q, k, v, SCALE)


def _block_of(model: ModelConfig, moe: bool, sequences: int, length: int) -> Callable[[], Tensor]:
    made = DeepSeekBlock(model, model.first_k_dense_replace if moe else 0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
        for buffer in made.buffers():
            buffer.zero_()
    positions = torch.arange(length).expand(sequences, length)
    cos, sin = rotation(
        positions, model.qk_rope_head_dim, model.rope_theta, model.rope_scaling, torch.float32
    )
    real = torch.ones(sequences, length, dtype=torch.bool)
    context = TokenContext(cos, sin, None, real, torch.tensor(1e-3))
    x = torch.randn(sequences, length, model.hidden_size, requires_grad=True)
    return lambda: made(x, context)


def _ends_of(tokens: int, vocabulary: int, width: int) -> Callable[[], Tensor]:
    embedding, head = nn.Embedding(vocabulary, width), Head(width, vocabulary)
    ids = torch.randint(vocabulary, (1, tokens))
    return lambda: head.loss_sum(F.rms_norm(embedding(ids), (width,)), ids)


def _both_ways(make: Callable[[], Tensor]) -> tuple[float, float]:
    """Seconds of making something, and of the gradients of all that it was made of."""
    there = fastest(make, ROUNDS)
    graph: list[Tensor] = []
    result = make()
    leaves = _leaves(result)
    gradient = torch.ones_like(result)

    def backward() -> None:
        result = graph.pop()
        result.backward(gradient)

    took = []
    for _ in range(ROUNDS + 1):
        for leaf in leaves:
            leaf.grad = None
        graph.append(make())
        took.append(begun_together(backward))
    return there, mean_of_processes(min(took[1:]))


def _leaves(result: Tensor) -> list[Tensor]:
    """What a tensor was made of and has a gradient."""
    found, nodes, seen = [], [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


WHOLE = (
    ("model.hidden_size=192", "model.num_hidden_layers=3", "model.data.seq_length=192"),
    ("model.num_hidden_layers=2", "model.n_routed_experts=32", "model.data.seq_length=96"),
)
"""Changes of ``deepseek_v3_tiny``, whose passes are timed as they come in a step."""


# -- the rest of a step --


def _outside(count: int, around: float) -> Outside:
    """Costs of the optimiser and of FSDP, from whole steps of small models."""
    rows, whole, parted = [], [], []
    for width, vocabulary, layers in STEPS:
        run = _run(count, *_sizes(width, vocabulary, layers), f"model.global_batch_size={count}")
        alone = DeepSeekModel(replace(run.model, global_batch_size=1), seed=1)
        numbers = sum(p.numel() for p in alone.model.parameters())
        tensors = len(list(alone.model.parameters()))
        if count == 1:
            ((_, optimizer),) = _steps(alone)
        else:
            (passes, optimizer), (of_one, _) = _steps(_on_ranks(run.model, count), alone)
            parted.append((numbers, passes - of_one))
        rows.append((numbers / count, tensors, 1.0))
        whole.append(optimizer)
    update, tensor, step = _nonnegative(rows, whole)
    unit = exchange = UNKNOWN
    if parted:
        (few, short), _, (many, long) = parted
        exchange = max((long - short) / (many - few), UNKNOWN)
        unit = max(short - few * exchange, UNKNOWN)
    return Outside(update, tensor, step, around, unit, exchange)


def _on_ranks(model: ModelConfig, count: int) -> DeepSeekModel:
    """On all processes, as the model divides it."""
    module = DeepSeekModel(model, seed=1, parallelize_later=True)
    meshes = Meshes(Layout.of(model, count), "cpu", timedelta(minutes=5))
    module.parallelize(meshes, torch.device("cpu"))
    return module


def _steps(*modules: DeepSeekModel, rounds: int = ROUNDS) -> list[tuple[float, float]]:
    """Of each, seconds of the passes and of the optimiser in the fastest step, means of the
    processes. They take turns, so that a machine whose speed drifts slows all alike."""
    steps = [_step(module) for module in modules]
    turns = [[step() for step in steps] for _ in range(rounds + 2)][2:]
    found = []
    for took in zip(*turns, strict=True):
        passes, updates = (mean_of_processes(min(both)) for both in zip(*took, strict=True))
        found.append((passes, updates))
    return found


def _step(module: DeepSeekModel) -> Callable[[], tuple[float, float]]:
    """Takes one, and tells its seconds."""
    model, optimizer = module.config, module.configure_optimizers()
    sequences = model.global_batch_size // module.meshes.layout.dp
    tokens = torch.randint(model.vocab_size, (sequences, model.data.seq_length))
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "positions": torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous(),
        "documents": torch.zeros(tokens.shape, dtype=torch.int32),
    }

    def step() -> tuple[float, float]:
        begun_together(lambda: module.train_step(batch, optimizer))
        seconds = module.phases.seconds()
        return seconds["forward_backward"], seconds["optimizer"]

    return step


def explained(pieces: Sequence[tuple[Work, float]]) -> Work:
    """Costs of work, from pieces of it and what they took: least squares of relative errors."""
    return Work(*_nonnegative([work for work, _ in pieces], [took for _, took in pieces]))


def _nonnegative(rows: Sequence[Sequence[float]], took: Sequence[float]) -> list[float]:
    """Costs, none below zero, with which ``rows`` take what they took, as a share of it."""
    matrix = np.array(rows) / np.array(took)[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    costs = np.zeros(matrix.shape[1])
    rest = np.ones(len(matrix))
    for _ in range(4000):  # one by one, each at its best
        for index, column in enumerate(matrix.T):
            square = column @ column
            if square == 0:
                continue
            better = max(0.0, costs[index] + column @ rest / square)
            rest -= column * (better - costs[index])
            costs[index] = better
    return [max(float(cost), UNKNOWN) for cost in costs / scale]
