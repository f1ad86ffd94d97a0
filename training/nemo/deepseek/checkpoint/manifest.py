"""What a checkpoint directory says of itself, in JSON: its name, its manifest, its run state.

``step_00000123`` is a checkpoint if it has a manifest that fits: the step, and size and digest of
every other file. The manifest is written last. Nothing says which checkpoint is the newest: that
follows from the directories that are whole.

The run state is what is not a tensor, and nothing that could run code. It must come back equal to
what was given, so that resuming is exact: what JSON would bend (a tuple, a number as a key) or
cannot say (NaN, a tensor) is refused by its place in the state.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.files import FileEntry, sha256_of

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the layout of a checkpoint directory."""
STATE = "state.json"


@dataclass(frozen=True)
class Manifest:
    """The files of one checkpoint, ``manifest.json`` itself excepted."""

    step: int
    files: dict[str, FileEntry]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest of the directory ``path``.

        Raises ``UserError`` if it is missing or malformed; the digests are not checked here.
        """
        where = f"{path}: {MANIFEST}"
        try:
            content = (path / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{where}: missing, the directory is not a whole checkpoint") from None
        except OSError as failure:
            raise UserError(f"{where}: cannot be read: {failure.strerror}") from failure
        try:
            data = json.loads(content)
            version = data["format"]
            step = data["step"]
            files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
            sound = type(step) is int and all(map(_plausible, files, files.values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as failure:
            raise UserError(f"{where}: not a manifest: {failure!r}") from None
        if version != FORMAT:
            raise UserError(f"{where}: format is {version!r}, this program reads {FORMAT}")
        if not sound:
            raise UserError(f"{where}: not a manifest: a name, size or digest is malformed")
        return cls(step, files)

    def to_json(self) -> bytes:
        files = {name: asdict(entry) for name, entry in sorted(self.files.items())}
        data = {"format": FORMAT, "step": self.step, "files": files}
        return json.dumps(data, indent=1).encode()

    def damage(self, path: Path) -> list[str]:
        """What is wrong with the files of the directory ``path``: sizes, then digests."""
        return self.wrong_sizes(path) or self.wrong_digests(path, self.files)

    def wrong_sizes(self, path: Path) -> list[str]:
        """One line for each file of the directory ``path`` that is missing or of another size."""
        problems = []
        for name, entry in self.files.items():
            try:
                size = (path / name).stat().st_size
            except FileNotFoundError:
                problems.append(f"{name}: missing")
            except OSError as failure:
                problems.append(f"{name}: cannot be read: {failure.strerror}")
            else:
                if size != entry.size:
                    problems.append(f"{name}: size is {size} bytes, expected {entry.size}")
        return problems

    def wrong_digests(self, path: Path, names: Iterable[str]) -> list[str]:
        """One line for each of the files ``names`` whose content is not what was written."""
        problems = []
        for name in names:
            expected = self.files[name].sha256
            try:
                actual = sha256_of(path / name)
            except OSError as failure:
                problems.append(f"{name}: cannot be read: {failure.strerror}")
            else:
                if actual != expected:
                    problems.append(f"{name}: sha256 is {actual}, expected {expected}")
        return problems


# -- the directories of a folder ------------------------------------------------------------------


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole by their manifest's sizes, ascending."""
    while True:
        paths = step_folders(folder)
        steps = [step_of(path) for path in paths if not damage_of(path, digests=False)]
        if all(path.exists() for path in paths):  # none was retired meanwhile
            return sorted(steps)


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
    while True:
        named = [
            path
            for path in folder.iterdir()
            if re.fullmatch(r"step_[0-9]{8,18}", path.name)
            and path.name == step_name(step_of(path))
        ]
        found = [path for path in named if path.is_dir()]
        if all(map(os.path.lexists, named)):  # none was retired meanwhile
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


# -- the run state --------------------------------------------------------------------------------


def state_to_json(state: dict[str, Any]) -> bytes:
    """``state`` as UTF-8 JSON. Raises ``UserError`` naming each place that JSON cannot keep."""
    if not isinstance(state, dict):
        raise UserError(f"the state of a checkpoint must be a dict, got {type(state).__name__}")
    try:
        problems = _problems(state, "state")
    except RecursionError:
        raise UserError(
            "the state of a checkpoint is nested too deeply or contains itself; flatten it"
        ) from None
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"the state of a checkpoint cannot be kept as JSON:\n{lines}")
    return json.dumps(state, indent=1, allow_nan=False).encode()


def read_state(path: Path) -> dict[str, Any]:
    """The state in the checkpoint directory ``path``. Raises ``UserError`` if it is not one."""
    try:
        state = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as failure:
        raise UserError(f"{path / STATE}: cannot be read: {failure}") from failure
    if not isinstance(state, dict):
        raise UserError(f"{path / STATE}: holds a {type(state).__name__}, expected an object")
    return state


def _plausible(name: str, entry: FileEntry) -> bool:
    """A plain file name (nothing outside the directory is ever opened), a size, a digest."""
    return (
        Path(name).name == name
        and name not in ("", ".", "..", MANIFEST)
        and "\0" not in name
        and type(entry.size) is int
        and entry.size >= 0
        and isinstance(entry.sha256, str)
        and re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None
    )


def _problems(value: object, place: str) -> list[str]:
    if value is None or type(value) in (bool, int, str):
        return []
    if type(value) is float:
        if math.isfinite(value):
            return []
        return [f"{place} is {value}: JSON has no such number; store None or a string"]
    if type(value) is list:
        parts = [(f"{place}[{index}]", item) for index, item in enumerate(value)]
        return [problem for where, item in parts for problem in _problems(item, where)]
    if type(value) is dict:
        problems = []
        for key, item in value.items():
            where = f"{place}[{key!r}]"
            if type(key) is not str:
                kind = type(key).__name__
                problems.append(f"{where}: the key is a {kind}, JSON keys are str; use str(key)")
            problems += _problems(item, where)
        return problems
    return [f"{place} is a {type(value).__name__}; {_way_out(value)}"]


def _way_out(value: object) -> str:
    if isinstance(value, tuple | set | frozenset):
        return "store a list"
    if isinstance(value, dict):
        return "store a plain dict"
    if hasattr(value, "shape"):
        return "store a torch tensor among the tensors, or a number with .item()"
    return "store None, bool, int, float, str, list or dict"
