"""The seam through which expert parallelism enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from deepseek.ops.rows import count_rows, expand_rows, inverse_permutation, permute_rows


@dataclass(frozen=True)
class Dispatched:
    """Rows on their way through the local experts."""

    rows_RD: Tensor
    """One row per (token, choice), sorted by local expert."""
    counts_e: Tensor
    """int64 rows per local expert."""
    state: Any
    """What ``combine`` needs to bring results back; opaque to the caller."""


class TokenDispatcher(Protocol):
    """Brings rows to their experts and results back to their tokens."""

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatched:
        """Group the tokens by expert."""
        ...

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Weighted sum of each token's K results, (T, D) in the dtype of ``y``."""
        ...


class LocalDispatcher:
    """All experts on this device: a stable sort by expert, and its inverse."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> Dispatched:
        """Group the tokens by expert."""
        expert_ids_R = expert_ids_TK.flatten()
        order_R = expert_ids_R.argsort(stable=True)
        inverse_R = inverse_permutation(order_R)
        counts_e = count_rows(expert_ids_R, self.num_experts)
        return Dispatched(expand_rows(x_TD, order_R, inverse_R), counts_e, (order_R, inverse_R))

    def combine(self, y_RD: Tensor, weights_TK: Tensor, sent: Dispatched) -> Tensor:
        """Weighted sum of each token's K results."""
        order_R, inverse_R = sent.state
        return weighted_sum(permute_rows(y_RD, inverse_R, order_R), weights_TK)


def weighted_sum(y_RD: Tensor, weights_TK: Tensor) -> Tensor:
    """Rows in token order -> (T, D): sum over K of weight * row, added in the weights' dtype."""
    y_TKD = y_RD.unflatten(0, weights_TK.shape)
    return (y_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(y_RD.dtype)
