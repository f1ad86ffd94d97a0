"""Which samples a rank reads in which step, and the loaders that read them.

Step ``s`` of ``G`` samples takes global samples ``s * G`` to ``(s + 1) * G - 1``; of these rank
``r`` of ``R`` takes the ``r``-th of ``R`` equal parts. Ranks are plain integers. Nothing is counted
while reading: the step decides, so a run goes on from any step with any number of ranks and
workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.data.blend import BlendedDataset
from deepseek.data.dataset import ChatDataset, PackedDataset, Sample

Batch = dict[str, torch.Tensor]
Packed = PackedDataset | ChatDataset | BlendedDataset


class StepBatches(Sampler[list[int]]):
    """For each step from ``start_step`` on, the sample numbers of one data-parallel rank.

    Raises:
        UserError: the samples of a step cannot be divided equally.
    """

    def __init__(
        self,
        global_batch_size: int,
        max_steps: int,
        *,
        start_step: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        if global_batch_size % dp_size:
            nearest = max(dp_size, round(global_batch_size / dp_size) * dp_size)
            raise UserError(
                f"model.global_batch_size={global_batch_size} cannot be divided over {dp_size} "
                f"data-parallel ranks; use {nearest}"
            )
        self.global_batch_size = global_batch_size
        self.start_step, self.max_steps = start_step, max_steps
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch_size // self.dp_size
        for step in range(self.start_step, self.max_steps):
            first = step * self.global_batch_size + self.dp_rank * share
            yield list(range(first, first + share))

    def __len__(self) -> int:
        """Steps from ``start_step`` on. A loader without a length would make Lightning read one
        batch ahead, and lose it when it resumes."""
        return max(0, self.max_steps - self.start_step)


def build_train_loader(
    dataset: Packed,
    cfg: ModelConfig,
    *,
    max_steps: int,
    start_step: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> DataLoader[Sample]:
    """A loader whose items are one optimiser step for this rank.

    Args:
        dataset: endless.
        cfg: batch size, workers.
        max_steps: steps of the whole run.
        start_step: steps that are done.
        dp_rank: number of this rank among those with batches of their own.
        dp_size: how many these are.

    Returns:
        An item is a dictionary of tensors [global_batch_size / dp_size, S]: ``tokens``, ``labels``,
        ``positions`` (int64) and ``documents`` (int32), see ``PackedDataset``.
    """
    batches = StepBatches(
        cfg.global_batch_size,
        max_steps,
        start_step=start_step,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    # Made here, the index of the epoch is shared by the forked workers instead of made in each.
    dataset[start_step * cfg.global_batch_size]
    return _loader(dataset, batches, cfg.data.num_workers)


def build_validation_loader(
    dataset: Packed,
    cfg: ModelConfig,
    *,
    limit_batches: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> DataLoader[Sample]:
    """A loader over a validation set, the same samples in every pass and for any number of ranks.

    If the batches cannot hold all samples, those taken are spread evenly over the set; if they can,
    rows after its end are padding (labels -100, documents -1).

    Args:
        dataset: not endless.
        cfg: batch sizes, workers.
        limit_batches: global batches that the ranks read together.
        dp_rank: number of this rank among those with batches of their own.
        dp_size: how many these are.

    Returns:
        An item is one micro-batch of this rank, tensors [micro_batch_size, S]; every rank gets as
        many.
    """
    step = cfg.micro_batch_size * dp_size
    count = -(-min(limit_batches * cfg.global_batch_size, len(dataset)) // step)
    # Consecutive samples would come from a few documents only.
    spread = max(len(dataset), count * step)
    batches = [
        [place * spread // (count * step) for place in places]
        for places in StepBatches(step, count, dp_rank=dp_rank, dp_size=dp_size)
    ]
    return _loader(dataset, batches, cfg.data.num_workers)


class TimedLoader:
    """Iterates over another loader.

    Attributes:
        seconds: that the last batch was waited for.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.seconds = time.perf_counter() - begin
            yield batch


def stack(samples: Sequence[Sample]) -> Batch:
    """Samples of arrays [S] to tensors [B, S]."""
    return {
        key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]
    }


def _loader(
    dataset: Any, batches: StepBatches | list[list[int]], workers: int
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=stack,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=leave_the_terminal if workers else None,
        # Its own, so that making an iterator leaves the random state of the run as it is.
        generator=torch.Generator().manual_seed(0),
    )


def leave_the_terminal(worker: int) -> None:
    """Give a loader process a session of its own.

    Ctrl-C, and a SIGTERM to the whole group as schedulers send it, then reach the trainer alone,
    which saves before it ends; a worker that died first would take the step down with it.
    """
    os.setsid()
