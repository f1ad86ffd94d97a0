"""A loader that knows how long its batches were waited for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepseek.data import timed
from deepseek.data.timed import TimedLoader
from deepseek.frameworks import LightningModule, Trainer
from support.fake_clock import FakeClock

WAITS = (0.0, 8.0, 0.0, 4.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(timed, "time", fake)
    return fake


class Slow:
    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return len(WAITS)

    def __iter__(self) -> Iterator[int]:
        for index, wait in enumerate(WAITS):
            self.clock.now += wait
            yield index


def test_the_wait_for_each_batch(clock: FakeClock) -> None:
    loader = TimedLoader(Slow(clock))
    assert len(loader) == 4
    assert [(batch, loader.seconds) for batch in loader] == list(enumerate(WAITS))


class Module(LightningModule):
    """Notes how long the batch that it gets was waited for."""

    def __init__(self, loader: TimedLoader, clock: FakeClock) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loader, self.clock = loader, clock
        self.seconds: list[float] = []

    def train_dataloader(self) -> Any:
        return self.loader

    def training_step(self, batch: Any, index: int) -> None:
        self.seconds.append(self.loader.seconds)
        self.clock.now += 1  # the step itself is no wait

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)


def test_in_a_trainer_the_wait_is_that_of_the_batch_at_hand(clock: FakeClock) -> None:
    """It must not fetch ahead: the wait would be put down to the wrong step."""
    module = Module(TimedLoader(Slow(clock)), clock)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    assert module.seconds == list(WAITS)
