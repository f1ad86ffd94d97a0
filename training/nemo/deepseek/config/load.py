"""From a name or a file to a checked configuration.

    load_config("deepseek_v3_base", ["trainer.max_steps=500"])

1. read the file and the files it extends, the oldest first;
2. put the overrides on top;
3. resolve ``${section.key}``;
4. have values chosen for the keys of the layout that are ``auto``;
5. check keys, types and rules, and raise every problem at once as one ``ConfigError``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deepseek.config.errors import ConfigError, Problem, nearest, shown
from deepseek.config.foreign_names import NO_SUCH_KEY, RENAMED
from deepseek.config.layout import DEVICES, PLANNED
from deepseek.config.rules import joint_problems, single_problems
from deepseek.config.schema import FIELDS, LEAVES, Field, RunConfig, changed, value_at
from deepseek.config.yaml_file import Document, dump_yaml, read_yaml, read_yaml_file

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""Folder of the shipped configurations."""

Planner = Callable[[RunConfig, Sequence[str]], Mapping[str, object]]
"""Values for keys that are ``auto``; it gets the configuration, these at their defaults in it."""


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    planner: Planner | None = None,
) -> RunConfig:
    """The checked configuration of a run.

    Args:
        source: name of a shipped configuration (``deepseek_v3_base``), path of a YAML file, or a
            mapping.
        overrides: ``section.key=value``, value in YAML; a later one wins over an earlier. A leading
            ``--``, ``+`` or ``++`` is tolerated.
        planner: chooses what is ``auto``; None: nothing may be.

    Raises:
        ConfigError: every problem found. A file that is missing or is not YAML is raised alone,
            since nothing else can be known.
    """
    name, draft = _drafted(source, overrides)
    config = draft.resolved()
    if planner is None:
        draft.problems += [_unplanned(path) for path in draft.auto]
    problems = draft.problems + joint_problems(config, draft.wrong.union(draft.auto))
    if draft.auto and planner is not None and not problems:
        config = changed(config, planner(config, draft.auto))
        problems = joint_problems(config, ())
    if problems:
        raise ConfigError([draft.located(problem) for problem in problems], name)
    return config


def draft_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str], defaults: Mapping[str, object]
) -> tuple[RunConfig, list[str]]:
    """A configuration that is sound with other values of some keys, whatever it has there itself.

    Args:
        source, overrides: as for ``load_config``.
        defaults: the other values, by dotted key.

    Returns:
        The configuration with its own values, and its keys that are ``auto``, which stand at their
        defaults.

    Raises:
        ConfigError: as ``load_config``.
    """
    name, draft = _drafted(source, overrides)
    config = draft.resolved()
    problems = draft.problems + joint_problems(changed(config, defaults), draft.wrong)
    if problems:
        raise ConfigError([draft.located(problem) for problem in problems], name)
    return config, draft.auto


def unchecked_value(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str], path: str
) -> object:
    """The value of one key, whatever the others hold; None where it is wrong itself.

    Raises ``ConfigError`` for a file that is missing or is not YAML.
    """
    _, draft = _drafted(source, overrides)
    config = draft.resolved()
    return None if path in draft.wrong else value_at(config, path)


def stored_config(tree: Mapping[str, Any]) -> RunConfig:
    """The configuration that a checkpoint holds, a plain tree; what it lacks is at its default.

    No rule between keys is applied: folders and files that it names may be gone.

    Raises ``ConfigError`` for keys and values that are not of this version.
    """
    draft = _Draft()
    draft.add(Document(plain_copy(tree)))
    config = draft.resolved()
    if draft.problems:
        raise ConfigError(draft.problems, "the stored configuration")
    return config


def resolved_yaml(config: RunConfig) -> str:
    """Every key of ``config`` in the schema's order; ``load_config`` reads the same from it."""
    return dump_yaml(asdict(config))


def shipped_configs() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


# -- files --


def _drafted(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str]
) -> tuple[str, _Draft]:
    """The configuration's name in messages, and its values put together."""
    name = "the configuration" if isinstance(source, Mapping) else f"configuration {source}"
    draft = _Draft()
    for document in _chain(source, name):
        draft.add(document)
    for override in overrides:
        draft.override(override)
    return name, draft


