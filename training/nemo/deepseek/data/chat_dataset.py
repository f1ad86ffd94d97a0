"""Conversations packed whole into training sequences, with a loss on answers only.

A sequence takes as many conversations as fit, and the rest of it is padding; none is divided over
two sequences, where its second half would not see its first. They are isolated: attention,
positions and labels stop at their borders. What goes with what is decided once, from lengths and
seed; every epoch takes the sequences in another order. So sample ``i`` is a function of (data,
seed, i), as it is for text.

A conversation longer than a sequence loses its end. If no answer is left of it, it is left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from deepseek.config.errors import UserError
from deepseek.data.dataset import IGNORED, Sample
from deepseek.data.indexed import IndexedDataset
from deepseek.data.shuffle import permuted


class ChatDataset:
    """Sequences of some conversations of an indexed dataset.

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
        self._documents = np.asarray(documents, np.int64)[kept > 0]
        self._lengths = lengths[kept > 0]
        self.num_documents = len(self._documents)
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
        labels = np.full(size, IGNORED, np.int64)
        positions = np.zeros(size, np.int64)
        documents = np.full(size, -1, np.int32)
        begin = 0
        for number, slot in enumerate(slots):
            document, length = int(self._documents[slot]), int(self._lengths[slot])
            ids = self.indexed.document(document, 0, length).astype(np.int64)
            start = int(self.indexed.document_offsets[document])
            answer = self.is_answer[start + 1 : start + length] == 1
            here = slice(begin, begin + length - 1)
            tokens[here] = ids[:-1]
            labels[here] = np.where(answer, ids[1:], IGNORED)
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
