"""What Megatron-Core and NeMo AutoModel share: the schedule, and how what they lack is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepseek.config import RunConfig
from deepseek.config.errors import Problem
from deepseek.config.schema import value_at


def schedule(run: RunConfig) -> dict[str, Any]:
    """``optim.sched`` for ``OptimizerParamScheduler``, which both have.

    Its warm-up goes from ``init_lr`` to the peak in ``lr_warmup_steps``. With these values each
    step has the learning rate that it has here.
    """
    sched, peak = run.model.optim.sched, run.model.optim.lr
    total = sched.max_steps if sched.max_steps is not None else run.trainer.max_steps
    warmup, constant = sched.warmup_steps, sched.constant_steps
    if sched.name == "WarmupConstantCosine":
        return {
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": "cosine",
            "wsd_decay_steps": max(1, total - warmup - constant),
            "init_lr": peak / warmup if warmup else 0.0,
            "lr_warmup_steps": max(0, warmup - 1),
            "lr_decay_steps": total,
            "max_lr": peak,
            "min_lr": sched.min_lr,
        }
    return {
        "lr_decay_style": "cosine",
        "init_lr": 0.0 if constant else peak / (warmup + 1),
        "lr_warmup_steps": warmup,
        "lr_decay_steps": total - constant,
        "max_lr": peak,
        "min_lr": sched.min_lr,
    }


def lacking(
    run: RunConfig, target: str, extra: Sequence[tuple[str, bool, str, str]]
) -> list[Problem]:
    """The settings that ``target`` has no counterpart of.

    Args:
        run: the configuration.
        target: name of the program.
        extra: field, whether it is in the way, why, and the way out.
    """
    model, data = run.model, run.model.data
    common = [
        (
            "model.peft",
            model.peft is not None,
            f"adapters are described otherwise in {target}",
            "use model.peft=null, and its own section for adapters",
        ),
        (
            "model.restore_from",
            model.restore_from is not None,
            f"{target} does not read these files",
            "use null; `deepseek hf export` writes the weights as files that it loads",
        ),
        (
            "model.optim.name",
            model.optim.name != "adamw",
            "Muon is another one there, with other settings",
            "use adamw",
        ),
        (
            "model.data.data_prefix",
            data.data_prefix is None,
            f"{target} cannot open the built-in corpus",
            "write data with `deepseek prepare-data` and give its prefix",
        ),
        (
            "model.data.chat",
            data.chat,
            f"{target} does not read the marks of answers beside the data",
            "use false, and its own chat data",
        ),
        (
            "model.data.fim_rate",
            data.fim_rate > 0,
            f"{target} does not rearrange documents",
            "use 0",
        ),
        *extra,
    ]
    return [
        Problem(field, value_at(run, field), why, way_out)
        for field, wrong, why, way_out in common
        if wrong
    ]


def local_batch(run: RunConfig) -> int:
    """Sequences of one optimiser step on one data-parallel rank."""
    model = run.model
    world = run.trainer.devices * run.trainer.num_nodes
    ranks = world // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)
    return model.global_batch_size // ranks


def in_bf16(run: RunConfig) -> bool:
    """Whether products are in bf16; ``auto`` is for a GPU here."""
    return str(run.trainer.precision) != "32"
