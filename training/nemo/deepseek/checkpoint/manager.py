"""The writer of a folder of checkpoints.

A checkpoint is a directory ``step_00000123``:

* ``__R_N.distcp``, ``.metadata``   DCP shards of rank R; global names, so any layout loads them
* ``state.json``                    run state: what is not a tensor
* ``manifest.json``                 step, and size and sha256 of every file above

It is written under a temporary name, synced, and renamed: a directory of that name is a whole
checkpoint or has been damaged since. There is no ``latest``; what is newest follows from what is
there. Other names in the folder belong to the writer, who holds ``.lock``:

* ``.tmp-*``        being written
* ``.replaced-*``   a checkpoint of a step that is being written anew
* ``.trash-*``      being deleted

Left by a killed process they are cleaned up at the next start. ``set_aside_N_step_*`` are those
that a run went back behind; they are the user's. Reading needs no lock and no manager: see
``checkpoint.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from deepseek.checkpoint.checkpoint import Checkpoint, newest_sound
from deepseek.checkpoint.manifest import (
    MANIFEST,
    STATE,
    Manifest,
    complete_steps,
    damage_of,
    state_to_json,
    step_folders,
    step_name,
    step_of,
)
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.shards import Planner, write_shards
from deepseek.config.errors import UserError
from deepseek.files import FileEntry, disk_errors, require_room, sync_folder, write_durably
from deepseek.locks import LOCK, Lock, unless_held
from deepseek.parallel.mesh import local, placed
from deepseek.run_folder import GOING_BACK

_log = logging.getLogger(__name__)

_TEMPORARY, _REPLACED, _TRASH = ".tmp-", ".replaced-", ".trash-"
_OVERHEAD = 4096
"""Bytes a tensor may take on disk beyond its numbers: container, metadata, alignment."""
_FEWER = "keep fewer (exp_manager.checkpoint_callback_params.save_top_k); nothing was changed"


class CheckpointManager:
    """Writes, retains and finds the checkpoints of one folder. One writer per folder.

    Every method is a collective if there is a process group: all ranks call it, with a folder they
    share; rank 0 decides. Errors are raised on all ranks.

    Args:
        folder: made if missing.
        keep: how many of the newest checkpoints to keep; -1: all.
        group: the ranks that save together; None: all ranks, or this process alone.

    Raises:
        UserError: another process writes to the folder, or it cannot be used.
    """

    def __init__(self, folder: Path, keep: int = 2, group: dist.ProcessGroup | None = None) -> None:
        if keep != -1 and keep < 1:
            raise UserError(
                f"{keep} checkpoints cannot be kept: use 1 or more, or -1 for all "
                "(exp_manager.checkpoint_callback_params.save_top_k)"
            )
        self.folder = Path(folder)
        self.keep = keep
        self._ranks = Ranks(group)
        self._lock: Lock | None = None
        # The interpreter waits for the thread before it exits.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[Path] | None = None
        self._thread_ranks: Ranks | None = None
        # What the newest save has written, and by which plan; None after one that failed.
        self._places: _Places | None = None
        self._planner = Planner()
        # Steps whose files have been found to differ. Only a new write makes them good.
        self._damaged: set[int] = set()
        self._ranks.lead(self._open)

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], retire: bool = True
    ) -> Path:
        """Write the checkpoint of ``step``, then retire those beyond ``keep``.

        A checkpoint of the same step is replaced, once the new one is whole on the disk: what was
        written last is what a resumed run gets. One of a later step that is sound belongs to
        another continuation, which resuming would pick up: that is refused.

        Args:
            step: optimiser steps done.
            tensors: by global name; plain tensors (equal on all ranks that have them) or DTensors.
            state: what ``state_to_json`` accepts; rank 0's is kept.
            retire: False keeps the older ones, all of them.

        Returns:
            The checkpoint's directory.

        Raises:
            UserError: something of the arguments cannot be stored, there is a later checkpoint,
                the disk is too full or refuses; earlier checkpoints are untouched.
        """
        self.wait()
        # Refuse what can be refused before a byte is written.
        prepared = self._prepare(step, tensors, state)
        return self._write(step, tensors, prepared, self._ranks, retire)

    def save_in_background(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], retire: bool = True
    ) -> None:
        """``save`` that returns once the tensors are copied to CPU memory; a thread writes them.

        They may change meanwhile: saved is what they are now. One save is under way at a time; an
        earlier one is waited for. An error of the disk is raised by what waits: the next save,
        ``wait`` or ``close``. Until then the checkpoint is not there, and a killed process leaves
        those before it.

        Args and errors: see ``save``.
        """
        self.wait()
        prepared = self._prepare(step, tensors, state)
        if self._thread_ranks is None:
            self._thread_ranks = self._ranks.with_own_group()
        ranks = self._thread_ranks
        copies = {name: _copy_to_cpu(tensor) for name, tensor in tensors.items()}
        self._under_way = self._thread.submit(self._write, step, copies, prepared, ranks, retire)

    def wait(self) -> None:
        """Until no save is under way in the background. Raises its ``UserError``."""
        if (save := self._under_way) is not None:
            wait([save])  # which may be interrupted, and then taken up again
            self._under_way = None
            save.result()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints (every file there, of the right size), ascending."""
        return self._ranks.lead(lambda: complete_steps(self.folder))

    def newest_sound(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is as it was written, or None if there is none at all.

        A damaged one is named through ``report`` and the one before it is tried. Raises
        ``UserError`` if there are checkpoints and all are damaged.
        """
        checkpoint = newest_sound(self.folder, report, self._ranks)
        if checkpoint is not None:
            checkpoint.release()
            self._damaged |= {step for step in self.steps() if step > checkpoint.step}
        return checkpoint

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``. Raises ``UserError`` if there is none, or it is damaged."""
        path = self.folder / step_name(step)
        steps = self.steps()
        if not self._ranks.lead(path.is_dir):
            there = f"those of steps {', '.join(map(str, steps))}" if steps else "none"
            raise UserError(f"{self.folder} has no checkpoint of step {step}; it has {there}")
        checkpoint = Checkpoint.open(path, self._ranks)
        checkpoint.release()
        return checkpoint

    def set_aside_after(self, step: int) -> list[Path]:
        """Give the checkpoints later than ``step`` names that nobody reads, resumes or retires.

        Returns:
            The new names. Raises ``UserError`` if the disk refuses.
        """
        return self._ranks.lead(lambda: self._set_aside_after(step))

    def retire(self) -> bool:
        """Delete what is beyond ``keep``; for rank 0 alone, without a collective.

        Returns:
            Whether it was done: not while a save is under way in the background.
        """
        if self._under_way is not None and not self._under_way.done():
            return False
        try:
            self._retire()
        except OSError as failure:
            _log.warning("%s: old checkpoints could not be deleted: %s", self.folder, failure)
        return True

    def close(self) -> None:
        """Let the next writer in, after ``wait``. A second call does nothing. No collective."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _prepare(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> list[_Prepared]:
        ranks, before = self._ranks, self._places
        return ranks.gather(lambda: _prepare(step, tensors, state, before, alone=ranks.size == 1))

    def _write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        prepared: list[_Prepared],
        ranks: Ranks,
        retire: bool,
    ) -> Path:
        """Write and name. In whatever thread: ``ranks`` are its. ``prepared`` is rank 0's alone."""
        self._places = None
        temporary, known = ranks.lead(lambda: self._begin(step, prepared))
        if not known:
            self._planner = Planner()
        planner = self._planner
        try:
            # 1. Every rank writes its shards.
            written = ranks.gather(lambda: write_shards(temporary, tensors, ranks, planner))
            # 2. Rank 0 adds the state and the manifest, and gives the directory its name.
            files = {name: entry for part in written for name, entry in part.items()}
            ranks.lead(lambda: self._finish(step, temporary, files, prepared[0].state, retire))
        except BaseException:
            # No collective here: an interruption may have come to this rank alone.
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._places = _places(tensors)
        return self.folder / step_name(step)

    # -- rank 0 only ---------------------------------------------------------------------------

    def _open(self) -> None:
        with disk_errors(f"opening {self.folder} for checkpoints"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder / LOCK)
            self._clean()

    def _clean(self) -> None:
        """Bring what a killed writer left behind to an end. The lock says that it is dead."""
        for path in sorted(self.folder.iterdir()):
            name = path.name
            if name.startswith((_TEMPORARY, _TRASH)):
                shutil.rmtree(path, ignore_errors=True)
            elif name.startswith(_REPLACED):
                place = self.folder / name.removeprefix(_REPLACED)
                if place.exists():
                    self._discard(path)
                else:
                    # Killed between the two renames: the old one is still the checkpoint.
                    path.rename(place)
                    sync_folder(self.folder)

    def _begin(self, step: int, prepared: list[_Prepared]) -> tuple[Path, bool]:
        """Check lock, later checkpoints, agreement of the ranks and space; make the directory.

        Returns:
            The directory, and whether the plan of the save before is good for this one.
        """
        if self._lock is None or not self._lock.held:
            raise UserError(
                f"{self.folder}: this manager was closed, or a later one of the same process "
                "took over; make a new CheckpointManager"
            )
        self._refuse_later(step)
        whole = _merge([own.parts for own in prepared])
        if not whole:  # a rank may have none: only copies, of a head, or a stage without adapters
            raise UserError("a checkpoint cannot be stored: no rank has a tensor")
        needed = sum(part.size + _OVERHEAD for part in whole.values()) + _OVERHEAD
        with disk_errors(f"starting the checkpoint of step {step} in {self.folder}"):
            require_room(self.folder, needed, f"the checkpoint of step {step}", _FEWER)
            temporary = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"
            temporary.mkdir()
        return temporary, all(own.known for own in prepared)

    def _set_aside_after(self, step: int) -> list[Path]:
        moved = []
        with disk_errors(f"setting checkpoints after step {step} aside in {self.folder}"):
            for path in step_folders(self.folder):
                if step_of(path) > step:
                    numbers = itertools.count(1)
                    names = (f"set_aside_{number}_{path.name}" for number in numbers)
                    target = next(self.folder / n for n in names if not (self.folder / n).exists())
                    path.rename(target)
                    moved.append(target)
            (self.folder / GOING_BACK).unlink(missing_ok=True)
            sync_folder(self.folder)
        return moved

    def _refuse_later(self, step: int) -> None:
        for later in complete_steps(self.folder):
            if later <= step or later in self._damaged:
                continue
            if damage_of(self.folder / step_name(later)) is None:
                raise UserError(
                    f"{self.folder} holds a checkpoint of step {later}, later than step {step} "
                    "that is to be saved: resuming would continue from another run; "
                    f"use another run folder, or move {step_name(later)} away"
                )
            self._damaged.add(later)

    def _finish(
        self, step: int, temporary: Path, files: dict[str, FileEntry], text: bytes, retire: bool
    ) -> None:
        place, replaced = self.folder / step_name(step), self.folder / _replaced_name(step)
        with disk_errors(f"finishing the checkpoint of step {step} in {self.folder}"):
            # 1. Everything is on the disk before it gets its name.
            manifest = Manifest(step, {**files, STATE: write_durably(temporary / STATE, text)})
            if problems := manifest.wrong_sizes(temporary):
                raise UserError(
                    f"rank 0 does not find in {temporary} what was written: {'; '.join(problems)}; "
                    "the run folder must be on a file system that all ranks share"
                )
            write_durably(temporary / MANIFEST, manifest.to_json())
            sync_folder(temporary)
            # 2. The name. A checkpoint of the same step steps aside for it.
            if place.exists():
                place.rename(replaced)
            try:
                temporary.rename(place)
            except OSError:
                if replaced.exists():
                    replaced.rename(place)
                raise
            sync_folder(self.folder)
        self._damaged.discard(step)
        # 3. Only now may anything be deleted. The checkpoint is safe: what fails here is no
        # reason to stop a run.
        try:
            if replaced.exists():
                self._discard(replaced)
            if retire:
                self._retire()
        except OSError as failure:
            _log.warning("%s: old checkpoints could not be deleted: %s", self.folder, failure)

    def _retire(self) -> None:
        """Keep the newest ``keep`` that are good; the damaged keep no place.

        What is being read goes with a later save.
        """
        if self.keep == -1:
            return
        good = [step for step in complete_steps(self.folder) if step not in self._damaged]
        kept = good[-self.keep :]
        for path in step_folders(self.folder):
            if step_of(path) not in kept:
                with unless_held(path / MANIFEST) as free:
                    if free:
                        self._discard(path)

    def _discard(self, path: Path) -> None:
        """Delete a checkpoint; from its first moment on it no longer looks like one."""
        trash = self.folder / f"{_TRASH}{uuid.uuid4().hex}"
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


@dataclass(frozen=True)
class _Part:
    """What one rank has under a name."""

    size: int
    """Bytes of the global tensor."""
    kind: str
    """Global shape and dtype, for comparing and for messages."""
    digest: str | None
    """Of a plain tensor that other ranks may have as well."""


_Places = dict[str, tuple[object, ...]]
"""Of each tensor: what must be the same so that a plan is good for another save."""


class _Prepared(NamedTuple):
    """What rank 0 is told by one rank."""

    state: bytes
    """As JSON."""
    parts: dict[str, _Part]
    known: bool
    """The save before had the same tensors in the same places."""


def _places(tensors: dict[str, Tensor]) -> _Places:
    return {
        name: (
            (tensor.dtype, tensor.shape, tensor.to_local().shape, tensor.placements)
            + (id(tensor.device_mesh),)
            if isinstance(tensor, DTensor)
            else (tensor.dtype, tensor.shape)
        )
        for name, tensor in tensors.items()
    }


def _prepare(
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    before: _Places | None,
    alone: bool,
) -> _Prepared:
    """This rank's share. Raises ``UserError`` for what cannot be stored."""
    if type(step) is not int or step < 0:
        raise UserError(f"the step of a checkpoint must be an int of 0 or more, got {step!r}")
    problems = []
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name:
            problems.append(f"{name!r}: the name must be a string")
        elif not isinstance(tensor, Tensor):
            problems.append(f"{name}: is a {type(tensor).__name__}; put it into the state")
        elif tensor.is_meta:
            problems.append(f"{name}: is on the meta device and has no numbers")
        elif tensor.layout != torch.strided:
            problems.append(f"{name}: is {tensor.layout}; store it dense")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"the tensors of a checkpoint cannot be stored:\n{lines}")
    parts = {name: _part(tensor, alone) for name, tensor in tensors.items()}
    return _Prepared(state_to_json(state), parts, known=before == _places(tensors))


