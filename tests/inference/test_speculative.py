"""Speculative decoding gives what plain decoding gives: token by token, or draw by draw."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config.errors import UserError
from deepseek.inference import generation
from deepseek.inference.generation import Sampling, generate
from deepseek.inference.speculative import Acceptance, Guesser, stream_speculative
from deepseek.models.transformer import Transformer
from support.kernels import without_kernels
from support.profiles import fewer
from support.tiny_models import tiny_config, tiny_model

GREEDY = Sampling(temperature=0.0)
VOCAB = 23


def model(depth: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    config = tiny_config(
        num_nextn_predict_layers=depth, n_group=2, topk_group=1, max_position_embeddings=64
    )
    return tiny_model(config, dtype, seed)


def obliging(made: Transformer) -> Transformer:
    """A model whose MTP modules guess right often: what comes next hangs mostly on the last token
    alone, in the same way for all."""
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")) or ".w2" in name:
                parameter.mul_(0.02)
        for module in made.mtp:
            half = module.eh_proj.weight.shape[1] // 2
            module.eh_proj.weight.zero_()
            module.eh_proj.weight[:, :half] = torch.eye(half)
            module.enorm.weight.fill_(1.0)
            module.norm.weight.copy_(made.norm.weight)
    return made


@fewer(2)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    depth=st.integers(1, 3),
    seed=st.integers(0, 3),
    prefill=st.sampled_from([1, 2, 4, 512]),
    count=st.integers(1, 12),
    eager=st.booleans(),
)
def test_greedy_tokens_are_those_without(
    prompt: list[int], depth: int, seed: int, prefill: int, count: int, eager: bool
) -> None:
    made = model(depth, seed)
    made = obliging(made) if eager else made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "PREFILL_TOKENS", prefill)
        (wanted,) = generate(made, [prompt], count, GREEDY, ())
        assert list(stream_speculative(made, prompt, count, GREEDY, ())) == wanted
        for eos in set(wanted):
            (cut,) = generate(made, [prompt], count, GREEDY, (eos,))
            assert list(stream_speculative(made, prompt, count, GREEDY, (eos,))) == cut


def test_kernels_give_the_same_text() -> None:
    """Drafts are several new tokens of a sequence."""
    made = model(2, dtype=torch.float32)
    fast = list(stream_speculative(made, [1, 2, 3], 16, GREEDY, ()))
    with without_kernels():
        assert list(stream_speculative(made, [1, 2, 3], 16, GREEDY, ())) == fast
    assert fast == generate(made, [[1, 2, 3]], 16, GREEDY, ())[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_right_guesses_save_passes(depth: int) -> None:
    """Counted, and true for guesses of every depth."""
    made, count = obliging(model(depth, dtype=torch.float32)), Acceptance()
    tokens = list(stream_speculative(made, [1, 2, 3], 40, GREEDY, (), acceptance=count))
    assert tokens == generate(made, [[1, 2, 3]], 40, GREEDY, ())[0]
    assert count.tokens == 39 and count.tokens == count.passes + count.accepted
    assert 0 < count.accepted <= count.guessed <= depth * count.passes
    assert count.passes < 39 / (1 + 0.5 * depth)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_guesses_are_those_of_the_whole_sequence(depth: int) -> None:
    """With caches that are filled bit by bit, as without any: depth by depth over all tokens."""
    made = model(depth)
    tokens = [5, 1, 20, 3, 3, 8, 11, 2, 0, 7]
    guesser, done = Guesser(made, 32), 0
    with torch.no_grad():
        for length in (1, 2, 5, 6, 9):
            row = torch.tensor([tokens[:length]])
            main = made.main(row, made.context(row))
            guesser.extend(main[:, done:])
            done = length
            got = guesser.guess(tokens[: length + 1])
            known, hidden, wanted = tokens[: length + 1], main, []
            for k, module in enumerate(made.mtp, start=1):
                ahead = torch.tensor([[*known, *wanted][k : k + length]])
                hidden = module(hidden, made.embed(ahead), made.context(ahead))
                wanted.append(int(made.head(hidden[:, -1]).argmax()))
            assert got == wanted


def test_the_distribution_is_kept() -> None:
    """Sequences of three tokens: chi-square of 300 drawn with guesses against many without.

    Top-k of 2 keeps the number of sequences small.
    """
    made, sampling, times = obliging(model(2, dtype=torch.float32)), Sampling(1.5, top_k=2), 300
    many = 20_000
    plain = Counter(map(tuple, generate(made, [[4, 5]] * many, 3, sampling, ())))
    count = Acceptance()
    drafted = Counter(
        tuple(stream_speculative(made, [4, 5], 3, sampling, (), seed, count))
        for seed in range(times)
    )
    assert count.accepted > 50
    wanted = {key: number * times / many for key, number in plain.items()}
    kept = [key for key in wanted if wanted[key] >= 4]
    square = sum((drafted[key] - wanted[key]) ** 2 / wanted[key] for key in kept)
    freedom = len(kept)
    assert freedom >= 4 and square < freedom + 4 * (2 * freedom) ** 0.5, (square, freedom)


def test_the_seed_decides() -> None:
    made = model(2)
    runs = [
        list(stream_speculative(made, [1, 2], 12, Sampling(1.5), (), seed)) for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_tokens_arrive_as_they_are_made() -> None:
    made = model(1)
    calls = []
    made.layers["0"].register_forward_hook(lambda *_: calls.append(1))
    next(iter(stream_speculative(made, [1, 2], 9, GREEDY, ())))
    assert len(calls) == 1


def test_a_context_filled_to_the_last_token() -> None:
    made = model(3)
    got = list(itertools.islice(stream_speculative(made, [1] * 60, 4, GREEDY, ()), 9))
    assert got == generate(made, [[1] * 60], 4, GREEDY, ())[0]


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match=r"this model has no MTP modules .* leave --draft out"):
        next(stream_speculative(model(0), [1], 3, GREEDY, ()))
    with pytest.raises(UserError, match=r"exceed max_position_embeddings=64; ask for at most 63"):
        next(stream_speculative(model(1), [1], 64, GREEDY, ()))
