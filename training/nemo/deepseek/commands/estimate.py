"""``deepseek estimate``: what one layout computes, holds, sends and takes, before it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek.commands.device import device_named
from deepseek.commands.validate import cluster, size_text, summary
from deepseek.config import RunConfig, UserError, load_config
from deepseek.config.cost import count_parameters
from deepseek.config.errors import shown
from deepseek.config.layout import world_size
from deepseek.config.rank_need import rank_needs
from deepseek.config.schema import value_at
from deepseek.console import say, table
from deepseek.planner.cpu import resident_bytes
from deepseek.planner.fitted_rows import FITTED_ROWS
from deepseek.planner.hardware import Device
from deepseek.planner.published import predict_row
from deepseek.planner.step_time import StepEstimate, predict_step, traffic


def estimate(
    config: str,
    overrides: Sequence[str] = (),
    gpu: str = "H100",
    gpus: int | None = None,
    as_json: bool = False,
) -> None:
    """Print the figures of a configuration's layout.

    Args:
        config: name of a shipped configuration, or a YAML file.
        overrides: ``a.b=c``.
        gpu: name, or a file of ``deepseek calibrate``.
        gpus: of the cluster, or processes; None: as configured.
        as_json: print one JSON object instead.

    Raises:
        ConfigError: every problem of the configuration.
        UserError: a GPU that is not known, or GPUs that do not fill whole nodes.
    """
    device_named(gpu, 1)  # a wrong name is told first
    if gpus is not None:
        overrides = [*overrides, *cluster(config, overrides, gpus, "--gpus", not as_json)]
    run = load_config(config, overrides)
    device = device_named(gpu, world_size(run))
    step = predict_step(run, device, world_size(run))
    if as_json:
        say(json.dumps(_figures(run, step), indent=1))
        return
    for what, value in summary(run, on_gpu=not device.cpu):
        say(f"{what:<12} {value}")
    say(
        f"{'time':<12} {_seconds(step.seconds)} a step on {world_size(run):,} {device}: "
        f"{step.tokens_per_s_per_gpu:,.0f} tokens/s and {step.tflops_per_gpu:,.0f} TFLOP/s a GPU"
    )
    say(f"{'MFU':<12} {step.mfu:.1%} of {device.peak}; FLOPs {step.convention}")
    if without := not_counted(run):
        say(f"{'not counted':<12} {', '.join(without)}: memory is with it, time as without")
    rows = [
        (part, _seconds(seconds), f"{seconds / step.seconds:.1%}")
        for part, seconds in step.parts.items()
    ]
    table("time of the rank with most work", ("what", "of a step", "share"), rows)
    sent = traffic(step.job, device)
    by_link: list[Sequence[str]] = [
        (what, *(size_text(round(count)) if count else "-" for count in counts))
        for what, counts in sent.items()
    ]
    table("sent by one GPU in a step", ("for", "over the network", "over NVLink"), by_link)
    most = max(need.total for need in rank_needs(run))
    if device.cpu:
        most = resident_bytes(run, device)
        say(f"{'resident':<12} {size_text(most)} of the fullest process")
    if most > device.memory:
        say(
            f"{size_text(most)} are more than the {size_text(round(device.memory))} of one "
            f"{device}; `deepseek plan {config} --gpu {device}` finds layouts that fit"
        )


def not_counted(run: RunConfig) -> list[str]:
    """Settings that the model of time does not know, as ``key=value``."""
    keys = (
        "model.peft",
        "model.fp8_recipe",
        "model.fp8_kernels",
        "model.optim.cpu_offload",
        "model.cpu_offloading_activations",
    )
    values = ((key, value_at(run, key)) for key in keys)
    told = {"model.peft": "model.peft"}
    return [told.get(key) or f"{key}={shown(value)}" for key, value in values if value]


def estimate_published(file: Path) -> None:
    """Print, as JSON, what is predicted of every row of a table of published runs.

    Args:
        file: JSON, a list of rows.

    Raises:
        UserError: it is no such file.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_row)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"--published {file}: cannot be read: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--published {file}: is not JSON: {error}") from None
    except UserError as error:
        raise UserError(f"--published {file}: {error}") from None
    if not isinstance(rows, list):
        raise UserError(
            f"--published {file}: must be a list of rows, such as "
            '[{"name": "mine", "model": "DeepSeek-V3", "gpu": "H100", "gpus": 1024, "pp": 8}]'
        )
    fitted = {name for names in FITTED_ROWS.values() for name in names}
    found = []
    for row in rows:
        told = predict_row(row)
        if "why_not" not in told:
            told["kind"] = "fitted" if told["name"] in fitted else "predicted"
        found.append(told)
    say(json.dumps(found, indent=1, allow_nan=False))


def _row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key is there twice: JSON would take the last, silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(
            f"row {row.get('name')!r} has the key {twice!r} {keys.count(twice)} times; keep one"
        )
    return row


def _figures(run: RunConfig, step: StepEstimate) -> dict[str, Any]:
    counts, needs = count_parameters(run.model), rank_needs(run)
    device: Device = step.device
    return {
        "parameters": counts.total + counts.mtp,
        "active_parameters": counts.active,
        "flops_per_token": round(step.tflops_per_gpu * 1e12 / step.tokens_per_s_per_gpu),
        "flop_convention": str(step.convention),
        "gpu": device.name,
        "gpus": step.job.ranks.world,
        "step_time_s": step.seconds,
        "tokens_per_s_per_gpu": step.tokens_per_s_per_gpu,
        "tflops_per_gpu": step.tflops_per_gpu,
        "mfu": step.mfu,
        "mfu_peak_tflops": device.bf16 / 1e12,
        "seconds": step.parts,
        "not_counted": not_counted(run),
        "sent_bytes": {
            what: {"network": far, "nvlink": near}
            for what, (far, near) in traffic(step.job, device).items()
        },
        "resident_bytes": resident_bytes(run, device),
        "memory_bytes": [{**need._asdict(), "total": need.total} for need in needs],
        "stages": [time._asdict() for time in step.stages],
        "layout": step.job.ranks._asdict(),
        "system": asdict(step.job.system),
    }


def _seconds(value: float) -> str:
    """Four figures, in the unit that suits."""
    if value and abs(value) < 0.1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.{max(0, 3 - math.floor(math.log10(max(value, 1))))}f} s"
