"""The seam through which expert parallelism enters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from deepseek.ops.rows import (
    Room,
    combine_rows,
    expand_rows,
    permute_rows,
    sort_by_expert,
)


@dataclass(frozen=True)
class Dispatched:
    """Rows on their way through the local experts."""

    rows_RD: Tensor
    """One row per (token, choice), sorted by local expert."""
    weights_R: Tensor
    """Routing weight of each row: the experts weigh what they give."""
    counts_e: Tensor
    """int64 rows per local expert."""
    state: Any
    """What ``combine`` needs to bring results back; opaque to the caller."""
    meanwhile: Any = None
    """What the caller has computed while the rows were under way."""


class TokenDispatcher(Protocol):
    """Brings rows to their experts and results back to their tokens.

    Routing weights travel with the rows, so that nothing that comes back is needed again: the way
    back keeps no rows for the backward pass, and is not repeated where activations are recomputed.
    """

    def dispatch(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Dispatched:
        """Group the tokens by expert, and call ``meanwhile`` while they are under way."""
        ...

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """Sum of each token's K weighted results, (T, D) in the dtype of ``y``."""
        ...


class LocalDispatcher:
    """All experts on this device: a stable sort by expert, and its inverse.

    Args:
        num_experts: sizes what is counted.
        room: memory for rows; None: they are given their own.
    """

    def __init__(self, num_experts: int, room: Room | None = None) -> None:
        self.num_experts = num_experts
        self.room = room

    def dispatch(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Dispatched:
        """Group the tokens by expert."""
        order_R, inverse_R, counts_E = sort_by_expert(expert_ids_TK.flatten(), self.num_experts)
        return Dispatched(
            expand_rows(x_TD, order_R, inverse_R, self.room),
            permute_rows(weights_TK.flatten(), order_R, inverse_R),
            counts_E,
            (order_R, inverse_R, expert_ids_TK.shape[1]),
            meanwhile(),
        )

    def combine(self, y_RD: Tensor, sent: Dispatched) -> Tensor:
        """Sum of each token's K weighted results."""
        return combine_rows(y_RD, *sent.state)
