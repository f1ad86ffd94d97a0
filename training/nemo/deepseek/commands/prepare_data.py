"""``deepseek prepare-data``: from text to Megatron ``.bin/.idx``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deepseek.console import StageProgress, say
from deepseek.data.prepare import PreparedData, Progress, prepare


def prepare_data(
    inputs: Sequence[Path] | None,
    output: Path,
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
    json_key: str = "text",
    workers: int = 0,
    append_eos: bool = True,
    overwrite: bool = False,
) -> PreparedData:
    """Prepare, with progress; continues where a killed run stopped.

    Args: as ``data.prepare.prepare``; ``workers`` 0 takes one per core.

    Raises:
        UserError: inputs that cannot be read, a tokenizer that does not fit, a full disk.
    """
    with StageProgress() as shown:

        def progress(now: Progress) -> None:
            shown.update(now.stage, now.done, now.total, f"{now.tokens:,} tokens")

        data = prepare(
            inputs,
            output,
            tokenizer,
            vocab_size=vocab_size,
            json_key=json_key,
            workers=workers or os.cpu_count() or 1,
            append_eos=append_eos,
            overwrite=overwrite,
            progress=progress,
        )
    say(
        f"{data.note}: {data.prefix}.bin, {data.documents:,} documents, {data.tokens:,} tokens, "
        f"{data.text_bytes / data.tokens:.2f} bytes per token, vocabulary {data.vocab_size:,}"
    )
    say(f"train on it with: deepseek train model.data.data_prefix={data.prefix}")
    return data
