"""From a name or a file to a checked configuration.

    load_config("deepseek_v3_base", ["trainer.max_steps=500"])

1. read the file and the files it extends, the oldest first;
2. put the overrides on top;
3. resolve ``${section.key}``;
4. check keys, types and rules, and raise every problem at once as one ``ConfigError``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deepseek.config.errors import ConfigError, Problem, shown
from deepseek.config.fields import FIELDS, LEAVES, Field, type_problems, value_at
from deepseek.config.foreign_names import nearest, unknown_key_way_out
from deepseek.config.rules import check
from deepseek.config.schema import RunConfig
from deepseek.config.sources import CONFIGS, chain, plain_copy, shipped_configs
from deepseek.config.strict_yaml import Document, dump_yaml, read_yaml

__all__ = ["CONFIGS", "load_config", "resolved_yaml", "shipped_configs"]


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a run.

    ``source``: name of a shipped configuration (``deepseek_v3_base``), path of a YAML file, or a
    mapping. ``overrides``: ``section.key=value``, value in YAML; a later one wins over an earlier.
    A leading ``--``, ``+`` or ``++`` is tolerated.

    Raises ``ConfigError`` with every problem found. A file that is missing or is not YAML is
    raised alone, since nothing else can be known.
    """
    name, draft = _drafted(source, overrides)
    config, unreadable = draft.resolved()
    problems = draft.problems + check(config, unreadable)
    if problems:
        raise ConfigError([draft.located(problem) for problem in problems], name)
    return config


def unchecked_value(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str], path: str
) -> object:
    """The value of one key, before any rule is applied; None where it cannot be read.

    Raises ``ConfigError`` for a file that is missing or is not YAML.
    """
    _, draft = _drafted(source, overrides)
    config, unreadable = draft.resolved()
    return None if path in unreadable else value_at(asdict(config), path)


def stored_config(tree: Mapping[str, Any]) -> RunConfig:
    """The configuration that a checkpoint holds, a plain tree; what it lacks is at its default.

    No rule is applied: folders and files that it names may be gone.

    Raises ``ConfigError`` for keys and types that are not of this version.
    """
    draft = _Draft()
    draft.add(Document(plain_copy(tree)))
    config, _ = draft.resolved()
    if draft.problems:
        raise ConfigError(draft.problems, "the stored configuration")
    return config


def resolved_yaml(config: RunConfig) -> str:
    """Every key of ``config`` in the schema's order; ``load_config`` reads the same from it."""
    return dump_yaml(asdict(config))


def _drafted(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str]
) -> tuple[str, _Draft]:
    """The configuration's name in messages, and its values put together."""
    name = "the configuration" if isinstance(source, Mapping) else f"configuration {source}"
    draft = _Draft()
    for document in chain(source, name):
        draft.add(document)
    for override in overrides:
        draft.override(override)
    return name, draft


