"""Reading checkpoints: one that has been verified, and a folder of them.

No lock is needed and nothing is changed. A writer who retires old checkpoints leaves alone what is
being read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from deepseek.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_step,
    damage_of,
    read_state,
    step_folders,
    step_of,
)
from deepseek.checkpoint.metadata import read_metadata
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.shards import read_shards
from deepseek.config.errors import UserError
from deepseek.locks import Hold

_NAMED = 8
"""How many tensors an error names before it counts the rest."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose files had the sizes and digests of its manifest when opened."""

    path: Path
    step: int
    """Optimiser steps done."""
    _state: dict[str, Any] = field(repr=False)
    _metadata: Metadata = field(repr=False)
    ranks: Ranks = field(repr=False)
    """Who opened it, and loads together."""
    _hold: Hold | None = field(default=None, repr=False, kw_only=True)
    """Of rank 0: the directory is not retired as long as this object lives."""

    @classmethod
    def open(cls, path: Path, ranks: Ranks | None = None) -> Checkpoint:
        """Verify the directory ``path`` and open it; a collective over ``ranks``.

        Raises ``UserError`` with every file that is missing or differs.
        """
        ranks = ranks or Ranks()
        held = _held(path) if ranks.rank == 0 else None
        manifest = ranks.lead(lambda: Manifest.read(path))
        problems = ranks.lead(lambda: manifest.wrong_sizes(path))
        if not problems:
            # The ranks share the hashing.
            mine = sorted(manifest.files)[ranks.rank :: ranks.size]
            found = ranks.together(lambda: manifest.wrong_digests(path, mine))
            problems = [problem for part in found for problem in part]
        if problems:
            raise UserError(f"{path} is damaged: {'; '.join(problems)}")
        sizes = {name: entry.size for name, entry in manifest.files.items()}

        def read() -> tuple[dict[str, Any], Metadata]:
            state, metadata = read_state(path), read_metadata(path, sizes)
            if state.get("step", manifest.step) != manifest.step:
                raise UserError(
                    f"{path} is damaged: its manifest says step {str(manifest.step)[:20]}, its "
                    f"state {state['step']}"
                )
            return state, metadata

        # Read and checked once: of 2,048 ranks it takes half a minute.
        state, metadata = ranks.lead(read)
        return cls(path, manifest.step, state, metadata, ranks, _hold=held)

    def release(self) -> None:
        """Let it be retired; for its own writer, which knows what it still needs."""
        if self._hold is not None:
            self._hold.release()

    def state(self) -> dict[str, Any]:
        """The run state, equal to what ``save`` was given on rank 0."""
        return self._state

    def tensor_names(self) -> list[str]:
        """Global names, sorted."""
        return sorted(self._metadata.state_dict_metadata)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of each tensor."""
        return {name: tuple(self._tensor(name).size) for name in self.tensor_names()}

    def tensor_dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each tensor."""
        return {name: self._tensor(name).properties.dtype for name in self.tensor_names()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fill ``tensors`` in place, bit by bit; a collective.

        A subset of the checkpoint's tensors may be asked for. Plain tensors get the whole, DTensors
        this rank's part, whatever the layout was that wrote them.

        Raises:
            UserError: a name is not in the checkpoint, or its global shape or dtype is another;
                nothing has been changed then.
        """
        self.ranks.together(lambda: self._check(tensors))
        self.ranks.together(lambda: self._fill(tensors))

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        read_shards(self.path, self._metadata, tensors, self.ranks)

    def _tensor(self, name: str) -> TensorStorageMetadata:
        return cast(TensorStorageMetadata, self._metadata.state_dict_metadata[name])

    def _check(self, tensors: dict[str, Tensor]) -> None:
        held = self._metadata.state_dict_metadata
        problems = []
        for name, tensor in tensors.items():
            if name not in held:
                problems.append(f"{name}: missing")
                continue
            saved = self._tensor(name)
            shape, dtype = tuple(saved.size), saved.properties.dtype
            if tuple(tensor.shape) != shape:
                problems.append(f"{name}: has shape {list(shape)}, asked for {list(tensor.shape)}")
            elif tensor.dtype != dtype:
                problems.append(f"{name}: is {dtype}, asked for {tensor.dtype}")
            elif tensor.is_meta:
                problems.append(f"{name}: the tensor to fill is on the meta device")
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems[:_NAMED])
            rest = len(problems) - _NAMED
            more = f"\n  and {rest} more" if rest > 0 else ""
            raise UserError(
                f"{self.path} does not fit {len(problems)} of the {len(tensors)} tensors asked "
                f"for:\n{lines}{more}\nuse the configuration it was written with (state.json)"
            )


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
    problems: dict[Path, str] = {}
    while paths := [p for p in ranks.lead(lambda: step_folders(folder)) if p not in problems]:
        try:
            checkpoint = Checkpoint.open(paths[0], ranks)
            check_step(paths[0], checkpoint.step)
            return checkpoint
        except UserError as failure:
            # Its writer may have retired it meanwhile: that is no damage, and a newer one is there.
            if not ranks.lead(paths[0].exists):
                continue
            problems[paths[0]] = str(failure)
            if ranks.rank == 0:
                report(f"{failure}; trying the one before")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems.values())
        raise UserError(
            f"no checkpoint in {folder} is sound:\n{lines}\n"
            "restore one from a copy, or move them away to start from step 0"
        )
    return None


@dataclass(frozen=True)
class Summary:
    """One line of a listing."""

    path: Path
    step: int | None
    """None where neither name nor manifest tells it."""
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
    rows = (summary(path, digests) for path in step_folders(folder))
    return [row for row in rows if row is not None]


def summary(path: Path, digests: bool = True) -> Summary | None:
    """One checkpoint, as in ``describe``, under whatever name; None if it was retired meanwhile."""
    held, step, tensors = _held(path), None, None
    if path.name.startswith("step_") and path.name[5:].isdecimal():
        step, problem = step_of(path), damage_of(path, digests)
    else:
        problem = None
    try:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        if problem is None:
            manifest = Manifest.read(path)
            if step is None:
                problems = manifest.damage(path) if digests else manifest.wrong_sizes(path)
                problem = "; ".join(problems) or None
            step = manifest.step
            sizes = {name: entry.size for name, entry in manifest.files.items()}
            tensors = len(read_metadata(path, sizes).state_dict_metadata)
    except FileNotFoundError:
        return None
    except UserError as failure:
        problem = str(failure)
    del held  # until here
    return Summary(path, step, size, tensors, problem)


def _held(path: Path) -> Hold | None:
    """A hold on the checkpoint ``path``; None if it has no manifest (any more)."""
    with suppress(OSError):
        return Hold(path / MANIFEST)
    return None
