"""Runs of a model small enough that starting one takes longer than training it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch

from deepseek.checkpoint.checkpoint import newest_sound
from deepseek.config.yaml_file import dump_yaml
from deepseek.data.prepare import prepare
from support.forked import Forked, Ran, Started
from support.log_rows import latest_rows

CONFIG: dict[str, Any] = {
    "name": "micro",
    "trainer": {
        "max_steps": 12,
        "val_check_interval": 4,
        "limit_val_batches": 1,
        "accelerator": "cpu",
        "num_threads": 1,
    },
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.05,
        "max_position_embeddings": 256,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "tokenizer": {"vocab_size": 300},
        "data": {"seq_length": 32},
        "optim": {"lr": 3e-3},
    },
    "exp_manager": {
        "create_tensorboard_logger": False,
        "monitor": {"peak_tflops": 0.1},  # not measured: that takes a third of such a run
        "checkpoint_callback_params": {"every_n_train_steps": 4},
    },
}

MEASURED = re.compile(r"seconds$|^time$|per_second$|^mfu$|^memory")
"""Keys of the log that differ from run to run."""
OF_THE_LAYOUT = {"rank_load_max_over_mean", "router_margin"}
"""Keys that differ from layout to layout: experts lie elsewhere, other tokens are the sample."""


class MicroRuns:
    """Runs of ``CONFIG`` in one folder, each in a forked process."""

    def __init__(self, folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents()))
        prepare([text], folder / "data", vocab_size=300)
        self.config = folder / "micro.yaml"
        self.config.write_text(dump_yaml(CONFIG))
        self.cli = Forked(folder, **environment)

    def make(self, name: str) -> str:
        """The run of this name, uninterrupted and with no settings; it is trained once."""
        if not (self.folder / name).exists():
            self.train(name).assert_done()
        return name

    def train(self, name: str, *settings: str, before: str = "") -> Ran:
        """Train in the run folder ``name`` until it ends."""
        return self.start(name, *settings, before=before).wait()

    def start(self, name: str | None, *settings: str, before: str = "") -> Started:
        """Train in the background."""
        return self.cli.start(*self.words(name, *settings), before=before)

    def words(self, name: str | None, *settings: str, config: object = None) -> list[object]:
        """The command line after ``deepseek``. Without a name it chooses the folder itself."""
        data = f"model.data.data_prefix={self.folder / 'data'}"
        folder = [] if name is None else ["--run-dir", name]
        return ["train", "--config", config or self.config, *folder, data, *settings]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The log without events and what is measured of the machine."""
        rows = latest_rows(self.folder / name / "metrics.jsonl")
        return [
            {key: value for key, value in row.items() if not MEASURED.search(key)}
            for row in rows
            if "event" not in row
        ]

    def steps(self, name: str) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(int(p.name[5:]) for p in (self.folder / name / "checkpoints").glob("step_*"))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Every tensor of the newest checkpoint, which must be sound."""
        reports: list[str] = []
        checkpoint = newest_sound(self.folder / name / "checkpoints", reports.append)
        assert checkpoint is not None and not reports
        dtypes = checkpoint.tensor_dtypes()
        shapes = checkpoint.tensor_shapes().items()
        tensors = {key: torch.empty(shape, dtype=dtypes[key]) for key, shape in shapes}
        checkpoint.load(tensors)
        return tensors

    def differences(self, one: str, other: str) -> list[str]:
        """What is not bitwise equal between two runs: tensors of the newest checkpoint, rows."""
        a, b = self.tensors(one), self.tensors(other)
        wrong = sorted(a.keys() ^ b.keys())
        wrong += [key for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]
        rows_a, rows_b = by_step(self.rows(one)), by_step(self.rows(other))
        keys = sorted(rows_a.keys() | rows_b.keys())
        return wrong + [str(key) for key in keys if rows_a.get(key) != rows_b.get(key)]


def by_step(rows: list[dict[str, Any]]) -> dict[tuple[int, str], dict[str, Any]]:
    """Rows by step and kind."""
    return {(row["step"], "val" if "val_loss" in row else "train"): row for row in rows}


def documents(count: int = 80) -> list[str]:
    """Documents of very different lengths from sixty words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 6))) for _ in range(60)]
    return [" ".join(chance.choices(words, k=chance.randint(5, 120))) for _ in range(count)]
