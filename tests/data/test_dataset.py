"""Packing: sample i is a pure function of (data, seed, i); nothing is lost, leaked or doubled."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config.errors import UserError
from deepseek.data.dataset import IGNORE_INDEX, PackedDataset, Sample, permuted, split_documents
from deepseek.data.indexed import IndexedDataset, IndexedWriter
from deepseek.data.tokenizer import FimIds

FIM = FimIds(begin=901, hole=902, end=903)
EOS = 900
Write = Callable[..., IndexedDataset]


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which every id occurs once in the whole data."""
    ends = np.cumsum([0, *lengths])
    return [list(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def equal(a: Sample, b: Sample) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def stream(data: PackedDataset, stretches: int) -> list[int]:
    """The ids that the first stretches show, borders counted once."""
    found: list[int] = []
    for i in range(stretches):
        found += data.stretch(i)["tokens"].tolist()
    return found


def epochs(data: PackedDataset, count: int) -> list[list[int]]:
    """The ids of the first epochs."""
    size = data.num_tokens
    found = stream(data, math.ceil(count * size / data.seq_length))
    return [found[k * size : (k + 1) * size] for k in range(count)]


def documents_of(ids: list[int]) -> list[list[int]]:
    """Cut a stream after each end token."""
    found: list[list[int]] = [[]]
    for token in ids:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    assert found.pop() == []
    return found


lengths_lists = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(
    lambda lengths: sum(lengths) >= 8
)


@given(
    lengths_lists, st.integers(1, 7), st.integers(0, 99), st.booleans(), st.sampled_from([0.0, 0.5])
)
def test_samples_tile_the_stream_of_whole_epochs(
    lengths: list[int], seq_length: int, seed: int, isolate: bool, fim_rate: float
) -> None:
    documents = numbered(lengths)
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(Path(folder, "p"), np.uint16) as writer:
            for document in documents:
                writer.add_document(document)
        data = PackedDataset(
            IndexedDataset(Path(folder, "p")),
            np.arange(len(lengths)),
            seq_length=seq_length,
            seed=seed,
            isolate_documents=isolate,
            fim_rate=fim_rate,
            fim=FIM,
        )
        chosen = math.floor(fim_rate * sum(length >= 4 for length in lengths) + 0.5)
        assert data.num_tokens == sum(lengths) + 3 * chosen
        text = sorted(token for document in documents for token in document)
        for ids in epochs(data, 3):
            # 1. Every epoch is the whole data once, and the sentinels of the rearranged.
            assert sorted(token for token in ids if token < 900) == text
            counts = Counter(token for token in ids if token >= 900)
            assert counts == ({901: chosen, 902: chosen, 903: chosen} if chosen else {})
        previous = None
        starts = {document[0] for document in documents if document}
        for i in range(3 * len(data)):
            sample = data.stretch(i)
            tokens, labels = sample["tokens"], sample["labels"]
            assert [sample[key].dtype.name for key in sample] == [
                "int64",
                "int64",
                "int64",
                "int32",
            ]
            # 2. Labels are the next ids, in the sample and across its end.
            inside = labels[:-1] != IGNORE_INDEX
            assert np.array_equal(labels[:-1][inside], tokens[1:][inside])
            if previous not in (None, IGNORE_INDEX):
                assert tokens[0] == previous
            previous = labels[-1]
            # 3. Borders.
            if not isolate:
                assert not (labels == IGNORE_INDEX).any()
                assert sample["positions"].tolist() == list(range(seq_length))
                assert not sample["documents"].any()
            elif not chosen:
                begins = np.array([t in starts and k > 0 for k, t in enumerate(tokens)])
                assert sample["documents"].tolist() == np.cumsum(begins).tolist()
                assert np.array_equal(labels[:-1] == IGNORE_INDEX, begins[1:])
                expected, position = [], -1
                for begin in begins:
                    position = 0 if begin else position + 1
                    expected.append(position)
                assert sample["positions"].tolist() == expected


def test_isolated_fields_of_a_known_sample(write: Write) -> None:
    indexed = write([[1, 2, EOS], [3, EOS], [4, 5, 6, 7, EOS]])
    data = PackedDataset(
        indexed, np.arange(3), seq_length=7, isolate_documents=True, endless=False, pad_id=99
    )
    assert len(data) == 2
    first, second = data[0], data[1]
    assert first["tokens"].tolist() == [1, 2, EOS, 3, EOS, 4, 5]
    assert first["labels"].tolist() == [2, EOS, -100, EOS, -100, 5, 6]
    assert first["positions"].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert first["documents"].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert second["tokens"].tolist() == [6, 7, EOS, 99, 99, 99, 99]
    assert second["labels"].tolist() == [7, EOS, -100, -100, -100, -100, -100]
    assert second["positions"].tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert second["documents"].tolist() == [0, 0, 0, -1, -1, -1, -1]
    for beyond in (2, 3, 1000):
        padding = data[beyond]
        assert set(padding["tokens"]) == {99} and set(padding["labels"]) == {-100}
        assert set(padding["documents"]) == {-1}


def test_a_label_at_the_end_of_a_sample_does_not_leak_the_next_document(write: Write) -> None:
    indexed = write([[1, 2, 3], [4, 5, 6]])
    data = PackedDataset(indexed, np.arange(2), seq_length=3, isolate_documents=True, endless=False)
    assert data[0]["labels"].tolist() == [2, 3, -100]
    joined = PackedDataset(indexed, np.arange(2), seq_length=3, endless=False)
    assert joined[0]["labels"].tolist() == [2, 3, 4]


@pytest.mark.parametrize("fim_rate", [0.0, 0.6])
@pytest.mark.parametrize("endless", [True, False])
def test_order_of_access_does_not_matter(write: Write, fim_rate: float, endless: bool) -> None:
    rng = np.random.default_rng(0)
    indexed = write(numbered(rng.integers(1, 30, 40).tolist()))

    def make() -> PackedDataset:
        return PackedDataset(
            indexed,
            np.arange(40),
            seq_length=16,
            seed=3,
            isolate_documents=True,
            fim_rate=fim_rate,
            fim=FIM,
            endless=endless,
        )

    forward = make()
    samples = [forward[i] for i in range(200)]
    jumping = make()
    for i in rng.permutation(200):
        assert equal(jumping[int(i)], samples[i])
    far = 10**9 + 7
    assert equal(make()[far], make()[far])
    assert equal(make()[199], samples[199])


def test_epochs_and_seeds_differ_in_order(write: Write) -> None:
    indexed = write(numbered([10] * 50))
    orders = set()
    for seed in (1, 2):
        data = PackedDataset(indexed, np.arange(50), seq_length=9, seed=seed)
        for ids in epochs(data, 3):
            orders.add(tuple(ids[::10]))
    assert len(orders) == 6


def test_the_order_is_frozen(write: Write) -> None:
    """A change here breaks the exact resumption of every run."""
    data = PackedDataset(
        write(numbered([6] * 4)), np.arange(4), seq_length=8, seed=1234, fim_rate=0.5, fim=FIM
    )
    # fmt: off
    assert epochs(data, 2) == [
        [901, 6, 902, 903, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17,
         901, 18, 902, 20, 21, 22, 23, 903, 19],
        [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17, 901, 6, 7, 8, 902, 10, 11, 903, 9,
         901, 18, 902, 20, 21, 22, 23, 903, 19],
    ]
    # fmt: on


@given(st.lists(st.integers(0, 15), min_size=3, max_size=10), st.integers(0, 99), st.booleans())
def test_rearranged_documents_can_be_put_back(lengths: list[int], seed: int, ended: bool) -> None:
    documents = [[*ids, EOS] if ended else ids for ids in numbered(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(Path(folder, "p"), np.uint16) as writer:
            for document in documents:
                writer.add_document(document)
        indexed = IndexedDataset(Path(folder, "p")) if sum(map(len, documents)) else None
        if indexed is None or indexed.num_tokens < 6:
            return
        data = PackedDataset(
            indexed,
            np.arange(len(documents)),
            seq_length=5,
            seed=seed,
            fim_rate=1.0,
            fim=FIM,
            eos_id=EOS,
        )
        for ids in epochs(data, 2):
            text = [token for token in ids if token < 900]
            assert sorted(text) == list(range(sum(lengths)))
            rest = ids
            while FIM.begin in rest:
                begin = rest.index(FIM.begin)
                hole, end = rest.index(FIM.hole, begin), rest.index(FIM.end, begin)
                assert begin < hole < end
                prefix, suffix = rest[begin + 1 : hole], rest[hole + 1 : end]
                whole = next(d for d in documents if len(d) >= 4 and rest[end + 1] in d)
                middle = rest[end + 1 : end + 1 + len(whole) - ended - len(prefix) - len(suffix)]
                assert middle, "the middle is never empty"
                assert prefix + middle + suffix == whole[: len(whole) - ended]
                rest = rest[end + 1 + len(middle) :]
                if ended:
                    assert rest[0] == EOS


def test_rearrangement_is_drawn_anew_in_every_epoch(write: Write) -> None:
    indexed = write([[*ids, EOS] for ids in numbered([20] * 30)])
    data = PackedDataset(
        indexed, np.arange(30), seq_length=10, seed=0, fim_rate=0.5, fim=FIM, eos_id=EOS
    )
    chosen, places = [], []
    for ids in epochs(data, 3):
        documents = documents_of(ids)
        rearranged = {
            min(token for token in document if token < 900): document
            for document in documents
            if FIM.begin in document
        }
        assert len(rearranged) == 15
        chosen.append(frozenset(rearranged))
        places.append(tuple(rearranged[key].index(FIM.hole) for key in sorted(rearranged)))
    assert len(set(chosen)) == 3 and len(set(places)) == 3
    assert len(set(places[0])) > 3, "documents are cut at different places"


def test_documents_of_several_sequences_are_whole(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "p", np.int32) as writer:
        for k in range(4):
            writer.add_sequence([10 * k + 1, 10 * k + 2])
            writer.add_sequence([])
            writer.add_sequence([10 * k + 3])
            writer.end_document()
            writer.end_document()  # an empty one
    data = PackedDataset(
        IndexedDataset(tmp_path / "p"), np.arange(8), seq_length=3, isolate_documents=True
    )
    assert data.num_documents == 4
    for i in range(8):
        assert np.diff(data[i]["tokens"]).tolist() == [1, 1]
        assert data[i]["labels"][2] == IGNORE_INDEX


@given(st.integers(2, 500), st.floats(0.001, 0.999))
def test_a_split_is_exact_and_spread(count: int, fraction: float) -> None:
    train, validation = split_documents(count, fraction)
    assert sorted([*train, *validation]) == list(range(count))
    assert len(validation) == min(max(1, math.floor(fraction * count + 0.5)), count - 1)
    gaps = np.diff(validation)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_no_token_of_training_is_in_validation(write: Write) -> None:
    rng = np.random.default_rng(0)
    indexed = write(numbered(rng.integers(5, 30, 60).tolist()))
    train, validation = split_documents(60, 0.1)
    training = PackedDataset(indexed, train, seq_length=8, seed=1)
    validating = PackedDataset(indexed, validation, seq_length=8, endless=False, pad_id=0)
    trained = {token for ids in epochs(training, 2) for token in ids}
    validated = [
        token
        for i in range(len(validating))
        for token, document in zip(*map(validating[i].get, ("tokens", "documents")), strict=True)
        if document >= 0
    ]
    labels = [
        t for i in range(len(validating)) for t in validating[i]["labels"] if t != IGNORE_INDEX
    ]
    assert trained | set(validated) == set(range(indexed.num_tokens))
    assert not trained & set(validated)
    assert labels == validated[1:]
    assert len(set(validated)) == len(validated) == validating.num_tokens


def test_errors(write: Write) -> None:
    indexed = write([[1, 2, 3], [4, 5]])
    message = (
        r"data: 2 documents for training have 5 ids, one sequence needs 9; use more text or "
        r"model\.data\.seq_length=4 or less"
    )
    with pytest.raises(UserError, match=message):
        PackedDataset(indexed, np.arange(2), seq_length=8)
    assert len(PackedDataset(indexed, np.arange(2), seq_length=4)) == 1
    assert len(PackedDataset(indexed, np.arange(2), seq_length=8, endless=False)) == 1
    message = r"1 documents for validation have 1 ids, one sequence needs 2; use more text$"
    with pytest.raises(UserError, match=message):
        PackedDataset(write([[1]], "one"), np.arange(1), seq_length=8, endless=False)
    with pytest.raises(UserError, match=r"model\.data\.fim_rate=0\.1 needs a tokenizer with the"):
        PackedDataset(indexed, np.arange(2), seq_length=2, fim_rate=0.1)
    floats = write([[0.5, 1.5]], "floats", "float32")
    with pytest.raises(UserError, match=r"floats\.bin holds float32 numbers, which are not token"):
        PackedDataset(floats, np.arange(1), seq_length=1)
    message = r"validation_fraction=0\.02 keeps whole documents .* the data has 1; set model\.data"
    with pytest.raises(UserError, match=message):
        split_documents(1, 0.02)
    assert [len(part) for part in split_documents(1, 0.0)] == [1, 0]


# -- the order of training: every stretch once, in an order that mixes the documents --

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


def test_the_permutation_is_frozen() -> None:
    """A change here breaks the exact resumption of every run."""
    assert [permuted(i, 10, 1234, 0, 2) for i in range(10)] == FROZEN


def test_large_data_needs_no_table() -> None:
    size = 10**12
    places = {permuted(i, size, 7) for i in range(500)}
    assert len(places) == 500 and max(places) < size and max(places) > size // 2


def test_a_pass_has_every_stretch_once_and_mixes_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(data, "stretch", lambda number: number)
    orders = np.array([data[i] for i in range(3 * len(data))]).reshape(3, -1)
    orders -= len(data) * np.arange(3)[:, None]
    assert len(np.unique(orders, axis=0)) == 3  # each pass has an order of its own
