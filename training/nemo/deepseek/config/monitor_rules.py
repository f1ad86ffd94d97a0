"""Rules of what is watched and recorded."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek.config.errors import Problem
from deepseek.config.fields import LEAVES
from deepseek.config.schema import RunConfig

_SECTION = "exp_manager.profile"
_LOGGERS = ("wandb", "mlflow")


def loggers(cfg: RunConfig) -> Iterator[Problem]:
    """No setting of a logger that is not made."""
    for name in _LOGGERS:
        if getattr(cfg.exp_manager, f"create_{name}_logger"):
            continue
        section = f"exp_manager.{name}_logger_kwargs"
        settings = getattr(cfg.exp_manager, f"{name}_logger_kwargs")
        for path, leaf in LEAVES.items():
            if not path.startswith(f"{section}."):
                continue
            value = getattr(settings, path.removeprefix(f"{section}."))
            if value != leaf.default:
                yield Problem(
                    path,
                    value,
                    f"would be ignored, since exp_manager.create_{name}_logger=false",
                    f"set exp_manager.create_{name}_logger=true, or take it out",
                )


def profile(cfg: RunConfig) -> Iterator[Problem]:
    """The steps to profile are steps of the run; no setting is without effect."""
    wanted, last = cfg.exp_manager.profile.steps, cfg.trainer.max_steps
    if not wanted:
        for key in ("with_stack", "record_shapes", "memory"):
            if getattr(cfg.exp_manager.profile, key) != LEAVES[f"{_SECTION}.{key}"].default:
                yield Problem(
                    f"{_SECTION}.{key}",
                    True,
                    f"would be ignored, since {_SECTION}.steps names no step",
                    f"use false, or {_SECTION}.steps=[{min(10, last)}]",
                )
        return
    outside = [step for step in wanted if not 1 <= step <= last]
    inside = sorted({step for step in wanted if 1 <= step <= last})
    if outside:
        yield Problem(
            f"{_SECTION}.steps",
            wanted,
            f"names step {outside[0]}, and the run has steps 1 to trainer.max_steps={last}",
            f"use {inside or [min(10, last)]}",
        )
    elif len(inside) < len(wanted):
        twice = next(step for step in wanted if wanted.count(step) > 1)
        yield Problem(f"{_SECTION}.steps", wanted, f"names step {twice} twice", f"use {inside}")
