"""A folder of checkpoints as a reader sees it; no lock is needed and nothing is changed.

Nothing says which checkpoint is the latest: that follows from the directories that are whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manifest import Manifest
from deepseek.checkpoint.metadata import read_metadata
from deepseek.checkpoint.ranks import Ranks
from deepseek.config.errors import UserError


def newest_sound(
    folder: Path, report: Callable[[str], None], ranks: Ranks | None = None
) -> Checkpoint | None:
    """The newest checkpoint of ``folder`` that is as it was written; a collective over ``ranks``.

    Args:
        folder: where the checkpoints are; it need not exist.
        report: called on rank 0 with one line for each damaged checkpoint that is passed over.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    ranks = ranks or Ranks()
    problems = []
    for path in ranks.lead(lambda: step_folders(folder)):
        try:
            checkpoint = Checkpoint.open(path, ranks)
            check_step(path, checkpoint.step)
            return checkpoint
        except UserError as failure:
            # A writer elsewhere may have retired it meanwhile: that is no damage.
            if not ranks.lead(path.exists):
                continue
            problems.append(str(failure))
            if ranks.rank == 0:
                report(f"{failure}; trying the one before")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"no checkpoint in {folder} is sound:\n{lines}\n"
            "restore one from a copy, or move them away to start from step 0"
        )
    return None


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole by their manifest's sizes, ascending."""
    return sorted(
        step_of(path) for path in step_folders(folder) if not damage_of(path, digests=False)
    )


@dataclass(frozen=True)
class Summary:
    """One line of a listing."""

    path: Path
    step: int
    size: int
    """Bytes on disk."""
    tensors: int | None
    """Count; None where it cannot be told."""
    problem: str | None
    """None: sound."""


def describe(folder: Path, digests: bool = True) -> list[Summary]:
    """Every checkpoint of ``folder``, newest first, the damaged ones included.

    ``digests=False`` compares sizes only, which takes no reading of the shards.
    """
    return [_summary(path, digests) for path in step_folders(folder)]


def step_name(step: int) -> str:
    """Name of the directory of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Step of a directory named by ``step_name``."""
    return int(path.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """The directories that are named as checkpoints, newest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [
        path
        for path in folder.iterdir()
        if re.fullmatch(r"step_[0-9]{8,18}", path.name)
        and path.name == step_name(step_of(path))
        and path.is_dir()
    ]
    return sorted(found, key=step_of, reverse=True)


def check_step(path: Path, step: int) -> None:
    """Raise ``UserError`` unless the directory ``path`` is named after ``step``."""
    if path.name != step_name(step):
        raise UserError(f"{path} is damaged: it holds step {step}; rename it {step_name(step)}")


def damage_of(path: Path, digests: bool = True) -> str | None:
    """What is wrong with a step's directory, or None; ``digests=False`` compares sizes only."""
    try:
        manifest = Manifest.read(path)
        check_step(path, manifest.step)
    except UserError as failure:
        return str(failure)
    problems = manifest.damage(path) if digests else manifest.wrong_sizes(path)
    return f"{path} is damaged: {'; '.join(problems)}" if problems else None


def _summary(path: Path, digests: bool) -> Summary:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    problem, tensors = damage_of(path, digests), None
    if problem is None:
        try:
            sizes = {name: entry.size for name, entry in Manifest.read(path).files.items()}
            tensors = len(read_metadata(path, sizes).state_dict_metadata)
        except UserError as failure:
            problem = str(failure)
    return Summary(path, step_of(path), size, tensors, problem)
