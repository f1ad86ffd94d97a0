"""Token generation with the latent cache, for batches of prompts of any lengths.

B batch, S new tokens, M tokens in the cache, V vocabulary; shapes: ``models/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.models.transformer import Transformer
from deepseek.ops.latent_attention import Room

PREFILL_TOKENS = 512
"""Prompt tokens read at one time: bounds the score matrix of a long prompt."""

MOSTLY_ENOUGH = 512
"""Tokens that mostly hold the probability asked for."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0: always the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p, in (0, 1]."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # so that nan is refused too
            raise UserError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")


@torch.no_grad()
def stream_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    seed: int = 0,
    is_enough: Callable[[int], bool] = lambda row: False,
) -> Iterator[list[int | None]]:
    """Yield one token per row and step; None for rows that have ended.

    A row ends with one of ``stop_ids`` (which is yielded) or after ``max_new_tokens``.

    Args:
        model: in evaluation or training mode; the result is the same.
        prompts: token ids, at least one per row.
        max_new_tokens: per row.
        sampling: how tokens are drawn.
        stop_ids: empty never ends a row early.
        seed: of the draws.
        is_enough: asked for each row after its token was yielded: whether to end it, too.

    Raises:
        UserError: no prompt or an empty one, an id outside the vocabulary, or a context that is too
            long.
    """
    config = model.config
    check_prompts(config, prompts, max_new_tokens)
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
        alive = [
            living and token not in stop_ids and not is_enough(row)
            for row, (token, living) in enumerate(zip(drawn, alive, strict=True))
        ]
        if not any(alive):
            return
        if slot + 1 < longest + max_new_tokens:
            logits_BV = _read(model, next_B.unsqueeze(1), slot, padding_B, caches)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    seed: int = 0,
) -> list[list[int]]:
    """All new tokens of each row; arguments as in ``stream_tokens``."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream_tokens(model, prompts, max_new_tokens, sampling, stop_ids, seed):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token per row.

    Args:
        logits_BV: of the next token; computed with in fp32.
        sampling: how.
        generator: of the draws, on the same device.

    Returns:
        int64 (B,).
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    probs_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p < 1:
        probs_BV = keep_top_p(probs_BV, sampling.top_p)
    return torch.multinomial(probs_BV, 1, generator=generator).squeeze(-1)


def keep_top_p(probs_BV: Tensor, top_p: float, first: int = MOSTLY_ENOUGH) -> Tensor:
    """0 but for the smallest set of tokens whose probability reaches ``top_p``, not normalised.

    Args:
        probs_BV: sum to 1.
        top_p: below 1.
        first: so many of the most probable are looked at first: a vocabulary is sorted only where
            they do not reach ``top_p``.
    """
    size = min(first, probs_BV.shape[-1])
    sorted_BN, order_BN = probs_BV.topk(size, dim=-1)
    reached_BN = sorted_BN.cumsum(dim=-1)
    if size < probs_BV.shape[-1] and bool((reached_BN[:, -1] < top_p).any()):
        return keep_top_p(probs_BV, top_p, probs_BV.shape[-1])
    hidden_BN = reached_BN - sorted_BN >= top_p  # the token that crosses p stays in
    kept_BN = sorted_BN.masked_fill_(hidden_BN, 0.0)
    return torch.zeros_like(probs_BV).scatter_(-1, order_BN, kept_BN)


class LatentCache:
    """One layer's latent KV cache: ``kv_lora_rank + qk_rope_head_dim`` numbers per token.

    The prompts of a batch are aligned at their right end.

    Args:
        batch_size: rows.
        capacity: tokens per row, prompt padding included.
        config: sizes.
        padding_B: int64, slots at the left of each row that hold no token.
        dtype: of the latents.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        config: ModelConfig,
        padding_B: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.latent_dims = config.kv_lora_rank
        numbers = self.latent_dims + config.qk_rope_head_dim
        self.kept_BMX = torch.zeros(
            batch_size, capacity, numbers, dtype=dtype, device=padding_B.device
        )
        self.padding_B = padding_B
        self._is_padded = bool(padding_B.any())
        self.length = 0

    def append(self, latent_BSC: Tensor, k_rope_BSH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Store the new tokens; return everything stored (B, M, X), latents first, and who may see
        what (bool (B, S, M); None: each new token all)."""
        start = self.reserve(latent_BSC.shape[1]).start
        end = self.length
        self.kept_BMX[:, start:end, : self.latent_dims] = latent_BSC
        self.kept_BMX[:, start:end, self.latent_dims :] = k_rope_BSH
        if end == start + 1 and not self._is_padded:
            return self.kept_BMX[:, :end], None
        slots_M = torch.arange(end, device=self.padding_B.device)
        new_S1 = torch.arange(start, end, device=self.padding_B.device).unsqueeze(-1)
        visible_BSM = (slots_M >= self.padding_B.view(-1, 1, 1)) & (slots_M <= new_S1)
        # A padding slot sees itself: a row of the softmax with nothing in it would be NaN.
        visible_BSM = visible_BSM | (slots_M == new_S1)
        return self.kept_BMX[:, :end], visible_BSM

    def reserve(self, count: int) -> Room:
        """Room for so many new tokens, which the caller stores."""
        room = Room(self.kept_BMX, self.length, self.padding_B)
        self.length += count
        return room


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


def check_prompts(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    names: Sequence[str] | None = None,
) -> None:
    """Raise ``UserError`` unless all can be generated from; see ``stream_tokens``.

    Args:
        config: sizes.
        prompts: token ids.
        max_new_tokens: per prompt.
        names: what to call the prompts; None: by their number.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not prompts:
        raise UserError("no prompt: give at least one")
    for row, prompt in enumerate(prompts):
        name = names[row] if names is not None else f"prompt {row}"
        if not prompt:
            raise UserError(f"{name} is empty: give at least one token")
        unknown = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if unknown is not None:
            raise UserError(
                f"{name} holds token id {unknown}, but the model knows ids 0 to "
                f"{config.vocab_size - 1}: use the tokenizer the model was trained with"
            )
        room = config.max_position_embeddings - len(prompt)
        if max_new_tokens > room:
            total = len(prompt) + max_new_tokens
            way_out = f"ask for at most {room}" if room > 0 else f"shorten it by {1 - room} or more"
            raise UserError(
                f"{name} has {len(prompt)} tokens and {max_new_tokens} more are asked for: "
                f"{total} exceed max_position_embeddings={config.max_position_embeddings}; "
                f"{way_out}"
            )
