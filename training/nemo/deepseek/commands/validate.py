"""``deepseek validate``: every error of a configuration, or what a sound one means in numbers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from omegaconf import OmegaConf

from deepseek.commands.validate_tables import validate_report
from deepseek.config import RunConfig, UserError, load_config
from deepseek.config.load import unchecked_value
from deepseek.config.placement import placement_notes, placement_tables
from deepseek.console import say, table

USUAL_NODE = 8
"""Processes of a node where the configuration names none: GPUs of a usual server."""


def validate(config: str, overrides: Sequence[str] = (), world: int | None = None) -> None:
    """Print the numbers of a sound configuration, and its layout if it has several processes.

    Args:
        config: name of a shipped configuration, or a YAML file.
        overrides: ``a.b=c``.
        world: processes of a cluster that need not be there; None: as configured.

    Raises:
        ConfigError: every problem at once.
        UserError: ``world`` processes do not fill whole nodes.
    """
    if world is not None:
        overrides = [*overrides, *_cluster(config, overrides, world)]
    cfg = load_config(config, overrides)
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    table(f"{config} is sound", ("what", "value"), validate_report(run))
    if run.trainer.devices * run.trainer.num_nodes > 1:
        for title, columns, rows in placement_tables(run):
            table(title, columns, rows)
        for note in placement_notes(run):
            say(f"note: {note}")
    say(f"train it with: {shlex.join(['deepseek', 'train', '--config', config, *overrides])}")


def _cluster(config: str, overrides: Sequence[str], world: int) -> list[str]:
    """The overrides that make ``world`` processes: one node, or whole nodes as configured."""
    devices = unchecked_value(config, overrides, "trainer.devices")
    nodes = unchecked_value(config, overrides, "trainer.num_nodes")
    if world < 1:
        raise UserError(f"--world {world}: a cluster has at least 1 process; use 1 or more")
    if not isinstance(devices, int) or not isinstance(nodes, int) or devices < 1:
        return []  # the configuration's own problem is told
    node = USUAL_NODE if devices * nodes == 1 else devices
    if world <= node:
        say(f"for {world} processes: one node (trainer.devices={world} trainer.num_nodes=1)")
        return [f"trainer.devices={world}", "trainer.num_nodes=1"]
    if world % node:
        fewer, more = world // node * node, -(-world // node) * node
        raise UserError(
            f"--world {world}: nodes of {node} processes make {fewer} or {more}; use one of these, "
            f"or give trainer.devices another divisor of {world}"
        )
    say(f"for {world} processes: trainer.num_nodes={world // node} of trainer.devices={node}")
    return [f"trainer.devices={node}", f"trainer.num_nodes={world // node}"]
