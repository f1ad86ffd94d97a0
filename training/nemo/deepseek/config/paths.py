"""Files that must be there, folders that must be possible, and names that become folders.

Paths are read relative to the current folder; ``~`` is not expanded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek.config.errors import Problem
from deepseek.config.fields import LEAVES
from deepseek.config.schema import RunConfig


def data_files(cfg: RunConfig) -> Iterator[Problem]:
    """Prefixes and blends name files that exist."""
    for key in ("data_prefix", "validation_prefix"):
        yield from _prefix_problems(f"model.data.{key}", getattr(cfg.model.data, key))


def tokenizer_file(cfg: RunConfig) -> Iterator[Problem]:
    """A given tokenizer exists."""
    path = cfg.model.tokenizer.path
    if path is None:
        return
    if Path(path).is_dir() and not (Path(path) / "tokenizer.json").is_file():
        fault = f"the folder {path} holds no tokenizer.json"
    elif not Path(path).exists():
        fault = f"there is no file {Path(path).absolute()}"
    else:
        return
    yield Problem(
        "model.tokenizer.path",
        path,
        fault,
        _home_way_out(path) or "give a tokenizer.json, a folder that holds one, or null",
    )


def starting_weights(cfg: RunConfig) -> Iterator[Problem]:
    """Weights to start from are there: a checkpoint, a folder with checkpoints, a .nemo file."""
    path = cfg.model.restore_from
    if path is None:
        return
    folder = Path(path)
    if (folder / "manifest.json").is_file() or any(folder.glob("checkpoints/step_*/manifest.json")):
        return
    if folder.is_file() and folder.suffix == ".nemo":
        return
    way_out = (
        "give a run folder, the result of `deepseek hf import`, a checkpoint, a .nemo file, or null"
    )
    if not folder.exists():
        fault = f"there is no folder {folder.absolute()}"
    elif folder.is_file():
        fault = "is a file, but no .nemo file"
    else:
        fault = "holds no checkpoint (no manifest.json, and none in checkpoints/step_*)"
        if (folder / "config.json").is_file():
            fault = "holds Hugging Face files, which must be imported first"
            way_out = f"run `deepseek hf import {path} NEW_FOLDER` and give NEW_FOLDER"
    yield Problem("model.restore_from", path, fault, _home_way_out(path) or way_out)


def folders(cfg: RunConfig) -> Iterator[Problem]:
    """Folders to write to can be made, and names of runs are names."""
    for key, folder in (
        ("exp_manager.exp_dir", cfg.exp_manager.exp_dir),
        ("model.data.cache_dir", cfg.model.data.cache_dir),
    ):
        if folder is None:
            continue
        if not folder:
            yield Problem(key, folder, "must name a folder", f"use {LEAVES[key].default}")
        elif _home_way_out(folder):
            yield Problem(key, folder, "~ is not expanded in a file", str(_home_way_out(folder)))
        elif Path(folder).exists() and not Path(folder).is_dir():
            yield Problem(key, folder, "is a file", "give a folder, or a name that is free")


def run_names(cfg: RunConfig) -> Iterator[Problem]:
    """A name becomes one folder."""
    for key, name in (
        ("name", cfg.name),
        ("exp_manager.name", cfg.exp_manager.name),
        ("exp_manager.version", cfg.exp_manager.version),
    ):
        if name is None:
            continue
        plain = "".join("_" if c in "/\\\0" or not c.isprintable() else c for c in name).strip()
        if plain != name or plain in ("", ".", ".."):
            free = plain if plain not in ("", ".", "..") else "deepseek"
            rule = "becomes one folder, so it holds no path separators and no surrounding spaces"
            yield Problem(
                key, name, rule, f"use {free}; folders above it go in exp_manager.exp_dir"
            )


def _prefix_problems(key: str, value: Any) -> Iterator[Problem]:
    """Problems of a prefix, or of a blend ``[weight, prefix, weight, prefix]``."""
    form = f"write {key}=PREFIX, or a blend [0.7, PREFIX1, 0.3, PREFIX2]"
    if value is None:
        return
    if isinstance(value, str):
        yield from _file_problems(key, value)
        return
    if not isinstance(value, list):
        yield Problem(key, value, "must be a prefix, a blend or null", form)
        return
    weights, prefixes = value[0::2], value[1::2]
    if value and all(isinstance(item, str) for item in value):
        example = ", ".join(f"{1 / len(value):.2g}, {prefix}" for prefix in value)
        yield Problem(key, value, "a blend needs a weight before each prefix", f"write [{example}]")
        return
    if not value or len(weights) != len(prefixes):
        rule = f"a blend is pairs of weight and prefix, got {len(value)} entries"
        yield Problem(key, value, rule, form)
        return
    for weight, prefix in zip(weights, prefixes, strict=True):
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not 0 < weight < math.inf:
            rule = f"the weight {weight} must be a number above 0"
            way_out = "use shares such as 0.7 and 0.3, or leave that prefix out"
            yield Problem(key, value, rule, way_out)
        if isinstance(prefix, str):
            yield from _file_problems(key, prefix)
        else:
            yield Problem(key, value, f"the prefix {prefix} must be text", form)


def _file_problems(key: str, prefix: str) -> Iterator[Problem]:
    stem, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx"):
        rule = f"a prefix is given without {suffix}, since it names both P.bin and P.idx"
        yield Problem(key, prefix, rule, f"use {stem}")
        return
    files = [Path(f"{prefix}{ending}").absolute() for ending in (".bin", ".idx")]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        rule = f"there is no file {' and no file '.join(missing)}"
        way_out = "make them with `deepseek prepare-data`, or use null for the built-in corpus"
        yield Problem(key, prefix, rule, _home_way_out(prefix) or way_out)


def _home_way_out(path: str) -> str | None:
    return f"use {os.path.expanduser(path)}" if path.startswith("~") else None
