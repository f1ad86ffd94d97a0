"""What the assignments of tokens to experts say: formulas on counts, pure numpy.

``tokens`` is always [..., E]: assignments of real tokens of the whole global batch to each of E
experts, for any leading axes such as [steps, layers]. n is one count, m the mean over experts,
p = n / sum(n). Where no token reached a layer the shares are undefined and come back as NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STARVED_BELOW = 0.1
"""An expert is starved below this share of the mean load."""


def utilisation(tokens: np.ndarray) -> np.ndarray:
    """u = n / m, float64 [..., E]; 1: a fair share."""
    return tokens / _mean(tokens)[..., None]


def variation(tokens: np.ndarray) -> np.ndarray:
    """Coefficient of variation sigma / m with the population's sigma (ddof 0), [...]."""
    mean = _mean(tokens)
    off = tokens - mean[..., None]
    return np.sqrt((off * off).sum(axis=-1) / tokens.shape[-1]) / mean


def max_violation(tokens: np.ndarray) -> np.ndarray:
    """MaxVio = max(n) / m - 1, [...]; 0: balanced (arXiv:2408.15664)."""
    return tokens.max(axis=-1) / _mean(tokens) - 1.0


def entropy(tokens: np.ndarray) -> np.ndarray:
    """-sum(p ln p) / ln E, [...], from 0 (one expert takes all) to 1 (balanced); E = 1: 1."""
    if tokens.shape[-1] == 1:
        return np.where(_total(tokens) > 0, 1.0, np.nan)
    return _nats(tokens) / np.log(tokens.shape[-1])


def effective_experts(tokens: np.ndarray) -> np.ndarray:
    """exp(-sum(p ln p)) / E, [...]: the share of experts a balanced layer of that entropy has."""
    return np.exp(_nats(tokens)) / tokens.shape[-1]


def dead(tokens: np.ndarray) -> np.ndarray:
    """How many experts got no token, int64 [...]."""
    return np.count_nonzero(tokens == 0, axis=-1)


def starved(tokens: np.ndarray) -> np.ndarray:
    """How many experts got less than a tenth of the mean, dead ones included, int64 [...]."""
    return np.count_nonzero(tokens < STARVED_BELOW * _mean(tokens)[..., None], axis=-1)


def nats_of(counts: list[int]) -> float:
    """Entropy of one layer that has tokens, in plain loops, for few experts."""
    total = sum(counts)
    return math.log(total) - sum([n * math.log(n) for n in counts if n]) / total


def _total(tokens: np.ndarray) -> np.ndarray:
    """sum(n), float64 [...], exact below 2^53; NaN where there is no token."""
    total = tokens.sum(axis=-1, dtype=np.float64)
    return np.where(total > 0, total, np.nan)


def _mean(tokens: np.ndarray) -> np.ndarray:
    """m, float64 [...], NaN where there is no token."""
    return _total(tokens) / tokens.shape[-1]


def _nats(tokens: np.ndarray) -> np.ndarray:
    """Entropy of p, float64 [...]: ln(sum n) - sum(n ln n) / sum(n), which needs no p."""
    total = _total(tokens)
    return np.log(total) - (tokens * np.log(np.maximum(tokens, 1.0))).sum(axis=-1) / total


