"""How much faster data are read than a training step takes them, with V3's vocabulary.

    OMP_NUM_THREADS=1 python benchmarks/reading.py

Random ids in random documents are written as a ``.bin`` and ``.idx`` into a temporary folder, and
read as a run reads them, a sample of 4,096 ids from a random place, by the process that trains.
They are documents of one sequence, and once more isolated from each other. Beside it a small model
with as many ids takes its steps, which a larger one would take longer for: ``times_faster`` is the
least that reading is ahead of it. Seconds are CPU time of one thread, medians.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import SMALL, Case
from sides import our_step

from deepseek.commands.entry import guarded
from deepseek.data.dataset import PackedDataset
from deepseek.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from deepseek.data.loader import build_train_loader
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.planner.cpu import machine_name

LENGTH, DOCUMENTS, MEAN = 4096, 8192, 1024
READS, STEPS = 200, 3
MODEL = replace(SMALL, vocab_size=129_280, micro_batch_size=1, global_batch_size=1)


def main() -> None:
    """Print one JSON object."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "ids"
        write(prefix)
        reads = {
            name: reading(IndexedDataset(prefix), isolated)
            for name, isolated in (("one_sequence", False), ("isolated", True))
        }
    step = our_step(Case("", MODEL, 1, LENGTH))
    step()
    took = statistics.median(seconds(step) for _ in range(STEPS))
    result: dict[str, Any] = {"machine": machine_name(), "step_ms": round(1e3 * took, 1)}
    for name, read in reads.items():
        result[name] = {
            "read_ms": round(1e3 * read, 3),
            "tokens_per_second": round(LENGTH / read),
            "times_faster": round(took / read),
        }
    print(json.dumps(result, indent=1))


def write(prefix: Path) -> None:
    """Documents of ids."""
    chance = np.random.default_rng(0)
    with IndexedWriter(prefix, dtype_for(MODEL.vocab_size)) as writer:
        for length in chance.exponential(MEAN, DOCUMENTS).astype(int) + 2:
            writer.add_document(chance.integers(MODEL.vocab_size, size=length))


def reading(indexed: IndexedDataset, isolated: bool) -> float:
    """Seconds of a batch."""
    documents = np.arange(len(indexed))
    dataset = PackedDataset(
        indexed, documents, seq_length=LENGTH, isolate_documents=isolated, endless=True
    )
    batches = iter(build_train_loader(dataset, MODEL, max_steps=READS + 1))
    next(batches)
    return statistics.median(seconds(lambda: next(batches)) for _ in range(READS))


def seconds(call: Callable[[], Any]) -> float:
    """Of this thread."""
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


if __name__ == "__main__":
    guarded(main)
