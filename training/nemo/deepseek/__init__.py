"""Train DeepSeek-V3-class models from one YAML file, on a laptop or a cluster.

The names below are the public Python interface (``docs/python.md``). They are imported when they
are first used, so ``import deepseek`` and everything about configurations stay free of torch.
"""

import importlib

__version__ = "0.2.0"

_HOME = {
    "ConfigError": "config",
    "DeepSeekModel": "training.step",
    "ModelConfig": "config",
    "RunConfig": "config",
    "Transformer": "models.transformer",
    "UserError": "config",
    "count_parameters": "config.cost",
    "generate": "api",
    "load_config": "config",
    "open_checkpoint": "interop.open_weights",
    "open_data": "api",
    "read_run": "monitoring.run_log",
    "resolved_yaml": "config",
    "train": "api",
}
"""Public name -> the module that defines it; ``__init__.pyi`` tells the same to type checkers."""

__all__ = ["__version__", *_HOME]  # noqa: PLE0604  # all of them are text


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'deepseek' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deepseek.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
