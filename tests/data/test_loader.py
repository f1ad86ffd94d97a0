"""Loaders: the step decides what is read, whatever ranks, workers and history."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config import changed
from deepseek.config.batch_ramp import batch_size, consumed_samples
from deepseek.config.errors import UserError
from deepseek.config.schema import DataConfig, ModelConfig
from deepseek.data import loader as loader_module
from deepseek.data.blend import Blend, BlendedDataset
from deepseek.data.dataset import PackedDataset
from deepseek.data.indexed import IndexedDataset
from deepseek.data.loader import (
    MOST_DEATHS,
    Batch,
    SteadyLoader,
    StepBatches,
    TimedLoader,
    _loader,
    build_train_loader,
    build_validation_loader,
)
from deepseek.frameworks import LightningModule, Trainer
from support.fake_clock import FakeClock

Write = Callable[..., IndexedDataset]


@pytest.fixture
def cfg() -> ModelConfig:
    return ModelConfig(global_batch_size=8, micro_batch_size=2, data=DataConfig(seq_length=16))


@pytest.fixture
def data(write: Write) -> BlendedDataset:
    rng = np.random.default_rng(0)
    packed = []
    for k in range(2):
        indexed = write([rng.integers(0, 999, n) for n in rng.integers(5, 60, 30)], f"d{k}")
        packed.append(
            PackedDataset(indexed, np.arange(30), seq_length=16, seed=k, isolate_documents=True)
        )
    return BlendedDataset(packed, Blend([0.6, 0.4]))


@pytest.fixture
def validation(write: Write) -> PackedDataset:
    documents = [list(range(200 * k, 200 * k + 200)) for k in range(5)]
    return PackedDataset(
        write(documents, "validation"), np.arange(5), seq_length=16, endless=False, pad_id=7
    )


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def joined(parts: list[Batch]) -> Batch:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def test_steps_take_consecutive_samples_and_ranks_equal_parts() -> None:
    whole = list(StepBatches(6, 4))
    assert whole == [list(range(6 * s, 6 * s + 6)) for s in range(4)]
    for size in (1, 2, 3, 6):
        ranks = [list(StepBatches(6, 4, dp_rank=r, dp_size=size)) for r in range(size)]
        for step, expected in enumerate(whole):
            assert sum((rank[step] for rank in ranks), []) == expected
    late = StepBatches(6, 4, start_step=3)
    assert list(late) == whole[3:]
    assert (len(StepBatches(6, 4)), len(late)) == (4, 1)
    assert len(StepBatches(6, 4, start_step=9)) == 0


def test_a_batch_that_grows_takes_consecutive_samples_too() -> None:
    """[2, 2, 12] to 6: the batch is 2 till 6 samples are consumed, 4 till 12, then 6."""
    ramp = [2, 2, 12]
    whole = list(StepBatches(6, 7, ramp=ramp))
    assert [len(step) for step in whole] == [2, 2, 2, 4, 4, 6, 6]
    assert sum(whole, []) == list(range(26))
    for step in range(8):  # from any step at the very sample
        assert consumed_samples(step, 6, ramp) == sum(map(len, whole[:step]))
        assert list(StepBatches(6, 7, ramp=ramp, start_step=2).after(step)) == whole[2 + step :]
    halves = [list(StepBatches(6, 7, ramp=ramp, dp_rank=rank, dp_size=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


@given(
    start=st.integers(1, 9), increment=st.integers(1, 9), count=st.integers(1, 9),
    samples=st.integers(1, 500), step=st.integers(0, 200),
)  # fmt: skip
def test_a_batch_grows_as_megatrons(
    start: int, increment: int, count: int, samples: int, step: int
) -> None:
    """Its rule, step by step: an increment for each whole part of the samples that is consumed."""
    whole, consumed = start + count * increment, 0
    for done in range(step + 1):
        size = min(whole, start + consumed * count // samples * increment)
        ramp = start, increment, samples
        assert (batch_size(done, whole, ramp), consumed_samples(done, whole, ramp)) == (
            size,
            consumed,
        )
        consumed += size


def test_a_batch_that_cannot_be_divided() -> None:
    message = r"global_batch_size=10 cannot be divided over 4 data-parallel ranks; use (8|12)"
    with pytest.raises(UserError, match=message):
        StepBatches(10, 5, dp_size=4)
    with pytest.raises(UserError, match=r"over 4 data-parallel ranks; use 4"):
        StepBatches(1, 5, dp_size=4)


def test_a_step_is_stacked(data: BlendedDataset, cfg: ModelConfig) -> None:
    loader = build_train_loader(data, cfg, max_steps=3)
    assert len(loader) == 3
    batches = list(loader)
    assert len(batches) == 3
    for step, batch in enumerate(batches):
        assert list(batch) == ["tokens", "labels", "positions", "documents"]
        for row in range(8):
            sample = data[8 * step + row]
            for key, values in sample.items():
                assert batch[key].shape == (8, 16)
                assert np.array_equal(batch[key][row].numpy(), values)
                assert batch[key].numpy().dtype == values.dtype


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_read_what_one_reads(
    data: BlendedDataset, cfg: ModelConfig, size: int
) -> None:
    whole = list(build_train_loader(data, cfg, max_steps=4))
    ranks = [
        list(build_train_loader(data, cfg, max_steps=4, dp_rank=r, dp_size=size))
        for r in range(size)
    ]
    for step, expected in enumerate(whole):
        assert same(joined([rank[step] for rank in ranks]), expected)


def test_workers_change_nothing(
    data: BlendedDataset, validation: PackedDataset, cfg: ModelConfig
) -> None:
    alone = list(build_train_loader(data, cfg, max_steps=6))
    checked = list(build_validation_loader(validation, cfg, limit_batches=3))
    cfg = changed(cfg, {"data.num_workers": 2})
    for expected, loader in (
        (alone, build_train_loader(data, cfg, max_steps=6)),
        (alone[2:], build_train_loader(data, cfg, max_steps=6, start_step=2)),
        (checked, build_validation_loader(validation, cfg, limit_batches=3)),
    ):
        found = list(loader)
        assert len(found) == len(expected)
        assert all(map(same, found, expected))


@pytest.mark.parametrize("train", [True, False])
def test_a_worker_that_dies_is_replaced(
    data: BlendedDataset,
    validation: PackedDataset,
    cfg: ModelConfig,
    capsys: pytest.CaptureFixture[str],
    train: bool,
) -> None:
    def loader(cfg: ModelConfig) -> Any:
        if train:
            return build_train_loader(data, cfg, max_steps=9, start_step=2)
        return build_validation_loader(validation, cfg, limit_batches=3)

    expected = list(loader(cfg))
    handler = signal.getsignal(signal.SIGCHLD)
    steady, found = loader(changed(cfg, {"data.num_workers": 1})), []
    for batch in steady:
        found.append(batch)
        if len(found) == 2:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join()  # no signal handler strikes here
    assert len(found) == len(expected) and all(map(same, found, expected))
    assert capsys.readouterr().err.count("a process that loads data died") == 1
    again = [] if train else list(steady)
    assert all(map(same, again, expected)) and signal.getsignal(signal.SIGCHLD) is handler


def test_a_loader_whose_workers_die_again_and_again_gives_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Deadly:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[Any]:
            raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

    made: list[int] = []
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(SteadyLoader(lambda done: made.append(done) or Deadly()))  # type: ignore[func-returns-value]
    assert made == [0] * (1 + MOST_DEATHS)
    assert capsys.readouterr().err.count("begins anew") == MOST_DEATHS


def test_a_run_goes_on_from_any_step(data: BlendedDataset, cfg: ModelConfig) -> None:
    whole = list(build_train_loader(data, cfg, max_steps=40))
    rest = build_train_loader(data, cfg, max_steps=40, start_step=33)
    assert len(rest) == 7
    assert all(map(same, rest, whole[33:]))
    assert sum(1 for _ in rest) == 7


def test_reading_takes_a_small_part_of_a_step(write: Write) -> None:
    """4,096 tokens of V3's vocabulary: less than a fiftieth of what the head alone would take in a
    model 64 wide, forward and backward, in CPU time."""
    vocabulary, length, some = 129_280, 4096, 64
    ids = np.random.default_rng(0).integers(0, vocabulary, (40, 2000))
    packed = PackedDataset(write(list(ids), dtype="int32"), np.arange(40), seq_length=length)
    cfg = ModelConfig(
        vocab_size=vocabulary,
        global_batch_size=1,
        micro_batch_size=1,
        data=DataConfig(seq_length=length),
    )
    batches = iter(build_train_loader(packed, cfg, max_steps=21))
    next(batches)
    begin = time.process_time()
    read = sum(1 for _ in batches)
    reading = (time.process_time() - begin) / read
    hidden_TD, weight_VD = torch.ones(some, 64), torch.ones(vocabulary, 64)
    begin = time.process_time()
    hidden_TD @ weight_VD.t()
    step = 3 * length / some * (time.process_time() - begin)
    assert read == 20 and 50 * reading < step, (reading, step)


def test_reading_leaves_the_random_state_alone(data: BlendedDataset, cfg: ModelConfig) -> None:
    before = torch.get_rng_state()
    list(build_train_loader(data, cfg, max_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_is_the_same_in_every_pass(validation: PackedDataset, cfg: ModelConfig) -> None:
    loader = build_validation_loader(validation, cfg, limit_batches=4)
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 4 * cfg.global_batch_size // cfg.micro_batch_size
    assert all(map(same, first, second))
    assert all(batch["tokens"].shape == (2, 16) for batch in first)


@pytest.mark.parametrize(("size", "micro"), [(2, 2), (3, 1), (6, 2), (4, 3)])
def test_validation_is_the_same_for_any_number_of_ranks(
    validation: PackedDataset, cfg: ModelConfig, size: int, micro: int
) -> None:
    cfg = replace(cfg, global_batch_size=24)
    alone = joined(list(build_validation_loader(validation, cfg, limit_batches=1)))
    cfg = replace(cfg, micro_batch_size=micro)
    ranks = [
        list(build_validation_loader(validation, cfg, limit_batches=1, dp_rank=r, dp_size=size))
        for r in range(size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    rows = joined([batch for rank in ranks for batch in rank])["tokens"].tolist()
    assert sorted(rows) == sorted(alone["tokens"].tolist())


def test_a_few_validation_samples_are_spread_over_the_set(
    validation: PackedDataset, cfg: ModelConfig
) -> None:
    rows = joined(list(build_validation_loader(validation, cfg, limit_batches=2)))["tokens"]
    assert {int(row[0]) // 200 for row in rows} == set(range(5))
    assert len({int(row[0]) for row in rows}) == 16


@pytest.mark.parametrize("size", [1, 3])
def test_all_of_validation_is_read_once(
    validation: PackedDataset, cfg: ModelConfig, size: int
) -> None:
    assert len(validation) == 63
    ranks = [
        list(build_validation_loader(validation, cfg, limit_batches=99, dp_rank=r, dp_size=size))
        for r in range(size)
    ]
    steps = -(-63 // (2 * size))
    assert [len(rank) for rank in ranks] == [steps] * size
    rows = joined([ranks[r][s] for s in range(steps) for r in range(size)])
    assert rows["labels"][rows["labels"] >= 0].tolist() == list(range(1, 1000))
    padding = rows["documents"] == -1
    assert int(padding.sum()) == steps * 2 * size * 16 - 1000
    assert set(rows["tokens"][padding].tolist()) == {7}
    assert set(rows["labels"][padding].tolist()) == {-100}


class SessionOfReader(torch.utils.data.Dataset[dict[str, np.ndarray]]):
    """Says in which session it is read."""

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        return {"session": np.array([os.getsid(0)])}


def test_a_signal_to_the_group_does_not_reach_the_workers() -> None:
    (batch,) = _loader(SessionOfReader(), [[0]], 1)
    assert batch["session"].item() != os.getsid(0)
    (batch,) = _loader(SessionOfReader(), [[0]], 0)
    assert batch["session"].item() == os.getsid(0)


# -- how long batches are waited for --

WAITS = (0.0, 8.0, 0.0, 4.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(loader_module, "time", fake)
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
