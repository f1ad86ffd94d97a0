"""The store that the tests of this folder write to."""

from pathlib import Path

import pytest

from deepseek.checkpoint.manager import CheckpointManager


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints")
