"""Muon for hidden matrices, AdamW for the rest, as one optimiser.

Sources: Muon, K. Jordan et al. 2024; update scale and weight decay from Moonlight, arXiv:2502.16982
section 2.2. A stack of experts (E, rows, columns) is treated as E matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen to lift small singular values fast."""


class Muon(torch.optim.Optimizer):
    """Groups with ``muon=True`` are orthogonalised; the others get AdamW.

    State per parameter: ``momentum_buffer`` for Muon; ``step``, ``exp_avg``, ``exp_avg_sq`` for
    AdamW.

    Args:
        groups: parameters, ``weight_decay`` and ``muon``.
        orthogonalise: of a momentum with the shape and the kind of tensor of its parameter; where
            parameters are spread over ranks, one that knows how.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        orthogonalise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._orthogonalise = orthogonalise or newton_schulz
        defaults = dict(
            lr=lr, betas=betas, eps=eps, momentum=momentum, weight_decay=0.0, muon=False
        )
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for parameter in parameters:
                    self._muon_step(parameter, group)
            elif parameters:
                self._adamw_step(parameters, group)
        return loss

    def init_state(self, parameter: Tensor, muon: bool) -> dict[str, Tensor]:
        """Zero state of one parameter, made at its first step or before a checkpoint is loaded."""
        state = self.state[parameter]
        if not state:
            if muon:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            else:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _muon_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        momentum = self.init_state(parameter, muon=True)["momentum_buffer"]
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        nesterov = parameter.grad.lerp(momentum, group["momentum"])
        update = self._orthogonalise(nesterov)
        # Moonlight eq 4: the update gets the root mean square that AdamW's typically has
        scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.init_state(p, muon=False) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Near-orthogonal matrix of the same singular vectors, by Newton-Schulz iteration.

    Args:
        g: (..., rows, columns).
        steps: iterations; 5 bring the singular values into about 0.7 to 1.2.

    Returns:
        Same shape; bf16 on a GPU, fp32 on a CPU (whose bf16 products are slow), fp64 for fp64.
    """
    a, b, c = NEWTON_SCHULZ
    x = g if g.dtype == torch.float64 else (g.bfloat16() if g.is_cuda else g.float())
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
