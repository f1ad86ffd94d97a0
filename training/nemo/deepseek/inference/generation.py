"""Token generation with the latent cache, for batches of prompts of any lengths.

B batch, S new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.inference.cache import LatentCache
from deepseek.inference.sampling import Sampling, sample
from deepseek.models.transformer import Transformer

PREFILL_TOKENS = 512
"""Prompt tokens read at one time: bounds the score matrix of a long prompt."""


@torch.no_grad()
def stream_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Yield one token per row and step; None for rows that have ended.

    A row ends with ``eos_id`` (which is yielded) or after ``max_new_tokens``.

    Args:
        model: in evaluation or training mode; the result is the same.
        prompts: token ids, at least one per row.
        max_new_tokens: per row.
        sampling: how tokens are drawn.
        eos_id: None never ends a row early.
        seed: of the draws.

    Raises:
        UserError: no prompt or an empty one, an id outside the vocabulary, or a context that is too
            long.
    """
    config = model.config
    _check(model, prompts, max_new_tokens)
    assert model.embed is not None, "decoding needs the whole model"
    weight = model.embed.weight
    device = weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    longest = max(len(prompt) for prompt in prompts)
    padding_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens_BS = torch.tensor(
        [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    caches = [
        LatentCache(len(prompts), longest + max_new_tokens, config, padding_B, weight.dtype)
        for _ in range(config.num_hidden_layers)
    ]
    logits_BV = tokens_BS.new_empty(0)
    for start in range(0, longest, PREFILL_TOKENS):
        chunk_BS = tokens_BS[:, start : start + PREFILL_TOKENS]
        logits_BV = _read(model, chunk_BS, start, padding_B, caches)
    alive = [True] * len(prompts)
    for slot in range(longest, longest + max_new_tokens):
        next_B = sample(logits_BV, sampling, generator)
        drawn = next_B.tolist()
        yield [token if living else None for token, living in zip(drawn, alive, strict=True)]
        alive = [living and token != eos_id for token, living in zip(drawn, alive, strict=True)]
        if not any(alive):
            return
        if slot + 1 < longest + max_new_tokens:
            logits_BV = _read(model, next_B.unsqueeze(1), slot, padding_B, caches)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    seed: int = 0,
) -> list[list[int]]:
    """All new tokens of each row; arguments as in ``stream_tokens``."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream_tokens(model, prompts, max_new_tokens, sampling, eos_id, seed):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def _read(
    model: Transformer,
    tokens_BS: Tensor,
    start: int,
    padding_B: Tensor,
    caches: Sequence[LatentCache],
) -> Tensor:
    """Feed tokens at slots ``start...``; logits of the last one, (B, V)."""
    slots_S = torch.arange(start, start + tokens_BS.shape[1], device=tokens_BS.device)
    positions_BS = (slots_S - padding_B.unsqueeze(-1)).clamp(min=0)
    return model.last_logits(tokens_BS, positions_BS, caches)


def _check(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    config = model.config
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not prompts:
        raise UserError("no prompt: give at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} is empty: give at least one token")
        unknown = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if unknown is not None:
            raise UserError(
                f"prompt {row} holds token id {unknown}, but the model knows ids 0 to "
                f"{config.vocab_size - 1}: use the tokenizer the model was trained with"
            )
        room = config.max_position_embeddings - len(prompt)
        if max_new_tokens > room:
            total = len(prompt) + max_new_tokens
            way_out = f"ask for at most {room}" if room > 0 else f"shorten it by {1 - room} or more"
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens and {max_new_tokens} more are asked for: "
                f"{total} exceed max_position_embeddings={config.max_position_embeddings}; "
                f"{way_out}"
            )
