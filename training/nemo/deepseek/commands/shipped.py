"""``deepseek ls``, ``cp`` and ``cat`` of configurations."""

from __future__ import annotations

import re
from pathlib import Path

from deepseek.config import load_config, resolved_yaml
from deepseek.config.cost import count_parameters
from deepseek.config.errors import UserError
from deepseek.config.load import CONFIGS, shipped_configs
from deepseek.config.yaml_file import dump_yaml
from deepseek.console import say, table
from deepseek.files import write_new


def list_configs() -> None:
    """One row per shipped configuration."""
    rows = []
    for name in shipped_configs():
        run = load_config(name)
        model, counts = run.model, count_parameters(run.model)
        processes = run.trainer.devices * run.trainer.num_nodes
        rows.append(
            (
                name,
                _size(counts.total),
                _size(counts.active),
                f"{model.num_hidden_layers} x {model.hidden_size}",
                f"{model.n_routed_experts} top-{model.num_experts_per_tok}",
                str(processes),
            )
        )
    columns = ("config", "parameters", "active", "layers x width", "experts", "processes")
    table("shipped configurations", columns, rows)


def copy_config(name: str, target: Path) -> None:
    """Copy a configuration to a file of your own, complete and commented; its runs get its name.

    Raises:
        UserError: unknown name, or the target exists.
    """
    source = _path(name)
    if target.is_dir():
        target = target / source.name
    write_new(target, _named(_text(source), target.stem))
    say(f"wrote {target}; try: deepseek validate {target}")


def print_config(name: str, resolved: bool = False) -> None:
    """Print a configuration as it stands, or with every key resolved."""
    if resolved:
        say(resolved_yaml(load_config(name)).rstrip())
    else:
        say(_text(_path(name)).rstrip())


def _path(name: str) -> Path:
    """The file of a shipped configuration, or of one given by path."""
    path = CONFIGS / f"{name}.yaml"
    if path.exists():
        return path
    if Path(name).is_file():
        return Path(name)
    load_config(name)  # raises with the nearest name
    raise UserError(f"{name}: no such configuration")


def _named(text: str, name: str) -> str:
    """The text of a configuration with another ``name``; the comment beside it stays."""
    line = dump_yaml({"name": name}).strip()
    old = re.search(r"^name:[^#\n]*", text, re.MULTILINE)
    if old is None:
        return f"{line}\n{text}"
    return text[: old.start()] + line.ljust(len(old[0])) + text[old.end() :]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a YAML file") from error


def _size(count: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count:,}"
