"""How sure a router is: the margin by which an expert is chosen.

T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from deepseek.models.components.moe import MoE
from deepseek.models.components.router import Router, Routing

MARGIN_TOKENS = 128
"""Tokens whose margins are measured, at most, by each rank in each layer of a recorded step."""


class RouterMargin:
    """How far the last chosen expert lies above the next best one, by what they are chosen by.

    Measured over real tokens of the first micro-batch of a step, evenly spaced: a mean of a
    hundred says enough, and measuring all would cost as much as the routing.

    Args:
        moe: whose router it is.
    """

    def __init__(self, moe: MoE) -> None:
        self._sample: tuple[Tensor, Tensor, Tensor] | None = None
        self._real_T: Tensor | None = None
        self._due = False
        self._seconds = 0.0
        self._handles: list[Any] = []
        if moe.gate.top_k < moe.gate.num_experts:
            self._handles = [
                moe.register_forward_pre_hook(self._note_padding),
                moe.gate.register_forward_hook(self._measure),
            ]

    def measure_next(self) -> None:
        """Measure in the next forward pass."""
        self._due = True
        self._sample = None

    def take(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of some tokens: what they are chosen by (T, E), the experts chosen (T, K), and which of
        them are real (T,); None if nothing was measured."""
        self._due = False
        return self._sample

    def take_seconds(self) -> float:
        """What measuring has cost since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _note_padding(self, module: MoE, args: Any) -> None:
        if self._due:
            real_BS = args[1].real_BS
            self._real_T = None if real_BS is None else real_BS.flatten()

    @torch.no_grad()
    def _measure(self, module: Router, args: Any, routing: Routing) -> None:
        if not self._due:
            return
        self._due = False
        begin = time.perf_counter()
        rows = slice(None, None, -(-len(routing.scores_TE) // MARGIN_TOKENS))
        choice_TE = module.choice_scores(routing.scores_TE[rows])  # with the bias of this step
        real_T = choice_TE.new_ones(len(choice_TE), dtype=torch.bool)
        if self._real_T is not None:
            real_T = self._real_T[rows].clone()
        self._sample = choice_TE, routing.expert_ids_TK[rows].clone(), real_T
        self._real_T = None
        self._seconds += time.perf_counter() - begin


@torch.no_grad()
def sums_of(margins: list[RouterMargin]) -> Tensor:
    """Sum of the margins and number of tokens of each, fp64 (n, 2); all layers at once, since small
    operations cost by their number."""
    found = [margin.take() for margin in margins]
    taken = [(n, *measured) for n, measured in enumerate(found) if measured is not None]
    sums = torch.zeros(len(margins), 2, dtype=torch.float64)
    if not taken:
        return sums
    which, choices, ids, reals = zip(*taken, strict=True)
    choice_TE, ids_TK, real_T = torch.cat(choices), torch.cat(ids), torch.cat(reals)
    last_T = choice_TE.gather(1, ids_TK).amin(dim=1)
    next_T = choice_TE.scatter(1, ids_TK, -torch.inf).amax(dim=1)  # sorting takes longer
    margin_T = (last_T - next_T).double()
    counted_T = margin_T.isfinite() & real_T  # not where a token's groups have no further expert
    values = torch.stack([margin_T.where(counted_T, 0.0), counted_T.double()], dim=1)
    lengths = torch.tensor([len(choice) for choice in choices])
    layer_T = torch.tensor(which).repeat_interleave(lengths).to(values.device)
    return sums.to(values.device).index_add_(0, layer_T, values)
