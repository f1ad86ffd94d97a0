"""One YAML file: its schema, how it is read, and the rules it must obey. No torch here."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek.config.errors import ConfigError, Problem, UserError
    from deepseek.config.load import load_config, resolved_yaml, shipped_configs, stored_config
    from deepseek.config.rules import check
    from deepseek.config.schema import ModelConfig, RunConfig, changed

__all__ = [
    "ConfigError",
    "ModelConfig",
    "Problem",
    "RunConfig",
    "UserError",
    "changed",
    "check",
    "load_config",
    "resolved_yaml",
    "shipped_configs",
    "stored_config",
]


def __getattr__(name: str) -> object:
    """A name from the file that has it, when it is first used: the command line starts without."""
    if name in __all__:
        for file in ("errors", "schema", "rules", "load"):
            found = vars(importlib.import_module(f"deepseek.config.{file}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module 'deepseek.config' has no attribute {name!r}")
