"""Documents scored in windows, against one plain forward pass per window."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deepseek.inference import evaluation as module
from deepseek.inference.evaluation import Document, Score, score_documents, windows
from deepseek.models.transformer import Transformer
from inference.test_generate import VOCAB, model


def document(ids: list[int], counted: list[bool] | None = None) -> Document:
    mask = np.ones(len(ids), bool) if counted is None else np.array(counted)
    return Document("d", np.array(ids, np.int64), mask, len(ids))


@torch.no_grad()
def slow(made: Transformer, ids: list[int], counted: np.ndarray, size: int, stride: int) -> float:
    """The sum of losses as transformers' guide computes it: windows, and -100 for what is old."""
    total, seen = 0.0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + size, len(ids))
        labels = torch.tensor(ids[begin:end]).where(torch.tensor(counted[begin:end]), -100)
        labels[: max(0, seen - begin)] = -100
        logits = made(torch.tensor([ids[begin:end]]))[0, :-1]
        if end - begin > 1:
            total += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        seen = end
        if end == len(ids):
            break
    return total


@given(
    texts=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=25), min_size=1, max_size=5),
    size=st.integers(2, 12),
    data=st.data(),
)
def test_every_document_equals_the_plain_loop(
    texts: list[list[int]], size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, size - 1))
    documents = [
        document(ids, [data.draw(st.booleans()) for _ in ids] if size % 2 else None)
        for ids in texts
    ]
    made, told = model(), [0]
    found = score_documents(made, documents, size, stride, told.append)
    for given_, score in zip(documents, found, strict=True):
        wanted = slow(made, given_.ids.tolist(), given_.counted, size, stride)
        assert score.nats == pytest.approx(wanted, abs=1e-10)
        assert score.tokens == given_.num_predicted
    assert sum(told) == sum(max(0, len(ids) - 1) for ids in texts)


def test_batches_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [document([(7 * i + k) % VOCAB for i in range(30 + k)]) for k in range(6)]
    made = model()
    wanted = [score.nats for score in score_documents(made, documents, 8, 3)]
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 2)
    found = [score.nats for score in score_documents(made, documents, 8, 3)]
    assert found == pytest.approx(wanted, abs=1e-10)


@given(count=st.integers(0, 60), size=st.integers(2, 12), data=st.data())
def test_windows_predict_every_id_but_the_first_once(
    count: int, size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, size - 1))
    cuts = list(windows(count, size, stride))
    predicted = [i for cut in cuts for i in range(cut.first, cut.end)]
    assert predicted == list(range(1, count))
    for cut in cuts:
        assert cut.begin < cut.first < cut.end <= cut.begin + size
        assert cut.first - cut.begin >= size - stride or cut.begin == 0


def test_scores_add_up_and_know_what_is_unknown() -> None:
    one, two = Score(4, 2.0, 8), Score(1, 3.0, 2)
    both = Score.of([one, two])
    assert both == Score(5, 5.0, 10)
    assert both.loss == 1.0 and both.perplexity == math.e
    assert both.bits_per_byte == pytest.approx(0.5 / math.log(2))
    assert Score.of([one, Score(1, 1.0, None)]).bits_per_byte is None
    nothing = Score(0, 0.0, 0)
    assert (nothing.loss, nothing.perplexity, nothing.bits_per_byte) == (None, None, None)
    assert Score(1, 800.0, 1).perplexity is None
