"""What the routers of a checkpoint do with a text, in counts, and the figures made from them.

``RoutingCounts`` adds up one layer's choices after the other in bounded memory; the functions below
it turn counts into figures. All of them describe: that experts are specialised does not say that
the model is good, nor the reverse.

N experts, K chosen per token. L layers, T tokens, E = N, G domains, X counted vocabulary entries,
H histogram bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINS = 1000
"""Bins of the histograms of scores and margins, over 0 to 1."""


class RoutingCounts:
    """Sums over the tokens of a text; memory is 8 L E (E + G) + 4 L E X bytes, whatever T is.

    Args:
        layers: names, in order of depth.
        num_experts: N.
        top_k: K.
        num_domains: G.
        counted_ids: the vocabulary entries whose experts are counted, X different ids.

    Attributes:
        tokens_LGE: assignments per domain.
        pairs_LEE: tokens that chose both experts; on the diagonal, tokens that chose the one.
        words_LEX: assignments of each counted vocabulary entry.
        seen_LG: tokens per domain.
        seen_LX: occurrences of each counted entry.
        margins: histograms of ``router_margin``.
        best: histograms of the highest score of each token.
        scores: histograms of all unbiased scores.
    """

    def __init__(
        self,
        layers: Sequence[str],
        num_experts: int,
        top_k: int,
        num_domains: int,
        counted_ids: np.ndarray,
    ) -> None:
        count = len(layers)
        self.layers = list(layers)
        self.num_experts, self.top_k = num_experts, top_k
        self.counted_ids = np.unique(counted_ids)
        size = len(self.counted_ids)
        self.tokens_LGE = np.zeros((count, num_domains, num_experts), np.int64)
        self.pairs_LEE = np.zeros((count, num_experts, num_experts), np.int64)
        self.words_LEX = np.zeros((count, num_experts, size), np.uint32)
        self.seen_LG = np.zeros((count, num_domains), np.int64)
        self.seen_LX = np.zeros((count, size), np.int64)
        self.margins = [Histogram() for _ in layers]
        self.best = [Histogram() for _ in layers]
        self.scores = [Histogram() for _ in layers]
        self._index = {name: i for i, name in enumerate(layers)}

    def add(
        self,
        layer: str,
        domain: int,
        tokens_T: np.ndarray,
        experts_TK: np.ndarray,
        scores_TE: np.ndarray,
        choice_TE: np.ndarray,
    ) -> None:
        """Count some tokens of one layer.

        Args:
            layer: its name.
            domain: number of the domain they belong to.
            tokens_T: vocabulary ids.
            experts_TK: chosen experts, each once per token.
            scores_TE: unbiased scores.
            choice_TE: scores as compared by the router: with bias, -inf where not eligible.
        """
        i = self._index[layer]
        chosen_TE = np.zeros((len(tokens_T), self.num_experts), np.float32)
        np.put_along_axis(chosen_TE, experts_TK, 1.0, axis=1)
        # Sums of ones are exact in fp32 below 2^24 tokens.
        self.pairs_LEE[i] += (chosen_TE.T @ chosen_TE).astype(np.int64)
        self.tokens_LGE[i, domain] += chosen_TE.sum(axis=0, dtype=np.float64).astype(np.int64)
        self.seen_LG[i, domain] += len(tokens_T)
        size = len(self.counted_ids)
        if size:
            place_T = np.searchsorted(self.counted_ids, tokens_T)
            place_T[place_T == size] = 0
            counted_T = self.counted_ids[place_T] == tokens_T
            place_T = place_T[counted_T]
            flat = experts_TK[counted_T] * size + place_T[:, None]
            words = np.bincount(flat.ravel(), minlength=self.num_experts * size)
            self.words_LEX[i] += words.reshape(self.num_experts, size).astype(np.uint32)
            self.seen_LX[i] += np.bincount(place_T, minlength=size)
        self.margins[i].add(router_margin(choice_TE, self.top_k))
        self.best[i].add(scores_TE.max(axis=1))
        self.scores[i].add(scores_TE.ravel())


class Histogram:
    """Counts over 0 to 1 in ``BINS`` equal bins; values outside fall into the outermost."""

    def __init__(self) -> None:
        self.counts_H = np.zeros(BINS, np.int64)
        self.total = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count the finite ones."""
        finite = np.isfinite(values)
        if not finite.all():
            values = values[finite]
        places = np.clip(values * values.dtype.type(BINS), 0, BINS - 1).astype(np.int32)
        self.counts_H += np.bincount(places, minlength=BINS)
        self.total += float(values.sum(dtype=np.float64))

    @property
    def mean(self) -> float | None:
        """None without values."""
        count = int(self.counts_H.sum())
        return self.total / count if count else None

    def quantile(self, share: float) -> float | None:
        """Upper edge of the bin below which ``share`` of the values lie; None without values."""
        cumulated_H = np.cumsum(self.counts_H)
        if not cumulated_H[-1]:
            return None
        return (int(np.searchsorted(cumulated_H, share * cumulated_H[-1])) + 1) / BINS


