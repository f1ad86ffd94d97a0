"""From the configuration to an optimiser with its parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deepseek.config.schema import OptimConfig
from deepseek.training.muon import Muon


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    orthogonalise: Callable[[Tensor], Tensor] | None = None,
) -> torch.optim.Optimizer:
    """AdamW or Muon over the trainable parameters.

    Matrices are decayed; norms (one dim) are not. Under Muon the embedding and the head stay with
    AdamW, since their rows are looked up or compared one by one and are no linear maps.

    Args:
        named_parameters: of the model, or of what this rank has of it.
        config: ``model.optim``.
        orthogonalise: see ``Muon``.
    """
    hidden, lookup, vectors = [], [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif name.split(".")[-2] in ("embed", "mtp_embed", "head"):
            lookup.append(parameter)
        else:
            hidden.append(parameter)
    betas = (config.betas[0], config.betas[1])
    decay = config.weight_decay
    if config.name == "muon":
        groups = [
            {"params": hidden, "weight_decay": decay, "muon": True},
            {"params": lookup, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return Muon(
            groups,
            lr=config.lr,
            betas=betas,
            eps=config.eps,
            momentum=config.muon_momentum,
            orthogonalise=orthogonalise,
        )
    return torch.optim.AdamW(
        [
            {"params": hidden + lookup, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=betas,
        eps=config.eps,
        fused=True,
    )
