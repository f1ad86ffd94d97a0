"""Which attempt it is, agreed on over a store that remembers the dead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from deepseek.launch import attempt
from deepseek.launch.attempt import agreed_attempt


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_PAUSE_SECONDS", 0.005)


def meet(store: dist.Store, ranks: list[int], world: int, seconds: float = 20) -> list[int]:
    """These ranks of an attempt; each starts after the one before it has left its mark."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        among = [
            pool.submit(agreed_attempt, store, rank, world, timedelta(seconds=seconds))
            for rank in ranks
        ]
        return [future.result() for future in among]


def test_each_attempt_has_a_number_of_its_own() -> None:
    """Whoever comes first, and whatever stands in the store of attempts that nobody ended."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    assert meet(store, [0, 1, 2], 3) == [0, 0, 0]
    assert meet(store, [2, 1, 0], 3) == [1, 1, 1]
    with pytest.raises(RuntimeError, match="timed out waiting 100ms"):
        meet(store, [0, 2], 3, seconds=0.1)  # rank 1 dies before it comes
    assert meet(store, [1, 0, 2], 3) == [3, 3, 3]
    assert meet(dist.HashStore(), [0], 1) == [0]
