"""QK-clip: what it takes for the largest logits, what it scales, and that no more is scaled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.config.schema import OptimConfig, SchedConfig
from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.ops.causal_attention import document_mask
from deepseek.parallel.mesh import SingleProcess
from support.layouts import Case, Driven, batches, small_config

STILL = OptimConfig(name="muon", lr=1e-300, weight_decay=0.0, sched=SchedConfig())
"""Moves no weight: what changes them is the clip."""


def driven(threshold: float | None, isolated: bool = False, **changes: Any) -> Driven:
    optim = replace(STILL, qk_clip_threshold=threshold)
    config = small_config(optim=optim, num_hidden_layers=2, **changes)
    config = replace(config, data=replace(config.data, isolate_documents=isolated))
    return Driven(Case(config, 1, steps=2), SingleProcess())


def attentions(of: Driven) -> list[MultiHeadLatentAttention]:
    modules = of.module.model.modules()
    return [module for module in modules if isinstance(module, MultiHeadLatentAttention)]


def largest_by_hand(of: Driven, batch: dict[str, Tensor]) -> Tensor:
    """(L, N): all scores of all tokens that are no padding, block by block."""
    found: list[Tensor] = []

    def watched(attn: MultiHeadLatentAttention) -> Any:
        attend = attn.attend

        def noted(q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Any, *out: Any) -> Any:
            ids_BS = torch.zeros_like(batch["tokens"]) if documents is None else documents
            here = document_mask(ids_BS, q.shape[2]) & (batch["documents"] >= 0)[:, None, :, None]
            scores_BNSM = (scale * q @ k.mT).masked_fill(~here, -torch.inf)
            found.append(scores_BNSM.detach().amax(dim=(0, 2, 3)))
            return attend(q, k, v, scale, documents, *out)

        return noted

    for attn in attentions(of):
        attn.attend = watched(attn)
    of.run([batch])
    return torch.stack(found)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 8])
def test_heads_above_the_threshold_are_scaled_down_to_it(
    isolated: bool, q_lora_rank: int | None
) -> None:
    """Of the same batch a second step finds the threshold where the first found more, and the same
    elsewhere; only queries' and keys' rows of those heads have changed, and by the paper's factors.
    """
    changes = dict(q_lora_rank=q_lora_rank, micro_batch_size=8)
    free = driven(None, isolated, **changes)
    batch = next(batches(free.case))
    before_LN = largest_by_hand(free, batch)
    tau = 1.01 * before_LN[0].median().item()  # no head is at it but for rounding
    clipped = driven(tau, isolated, **changes)
    above_LN = before_LN > tau
    assert 0 < above_LN.sum() < above_LN.numel()
    assert free.metrics[0].max_attention_logit is free.metrics[0].clipped_heads is None
    clipped.run([batch])
    assert clipped.metrics[0].max_attention_logit == pytest.approx(before_LN.max().item())
    assert clipped.metrics[0].clipped_heads == int(above_LN.sum())
    # weights: (N, rows of a head, inputs)
    wanted = free.module.model.state_dict()
    for number, attn in enumerate(attentions(free)):
        gamma = (tau / before_LN[number]).clamp(max=1)[:, None, None]
        query = attn.wq if q_lora_rank is None else attn.wq_b
        of_query = query.weight.data.unflatten(0, (4, 8))  # in place
        of_query[:, :4] *= gamma.sqrt()
        of_query[:, 4:] *= gamma
        attn.wkv_b.weight.data.unflatten(0, (4, 8))[:, :4] *= gamma.sqrt()
    for name, weight in clipped.module.model.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-12, atol=0, msg=name)
    # Only the first block sees what it saw before.
    after_N = largest_by_hand(clipped, batch)[0]
    torch.testing.assert_close(after_N, before_LN[0].clamp(max=tau))


def test_what_is_not_trained_on_does_not_count() -> None:
    """Padding, validation, and a step whose gradient is not finite."""
    one = driven(1e-3)
    batch = next(batches(one.case))
    one.validate([batch])
    assert all(attn.largest_logit_N is None for attn in attentions(one))
    padding = {name: rows.clone() for name, rows in batch.items()}
    padding["documents"].fill_(-1)
    one.run([padding])
    assert one.metrics[0].max_attention_logit == -torch.inf and one.metrics[0].clipped_heads == 0
    train = one.module.micro_batches.train

    def spoiled(*arguments: Any) -> Tensor:
        sums = train(*arguments)
        next(one.module.model.parameters()).grad.view(-1)[0] = torch.nan
        return sums

    one.module.micro_batches.train = spoiled
    before = {name: tensor.clone() for name, tensor in one.module.model.state_dict().items()}
    one.run([batch])
    assert one.metrics[1].skipped and one.metrics[1].clipped_heads > 0
    for name, tensor in one.module.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_micro_batches_and_recomputation_find_the_same() -> None:
    told = []
    for changes in ({}, {"micro_batch_size": 4, "activations_checkpoint_granularity": "full"}):
        one = driven(2.0, **changes)
        one.run(batches(one.case))
        told.append([(m.max_attention_logit, m.clipped_heads) for m in one.metrics])
    assert told[0] == [(pytest.approx(logit), heads) for logit, heads in told[1]]
