"""Small checkpoints, what is in them, and how to damage them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manager import CheckpointManager


def save(manager: CheckpointManager, step: int, value: float | None = None) -> Path:
    numbers = torch.full((3, 4), float(step) if value is None else value)
    return manager.save(step, {"layer.weight": numbers}, {"step": step, "value": value})


def value_of(checkpoint: Checkpoint | None) -> float:
    assert checkpoint is not None
    numbers = torch.zeros(3, 4)
    checkpoint.load({"layer.weight": numbers})
    assert (numbers == numbers[0, 0]).all()
    return float(numbers[0, 0])


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def shard_of(path: Path) -> Path:
    return path / "__0_0.distcp"


def flip_number(path: Path) -> None:
    """Damage that keeps every size: a bit of a number."""
    flip(shard_of(path), shard_of(path).read_bytes().index(np.float32(path_step(path)).tobytes()))


def path_step(path: Path) -> int:
    return int(path.name[5:])


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
