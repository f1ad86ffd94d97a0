"""``metrics.jsonl`` line by line, without the product's reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def all_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of all complete lines, in the order of the file."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def latest_rows(path: Path) -> list[dict[str, Any]]:
    """The same, but of a step trained twice the later row alone."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for row in all_rows(path):
        kind = row.get("event") or ("validation" if "val_loss" in row else "step")
        rows.pop((kind, row["step"]), None)
        rows[kind, row["step"]] = row
    return list(rows.values())
