"""``deepseek validate``: every error of a configuration, or what a sound one means in numbers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from deepseek.config import RunConfig, UserError, load_config
from deepseek.config.batch_ramp import levels, tokens_of_run
from deepseek.config.cost import count_parameters, flops_per_token, kv_cache_bytes_per_token
from deepseek.config.layout import (
    Layout,
    axes,
    data_parallel_size,
    kept_shape,
    num_stages,
    split_layers,
    stage_costs,
    stage_rank,
    world_size,
)
from deepseek.config.load import Planner, unchecked_value
from deepseek.config.memory import rank_memory, state_memory
from deepseek.config.rank_need import SHORT, host_needs, rank_needs
from deepseek.config.schema import ModelConfig
from deepseek.config.weights import weight_kinds
from deepseek.console import say, table

USUAL_NODE = 8
"""Processes of a node where the configuration names none: GPUs of a usual server."""
MOST_ROWS = 16
"""Longer tables are cut in the middle."""


RESERVED_GIB = 2
"""Of a GPU, for its context and NCCL: a usual size, not one that was measured."""


def validate(
    config: str,
    overrides: Sequence[str] = (),
    world: int | None = None,
    memory: float | None = None,
    planner: Planner | None = None,
) -> None:
    """Print the numbers of a sound configuration, and its layout if it has several processes.

    Args:
        config: name of a shipped configuration, or a YAML file.
        overrides: ``a.b=c``.
        world: processes of a cluster that need not be there; None: as configured.
        memory: of a GPU, in GiB; None: what is needed is not compared.
        planner: chooses what is ``auto``; None: nothing may be.

    Raises:
        ConfigError: every problem at once.
        UserError: ``world`` processes do not fill whole nodes, or ``memory`` is not enough.
    """
    if memory is not None and memory <= RESERVED_GIB:
        raise UserError(
            f"--memory {memory:g}: of a GPU, in GiB, {RESERVED_GIB} of which are its context's and "
            "NCCL's; use 80 or 141, say"
        )
    if world is not None:
        overrides = [*overrides, *cluster(config, overrides, world)]
    run = load_config(config, overrides, planner)
    say(f"{config} is sound")
    for what, value in [*summary(run, run.trainer.accelerator != "cpu"), ("data", _data(run))]:
        say(f"{what:<12} {value}")
    table("in numbers", ("what", "value"), validate_report(run))
    if world_size(run) > 1:
        for title, columns, rows in placement_tables(run):
            table(title, columns, rows)
        for note in placement_notes(run):
            say(f"note: {note}")
    else:
        table(*_memory(run))
    if memory is not None:
        _check_memory(run, config, overrides, memory)
    say(f"train it with: {shlex.join(['deepseek', 'train', '--config', config, *overrides])}")


def cluster(
    config: str,
    overrides: Sequence[str],
    world: int,
    option: str = "--world",
    aloud: bool = True,
) -> list[str]:
    """The overrides that make ``world`` processes: one node, or whole nodes as configured.

    Args:
        config: the configuration.
        overrides: given before.
        world: processes.
        option: that gave them, in messages.
        aloud: say what is set.

    Raises:
        UserError: they do not fill whole nodes.
    """
    devices = unchecked_value(config, overrides, "trainer.devices")
    nodes = unchecked_value(config, overrides, "trainer.num_nodes")
    if world < 1:
        raise UserError(f"{option} {world}: a cluster has at least 1 process; use 1 or more")
    if not isinstance(devices, int) or not isinstance(nodes, int) or devices < 1:
        return []  # the configuration's own problem is told
    node = USUAL_NODE if devices * nodes == 1 else devices
    if world <= node:
        if aloud:
            say(f"for {world} processes: one node (trainer.devices={world} trainer.num_nodes=1)")
        return [f"trainer.devices={world}", "trainer.num_nodes=1"]
    if world % node:
        fewer, more = world // node * node, -(-world // node) * node
        raise UserError(
            f"{option} {world}: nodes of {node} processes make {fewer} or {more}; use one of "
            f"these, or give trainer.devices another divisor of {world}"
        )
    if aloud:
        say(f"for {world} processes: trainer.num_nodes={world // node} of trainer.devices={node}")
    return [f"trainer.devices={node}", f"trainer.num_nodes={world // node}"]


# -- in a few lines --


def summary(run: RunConfig, on_gpu: bool) -> list[tuple[str, str]]:
    """Rows (what, value) of what people ask first; of a run, too, before its first step."""
    model, layout = run.model, Layout.of_run(run)
    counts = count_parameters(model)
    size = f"{_short(counts.total + counts.mtp)} parameters"
    size += f" ({_short(counts.mtp)} of them MTP)" if counts.mtp else ""
    size += f", {_short(counts.active)} active per token"
    if counts.adapters is not None:
        share = counts.adapters / counts.stored
        size += f"; {counts.adapters:,} of adapters are trained ({share:.2%} of the weights)"
    tokens = model.global_batch_size * model.data.seq_length
    micro_batches = model.global_batch_size // (model.micro_batch_size * layout.dp)
    most = max(rank_needs(run), key=lambda need: need.total)
    of_rank = " on the fullest rank" if layout.world_size > 1 else ""
    return [
        ("model", size),
        ("layout", _layout(run, layout)),
        (
            "step",
            f"{model.global_batch_size:,} sequences x {model.data.seq_length:,} = {tokens:,} "
            f"tokens in {micro_batches:,} x {model.micro_batch_size:,} per forward pass; "
            f"{_ramp(model)}{run.trainer.max_steps:,} steps, {_short(tokens_of_run(run))} tokens",
        ),
        (
            "memory",
            f"{size_text(most.total)} {'of a GPU' if on_gpu else 'of tensors'}{of_rank}, of which "
            f"{size_text(most.states)} are weights and optimiser states"
            + ("" if on_gpu else "; Python and torch need some 400 MiB besides")
            + _on_host(run),
        ),
    ]


def _on_host(run: RunConfig) -> str:
    """What a rank has in the memory of its host, as it stands behind that of a GPU."""
    model, processes = run.model, min(world_size(run), run.trainer.devices)
    kinds = ["activations"] * model.cpu_offloading_activations
    kinds += ["moments"] * model.optim.cpu_offload
    if not kinds:
        return ""
    most = max(map(sum, zip(host_needs(run), _moments_on_host(run), strict=True)))
    node = f", {size_text(most * processes)} of a node at most" if processes > 1 else ""
    return f"; {size_text(most)} of the host's memory for {' and '.join(kinds)}{node}"


def _moments_on_host(run: RunConfig) -> list[int]:
    """Bytes of the ranks at each place of the pipeline."""
    model, layout = run.model, Layout.of_run(run)
    ranks = (rank_memory(model, layout, pp, model.optim.name) for pp in range(layout.pp))
    return [rank.on_host for rank in ranks]


def _ramp(model: ModelConfig) -> str:
    """What comes before the whole batch, as it stands before the number of steps."""
    if model.rampup_batch_size is None:
        return ""
    *_, last = levels(model.global_batch_size, model.rampup_batch_size)
    tokens = _short(last.sample * model.data.seq_length)
    return (
        f"from {model.rampup_batch_size[0]:,} sequences in {last.step:,} steps, {tokens} tokens; "
    )


def _layout(run: RunConfig, layout: Layout) -> str:
    if layout.world_size == 1:
        return "1 process"
    model = run.model
    pipeline = f"PP {layout.pp} ({model.pipeline_schedule}, {num_stages(model)} stages)"
    sizes = {
        f"DP {layout.dp}": layout.dp > 1,
        f"{layout.dp_replicate} replicas": layout.dp_replicate > 1,
        f"CP {layout.cp}": layout.cp > 1,
        f"TP {layout.tp}": layout.tp > 1,
        pipeline: layout.pp > 1,
        f"EP {layout.ep}": layout.ep > 1,
    }
    used = ", ".join(text for text, shown in sizes.items() if shown)
    nodes = f" on {run.trainer.num_nodes:,} nodes" if run.trainer.num_nodes > 1 else ""
    return f"{layout.world_size:,} processes{nodes}: {used}"


def _data(run: RunConfig) -> str:
    """Where the tokens come from, as far as is known without reading them."""
    data = run.model.data
    if data.data_prefix is None:
        return "built-in corpus, prepared by the first run that needs it"
    entries = [1, data.data_prefix] if isinstance(data.data_prefix, str) else data.data_prefix
    return ", ".join(
        (f"{weight} of " if len(entries) > 2 else "") + _prefix(str(prefix))
        for weight, prefix in zip(entries[::2], entries[1::2], strict=True)
    )


def _prefix(prefix: str) -> str:
    try:
        return f"{prefix} ({json.loads(Path(f'{prefix}.json').read_bytes())['tokens']:,} tokens)"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return prefix  # without a record of prepare-data


# -- one model --


def validate_report(cfg: RunConfig) -> list[tuple[str, str]]:
    """Rows (what, value) of a configuration that ``check`` found sound."""
    model, trainer = cfg.model, cfg.trainer
    counts = count_parameters(model)
    memory = state_memory(model, model.optim.name)
    with_mtp = model.num_nextn_predict_layers > 0
    length = model.data.seq_length
    flops = flops_per_token(model, length, with_mtp)
    ranks = world_size(cfg)
    dp = data_parallel_size(model, ranks)
    assert dp is not None, "config/layout_rules.py lets this layout through"
    micro_batches = model.global_batch_size // (model.micro_batch_size * dp)
    tokens_per_step = model.global_batch_size * length
    total_tokens = tokens_of_run(cfg)
    number_bytes = 4 if str(trainer.precision).startswith("32") else 2
    cache = kv_cache_bytes_per_token(model, number_bytes)

    rows = [
        ("parameters", f"{_short(counts.total)} ({counts.total:,})"),
        (
            "active per token",
            f"{_short(counts.active)} ({counts.active:,}), "
            f"{_short(counts.active_without_embedding)} without the input embedding",
        ),
    ]
    if with_mtp:
        modules = model.num_nextn_predict_layers
        noun = "MTP module" if modules == 1 else "MTP modules"
        rows.append((f"{modules} {noun}", f"{_short(counts.mtp)} ({counts.mtp:,})"))
    if counts.adapters is not None:
        rows.append(
            (
                "trained by LoRA",
                f"{_short(counts.adapters)} ({counts.adapters:,}), "
                f"{counts.adapters / counts.stored:.2%} of the weights, which are frozen",
            )
        )
    rows += [
        (
            "FLOPs per token",
            f"{_flops(flops)} in training (causal, at {length:,} tokens"
            + (", with MTP)" if with_mtp else ")"),
        ),
        ("weights", f"{size_text(memory.weights)} (fp32)"),
        ("gradients", f"{size_text(memory.gradients)} (fp32)"),
        (
            "optimiser states",
            f"{size_text(memory.optimizer + memory.on_host)} ({model.optim.name}, "
            f"{model.optim.moments_dtype}{', on the host' if memory.on_host else ''})",
        ),
        (
            "states together",
            f"{size_text(memory.total)}, without activations"
            + (f", over {ranks:,} processes" if ranks > 1 else ""),
        ),
        ("KV cache per token", f"{cache:,} bytes ({'fp32' if number_bytes == 4 else 'bf16'})"),
        (
            "tokens per step",
            f"{tokens_per_step:,} ({model.global_batch_size:,} sequences x {length:,}, in "
            f"{micro_batches:,} micro-batches of {model.micro_batch_size:,}"
            + (" per rank)" if ranks > 1 else ")"),
        ),
        (
            "tokens of the run",
            f"{_short(total_tokens)} ({_ramp(model)}{trainer.max_steps:,} steps)",
        ),
        ("FLOPs of the run", f"{flops * total_tokens:.3g}"),
    ]
    return rows


# -- where it lies in a layout --


class Table(NamedTuple):
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def placement_tables(run: RunConfig) -> list[Table]:
    """The layout of a sound configuration of more than one process."""
    model, layout = run.model, Layout.of_run(run)
    tables = [_groups(layout, run.trainer.devices)]
    if layout.pp > 1:
        tables.append(_stages(model, layout))
    if layout.ep > 1:
        tables.append(_experts(model, layout))
    return [*tables, _weights(model, layout), _memory(run)]


def placement_notes(run: RunConfig) -> list[str]:
    """What is sound and yet costs: groups of much traffic that no node holds together."""
    layout, node = Layout.of_run(run), run.trainer.devices
    notes = []
    for axis in axes(layout):
        if axis.name in ("TP", "EP") and axis.crosses_nodes(layout.world_size, node):
            what = "activations of every layer" if axis.name == "TP" else "tokens of every layer"
            rule = (
                f"is wider than a node of {node}"
                if axis.size > node
                else f"does not divide a node of {node}"
            )
            notes.append(f"{axis.name} {axis.size} {rule}: {what} travel between nodes")
    return notes


def _groups(layout: Layout, node: int) -> Table:
    rows = [
        (
            axis.name,
            f"{axis.size:,}",
            f"{layout.world_size // axis.size:,}",
            ranks_text(range(0, axis.size * axis.stride, axis.stride)),
            "yes" if axis.crosses_nodes(layout.world_size, node) else "no",
        )
        for axis in axes(layout)
        if axis.size > 1
    ]
    nodes = -(-layout.world_size // node)
    title = f"{layout.world_size:,} ranks on {_count(nodes, 'node')} of {node:,}"
    return Table(title, ("axis", "ranks in a group", "groups", "first group", "cross nodes"), rows)


def _stages(model: ModelConfig, layout: Layout) -> Table:
    parts, costs, rows = split_layers(model), stage_costs(model), []
    loads = [0] * layout.pp
    for stage, cost in enumerate(costs):
        loads[stage_rank(model, stage)] += cost
    for stage, part in enumerate(parts):
        holder = stage_rank(model, stage)
        dense = sum(not model.is_moe_layer(layer) for layer in part.layers)
        kinds = [_count(dense, "dense"), _count(len(part.layers) - dense, "MoE")]
        held = "none"
        if part.layers:
            held = f"{ranks_text(part.layers)} ({', '.join(k for k in kinds if k[0] != '0')})"
        more = ["embedding"] if part.first else []
        more += ["norm", "head"] if part.main else []
        if model.num_nextn_predict_layers:
            more += ["MTP", "a copy of the embedding"] if part.ahead else []
            more += ["MTP's loss", "a copy of the head"] if part.last and not part.main else []
        first = holder * layout.stage_ranks
        rows.append(
            (
                str(stage),
                held,
                ", ".join(more),
                f"{ranks_text(range(first, first + layout.stage_ranks))} (PP {holder})",
                f"{100 * costs[stage] / max(costs):.0f} %",
            )
        )
    idle = 1 - sum(loads) / len(loads) / max(loads)
    title = (
        f"{num_stages(model)} pipeline stages ({model.pipeline_schedule}); by their work ranks "
        f"wait {100 * idle:.1f} % for the costliest"
    )
    columns = ("stage", "layers", "with", "ranks", "work of the costliest")
    return Table(title, columns, _shortened(rows))


def _experts(model: ModelConfig, layout: Layout) -> Table:
    each = model.n_routed_experts // layout.ep
    rows = [
        (
            ranks_text(range(ep * each, (ep + 1) * each)),
            str(ep),
            ranks_text(range(ep, layout.world_size, layout.ep)),
        )
        for ep in range(layout.ep)
    ]
    title = "experts of the MoE layers, on the ranks that hold the layer"
    return Table(title, ("experts", "EP rank", "ranks"), _shortened(rows))


def _weights(model: ModelConfig, layout: Layout) -> Table:
    """One weight of each kind; norms and biases are left out."""
    rows = [
        (
            weight.name,
            _shape(weight.shape),
            _shape(weight.divided(layout.tp, layout.ep)),
            _shape(kept_shape(weight, layout)),
        )
        for weight in weight_kinds(model)
        if len(weight.shape) > 1
    ]
    columns = ("weight", "whole", "computed with on a rank", "kept on a rank")
    title = (
        f"shapes: TP {layout.tp} and EP {layout.ep} divide the work, {layout.dp_shard:,} data "
        f"shards and {layout.edp:,} expert shards the memory"
    )
    return Table(title, columns, rows)


def _memory(run: RunConfig) -> Table:
    needs = rank_needs(run)
    layout = Layout.of_run(run)
    rows: list[tuple[str, ...]] = [
        (
            _ranks_of(layout, pp),
            *(size_text(part) if part else "-" for part in need),
            size_text(need.total),
        )
        for pp, need in enumerate(needs)
    ]
    most = max(need.total for need in needs)
    model, beside = run.model, ""
    if model.optim.cpu_offload:
        beside = f", and {size_text(max(_moments_on_host(run)))} of the host's for moments"
    title = f"memory of one rank on GPUs, at most {size_text(most)} with balanced experts{beside}"
    columns: tuple[str, ...] = (
        "ranks",
        "states",
        "gathered weights",
        "gradients",
        "activations",
        "receive buffers",
        "working",
        "together",
    )
    if run.model.cpu_offloading_activations:
        columns += ("activations on the host",)
        rows = [(*row, size_text(host)) for row, host in zip(rows, host_needs(run), strict=True)]
    if layout.world_size == 1:
        title = f"memory on a GPU, {size_text(most)} with balanced experts{beside}"
        return Table(title, columns[1:], [row[1:] for row in rows])
    return Table(title, columns, _shortened(rows))


# -- does it fit --


def _check_memory(run: RunConfig, config: str, overrides: Sequence[str], memory: float) -> None:
    """Say that every rank fits into so many GiB, or does so but for the room of ``SHORT``.

    Raises:
        UserError: one does not; with what does, if the usual means are enough.
    """
    layout, totals = Layout.of_run(run), [need.total for need in rank_needs(run)]
    most = max(totals)
    where = f" (ranks {_ranks_of(layout, totals.index(most))})" if layout.world_size > 1 else ""
    told = (
        f"needs {size_text(most)}{where} and {RESERVED_GIB} GiB for context and NCCL of "
        f"--memory {memory:g}"
    )
    if _fits(run, memory):
        say(f"{told}: fits")
        return
    if _fits(run, memory, short=0):
        say(f"{told}: tight, since what is told may be {100 * SHORT:.0f} % short")
        return
    for changes in _ways_out(run):
        try:
            other = load_config(config, [*overrides, *changes])
        except UserError:
            continue
        if _fits(other, memory):
            raise UserError(f"{config} {told}: does not fit; use {' '.join(changes)}")
    raise UserError(
        f"{config} {told}: does not fit, and neither recomputation, smaller micro-batches, more "
        "expert parallelism nor 4 times the nodes alone are enough; use more "
        "model.pipeline_model_parallel_size, or a larger --memory"
    )


def _fits(run: RunConfig, memory: float, short: float = SHORT) -> bool:
    most = max(need.total for need in rank_needs(run)) * (1 + short)
    return most <= (memory - RESERVED_GIB) * 2**30


def _ways_out(run: RunConfig) -> Iterator[tuple[str, ...]]:
    """Changes that save memory, the cheapest in time first, then two at once."""
    model = run.model
    ways = ["model.activations_checkpoint_granularity=full"]
    if model.pipeline_model_parallel_size == 1:
        ways += ["model.reduce_gradients=true", "model.reshard_after_forward=true"]
    elif model.pipeline_schedule != "1F1B":
        ways.append("model.pipeline_schedule=1F1B")
    ways += [f"model.micro_batch_size={n}" for n in (2, 1) if n < model.micro_batch_size]
    ep = model.expert_model_parallel_size
    ways += [f"model.expert_model_parallel_size={ep * n}" for n in (2, 4, 8)]
    ways += [f"trainer.num_nodes={run.trainer.num_nodes * n}" for n in (2, 4)]
    yield from ((way,) for way in ways)
    yield from combinations(ways, 2)


def _ranks_of(layout: Layout, pp_rank: int) -> str:
    return ranks_text(range(pp_rank * layout.stage_ranks, (pp_rank + 1) * layout.stage_ranks))


# -- text --


def _short(number: int) -> str:
    """Two decimals and a unit, such as 671.03 B."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number:,}"


def _flops(number: int) -> str:
    """Two decimals and a unit, such as 249.81 GFLOP."""
    for unit, factor in (("TFLOP", 10**12), ("GFLOP", 10**9)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number / 10**6:,.2f} MFLOP"


def size_text(count: int) -> str:
    """Bytes in a binary unit, such as 2.48 TiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 2**10:,.2f} KiB"


def ranks_text(numbers: range) -> str:
    """``3``, ``0-15``, ``0, 8`` or ``0, 8, ..., 120``."""
    if len(numbers) == 1:
        return f"{numbers[0]}"
    if numbers.step == 1:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if noun == 'node' and number != 1 else ''}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _shortened(rows: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """The first and last rows of a long table."""
    if len(rows) <= MOST_ROWS:
        return rows
    half = MOST_ROWS // 2
    gap = (f"... {len(rows) - 2 * half} more", *[""] * (len(rows[0]) - 1))
    return [*rows[:half], gap, *rows[-half:]]
