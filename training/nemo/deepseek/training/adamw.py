"""AdamW whose moments may take fewer bytes than its parameters.

torch's keeps them in the parameters' dtype. DeepSeek-V3 was trained with bf16 moments
(arXiv:2412.19437 section 3.3.3): 4 bytes a parameter instead of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW(torch.optim.Optimizer):
    """Computes in the parameters' dtype, whatever the moments are kept in.

    State per parameter: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Args:
        groups: parameters and ``weight_decay``.
        moments: dtype of what is kept; None: the parameters'.
        defaults: of the groups: ``lr``, ``betas``, ``eps``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        moments: torch.dtype | None = None,
        **defaults: Any,
    ) -> None:
        self.moments = moments
        super().__init__(groups, dict(weight_decay=0.0) | defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self.update(parameters, group)
        return loss

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move the parameters of a group; in one call, or with smaller moments one by one, so that
        moments of one parameter at a time are as large as it."""
        states = [self.state_of(p) for p in parameters]
        if self.moments is None:
            moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
            self._adamw(parameters, moments, [state["step"] for state in states], group)
            return
        for parameter, state in zip(parameters, states, strict=True):
            kept = state["exp_avg"], state["exp_avg_sq"]
            first, second = (moment.to(parameter.dtype) for moment in kept)
            self._adamw([parameter], [(first, second)], [state["step"]], group)
            kept[0].copy_(first)
            kept[1].copy_(second)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of one parameter, zeros at its first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.moments)
        return state

    def _adamw(
        self,
        parameters: list[Tensor],
        moments: list[tuple[Tensor, Tensor]],
        steps: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [first for first, _ in moments],
            [second for _, second in moments],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
