"""Generation with the cache against the plain loop: whole forward pass, last logits, repeat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.inference import generation as module
from deepseek.inference.generation import LatentCache, Sampling, generate, stream_tokens
from deepseek.models.transformer import Transformer
from support.kernels import without_kernels
from support.profiles import fewer

GREEDY = Sampling(temperature=0.0)
VOCAB = 13
CASES = {
    "plain": {},
    "query_latent_groups_mtp": dict(
        q_lora_rank=5, n_routed_experts=8, n_group=4, topk_group=2, num_nextn_predict_layers=1
    ),
    "yarn": dict(
        rope_scaling=RopeScaling(
            factor=8.0, original_max_position_embeddings=4, mscale=0.7, mscale_all_dim=1.0
        )
    ),
    "all_dense": dict(first_k_dense_replace=3),
}


def model(dtype: torch.dtype = torch.float64, **changes: object) -> Transformer:
    fields = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        intermediate_size=24,
        moe_intermediate_size=8,
        n_routed_experts=4,
        max_position_embeddings=64,
    )
    made = Transformer(ModelConfig(**(fields | changes)))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.5, generator=generator)
        for router in made.routers().values():
            router.start_step()
            router.bias.normal_(-0.5, 0.4, generator=generator)
    return made.to(dtype)


def plain_loop(made: Transformer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(made(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


prompts_of = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=4
)


@pytest.mark.parametrize("case", CASES)
@fewer(2)
@given(prompts=prompts_of, prefill=st.sampled_from([1, 3, 4, 512]), count=st.integers(1, 6))
def test_greedy_equals_the_plain_loop(
    case: str, prompts: list[list[int]], prefill: int, count: int
) -> None:
    """Prompts of any lengths side by side, read in chunks of any size."""
    made = model(**CASES[case])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PREFILL_TOKENS", prefill)
        got = generate(made, prompts, count, GREEDY, ())
    assert got == [plain_loop(made, prompt, count) for prompt in prompts]


def test_fp32() -> None:
    made = model(torch.float32)
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    got = generate(made, prompts, 8, GREEDY, ())
    assert got == [plain_loop(made, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_same_text(case: str) -> None:
    """Prompts of several lengths in one batch, in chunks that kernels take and that they do not."""
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    made = model(torch.float32, **CASES[case])
    for prefill in (2, 512):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "PREFILL_TOKENS", prefill)
            got = generate(made, prompts, 12, GREEDY, ())
            with without_kernels():
                assert generate(made, prompts, 12, GREEDY, ()) == got
    assert got == [plain_loop(made, prompt, 12) for prompt in prompts]


def test_bf16() -> None:
    got = generate(model(torch.bfloat16), [[1, 2, 3], [4]], 5, GREEDY, ())
    assert [len(row) for row in got] == [5, 5]


def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is read once, at most PREFILL_TOKENS at one time."""
    monkeypatch.setattr(module, "PREFILL_TOKENS", 4)
    made = model()
    widths = []
    made.layers["0"].register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    generate(made, [list(range(10)), [1, 2]], 3, GREEDY, ())
    assert widths == [4, 4, 2, 1, 1]


