"""``deepseek generate``: text from a run's newest checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek.config.errors import UserError
from deepseek.console import complain, say
from deepseek.run_folder import CHECKPOINTS, CONFIG_FILE, TOKENIZER

if TYPE_CHECKING:
    from deepseek.data.tokenizer import Tokenizer
    from deepseek.inference.generation import Sampling


def generate_text(
    run: Path,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
) -> list[str]:
    """Continue each prompt; a single one streams to the terminal as it is drawn.

    Args:
        run: a run folder.
        prompts: texts; they may differ in length.
        max_new_tokens: per prompt.
        temperature: 0 for the most probable token each time; None, here and below: as
            ``sampling_for`` says.
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
    from deepseek.inference.generation import generate, stream_tokens

    if chat and not all(prompt.strip() for prompt in prompts):
        raise UserError('--chat answers a question, and none is given; add --prompt "..."')
    model, tokenizer = load_run(run)
    sampling = sampling_for(tokenizer, temperature, top_k, top_p)
    stops = tokenizer.stop_ids
    if chat:
        ids, end = _asked(run, tokenizer, prompts)
        stops = [*stops, end]
        shown = [f"{prompt}\n" if len(prompts) > 1 else "" for prompt in prompts]
    else:
        ids = [tokenizer.prompt_ids(prompt) for prompt in prompts]
        shown = list(prompts)
    if len(prompts) > 1:
        rows = generate(model, ids, max_new_tokens, sampling, stops, seed)
        texts = [tokenizer.decode(without_stop(row, stops), skip_special=chat) for row in rows]
        for prompt, text in zip(shown, texts, strict=True):
            say(f"{prompt}{text}\n")
        return texts
    decoder, pieces = tokenizer.stream(skip_special=chat), []
    stream = stream_tokens(model, ids, max_new_tokens, sampling, stops, seed)
    first = next(stream)  # a prompt that does not fit is refused before anything is printed
    sys.stdout.write(shown[0])
    for (token,) in chain([first], stream):
        if token is None or token in stops:
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


def sampling_for(
    tokenizer: Tokenizer, temperature: float | None, top_k: int | None, top_p: float | None
) -> Sampling:
    """How tokens are drawn: what is given, else what the model's ``generation_config.json`` says
    (``do_sample: false`` is a temperature of 0), else 0.8, all tokens, 0.95."""
    from deepseek.inference.generation import Sampling

    told = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
    said = tokenizer.generation
    if said.get("do_sample") is False:
        told["temperature"] = 0
    elif said.get("do_sample"):
        told |= {key: said[key] for key in told if said.get(key) is not None}
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return Sampling(**told | {key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


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


def without_stop(row: list[int], stops: Collection[int]) -> list[int]:
    """New tokens without the one that ended them."""
    return row[:-1] if row and row[-1] in stops else row
