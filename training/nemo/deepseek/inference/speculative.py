"""Speculative decoding with the model's own MTP modules (arXiv:2412.19437 sections 2.2 and 5.4.3).

The MTP modules guess the next tokens; one pass of the main model over all of them says, at each
place, what it would have drawn there. Guesses are kept up to the first that it would not have
drawn, and its own token takes the place of that one. So every token is drawn by the main model,
given exactly the tokens before it: greedy text is the same, and drawn text has the same
distribution. A pass gives 1 to depth + 1 tokens.

B is 1 here; S new tokens, V vocabulary, D model; shapes: ``models/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.inference import generation
from deepseek.inference.generation import LatentCache, Sampling, check_prompts, sample
from deepseek.models.transformer import Transformer


@dataclass
class Acceptance:
    """How well the guesses were."""

    guessed: int = 0
    accepted: int = 0
    passes: int = 0
    """Of the main model, over new tokens."""
    tokens: int = 0
    """Made by these passes."""


@torch.no_grad()
def stream_speculative(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    seed: int = 0,
    acceptance: Acceptance | None = None,
) -> Iterator[int]:
    """Yield the tokens after one prompt, one by one.

    Args:
        model: with MTP modules.
        prompt: token ids, at least one.
        max_new_tokens: after which it ends, or with one of ``stop_ids``, which is yielded.
        sampling: how tokens are drawn.
        stop_ids: empty never ends early.
        seed: of the draws.
        acceptance: is counted up.

    Raises:
        UserError: no MTP modules, or as ``stream_tokens``.
    """
    if not model.mtp:
        raise UserError(
            "--draft mtp: this model has no MTP modules (model.num_nextn_predict_layers=0), or "
            "they were dropped; leave --draft out"
        )
    config, count = model.config, acceptance or Acceptance()
    check_prompts(config, [prompt], max_new_tokens)
    assert model.embed is not None and model.head is not None, "decoding needs the whole model"
    generator = torch.Generator(device=model.embed.weight.device).manual_seed(seed)
    known = list(prompt)
    end = len(known) + max_new_tokens
    caches = _caches(model, config.num_hidden_layers, end)
    guesser = Guesser(model, end)
    # 1. Read the prompt, in chunks; the guesser follows.
    for start in range(0, len(known), generation.PREFILL_TOKENS):
        stop = min(len(known), start + generation.PREFILL_TOKENS)
        hidden_1SD = _hidden(model, known[start:stop], start, caches)
        guesser.extend(hidden_1SD)
        if stop < len(known):
            guesser.guess(known[: stop + 1])
    drawn = sample(model.head(hidden_1SD[:, -1]), sampling, generator).tolist()
    while True:
        # 2. What was drawn is certain.
        for token in drawn:
            known.append(token)
            yield token
            if token in stop_ids or len(known) == end:
                return
        # 3. Guess, and read the guesses behind the last certain token. The last token of all is
        #    the main model's: there is nothing to guess beyond it.
        guesses = guesser.guess(known)[: end - len(known) - 1]
        place = len(known) - 1
        hidden_1SD = _hidden(model, [known[-1], *guesses], place, caches)
        wanted = sample(model.head(hidden_1SD)[0], sampling, generator).tolist()
        # 4. Keep what the main model draws, as long as the place before it was guessed right.
        agreed = 0
        while agreed < len(guesses) and guesses[agreed] == wanted[agreed]:
            agreed += 1
        drawn = wanted[: agreed + 1]
        # 5. The caches forget the guesses that were wrong.
        for cache in caches:
            cache.length = place + agreed + 1
        guesser.extend(hidden_1SD[:, : agreed + 1])
        count.guessed += len(guesses)
        count.accepted += agreed
        count.passes += 1
        count.tokens += len(drawn)


class Guesser:
    """The MTP modules one after another, each with a cache.

    Depth k reads at place i the hidden state of the depth before and the token i + k, and predicts
    the token i + k + 1.

    Args:
        model: whose modules.
        capacity: tokens that may come together.
    """

    def __init__(self, model: Transformer, capacity: int) -> None:
        self._model = model
        self._caches = _caches(model, len(model.mtp), capacity)
        # The main model's states of the places that are not in the caches for good.
        self._waiting_1SD: Tensor | None = None

    def extend(self, hidden_1SD: Tensor) -> None:
        """Take the main model's normed hidden states of the next places."""
        waiting = self._waiting_1SD
        self._waiting_1SD = hidden_1SD if waiting is None else torch.cat((waiting, hidden_1SD), 1)

    def guess(self, known: Sequence[int]) -> list[int]:
        """The most probable next tokens, one per depth.

        Args:
            known: all tokens; every place but the last one has had its hidden state.
        """
        model, hidden_1SD, tokens = self._model, self._waiting_1SD, list(known)
        assert hidden_1SD is not None and model.embed is not None and model.head is not None
        start, length = self._caches[0].length, hidden_1SD.shape[1]
        for depth, (module, cache) in enumerate(zip(model.mtp, self._caches, strict=True), start=1):
            first = start + depth
            ahead_1S = _row(tokens[first : first + length], hidden_1SD)
            context = model.context(ahead_1S, _places(start, length, hidden_1SD))
            hidden_1SD = module(hidden_1SD, model.embed(ahead_1S), context, cache)
            tokens.append(int(model.head(hidden_1SD[:, -1]).argmax()))
        # The last places of the deeper modules have read guesses: they are read again.
        certain = max(0, length - len(model.mtp) + 1)
        for cache in self._caches:
            cache.length = start + certain
        assert self._waiting_1SD is not None
        self._waiting_1SD = self._waiting_1SD[:, certain:]
        return tokens[len(known) :]


def _caches(model: Transformer, count: int, capacity: int) -> list[LatentCache]:
    assert model.embed is not None
    weight = model.embed.weight
    padding_1 = torch.zeros(1, dtype=torch.int64, device=weight.device)
    return [LatentCache(1, capacity, model.config, padding_1, weight.dtype) for _ in range(count)]


def _hidden(
    model: Transformer, tokens: Sequence[int], start: int, caches: Sequence[LatentCache]
) -> Tensor:
    """The main model's normed hidden states of tokens at places ``start...``, (1, S, D)."""
    assert model.embed is not None
    tokens_1S = _row(tokens, model.embed.weight)
    context = model.context(tokens_1S, _places(start, len(tokens), tokens_1S))
    return model.main(tokens_1S, context, caches)


def _row(tokens: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64, device=like.device)


def _places(start: int, length: int, like: Tensor) -> Tensor:
    return torch.arange(start, start + length, device=like.device).unsqueeze(0)
