"""Learning rate as a pure function of the step: nothing to save, nothing to restore wrongly."""

from __future__ import annotations

import math

from deepseek.config.schema import SchedConfig


def learning_rate(step: int, peak: float, sched: SchedConfig, trainer_steps: int) -> float:
    """Learning rate of the optimiser step that follows ``step`` finished ones.

    Args:
        step: finished optimiser steps, from 0.
        peak: ``model.optim.lr``.
        sched: ``model.optim.sched``.
        trainer_steps: ``trainer.max_steps``, used where ``sched.max_steps`` is null.
    """
    total = sched.max_steps if sched.max_steps is not None else trainer_steps
    if sched.name == "WarmupConstantCosine":
        return _warmup_constant_cosine(step, peak, sched, total)
    return _nemo_cosine_annealing(step, peak, sched, total)


def _warmup_constant_cosine(step: int, peak: float, sched: SchedConfig, total: int) -> float:
    """DeepSeek-V3's recipe (arXiv:2412.19437 section 4.2); ``min_lr`` from ``total`` on."""
    if step < sched.warmup_steps:
        return peak * (step + 1) / sched.warmup_steps
    start = sched.warmup_steps + sched.constant_steps
    if step < start:
        return peak
    return _cosine(step - start, total - start, peak, sched.min_lr)


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
