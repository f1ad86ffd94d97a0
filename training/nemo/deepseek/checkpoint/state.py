"""The run state of a checkpoint as JSON: what is not a tensor, and nothing that could run code.

Everything must come back equal to what was given, so that resuming is exact: what JSON would bend
(a tuple, a number as a key) or cannot say (NaN, a tensor) is refused by its place in the state.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError

STATE = "state.json"


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
