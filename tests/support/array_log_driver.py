"""A process that appends records until it is killed: its argument names the file."""

import sys
from pathlib import Path

import numpy as np

from deepseek.monitoring.array_log import ArrayLog, read_arrays


def content(step: int) -> np.ndarray:
    """What the record of a step must hold, float32 [300, 7]: incompressible, so writes are long."""
    return np.random.default_rng(step).standard_normal((300, 7), np.float32)


def main() -> None:
    path = Path(sys.argv[1])
    log = ArrayLog(path)
    done = max((record.step for record in read_arrays(path, ())), default=0)
    step = max(0, done - 2)  # as a run that goes on from a checkpoint: it repeats steps
    while True:
        step += 1
        log.append(step, {"values": content(step)}, attempt=done)
        print(step, flush=True)


if __name__ == "__main__":
    main()
