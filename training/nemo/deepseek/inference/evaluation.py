"""How well a model predicts whole documents: the loss of each, read through a sliding window.

A document longer than the window is read in overlapping windows, each of them alone, with
positions from 0. A window predicts only what the one before it did not, so every id but the first
of a document is predicted once, and with at least ``window - stride`` ids before it where there
are as many. That is how transformers computes the perplexity of models of a fixed length.

S ids of the longest window of a batch, D hidden size, P predicted ids; shapes:
``models/__init__.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek.config.cost import CHUNK_TOKENS
from deepseek.models.transformer import Transformer
from deepseek.ops.cross_entropy import softmax_loss

BATCH_TOKENS = 4096
"""Read in one forward pass, or one window if that is longer."""


@dataclass(frozen=True)
class Document:
    """Ids that are read alone."""

    name: str
    ids: np.ndarray
    """int64 [n]; the first one is read, not predicted."""
    counted: np.ndarray
    """bool [n]: the ids whose loss counts; that of the first is ignored."""
    text_bytes: int | None
    """UTF-8 bytes of the text that the counted ids stand for, if they are known."""

    @property
    def num_predicted(self) -> int:
        """Ids whose loss counts."""
        return int(np.count_nonzero(self.counted[1:]))


@dataclass(frozen=True)
class Score:
    """Loss of one document, or of several together."""

    tokens: int
    """Ids that were predicted."""
    nats: float
    """Sum of their losses."""
    text_bytes: int | None

    @classmethod
    def of(cls, scores: Sequence[Score]) -> Score:
        """The sum of several."""
        sizes = [score.text_bytes for score in scores]
        known = [size for size in sizes if size is not None]
        return cls(
            sum(score.tokens for score in scores),
            math.fsum(score.nats for score in scores),
            sum(known) if len(known) == len(sizes) else None,
        )

    @property
    def loss(self) -> float | None:
        """Nats per predicted id; None if there is none."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None where that is no number of 64 bits."""
        return None if self.loss is None or not self.loss < 700 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Nats / ln 2 / bytes of text; None if there is no text or its size is not known."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


class Window(NamedTuple):
    """A stretch of a document; ids ``first`` to ``end`` are predicted by it."""

    begin: int
    first: int
    end: int


def windows(count: int, size: int, stride: int) -> Iterator[Window]:
    """The windows of a document of ``count`` ids; one of a single id has none.

    Args:
        count: ids of the document.
        size: ids that are read together, at most.
        stride: from one window to the next, below ``size``.
    """
    done = 1
    for begin in range(0, count, stride):
        end = min(begin + size, count)
        if end > done:
            yield Window(begin, done, end)
        done = end
        if end == count:
            return


@torch.no_grad()
def score_documents(
    model: Transformer,
    documents: Sequence[Document],
    size: int,
    stride: int,
    tell: Callable[[int], None] = lambda tokens: None,
) -> list[Score]:
    """The loss of every document.

    Args:
        model: whole, on any device.
        documents: their ids must be below the model's vocabulary size.
        size: ids that are read together; the model's positions must reach as far.
        stride: from one window to the next, 1 to ``size - 1``.
        tell: called with the number of ids predicted since the last call.

    Returns:
        One score per document, in order.
    """
    nats = [0.0] * len(documents)
    cuts = [
        (number, cut)
        for number, document in enumerate(documents)
        for cut in windows(len(document.ids), size, stride)
    ]
    rows = max(1, BATCH_TOKENS // size)
    for start in range(0, len(cuts), rows):
        batch = cuts[start : start + rows]
        losses_BS = _losses(model, documents, batch)
        for (number, _), loss in zip(batch, losses_BS.sum(dim=1).tolist(), strict=True):
            nats[number] += loss
        tell(sum(cut.end - cut.first for _, cut in batch))
    return [
        Score(document.num_predicted, loss, document.text_bytes)
        for document, loss in zip(documents, nats, strict=True)
    ]


def _losses(
    model: Transformer, documents: Sequence[Document], batch: Sequence[tuple[int, Window]]
) -> Tensor:
    """fp64 (B, S): the loss at the id that predicts, 0 where none counts. Short windows are padded
    at their end, where no id before it can see them."""
    longest = max(cut.end - cut.begin for _, cut in batch)
    tokens_BS = np.zeros((len(batch), longest), np.int64)
    labels_BS = np.zeros((len(batch), longest), np.int64)
    counted_BS = np.zeros((len(batch), longest), bool)
    for row, (number, cut) in enumerate(batch):
        document = documents[number]
        tokens_BS[row, : cut.end - cut.begin] = document.ids[cut.begin : cut.end]
        here = slice(cut.first - cut.begin - 1, cut.end - cut.begin - 1)
        labels_BS[row, here] = document.ids[cut.first : cut.end]
        counted_BS[row, here] = document.counted[cut.first : cut.end]
    assert model.head is not None, "predicting needs the whole model"
    weight_VD = model.head.weight
    device = weight_VD.device
    on_device_BS = torch.from_numpy(tokens_BS).to(device)
    hidden_BSD = model.main(on_device_BS, model.context(on_device_BS))
    chosen_BS = torch.from_numpy(counted_BS).to(device)
    hidden_PD = hidden_BSD[chosen_BS]
    labels_P = torch.from_numpy(labels_BS).to(device)[chosen_BS]
    found = []
    for start in range(0, len(labels_P), CHUNK_TOKENS):  # never the logits of a whole batch
        chunk = slice(start, start + CHUNK_TOKENS)
        logits_PV = model.head(hidden_PD[chunk])
        logits_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
        found.append(softmax_loss(logits_PV, labels_P[chunk], False).double())
    losses_BS = torch.zeros(tokens_BS.shape, dtype=torch.float64, device=device)
    if found:
        losses_BS[chosen_BS] = torch.cat(found)
    return losses_BS.cpu()
