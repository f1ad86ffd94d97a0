"""A whole run folder without training: written through the real writers, of any size.

    python synthetic_run.py FOLDER --steps 10000 --layers 58 --experts 256 --ranks 64

Losses fall, experts drift from skewed to balanced, and what a reader must find can be planted: a
layer that collapses, an expert that dies, a rank that lags, a restart that repeats steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.monitoring.array_log import ArrayLog
from deepseek.monitoring.record.metrics_log import MetricsLog
from deepseek.monitoring.record.rank_monitor import COLUMNS

START = 1_760_000_000.0
GAMMA = 1e-3


@dataclass(frozen=True)
class SyntheticRun:
    """What is written; the defaults make a small run in well under a second."""

    name: str = "synthetic"
    steps: int = 60
    layers: int = 4
    experts: int = 16
    top_k: int = 2
    ranks: int = 4
    ranks_per_node: int = 2
    tokens: int = 8192
    log_every: int = 1
    """Steps between records of experts, ranks and traffic."""
    seed: int = 0
    lr: float = 3e-4
    first_layer: int = 1
    collapsed_layer: int | None = None
    """Index of a layer whose tokens go to four experts from half of the run on."""
    dead_expert: tuple[int, int] | None = None
    """(layer, expert) without tokens from a third of the run on."""
    straggler: int | None = None
    """Rank whose computation takes half as long again."""
    restart_at: int | None = None
    """Step at which the run is killed; it goes on five steps earlier."""
    with_monitor: bool = True
    """Write the folder ``monitor``; false: as a run of an older version."""
    max_steps: int | None = None
    """Of the configuration; None: ``steps``, so the run is complete."""

    @property
    def layer_names(self) -> list[str]:
        """The last block is that of an MTP module."""
        names = [f"layers.{self.first_layer + i}" for i in range(self.layers - 1)]
        return [*names, "mtp.0.block"]


def write_run(folder: Path, run: SyntheticRun) -> Path:
    """Write the run; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, run)
    metrics = MetricsLog(folder / "metrics.jsonl")
    write_monitor = _monitor(folder / "monitor", run) if run.with_monitor else lambda step: None
    metrics.write({"event": "started", "step": 0, "time": START})
    rng = np.random.default_rng(run.seed)
    now, steps = START, list(range(1, run.steps + 1))
    if run.restart_at is not None:
        steps = [*range(1, run.restart_at + 1), *range(run.restart_at - 4, run.steps + 1)]
    last = 0
    for step in steps:
        if step <= last:
            now += 20.0
            metrics.write({"event": "restart", "step": step - 1, "time": now, "reason": "killed"})
            metrics.write({"event": "resumed", "step": step - 1, "time": now + 1})
        last = step
        row = _step_row(run, step, rng)
        now += row["seconds"]
        metrics.write(row | {"time": now})
        write_monitor(step)
        if step % max(1, run.steps // 12) == 0:
            loss = _loss(run, step) + 0.05
            metrics.write({"step": step, "val_loss": loss, "val_bits_per_byte": loss * 0.42})
            metrics.write({"event": "checkpoint", "step": step, "time": now})
        for alarm in _alarms(run, step):
            metrics.write({"event": "alarm", "step": step, "time": now} | alarm)
    metrics.write({"event": "stopped", "step": last, "time": now})
    return folder


def _loss(run: SyntheticRun, step: int) -> float:
    return 2.1 + 8.2 * float(np.exp(-12 * step / run.steps)) + 1.2 / (1 + 8 * step / run.steps)


def _step_row(run: SyntheticRun, step: int, rng: np.random.Generator) -> dict[str, Any]:
    spike = 1.4 if step == run.steps * 3 // 5 else 0.0
    loss = _loss(run, step) + 0.03 * float(rng.standard_normal()) + spike
    warm = min(1.0, step / max(1, run.steps // 20))
    seconds = 1.6 + 0.05 * float(rng.random())
    comm = 0.22 + 0.05 * float(rng.random())
    checkpoint = 0.8 if step % max(1, run.steps // 12) == 0 else 0.0
    norm = 0.6 + 0.5 * float(rng.random()) + 3 * spike
    return {
        "step": step,
        "loss": loss,
        "mtp_loss": loss + 0.35,
        "balance_loss": 1.02e-4,
        "grad_norm": norm,
        "grad_norm_dense": 0.7 * norm,
        "grad_norm_expert": 0.6 * norm,
        "grad_norm_router": 0.05 * norm,
        "lr": run.lr * warm * (0.55 + 0.45 * float(np.cos(np.pi * step / run.steps))),
        "tokens": run.tokens,
        "skipped": False,
        "seconds": seconds + checkpoint,
        "tokens_per_second": run.tokens / seconds,
        "mfu": 0.41 + 0.01 * float(rng.standard_normal()),
        "data_seconds": 0.02 + 0.01 * float(rng.random()),
        "forward_backward_seconds": seconds - 0.18,
        "optimizer_seconds": 0.12,
        "checkpoint_seconds": checkpoint,
        "monitor_seconds": 0.003,
        "memory_bytes": 61e9 + 1e9 * float(rng.random()),
        "load_max_over_mean": 1.3,
        "dead_experts": 0,
        "all_to_all_seconds": comm if run.ranks > 1 else None,
    }


def _alarms(run: SyntheticRun, step: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if step == run.steps * 3 // 5:
        found.append({
            "kind": "loss_spike",
            "message": f"loss {_loss(run, step) + 1.4:.2f}, 9.1 sigma above the last 100 steps",
            "remedy": "see whether the gradient norm rose first; lower optim.lr or skip the data",
        })  # fmt: skip
    if run.collapsed_layer is not None and step == run.steps // 2 + 1:
        name = run.layer_names[run.collapsed_layer]
        found.append({
            "kind": "router_collapse", "layer": name,
            "message": f"{name}: 4 of {run.experts} experts take all tokens",
            "remedy": "raise model.moe_router_bias_update_rate or model.moe_aux_loss_coeff",
        })  # fmt: skip
    if run.straggler is not None and step == run.steps // 4:
        found.append({
            "kind": "straggler", "rank": run.straggler,
            "message": f"rank {run.straggler} computes 1.50 times as long as the median rank",
            "remedy": "look at its clock and temperature; leave the machine out",
        })  # fmt: skip
    return found


def _monitor(folder: Path, run: SyntheticRun) -> Callable[[int], None]:
    """The writer of one step's records of experts, ranks, traffic and collectives."""
    rng = np.random.default_rng([run.seed, 1])
    experts, ranks = ArrayLog(folder / "experts.arrays"), ArrayLog(folder / "ranks.arrays")
    traffic = ArrayLog(folder / "traffic.arrays")
    shape = (run.layers, run.experts)
    taste = rng.normal(0, 0.6, shape)
    noise = rng.standard_normal((16, *shape))
    bias = np.zeros(shape)
    mean = run.tokens * run.top_k / run.experts

    def write(step: int) -> None:
        nonlocal bias
        done = step / run.steps
        load = mean * np.exp(taste * np.exp(-6 * done))
        load = load + np.sqrt(load) * np.roll(noise[step % 16], step * 7, axis=1)
        if run.collapsed_layer is not None and done > 0.5:
            load[run.collapsed_layer] = 0
            load[run.collapsed_layer, :4] = run.tokens * run.top_k / 4
        if run.dead_expert is not None and done > 1 / 3:
            load[run.dead_expert] = 0
        tokens = np.maximum(np.rint(load), 0).astype(np.uint32)
        bias = bias + GAMMA * np.sign(-0.05 * taste - bias)
        if step % run.log_every:
            return
        experts.append(
            step,
            {
                "tokens": tokens,
                "bias": bias.astype(np.float32),
                "margin": (0.05 + 0.01 * rng.random(run.layers)).astype(np.float32),
            },
            layers=run.layer_names,
            ep=run.ranks,
            top_k=run.top_k,
        )
        ranks.append(step, {"values": _rank_values(run, done, rng)}, columns=list(COLUMNS))
        if run.ranks > 1:
            _write_traffic(traffic, run, step, tokens, rng)
            _write_collectives(folder / "collectives.jsonl", step, rng)

    return write


def _rank_values(run: SyntheticRun, done: float, rng: np.random.Generator) -> np.ndarray:
    values = np.zeros((run.ranks, len(COLUMNS)), np.float32)
    compute = 1.2 + 0.02 * rng.standard_normal(run.ranks)
    if run.straggler is not None and done > 0.2:
        compute[run.straggler] *= 1.5
    wait = compute.max() - compute
    columns = {
        "step_seconds": compute + wait + 0.35,
        "data_seconds": 0.02 + 0.01 * rng.random(run.ranks),
        "compute_seconds": compute,
        "wait_seconds": wait,
        "transfer_seconds": 0.2 + 0.01 * rng.random(run.ranks),
        "optimizer_seconds": np.full(run.ranks, 0.12),
        "memory_bytes": 48e9 + 1e9 * np.arange(run.ranks) / run.ranks,
        "peak_memory_bytes": 60e9
        + 2e9 * np.arange(run.ranks) / run.ranks
        + 5e7 * rng.random(run.ranks),
        "reserved_bytes": np.full(run.ranks, 66e9),
        "received_rows": run.tokens * run.top_k / run.ranks * (1 + 0.1 * rng.random(run.ranks)),
    }
    columns["largest_received_rows"] = columns["received_rows"] / 40
    for phase, share in (("forward_backward", 1.0), ("optimizer", 0.9), ("checkpoint", 0.8)):
        columns[f"{phase}_allocated_bytes"] = share * columns["memory_bytes"]
        columns[f"{phase}_reserved_bytes"] = columns["reserved_bytes"]
        columns[f"{phase}_peak_bytes"] = share * columns["peak_memory_bytes"]
    for column, name in enumerate(COLUMNS):
        values[:, column] = columns[name]
    return values


def _write_traffic(
    log: ArrayLog, run: SyntheticRun, step: int, tokens: np.ndarray, rng: np.random.Generator
) -> None:
    wanted = tokens.sum(axis=0).reshape(run.ranks, -1).sum(axis=1)
    sent = np.outer(np.full(run.ranks, 1 / run.ranks), wanted) * 14336
    sent *= 0.9 + 0.2 * rng.random(sent.shape)
    np.fill_diagonal(sent, 0)
    nodes = [rank // run.ranks_per_node for rank in range(run.ranks)]
    log.append(step, {"bytes": sent.astype(np.uint64)}, row_bytes=14336, node_of_rank=nodes)


def _write_collectives(path: Path, step: int, rng: np.random.Generator) -> None:
    kinds = (
        ("ep", "all_to_all dispatch", 3.2e9, 0.004),
        ("ep", "all_to_all combine", 3.2e9, 0.004),
        ("dp", "reduce_scatter", 9e9, 0.02),
        ("dp", "all_gather", 9e9, 0.018),
    )
    with open(path, "a") as file:
        for group, op, size, seconds in kinds:
            p50 = seconds * (1 + 0.1 * float(rng.random()))
            row = {
                "step": step, "group": group, "op": op, "count": 58, "bytes": size, "p50": p50,
                "p95": 1.3 * p50, "max": 2.1 * p50, "algbw": size / 58 / p50,
                "busbw": 0.9 * size / 58 / p50, "wait_seconds": 10 * p50,
                "transfer_seconds": 48 * p50, "exposed_share": 0.35,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


def _write_record(folder: Path, run: SyntheticRun) -> None:
    config = f"""\
name: {json.dumps(run.name)}
seed: {run.seed}
trainer:
  devices: {run.ranks}
  max_steps: {run.max_steps or run.steps}
model:
  global_batch_size: 4
  n_routed_experts: {run.experts}
  num_experts_per_tok: {run.top_k}
  num_hidden_layers: {run.first_layer + run.layers - 1}
  expert_model_parallel_size: {run.ranks}
  optim:
    lr: {run.lr}
"""
    (folder / "config.yaml").write_text(config)
    environment = {
        "python": "3.11.7", "torch": "2.13.0", "framework": "pytorch-lightning 2.6",
        "devices": ["NVIDIA H100 80GB HBM3"] * min(run.ranks, 2), "world_size": run.ranks,
        "hosts": run.ranks // run.ranks_per_node or 1, "git_commit": "0123abc",
        "command": "deepseek train --config deepseek_v3_base", "processes": run.ranks,
        "flops_per_token": 1.2e9, "peak_flops_per_device": 9.89e14,
        "peak_source": "data sheet of H100, dense bf16", "parameters": 1_234_567_890,
        "active_parameters": 234_567_890, "trained_parameters": 1_234_567_890,
        "data": [{"name": "corpus", "tokens": 4_000_000, "samples": 1000, "share": 1.0}],
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    sample = {"step": run.steps, "prompt": "Once <b>upon</b>", "text": " a time\nthere was"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name in ("steps", "layers", "experts", "ranks", "log_every", "seed"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(SyntheticRun, name))
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1 << 22)
    for name in ("collapsed_layer", "straggler", "restart_at"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    write_run(folder, SyntheticRun(**arguments))


if __name__ == "__main__":
    main()