def _chain(source: str | Path | Mapping[str, Any], name: str) -> list[Document]:
    """``source`` and what it extends, the oldest first; ``name`` is the configuration's name in
    messages.

    Raises ``ConfigError`` for a file that is missing, cannot be read or is not YAML, and for
    ``extends`` that goes in a circle.
    """
    documents: list[Document] = []
    seen: list[Path] = []
    if isinstance(source, Mapping):
        document, folder, where = Document(plain_copy(source)), Path(), ""
    else:
        path = _find(str(source), Path(), name, where="")
        document, folder, where = _read(path, name), path.parent, _label(path)
        seen = [path.resolve()]
    while True:
        documents.insert(0, document)
        where = document.lines.pop("extends", where)
        parent = document.tree.pop("extends", None)
        if parent is None:
            return documents
        if not isinstance(parent, str):
            rule = f"extends must name one configuration, got {parent}"
            raise ConfigError([Problem("", parent, rule, "write `extends: NAME`", where)], name)
        path = _find(parent, folder, name, where)
        if path.resolve() in seen:
            names = " -> ".join(_label(p) for p in [*seen, path])
            rule = f"extends goes in a circle: {names}"
            way_out = "remove one `extends` of the circle"
            raise ConfigError([Problem("", parent, rule, way_out, where)], name)
        seen.append(path.resolve())
        document, folder = _read(path, name), path.parent


def _find(wanted: str, folder: Path, name: str, where: str) -> Path:
    """The file of a shipped name, or of a path relative to ``folder``."""
    shipped = shipped_configs()
    if wanted in shipped:
        return CONFIGS / f"{wanted}.yaml"
    path = folder / wanted
    if path.is_file():
        return path
    if path.is_dir():
        rule, way_out = f"{path} is a folder", "give a YAML file inside it"
    else:
        near = nearest(Path(wanted).stem, shipped, cutoff=0.5)
        hint = f" (did you mean {near}?)" if near else ""
        rule = f"there is no file {path} and no shipped configuration {wanted}"
        way_out = f"use a path, or one of {', '.join(shipped)}{hint}"
    raise ConfigError([Problem("", wanted, rule, way_out, where)], name)


def _read(path: Path, name: str) -> Document:
    document = read_yaml_file(path, _label(path), name)
    if not isinstance(document.tree, dict):
        rule = "is empty" if document.tree is None else "must hold sections such as `model:`"
        way_out = "start from a shipped one: `extends: deepseek_v3_tiny`"
        problem = Problem("", None, rule, way_out, _label(path))
        raise ConfigError([*document.problems, problem], name)
    return document


def _label(path: Path) -> str:
    return path.name if path.parent == CONFIGS else str(path)


# -- a configuration while it is put together --


