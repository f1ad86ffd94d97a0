"""Which folder a run lives in: ``exp_dir/name/version_N``, or the one given by ``--run-dir``."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from deepseek.checkpoint.manifest import complete_steps
from deepseek.config.changes import HARMLESS, changed_settings, flatten
from deepseek.config.errors import UserError
from deepseek.config.load import stored_config
from deepseek.config.schema import RunConfig
from deepseek.config.yaml_file import read_yaml_file
from deepseek.files import disk_errors
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, GOING_BACK

RUN_FOLDER = "DEEPSEEK_RUN_FOLDER"
"""Tells the processes that a supervisor starts which folder it has chosen."""


def chosen_folder(config: RunConfig, run_dir: Path | None, resume: bool) -> Path:
    """The supervisor's choice if there is one, else ``run_folder``."""
    chosen = os.environ.get(RUN_FOLDER)
    return Path(chosen) if chosen else run_folder(config, run_dir, resume)


def run_folder(config: RunConfig, run_dir: Path | None = None, resume: bool | None = None) -> Path:
    """Where this run lives.

    Without ``run_dir`` and ``exp_manager.version``: the newest version if ``resume`` and that
    version is not complete, else the next one. ``resume`` is ``resume_if_exists`` unless given.

    """
    manager = config.exp_manager
    resume = manager.resume_if_exists if resume is None else resume
    if run_dir is not None:
        folder = run_dir
    else:
        parent = Path(manager.exp_dir) / (manager.name or config.name)
        folder = parent / (manager.version or _version(parent, config, resume))
    return folder.resolve()


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a run folder; what was made goes again if the start fails.

    Raises:
        UserError: the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {folder}: {error.strerror}; "
            "choose another with --run-dir or exp_manager.exp_dir"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write to the run folder {folder}; "
            "choose another with --run-dir or exp_manager.exp_dir"
        )
    try:
        yield
    except BaseException:
        if made and not (folder / CONFIG_FILE).exists():  # written when all else has succeeded
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another run has come into it
                for path in made[1:]:
                    path.rmdir()
        raise


def finished_steps(folder: Path) -> int:
    """Step of the newest complete checkpoint of a run, 0 if there is none."""
    return max(complete_steps(folder / CHECKPOINTS), default=0)


def start_going_back(folder: Path) -> None:
    """Later checkpoints are still to be set aside, whoever starts anew until then.

    Raises:
        UserError: the disk refuses.
    """
    with disk_errors(f"writing {GOING_BACK} in {folder / CHECKPOINTS}"):
        (folder / CHECKPOINTS / GOING_BACK).touch()


def has_gone_back(folder: Path) -> bool:
    """Later checkpoints are set aside, those that are there are what came of it."""
    return not (folder / CHECKPOINTS / GOING_BACK).exists()


def other_settings(folder: Path, run: RunConfig) -> list[str]:
    """What the run in ``folder`` was trained with otherwise, as ``key ITS -> THIS``; what changes
    no number is left out, and nothing is known of a folder without a sound ``config.yaml``."""
    with suppress(UserError):
        tree = read_yaml_file(folder / CONFIG_FILE, "", "").tree
        if isinstance(tree, dict):
            before, now = flatten(asdict(stored_config(tree))), flatten(asdict(run))
            changes = changed_settings(before, now)
            return [text for key, text in changes.items() if not HARMLESS.fullmatch(key)]
    return []


def _version(parent: Path, config: RunConfig, resume: bool) -> str:
    numbers = sorted(
        int(match[1])
        for path in parent.glob("version_*")
        if (match := re.fullmatch(r"version_(\d+)", path.name))
    )
    if not numbers:
        return "version_0"
    newest = f"version_{numbers[-1]}"
    complete = finished_steps(parent / newest) >= config.trainer.max_steps
    if resume and not complete:
        return newest
    return f"version_{numbers[-1] + 1}"
