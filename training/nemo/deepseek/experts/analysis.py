"""What the routers of a checkpoint do with texts: read, counted, and turned into figures.

``read_routing`` shows what every router chooses, layer by layer, without training anything;
``RoutingCounts`` adds the choices up in bounded memory; the figures below it are made from counts;
``RoutingAnalysis`` is all figures of all layers as data. ``deepseek experts`` prints it as a table
and writes it as a page (``routing_page.py``) or as JSON. Everything describes: that experts are
specialised does not say that the model is good, nor the reverse.

B batch, S sequence, T real tokens, E experts (N of them), K chosen per token, L layers, G domains,
X counted vocabulary entries, H histogram bins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek.models.components.router import Router, Routing
from deepseek.models.transformer import Transformer
from deepseek.monitoring.load_metrics import max_violation, variation


class LayerRouting(NamedTuple):
    """One router's view of the real tokens of one batch."""

    layer: str
    """Name of the block, as ``layers.3`` or ``mtp.0.block``."""
    tokens_T: np.ndarray
    """int64 ids, in the order of the text."""
    experts_TK: np.ndarray
    """int64 chosen experts, in no particular order."""
    scores_TE: np.ndarray
    """fp32 unbiased scores."""
    choice_TE: np.ndarray
    """fp32 scores that were compared: with the correction bias, -inf outside the chosen groups."""


@torch.no_grad()
def read_routing(
    model: Transformer,
    batches: Iterable[dict[str, np.ndarray]],
    observe: Callable[[LayerRouting], None],
) -> int:
    """Run a text through the model and show every router's choices to ``observe``.

    ``observe`` is called once per batch and MoE block, in order of depth (MTP blocks last), while
    the batch runs: only one layer's choices are ever in memory. Padding is left out. The model is
    not changed, and nothing is counted in it.

    Args:
        model: on any device.
        batches: arrays (B, S) as ``PackedDataset`` makes them: ``tokens``, ``positions``,
            ``documents`` (-1 for padding). Attention stops at the borders of documents if the
            model was trained so (``data.isolate_documents``).
        observe: takes what a router did.

    Returns:
        Real tokens read.
    """
    device = next(model.parameters()).device
    watch = _Watch(observe)
    handles = [
        router.register_forward_hook(watch.hook(name)) for name, router in model.routers().items()
    ]
    read = 0
    try:
        for batch in batches:
            tokens_BS, positions_BS, documents_BS = (
                torch.from_numpy(batch[key]).to(device)
                for key in ("tokens", "positions", "documents")
            )
            real_BS = documents_BS >= 0
            watch.start(tokens_BS, real_BS)
            isolated_BS = documents_BS if model.config.data.isolate_documents else None
            context = model.context(tokens_BS, positions_BS, isolated_BS, real_BS)
            main_BSD = model.main(tokens_BS, context)
            model.predict_ahead(main_BSD, tokens_BS, context)
            read += int(real_BS.sum())
    finally:
        for handle in handles:
            handle.remove()
    return read


