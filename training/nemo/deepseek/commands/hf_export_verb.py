"""``deepseek hf export``: a checkpoint to the files that transformers, vLLM and SGLang read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast, get_args

from deepseek.commands.hf_import_verb import copy_template, one_of
from deepseek.config.errors import UserError
from deepseek.console import StageProgress, say
from deepseek.data.tokenizer import Tokenizer
from deepseek.files import Staging, disk_errors, refuse_existing, require_room, write_durably
from deepseek.interop.open_weights import open_checkpoint
from deepseek.run_folder import TOKENIZER

GENERATION = "generation_config.json"


def export_hf(
    checkpoint: Path, target: Path, dtype: str = "fp32", mtp: str = "keep", shard_gb: float = 5.0
) -> None:
    """Write ``config.json``, weights, index and tokenizer into ``target``.

    Work that was cut short goes on with the same command.

    Args:
        checkpoint: a checkpoint, or a run or imported folder, of which the newest is taken.
        target: a folder that does not exist.
        dtype: ``fp32``, every bit as in the checkpoint, ``bf16``, rounded, or ``fp8``, projections
            with a scale per block.
        mtp: ``keep`` or ``drop`` the multi-token-prediction modules.
        shard_gb: largest file, 10^9 bytes, unless one tensor is larger.

    Raises:
        ConfigError: no Hugging Face class computes this model.
        UserError: no sound checkpoint, tensors are not accounted for, no room.
    """
    from deepseek.checkpoint.training_state import Base
    from deepseek.interop.hf_export import Dtype, WeightExport

    chosen = cast(Dtype, one_of("--dtype", dtype, get_args(Dtype)))
    keep = one_of("--mtp", mtp, ("keep", "drop")) == "keep"
    if not shard_gb > 0:
        raise UserError(f"--shard-gb {shard_gb:g}: give a size above 0")
    refuse_existing(target)
    opened = open_checkpoint(checkpoint)
    if opened.config.model.peft is not None:
        raise UserError(
            f"{opened.path} holds adapters only; `deepseek lora merge {checkpoint} DIR` makes a "
            "whole model to export, `deepseek lora export` writes them as peft reads them"
        )
    tokenizer = opened.tokenizer()
    weights = WeightExport(
        opened.checkpoint,
        opened.config.model,
        chosen,
        keep,
        int(shard_gb * 1e9),
    )
    ids = _token_ids(tokenizer)
    plan = {
        "export": 1,
        "checkpoint": Base.of(opened.path).sha256,
        "dtype": chosen,
        "mtp": mtp,
        "files": weights.file_names,
    }
    say(f"checkpoint   {opened.path}, step {opened.step}")
    with Staging(target, plan) as staging, disk_errors(f"exporting to {target}", staging.folder):
        written = sum(p.stat().st_size for p in staging.folder.rglob("*") if p.is_file())
        total = weights.result_bytes
        require_room(staging.folder, max(0, total - written), "the export")
        with StageProgress() as shown:
            weights.write(
                staging,
                ids,
                lambda done: shown.update("exporting", done, total, f"{done / 1e9:,.2f} GB"),
            )
        (staging.folder / GENERATION).unlink(missing_ok=True)
        write_durably(staging.folder / GENERATION, json.dumps(ids, indent=2).encode() + b"\n")
        if tokenizer is not None and opened.run is not None:
            tokenizer.save(staging.folder)
            copy_template(opened.run / TOKENIZER, staging.folder)
        staging.finish()
    files = len(weights.file_names)
    say(
        f"exported     {weights.num_tensors:,} tensors, {total / 1e9:,.2f} GB of {chosen} in "
        f"{files} file{'s' * (files > 1)}, as {weights.hf_config['architectures'][0]}: {target}"
    )
    if weights.narrows:
        kept = ", but for blocks that came from it" if chosen == "fp8" else ""
        say(f"note         rounded from fp32 to {chosen}{kept}; --dtype fp32 keeps every bit")
    if weights.dropped:
        say(f"dropped      {len(weights.dropped):,} tensors of the MTP modules")
    if tokenizer is None:
        say("note         there is no tokenizer with this checkpoint; add the model's own")


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """What ``config.json`` says of the tokenizer."""
    return {
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and tokenizer.eos_id,
        "pad_token_id": tokenizer and tokenizer.pad_id,
    }