class _Draft:
    """A plain tree, and where its values came from."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.wrong: set[str] = set()
        """Keys and sections whose values are among the problems, and stand at their defaults."""
        self.auto: list[str] = []
        """Keys whose values are to be chosen, and stand at their defaults."""

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
        entry = FIELDS.get(key)
        if entry is not None and entry.kind is str and isinstance(value, (bool, int, float)):
            value = value_text.strip()  # a shell eats the quotes that a file would have
        for path in (key, *(f"{key}.{inner}" for inner in document.lines)):
            self.origins[path] = "override"
        for name in reversed(key.split(".")):
            value = {name: value}
        _merge(self.tree, value)

    def resolved(self) -> RunConfig:
        """The configuration, with the defaults of what is left out or wrong."""
        given = dict(self._known(self.tree, ""))
        present = {path for path, entry in FIELDS.items() if entry.is_section}
        present -= {path for path in present if given.get(path, FIELDS[path].default) is None}
        values = {
            path: given.get(path, entry.default)
            for path, entry in LEAVES.items()
            if path.rpartition(".")[0] in {"", *present}
        }
        if values["trainer.precision"] in (32, "32-true"):  # as Lightning and YAML spell it
            values["trainer.precision"] = "32"
        self._refuse_code(values)
        self._interpolate(values)
        self.auto = [path for path in (*PLANNED, DEVICES) if values[path] == "auto"]
        values.update({path: LEAVES[path].default for path in self.auto})
        kept = {path: value for path, value in values.items() if path not in self.wrong}
        found = single_problems(kept)
        self.problems += found
        self._give_up(values, *(problem.field for problem in found))
        config: RunConfig = _built(RunConfig, values)
        return config

    def located(self, problem: Problem) -> Problem:
        """``problem`` with the file and line, or the override, that set its key."""
        return replace(problem, where=problem.where or self.origins.get(problem.field, ""))

    def _give_up(self, values: dict[str, Any], *paths: str) -> None:
        """Puts defaults in the place of values that are wrong."""
        self.wrong.update(paths)
        values.update({path: LEAVES[path].default for path in paths})

    def _known(self, tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        """(dotted key, value) of all that the schema knows in ``tree``; a section is True, or
        None."""
        for key, value in tree.items():
            path = f"{prefix}{key}"
            entry = FIELDS.get(path) if "." not in str(key) else None
            if entry is None:
                self.problems += _unknown(path, str(key), value)
            elif not entry.is_section or (value is None and entry.optional):
                yield path, value
            elif isinstance(value, Mapping):
                yield path, True
                yield from self._known(value, f"{path}.")
            else:
                self.wrong.add(path)
                self.problems.append(_not_a_section(entry, value))

    def _refuse_code(self, values: dict[str, Any]) -> None:
        """Takes out what would run code or read the environment."""
        for path, value in values.items():
            refused = [_refused_reference(text) for text in _texts(value)]
            for bad in list(filter(None, refused))[:1]:
                rule = (
                    f"{bad} is not read: only ${{section.key}} is, since resolvers would write "
                    "environment and secrets into the saved configuration"
                )
                way_out = "write the value, or pass it as an override on the command line"
                self.problems.append(Problem(path, value, rule, way_out))
                self._give_up(values, path)
            for key in _keys_in(value):
                if key in _CODE_KEYS:
                    self.problems.append(_code_problem(f"{path}.{key}", key, value))
                    self._give_up(values, path)

    def _interpolate(self, values: dict[str, Any]) -> None:
        """Replaces every ``${section.key}`` by the value it names."""
        resolved: dict[str, Any] = {}
        for path, value in values.items():
            if any("${" in text for text in _texts(value)):
                try:
                    resolved[path] = _resolved(values, path, value, ())
                except _BrokenReference as broken:
                    self.problems.append(Problem(path, value, broken.rule, broken.way_out))
                    self.wrong.add(path)
                    resolved[path] = LEAVES[path].default
        values.update(resolved)


def plain_copy(value: Any) -> Any:
    """``value`` with dicts for mappings and lists for sequences, sharing nothing with it."""
    if isinstance(value, Mapping):
        return {key: plain_copy(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain_copy(item) for item in value]
    return value


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Lays ``above`` over ``below``: sections are merged, anything else replaced."""
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = plain_copy(value)