class _Watch:
    """Turns what routers return into ``LayerRouting`` of the current batch."""

    def __init__(self, observe: Callable[[LayerRouting], None]) -> None:
        self._observe = observe
        self._tokens_T = np.empty(0, np.int64)
        self._real_T = torch.empty(0)

    def start(self, tokens_BS: Tensor, real_BS: Tensor) -> None:
        """A new batch."""
        self._real_T = real_BS.flatten()
        self._tokens_T = tokens_BS.flatten()[self._real_T].cpu().numpy()

    def hook(self, layer: str) -> Callable[[Router, Any, Routing], None]:
        """A forward hook for the router of ``layer``."""

        def show(router: Router, args: Any, routing: Routing) -> None:
            scores_TE = routing.scores_TE[self._real_T]
            self._observe(
                LayerRouting(
                    layer,
                    self._tokens_T,
                    routing.expert_ids_TK[self._real_T].cpu().numpy(),
                    scores_TE.float().cpu().numpy(),
                    router.choice_scores(scores_TE).float().cpu().numpy(),
                )
            )

        return show


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

    def add(self, domain: int, seen: LayerRouting) -> None:
        """Count what one router chose for some tokens of a domain, given by its number."""
        i = self._index[seen.layer]
        chosen_TE = np.zeros((len(seen.tokens_T), self.num_experts), np.float32)
        np.put_along_axis(chosen_TE, seen.experts_TK, 1.0, axis=1)
        # Sums of ones are exact in fp32 below 2^24 tokens.
        self.pairs_LEE[i] += (chosen_TE.T @ chosen_TE).astype(np.int64)
        self.tokens_LGE[i, domain] += chosen_TE.sum(axis=0, dtype=np.float64).astype(np.int64)
        self.seen_LG[i, domain] += len(seen.tokens_T)
        size = len(self.counted_ids)
        if size:
            place_T = np.searchsorted(self.counted_ids, seen.tokens_T)
            place_T[place_T == size] = 0
            counted_T = self.counted_ids[place_T] == seen.tokens_T
            place_T = place_T[counted_T]
            flat = seen.experts_TK[counted_T] * size + place_T[:, None]
            words = np.bincount(flat.ravel(), minlength=self.num_experts * size)
            self.words_LEX[i] += words.reshape(self.num_experts, size).astype(np.uint32)
            self.seen_LX[i] += np.bincount(place_T, minlength=size)
        self.margins[i].add(router_margin(seen.choice_TE, self.top_k))
        self.best[i].add(seen.scores_TE.max(axis=1))
        self.scores[i].add(seen.scores_TE.ravel())


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


FORMAT = "deepseek-routing/1"
TOP_TOKENS = 8
"""Tokens listed per expert."""
MEANING = (
    "These figures describe what the router does. They do not say how good the model is: experts "
    "can be specialised in a poor model and alike in a good one."
)


@dataclass(frozen=True)
class DomainSize:
    """A text that was read."""

    name: str
    source: str
    tokens: int


@dataclass(frozen=True)
class LayerRoutes:
    """One layer's figures."""

    name: str
    tokens_E: np.ndarray
    """Assignments per expert, over all domains."""
    variation: float
    """sigma / mean of ``tokens_E``."""
    max_violation: float
    """max / mean - 1 of ``tokens_E``."""
    co_activation_EE: np.ndarray
    """``co_activation``."""
    order_E: np.ndarray
    """``cluster_order``."""
    domains_GE: np.ndarray
    """``domain_specialisation``."""
    tokens: list[list[TopToken]]
    """Per expert."""
    top_share: float | None
    """``mean_top_share``."""
    margin: Histogram
    best: Histogram
    scores: Histogram

    @property
    def dead(self) -> int:
        """Experts that no token chose."""
        return int((self.tokens_E == 0).sum())

    @property
    def closest(self) -> tuple[int, int, float]:
        """(i, j, C_ij) of the largest share of one expert's tokens that chose another."""
        apart_EE = np.nan_to_num(self.co_activation_EE, nan=-1.0)
        np.fill_diagonal(apart_EE, -1.0)
        i, j = divmod(int(apart_EE.argmax()), len(apart_EE))
        return i, j, float(apart_EE[i, j])

    @property
    def most_particular(self) -> tuple[int, int, float]:
        """(domain, expert, difference): where a domain's share is furthest above that of all."""
        overall_E = np.nanmean(self.domains_GE, axis=0)
        above_GE = np.nan_to_num(self.domains_GE - overall_E, nan=-1.0)
        domain, expert = divmod(int(above_GE.argmax()), above_GE.shape[1])
        return domain, expert, float(above_GE[domain, expert])


@dataclass(frozen=True)
class Compared:
    """Router saturation against one other checkpoint."""

    name: str
    step: int
    share_L: list[float]
    """Per layer."""


