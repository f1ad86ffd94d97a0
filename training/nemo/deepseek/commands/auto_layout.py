"""Values for the keys of a layout that are ``auto``: the planner's best for the devices at hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deepseek.commands.validate import RESERVED_GIB, size_text
from deepseek.commands.versions import run_folder
from deepseek.config import ConfigError, RunConfig, UserError, load_config
from deepseek.config.errors import shown
from deepseek.config.layout import DEVICES, PLANNED, world_size
from deepseek.config.load import Planner
from deepseek.config.rules import joint_problems
from deepseek.config.schema import changed, value_at
from deepseek.console import say
from deepseek.planner.hardware import Device, gpu_named
from deepseek.run_folder import CONFIG_FILE

ASSUMED = "H100"
"""The GPU of a configuration for GPUs on a machine without."""
CPU_SHARE = 0.8
"""Of a machine's memory, what all its processes may take."""


def auto_layout(run_dir: Path | None = None, told: bool = True) -> Planner:
    """What ``load_config`` asks for values that are ``auto``.

    Args:
        run_dir: as for ``train``. A run that goes on there keeps the values that it began with, as
            long as it has as many processes.
        told: say what was chosen, and why.
    """

    def choose(run: RunConfig, auto: Sequence[str]) -> Mapping[str, object]:
        from deepseek.commands.plan import layout_text, way_out
        from deepseek.planner.search import search

        device, room, what = _device(run)
        if DEVICES in auto:
            run = changed(run, {DEVICES: _devices_here(run)})
        kept = _as_begun(run, auto, run_dir)
        if kept is not None:
            if told:
                say(f"layout       {' '.join(settings_of(kept))}: as the run began")
            return kept
        if run.trainer.precision == "auto" and device.name == "CPU":
            run = changed(run, {"trainer.precision": "32"})
        fixed = [key for key in PLANNED if key not in auto]
        plans = search(run, device, room, 2, fixed)
        if not plans:
            told_by_plan = way_out(run, device, room / 2**30, fixed)
            raise UserError(f"{told_by_plan} (--nodes and --memory are those of deepseek plan)")
        best, *others = plans
        values = {key: value_at(best.run, key) for key in auto}
        if told:
            chosen = " ".join(settings_of(values))
            say(f"layout       {chosen}: the fastest of {world_size(run):,} {what}")
            reason = f"{layout_text(best.run)}, {size_text(best.most)} of the fullest rank"
            reason += ", which is tight" * best.tight(room)
            for other in others:
                slower = other.estimate.seconds / best.estimate.seconds - 1
                reason += f"; {100 * slower:.3g} % before {layout_text(other.run)}"
            say(f"             {reason}, as predicted")
        return values

    return choose


def settings_of(values: Mapping[str, object]) -> list[str]:
    """``a.b=c`` of each."""
    return [f"{key}={shown(value)}" for key, value in values.items()]


def _as_begun(
    run: RunConfig, auto: Sequence[str], run_dir: Path | None
) -> dict[str, object] | None:
    """The values of a run that goes on, if they are still sound."""
    if not run.exp_manager.resume_if_exists:
        return None
    file = run_folder(run, run_dir) / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        begun = load_config(file)
    except ConfigError:
        return None
    values = {key: value_at(begun, key) for key in auto}
    same = world_size(begun) == world_size(changed(run, values))
    return values if same and not joint_problems(changed(run, values), ()) else None


# -- the devices at hand --


def _device(run: RunConfig) -> tuple[Device, float, str]:
    """What one process has, the bytes that it can take, and how to speak of several."""
    if run.trainer.accelerator != "cpu":
        import torch

        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory - RESERVED_GIB * 2**30
            name = torch.cuda.get_device_name()
            try:
                return gpu_named(name), memory, f"{name} here"
            except UserError:
                return gpu_named(ASSUMED), memory, f"{name} here, taken to be as fast as {ASSUMED}"
        if run.trainer.accelerator == "gpu":
            device = gpu_named(ASSUMED)
            room = device.memory - RESERVED_GIB * 2**30
            return device, room, f"{ASSUMED}, which are assumed, as there is no GPU here"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    room = CPU_SHARE * memory / run.trainer.devices
    return replace(CPU, memory=room, domain=run.trainer.devices), room, "processes of this CPU"


def _devices_here(run: RunConfig) -> int:
    """GPUs of this machine; of a CPU, whose processes share their cores, one."""
    if run.trainer.accelerator == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


CPU = Device(
    "CPU", 150e9, 150e9, 8e9, 10e9, 2e9, 1, 1e8, None,
    "a guess at one core of a server with AVX2; processes exchange through shared memory", "",
)  # fmt: skip
"""Of one process."""
