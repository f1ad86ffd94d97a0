"""The optimiser with its parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deepseek.config.schema import OptimConfig, SchedConfig
from deepseek.parallel.gradients import multiply_gradients
from deepseek.training.adamw import AdamW
from deepseek.training.muon import Muon


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    orthogonalise: Callable[[Tensor], Tensor] | None = None,
) -> AdamW:
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
        elif name.split(".")[-2] in ("embed", "mtp_embed", "head", "mtp_head"):
            lookup.append(parameter)
        else:
            hidden.append(parameter)
    betas = (config.betas[0], config.betas[1])
    moments = torch.bfloat16 if config.moments_dtype == "bf16" else None
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
            moments=moments,
            on_host=config.cpu_offload,
        )
    groups = [
        {"params": hidden + lookup, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(
        groups,
        moments=moments,
        on_host=config.cpu_offload,
        lr=config.lr,
        betas=betas,
        eps=config.eps,
    )


def make_room(optimizer: torch.optim.Optimizer) -> None:
    """Have moments made, by an optimiser that can do so before its first update."""
    make = getattr(optimizer, "make_room", None)
    if make is not None:
        make()


def multiply_in_update(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Have the next update of ``optimizer`` count gradients ``factor`` times.

    AdamW and Muon multiply what they read. For an optimiser of somebody else gradients are
    multiplied here.
    """
    for group in optimizer.param_groups:
        if "gradient_factor" in group:
            group["gradient_factor"] = factor
        else:
            multiply_gradients(group["params"], factor)


def learning_rate(step: int, peak: float, sched: SchedConfig, trainer_steps: int) -> float:
    """Learning rate of the optimiser step that follows ``step`` finished ones.

    A pure function of the step: nothing to save, nothing to restore wrongly.

    Args:
        step: finished optimiser steps, from 0.
        peak: ``model.optim.lr``.
        sched: ``model.optim.sched``.
        trainer_steps: ``trainer.max_steps``, used where ``sched.max_steps`` is null.
    """
    total = sched.max_steps if sched.max_steps is not None else trainer_steps
    if sched.name == "WarmupConstantCosine":
        return _warmup_constant_cosine(step, peak, sched, total)
    if sched.name == "WarmupStableDecay":
        return _warmup_stable_decay(step, peak, sched, total)
    return _nemo_cosine_annealing(step, peak, sched, total)


def _warmup_constant_cosine(step: int, peak: float, sched: SchedConfig, total: int) -> float:
    """DeepSeek-V3's recipe (arXiv:2412.19437 section 4.2); ``min_lr`` from ``total`` on."""
    if step < sched.warmup_steps:
        return peak * (step + 1) / sched.warmup_steps
    start = sched.warmup_steps + sched.constant_steps
    if step < start:
        return peak
    return _cosine(step - start, total - start, peak, sched.min_lr)


def _warmup_stable_decay(step: int, peak: float, sched: SchedConfig, total: int) -> float:
    """The peak until ``decay_steps`` before ``total`` (arXiv:2404.06395 section 4), then down.

    The steps before the decay do not depend on ``total``: a run can be made longer from any of
    their checkpoints. ``minus_sqrt`` is arXiv:2405.18392's 1 - sqrt.
    """
    if step < sched.warmup_steps:
        return peak * (step + 1) / sched.warmup_steps
    start = max(sched.warmup_steps, total - sched.decay_steps)
    if step < start or sched.decay_steps == 0:
        return peak
    done = min(1.0, (step - start) / (total - start)) if total > start else 1.0
    left = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "minus_sqrt": 1 - math.sqrt(done),
    }[sched.decay_style]
    return sched.min_lr + (peak - sched.min_lr) * left


def _nemo_cosine_annealing(step: int, peak: float, sched: SchedConfig, total: int) -> float:
    """NeMo's ``CosineAnnealing``, its two warm-ups included.

    Without ``constant_steps`` the warm-up is (step+1)/(warmup+1); with them NeMo takes Megatron's,
    step/warmup, and the last ``constant_steps`` are held at ``min_lr``.
    """
    warmup, constant = sched.warmup_steps, sched.constant_steps
    if constant == 0:
        if warmup > 0 and step <= warmup:
            return peak * (step + 1) / (warmup + 1)
        return _cosine(step - warmup, total - warmup, peak, sched.min_lr)
    if warmup > 0 and step <= warmup:
        return peak * step / warmup
    return _cosine(step - warmup, total - warmup - constant, peak, sched.min_lr)


def _cosine(step: int, length: int, peak: float, floor: float) -> float:
    """Half a cosine from ``peak`` at 0 to ``floor`` at ``length``, then ``floor``."""
    if step >= length:
        return floor
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * step / length))
