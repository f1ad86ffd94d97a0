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
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.indexed import IndexedDataset
from deepseek.data.tokenizer import FimIds

Sample = dict[str, np.ndarray]

IGNORE_INDEX = -100
"""Label of a position that predicts nothing."""
_FIM_SHORTEST = 4
_FEISTEL_ROUNDS = 4
_ORDER, _REARRANGED, _SHUFFLED = 0, 1, 2


class PackedDataset:
    """Sequences cut from some documents of an indexed dataset.

    A sample is a dictionary of arrays [seq_length]:

    - ``tokens`` int64;
    - ``labels`` int64: the next id, -100 where there is none to predict;
    - ``positions`` int64: from 0 in each sample, or in each document if isolated;
    - ``documents`` int32: which ids may see each other: 0, 1, ... for the documents of the sample
      if isolated, else 0 everywhere; -1 for padding.

    Memory: 24 bytes a document, and 17 more for each of the two epochs kept.

    Args:
        indexed: the ids.
        documents: which of its documents, increasing.
        seq_length: ids in a sample.
        seed: decides the order, and what fill-in-the-middle does.
        isolate_documents: nothing is predicted across the border of documents, and positions start
            at 0 in each.
        fim_rate: share of the documents (of at least four ids) rearranged in every epoch.
        fim: the sentinels for that.
        bos_id, eos_id: kept at the ends of rearranged documents.
        pad_id: fills the rest of a sample.
        endless: epochs without end in random order (training), else one pass in the order given
            whose last sample is padded (validation).

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
        bos_id: int | None = None,
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
        self.fim, self.bos_id, self.eos_id, self.pad_id = fim, bos_id, eos_id, pad_id
        lengths = indexed.document_lengths[documents]
        self.documents = np.asarray(documents, np.int64)[lengths > 0]
        self._lengths = lengths[lengths > 0]
        self._long = np.flatnonzero((self._lengths >= _FIM_SHORTEST) & (fim_rate > 0))
        self._rearranged = math.floor(fim_rate * len(self._long) + 0.5)
        self._epochs: dict[int, _Epoch] = {}

        self.num_documents = len(self.documents)
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
        labels = np.full(size, IGNORE_INDEX, np.int64)
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
            labels[begins[1:] - 1] = IGNORE_INDEX
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
        documents = self.documents[slots]
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
        head = int(int(ids[0]) == self.bos_id)
        tail = len(ids) - (int(ids[-1]) == self.eos_id)
        body = tail - head
        # Two different places out of body + 1, so that the middle is never empty.
        draw = mix(self.seed, epoch, document)
        a = (draw & 0xFFFFFFFF) * (body + 1) >> 32
        b = (draw >> 32) * body >> 32
        b += b >= a
        a, b = head + min(a, b), head + max(a, b)
        parts: tuple[np.ndarray, ...] = (
            ids[:head],
            np.array([self.fim.begin]),
            ids[head:a],
            np.array([self.fim.hole]),
            ids[b:tail],
            np.array([self.fim.end]),
            ids[a:b],
            ids[tail:],
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
        count = len(self.documents)
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


class ChatDataset:
    """Conversations packed whole into training sequences, with a loss on answers only.

    A sequence takes as many conversations as fit, and the rest of it is padding; none is divided
    over two sequences, where its second half would not see its first. They are isolated: attention,
    positions and labels stop at their borders. What goes with what is decided once, from lengths
    and seed; every epoch takes the sequences in another order. So sample ``i`` is a function of
    (data, seed, i), as it is for text.

    A conversation longer than a sequence loses its end. If no answer is left of it, it is left out.

    Args:
        indexed: a conversation is a document.
        is_answer: of every id of ``indexed``, 0 or 1, uint8.
        documents: which conversations, increasing.
        seq_length: ids in a sequence; a conversation of n ids takes n - 1 of them, since nothing
            follows its last.
        seed: decides what is packed together, and the order.
        pad_id: fills the rest of a sequence.
        endless: epochs without end (training), else one pass (validation).

    Attributes:
        num_documents, num_tokens: conversations, and ids of them, in one epoch.
        cut: conversations of which some answer's ids were cut off, those left out among them.
        left_out: conversations of which no answer was left.
        answer_tokens: labels in one epoch.

    Raises:
        UserError: no answer is left at all.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        is_answer: np.ndarray,
        documents: np.ndarray,
        *,
        seq_length: int,
        seed: int = 0,
        pad_id: int = 0,
        endless: bool = True,
    ) -> None:
        self.indexed, self.is_answer = indexed, is_answer
        self.seq_length, self.seed, self.pad_id, self.endless = seq_length, seed, pad_id, endless
        lengths = np.minimum(indexed.document_lengths[documents], seq_length + 1)
        wanted = np.array([self._answers(int(d)) for d in documents], np.int64)
        kept = np.array(
            [self._answers(int(d), int(n)) for d, n in zip(documents, lengths, strict=True)],
            np.int64,
        )
        self.cut = int((kept < wanted).sum())
        self.left_out = int((kept == 0).sum())
        self.documents = np.asarray(documents, np.int64)[kept > 0]
        self._lengths = lengths[kept > 0]
        self.num_documents = len(self.documents)
        self.num_tokens = int(self._lengths.sum())
        self.answer_tokens = int(kept.sum())
        if not self.num_documents:
            raise UserError(
                f"{indexed.prefix}: no answer of the {len(documents)} conversations for "
                f"{'training' if endless else 'validation'} begins within "
                f"model.data.seq_length={seq_length} ids; use a longer one"
            )
        self._packs = _packed(self._lengths - 1, seq_length, seed)

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return len(self._packs)

    def __getitem__(self, sample: int) -> Sample:
        """Sample number ``sample`` >= 0; see ``PackedDataset``. After the end of a dataset that is
        not endless it is all padding."""
        count = len(self._packs)
        if self.endless:
            epoch, place = divmod(sample, count)
            return self._sample(self._packs[permuted(place, count, self.seed, epoch)])
        return self._sample(self._packs[sample] if sample < count else [])

    def _sample(self, slots: list[int]) -> Sample:
        size = self.seq_length
        tokens = np.full(size, self.pad_id, np.int64)
        labels = np.full(size, IGNORE_INDEX, np.int64)
        positions = np.zeros(size, np.int64)
        documents = np.full(size, -1, np.int32)
        begin = 0
        for number, slot in enumerate(slots):
            document, length = int(self.documents[slot]), int(self._lengths[slot])
            ids = self.indexed.document(document, 0, length).astype(np.int64)
            start = int(self.indexed.document_offsets[document])
            answer = self.is_answer[start + 1 : start + length] == 1
            here = slice(begin, begin + length - 1)
            tokens[here] = ids[:-1]
            labels[here] = np.where(answer, ids[1:], IGNORE_INDEX)
            positions[here] = np.arange(length - 1)
            documents[here] = number
            begin += length - 1
        return {
            "tokens": tokens,
            "labels": labels,
            "positions": positions,
            "documents": documents,
        }

    def _answers(self, document: int, length: int | None = None) -> int:
        """Labels that the first ``length`` ids of a conversation give."""
        start = int(self.indexed.document_offsets[document])
        whole = int(self.indexed.document_lengths[document])
        stop = start + (whole if length is None else length)
        return int(np.count_nonzero(self.is_answer[start + 1 : stop]))


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


