"""Records of a ``*.arrays`` file, thinned for drawing; damage is noted, not hidden."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from deepseek.config.errors import UserError
from deepseek.monitoring.array_log import Entry, Record, index_arrays, read_record


def entries_of(path: Path) -> list[Entry]:
    """The index of a log; empty if there is no file or nothing in it.

    Raises:
        UserError: the file cannot be read, or is no log at all.
    """
    if not path.is_file():
        return []
    try:
        entries = index_arrays(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; see its permissions") from error
    if not entries and path.stat().st_size:
        raise UserError(
            f"{path} is damaged: {path.stat().st_size:,} bytes without one whole record; "
            "move it away, and the report goes without it"
        )
    return entries


def records_of(
    path: Path, entries: list[Entry], notes: list[str], names: Collection[str] | None = None
) -> Iterator[Record]:
    """The records of ``entries``; those with a wrong checksum are passed over, with a note."""
    damaged = []
    with open(path, "rb") as file:
        for entry in entries:
            record = read_record(file, entry, names)
            if record is None:
                damaged.append(entry.step)
            else:
                yield record
    if damaged:
        notes.append(
            f"{path.name}: {len(damaged)} of {len(entries)} records are damaged and left out "
            f"(the first at step {damaged[0]})"
        )


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0..count-1, evenly spaced, the first and the last among
    them."""
    if count <= most:
        return list(range(count))
    return sorted(set(np.linspace(0, count - 1, most).round().astype(int).tolist()))
