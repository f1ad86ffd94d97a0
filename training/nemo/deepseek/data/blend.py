"""Weighted blends: which dataset, and which of its samples, global sample ``i`` is.

After any number of samples every dataset has had its share, rounded up or down: it is never one
whole sample ahead or behind. The order is that of Balinski and Young's quota methods: the k-th
sample of a dataset of weight w may come once k - 1 < w t, must have come when k <= w t, and among
those that may come the one with the earliest deadline is taken.
"""

from __future__ import annotations

import heapq
import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

from deepseek.config.errors import UserError
from deepseek.data.dataset import ChatDataset, PackedDataset, Sample

_FINEST = 1_000_000
_BLOCK = 128


class Blend:
    """The order of a blend, a pure function of the sample number.

    Memory: one period of the order, at most 10 MB, made as far as it is used.

    Args:
        weights: positive, any scale. They are exact if their shares have a common denominator of up
            to a million, otherwise rounded to millionths.

    Raises:
        UserError: a weight is not positive.
    """

    def __init__(self, weights: Sequence[Fraction | float | int]) -> None:
        self.parts = _parts(weights)
        """Shares as whole numbers of ``period`` parts."""
        self.period = sum(self.parts)
        """Samples after which the order repeats."""
        self._order = array("H")
        self._counts: list[list[int]] = [[0] * len(self.parts)]
        self._done = [0] * len(self.parts)
        self._ready: list[tuple[int, int]] = []
        self._later = [(0, k) for k in range(len(self.parts))]

    @property
    def shares(self) -> list[float]:
        """Weights that add up to 1."""
        return [part / self.period for part in self.parts]

    def locate(self, sample: int) -> tuple[int, int]:
        """Dataset and the number of its sample that global sample ``sample`` is."""
        whole, place = divmod(sample, self.period)
        self._extend(place + 1)
        dataset = self._order[place]
        return dataset, whole * self.parts[dataset] + self._count(dataset, place)

    def counts(self, samples: int) -> list[int]:
        """Samples of each dataset among the first ``samples``."""
        whole, place = divmod(samples, self.period)
        self._extend(place)
        return [whole * part + self._count(k, place) for k, part in enumerate(self.parts)]

    def _count(self, dataset: int, place: int) -> int:
        block = place // _BLOCK
        within = self._order[block * _BLOCK : place]
        return self._counts[block][dataset] + within.count(dataset)

    def _extend(self, length: int) -> None:
        """Make the order of one period known up to ``length``, in whole blocks."""
        while len(self._order) < length:
            for time in range(len(self._order), min(len(self._order) + _BLOCK, self.period)):
                while self._later and self._later[0][0] <= time:
                    _, dataset = heapq.heappop(self._later)
                    deadline = -(-(self._done[dataset] + 1) * self.period // self.parts[dataset])
                    heapq.heappush(self._ready, (deadline, dataset))
                _, dataset = heapq.heappop(self._ready)
                self._order.append(dataset)
                self._done[dataset] += 1
                release = self._done[dataset] * self.period // self.parts[dataset]
                heapq.heappush(self._later, (release, dataset))
            self._counts.append(list(self._done))


class BlendedDataset:
    """Several packed datasets read as one, in the proportions of their weights."""

    def __init__(self, datasets: Sequence[PackedDataset | ChatDataset], blend: Blend) -> None:
        self.datasets, self.blend = list(datasets), blend
        self.endless = all(dataset.endless for dataset in datasets)
        self.num_documents = sum(dataset.num_documents for dataset in datasets)
        self.num_tokens = sum(dataset.num_tokens for dataset in datasets)

    def __len__(self) -> int:
        """Samples until a dataset has no new ones."""
        return self._length

    @cached_property
    def _length(self) -> int:
        upper = sum(map(len, self.datasets))
        return bisect_right(range(1, upper + 1), 0, key=self._overdrawn)

    def __getitem__(self, sample: int) -> Sample:
        """Global sample; after the end of datasets that are not endless it is padding."""
        if not self.endless and sample >= self._length:
            return self.datasets[0][len(self.datasets[0])]
        dataset, local = self.blend.locate(sample)
        return self.datasets[dataset][local]

    def _overdrawn(self, samples: int) -> int:
        """1 if the first ``samples`` need more samples of a dataset than it has, else 0."""
        counts = self.blend.counts(samples)
        return int(any(n > len(d) for n, d in zip(counts, self.datasets, strict=True)))


def parse_blend(value: Any, field: str) -> list[tuple[Fraction, str]]:
    """Weights and prefixes of ``"P"`` or of ``[0.7, "P1", 0.3, "P2"]``.

    Args:
        value: as configured.
        field: the key to name in errors, such as ``model.data.data_prefix``.

    Raises:
        UserError: any other form, a weight that is not positive.
    """
    if isinstance(value, str):
        return [(Fraction(1), value)]
    form = f"{field} must be a prefix, or a blend such as [0.7, P1, 0.3, P2]"
    if not isinstance(value, Sequence) or not len(value) or len(value) % 2:
        raise UserError(f"{form}; got {value}")
    result = []
    for weight, prefix in zip(value[::2], value[1::2], strict=True):
        try:
            exact = Fraction(str(weight))
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{form}; {weight!r} is not a weight") from None
        if not isinstance(prefix, str):
            raise UserError(f"{form}; {prefix!r} is not a prefix")
        if exact <= 0:
            raise UserError(
                f"{field}: the weight of {prefix} is {weight}; weights must be above 0, leave the "
                "dataset out to give it none"
            )
        result.append((exact, prefix))
    return result


def _parts(weights: Sequence[Fraction | float | int]) -> list[int]:
    exact = [w if isinstance(w, Fraction) else Fraction(str(w)) for w in weights]
    if not exact or min(exact) <= 0:
        raise UserError(f"weights {list(weights)}: every weight of a blend must be above 0")
    total = sum(exact)
    shares = [weight / total for weight in exact]
    denominator = math.lcm(*(share.denominator for share in shares))
    if denominator <= _FINEST:
        return [int(share * denominator) for share in shares]
    # Millionths, of which those cut off most get one more, so that they add up to a million.
    parts = [max(1, int(share * _FINEST)) for share in shares]
    by_loss = sorted(range(len(parts)), key=lambda k: parts[k] - shares[k] * _FINEST)
    for k in by_loss[: max(0, _FINEST - sum(parts))]:
        parts[k] += 1
    return parts
