"""A loader that knows how long its batches were waited for."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from deepseek.data.timed import TimedLoader
from deepseek.frameworks import LightningModule, Trainer

WAITS = (0.0, 0.08, 0.0, 0.04)


class Slow:
    def __len__(self) -> int:
        return len(WAITS)

    def __iter__(self) -> Iterator[int]:
        for index, wait in enumerate(WAITS):
            time.sleep(wait)
            yield index


def fits(seconds: list[float]) -> bool:
    return all(wait <= s < wait + 0.035 for wait, s in zip(WAITS, seconds, strict=True))


def test_the_wait_for_each_batch() -> None:
    for attempt in range(3):  # a busy machine may sleep longer
        loader = TimedLoader(Slow())
        assert len(loader) == 4
        found = [(batch, loader.seconds) for batch in loader]
        assert [batch for batch, _ in found] == [0, 1, 2, 3]
        if fits([seconds for _, seconds in found]) or attempt == 2:
            break
    assert fits([seconds for _, seconds in found])


class Module(LightningModule):
    """Notes how long the batch that it gets was waited for."""

    def __init__(self, loader: TimedLoader) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loader = loader
        self.seconds: list[float] = []

    def train_dataloader(self) -> Any:
        return self.loader

    def training_step(self, batch: Any, index: int) -> None:
        self.seconds.append(self.loader.seconds)
        time.sleep(0.01)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)


def test_in_a_trainer_the_wait_is_that_of_the_batch_at_hand() -> None:
    """It must not fetch ahead: the wait would be put down to the wrong step."""
    for attempt in range(3):
        module = Module(TimedLoader(Slow()))
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module)
        if fits(module.seconds) or attempt == 2:
            break
    assert fits(module.seconds)
