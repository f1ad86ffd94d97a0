"""Muon for hidden matrices, AdamW for the rest, as one optimiser.

Sources: Muon, K. Jordan et al. 2024; update scale and weight decay from Moonlight, arXiv:2502.16982
section 2.2. A stack of experts (E, rows, columns) is treated as E matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepseek.parallel.gradients import multiply_gradients
from deepseek.parallel.mesh import local, placed
from deepseek.training.adamw import AdamW

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, chosen to lift small singular values fast."""


class Muon(AdamW):
    """Groups with ``muon=True`` are orthogonalised; the others get AdamW.

    State per parameter: ``momentum_buffer`` for Muon, AdamW's for the others.

    Args:
        groups: parameters, ``weight_decay`` and ``muon``.
        orthogonalise: of a momentum with the shape and the kind of tensor of its parameter; where
            parameters are spread over ranks, one that knows how.
        moments, on_host: as ``AdamW``'s; of the momentum too.
        defaults: of the groups: ``lr``, ``betas``, ``eps``, ``momentum``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        orthogonalise: Callable[[Tensor], Tensor] | None = None,
        moments: torch.dtype | None = None,
        on_host: bool = False,
        **defaults: Any,
    ) -> None:
        self._orthogonalise = orthogonalise or newton_schulz
        defaults = dict(muon=False) | defaults
        super().__init__(groups, moments=moments, on_host=on_host, **defaults)

    def __getstate__(self) -> dict[str, Any]:
        """As AdamW's."""
        return super().__getstate__() | {"_orthogonalise": self._orthogonalise}

    def state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """State of one parameter of a group, zeros at its first step."""
        if not group["muon"]:
            return super().state_of(parameter, group)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = self.room(parameter, self.moments or parameter.dtype)
        return state

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move the parameters of a group."""
        if not group["muon"]:
            super().update(parameters, group)
            return
        multiply_gradients(parameters, group["gradient_factor"])
        kept = [[self.state_of(parameter, group)["momentum_buffer"]] for parameter in parameters]
        for parameter, (momentum,) in zip(parameters, self.at_work(parameters, kept), strict=True):
            self._muon_step(parameter, momentum, group)

    def _muon_step(self, parameter: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        # What goes element by element, on the parts that are here, as AdamW.
        weight, gradient, kept = local(parameter), local(parameter.grad), local(momentum)
        kept.lerp_(gradient, 1 - group["momentum"])
        nesterov = gradient.lerp(kept, group["momentum"])
        update = local(self._orthogonalise(placed(nesterov, parameter)))
        # Moonlight eq 4: the update gets the root mean square that AdamW's typically has
        scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"] * scale)


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
