"""What a run folder says about its run: resolved configuration, tokenizer, environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek.data.tokenizer import Tokenizer
from deepseek.files import atomic_open
from deepseek.frameworks import Callback


class RunRecord(Callback):
    """Writes them at the start, after a checkpoint has been restored.

    A start that is refused, since its configuration or its data differ or another process has the
    folder, must leave the record of the run as it is.

    Args:
        config_path: the file of the configuration.
        config: its content, every key resolved.
        tokenizer_folder: where the tokenizer goes.
        tokenizer: None if the data come without one.
        environment_path: the file of the environment.
        environment: its content.
    """

    def __init__(
        self,
        config_path: Path,
        config: str,
        tokenizer_folder: Path,
        tokenizer: Tokenizer | None,
        environment_path: Path,
        environment: dict[str, Any],
    ) -> None:
        self.config_path = config_path
        self.config = config
        self.tokenizer_folder = tokenizer_folder
        self.tokenizer = tokenizer
        self.environment_path = environment_path
        self.environment = environment

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Each file is whole or absent after a kill."""
        with atomic_open(self.config_path) as file:
            file.write(self.config.encode())
        with atomic_open(self.environment_path) as file:
            file.write(json.dumps(self.environment, indent=2).encode() + b"\n")
        if self.tokenizer is not None:
            self.tokenizer.save(self.tokenizer_folder)
