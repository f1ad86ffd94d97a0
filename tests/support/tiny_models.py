"""Small models with weights large enough that every non-linearity bends, and one training pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.config.schema import ModelConfig
from deepseek.models.transformer import Transformer, loss_sums
from deepseek.ops.cross_entropy import IGNORE_INDEX

TINY = dict(
    vocab_size=23,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    intermediate_size=24,
    moe_intermediate_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_aux_loss_coeff=0.05,
    moe_z_loss_coeff=0.02,
)


def tiny_config(**changes: object) -> ModelConfig:
    return ModelConfig(**(TINY | changes))  # type: ignore[arg-type]


def tiny_model(
    config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Transformer:
    model = Transformer(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1.0)
        for router in model.routers().values():
            router.start_step()
            if router.bias is not None:
                router.bias.normal_(-0.5, 0.4, generator=generator)
    return model


@dataclass
class Batch:
    """One optimiser step's sequences, (B, S) each."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None
    real: Tensor

    def rows(self, rows: slice) -> Batch:
        documents = None if self.documents is None else self.documents[rows]
        return Batch(self.tokens[rows], self.labels[rows], documents, self.real[rows])


def random_batch(
    vocab: int = 23, sequences: int = 2, length: int = 7, seed: int = 0, unlabelled: float = 0.2
) -> Batch:
    """One stream, nothing padded; this share of the labels is missing."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, length)
    tokens, labels = torch.randint(vocab, (2, *shape), generator=generator)
    labels[torch.rand(shape, generator=generator) < unlabelled] = IGNORE_INDEX
    return Batch(tokens, labels, None, torch.ones(shape, dtype=torch.bool))


def backward(model: Transformer, batch: Batch, cuts: list[int] | None = None) -> Tensor:
    """Forward and backward of one step, micro-batch by micro-batch; returns the loss.

    ``cuts`` are the micro-batch sizes; None: all at once. Gradients and counts are added up in the
    model, as in training.
    """
    config = model.config
    num_labels = (batch.labels != IGNORE_INDEX).sum().clamp(min=1)
    scale = 1.0 / batch.real.sum()
    total = torch.zeros(())
    start = 0
    for size in cuts or [len(batch.tokens)]:
        micro = batch.rows(slice(start, start + size))
        start += size
        context = model.context(micro.tokens, None, micro.documents, micro.real, scale)
        hidden = model.hidden_states(micro.tokens, context)
        sums = loss_sums(hidden.main_BSD, hidden.mtp_BSD, model.head, micro.labels, micro.documents)
        loss = (sums.main + config.mtp_loss_scaling_factor * sums.mtp) / num_labels
        loss.backward()
        total = total + loss.detach()
    assert start == len(batch.tokens)
    return total


def gradients(model: Transformer) -> dict[str, Tensor]:
    """A copy of every gradient; each must exist."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        found[name] = parameter.grad.clone()
    return found


def loads(model: Transformer) -> dict[str, list[int]]:
    return {name: router.tokens_per_expert.tolist() for name, router in model.routers().items()}


def start_step(model: Transformer) -> None:
    model.zero_grad()
    for router in model.routers().values():
        router.start_step()


def assert_same(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference of each tensor over its largest value; 0: bitwise."""
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tolerance == 0:
            assert torch.equal(ours[name], tensor), name
        else:
            scale = tensor.abs().max().item()
            difference = (ours[name] - tensor).abs().max().item()
            assert difference <= tolerance * scale, f"{name}: {difference:.1e} of {scale:.1e}"
