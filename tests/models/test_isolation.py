"""Isolated documents: what one document holds leaves the others' numbers bitwise unchanged."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from deepseek.models.transformer import Transformer
from support.tiny_models import tiny_config, tiny_model

CASES = [
    {},
    dict(q_lora_rank=12, num_nextn_predict_layers=2),
    dict(n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1),
    dict(first_k_dense_replace=0, hidden_size=32, moe_intermediate_size=20, v_head_dim=12),
    dict(scoring_func="softmax", topk_method="greedy", n_routed_experts=16),
]


def packed(rng: random.Random, sequences: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions that start again, and document ids of 1 to 4 documents a sequence."""
    positions, documents = [], []
    for _ in range(sequences):
        borders = sorted(rng.sample(range(1, length), rng.randint(0, 3)))
        starts = [0, *borders]
        ids = [sum(i >= border for border in borders) for i in range(length)]
        documents.append(ids)
        positions.append([i - starts[document] for i, document in enumerate(ids)])
    tokens = [[rng.randrange(23) for _ in range(length)] for _ in range(sequences)]
    return torch.tensor(tokens), torch.tensor(positions), torch.tensor(documents)


def outputs(model: Transformer, batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Logits of the main model and hidden states of every MTP depth."""
    tokens, positions, documents = batch
    with torch.no_grad():
        states = model.hidden_states(tokens, model.context(tokens, positions, documents))
        return [model(tokens, positions, documents), *states.mtp_BSD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_other_documents_do_not_notice(case: int, dtype: torch.dtype) -> None:
    rng = random.Random(case)
    model = tiny_model(tiny_config(**CASES[case]), dtype, seed=case)
    for _ in range(12):
        tokens, positions, documents = packed(rng, rng.randint(1, 3), rng.randint(4, 60))
        row = rng.randrange(len(tokens))
        victim = rng.choice(documents[row].unique().tolist())
        is_victim = torch.zeros_like(tokens, dtype=torch.bool)
        is_victim[row] = documents[row] == victim
        changed = torch.where(is_victim, (tokens + rng.randint(1, 22)) % 23, tokens)
        before = outputs(model, (tokens, positions, documents))
        after = outputs(model, (changed, positions, documents))
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one[~is_victim], other[~is_victim])
        assert not torch.equal(before[0][is_victim], after[0][is_victim])


def test_under_autocast() -> None:
    rng = random.Random(0)
    model = tiny_model(tiny_config(), torch.float32)
    batch = packed(rng, 2, 30)
    tokens, positions, documents = batch
    changed = tokens.clone()
    changed[0, documents[0] == 0] = 3
    other = documents != 0
    other[1] = True
    with torch.autocast("cpu", torch.bfloat16):
        before, after = outputs(model, batch)[0], outputs(model, (changed, positions, documents))[0]
    assert other[0].any() and torch.equal(before[other], after[other])


def test_a_change_of_load_does_not_leak() -> None:
    """One document's tokens go to other experts: the other's rows move, their bits do not."""
    model = tiny_model(tiny_config(), torch.float32)
    tokens, positions, documents = packed(random.Random(3), 1, 40)
    documents = (torch.arange(40) >= 20).long().unsqueeze(0)
    counts = []
    logits = []
    for first in (tokens[0, :20], torch.full((20,), 7)):
        batch = tokens.clone()
        batch[0, :20] = first
        ids = []
        hook = model.layers["1"].ffn.gate.register_forward_hook(
            lambda _, args, out, ids=ids: ids.append(out.expert_ids_TK)
        )
        with torch.no_grad():
            logits.append(model(batch, positions, documents)[0, 20:])
        hook.remove()
        counts.append(torch.bincount(ids[0].flatten(), minlength=4).tolist())
    assert counts[0] != counts[1]
    assert torch.equal(*logits)


def test_without_isolation_documents_do_leak() -> None:
    """So the tests above could fail."""
    model = tiny_model(tiny_config())
    tokens, positions, documents = packed(random.Random(0), 1, 12)
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % 23
    with torch.no_grad():
        before, after = model(tokens, positions), model(changed, positions)
    assert not torch.equal(before[0, -1], after[0, -1])
    assert documents.max() > 0
