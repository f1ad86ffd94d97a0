"""The order of training: every stretch once, in an order that mixes the documents."""

from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deepseek.data.dataset import PackedDataset
from deepseek.data.indexed import IndexedDataset, IndexedWriter
from deepseek.data.shuffle import permuted

FROZEN = [8, 0, 4, 9, 3, 5, 6, 7, 1, 2]


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 5))
def test_it_is_a_permutation(size: int, seed: int, group: int) -> None:
    assert sorted(permuted(i, size, seed, group) for i in range(size)) == list(range(size))


def test_the_key_decides() -> None:
    def order(*key: int) -> list[int]:
        return [permuted(i, 1000, *key) for i in range(1000)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1)
    # no place keeps near its own: the mean distance of a random order is a third of the size
    distance = np.abs(np.array(order(1, 0)) - np.arange(1000)).mean()
    assert 280 < distance < 390


def test_the_order_is_frozen() -> None:
    """A change here breaks the exact resumption of every run."""
    assert [permuted(i, 10, 1234, 0, 2) for i in range(10)] == FROZEN


def test_large_data_needs_no_table() -> None:
    size = 10**12
    places = {permuted(i, size, 7) for i in range(500)}
    assert len(places) == 500 and max(places) < size and max(places) > size // 2


def test_a_pass_has_every_stretch_once_and_mixes_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "p", np.dtype("<u2")) as writer:
        for document in range(10):
            writer.add_document([document] * 400)
    data = PackedDataset(IndexedDataset(tmp_path / "p"), np.arange(10), seq_length=20, seed=3)
    for group in range(3):
        numbers = range(group * len(data), (group + 1) * len(data))
        shown = Counter(bytes(data[i]["tokens"]) for i in numbers)
        there = Counter(bytes(data.stretch(i)["tokens"]) for i in numbers)
        assert shown == there
    batches = [
        {int(data[i]["tokens"][0]) for i in range(first, first + 8)} for first in range(0, 160, 8)
    ]
    assert np.mean([len(batch) for batch in batches]) > 4  # eight neighbours would show one or two