def _built(kind: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass ``kind`` of complete ``values`` by dotted key, each of its key's type."""
    found: dict[str, Any] = {}
    for name in kind.__dataclass_fields__:
        path = f"{prefix}{name}"
        entry, value = FIELDS[path], values.get(path)
        if entry.is_section:
            below = any(other.startswith(f"{path}.") for other in values)
            value = _built(entry.kind, values, f"{path}.") if below else None
        elif isinstance(value, list):
            value = [float(number) if entry.item is float else number for number in value]
        elif entry.kind is float and value is not None:
            value = float(value)
        found[name] = value
    return kind(**found)


def _texts(value: Any) -> Iterator[str]:
    """All text inside a plain value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _keys_in(value: Any) -> Iterator[str]:
    """All mapping keys inside a plain value."""
    if isinstance(value, Mapping):
        yield from map(str, value)
    if isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _keys_in(item)


# -- references --

_REFERENCE = re.compile(r"\$\{\s*(\.*[A-Za-z_]\w*(?:\.\w+)*)\s*\}")


class _BrokenReference(Exception):
    """A ``${section.key}`` that names no value."""

    def __init__(self, rule: str, way_out: str) -> None:
        self.rule, self.way_out = rule, way_out


def _resolved(values: Mapping[str, Any], path: str, value: Any, waiting: tuple[str, ...]) -> Any:
    """``value``, which stands at ``path``, with every reference in it replaced.

    A text that is one reference becomes the value it names, of that value's type; within a longer
    text a reference becomes text. Leading dots count sections upwards: ``${.lr}`` is a neighbour.

    Args:
        values: all values, by dotted key.
        waiting: keys whose values wait for this one.

    Raises:
        _BrokenReference: names nothing, a section, or a value that waits for this one.
    """
    if isinstance(value, Mapping):
        return {key: _resolved(values, path, item, waiting) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(values, path, item, waiting) for item in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None:
        return _named(values, path, whole[1], waiting)
    return _REFERENCE.sub(lambda found: str(_named(values, path, found[1], waiting)), value)


def _named(values: Mapping[str, Any], path: str, name: str, waiting: tuple[str, ...]) -> Any:
    """The value that the reference ``name`` at ``path`` stands for."""
    key = name.lstrip(".")
    dots = len(name) - len(key)
    if dots:
        key = ".".join([*path.split(".")[:-dots], key])
    if key in (path, *waiting):
        raise _BrokenReference("refers to itself in a circle", "write the value in one place")
    if key in FIELDS and FIELDS[key].is_section:
        raise _BrokenReference("refers to a section", "name one of the section's values")
    if key not in values:
        near = nearest(key, LEAVES)
        way_out = f"did you mean ${{{near}}}?" if near else "name a key by its full dotted path"
        raise _BrokenReference(f"refers to {name}, which does not exist", way_out)
    return _resolved(values, key, values[key], (path, *waiting))


def _refused_reference(text: str) -> str | None:
    """The first ``${`` in ``text`` that is no plain reference."""
    rest = _REFERENCE.sub("", text)
    start = rest.find("${")
    return None if start < 0 else rest[start:][:60]


# -- keys that are none --

# What Hydra's `instantiate` acts on.
_CODE_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


def _unknown(path: str, key: str, value: object) -> list[Problem]:
    """One problem for an unknown key; of an unknown section, one for each of its values."""
    if key in _CODE_KEYS:
        return [_code_problem(path, key, value)]
    if isinstance(value, Mapping) and value:
        return [p for name, item in value.items() for p in _unknown(f"{path}.{name}", name, item)]
    if path == "extends":
        way_out = "write it at the top of the file, or choose with --config"
        return [Problem(path, value, "is not a value of the configuration", way_out)]
    if path in FIELDS:  # a dotted name written as one key
        *sections, last = path.split(".")
        way_out = f"nest it: `{': '.join(sections)}:` with `{last}:` below"
        return [Problem(path, value, "a key of a file holds no dots", way_out)]
    return [Problem(path, value, "there is no such key", _meant(path))]


def _meant(path: str) -> str:
    """The way out for the unknown dotted key ``path``.

    Tried in this order: what other programs call it, the same key in another section, the nearest
    spelling in the same section, the nearest spelling anywhere.
    """
    parent, _, key = path.rpartition(".")
    value = next((name for name in LEAVES if path.startswith(f"{name}.")), None)
    if value is not None:
        return f"{value} is a value, not a section: write {value}=..."
    if key in NO_SUCH_KEY:
        return NO_SUCH_KEY[key]
    names = path.split(".")
    for start in range(len(names)):  # as many of its last names as possible
        elsewhere = _ending_with(".".join(names[start:]))
        if elsewhere:
            return f"did you mean {' or '.join(elsewhere)}?"
    if key in RENAMED:
        return f"use {RENAMED[key]}"
    siblings = [name for name in FIELDS if name.rpartition(".")[0] == parent]
    lasts = [name.rpartition(".")[2] for name in siblings]
    near = nearest(key, lasts, cutoff=0.6)
    if near is not None:
        return f"did you mean {parent}.{near}?" if parent else f"did you mean {near}?"
    near = nearest(key, {name.rpartition(".")[2] for name in FIELDS})
    if near is not None:
        return f"did you mean {' or '.join(_ending_with(near))}?"
    section = parent or "the top level"
    if len(lasts) > 12:
        return f"`deepseek cat deepseek_v3_tiny` shows the {len(lasts)} keys of {section}"
    return f"{section} has the keys {', '.join(lasts)}" if lasts else "remove it"


def _ending_with(suffix: str) -> list[str]:
    return [name for name in FIELDS if name == suffix or name.endswith(f".{suffix}")]


def _unplanned(path: str) -> Problem:
    rule = "is chosen where it is known what the run has: in `deepseek train` and `validate`"
    way_out = "have `deepseek plan --write FILE` choose it, or give a value"
    return Problem(path, "auto", rule, way_out)


def _code_problem(path: str, key: str, value: object) -> Problem:
    rule = (
        f"{key} is refused: a configuration is data, and {key} would let a file import and run code"
    )
    return Problem(path, value, rule, "remove it; names such as model.optim.name choose what runs")


def _not_a_section(entry: Field, value: object) -> Problem:
    section = entry.path
    children = [path.rpartition(".")[2] for path in FIELDS if path.rpartition(".")[0] == section]
    rule = f"is a section with keys {', '.join(children[:4])}" + (", ..." if children[4:] else "")
    if value is None:
        return Problem(section, value, rule, "remove the empty line or give one of its keys")
    named = children[0] in ("name", "type")
    example = f"{children[0]}={shown(value) if named else 'VALUE'}"
    return Problem(section, value, rule, f"write {section}.{example}")
