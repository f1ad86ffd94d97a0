"""YAML as data and nothing else: plain values, each with the line it came from.

Narrower than PyYAML's safe loader. Tags, anchors, merge keys and second documents are refused;
a key may stand once; keys are text. Plain scalars are read by the core schema of YAML 1.2 (section
10.3), so that ``1e-4`` is a number, and ``no`` and ``12:30`` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deepseek.config.errors import ConfigError, Problem

MAX_BYTES = 100_000
"""Longest file that is read as YAML; a longer one is a checkpoint or data given by mistake."""

MAX_DEPTH = 20
"""Sections within sections. PyYAML takes time with the square of the depth."""


@dataclass
class Document:
    """One YAML file."""

    tree: Any
    """dict, list, str, int, float, bool or None."""
    lines: dict[str, str] = field(default_factory=dict)
    """``file:line`` of every mapping key, by dotted path."""
    problems: list[Problem] = field(default_factory=list)
    """Tags, anchors, repeated keys: what was wrong though the syntax was right."""


def read_yaml(text: str, name: str) -> Document:
    """Reads the one document in ``text``; ``name`` is the file's name in messages.

    Raises ``ConfigError`` with file and line if the text is not YAML.
    """
    document = Document(None)
    try:
        loader = _Loader(text, name, document)
        document.tree = _plain(loader.get_single_node(), "", name, document)
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_problem(error, text, name)], name) from None
    return document


def read_yaml_file(path: Path, label: str, source: str) -> Document:
    """Reads the one document in the file at ``path``, called ``label`` in messages.

    Raises ``ConfigError`` about ``source`` for a file that cannot be read or is not YAML.
    """

    def refused(rule: str, way_out: str) -> ConfigError:
        return ConfigError([Problem("", None, rule, way_out, label)], source)

    try:
        if path.stat().st_size > MAX_BYTES:
            rule = f"is longer than {MAX_BYTES:,} bytes, so it is no configuration"
            raise refused(rule, "give a YAML file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 text (byte {error.start})"
        raise refused(rule, "save it as UTF-8") from None
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise refused(rule, "check the file's permissions") from None
    return read_yaml(text, label)


def dump_yaml(tree: object) -> str:
    """``tree`` as YAML that ``read_yaml`` and YAML 1.1 readers turn into the same values."""
    text: str = yaml.dump(
        tree,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=1_000_000,
    )
    return text


class _Loader(yaml.SafeLoader):
    """Notes on the way whatever says more than data."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str, name: str, document: Document) -> None:
        super().__init__(text)
        self._name, self._document, self._depth = name, document, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """An alias, which is refused, stands for nothing: a few lines of them could stand for
        billions."""
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            return yaml.ScalarNode(_NULL, "", event.start_mark, event.end_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def get_event(self) -> yaml.Event:
        """The next event, of which the nodes are composed."""
        event: yaml.Event = super().get_event()
        self._document.problems += _refused(event, self._name)
        self._depth += isinstance(event, yaml.CollectionStartEvent)
        self._depth -= isinstance(event, yaml.CollectionEndEvent)
        if self._depth > MAX_DEPTH:
            where = f"{self._name}:{event.start_mark.line + 1}"
            rule = f"is nested more than {MAX_DEPTH} deep"
            raise ConfigError([Problem("", None, rule, "remove levels", where)], self._name)
        return event


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Double quotes, which escape, around the line breaks that the plain styles write raw."""
        style = '"' if _UNUSUAL_BREAK.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_UNUSUAL_BREAK = re.compile("[\r\x85\u2028\u2029]")
_Dumper.add_representer(str, _Dumper.represent_text)


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in "null bool int float".split())
_CORE_SCHEMA = [
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]
for _tag, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def _plain(node: yaml.Node | None, path: str, name: str, document: Document) -> Any:
    """The value of ``node``; notes the lines of its keys and its repeated keys."""
    if node is None:
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, name, document) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, name, document)
    text: str = node.value
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return text.lower() == "true"
    if node.tag == _INT:
        try:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        except ValueError:  # Python reads no number of more than 4300 digits
            return text
    if node.tag == _FLOAT:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _mapping(node: yaml.MappingNode, path: str, name: str, document: Document) -> dict[str, Any]:
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        where = f"{name}:{line}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag in (_NULL, _INT, _FLOAT):
            rule = f"a key must be a name, got {_excerpt(key_node)}"
            document.problems.append(Problem("", None, rule, "write `name: value`", where))
            continue
        if key == "<<":
            rule = "merge keys (<<) are not read"
            way_out = "use `extends: NAME` at the top of the file"
            document.problems.append(Problem("", None, rule, way_out, where))
            continue
        full = f"{path}.{key}" if path else key
        if key in found:
            rule = f"the key {full} stands twice, first on line {lines[key]}"
            document.problems.append(Problem("", None, rule, "remove one of the two", where))
            continue
        lines[key] = line
        document.lines[full] = where
        found[key] = _plain(value_node, full, name, document)
    return found


def _refused(event: yaml.Event, name: str) -> list[Problem]:
    """Tags, anchors and aliases: YAML's ways of saying more than data."""
    where = f"{name}:{event.start_mark.line + 1}"
    if isinstance(event, yaml.AliasEvent):
        rule = f"the alias *{event.anchor} is not read"
        return [Problem("", None, rule, "use ${section.key} to repeat a value", where)]
    problems = []
    if getattr(event, "anchor", None) is not None:
        rule = f"the anchor &{event.anchor} is not read"
        problems.append(Problem("", None, rule, "remove it; ${section.key} repeats a value", where))
    if getattr(event, "tag", None) is not None:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        rule = f"the tag {tag} is not read: a configuration holds data, never objects or code"
        problems.append(Problem("", None, rule, "remove the tag", where))
    return problems


def _syntax_problem(error: yaml.YAMLError, text: str, name: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    if mark is None:  # a character that YAML does not allow
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1
        reason = "contains a control character"
    else:
        line = mark.line + 1
        reason = " ".join(
            part
            for part in (getattr(error, "problem", None), getattr(error, "context", None))
            if part
        )
    rows = text.splitlines()
    row = rows[line - 1].strip() if 0 < line <= len(rows) else ""
    if "\t" in (rows[line - 1] if row else ""):
        way_out = f"indent with spaces, not tabs, in `{row[:60]}`"
    elif "single document" in reason:
        way_out = "keep one document: remove the `---` between them"
    else:
        way_out = f"mend the line `{row[:60]}`" if row else "mend the end of the file"
    return Problem("", None, f"is not valid YAML: {reason}", way_out, f"{name}:{line}")


def _excerpt(node: yaml.Node) -> str:
    return str(node.value)[:40] if isinstance(node, yaml.ScalarNode) else "a list or a section"