@dataclass(frozen=True)
class RoutingAnalysis:
    """What the routers of one checkpoint do with some texts."""

    name: str
    """The checkpoint, for people."""
    step: int
    num_experts: int
    top_k: int
    domains: list[DomainSize]
    layers: list[LayerRoutes]
    minimum: int
    """Occurrences from which a vocabulary entry is counted."""
    compared: list[Compared]
    """By step; empty if nothing was compared."""
    compared_tokens: int
    """Tokens that the comparison looked at."""
    token_text: Callable[[int], str]
    """Text of a vocabulary entry."""

    @property
    def num_tokens(self) -> int:
        """Tokens read."""
        return sum(domain.tokens for domain in self.domains)

    @property
    def chance(self) -> float:
        """K / N: an expert's share of tokens under balance, and of saturation by chance."""
        return self.top_k / self.num_experts

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data; numbers that do not exist are null."""
        return {
            "format": FORMAT,
            "checkpoint": self.name,
            "step": self.step,
            "experts": self.num_experts,
            "top_k": self.top_k,
            "tokens": self.num_tokens,
            "minimum_occurrences": self.minimum,
            "meaning": MEANING,
            "domains": [
                {"name": d.name, "source": d.source, "tokens": d.tokens} for d in self.domains
            ],
            "layers": [self._layer(layer) for layer in self.layers],
            "saturation": {
                "tokens": self.compared_tokens,
                "against": [
                    {"checkpoint": c.name, "step": c.step, "share": _rounded(c.share_L)}
                    for c in self.compared
                ],
            },
        }

    def _layer(self, layer: LayerRoutes) -> dict[str, Any]:
        return {
            "name": layer.name,
            "load": layer.tokens_E.tolist(),
            "variation": _rounded(layer.variation),
            "max_violation": _rounded(layer.max_violation),
            "co_activation": _rounded(layer.co_activation_EE),
            "cluster_order": layer.order_E.tolist(),
            "domain_share": _rounded(layer.domains_GE),
            "mean_top_share": _rounded(layer.top_share),
            "top_tokens": [
                [
                    {
                        "id": t.token,
                        "text": self.token_text(t.token),
                        "share": _rounded(t.share),
                        "seen": t.seen,
                    }
                    for t in tokens
                ]
                for tokens in layer.tokens
            ],
            "margin": summary(layer.margin),
            "best_score": summary(layer.best),
            "scores": summary(layer.scores),
        }


def layer_routes(counts: RoutingCounts, minimum: int) -> list[LayerRoutes]:
    """The figures of every layer."""
    return [
        LayerRoutes(
            name=name,
            tokens_E=counts.tokens_LGE[i].sum(axis=0),
            variation=float(variation(counts.tokens_LGE[i].sum(axis=0))),
            max_violation=float(max_violation(counts.tokens_LGE[i].sum(axis=0))),
            co_activation_EE=co_activation(counts.pairs_LEE[i]),
            order_E=cluster_order(counts.pairs_LEE[i]),
            domains_GE=domain_specialisation(counts.tokens_LGE[i], counts.seen_LG[i]),
            tokens=top_tokens(
                counts.words_LEX[i], counts.seen_LX[i], counts.counted_ids, minimum, TOP_TOKENS
            ),
            top_share=mean_top_share(counts.words_LEX[i], counts.seen_LX[i], minimum),
            margin=counts.margins[i],
            best=counts.best[i],
            scores=counts.scores[i],
        )
        for i, name in enumerate(counts.layers)
    ]


def summary(histogram: Histogram, bars: int = 40) -> dict[str, Any]:
    """Mean, quantiles and a coarse histogram of what was seen, from 0 to ``upper``."""
    used = np.flatnonzero(histogram.counts_H)
    # Bins of equal width, as few as reach the largest value.
    width = max(1, math.ceil((int(used[-1]) + 1) / bars)) if len(used) else 1
    padded_H = np.zeros(width * bars, np.int64)
    kept = min(len(padded_H), len(histogram.counts_H))
    padded_H[:kept] = histogram.counts_H[:kept]
    return {
        "mean": _rounded(histogram.mean),
        **{
            f"p{round(100 * share)}": _rounded(histogram.quantile(share))
            for share in (0.05, 0.5, 0.95)
        },
        "upper": width * bars / BINS,
        "counts": padded_H.reshape(bars, width).sum(axis=1).tolist(),
    }


def dump(analysis: RoutingAnalysis) -> str:
    """The JSON of ``to_json``."""
    return json.dumps(analysis.to_json(), ensure_ascii=False, separators=(",", ":")) + "\n"


def _rounded(value: float | Sequence[float] | np.ndarray | None) -> Any:
    """Four decimals; JSON has no NaN, so null."""
    if value is None:
        return None
    array = np.asarray(np.round(np.asarray(value, np.float64), 4))
    finite = np.isfinite(array)
    if finite.all():
        return array.tolist()
    known = array.astype(object)
    known[~finite] = None
    return known.tolist()
