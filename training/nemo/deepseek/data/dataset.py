"""Documents packed into training sequences: sample ``i`` is a pure function of (data, seed, i).

The documents of an epoch, in an order drawn from (seed, epoch), form one stream; the epochs follow
each other without end. Stretch ``n`` is the ``seq_length + 1`` ids from ``n * seq_length`` on: its
first ``seq_length`` ids are the input, its last ``seq_length`` the labels. So every id of the
stream but the very first is a label exactly once, at the borders of epochs too; nothing is dropped
and nothing is padded. Training takes the stretches in random order, as many at a time as an epoch
has whole ones: taken in the order of the stream, a batch would be one long document. Nothing is
remembered between samples but the index of the last two epochs, which can be computed anew at any
time.

Fill-in-the-middle works on ids. A document ``p m s`` becomes ``<begin> p <hole> s <end> m`` and
keeps its end token at the end (PSM, arXiv:2412.19437 section 4.1). It grows by exactly three ids,
and every epoch rearranges the same number of documents, so the length of an epoch is known and any
sample can be found without looking at those before it. Cutting at characters would change the
number of ids, and with it the place of everything that follows. The price is that a hole never
begins inside a token, though a writer's cursor may.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.indexed import IndexedDataset
from deepseek.data.shuffle import mix, permuted
from deepseek.data.tokenizer import FimIds

Sample = dict[str, np.ndarray]

IGNORED = -100
"""Label of a position that predicts nothing."""
_FIM_SHORTEST = 4
_ORDER, _REARRANGED, _SHUFFLED = 0, 1, 2


class PackedDataset:
    """Sequences cut from some documents of an indexed dataset.

    documents: which documents, increasing; seed: decides order and rearrangement;
    isolate_documents: nothing is predicted across the border of documents, and positions start at 0
    in each; fim_rate: share of the documents (of at least four ids) rearranged in every epoch;
    eos_id: kept at the end of rearranged documents; endless: epochs without end in random order
    (training), else one pass in the order given whose last sample is padded (validation).

    Memory: 24 bytes a document, and 17 more for each of the two epochs kept.

    A sample is a dictionary of arrays of ``seq_length``:

    - ``tokens`` int64;
    - ``labels`` int64: the next id, -100 where there is none to predict;
    - ``positions`` int64: from 0 in each sample, or in each document if isolated;
    - ``documents`` int32: which ids may see each other: 0, 1, ... for the documents of the sample
      if isolated, else 0 everywhere; -1 for padding.

    Raises:
        UserError: too few ids for one sequence, ids are not integers, fim_rate without sentinels.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: np.ndarray,
        *,
        seq_length: int,
        seed: int = 0,
        isolate_documents: bool = False,
        fim_rate: float = 0.0,
        fim: FimIds | None = None,
        eos_id: int | None = None,
        pad_id: int = 0,
        endless: bool = True,
    ) -> None:
        if indexed.dtype.kind not in "iu":
            raise UserError(
                f"{indexed.prefix}.bin holds {indexed.dtype.name} numbers, which are not token "
                "ids; prepare text with prepare-data"
            )
        if fim_rate > 0 and fim is None:
            raise UserError(
                f"model.data.fim_rate={fim_rate} needs a tokenizer with the tokens "
                "<｜fim▁begin｜>, <｜fim▁hole｜> and <｜fim▁end｜>, and this one has none; set "
                "model.data.fim_rate=0, or use a tokenizer trained here or DeepSeek-V3's"
            )
        self.indexed, self.seq_length, self.seed = indexed, seq_length, seed
        self.isolate_documents, self.endless = isolate_documents, endless
        self.fim, self.eos_id, self.pad_id = fim, eos_id, pad_id
        lengths = indexed.document_lengths[documents]
        self._documents = np.asarray(documents, np.int64)[lengths > 0]
        self._lengths = lengths[lengths > 0]
        self._long = np.flatnonzero((self._lengths >= _FIM_SHORTEST) & (fim_rate > 0))
        self._rearranged = math.floor(fim_rate * len(self._long) + 0.5)
        self._epochs: dict[int, _Epoch] = {}

        self.num_documents = len(self._documents)
        self.num_tokens = int(self._lengths.sum()) + 3 * self._rearranged
        """Ids in one epoch, sentinels included."""
        needed = seq_length + 1 if endless else 2
        if self.num_tokens < needed:
            raise UserError(
                f"{indexed.prefix}: {self.num_documents} documents for "
                f"{'training' if endless else 'validation'} have {self.num_tokens} ids, one "
                f"sequence needs {needed}; use more text"
                + (f" or model.data.seq_length={self.num_tokens - 1} or less" if endless else "")
            )

    def __len__(self) -> int:
        """Samples in one pass: the whole ones of an epoch if endless, else all."""
        if self.endless:
            return (self.num_tokens - 1) // self.seq_length
        return -(-(self.num_tokens - 1) // self.seq_length)

    def __getitem__(self, sample: int) -> Sample:
        """Sample number ``sample`` >= 0. An endless dataset has one for every number; of the other
        kind those after the end are all padding."""
        if not self.endless:
            return self.stretch(sample)
        group, place = divmod(sample, len(self))
        return self.stretch(
            group * len(self) + permuted(place, len(self), self.seed, group, _SHUFFLED)
        )

    def stretch(self, number: int) -> Sample:
        """Stretch ``number`` of the stream."""
        start = number * self.seq_length
        if self.endless:
            epoch, offset = divmod(start, self.num_tokens)
        else:
            epoch, offset = 0, min(start, self.num_tokens)
        wanted = self.seq_length + 1
        stop = min(offset + wanted, self.num_tokens)
        ids, counts = self._read(epoch, offset, stop)
        if self.endless and len(ids) < wanted:
            more, more_counts = self._read(epoch + 1, 0, wanted - len(ids))
            ids = np.concatenate([ids, more])
            counts = np.concatenate([counts, more_counts])
        return self._sample(ids, counts)

    def _sample(self, ids: np.ndarray, counts: np.ndarray) -> Sample:
        """A sample from up to seq_length + 1 ids that belong to documents of ``counts`` ids."""
        size = self.seq_length
        real = min(len(ids), size)
        tokens = np.full(size, self.pad_id, np.int64)
        tokens[:real] = ids[:real]
        labels = np.full(size, IGNORED, np.int64)
        labels[: max(0, len(ids) - 1)] = ids[1:]
        positions = np.zeros(size, np.int64)
        positions[:real] = np.arange(real)
        documents = np.full(size, -1, np.int32)
        documents[:real] = 0
        if self.isolate_documents and len(counts):
            begins = np.cumsum(counts) - counts
            documents[:real] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[:real]
            positions[:real] -= np.repeat(begins, counts)[:real]
            # The last id of a document must not predict the first of the next.
            labels[begins[1:] - 1] = IGNORED
        return {
            "tokens": tokens,
            "labels": labels,
            "positions": positions,
            "documents": documents,
        }

    def _read(self, number: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``start:stop`` of an epoch's stream, and how many of each document they are."""
        epoch = self._epoch(number)
        first = int(np.searchsorted(epoch.begins, start, side="right")) - 1
        last = int(np.searchsorted(epoch.begins, stop, side="left"))
        begins = epoch.begins[first : last + 1].copy()
        slots = epoch.order[first:last]
        inside = start - begins[0] if len(slots) else 0
        begins[0], begins[-1] = start, stop
        counts = np.diff(begins)
        documents = self._documents[slots]
        # 1. Where each id lies in the file: one shift per document.
        shifts = self.indexed.document_offsets[documents] - (begins[:-1] - start)
        shifts[:1] += inside
        places = np.repeat(shifts, counts)
        places += np.arange(stop - start)
        # 2. Rearranged documents are three ids longer than in the file; step 3 puts them right.
        chosen = np.flatnonzero(epoch.rearranged[slots]) if self._rearranged else ()
        if len(chosen):
            np.minimum(places, self.indexed.num_tokens - 1, out=places)
        ids = self.indexed.tokens[places].astype(np.int64)
        # 3.
        for k in map(int, chosen):
            begin = int(begins[k]) - start
            skip = int(inside) if k == 0 else 0
            count = int(counts[k])
            ids[begin : begin + count] = self._rearrange(
                int(documents[k]), number, skip, skip + count
            )
        return ids, counts

    def _rearrange(self, document: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Ids ``start:stop`` of a document in the order prefix, suffix, middle."""
        assert self.fim is not None
        ids = self.indexed.document(document)
        body = len(ids) - (int(ids[-1]) == self.eos_id)
        # Two different places out of body + 1, so that the middle is never empty.
        draw = mix(self.seed, epoch, document)
        a = (draw & 0xFFFFFFFF) * (body + 1) >> 32
        b = (draw >> 32) * body >> 32
        b += b >= a
        a, b = min(a, b), max(a, b)
        parts: tuple[np.ndarray, ...] = (
            np.array([self.fim.begin]),
            ids[:a],
            np.array([self.fim.hole]),
            ids[b:body],
            np.array([self.fim.end]),
            ids[a:b],
            ids[body:],
        )
        taken, offset = [], 0
        for part in parts:
            taken.append(part[max(0, start - offset) : max(0, stop - offset)])
            offset += len(part)
        return np.concatenate(taken, dtype=np.int64, casting="unsafe")

    def _epoch(self, number: int) -> _Epoch:
        """The index of an epoch; the last two are kept."""
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._make_epoch(number)
            # A new dictionary: loaders may read from several threads.
            kept = sorted(self._epochs, key=lambda known: abs(known - number))[:1]
            self._epochs = {number: epoch, **{known: self._epochs[known] for known in kept}}
        return epoch

    def _make_epoch(self, number: int) -> _Epoch:
        count = len(self._documents)
        order = np.arange(count)
        if self.endless:
            order = _random(self.seed, number, _ORDER).permutation(count)
        lengths = self._lengths
        rearranged = np.zeros(count, bool)
        if self._rearranged:
            draw = _random(self.seed, number, _REARRANGED).permutation(len(self._long))
            rearranged[self._long[draw[: self._rearranged]]] = True
            lengths = lengths + 3 * rearranged
        begins = np.zeros(count + 1, np.int64)
        np.cumsum(lengths[order], out=begins[1:])
        return _Epoch(order, begins, rearranged)


@dataclass(frozen=True)
class _Epoch:
    """Where the documents lie in the stream of one epoch."""

    order: np.ndarray
    """Slots of documents in the order of reading, int64 [count]."""
    begins: np.ndarray
    """Where each begins in the stream, and its length, int64 [count + 1]."""
    rearranged: np.ndarray
    """Whether the document in each slot is rearranged, bool [count]."""


def split_documents(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents for training and for validation, both increasing.

    The documents for validation, ``fraction`` of all but at least one, are spread evenly over the
    data. They depend on nothing else, so that no seed ever moves a document to the other side.

    Raises:
        UserError: there are too few documents to have both.
    """
    documents = np.arange(count)
    if fraction == 0:
        return documents, documents[:0]
    if count < 2:
        raise UserError(
            f"model.data.validation_fraction={fraction} keeps whole documents for validation, and "
            f"the data has {count}; set model.data.validation_fraction=0, give "
            "model.data.validation_prefix, or prepare the text as several files"
        )
    kept = min(max(1, math.floor(fraction * count + 0.5)), count - 1)
    validation = (documents + 1) * kept // count > documents * kept // count
    return documents[~validation], documents[validation]


def _random(seed: int, epoch: int, purpose: int) -> np.random.RandomState:
    """A source of random numbers whose stream numpy has frozen, unlike that of Generator."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch, purpose])))
