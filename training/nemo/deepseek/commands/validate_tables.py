"""What a sound configuration means in numbers: the rows that ``deepseek validate`` prints."""

from __future__ import annotations

from deepseek.config.cost import (
    count_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    state_memory,
)
from deepseek.config.schema import RunConfig


def validate_report(cfg: RunConfig) -> list[tuple[str, str]]:
    """Rows (what, value) of a configuration that ``check`` found sound."""
    model, trainer = cfg.model, cfg.trainer
    counts = count_parameters(model)
    memory = state_memory(model, model.optim.name)
    with_mtp = model.num_nextn_predict_layers > 0
    length = model.data.seq_length
    flops = flops_per_token(model, length, with_mtp)
    ranks = trainer.devices * trainer.num_nodes
    inside = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    micro_batches = model.global_batch_size // (model.micro_batch_size * (ranks // inside))
    tokens_per_step = model.global_batch_size * length
    total_tokens = tokens_per_step * trainer.max_steps
    number_bytes = 4 if str(trainer.precision).startswith("32") else 2
    cache = kv_cache_bytes_per_token(model, number_bytes)

    rows = [
        ("parameters", f"{_short(counts.total)} ({counts.total:,})"),
        (
            "active per token",
            f"{_short(counts.active)} ({counts.active:,}), "
            f"{_short(counts.active_without_embedding)} without the input embedding",
        ),
    ]
    if with_mtp:
        modules = model.num_nextn_predict_layers
        noun = "MTP module" if modules == 1 else "MTP modules"
        rows.append((f"{modules} {noun}", f"{_short(counts.mtp)} ({counts.mtp:,})"))
    if counts.adapters is not None:
        rows.append(
            (
                "trained by LoRA",
                f"{_short(counts.adapters)} ({counts.adapters:,}), "
                f"{counts.adapters / counts.stored:.2%} of the weights, which are frozen",
            )
        )
    rows += [
        (
            "FLOPs per token",
            f"{_flops(flops)} in training (causal, at {length:,} tokens"
            + (", with MTP)" if with_mtp else ")"),
        ),
        ("weights", f"{size_text(memory.weights)} (fp32)"),
        ("gradients", f"{size_text(memory.gradients)} (fp32)"),
        ("optimiser states", f"{size_text(memory.optimizer)} ({model.optim.name}, fp32)"),
        (
            "states together",
            f"{size_text(memory.total)}, without activations"
            + (f", over {ranks:,} processes" if ranks > 1 else ""),
        ),
        ("KV cache per token", f"{cache:,} bytes ({'fp32' if number_bytes == 4 else 'bf16'})"),
        (
            "tokens per step",
            f"{tokens_per_step:,} ({model.global_batch_size:,} sequences x {length:,}, in "
            f"{micro_batches:,} micro-batches of {model.micro_batch_size:,}"
            + (" per rank)" if ranks > 1 else ")"),
        ),
        ("tokens of the run", f"{_short(total_tokens)} ({trainer.max_steps:,} steps)"),
        ("FLOPs of the run", f"{flops * total_tokens:.3g}"),
    ]
    return rows


def _short(number: int) -> str:
    """Two decimals and a unit, such as 671.03 B."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number:,}"


def _flops(number: int) -> str:
    """Two decimals and a unit, such as 249.81 GFLOP."""
    for unit, factor in (("TFLOP", 10**12), ("GFLOP", 10**9)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number / 10**6:,.2f} MFLOP"


def size_text(count: int) -> str:
    """Bytes in a binary unit, such as 2.48 TiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 2**10:,.2f} KiB"
