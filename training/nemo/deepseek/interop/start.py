"""Starts a run from the weights of another one, or of an imported model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.folder import newest_sound
from deepseek.checkpoint.manifest import MANIFEST
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.training_state import Base, load_weights
from deepseek.config.errors import UserError
from deepseek.frameworks import Callback
from deepseek.interop.adapters import open_base
from deepseek.interop.hf_config import COMPUTED_KEYS
from deepseek.interop.nemo_file import open_weights
from deepseek.models.components.lora import is_adapter
from deepseek.models.transformer import global_name
from deepseek.run_folder import CHECKPOINTS


class StartingWeights(Callback):
    """Fills the model before the first step, in any layout; comes after ``Checkpointing``.

    A run that was resumed keeps its own weights; one with adapters gets the weights below them,
    the same ones as before. Steps, data and optimiser start anew.

    Args:
        source: ``model.restore_from``: a checkpoint, a folder with ``checkpoints/``, or a ``.nemo``
            file.
        model: the ``model`` section of this run.
        report: where messages go; called on rank 0 only.
    """

    def __init__(self, source: Path, model: dict[str, Any], report: Callable[[str], None]) -> None:
        self.source = source
        self.model = model
        self._ranks = Ranks()
        self._report = report

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Load the weights, or say that a resumed run needs none.

        Raises:
            UserError: no sound checkpoint, or it is of another model.
        """
        has_adapters = pl_module.config.peft is not None
        if pl_module.finished_steps > 0 and not has_adapters:
            self._say(
                f"model.restore_from={self.source} is ignored: the run goes on from its own "
                f"checkpoint of step {pl_module.finished_steps}"
            )
            return
        checkpoint = self._open_below(pl_module) if has_adapters else self._open()
        mine = [f"model.{global_name(name)}" for name in pl_module.model.state_dict()]
        known = checkpoint.ranks.together(lambda: mine)
        left = _unused(checkpoint, {name for names in known for name in names})
        for note in self._differences(checkpoint.state()):
            self._say(note)
        load_weights(checkpoint, pl_module.model)
        if has_adapters:
            pl_module.base = self._ranks.lead(lambda: Base.of(checkpoint.path))
        self._say(
            f"{'adapters on' if has_adapters else 'started from'} the weights of {checkpoint.path}"
        )
        if left:
            self._say(f"not used: its {left} tensors of MTP modules, which this model lacks")

    def _open_below(self, pl_module: Any) -> Checkpoint:
        """What the adapters are on: in a resumed run, the checkpoint that is recorded."""
        if pl_module.base is None:
            return self._open()
        return open_base(pl_module.base, self._ranks, str(self.source))

    def _open(self) -> Checkpoint:
        source = self.source
        if self._ranks.lead(lambda: source.is_file() or (source / MANIFEST).is_file()):
            return open_weights(source, self._ranks)
        checkpoint = newest_sound(self.source / CHECKPOINTS, self._report, self._ranks)
        if checkpoint is None:
            raise UserError(
                f"model.restore_from={self.source}: there is no checkpoint in it any more"
            )
        return checkpoint

    def _differences(self, state: dict[str, Any]) -> Iterable[str]:
        """Settings under which the weights would compute something else than they did."""
        theirs = state.get("config", {}).get("model", {})
        for key in sorted(COMPUTED_KEYS & theirs.keys()):
            if theirs[key] != self.model[key]:
                yield (
                    f"note: the weights were made with model.{key}={theirs[key]}, this run has "
                    f"{self.model[key]}"
                )

    def _say(self, message: str) -> None:
        if self._ranks.rank == 0:
            self._report(message)


def _unused(checkpoint: Checkpoint, known: set[str]) -> int:
    """How many weights no rank has a place for; only MTP modules may be left out."""
    left = [
        name
        for name in checkpoint.tensor_names()
        if name.startswith("model.") and name not in known
    ]
    if any(is_adapter(name) for name in checkpoint.tensor_names()):
        raise UserError(
            f"{checkpoint.path} holds adapters; `deepseek lora merge RUN DIR` makes one model of "
            "them and the weights below, to start from"
        )
    foreign = [name for name in left if not name.startswith("model.mtp.")]
    if foreign:
        raise UserError(
            f"{checkpoint.path} holds {len(foreign)} weights that this model does not have, such "
            f"as {foreign[0]}; use the model section of the config.yaml that lies with it"
        )
    return len(left)
