"""The routing analysis of a checkpoint: every figure of every layer, as data.

``deepseek experts`` prints it as a table and writes it as a page (``routing_page.py``) or as JSON.

E experts, G domains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek.experts import routing_metrics as metrics
from deepseek.experts.routing_metrics import Histogram, RoutingCounts
from deepseek.monitoring.load_metrics import max_violation, variation

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
    """``routing_metrics.co_activation``."""
    order_E: np.ndarray
    """``routing_metrics.cluster_order``."""
    domains_GE: np.ndarray
    """``routing_metrics.domain_specialisation``."""
    tokens: list[list[metrics.TopToken]]
    """Per expert."""
    top_share: float | None
    """``routing_metrics.mean_top_share``."""
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
            co_activation_EE=metrics.co_activation(counts.pairs_LEE[i]),
            order_E=metrics.cluster_order(counts.pairs_LEE[i]),
            domains_GE=metrics.domain_specialisation(counts.tokens_LGE[i], counts.seen_LG[i]),
            tokens=metrics.top_tokens(
                counts.words_LEX[i], counts.seen_LX[i], counts.counted_ids, minimum, TOP_TOKENS
            ),
            top_share=metrics.mean_top_share(counts.words_LEX[i], counts.seen_LX[i], minimum),
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
        "upper": width * bars / metrics.BINS,
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
