"""Which samples a rank reads in which step, and the loaders that read them.

Step ``s`` of ``G`` samples takes global samples ``s * G`` to ``(s + 1) * G - 1``, or where batches
grow those after the steps before; of these rank ``r`` of ``R`` takes the ``r``-th of ``R`` equal
parts. Ranks are plain integers. Nothing is counted while reading: the step decides, so a run goes
on from any step with any number of ranks and workers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from deepseek.config.batch_ramp import batch_size, consumed_samples
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.console import complain
from deepseek.data.blend import BlendedDataset
from deepseek.data.dataset import ChatDataset, PackedDataset, Sample

Batch = dict[str, torch.Tensor]
Packed = PackedDataset | ChatDataset | BlendedDataset


class StepBatches(Sampler[list[int]]):
    """For each step from ``start_step`` on, the sample numbers of one data-parallel rank.

    Args:
        ramp: ``model.rampup_batch_size``.

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
        ramp: Sequence[int] | None = None,
    ) -> None:
        if global_batch_size % dp_size:
            nearest = max(dp_size, round(global_batch_size / dp_size) * dp_size)
            raise UserError(
                f"model.global_batch_size={global_batch_size} cannot be divided over {dp_size} "
                f"data-parallel ranks; use {nearest}"
            )
        self.global_batch_size = global_batch_size
        self.start_step, self.max_steps = start_step, max_steps
        self.dp_rank, self.dp_size, self.ramp = dp_rank, dp_size, ramp

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            share = batch_size(step, self.global_batch_size, self.ramp) // self.dp_size
            first = consumed_samples(step, self.global_batch_size, self.ramp) + self.dp_rank * share
            yield list(range(first, first + share))

    def after(self, done: int) -> StepBatches:
        """The same without so many steps more."""
        return StepBatches(
            self.global_batch_size,
            self.max_steps,
            start_step=self.start_step + done,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            ramp=self.ramp,
        )

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
) -> DataLoader[Sample] | SteadyLoader:
    """A loader whose items are one optimiser step for this rank.

    Args:
        dataset: endless.
        cfg: batch size, workers.
        max_steps: steps of the whole run.
        start_step: steps that are done.
        dp_rank: number of this rank among those with batches of their own.
        dp_size: how many these are.

    Returns:
        An item is a dictionary of tensors [B, S], B the rank's part of the step's global batch:
        ``tokens``, ``labels``, ``positions`` (int64), ``documents`` (int32), see ``PackedDataset``.
    """
    batches = StepBatches(
        cfg.global_batch_size,
        max_steps,
        start_step=start_step,
        dp_rank=dp_rank,
        dp_size=dp_size,
        ramp=cfg.rampup_batch_size,
    )
    # Made here, the index of the epoch is shared by the forked workers instead of made in each.
    dataset[consumed_samples(start_step, cfg.global_batch_size, cfg.rampup_batch_size)]
    return _loader(dataset, batches, cfg.data.num_workers)


def build_validation_loader(
    dataset: Packed,
    cfg: ModelConfig,
    *,
    limit_batches: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> DataLoader[Sample] | SteadyLoader:
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


MOST_DEATHS = 3
"""Of its processes, without a batch between them, before a loader gives up."""


class SteadyLoader:
    """Iterates over a loader whose processes begin anew if one dies, as where memory runs out.

    Nothing is read twice or left out, since the number of a batch decides what is in it.

    Args:
        make: gives the loader of the batches after so many.
    """

    def __init__(self, make: Callable[[int], DataLoader[Sample]]) -> None:
        self._make = make
        self._loader = make(0)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        done = deaths = 0
        loader, batches = self._loader, None
        while True:
            try:
                batches = _begun(loader) if batches is None else batches
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error) or deaths == MOST_DEATHS:
                    raise
                deaths += 1
                complain(
                    f"a process that loads data died ({error}); it begins anew, and nothing is "
                    "lost. Mostly memory ran out: watch it, or lower model.data.num_workers"
                )
                loader, batches = self._make(done), None
                self._loader = self._make(0) if done else loader  # of the next pass
                continue
            deaths, done = 0, done + 1
            yield batch


def _begun(loader: DataLoader[Sample]) -> Iterator[Any]:
    """Its iterator. torch would raise the death of a process from a signal handler, in whatever the
    main thread is doing, such as saving; without the handler the wait for the batch tells it."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    return batches


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
) -> DataLoader[Sample] | SteadyLoader:
    def make(done: int) -> DataLoader[Sample]:
        rest = batches[done:] if isinstance(batches, list) else batches.after(done)
        return _plain_loader(dataset, rest, workers)

    return SteadyLoader(make) if workers else make(0)


def _plain_loader(
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
