"""Eight synthetic workloads of routing: which experts the tokens of each step and layer choose.

They are those of the imbalance study in Megatron-LM issue 7488. Every choice is explicit, so a test
can count by hand what a formula computes from counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NAMES = (
    "balanced",
    "hot_set",
    "hot_rank",
    "spread",
    "ragged",
    "zero_expert_rank",
    "rotating",
    "burst",
)


@dataclass(frozen=True)
class Workload:
    """``chosen[step][layer]`` is int64 [T, K]: K distinct experts for each of T tokens."""

    name: str
    chosen: list[list[np.ndarray]]
    experts: int
    top_k: int
    ranks: int

    @property
    def tokens(self) -> np.ndarray:
        """Assignments, uint32 [steps, layers, E]."""
        return np.array(
            [
                [np.bincount(chosen.reshape(-1), minlength=self.experts) for chosen in layers]
                for layers in self.chosen
            ],
            np.uint32,
        )


def workload(
    name: str,
    steps: int = 6,
    layers: int = 3,
    tokens: int = 160,
    experts: int = 16,
    top_k: int = 2,
    ranks: int = 4,
    seed: int = 0,
) -> Workload:
    """One of ``NAMES``; ``tokens`` a step, but for ``ragged``, where their number varies."""
    rng = np.random.default_rng([seed, NAMES.index(name)])
    chosen = []
    for step in range(steps):
        weights = _weights(name, step, steps, experts, ranks)
        count = int(rng.integers(1, 2 * tokens)) if name == "ragged" else tokens
        chosen.append([_choices(rng, weights, count, top_k, name) for _ in range(layers)])
    return Workload(name, chosen, experts, top_k, ranks)


def _weights(name: str, step: int, steps: int, experts: int, ranks: int) -> np.ndarray:
    """How likely each expert is, relative to the others, [E]; 0: never chosen."""
    weights, per_rank = np.ones(experts), experts // ranks
    if name == "hot_set":  # a few neighbours
        weights[: max(2, experts // 8)] = 12
    elif name == "hot_rank":  # all experts of one rank
        weights[per_rank : 2 * per_rank] = 12
    elif name == "spread":  # as many hot ones, one on each rank
        weights[::per_rank] = 12
    elif name == "zero_expert_rank":  # a rank that gets nothing
        weights[-per_rank:] = 0
    elif name == "rotating":  # the hot rank moves on with every step
        hot = step % ranks
        weights[hot * per_rank : (hot + 1) * per_rank] = 12
    elif name == "burst" and step == steps // 2:  # one step collapses
        weights[:] = 0
        weights[:2] = 1
    return weights


def _choices(
    rng: np.random.Generator, weights: np.ndarray, tokens: int, top_k: int, name: str
) -> np.ndarray:
    """Distinct draws in proportion to the weights; ``balanced`` is exactly balanced."""
    experts = len(weights)
    if name == "balanced":
        return (np.arange(tokens * top_k) % experts).reshape(tokens, top_k)
    with np.errstate(divide="ignore"):
        keys = np.log(weights) + rng.gumbel(size=(tokens, experts))
    return np.argsort(-keys, axis=1)[:, :top_k]
