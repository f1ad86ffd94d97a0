"""``deepseek plan``: the fastest layouts of GPUs that need not be there, and what they take."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek.commands.device import device_named
from deepseek.commands.estimate import not_counted
from deepseek.commands.validate import RESERVED_GIB, USUAL_NODE, size_text
from deepseek.config import UserError, shipped_configs
from deepseek.config.batch_ramp import tokens_of_run
from deepseek.config.errors import shown
from deepseek.config.layout import PLANNED, Layout, world_size
from deepseek.config.load import draft_config
from deepseek.config.rules import check, joint_problems
from deepseek.config.schema import LEAVES, RunConfig, changed, value_at
from deepseek.config.yaml_file import dump_yaml, read_yaml
from deepseek.console import say, table
from deepseek.files import refuse_existing, write_new
from deepseek.planner.hardware import Device
from deepseek.planner.scaling_curve import gains, with_features
from deepseek.planner.search import Plan, search, smallest

STAGES = ("model.pipeline_layers_per_stage", "model.pipeline_output_stages")
"""Keys of a split by hand, which only the layout that it is of can have."""
MICRO_BATCH = "model.micro_batch_size"
OF_EXPERTS = (
    "model.moe_token_dispatcher_type",
    "model.moe_ranks_per_node",
    "model.moe_dispatch_fp8",
    "model.overlap_moe_expert_parallel_comm",
)
"""Keys that stay as they are, and that only layouts with EP can have."""
OF_OTHERS = ("model.fp8_recipe", "model.peft.base_dtype", "model.cpu_offloading_activations")
"""Keys that stay, and that not all layouts can have."""
COLUMNS = (
    "",
    "layout",
    "tok/s/GPU",
    "MFU",
    "bubble",
    "exposed",
    "memory (mean)",
    "days",
    "GPU hours",
    "cost",
)
DOUBLINGS = 7
"""Of the nodes, as a way out: 64 times as many are looked at."""


def plan(
    config: str,
    overrides: Sequence[str] = (),
    gpu: str = "H100",
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    memory: float | None = None,
    tokens: float | None = None,
    top: int = 10,
    as_json: bool = False,
    write: Path | None = None,
    explain: bool = False,
    html: Path | None = None,
) -> None:
    """Print the fastest layouts of a configuration's model and global batch.

    Args:
        config: name of a shipped configuration, or a YAML file; the layout in it does not matter.
        overrides: ``a.b=c``; what of a layout is given here stays.
        gpu: name, or a file of ``deepseek calibrate``.
        nodes: of the cluster; None: as configured.
        gpus_per_node: None: as configured, or the usual number.
        memory: of a GPU, in GiB; None: as its data sheet says.
        tokens: of the training; None: of the configured steps.
        top: number of layouts.
        as_json: print one JSON object instead.
        write: new YAML file of the fastest layout.
        explain: show where its seconds and bytes go, and what would help.
        html: new file of a picture of its pipeline and memory.

    Raises:
        ConfigError: every problem of the configuration, whatever its layout.
        UserError: no such GPU, no layout is legal, or none fits; with the nearest that does.
    """
    room_of(device_named(gpu, 1), memory)  # what is wrong is told first
    if tokens is not None and not 0 < tokens < math.inf:
        raise UserError(f"--tokens {tokens:g}: must be above 0, such as 14.8e12")
    for file in filter(None, (write, html)):
        refuse_existing(file)
    run, fixed = cluster(config, overrides, nodes, gpus_per_node)
    device = device_named(gpu, world_size(run))
    room = room_of(device, memory)
    found = search(run, device, room * 2**30, top, fixed)
    if not found:
        raise UserError(way_out(run, device, room, fixed))
    problems = check(found[0].run)
    assert not problems, f"the planner's layout breaks rules: {problems}"
    total = tokens or tokens_of_run(run)
    rows = _rows(found, device, room, total)
    if as_json:
        say(json.dumps(_json(found, device, total), indent=2))
    else:
        _show(config, found, device, room, total)
        table("fastest layouts", COLUMNS, rows)
        if without := not_counted(run):
            say(f"not counted: {', '.join(without)}: memory is with it, time as without")
    if explain and not as_json:
        _explain(found[0], device, fixed)
    if html is not None:
        from deepseek.commands.plan_page import plan_page  # with numpy

        title = f"plan of {config}"
        write_new(html, plan_page(title, COLUMNS, rows, found[0], device, room * 2**30))
        if not as_json:
            say(f"wrote {html}")
    if write is not None:
        write_new(write, _yaml(config, overrides, write, found[0], device))
        if not as_json:
            say(f"wrote {write}; see it with: deepseek validate --config {shlex.quote(str(write))}")


def room_of(device: Device, memory: float | None) -> float:
    """GiB that a rank can take, of ``memory`` or what the data sheet says.

    Raises:
        UserError: nothing is left.
    """
    if memory is not None and not reserved(device) < memory < math.inf:
        raise UserError(
            f"--memory {memory:g}: of a GPU, in GiB, {reserved(device):.3g} of which are its "
            "context's and NCCL's; use 80 or 141, say"
        )
    return (device.memory / 2**30 if memory is None else memory) - reserved(device)


def reserved(device: Device) -> float:
    """GiB of a device that no layout can take."""
    return device.cpu.resident / 2**30 if device.cpu else RESERVED_GIB


def cluster(
    config: str, overrides: Sequence[str], nodes: int | None, gpus_per_node: int | None
) -> tuple[RunConfig, list[str]]:
    """The run on so many GPUs, without a layout, and the keys of one that stay as given.

    Args:
        config: name of a shipped configuration, or a YAML file.
        overrides: ``a.b=c``.
        nodes: None: as configured.
        gpus_per_node: None: as configured, or the usual number.

    Raises:
        ConfigError: every problem of the configuration, whatever its layout.
    """
    given = {word.partition("=")[0].lstrip("-+").strip() for word in overrides}
    layout: dict[str, object] = {key: LEAVES[key].default for key in PLANNED if key not in given}
    layout |= {key: LEAVES[key].default for key in STAGES if key not in given}
    alone = {key: LEAVES[key].default for key in (*PLANNED, *STAGES)} | {
        **{key: LEAVES[key].default for key in OF_EXPERTS},
        MICRO_BATCH: 1,
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
    }
    run, auto = draft_config(config, overrides, alone)
    trainer = run.trainer
    devices = gpus_per_node or (trainer.devices if world_size(run) > 1 else USUAL_NODE)
    cluster = {"trainer.devices": devices, "trainer.num_nodes": nodes or trainer.num_nodes}
    return changed(run, layout | cluster), [k for k in PLANNED if k in given and k not in auto]


def _step_tokens(run: RunConfig) -> int:
    return run.model.global_batch_size * run.model.data.seq_length


# -- what is shown --


def _show(config: str, found: list[Plan], device: Device, room: float, total: float) -> None:
    run = found[0].run
    world, estimate = world_size(run), found[0].estimate
    say(
        f"{config} on {world:,} {device} ({run.trainer.num_nodes:,} x {run.trainer.devices}), "
        f"{_step_tokens(run):,} tokens a step, {total:.4g} in all; memory {room:.4g} GiB and "
        f"{reserved(device):.3g} for {'the program' if device.cpu else 'context and NCCL'}"
    )
    say(f"MFU: of {device.peak}; FLOPs {estimate.convention}")


def _rows(found: list[Plan], device: Device, room: float, total: float) -> list[tuple[str, ...]]:
    """Of ``COLUMNS``."""
    rows: list[tuple[str, ...]] = []
    for number, one in enumerate(found, 1):
        figures = _figures(one, device, total)
        rows.append(
            (
                str(number),
                layout_text(one.run),
                f"{figures['tokens_per_s_per_gpu']:,.0f}",
                f"{100 * figures['mfu']:.1f} %",
                f"{100 * figures['bubble']:.0f} %",
                f"{100 * figures['exposed']:.0f} %",
                f"{size_text(one.most)} ({100 * one.balance:.0f} %)"
                + " tight" * one.tight(room * 2**30),
                f"{figures['days']:,.3g}",
                f"{figures['gpu_hours']:,.{0 if figures['gpu_hours'] >= 10 else 2}f}",
                "-" if figures["cost"] is None else f"${figures['cost']:,.0f}",
            )
        )
    return rows


def layout_text(run: RunConfig) -> str:
    """A layout in one line, without what is 1 or as usual."""
    model, layout = run.model, Layout.of_run(run)
    virtual = model.virtual_pipeline_model_parallel_size
    parts = {
        f"TP{layout.tp}": layout.tp > 1,
        f"PP{layout.pp}" + (f"x{virtual}" if virtual > 1 else ""): layout.pp > 1,
        f"CP{layout.cp}": layout.cp > 1,
        f"EP{layout.ep}": layout.ep > 1,
        f"DP{layout.dp}": layout.dp > 1,
        f"({layout.dp_replicate} replicas)": layout.dp_replicate > 1,
        model.pipeline_schedule: layout.pp > 1,
        f"micro {model.micro_batch_size}": True,
        f"recompute {model.activations_checkpoint_granularity}": bool(
            model.activations_checkpoint_granularity
        ),
        "reshard": model.reshard_after_forward is True,
        "no reshard": model.reshard_after_forward is False,
        "reduce each": model.reduce_gradients is True,
        "reduce once": model.reduce_gradients is False,
    }
    return " ".join(text for text, shown in parts.items() if shown)


def _figures(one: Plan, device: Device, total: float) -> dict[str, Any]:
    """What a layout comes to; shares are of the step."""
    estimate, world = one.estimate, world_size(one.run)
    seconds = total / (estimate.tokens_per_s_per_gpu * world)
    hours = seconds * world / 3600
    parts = estimate.parts
    exposed = sum(value for part, value in parts.items() if "exposed" in part)
    return {
        "step_time_s": estimate.seconds,
        "tokens_per_s_per_gpu": estimate.tokens_per_s_per_gpu,
        "tflops_per_gpu": estimate.tflops_per_gpu,
        "mfu": estimate.mfu,
        "bubble": parts.get("pipeline bubble", 0.0) / estimate.seconds,
        "exposed": exposed / estimate.seconds,
        "memory_bytes": one.most,
        "memory_balance": one.balance,
        "days": seconds / 86400,
        "gpu_hours": hours,
        "cost": None if device.price is None else hours * device.price,
    }


def _json(found: list[Plan], device: Device, total: float) -> dict[str, Any]:
    run = found[0].run
    return {
        "gpu": device.name,
        "gpus": world_size(run),
        "tokens": total,
        "mfu_peak_tflops": device.bf16 / 1e12,
        "not_counted": not_counted(run),
        "flop_convention": str(found[0].estimate.convention),
        "gain_if_twice_as_fast": gains(found[0], device),
        "layouts": [
            {
                "layout": {key.removeprefix("model."): value for key, value in one.values.items()},
                **_figures(one, device, total),
                "seconds": one.estimate.parts,
                "bytes_of_ranks": [need._asdict() for need in one.needs],
            }
            for one in found
        ],
    }


def _explain(best: Plan, device: Device, fixed: Sequence[str]) -> None:
    """Where its seconds and bytes go, and what would make it faster."""
    estimate = best.estimate
    rows = [
        (part, f"{seconds:.4g} s", f"{100 * seconds / estimate.seconds:.1f} %")
        for part, seconds in estimate.parts.items()
    ]
    table(f"a step of {estimate.seconds:.4g} s, on the rank with most work", _OF, rows)
    need = max(best.needs, key=lambda need: need.total)
    rows = [
        (part, size_text(size), f"{100 * size / need.total:.1f} %")
        for part, size in need._asdict().items()
    ]
    table(f"{size_text(need.total)} of the fullest rank", _OF, rows)
    won = gains(best, device)
    faster = [
        (f"{what} twice as fast", f"{100 * gain:+.1f} %")
        for what, gain in sorted(won.items(), key=lambda item: -item[1])
    ]
    free = search(best.run, device, math.inf, 1, fixed)[0]
    gain = estimate.seconds / free.estimate.seconds - 1
    faster.append((f"memory without end: {layout_text(free.run)}", f"{100 * gain:+.1f} %"))
    table("what would make it faster", ("what", "tokens/s"), faster)
    say(f"next bottleneck: {max(won, key=lambda what: won[what])}")
    if device.cpu is None:
        rates = with_features(best, device)
        first = rates["as it is"]
        rows = [
            (k, f"{rate:,.0f}", f"{100 * (rate / first - 1):+.1f} %") for k, rate in rates.items()
        ]
        table("what other programs do, one after the other", ("what", "tok/s/GPU", "in all"), rows)


_OF = ("what", "of it", "share")


def _yaml(config: str, overrides: Sequence[str], file: Path, best: Plan, device: Device) -> str:
    """The configuration with the layout, over the one that it is of."""
    run = best.run
    if config in shipped_configs():
        base = config
    else:
        try:
            base = str(Path(config).resolve().relative_to(file.parent.resolve()))
        except ValueError:
            base = str(Path(config).resolve())
    tree: dict[str, Any] = {"extends": base}

    def put(path: str, value: object) -> None:
        *sections, last = path.split(".")
        inner = tree
        for name in sections:
            inner = inner.setdefault(name, {})
        inner[last] = value

    for word in overrides:
        key, _, text = word.partition("=")
        put(key.lstrip("-+").strip(), read_yaml(text, "").tree)
    for key in ("trainer.devices", "trainer.num_nodes", *PLANNED):
        put(key, value_at(run, key))
    for key in STAGES:
        if value_at(run, key) == LEAVES[key].default:
            put(key, LEAVES[key].default)
    estimate = best.estimate
    return (
        f"# The fastest layout on {world_size(run):,} {device}, by deepseek plan:\n"
        f"# {layout_text(run)}\n"
        f"# {estimate.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {estimate.seconds:.4g} s a step, "
        f"{size_text(best.most)} of the fullest rank (predicted)\n{dump_yaml(tree)}"
    )


# -- what does not work out --


def way_out(run: RunConfig, device: Device, room: float, fixed: Sequence[str]) -> str:
    """Why there is no plan, and the nearest cluster for which there is one.

    Args:
        run: on a cluster.
        device: of it.
        room: GiB of one, without what is reserved.
        fixed: keys that stay as they are.
    """
    world = world_size(run)
    least = smallest(run, device, fixed)
    what = f"{world:,} {device}"
    if least is None:
        batch = run.model.global_batch_size
        given = f" and {', '.join(fixed) if len(fixed) < 4 else 'the rest of the layout'} as given"
        told = f"no layout of {what} is legal with model.global_batch_size={batch}"
        told += given if fixed else ""
        for key in OF_EXPERTS:
            value, usual = value_at(run, key), LEAVES[key].default
            if value != usual and smallest(changed(run, {key: usual}), device, fixed):
                return (
                    f"no layout of {what} is legal with {key}={shown(value)}"
                    f"{given if fixed else ''}; use {shown(usual)}, or other --nodes"
                )
        more = -(-batch // world) * world
        if smallest(changed(run, {"model.global_batch_size": more}), device, fixed) is None:
            alone = changed(run, {} if MICRO_BATCH in fixed else {MICRO_BATCH: 1})
            blamed = {*fixed, *OF_OTHERS}
            faults = [str(p) for p in joint_problems(alone, ()) if p.field in blamed]
            return f"{told}: {'; '.join(faults) or 'use other --nodes'}"
        batches = " or ".join(map(str, sorted({max(1, batch // world) * world, more})))
        return f"{told}; use model.global_batch_size={batches}, or other --nodes"
    need = least.most / 2**30 + reserved(device)
    told = (
        f"nothing fits {what}: the least is {need:,.1f} GiB of a GPU ({layout_text(least.run)}), "
        f"and there are {room + reserved(device):,.4g}"
    )
    ways = [f"--memory {-(-need // 1):.0f} or more"]
    for nodes in (run.trainer.num_nodes << doubled for doubled in range(1, DOUBLINGS)):
        larger = changed(run, {"trainer.num_nodes": nodes})
        least = smallest(larger, device, fixed)
        if least is not None and least.most <= room * 2**30:
            best = search(larger, device, room * 2**30, 1, fixed)[0]
            took = f"{layout_text(best.run)}, {size_text(best.most)}"
            ways.insert(0, f"--nodes {nodes} ({took})")
            break
    return f"{told}; use {', or '.join(ways)}"