class _Draft:
    """The configuration while it is put together: a plain tree, and where its values came from."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []

    def add(self, document: Document) -> None:
        """Lays a file over what is there."""
        self.problems += document.problems
        self.origins |= document.lines
        _merge(self.tree, document.tree)

    def override(self, text: str) -> None:
        """Lays one ``section.key=value`` over what is there."""
        key, equals, value_text = text.partition("=")
        key = re.sub(r"^(--|\+\+|\+)", "", key.strip())
        fault = None
        if key.startswith("~"):
            fault = ("a key cannot be removed", f"write {key[1:]}=VALUE, or leave it out")
        elif not equals:
            fault = ("an override is written section.key=value", f"write {key}=VALUE")
        elif not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
            fault = (f"{key!r} is not a key", "write section.key=value, as in trainer.max_steps=10")
        elif not value_text.strip():
            fault = ("has no value", f"write {key}=null, or {key}='\"\"' for empty text")
        if fault is not None:
            self.problems.append(Problem("", text, f"override `{text}`: {fault[0]}", fault[1]))
            return
        try:
            document = read_yaml(value_text, "")
            faults = document.problems
        except ConfigError as error:
            document, faults = Document(None), error.problems
        if faults:
            self.problems += [replace(fault, where=f"override `{text}`") for fault in faults]
            return
        value = document.tree
        if any(key.startswith(f"{leaf}.") for leaf in LEAVES):
            self.problems += _unknown(key, key, value)
            return
        field = FIELDS.get(key)
        if field is not None and field.kind is str and isinstance(value, (bool, int, float)):
            value = value_text.strip()  # a shell eats the quotes that a file would have
        for path in (key, *(f"{key}.{inner}" for inner in document.lines)):
            self.origins[path] = "override"
        for name in reversed(key.split(".")):
            value = {name: value}
        _merge(self.tree, value)

    def resolved(self) -> tuple[RunConfig, set[str]]:
        """The configuration, and the keys whose values could not be read.

        Those stand at their defaults and are named in ``problems``.
        """
        defaults = asdict(RunConfig())
        unreadable: set[str] = set()
        tree = _filled(self._known(self.tree, "", unreadable), defaults)
        self._refuse_code(tree, defaults, unreadable)
        self._interpolate(tree, defaults, unreadable)
        for problem in type_problems(tree):
            if problem.field not in unreadable:
                self.problems.append(problem)
            unreadable.add(problem.field)
        for path in unreadable & LEAVES.keys():
            _put(tree, path, LEAVES[path].default)
        if tree["trainer"]["precision"] in (32, "32-true"):
            tree["trainer"]["precision"] = "32"
        return _built(RunConfig, tree), unreadable

    def located(self, problem: Problem) -> Problem:
        """``problem`` with the file and line, or the override, that set its field."""
        return replace(problem, where=problem.where or self.origins.get(problem.field, ""))

    def _known(self, tree: Mapping[str, Any], prefix: str, unreadable: set[str]) -> dict[str, Any]:
        """``tree`` without its unknown keys and its sections that are no sections."""
        known: dict[str, Any] = {}
        for key, value in tree.items():
            path = f"{prefix}{key}"
            field = FIELDS.get(path) if "." not in str(key) else None
            if field is None:
                self.problems += _unknown(path, str(key), value)
            elif not field.is_section:
                known[key] = value
            elif isinstance(value, Mapping):
                known[key] = self._known(value, f"{path}.", unreadable)
            elif value is None and field.optional:
                known[key] = None
            else:
                unreadable.add(path)
                self.problems.append(_not_a_section(field, value))
        return known

    def _refuse_code(
        self, tree: dict[str, Any], defaults: dict[str, Any], unreadable: set[str]
    ) -> None:
        """Takes out of ``tree`` what would run code or read the environment."""
        for path, value in _leaves(tree):
            for text in _texts(value):
                bad = _refused_interpolation(text)
                if bad is not None:
                    rule = (
                        f"{bad} is not read: only ${{section.key}} is, since resolvers would write "
                        "environment and secrets into the saved configuration"
                    )
                    way_out = "write the value, or pass it as an override on the command line"
                    self.problems.append(Problem(path, value, rule, way_out))
                    unreadable.add(path)
                    _put(tree, path, value_at(defaults, path))
                    break
            for key in _keys_in(value):
                if key in _CODE_KEYS:
                    self.problems.append(_code_problem(f"{path}.{key}", key, value))
                    unreadable.add(path)

    def _interpolate(
        self, tree: dict[str, Any], defaults: dict[str, Any], unreadable: set[str]
    ) -> None:
        """Replaces every ``${section.key}`` in ``tree`` by the value it names."""
        resolved: dict[str, object] = {}
        for path, value in _leaves(tree):
            if not any("${" in text for text in _texts(value)):
                continue
            try:
                resolved[path] = _resolved(tree, path, value, ())
            except _BrokenReference as broken:
                self.problems.append(Problem(path, value, broken.rule, broken.way_out))
                unreadable.add(path)
                resolved[path] = value_at(defaults, path)
        for path, value in resolved.items():
            _put(tree, path, value)


# -- trees --


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Lays ``above`` over ``below``: sections are merged, anything else replaced."""
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = plain_copy(value)


def _filled(
    tree: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """``tree`` with every key of the schema, in the schema's order."""
    filled: dict[str, Any] = {}
    for key, default in defaults.items():
        value = tree.get(key, default)
        field = FIELDS[f"{prefix}{key}"]
        if field.is_section and isinstance(value, Mapping):
            section_defaults = default if default is not None else asdict(field.kind())
            value = _filled(value, section_defaults, f"{prefix}{key}.")
        filled[key] = value
    return filled


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted path, value) of every value of the schema in ``tree``."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if FIELDS[path].is_section and isinstance(value, Mapping):
            found += _leaves(value, f"{path}.")
        else:
            found.append((path, value))
    return found


def _put(tree: dict[str, Any], path: str, value: object) -> None:
    *sections, key = path.split(".")
    node: Any = tree
    for section in sections:
        node = node[section]
        if node is None:
            return
    node[key] = value


def _texts(value: Any) -> Iterator[str]:
    """All text inside a plain value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _keys_in(value: Any) -> Iterator[str]:
    """All mapping keys inside a plain value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys_in(item)


