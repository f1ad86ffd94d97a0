"""AdamW whose moments may take fewer bytes than its parameters, and may lie on the host.

torch's keeps them in the parameters' dtype, on their device; so does this one, if not asked for
more, and computes what torch's fused one does. DeepSeek-V3 was trained with bf16
moments (arXiv:2412.19437 section 3.3.3): 4 bytes a parameter instead of 8.

Clipping is part of the update: gradients count ``gradient_factor`` times. A kernel multiplies them
as it reads them, where a pass before it would read and write all of them once more.

On the host they visit the device one parameter at a time, so that every update is computed where it
was before, and is the same: 16 bytes go to and fro for each parameter (8 of bf16 moments). On a GPU
those of the next parameter travel beside the update of this one, on a stream of their own and from
pinned memory (no GPU has run it yet); on a CPU they are plain copies.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from deepseek.config.errors import UserError
from deepseek.models.components.offload import aside, copy_stream
from deepseek.ops.native.addresses import addresses
from deepseek.ops.native.build import kernel
from deepseek.parallel.gradients import multiply_gradients
from deepseek.parallel.mesh import local, placed


class AdamW(torch.optim.Optimizer):
    """Computes in the parameters' dtype, whatever the moments are kept in.

    State per parameter: ``step``, ``exp_avg``, ``exp_avg_sq``. Each group has a
    ``gradient_factor``, by which its gradients are multiplied in the next update alone; what is in
    ``grad`` afterwards may be multiplied or not.

    Args:
        groups: parameters and ``weight_decay``.
        moments: dtype of what is kept; None: the parameters'.
        on_host: what is kept, but ``step``, lies in the host's memory.
        defaults: of the groups: ``lr``, ``betas``, ``eps``.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        moments: torch.dtype | None = None,
        on_host: bool = False,
        **defaults: Any,
    ) -> None:
        self.moments, self.on_host = moments, on_host
        super().__init__(groups, dict(weight_decay=0.0, gradient_factor=1.0) | defaults)

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made of; torch's knows nothing of these two."""
        return super().__getstate__() | {"moments": self.moments, "on_host": self.on_host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What ``load_state_dict`` ends with; groups that others saved have no factor."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["gradient_factor"] = 1.0

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
            group["gradient_factor"] = 1.0
        return loss

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move the parameters of a group; in one call, or with moments that are kept otherwise (and
        without a kernel) one by one, so that those of few at a time are as large as parameters."""
        names, states = ("exp_avg", "exp_avg_sq"), [self.state_of(p, group) for p in parameters]
        steps = [state["step"] for state in states]
        kept = [[state[name] for name in names] for state in states]
        must_fit(parameters, kept)
        if self.moments is None and not self.on_host:
            self._adamw(parameters, kept, steps, group)
            return
        if not self.on_host and adamw_kernel(parameters, kept, steps, group):
            return
        for parameter, step, (first, second) in zip(
            parameters, steps, self.at_work(parameters, kept), strict=True
        ):
            self._adamw([parameter], [[first, second]], [step], group)

    def make_room(self) -> None:
        """State of every parameter. A CPU's should be made before the first forward pass: behind
        it they lie between freed activations, whose memory then stays in pieces that no gradient
        fits in."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state_of(parameter, group)

    def state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """State of one parameter of a group, zeros at its first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = self.room(parameter, self.moments or parameter.dtype)
        return state

    def room(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros where what is kept of a parameter lies, divided over ranks as it is."""
        part = local(parameter)
        if not self.on_host:
            return placed(torch.zeros_like(part, dtype=dtype, requires_grad=False), parameter)
        zeros = torch.zeros(part.shape, dtype=dtype, device="cpu", pin_memory=part.is_cuda)
        return placed(zeros, parameter)

    def at_work(
        self, parameters: list[Tensor], kept: list[list[Tensor]]
    ) -> Iterator[tuple[Tensor, ...]]:
        """What is kept of each parameter, as it computes with it: on its device, in its dtype. What
        the caller has made of it when it asks for the next is kept."""
        coming = _Visit(parameters[0], kept[0], self.on_host)
        for index in range(len(parameters)):
            visit = coming
            here = visit.arrive()
            if index + 1 < len(parameters):
                coming = _Visit(parameters[index + 1], kept[index + 1], self.on_host)
            yield here
            visit.go_home()
        if self.on_host and parameters[0].is_cuda:  # a checkpoint may read them next
            copy_stream(parameters[0].device).synchronize()

    def _adamw(
        self,
        parameters: list[Tensor],
        moments: list[list[Tensor]],
        steps: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        if adamw_kernel(parameters, moments, steps, group):
            return
        multiply_gradients(parameters, group["gradient_factor"])
        # Element by element, so on the parts that are here: how a call is divided over ranks takes
        # DTensor longer to find than a small model its step.
        weights = [local(p) for p in parameters]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        firsts, seconds = ([local(x) for x in moment] for moment in zip(*moments, strict=True))
        # torch's fused one takes numbers as they lie, in whatever order these are of each.
        of_four = zip(weights, gradients, firsts, seconds, strict=True)
        alike = all(len({x.stride() for x in each}) == 1 for each in of_four)
        adamw(
            weights,
            gradients,
            firsts,
            seconds,
            [],
            steps,
            fused=alike,
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def must_fit(parameters: list[Tensor], moments: list[list[Tensor]]) -> None:
    """Kernels, torch's too, are told one size, the parameter's, and would write behind what is
    smaller.

    Raises:
        UserError: a gradient or a moment is not as large as its parameter.
    """
    for index, (parameter, kept) in enumerate(zip(parameters, moments, strict=True)):
        size = local(parameter).shape
        for name, x in zip(("grad", "exp_avg", "exp_avg_sq"), (parameter.grad, *kept), strict=True):
            if x is not None and local(x).shape != size:
                raise UserError(
                    f"AdamW: {name} of parameter {index} of its group is {list(local(x).shape)}, "
                    f"the parameter {list(size)}: the state is one of other parameters, or of "
                    "these in another order, or the parameter was replaced; load the state of "
                    "these parameters, or make a new optimizer"
                )


def adamw_kernel(
    parameters: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    group: dict[str, Any],
) -> bool:
    """On a CPU one call for all parameters, where torch makes several for each, small as they may
    be. False: they are not such, and nothing is done."""
    run, kept = kernel("adamw", "pppndddddfnn"), moments[0][0].dtype
    if run is None or isinstance(group["lr"], Tensor) or kept not in _KEPT:
        return False
    here = [local(p) for p in parameters]
    gradients = (local(p.grad) for p in parameters if p.grad is not None)
    tables = [addresses(here, torch.float32), addresses(gradients, torch.float32)]
    tables += [addresses(map(local, moment), kept) for moment in zip(*moments, strict=True)]
    tables.append(addresses(steps, torch.float32))
    found = [table for table in tables if table is not None]
    if len(found) < len(tables):
        return False
    *of_four, counted = found
    given = sum(of_four, array("q")), counted, array("q", [x.numel() for x in here])
    settings = group["lr"], *group["betas"], group["eps"], group["weight_decay"]
    halves, threads = kept == torch.bfloat16, torch.get_num_threads()
    lie_at = [table.buffer_info()[0] for table in given]
    run(*lie_at, len(here), *settings, group["gradient_factor"], halves, threads)
    return True


_KEPT = torch.float32, torch.bfloat16
"""Dtypes of moments that the kernel takes."""


class _Visit:
    """States of one parameter on their way to its update, and home."""

    def __init__(self, parameter: Tensor, kept: list[Tensor], travels: bool) -> None:
        self._parameter, self._kept, self._travels = parameter, kept, travels
        self._there, self._device = [local(tensor) for tensor in kept], local(parameter).device
        self._event: torch.cuda.Event | None = None
        self._here, self._used = self._there, list[Tensor]()
        if travels:
            with aside(self._device):
                self._here = [self._copied(tensor) for tensor in self._there]
                if self._device.type == "cuda":
                    self._event = torch.cuda.current_stream(self._device).record_event()

    def arrive(self) -> tuple[Tensor, ...]:
        """The states, to be changed in place."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._event)
            for tensor in self._here:
                tensor.record_stream(current)
        self._used = [tensor.to(self._parameter.dtype) for tensor in self._here]
        return tuple(placed(tensor, self._parameter) for tensor in self._used)

    def go_home(self) -> None:
        """Keep what has become of them."""
        for here, used in zip(self._here, self._used, strict=True):
            if here is not used:
                here.copy_(used)  # rounded where it was computed
        if self._travels:
            with aside(self._device):
                for there, here in zip(self._there, self._here, strict=True):
                    there.copy_(here, non_blocking=True)
                    if self._device.type == "cuda":
                        here.record_stream(copy_stream(self._device))

    def _copied(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self._device).copy_(tensor, non_blocking=True)
