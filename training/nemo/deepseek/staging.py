"""Folders that are written over a long time: whole under their name, or not there.

They are built as ``.NAME.partial`` beside it and renamed at the end. Parts that are done are noted,
so that work that was cut short goes on instead of starting again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from deepseek.config.errors import UserError
from deepseek.durable import FileEntry, sync_folder, write_durably
from deepseek.locks import LOCK, FolderLock

_NOTES = ".done"
_PLAN = ".plan.json"


class Staging:
    """The unfinished folder of ``target``; one process at a time works on it.

    Args:
        target: must not exist, or be an empty folder.
        plan: what the result depends on, as JSON. What is left of work with another plan is thrown
            away.

    Raises:
        UserError: ``target`` exists, its parent cannot be written, or another process is at it.
    """

    def __init__(self, target: Path, plan: Mapping[str, Any]) -> None:
        self.target = target
        refuse_existing(target)
        self.folder = target.absolute().parent / f".{target.absolute().name}.partial"
        with disk_errors(f"starting {self.folder}", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder)
            text = json.dumps(plan, sort_keys=True).encode()
            if not self._is_of(text):
                self._clear()
                (self.folder / _NOTES).mkdir()
                write_durably(self.folder / _PLAN, text)

    def note(self, part: str) -> dict[str, Any] | None:
        """What was noted of a part that is done; None if it is not."""
        try:
            note = json.loads(self._note(part).read_bytes())
        except (OSError, ValueError):
            return None
        return note if isinstance(note, dict) else None

    def done(self, part: str, note: Mapping[str, Any]) -> None:
        """Note that ``part`` is written and synced; ``note`` is JSON."""
        place = self._note(part)
        new = place.with_suffix(".new")
        new.unlink(missing_ok=True)
        write_durably(new, json.dumps(note).encode())
        new.rename(place)
        sync_folder(place.parent)

    def finish(self) -> None:
        """Give the folder its name."""
        with disk_errors(f"finishing {self.target}", self.folder):
            shutil.rmtree(self.folder / _NOTES)
            (self.folder / _PLAN).unlink()
            (self.folder / LOCK).unlink()
            sync_folder(self.folder)
            refuse_existing(self.target)
            self.folder.rename(self.target)
            sync_folder(self.folder.parent)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()

    def _note(self, part: str) -> Path:
        return self.folder / _NOTES / f"{part}.json"

    def _is_of(self, plan: bytes) -> bool:
        try:
            return (self.folder / _PLAN).read_bytes() == plan and (self.folder / _NOTES).is_dir()
        except OSError:
            return False

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()


def has_size(path: Path, entry: FileEntry) -> bool:
    """Whether the file is there as long as it was written."""
    return path.is_file() and path.stat().st_size == entry.size


def refuse_existing(target: Path) -> None:
    """Raise UserError unless ``target`` is free, or an empty folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise UserError(
            f"{target} exists already and nothing is overwritten; give another folder, or delete it"
        )


@contextmanager
def disk_errors(doing: str, kept: Path) -> Iterator[None]:
    """Turn errors of the disk into ``UserError``; what is done stays in ``kept``."""
    try:
        yield
    except OSError as failure:
        name = f" ({failure.filename})" if failure.filename else ""
        raise UserError(
            f"{doing} failed: {failure.strerror}{name}; mend it and give the same command again, "
            f"which goes on from what is done (in {kept}, to be deleted if you do not)"
        ) from failure