def turns(before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Share of experts whose correction bias turns around between two steps, [...].

    The bias rises where the load lies below the mean and falls where it lies above, so it turns
    where the load has crossed the mean. Near 1: it only trembles, and its rate is what limits the
    balance; 0: it is still on its way.
    """
    signs = [np.sign(_mean(counts)[..., None] - counts) for counts in (before, tokens)]
    return np.count_nonzero(signs[0] * signs[1] < 0, axis=-1) / tokens.shape[-1]


def bias_range(bias: np.ndarray) -> np.ndarray:
    """Largest less smallest correction bias of a layer, [...]."""
    return bias.max(axis=-1) - bias.min(axis=-1)


def lorenz(tokens: np.ndarray) -> np.ndarray:
    """Share of the tokens that the k least loaded experts take, [..., E + 1] for k = 0..E."""
    ordered = np.sort(tokens, axis=-1).astype(np.float64)
    total = np.cumsum(ordered, axis=-1)
    shares = total / np.where(total[..., -1:] > 0, total[..., -1:], np.nan)
    return np.concatenate([np.zeros((*tokens.shape[:-1], 1)), shares], axis=-1)


def rank_load(tokens: np.ndarray, ranks: int) -> np.ndarray:
    """Assignments each of ``ranks`` ranks computes, int64 [..., ranks]; rank r = e // (E / ranks).

    Raises:
        ValueError: ``ranks`` does not divide the number of experts.
    """
    experts = tokens.shape[-1]
    if experts % ranks:
        raise ValueError(f"{experts} experts do not divide over {ranks} ranks")
    split = tokens.reshape(*tokens.shape[:-1], ranks, experts // ranks)
    return split.sum(axis=-1, dtype=np.int64)


def imbalance(load: np.ndarray) -> np.ndarray:
    """max / mean over the last axis, [...]; 1: balanced. Of ranks: how much longer all wait."""
    return load.max(axis=-1) / _mean(load)


def replicated_imbalance(tokens: np.ndarray, ranks: int, replicas: int) -> np.ndarray:
    """EPLB what-if: max / mean rank load with ``replicas`` extra copies of hot experts, [L].

    1. Each copy goes to the expert whose load per copy is the largest; copies share it evenly.
    2. The E + replicas slots are placed hottest first, each on the least loaded rank that has room,
       where every rank holds at most ceil((E + replicas) / ranks) slots.
    As DeepSeek's EPLB without its groups and nodes. 0 replicas: the experts are only placed anew.

    Args:
        tokens: [L, E].
        ranks: ranks the slots are placed on.
        replicas: extra slots in a layer, 0 or more.
    """
    layers, experts = tokens.shape
    rows = np.arange(layers)
    copies = np.ones((layers, experts))
    for _ in range(replicas):
        copies[rows, np.argmax(tokens / copies, axis=1)] += 1
    slots = _slots(tokens / copies, copies.astype(np.int64), experts + replicas)
    room = -(-(experts + replicas) // ranks)
    load, held = np.zeros((layers, ranks)), np.zeros((layers, ranks), np.int64)
    for slot in range(experts + replicas):
        rank = np.argmin(np.where(held < room, load, np.inf), axis=1)
        load[rows, rank] += slots[:, slot]
        held[rows, rank] += 1
    return imbalance(load)


@dataclass(frozen=True)
class DeadExpert:
    """An expert in a stretch of logged steps without a token."""

    layer: int
    """Index on the layers' axis."""
    expert: int
    since: int
    """First logged step of the unbroken stretch without tokens."""
    steps: int
    """Logged steps in that stretch."""


class DeadSince:
    """Follows step by step how long each expert has had no token."""

    def __init__(self) -> None:
        self._since: np.ndarray | None = None
        self._count = np.zeros(0, np.int64)
        self._longest_since = np.zeros(0, np.int64)
        self._longest_count = np.zeros(0, np.int64)

    def add(self, step: int, tokens: np.ndarray) -> None:
        """One logged step, [L, E]; steps ascend."""
        if self._since is None or self._since.shape != tokens.shape:
            self._since = np.full(tokens.shape, -1, np.int64)  # of those that are dead now
            self._count = np.zeros(tokens.shape, np.int64)
            self._longest_since = np.full(tokens.shape, -1, np.int64)
            self._longest_count = np.zeros(tokens.shape, np.int64)
        if tokens.all():  # as in most steps
            self._count.fill(0)
            return
        self._count += 1
        self._count *= tokens == 0
        self._since[self._count == 1] = step
        longer = self._count > self._longest_count
        np.copyto(self._longest_since, self._since, where=longer)
        np.copyto(self._longest_count, self._count, where=longer)

    def experts(self, least: int = 1) -> list[DeadExpert]:
        """Those dead now, and for so many steps at least, the longest dead first."""
        if self._since is None or not self._count.any():
            return []
        found = _dead_experts(np.argwhere(self._count >= least), self._since, self._count)
        return sorted(found, key=lambda one: (one.since, one.layer, one.expert))

    def longest(self, most: int) -> list[DeadExpert]:
        """The longest stretches without a token, one for each expert, ended ones included."""
        count = self._longest_count
        order = np.argsort(-count, axis=None, kind="stable")[:most]
        places = np.array(np.unravel_index(order[count.flat[order] > 0], count.shape)).T
        return _dead_experts(places, self._longest_since, count)


def _dead_experts(places: np.ndarray, since: np.ndarray, count: np.ndarray) -> list[DeadExpert]:
    return [
        DeadExpert(int(layer), int(expert), int(since[layer, expert]), int(count[layer, expert]))
        for layer, expert in places
    ]


def _slots(load: np.ndarray, copies: np.ndarray, count: int) -> np.ndarray:
    """Load of every slot, hottest first, [L, count]."""
    rows = [np.repeat(load[layer], copies[layer]) for layer in range(len(load))]
    return -np.sort(-np.array(rows).reshape(len(load), count), axis=1)
