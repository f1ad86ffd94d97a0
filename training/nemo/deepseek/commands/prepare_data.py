"""``deepseek prepare-data``, from text to Megatron ``.bin/.idx``, and ``deepseek data verify``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.console import StageProgress, say
from deepseek.data.chat import prepare_chat
from deepseek.data.digests import damaged
from deepseek.data.indexed import IndexedDataset
from deepseek.data.prepare import prepare
from deepseek.data.prepared import PreparedData
from deepseek.data.tokenizer_files import load_tokenizer
from deepseek.files import megabytes


def prepare_data(
    inputs: Sequence[Path] | None,
    output: Path,
    tokenizer: Path | None = None,
    vocab_size: int = 4096,
    json_key: str = "text",
    workers: int = 0,
    append_eos: bool = True,
    bos: bool | None = None,
    overwrite: bool = False,
    strict: bool = False,
) -> PreparedData:
    """Prepare, with progress; continues where a killed run stopped.

    Args: as ``data.prepare.prepare``; ``workers`` 0 takes one per core.

    Raises:
        UserError: inputs that cannot be read, a tokenizer that does not fit, a full disk.
    """
    with StageProgress() as shown:
        data = prepare(
            inputs,
            output,
            tokenizer,
            vocab_size=vocab_size,
            json_key=json_key,
            workers=workers or os.cpu_count() or 1,
            append_eos=append_eos,
            bos=bos,
            overwrite=overwrite,
            strict=strict,
            progress=shown.of_data,
        )
    say(
        f"{data.note}: {data.prefix}.bin, {data.documents:,} documents, {data.tokens:,} tokens, "
        f"{data.text_bytes / data.tokens:.2f} bytes per token, vocabulary {data.vocab_size:,}"
    )
    used = load_tokenizer(data.tokenizer_folder)
    begin = used.decode(data.settings.get("begin", [])) or "no token of its own"
    end = used.decode(used.suffix_ids or [used.required_eos()]) if append_eos else "none"
    say(f"each document begins with {begin} and ends with {end}")
    say(f"train on it with: deepseek train model.data.data_prefix={data.prefix}")
    return data


def prepare_chat_data(
    inputs: Sequence[Path] | None,
    output: Path,
    tokenizer: Path | None,
    answers: str,
    overwrite: bool = False,
    strict: bool = False,
) -> PreparedData:
    """Prepare conversations, with progress, and say what a run should know of them.

    Args: as ``data.chat.prepare_chat``.

    Raises:
        UserError: no input or tokenizer, a line that is no conversation, a full disk.
    """
    if not inputs:
        raise UserError("--chat needs .jsonl files of conversations; give files or folders")
    if tokenizer is None:
        raise UserError(
            "--chat needs --tokenizer: that of the model to be fine-tuned, such as RUN/tokenizer"
        )
    with StageProgress() as shown:
        data = prepare_chat(
            inputs,
            output,
            tokenizer,
            answers=answers,
            overwrite=overwrite,
            strict=strict,
            progress=lambda now: shown.update(
                now.stage, now.done, now.total, f"{now.documents:,} conversations"
            ),
        )
    assert data.chat is not None
    say(
        f"{data.note}: {data.prefix}.bin, {data.documents:,} conversations, "
        f"{data.tokens:,} tokens, {data.chat['answer_tokens']:,} of them in answers"
    )
    longest = data.chat["longest"]
    say(f"the longest has {longest:,} tokens: model.data.seq_length={longest - 1} cuts none")
    if data.chat["without_end"]:
        say(
            f"note: in {data.chat['without_end']:,} conversations the chat template ends an answer "
            "without a special token, so a model does not learn there to stop"
        )
    say(
        f"train on it with: deepseek train model.data.data_prefix={data.prefix} "
        "model.data.chat=true model.data.isolate_documents=true model.restore_from=..."
    )
    return data


def verify_data(prefixes: Sequence[Path]) -> None:
    """Compare every file of the prefixes with what prepare-data recorded, with progress.

    Raises:
        UserError: files that differ or cannot be read, all of them; a prefix without a record.
    """
    wrong = []
    files = []
    for prefix in prefixes:
        IndexedDataset(prefix)
        record = PreparedData.load(prefix)
        if record is None:
            raise UserError(
                f"{prefix}.json does not exist or is no record of prepare-data, so there is "
                "nothing to compare with; a run keeps the digests of such data in its checkpoints"
            )
        files += record.data_files()
    done, total = 0, sum(file.path.stat().st_size for file in files)
    with StageProgress() as shown:
        for file in files:

            def tell(count: int, name: str = file.path.name) -> None:
                nonlocal done
                done += count
                shown.update("verifying", done, total, name)

            try:
                different = file.recorded.differences(file.path, tell) if file.recorded else []
            except OSError as error:
                different = [f"cannot be read ({error.strerror}), so all of it"]
            if different:
                wrong.append(damaged(file.path, different))
            elif file.recorded is None:
                say(f"{file.path}: nothing is recorded; prepare the data again to have it")
    if wrong:
        raise UserError("\n".join(wrong))
    say(f"{len(files)} files are what prepare-data wrote: {megabytes(total)}")
