"""Every key of the schema by its dotted name: its type, its default, and whether a value fits.

The schema's dataclasses are the one source; the table ``FIELDS`` is read off their type hints.
Types are checked strictly here, because OmegaConf would turn ``"yes"`` into true and ``"8"`` into 8
without a word.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from deepseek.config.errors import Problem
from deepseek.config.schema import RunConfig


@dataclass(frozen=True)
class Field:
    """One key of the schema."""

    path: str
    """Dotted key, such as ``model.optim.lr``."""
    kind: Any
    """bool, int, float, str, list (of ``item``), object (anything plain), or a section's
    dataclass."""
    optional: bool
    """True if null is a value."""
    default: object
    """Plain value; None for a section that is null by default."""
    item: Any = None
    """What a list holds: int, float or str."""

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.kind)

    def problem_with(self, value: object) -> Problem | None:
        """The problem of a plain ``value`` (numbers, text, null, lists) in a key that is no
        section; None if it fits."""
        fault = _misfit(self, value)
        return None if fault is None else Problem(self.path, value, *fault)


def schema_fields(section: type = RunConfig, prefix: str = "") -> dict[str, Field]:
    """Keys of ``section`` and of all sections below it, in the schema's order."""
    hints = typing.get_type_hints(section)
    found: dict[str, Field] = {}
    for key in fields(section):
        kind, optional, item = _kind(hints[key.name])
        path = f"{prefix}{key.name}"
        default = key.default if key.default_factory is MISSING else key.default_factory()
        found[path] = Field(path, kind, optional, default, item)
        if is_dataclass(kind):
            found |= schema_fields(typing.cast(type, kind), f"{path}.")
    return found


def value_at(tree: Mapping[str, Any], path: str) -> object:
    """The value at a dotted ``path``; None where a section on the way is null."""
    node: Any = tree
    for key in path.split("."):
        if node is None:
            return None
        node = node[key]
    return node


def type_problems(tree: Mapping[str, Any]) -> list[Problem]:
    """Values of a complete plain ``tree`` (every key of the schema) that do not fit their type."""
    problems = []
    for path, field in LEAVES.items():
        section = path.rpartition(".")[0]
        if section and value_at(tree, section) is None:
            continue
        problem = field.problem_with(value_at(tree, path))
        if problem is not None:
            problems.append(problem)
    return problems


def _kind(hint: Any) -> tuple[Any, bool, Any]:
    """The field's kind, whether null is allowed, and what a list holds, from a type hint."""
    if hint is Any:
        return object, True, None
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not type(None)]
    assert len(kinds) == 1, f"the schema has no reading for {hint}"
    (item,) = typing.get_args(kinds[0]) or (None,)
    return typing.get_origin(kinds[0]) or kinds[0], len(kinds) < len(members), item


def _misfit(field: Field, value: object) -> tuple[str, str] | None:
    """(rule, way out) if ``value`` does not fit ``field``."""
    if value is None:
        if field.optional:
            return None
        return (
            f"must be {_noun(field)}, not null",
            f"give a value or remove the line (default {_yaml(field.default)})",
        )
    if value == "???":
        return (
            "is still the placeholder ???",
            f"give {_noun(field)}, such as {_yaml(field.default)}",
        )
    if field.kind is object:
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, (str, bool, int, float)) for item in items):
            return None
        return "must be text, a number or a list of them", f"the default is {_yaml(field.default)}"
    if field.kind is bool:
        if isinstance(value, bool):
            return None
        word = str(value).lower()
        way_out = {
            "yes": "write true",
            "on": "write true",
            "true": "write true",
            "1": "write true",
            "no": "write false",
            "off": "write false",
            "false": "write false",
            "0": "write false",
        }
        return "must be true or false", way_out.get(word, "write true or false")
    if field.kind is int:
        if _is_whole(value):
            return None
        return "must be a whole number", _number_way_out(value, int, field.default)
    if field.kind is float:
        if _is_number(value):
            return None
        if isinstance(value, float):
            return "must be a finite number", f"the default is {_yaml(field.default)}"
        return "must be a number", _number_way_out(value, float, field.default)
    if field.kind is str:
        if isinstance(value, str):
            return None
        if isinstance(value, (dict, list)):
            return "must be text", f"the default is {_yaml(field.default)}"
        return f"must be text, not {_noun_of(value)}", f'quote it: "{_yaml(value)}"'
    assert field.kind is list
    fits = _FITS[field.item]
    if isinstance(value, list) and all(fits(item) for item in value):
        return None
    or_null = " or null" if field.optional else ""
    return f"must be {_noun(field)}{or_null}", f"write it as {_yaml(field.default or [2, 1])}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


_FITS: dict[Any, Callable[[object], bool]] = {
    int: _is_whole,
    float: _is_number,
    str: lambda value: isinstance(value, str),
}


def _number_way_out(value: object, kind: type[int] | type[float], default: object) -> str:
    """The number that was probably meant."""
    try:
        number = float(value.replace("_", "").replace(",", "")) if isinstance(value, str) else value
    except ValueError:
        number = None
    if _is_number(number):
        assert isinstance(number, (int, float))
        plainly = ", digits only and without quotes" if isinstance(value, str) else ""
        if kind is float:
            return f"write {number:g}{plainly}"
        if number == int(number):
            return f"write {int(number)}{plainly}"
        return f"write {math.floor(number)} or {math.ceil(number)}"
    return f"the default is {_yaml(default)}"


def _noun(field: Field) -> str:
    lists = {int: "a list of whole numbers", str: "a list of names"}
    return lists.get(field.item, _NOUN[field.kind])


def _noun_of(value: object) -> str:
    return "true or false" if isinstance(value, bool) else "a number"


_NOUN: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list of numbers",
    object: "a value",
}


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


FIELDS: dict[str, Field] = schema_fields()
"""All keys."""
LEAVES: dict[str, Field] = {path: field for path, field in FIELDS.items() if not field.is_section}
"""All keys that hold values."""