class KeptChoices:
    """The choices for the first tokens of a text, to compare other checkpoints with.

    Args:
        limit: tokens kept per domain; memory is 2 K bytes a token and layer.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[tuple[str, int], list[np.ndarray]] = {}

    def add(self, layer: str, domain: int, experts_TK: np.ndarray) -> None:
        """Keep what is still below the limit."""
        parts = self._kept.setdefault((layer, domain), [])
        left = self.limit - sum(map(len, parts))
        if left > 0:
            parts.append(experts_TK[:left].astype(np.uint16))

    def of(self, layer: str, domain: int) -> np.ndarray:
        """(T, K) choices of one layer, in the order of the text."""
        return np.concatenate(self._kept[layer, domain])


# -- figures --


def co_activation(pairs_EE: np.ndarray) -> np.ndarray:
    """C_ij = N_ij / N_i: of the tokens that chose expert i, the share that also chose j.

    Over all pairs, not only neighbours in the list of chosen experts. Not symmetric; 1 on the
    diagonal, NaN in the rows of experts that were never chosen. Chance: (K - 1) / (N - 1).
    """
    chosen_E = np.diag(pairs_EE).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return pairs_EE / np.where(chosen_E > 0, chosen_E, np.nan)[:, None]


def cluster_order(pairs_EE: np.ndarray) -> np.ndarray:
    """The experts in an order in which those chosen together stand together.

    Average-linkage clustering of the overlap N_ij / sqrt(N_i N_j) (the cosine of two experts' sets
    of tokens); each merge places the two clusters so that their likest ends touch.
    """
    size = len(pairs_EE)
    chosen_E = np.maximum(np.diag(pairs_EE), 1).astype(np.float64)
    overlap_EE = pairs_EE / np.sqrt(chosen_E[:, None] * chosen_E[None, :])
    likeness_EE = overlap_EE.copy()
    np.fill_diagonal(likeness_EE, -1.0)
    clusters = {e: [e] for e in range(size)}
    while len(clusters) > 1:
        a, b = divmod(int(likeness_EE.argmax()), size)
        left, right = clusters[a], clusters.pop(b)
        joined = (len(left) * likeness_EE[a] + len(right) * likeness_EE[b]) / (
            len(left) + len(right)
        )
        turned = [
            (overlap_EE[first[-1], second[0]], first + second)
            for first in (left, left[::-1])
            for second in (right, right[::-1])
        ]
        clusters[a] = max(turned, key=lambda pair: pair[0])[1]
        gone = likeness_EE[a] < 0
        likeness_EE[a] = np.where(gone, -1.0, joined)
        likeness_EE[:, a] = likeness_EE[a]
        likeness_EE[b], likeness_EE[:, b] = -1.0, -1.0
        likeness_EE[a, a] = -1.0
    return np.array(next(iter(clusters.values())), np.int64)


def domain_specialisation(tokens_GE: np.ndarray, seen_G: np.ndarray) -> np.ndarray:
    """N_{e,D} / N_D: of the tokens of domain D, the share that chose expert e; (G, E).

    Each row sums to K; a router that ignores domains gives equal rows, one that is balanced too
    gives K / N everywhere. NaN for a domain without tokens.
    """
    with np.errstate(invalid="ignore"):
        return tokens_GE / np.where(seen_G > 0, seen_G, np.nan)[:, None]


def vocabulary_specialisation(words_EX: np.ndarray, seen_X: np.ndarray) -> np.ndarray:
    """N_{e,x} / N_x: of the occurrences of token x, the share that chose expert e; (E, X)."""
    with np.errstate(invalid="ignore"):
        return words_EX / np.where(seen_X > 0, seen_X, np.nan)[None, :]


class TopToken(NamedTuple):
    """A vocabulary entry as one expert sees it."""

    token: int
    share: float
    """Of its occurrences that chose the expert."""
    seen: int
    """Its occurrences."""


def top_tokens(
    words_EX: np.ndarray,
    seen_X: np.ndarray,
    counted_ids: np.ndarray,
    minimum: int,
    count: int,
) -> list[list[TopToken]]:
    """Per expert the ``count`` tokens with the highest share, among those seen ``minimum`` times.

    Of equal shares the token seen more often comes first, then the smaller id. Tokens that never
    chose the expert are left out.
    """
    known_X = np.flatnonzero(seen_X >= max(1, minimum))
    share_EX = vocabulary_specialisation(words_EX[:, known_X], seen_X[known_X])
    found = []
    for share_X in share_EX:
        order = np.lexsort((counted_ids[known_X], -seen_X[known_X], -share_X))[:count]
        found.append(
            [
                TopToken(int(counted_ids[known_X[x]]), float(share_X[x]), int(seen_X[known_X[x]]))
                for x in order
                if share_X[x] > 0
            ]
        )
    return found


def mean_top_share(words_EX: np.ndarray, seen_X: np.ndarray, minimum: int) -> float | None:
    """Mean over tokens of the share of occurrences that chose the token's favourite expert.

    1 if every token always meets one same expert; K / N for a router blind to tokens, and somewhat
    more where tokens are few. None if no token was seen ``minimum`` times.
    """
    known_X = seen_X >= max(1, minimum)
    if not known_X.any():
        return None
    return float(
        vocabulary_specialisation(words_EX[:, known_X], seen_X[known_X]).max(axis=0).mean()
    )


def saturation(experts_TK: np.ndarray, others_TK: np.ndarray) -> float:
    """(1/T) sum over tokens of |E_t and E'_t| / K: how much of the choice two routers share.

    1: the same choices; by chance K / N.
    """
    both = (experts_TK[:, :, None] == others_TK[:, None, :]).sum()
    return float(both / experts_TK.size)


def router_margin(choice_TE: np.ndarray, top_k: int) -> np.ndarray:
    """s_(K) - s_(K+1) per token: how much the weakest chosen expert leads the best one left out.

    (T,); NaN where no other expert was eligible (-inf) or there is none.
    """
    if top_k >= choice_TE.shape[1]:
        return np.full(len(choice_TE), np.nan)
    place = choice_TE.shape[1] - top_k
    sorted_TE = np.partition(choice_TE, (place - 1, place), axis=1)
    margin_T = sorted_TE[:, place].astype(np.float64) - sorted_TE[:, place - 1]
    return np.where(np.isfinite(margin_T), margin_T, np.nan)


def mean_saturation(one: KeptChoices, other: KeptChoices, layer: str, domains: int) -> float:
    """``saturation`` of a layer over all tokens of both, which must be the same text."""
    pairs = [(one.of(layer, g), other.of(layer, g)) for g in range(domains)]
    total = sum(len(mine) for mine, _ in pairs)
    return sum(saturation(mine, theirs) * len(mine) for mine, theirs in pairs) / total
