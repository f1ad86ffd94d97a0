"""SwiGLU's product of gate and up, with a backward pass of its own: it keeps gate and up alone, and
computes the rest again. On a CPU in one kernel (``native/swiglu.c``), or by operators some rows at
a time, which stay in the caches meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.native.build import kernel
from deepseek.ops.rows import as_rows, row_blocks


def swiglu(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * weights`` (arXiv:2002.05202).

    Args:
        gate, up: (..., F), of one dtype.
        weights: (..., 1), of that dtype or a wider one: of each row; None: 1.

    Returns:
        Shape and dtype of ``gate``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SwiGLU.apply(gate, up, weights)
    return swiglu_slow(gate, up, weights)


def swiglu_slow(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    """Reference implementation of ``swiglu``."""
    hidden = F.silu(gate) * up
    return hidden if weights is None else (hidden * weights).to(gate.dtype)


def swiglu_forward(gate: Tensor, up: Tensor, weights: Tensor | None = None) -> Tensor:
    """``swiglu`` by its kernel; all are contiguous, and plain tensors."""
    hidden, run, width = torch.empty_like(gate), kernel(*_FORWARD), gate.shape[-1]
    assert run is not None, "asked before"
    sizes = gate.numel() // max(width, 1), width
    run(hidden, gate, up, weights, *sizes, torch.get_num_threads())
    return hidden


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    weights: Tensor | None = None,
    makes_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate, up and weights by a kernel, of what ``swiglu_forward`` takes.

    Args:
        grad: of the hidden values, contiguous.
        makes_hidden: ``grad`` becomes the hidden values themselves: nobody has kept them.
    """
    by_gate, by_up, run = torch.empty_like(gate), torch.empty_like(up), kernel(*_BACKWARD)
    assert run is not None, "asked before"
    by_weights, width = None if weights is None else torch.empty_like(weights), gate.shape[-1]
    made, sizes = grad if makes_hidden else None, (gate.numel() // max(width, 1), width)
    threads = torch.get_num_threads()
    run(by_gate, by_up, by_weights, made, grad, gate, up, weights, *sizes, threads)
    return by_gate, by_up, by_weights


_FORWARD, _BACKWARD = ("swiglu", "ppppnnn"), ("swiglu_backward", "ppppppppnnn")
_silu_backward = torch.ops.aten.silu_backward.grad_input


def _kernel(name: str, arguments: str, *given: Tensor | None) -> Callable[..., None] | None:
    tensors = [x for x in given if x is not None]
    return kernel(name, arguments, *tensors) if all(x.is_contiguous() for x in tensors) else None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weights)
        if _kernel(*_FORWARD, gate, up, weights):
            return swiglu_forward(gate, up, weights)
        gate_RF, up_RF = as_rows(gate), as_rows(up)
        hidden_RF = torch.empty_like(gate_RF)
        for rows in row_blocks(gate_RF):
            if weights is None:
                torch.mul(F.silu(gate_RF[rows]), up_RF[rows], out=hidden_RF[rows])
            else:
                silu_rF = F.silu(gate_RF[rows]).mul_(up_RF[rows])
                torch.mul(silu_rF, as_rows(weights)[rows], out=hidden_RF[rows])
        return hidden_RF.view(gate.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weights = ctx.saved_tensors
        if _kernel(*_BACKWARD, gate, up, weights, grad):
            return swiglu_backward(grad, gate, up, weights)
        gate_RF, up_RF, grad_RF = map(as_rows, (gate, up, grad))
        grad_gate, grad_up = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up)
        )
        grad_gate_RF, grad_up_RF = as_rows(grad_gate), as_rows(grad_up)
        weights_R1 = None if weights is None else as_rows(weights)
        grad_weights_R1 = None if weights_R1 is None else torch.empty_like(weights_R1)
        for rows in row_blocks(gate_RF):
            gate_rF, up_rF, grad_rF = gate_RF[rows], up_RF[rows], grad_RF[rows]
            by_silu_rF = grad_rF * up_rF
            by_up_rF = torch.mul(F.silu(gate_rF), grad_rF, out=grad_up_RF[rows])
            if weights_R1 is not None and grad_weights_R1 is not None:
                weights_r1, dtype = weights_R1[rows], weights_R1.dtype
                grad_weights_R1[rows] = (by_up_rF * up_rF).sum(-1, keepdim=True, dtype=dtype)
                for by_rF in (by_silu_rF, by_up_rF):
                    torch.mul(by_rF, weights_r1, out=by_rF)
            _silu_backward(by_silu_rF, gate_rF, grad_input=grad_gate_RF[rows])
        if weights is None or grad_weights_R1 is None:
            return grad_gate, grad_up, None
        return grad_gate, grad_up, grad_weights_R1.view(weights.shape)
