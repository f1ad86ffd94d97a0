"""``deepseek doctor``: whether the machines are fit to train on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from deepseek.checkpoint.ranks import Ranks
from deepseek.commands.versions import run_folder
from deepseek.config import RunConfig, UserError, load_config
from deepseek.config.memory import checkpoint_bytes
from deepseek.console import complain, say, table
from deepseek.launch.processes import Processes, join, leave, quiet
from deepseek.launch.supervisor import supervise, worker_command

JOIN_TIMEOUT = timedelta(minutes=5)


def doctor(
    config: str,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    devices: int | None = None,
    as_json: bool = False,
) -> None:
    """Look at this machine; with several processes also at what lies between them.

    Args:
        config: of the run that is to come: how many processes, how large a checkpoint.
        overrides: ``a.b=c``.
        run_dir: where it is to write, instead of under ``exp_manager.exp_dir``.
        devices: processes to start here, if none did; None: ``trainer.devices``.
        as_json: print one JSON object instead of a table.

    Raises:
        ConfigError: every problem of the configuration at once.
        UserError: a check fails.
    """
    processes = Processes.from_environment()
    quiet(processes)
    run = load_config(config, overrides)
    trainer = run.trainer
    count = trainer.devices if devices is None else devices
    if processes.started_by == "none" and count > 1:
        sys.exit(supervise(worker_command(), count, 0, complain))
    if processes.started_by == "torchrun" and devices is not None:
        raise UserError("--devices would be ignored under torchrun; leave it out")
    # Imported here: torch takes a second, and a configuration error should not wait for it.
    import torch

    from deepseek.launch.health import disk_check, group_checks, kernel_check, local_checks, worst

    if trainer.num_threads:
        torch.set_num_threads(trainer.num_threads)
    on_gpu = torch.cuda.is_available() and trainer.accelerator != "cpu"
    local_world_size = max(processes.local_world_size, 1)
    world_size = max(trainer.devices * trainer.num_nodes, processes.world_size)
    checks = local_checks(local_world_size, on_gpu, run.model.data.num_workers, world_size)
    checks += [] if on_gpu else kernel_check()
    checks += disk_check(_existing(run_folder(run, run_dir)), _kept_bytes(run))
    of_ranks = [checks]
    if processes.world_size > 1:
        join(processes, "cuda" if on_gpu else "cpu", JOIN_TIMEOUT)
        device = torch.device("cuda", processes.local_rank) if on_gpu else torch.device("cpu")
        checks += group_checks(device)
        of_ranks = Ranks().together(lambda: checks)
        leave()
        if processes.rank > 0:
            return
    found = worst(of_ranks)
    failed = [check.name for check in found if check.verdict == "fail"]
    if as_json:
        text = {"ranks": processes.world_size, "checks": [asdict(check) for check in found]}
        say(json.dumps(text, indent=2))
    else:
        rows = [(check.verdict, check.name, check.value, check.way_out) for check in found]
        ranks = f"{processes.world_size} processes" if processes.world_size > 1 else "one process"
        table(f"doctor: {ranks}", ("", "what", "found", "way out"), rows)
    if failed:
        raise UserError(f"not fit to train: {', '.join(failed)}")


def _existing(folder: Path) -> Path:
    """The folder, or what of it is there: nothing is made to look at a disk."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _kept_bytes(run: RunConfig) -> int:
    """Of the checkpoints that lie there at one time."""
    params = run.exp_manager.checkpoint_callback_params
    if not run.exp_manager.create_checkpoint_callback:
        return 0
    return (max(params.save_top_k, 0) + 1) * checkpoint_bytes(run.model, run.model.optim.name)