def test_positions_start_at_the_first_token_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the padding before it: a short prompt beside a long one stays inside its context."""
    monkeypatch.setattr(module, "PREFILL_TOKENS", 3)
    made = model()
    read: list[list[int]] = [[], []]
    last_logits = made.last_logits

    def watched(tokens: Tensor, positions: Tensor, caches: list[LatentCache]) -> Tensor:
        for row, of_row in zip(read, positions.tolist(), strict=True):
            row.extend(of_row)
        return last_logits(tokens, positions, caches)

    monkeypatch.setattr(made, "last_logits", watched)
    generate(made, [[1, 2, 3, 4, 5], [6, 7]], 3, GREEDY, ())
    assert read == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 2, 3]]


def test_the_shipped_chunk() -> None:
    assert module.PREFILL_TOKENS == 512


# -- the end of a row --


def test_eos_ends_one_row_and_not_the_others() -> None:
    """Each row is the endless one, cut after its first EOS."""
    made = model()
    prompts = [[1, 2, 3], [4], [5, 6]]
    endless = generate(made, prompts, 8, GREEDY, ())
    ends = {row.index(token) for row in endless for token in row}
    cut_early = 0
    for eos in {token for row in endless for token in row}:
        wanted = [row[: row.index(eos) + 1] if eos in row else row for row in endless]
        assert generate(made, prompts, 8, GREEDY, [eos]) == wanted
        lengths = {len(row) for row in wanted}
        cut_early += len(lengths) > 1
    assert cut_early and len(ends) > 1, "no case had rows of different lengths"


def test_streaming() -> None:
    """None for a row that has ended, its EOS itself still shown; over when all have ended."""
    made = model()
    prompts = [[1, 2, 3], [4], [5, 6]]
    endless = generate(made, prompts, 8, GREEDY, ())
    eos = endless[0][1]
    rows = [row[: row.index(eos) + 1] if eos in row else row for row in endless]
    longest = max(len(row) for row in rows)
    wanted = [[row[step] if step < len(row) else None for row in rows] for step in range(longest)]
    assert list(stream_tokens(made, prompts, 8, GREEDY, [eos])) == wanted
    assert any(None in step for step in wanted)


def test_generation_stops_when_all_rows_have_ended() -> None:
    made = model()
    first = generate(made, [[1]], 1, GREEDY, ())[0][0]
    calls = []
    made.head.register_forward_hook(lambda *_: calls.append(1))
    steps = list(stream_tokens(made, [[1], [1]], 50, GREEDY, [first]))
    assert steps == [[first, first]] and len(calls) == 1


def test_no_forward_pass_after_the_last_token() -> None:
    made = model()
    calls = []
    made.head.register_forward_hook(lambda *_: calls.append(1))
    generate(made, [[1, 2]], 5, GREEDY, ())
    assert len(calls) == 5


def test_tokens_arrive_one_by_one() -> None:
    """Streaming to a terminal: a token is out before the next is computed."""
    made = model()
    calls = []
    made.head.register_forward_hook(lambda *_: calls.append(1))
    stream = stream_tokens(made, [[1, 2]], 5, GREEDY, ())
    for step in range(1, 4):
        next(stream)
        assert len(calls) == step


# -- sampling --


def test_the_seed_decides() -> None:
    made = model()
    prompts = [[1, 2, 3], [4]]
    runs = [generate(made, prompts, 12, Sampling(1.5), (), seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    state = torch.get_rng_state()
    generate(made, prompts, 3, Sampling(1.5), ())
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


def test_equal_rows_are_drawn_apart() -> None:
    rows = generate(model(), [[1, 2, 3]] * 4, 12, Sampling(1.5), ())
    assert len({tuple(row) for row in rows}) > 1


def test_top_k_of_one_is_greedy() -> None:
    made = model()
    prompts = [[1, 2, 3], [4]]
    wanted = generate(made, prompts, 6, GREEDY, ())
    assert generate(made, prompts, 6, Sampling(1.0, top_k=1), (), seed=5) == wanted
    assert generate(made, prompts, 6, Sampling(1.0, top_p=1e-9), (), seed=5) == wanted


# -- what does not matter --


def test_modes_and_gradients() -> None:
    """Training or evaluation mode, recomputation configured or not: the same tokens, no graph."""
    wanted = generate(model(), [[1, 2], [3]], 6, GREEDY, ())
    for granularity in (None, "full"):
        made = model(activations_checkpoint_granularity=granularity)
        for mode in (True, False):
            assert generate(made.train(mode), [[1, 2], [3]], 6, GREEDY, ()) == wanted
    needed = []
    made.head.register_forward_hook(lambda _, args, out: needed.append(out.requires_grad))
    generate(made, [[1]], 2, GREEDY, ())
    assert needed == [False, False] and torch.is_grad_enabled()


def test_nothing_is_counted() -> None:
    made = model()
    generate(made, [[1, 2], [3]], 4, GREEDY, ())
    assert not any(router.tokens_per_expert.any() for router in made.routers().values())


def test_a_context_filled_to_the_last_token() -> None:
    made = model(max_position_embeddings=8)
    got = generate(made, [[1, 2, 3, 4, 5], [6]], 3, GREEDY, ())
    assert got == [plain_loop(made, [1, 2, 3, 4, 5], 3), plain_loop(made, [6], 3)]


# -- errors --


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1]], 0, r"max_new_tokens=0: must be at least 1"),
        ([[1]], -3, r"max_new_tokens=-3: must be at least 1"),
        ([[1], []], 1, r"prompt 1 is empty: give at least one token"),
        ([], 1, r"no prompt: give at least one"),
        (
            [[1], [2, 13]],
            1,
            r"prompt 1 holds token id 13, but the model knows ids 0 to 12: use the tokenizer the "
            r"model was trained with",
        ),
        (
            [[5, -1]],
            1,
            r"prompt 0 holds token id -1, but the model knows ids 0 to 12: use the tokenizer the "
            r"model was trained with",
        ),
        (
            [[1], [2] * 6],
            5,
            r"prompt 1 has 6 tokens and 5 more are asked for: 11 exceed "
            r"max_position_embeddings=8; ask for at most 2",
        ),
        (
            [[2] * 10],
            1,
            r"prompt 0 has 10 tokens and 1 more are asked for: 11 exceed "
            r"max_position_embeddings=8; shorten it by 3 or more",
        ),
    ],
)
def test_what_cannot_be_generated(prompts: list[list[int]], count: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        generate(model(max_position_embeddings=8), prompts, count, GREEDY, ())
