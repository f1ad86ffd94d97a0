"""``deepseek generate``: text from a run's newest checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from deepseek.config.errors import UserError
from deepseek.console import complain, say
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER


def generate_text(
    run: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
) -> list[str]:
    """Continue each prompt; a single one streams to the terminal as it is drawn.

    Args:
        run: a run folder.
        prompts: texts; they may differ in length.
        max_new_tokens: per prompt.
        temperature: 0 for the most probable token each time.
        top_k: keep the k most probable tokens; 0: all.
        top_p: keep the smallest set of tokens whose probability reaches p.
        seed: of the draws.
        chat: each prompt is what a user says, and the answer alone is printed.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: no run, no sound checkpoint, a prompt that does not fit; with ``chat``, no chat
            template or no prompt.
    """
    from deepseek.inference.generation import Sampling, generate, stream_tokens

    sampling = Sampling(temperature, top_k, top_p)
    if chat and not all(prompt.strip() for prompt in prompts):
        raise UserError('--chat answers a question, and none is given; add --prompt "..."')
    model, tokenizer = load_run(run)
    if chat:
        ids, end = _asked(run, tokenizer, prompts)
        shown = [f"{prompt}\n" if len(prompts) > 1 else "" for prompt in prompts]
    else:
        ids, end = [_with_start(tokenizer, prompt) for prompt in prompts], tokenizer.eos_id
        shown = list(prompts)
    if len(prompts) > 1:
        rows = generate(model, ids, max_new_tokens, sampling, end, seed)
        texts = [tokenizer.decode(_without_end(row, end), skip_special=chat) for row in rows]
        for prompt, text in zip(shown, texts, strict=True):
            say(f"{prompt}{text}\n")
        return texts
    decoder, pieces = tokenizer.stream(skip_special=chat), []
    stream = stream_tokens(model, ids, max_new_tokens, sampling, end, seed)
    first = next(stream)  # a prompt that does not fit is refused before anything is printed
    sys.stdout.write(shown[0])
    for (token,) in chain([first], stream):
        if token is None or token == end:
            break
        pieces.append(decoder.push(token))
        sys.stdout.write(pieces[-1])
        sys.stdout.flush()
    pieces.append(decoder.finish())
    say(pieces[-1])
    return ["".join(pieces)]


def load_run(run: Path) -> tuple[Any, Any]:
    """Model (with the weights of the newest sound checkpoint) and tokenizer of a run folder."""
    from deepseek.checkpoint.checkpoint import newest_sound
    from deepseek.data.tokenizer import load_tokenizer
    from deepseek.interop.open_weights import with_config

    if not (run / CONFIG_FILE).is_file():
        if (run / "config.json").is_file():
            raise UserError(
                f"{run} holds Hugging Face files; `deepseek hf import {run} NEW_FOLDER` makes a "
                "folder that can be sampled"
            )
        raise UserError(
            f"{run} is no run folder: it has no {CONFIG_FILE}; "
            "give the folder that `deepseek train` printed at its start and end"
        )
    checkpoint = newest_sound(run / CHECKPOINTS, complain)
    if checkpoint is None:
        raise UserError(f"{run / CHECKPOINTS} holds no checkpoint yet; train first")
    # The configuration of the checkpoint, which has a digest: anyone may have edited config.yaml.
    return with_config(checkpoint).model(), load_tokenizer(run / TOKENIZER)


def _with_start(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's ids; an empty prompt starts where a new document starts, after an end."""
    ids: list[int] = tokenizer.encode(prompt)
    return ids or [tokenizer.eos_id]


def _asked(run: Path, tokenizer: Any, prompts: Sequence[str]) -> tuple[list[list[int]], int]:
    """Ids of each prompt as what a user says, and the token that ends an answer."""
    from deepseek.data.chat_template import ChatTemplate

    if tokenizer.chat_template is None:
        raise UserError(
            f"{run / TOKENIZER} has no chat template, so this model cannot be asked: it "
            "continues texts (leave out --chat), or, if it was trained on conversations, put its "
            "template beside the tokenizer as chat_template.jinja"
        )
    template = ChatTemplate(tokenizer)
    said = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [template.prompt_ids(messages) for messages in said], template.end_id()


def _without_end(row: list[int], end: int) -> list[int]:
    return row[:-1] if row and row[-1] == end else row
