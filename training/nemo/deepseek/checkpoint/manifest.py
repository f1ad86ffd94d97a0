"""The manifest of a checkpoint: the step, and size and digest of every other file in it.

A directory without a manifest that fits is no checkpoint. The manifest is written last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.files import FileEntry, sha256_of

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the layout of a checkpoint directory."""


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
