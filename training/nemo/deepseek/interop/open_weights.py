"""A checkpoint given on the command line, and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.config import RunConfig
from deepseek.config.errors import ConfigError, UserError
from deepseek.config.load import stored_config
from deepseek.console import complain
from deepseek.data.tokenizer import Tokenizer, load_tokenizer
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that was found sound, and what belongs to it."""

    path: Path
    checkpoint: Any
    config: RunConfig
    run: Path | None
    """Its run folder, if it lies in one."""

    @property
    def step(self) -> int:
        return int(self.checkpoint.step)

    def model(self) -> Any:
        """The model with its weights, adapters merged."""
        import torch

        from deepseek.interop.adapters import load_whole

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_whole(self.checkpoint, self.config.model, device).eval()

    def tokenizer(self) -> Tokenizer | None:
        """The one in its run folder."""
        if self.run is None or not (self.run / TOKENIZER).is_dir():
            return None
        return load_tokenizer(self.run / TOKENIZER)


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """The newest sound checkpoint of a run folder, the checkpoint ``path`` itself, or a ``.nemo``
    file."""
    from deepseek.checkpoint.folder import newest_sound
    from deepseek.interop.nemo_file import open_weights

    if path.is_file() or (path / "manifest.json").is_file():
        return with_config(open_weights(path))
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a run folder, or a checkpoint in its {CHECKPOINTS}/"
        )
    if not (path / CONFIG_FILE).is_file() and not (path / CHECKPOINTS).is_dir():
        raise UserError(
            f"{path} is neither a run folder (it has no {CONFIG_FILE}) nor a checkpoint (it has no "
            "manifest.json); `deepseek train` prints the run folder at its start and end"
        )
    checkpoint = newest_sound(path / CHECKPOINTS, complain)
    if checkpoint is None:
        raise UserError(f"{path / CHECKPOINTS} holds no checkpoint yet; train first")
    return with_config(checkpoint)


def with_config(checkpoint: Any) -> OpenedCheckpoint:
    """The configuration is the one the checkpoint was written with."""
    try:
        config = stored_config(checkpoint.state()["config"])
    except (KeyError, ConfigError) as error:
        raise UserError(
            f"{checkpoint.path}: its configuration is not of this version ({error}); use the "
            "version that wrote it"
        ) from error
    folder = checkpoint.path.resolve().parent
    run = folder.parent if folder.name == CHECKPOINTS else None
    return OpenedCheckpoint(checkpoint.path, checkpoint, config, run)
