"""Counts the rows that come to the experts of this rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deepseek.models.components.moe import GroupedExperts


class ReceivedRows:
    """Listens to the experts of a model; only shapes are looked at, so no device is waited for.

    A row is one choice of one token, padding included, since it travels and is computed too. Rows
    that recomputation sends a second time are not counted.

    Args:
        model: this rank's part.

    Attributes:
        total: rows since ``start``, over layers and micro-batches.
        largest: of one layer and micro-batch, the most: what memory has to hold at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = self.largest = 0
        self._handles = [
            module.register_forward_pre_hook(self._hear)
            for module in model.modules()
            if isinstance(module, GroupedExperts)
        ]

    def start(self) -> None:
        """Begin at nothing."""
        self.total = self.largest = 0

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _hear(self, module: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass: recomputation
            return
        rows = len(args[0])
        self.total += rows
        self.largest = max(self.largest, rows)
