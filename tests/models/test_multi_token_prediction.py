"""Multi-token prediction: what a depth reads, in which order, and how far ahead it looks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek.models.components.block import MultiTokenPredictor
from deepseek.models.transformer import Transformer
from support.tiny_models import tiny_config, tiny_model


def model_of(depths: int, **changes: object) -> Transformer:
    return tiny_model(tiny_config(num_nextn_predict_layers=depths, **changes))


def depths_of(model: Transformer, tokens: Tensor, documents: Tensor | None = None) -> list[Tensor]:
    """Hidden states of the main model (depth 0) and of each depth."""
    with torch.no_grad():
        states = model.hidden_states(tokens, model.context(tokens, None, documents))
    return [states.main_BSD, *states.mtp_BSD]


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(0))


def test_the_embedding_comes_first() -> None:
    """Columns 0..D of eh_proj take the embedding, D..2D the hidden state, as released."""
    module: MultiTokenPredictor = model_of(1).mtp[0]
    generator = torch.Generator().manual_seed(0)
    hidden, ahead = torch.randn(2, 1, 3, 16, generator=generator, dtype=torch.float64)
    joined = []
    module.eh_proj.register_forward_hook(lambda _, args, out: joined.append(args[0]))
    context = model_of(1).context(torch.zeros(1, 3, dtype=torch.int64))
    with torch.no_grad():
        got = module(hidden, ahead, context)
        assert torch.equal(joined[0][..., :16], module.enorm(ahead))
        assert torch.equal(joined[0][..., 16:], module.hnorm(hidden))
        wanted = module.norm(module.block(module.eh_proj(joined[0]), context))
    assert torch.equal(got, wanted)
    assert not torch.equal(module.enorm.weight, module.hnorm.weight)


def test_what_a_depth_is_fed() -> None:
    """Depth 1 gets the main model's output after its final norm, depth 2 that of depth 1."""
    model = model_of(2)
    fed = []
    for module in model.mtp:
        module.register_forward_hook(lambda _, args, out: fed.append(args[:2]))
    tokens = random_tokens(2, 6)
    main, first, _ = depths_of(model, tokens)
    assert torch.equal(fed[0][0], main) and torch.equal(fed[1][0], first)
    with torch.no_grad():
        assert torch.equal(fed[0][1][:, :-1], model.embed(tokens)[:, 1:])
        assert torch.equal(fed[1][1][:, :-2], model.embed(tokens)[:, 2:])
        assert torch.equal(model.head(main), model(tokens))


def test_depths_look_no_further_than_they_may() -> None:
    """Output i of depth k changes with token j exactly for j <= i + k."""
    model = model_of(2)
    tokens = random_tokens(1, 7)
    before = depths_of(model, tokens)
    for j in range(7):
        changed = tokens.clone()
        changed[0, j] = 0
        after = depths_of(model, changed)
        for depth in range(3):
            # the last positions of a depth have no token k places ahead, and are never used
            same = (before[depth][0] == after[depth][0]).all(dim=-1)[: 7 - depth].tolist()
            assert same == [j > i + depth for i in range(7 - depth)]


def test_depths_stay_inside_a_document() -> None:
    """Every depth of a packed sequence equals that of its documents alone."""
    model = model_of(2)
    tokens = random_tokens(1, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model.hidden_states(tokens, model.context(tokens, positions, documents))
    for part in (slice(0, 3), slice(3, 8)):
        alone = depths_of(model, tokens[:, part])
        for got, wanted in zip([packed.main_BSD, *packed.mtp_BSD], alone, strict=True):
            torch.testing.assert_close(got[:, part], wanted, rtol=1e-10, atol=1e-11)


def test_sequences_shorter_than_the_depths() -> None:
    model = model_of(3)
    states = depths_of(model, random_tokens(2, 2))
    assert [state.shape for state in states] == [(2, 2, 16)] * 4
    assert all(state.isfinite().all() for state in states)


@pytest.mark.parametrize(
    ("dense", "is_moe"), [(1, [True, True]), (2, [True, True]), (3, [False, True])]
)
def test_blocks_count_on_from_the_main_layers(dense: int, is_moe: list[bool]) -> None:
    model = model_of(2, first_k_dense_replace=dense)
    assert [module.block.is_moe for module in model.mtp] == is_moe


def test_embedding_and_head_are_shared() -> None:
    names = [name for name, _ in model_of(2).named_parameters()]
    assert sum("embed" in name for name in names) == sum("head" in name for name in names) == 1


def test_the_logits_do_not_depend_on_mtp() -> None:
    """Same main weights with and without MTP modules: the same logits."""
    plain, with_mtp = model_of(0), model_of(2)
    with_mtp.load_state_dict(plain.state_dict(), strict=False)
    tokens = random_tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(plain(tokens), with_mtp(tokens))