def _part(tensor: Tensor, alone: bool) -> _Part:
    size = tensor.numel() * tensor.element_size()
    kind = f"{list(tensor.shape)} {tensor.dtype}"
    if alone or isinstance(tensor, DTensor):
        return _Part(size, kind, None)
    # DCP keeps one rank's copy of a plain tensor. Ranks that disagree, such as two with different
    # experts under one name, would lose all but one of them without a word.
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _Part(size, kind, hashlib.sha256(numbers.data).hexdigest())


def _merge(parts: list[dict[str, _Part]]) -> dict[str, _Part]:
    """One entry a name over all ranks. Raises ``UserError`` where the ranks disagree."""
    whole: dict[str, _Part] = {}
    problems = []
    for rank, own in enumerate(parts):
        for name, part in own.items():
            first = whole.setdefault(name, part)
            if first.kind != part.kind:
                problems.append(f"{name}: is {part.kind} on rank {rank}, {first.kind} before")
            elif first.digest != part.digest:
                problems.append(f"{name}: rank {rank} has other numbers than the ranks before")
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"the ranks have different tensors under one name:\n{lines}\n"
            "parts of a tensor must be DTensors, copies must be equal"
        )
    return whole


def _replaced_name(step: int) -> str:
    return f"{_REPLACED}{step_name(step)}"


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy of what lies here, in CPU memory; of a DTensor again a DTensor, over the same ranks.

    That of a DTensor over GPUs is good for being saved only.
    """
    return placed(local(tensor).detach().to("cpu", copy=True), tensor)
