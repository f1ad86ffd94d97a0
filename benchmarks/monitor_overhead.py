"""What monitoring costs: the same steps with all of it and with none of it.

    OMP_NUM_THREADS=1 python benchmarks/monitor_overhead.py

A model of 12 layers with 64 experts each, in one process, and with expert parallelism in two.
Blocks of steps with monitoring and without alternate, in an order that changes, within one
process, so that a machine whose speed drifts slows both sides alike. ``share`` is the median of a
monitored step over the median of one that is not, less 1; ``by_itself`` is what the monitors say
they cost, as it stands in the log of every run; ``noise`` is the same comparison between two halves
of the steps that are not monitored: what a ``share`` below it means is not known.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251
import torch.multiprocessing as mp
from torch import Tensor

from deepseek.commands.entry import guarded
from deepseek.config.layout import Layout
from deepseek.config.schema import ModelConfig
from deepseek.monitoring.record.alarms import Alarms
from deepseek.monitoring.record.expert_monitor import ExpertMonitor
from deepseek.monitoring.record.metrics_log import MetricsLog
from deepseek.monitoring.record.rank_monitor import RankMonitor, RecordSchedule
from deepseek.parallel.mesh import Meshes, SingleProcess
from deepseek.training.step import DeepSeekModel

BLOCKS, STEPS = 12, 3
"""Blocks of each kind, and steps in a block."""


def model(ranks: int) -> ModelConfig:
    """12 x 64 experts, narrow: a step of about a second."""
    config = ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=13,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=1024,
        moe_intermediate_size=128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_group=1,
        topk_group=1,
        micro_batch_size=2,
        global_batch_size=8,
        expert_model_parallel_size=ranks,
    )
    config.data.seq_length = 128
    return config


def main() -> None:
    """Print one JSON object."""
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else BLOCKS
    load = os.getloadavg()[0]
    cases = {}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(one_rank, args=(ranks, blocks, folder), nprocs=ranks)
            cases[f"{ranks} processes"] = json.loads((Path(folder) / "result").read_text())
    result = {
        "what": "12 x 64 experts, hidden 256, 1,024 tokens a step, gloo, 1 thread a process",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "blocks": blocks,
        "steps_per_block": STEPS,
        "load": load,
        "cases": cases,
        "load_after": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))


def one_rank(rank: int, ranks: int, blocks: int, folder: str) -> None:
    """Rank 0 leaves the result in a file."""
    torch.set_num_threads(1)
    meshes: Meshes | SingleProcess = SingleProcess()
    if ranks > 1:
        store = dist.FileStore(os.path.join(folder, "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        meshes = Meshes(Layout(dp_shard=ranks, ep=ranks), "cpu", timedelta(minutes=5))
    result = Driven(model(ranks), meshes, Path(folder)).compare(blocks)
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


class Driven:
    """A module and its callbacks, stepped without a trainer."""

    def __init__(self, config: ModelConfig, meshes: Meshes | SingleProcess, folder: Path) -> None:
        self.config, self.meshes = config, meshes
        self.module: Any = DeepSeekModel(config, seed=1, max_steps=10**6, parallelize_later=True)
        self.module.parallelize(meshes, torch.device("cpu"))
        self.optimizer = self.module.configure_optimizers()
        leads = meshes.rank == 0
        ranks = RankMonitor(folder / "monitor", RecordSchedule(1), leads)
        experts = ExpertMonitor(folder / "monitor" / "experts.arrays", RecordSchedule(1), leads)
        self.callbacks: list[Any] = [ranks, experts]
        if leads:
            log = MetricsLog(folder / "metrics.jsonl", 1e9, 1e12)
            self.callbacks += [log, Alarms(log, experts, ranks)]
        self.trainer = SimpleNamespace(loggers=_tensorboard(folder) if leads else [])
        self.own_seconds: list[float] = []

    def compare(self, blocks: int) -> dict[str, Any]:
        """Medians of both kinds of steps."""
        self.steps(False, 2)  # the first ones are slow for other reasons
        seconds: dict[bool, list[float]] = {True: [], False: []}
        self._call(self.callbacks[2:], "on_train_start")
        order = random.Random(0)  # the same on all ranks
        for _ in range(blocks):
            for monitored in order.sample([True, False], 2):
                seconds[monitored] += self.steps(monitored, STEPS)
        on, off = statistics.median(seconds[True]), statistics.median(seconds[False])
        halves = [statistics.median(seconds[False][half::2]) for half in (0, 1)]
        return {
            "seconds_monitored": round(on, 4),
            "seconds_alone": round(off, 4),
            "share": round(on / off - 1, 4),
            "share_of_fastest": round(min(seconds[True]) / min(seconds[False]) - 1, 4),
            "noise": round(abs(halves[1] / halves[0] - 1), 4),
            "by_itself_seconds": round(statistics.median(self.own_seconds), 5),
            "by_itself": round(statistics.median(self.own_seconds) / on, 4),
        }

    def steps(self, monitored: bool, number: int) -> list[float]:
        """Seconds of each step."""
        module, callbacks = self.module, self.callbacks if monitored else []
        self._call(callbacks[:2], "on_train_start")
        seconds = []
        for _ in range(number):
            batch = self.batch()
            if self.meshes.world is not None:
                dist.barrier()
            begin = time.perf_counter()
            self._call(callbacks, "on_train_batch_start", batch, 0)
            record = module.train_step(batch, self.optimizer)
            self._call(callbacks, "on_train_batch_end", None, batch, 0)
            if monitored:
                self.own_seconds.append(record.monitor_seconds)
            seconds.append(time.perf_counter() - begin)
        for callback in callbacks[:2]:
            callback.on_exception(self.trainer, module, RuntimeError())  # leaves the model alone
        return seconds

    def _call(self, callbacks: list[Any], hook: str, *args: Any) -> None:
        for callback in callbacks:
            getattr(callback, hook)(self.trainer, self.module, *args)

    def batch(self) -> dict[str, Tensor]:
        """This rank's share of a step."""
        shape = (self.config.global_batch_size // self.meshes.layout.dp, 128)
        tokens = torch.randint(self.config.vocab_size, shape)
        return {
            "tokens": tokens,
            "labels": tokens,
            "positions": torch.arange(shape[1]).repeat(shape[0], 1),
            "documents": torch.zeros(shape, dtype=torch.int32),
        }


def _tensorboard(folder: Path) -> list[Any]:
    """The logger that runs have by default, if it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return []

    class Logger:
        def __init__(self) -> None:
            self.writer = SummaryWriter(str(folder / "logs"))

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    return [Logger()]


if __name__ == "__main__":
    guarded(main)
