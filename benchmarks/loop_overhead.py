"""What a run costs beside its steps, at tiny size: Lightning, callbacks, and reading the data.

    OMP_NUM_THREADS=1 python benchmarks/loop_overhead.py [STEPS] [--config deepseek_v3_tiny]

``deepseek train --config shakespeare_char``, or another configuration that needs no data, with all
that a run records, in a temporary folder, and without validations. Every step is timed from inside;
between two steps lie the loader, Lightning and the callbacks. Seconds are CPU time of the training
thread, so that what else runs here counts little; medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import whole as at_least_one

from deepseek.commands.entry import guarded
from deepseek.commands.fit import fit
from deepseek.config import load_config
from deepseek.config.errors import UserError
from deepseek.data.loader import TimedLoader
from deepseek.launch.processes import Processes
from deepseek.training.step import DeepSeekModel

SKIPPED = 10
"""Steps at the start, which are slow for other reasons."""


def main(arguments: list[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="?", type=at_least_one, default=100)
    parser.add_argument("--config", default="shakespeare_char")
    asked = parser.parse_args(arguments)
    steps = SKIPPED + asked.steps + 1  # between two steps lies one gap
    changes = [f"trainer.max_steps={steps}", "trainer.val_check_interval=0"]
    changes += ["trainer.precision=32", "model.optim.sched.warmup_steps=2"]
    try:
        run = load_config(asked.config, changes)
    except UserError as error:
        parser.error(str(error))
    times: list[tuple[float, float]] = []
    reads: list[float] = []
    train_step, batches = DeepSeekModel.train_step, TimedLoader.__iter__

    def timed_step(module: DeepSeekModel, *args: Any) -> Any:
        begin = time.thread_time()
        record = train_step(module, *args)
        times.append((begin, time.thread_time()))
        return record

    def timed_batches(loader: TimedLoader) -> Iterator[Any]:
        source = batches(loader)
        while True:
            begin = time.thread_time()
            batch = next(source, None)
            if batch is None:
                return
            reads.append(time.thread_time() - begin)
            yield batch

    DeepSeekModel.train_step = timed_step  # type: ignore[method-assign]
    TimedLoader.__iter__ = timed_batches  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        fit(run, Path(folder) / "run", Processes.from_environment())
    step = statistics.median(end - begin for begin, end in times[SKIPPED:])
    gaps = [after[0] - before[1] for before, after in zip(times, times[1:], strict=False)]
    gap, reading = (statistics.median(found[SKIPPED:]) for found in (gaps, reads))
    result = {
        "steps": asked.steps,
        "step_ms": round(1e3 * step, 2),
        "between_ms": round(1e3 * gap, 2),
        "reading_ms": round(1e3 * reading, 2),
        "reading_share": round(reading / step, 4),
        "trainer_and_callbacks_share": round((gap - reading) / step, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    guarded(main)
