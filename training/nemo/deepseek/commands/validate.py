"""``deepseek validate``: every error of a configuration, or what a sound one means in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import OmegaConf

from deepseek.config import RunConfig, load_config
from deepseek.console import say, table
from deepseek.planner.report import validate_report


def validate(config: str, overrides: Sequence[str] = ()) -> None:
    """Print the numbers of a sound configuration.

    Raises:
        ConfigError: every problem at once.
    """
    cfg = load_config(config, overrides)
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    table(f"{config} is sound", ("what", "value"), validate_report(run))
    say(f"train it with: deepseek train --config {' '.join([config, *overrides])}")
