"""``deepseek lora``: adapters of a run to ``peft``'s files, or merged into one model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from deepseek.config import changed, resolved_yaml
from deepseek.config.errors import UserError
from deepseek.console import say
from deepseek.files import refuse_existing
from deepseek.interop.open_weights import OpenedCheckpoint, open_checkpoint
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER


def export_lora(run: Path, target: Path, base: str | None = None) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as ``peft`` reads them.

    Args:
        run: a run folder with adapters, or a checkpoint of one.
        target: a folder that does not exist.
        base: Hugging Face name or folder of the model below, for ``adapter_config.json``.

    Raises:
        UserError: no adapters, their base is gone or has changed, ``target`` exists.
    """
    from deepseek.checkpoint.shards import TensorSpec
    from deepseek.interop.hf_config import hf_config
    from deepseek.interop.open_weights import load_adapted
    from deepseek.interop.peft import peft_adapter
    from deepseek.interop.safetensors_file import TensorFileWriter

    refuse_existing(target)
    opened = _with_adapters(run)
    model = opened.config.model
    hf_config(model)  # raises if no Hugging Face class computes this model
    tensors, config = peft_adapter(load_adapted(opened.checkpoint, model), model, base)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with _written(target) as folder:
        with TensorFileWriter(folder / "adapter_model.safetensors", specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    count = sum(tensor.numel() for tensor in tensors.values())
    say(f"wrote {target}: {len(tensors)} tensors, {count:,} numbers, of step {opened.step}")
    if model.num_nextn_predict_layers:
        say("note: MTP modules have no adapters; the base is used without them")
    say(f"read it with: PeftModel.from_pretrained(BASE, {str(target)!r})")


def merge_lora(run: Path, target: Path) -> None:
    """Write one model, base and adapters, into a folder that every command reads.

    Args:
        run: a run folder with adapters, or a checkpoint of one.
        target: a folder that does not exist.

    Raises:
        UserError: no adapters, their base is gone or has changed, ``target`` exists.
    """
    from deepseek.checkpoint.manager import CheckpointManager

    refuse_existing(target)
    opened = _with_adapters(run)
    model, config = opened.model().cpu(), opened.config
    config = changed(
        config,
        {"name": target.absolute().name, "model.peft": None, "model.restore_from": None},
    )
    state = {
        "step": 0,
        "consumed_samples": 0,
        "seed": config.seed,
        "config": asdict(config),
        "data": "merged",
        "imported": {"from": str(run), "step": opened.step},
    }
    tokenizer = opened.tokenizer()
    with _written(target) as folder:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        with CheckpointManager(folder / CHECKPOINTS) as manager:
            manager.save(0, tensors, state)
        (folder / CONFIG_FILE).write_text(resolved_yaml(config))
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
    say(f"wrote {target}: the model of {run} at step {opened.step}, adapters merged")
    say(f"next: deepseek generate {target}, or deepseek hf export {target} DIR")


def _with_adapters(run: Path) -> OpenedCheckpoint:
    opened = open_checkpoint(run)
    if opened.config.model.peft is None:
        raise UserError(
            f"{opened.path} was not trained with model.peft and holds no adapters; "
            f"`deepseek hf export {run} DIR` writes whole models"
        )
    return opened


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target`` once it is complete."""
    folder = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, target)
    except OSError as error:
        raise UserError(f"writing {target} failed: {error.strerror}: {error.filename}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
