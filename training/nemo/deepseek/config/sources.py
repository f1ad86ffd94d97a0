"""Where configurations are read from: shipped names, files, and the one that each extends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek.config.errors import ConfigError, Problem
from deepseek.config.foreign_names import nearest
from deepseek.config.strict_yaml import MAX_BYTES, Document, read_yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""Folder of the shipped configurations."""


def chain(source: str | Path | Mapping[str, Any], name: str) -> list[Document]:
    """``source`` and what it extends, the oldest first; ``name`` is the configuration's name in
    messages.

    Raises ``ConfigError`` for a file that is missing, cannot be read or is not YAML, and for
    ``extends`` that goes in a circle.
    """
    documents: list[Document] = []
    if isinstance(source, Mapping):
        document, folder, where = Document(plain_copy(source)), Path(), ""
        seen = []
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


def shipped_configs() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def plain_copy(value: Any) -> Any:
    """``value`` with dicts for mappings and lists for sequences, sharing nothing with it."""
    if isinstance(value, Mapping):
        return {key: plain_copy(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain_copy(item) for item in value]
    return value


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
    label = _label(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            rule = f"is longer than {MAX_BYTES:,} bytes, so it is no configuration"
            raise ConfigError([Problem("", None, rule, "give a YAML file", label)], name)
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 text (byte {error.start})"
        raise ConfigError([Problem("", None, rule, "save it as UTF-8", label)], name) from None
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
        raise ConfigError(
            [Problem("", None, rule, "check the file's permissions", label)], name
        ) from None
    document = read_yaml(text, label)
    if not isinstance(document.tree, dict):
        rule = "is empty" if document.tree is None else "must hold sections such as `model:`"
        way_out = "start from a shipped one: `extends: deepseek_v3_tiny`"
        raise ConfigError([*document.problems, Problem("", None, rule, way_out, label)], name)
    return document


def _label(path: Path) -> str:
    return path.name if path.parent == CONFIGS else str(path)
