"""One YAML file: its schema, how it is read, and the rules it must obey. No torch here."""

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