# -- random numbers and permutations that are functions of integers: nothing to store --


def permuted(place: int, size: int, *key: int) -> int:
    """Where ``place`` goes in a permutation of ``range(size)`` that ``key`` decides.

    A Feistel network over the next even number of bits, walked until it lands inside (fewer than
    four times on average): no table, however large the data.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, rounds = (1 << half) - 1, _rounds(key)
    while True:
        left, right = place >> half, place & mask
        for state in rounds:
            left, right = right, left ^ (_mixed(state, right) & mask)
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=64)
def _rounds(key: tuple[int, ...]) -> list[int]:
    """What each round mixes into its half: the same for all places of a permutation."""
    return [mix(*key, number) for number in range(_FEISTEL_ROUNDS)]


def mix(*numbers: int) -> int:
    """64 random bits that depend on integers only (splitmix64)."""
    return reduce(_mixed, numbers, 0)


def _mixed(state: int, number: int) -> int:
    state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return state ^ state >> 31


def _random(seed: int, epoch: int, purpose: int) -> np.random.RandomState:
    """A source of random numbers whose stream numpy has frozen, unlike that of Generator."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch, purpose])))


def _packed(lengths: np.ndarray, size: int, seed: int) -> list[list[int]]:
    """Which of ``lengths`` go together, at most ``size`` in a pack: best fit, the longest first.

    Equal lengths come in random order, and so do the packs.
    """
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 0])))
    order = random.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # room left -> packs with that much
    rooms: list[int] = []  # the keys of open_packs, sorted
    for slot in map(int, order):
        length = int(lengths[slot])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            pack, room = len(packs), size
            packs.append([])
        else:
            room = rooms[place]
            pack = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room]
                del rooms[place]
        packs[pack].append(slot)
        left = room - length
        if left > 0:
            if left not in open_packs:
                open_packs[left] = []
                insort(rooms, left)
            open_packs[left].append(pack)
    return [packs[int(k)] for k in random.permutation(len(packs))]
