"""``deepseek nemo export``: a checkpoint of any layout to a ``.nemo`` file."""

from __future__ import annotations

from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.console import StageProgress, say
from deepseek.interop.open_weights import OpenedCheckpoint, open_checkpoint, with_config


def export_nemo(checkpoint: Path, target: Path) -> None:
    """Write the weights and the ``model`` section into ``target``.

    Args:
        checkpoint: a checkpoint, or a run or imported folder, of which the newest is taken.
        target: a file that does not exist, ending in ``.nemo``.

    Raises:
        UserError: no sound checkpoint, only adapters in it, no room.
    """
    if target.suffix != ".nemo":
        raise UserError(f"{target}: NeMo expects the ending .nemo; use {target}.nemo")
    if target.exists():
        raise UserError(f"{target} exists already and nothing is overwritten; give another name")
    opened = open_checkpoint(checkpoint)
    if opened.config.model.peft is not None:
        raise UserError(
            f"{opened.path} holds adapters only; `deepseek lora merge {checkpoint} DIR` makes a "
            "whole model, and `deepseek nemo export DIR FILE` a .nemo file of it"
        )
    _write(opened, target)


def keep_nemo(folder: Path, name: str) -> None:
    """Make sure that ``name.nemo`` in the run folder ``folder`` is of its newest checkpoint.

    For one process; the others of the run need not be there any more.

    Raises:
        UserError: no sound checkpoint, no room.
    """
    from deepseek.checkpoint.folder import newest_sound
    from deepseek.commands.versions import finished_steps
    from deepseek.console import complain
    from deepseek.interop.nemo_file import step_in
    from deepseek.run_folder import CHECKPOINTS

    target = folder / f"{name}.nemo"
    if target.is_file() and step_in(target) == finished_steps(folder):
        return
    checkpoint = newest_sound(folder / CHECKPOINTS, complain)
    assert checkpoint is not None, "the last step is always kept"
    _write(with_config(checkpoint), target)


def _write(opened: OpenedCheckpoint, target: Path) -> None:
    from deepseek.interop.nemo_file import NemoWriter

    writer = NemoWriter(opened.checkpoint, opened.config.model)
    total = writer.nbytes
    with StageProgress() as shown:
        writer.write(
            target,
            lambda done: shown.update("writing .nemo", done, total, f"{done / 1e9:,.2f} GB"),
        )
    say(f"nemo         {target}, step {opened.step}, {total / 1e9:,.2f} GB")