def _built(kind: type[Any], tree: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass ``kind`` of a complete ``tree`` whose values fit their types."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        field = FIELDS[f"{prefix}{key}"]
        if value is not None and field.is_section:
            value = _built(field.kind, value, f"{field.path}.")
        elif value is not None and field.kind is float:
            value = float(value)
        elif value is not None and field.item is float:
            value = [float(number) for number in value]
        values[key] = value
    return kind(**values)


# -- references --

_REFERENCE = re.compile(r"\$\{\s*(\.*[A-Za-z_]\w*(?:\.\w+)*)\s*\}")


class _BrokenReference(Exception):
    """A ``${section.key}`` that names no value."""

    def __init__(self, rule: str, way_out: str) -> None:
        self.rule, self.way_out = rule, way_out


def _resolved(tree: Mapping[str, Any], path: str, value: Any, on_the_way: tuple[str, ...]) -> Any:
    """``value``, which stands at ``path`` of ``tree``, with every reference in it replaced.

    A text that is one reference becomes the value it names, of that value's type; within a longer
    text a reference becomes text. Leading dots count sections upwards: ``${.lr}`` is a neighbour.

    Args:
        on_the_way: paths whose values wait for this one.

    Raises:
        _BrokenReference: names nothing, a section, or a value that waits for this one.
    """
    if isinstance(value, Mapping):
        return {key: _resolved(tree, path, item, on_the_way) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(tree, path, item, on_the_way) for item in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None:
        return _named(tree, path, whole[1], on_the_way)
    return _REFERENCE.sub(lambda found: str(_named(tree, path, found[1], on_the_way)), value)


def _named(tree: Mapping[str, Any], path: str, name: str, on_the_way: tuple[str, ...]) -> Any:
    """The value that the reference ``name`` at ``path`` stands for."""
    key = name.lstrip(".")
    dots = len(name) - len(key)
    if dots:
        key = ".".join([*path.split(".")[:-dots], key])
    if key in (path, *on_the_way):
        raise _BrokenReference("refers to itself in a circle", "write the value in one place")
    value: Any = tree
    for step in key.split("."):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (LookupError, TypeError, ValueError):
            near = nearest(key, LEAVES)
            way_out = f"did you mean ${{{near}}}?" if near else "name a key by its full dotted path"
            rule = f"refers to {name}, which does not exist"
            raise _BrokenReference(rule, way_out) from None
    if isinstance(value, Mapping):
        raise _BrokenReference("refers to a section", "name one of the section's values")
    return _resolved(tree, key, value, (path, *on_the_way))


# -- problems --

# What Hydra's `instantiate` acts on.
_CODE_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def _refused_interpolation(text: str) -> str | None:
    """The first ``${`` in ``text`` that is no plain reference."""
    rest = _REFERENCE.sub("", text)
    start = rest.find("${")
    return None if start < 0 else rest[start:][:60]


def _unknown(path: str, key: str, value: object) -> list[Problem]:
    """One problem for an unknown key; of an unknown section, one for each of its values."""
    if key in _CODE_KEYS:
        return [_code_problem(path, key, value)]
    if isinstance(value, Mapping) and value:
        return [p for name, item in value.items() for p in _unknown(f"{path}.{name}", name, item)]
    if path == "extends":
        way_out = "write it at the top of the file, or choose with --config"
        return [Problem(path, value, "is not a value of the configuration", way_out)]
    rule = "there is no such key"
    if path in FIELDS:  # a dotted name written as one key
        *sections, last = path.split(".")
        way_out = f"nest it: `{': '.join(sections)}:` with `{last}:` below"
        return [Problem(path, value, "a key of a file holds no dots", way_out)]
    return [Problem(path, value, rule, unknown_key_way_out(path))]


def _code_problem(path: str, key: str, value: object) -> Problem:
    rule = (
        f"{key} is refused: a configuration is data, and {key} would let a file import and run code"
    )
    return Problem(path, value, rule, "remove it; names such as model.optim.name choose what runs")


def _not_a_section(field: Field, value: object) -> Problem:
    section = field.path
    children = [path.rpartition(".")[2] for path in FIELDS if path.rpartition(".")[0] == section]
    rule = f"is a section with keys {', '.join(children[:4])}" + (", ..." if children[4:] else "")
    if value is None:
        return Problem(section, value, rule, "remove the empty line or give one of its keys")
    named = children[0] in ("name", "type")
    example = f"{children[0]}={shown(value) if named else 'VALUE'}"
    return Problem(section, value, rule, f"write {section}.{example}")
