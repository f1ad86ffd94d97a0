"""One linear layer per expert over rows sorted by expert; shapes: ``models/__init__.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.added_gradients import gradient_to_add_to
from deepseek.ops.gradient_rooms import gradient_room
from deepseek.ops.native.build import kernel
from deepseek.ops.noted_squares import squares_to_note
from deepseek.ops.rows import row_starts


def grouped_linear(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """``y[r] = w[e(r)] @ x[r]``, rows sorted by expert, ``counts[e]`` of them for expert ``e``.

    Args:
        x_RI: fp32, bf16, fp16 or fp64; R may be 0, and more than sum(counts).
        w_EOI: stacked weights of the same dtype.
        counts_E: int64 rows per expert; zeros allowed.

    Returns:
        (R, O) in the dtype of ``x``; rows of no expert hold anything, NaN included.
    """
    if torch.compiler.is_compiling():
        return _compiled_linear(x_RI, w_EOI, counts_E)
    if takes_any_counts(x_RI, w_EOI) and fits(x_RI, w_EOI, counts_E):
        return _GroupedLinear.apply(x_RI, w_EOI, row_starts(counts_E, len(x_RI)))
    if x_RI.shape[0] == 0 or not _grouped_mm_takes(w_EOI):
        return grouped_linear_loop(x_RI, w_EOI, counts_E)
    y_RO = F.grouped_mm(x_RI.contiguous(), w_EOI.transpose(-2, -1), offs=_offsets(counts_E))
    if y_RO.requires_grad:
        y_RO.register_hook(Tensor.contiguous)  # grouped_mm refuses an expanded gradient
    return y_RO


def takes_any_counts(*tensors: Tensor) -> bool:
    """Whether a row's product depends on that row alone, however many others its expert has and
    whatever comes before it: so it is with fp32 on CPUs, by kernels (``native/grouped.c``)."""
    taken = kernel(*_FORWARD, *tensors) is not None
    return taken and all(x.dtype == torch.float32 for x in tensors)


def grouped_linear_loop(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Reference implementation of ``grouped_linear``: a loop over experts."""
    # unbind, not w[e]: indexing makes each backward build a full zero gradient of all experts
    counts = counts_E.tolist()
    *owned, rest_RI = x_RI.split([*counts, x_RI.shape[0] - sum(counts)])
    y = [F.linear(x, w) for x, w in zip(owned, w_EOI.unbind(0), strict=True)]
    return torch.cat([*y, rest_RI.new_zeros(rest_RI.shape[0], w_EOI.shape[1])])


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)


def _grouped_mm_takes(w_EOI: Tensor) -> bool:
    """grouped_mm has no fp64, and asks for rows of a multiple of 16 bytes on both sides."""
    row_bytes = (dim * w_EOI.element_size() for dim in w_EOI.shape[1:])
    return w_EOI.dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)


_FORWARD, _TRANSPOSED = ((name, "ppppnnnnn") for name in ("grouped_linear", "grouped_linear_back"))
_OUTER = "grouped_outer", "pppppnnnnn"


def fits(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> bool:
    """Whether shapes, strides and counts are those that kernels go by."""
    if counts_E.dtype != torch.int64:
        return False
    has_strides = w_EOI.is_contiguous() or w_EOI.mT.is_contiguous()
    return has_strides and w_EOI.shape == (*counts_E.shape, w_EOI.shape[1], x_RI.shape[1])


class _GroupedLinear(torch.autograd.Function):
    """By kernels; ``starts`` (E + 1,) is where each expert's rows begin, and where the last end."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, w_EOI: Tensor, starts: Tensor) -> Tensor:
        x_RI = x_RI.contiguous()
        ctx.save_for_backward(x_RI, w_EOI, starts)
        return product(x_RI, w_EOI, starts)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, w_EOI, starts = ctx.saved_tensors
        grad_RO, (needs_x, needs_w, _) = grad_RO.contiguous(), ctx.needs_input_grad
        grad_RI = product(grad_RO, w_EOI.mT, starts) if needs_x else None
        return grad_RI, stack_gradient(w_EOI, grad_RO, x_RI, starts) if needs_w else None, None


def product(
    x_RI: Tensor, w_EOI: Tensor, starts: Tensor, into_RO: Tensor | None = None, adds: bool = False
) -> Tensor:
    """Rows and their experts' matrices, by kernels.

    Args:
        x_RI: contiguous.
        w_EOI: contiguous, or its transpose is.
        starts: see ``row_starts``.
        into_RO: memory for the result; None: new one.
        adds: to what is there.
    """
    experts, outputs, inputs = w_EOI.shape
    y_RO = x_RI.new_empty(len(x_RI), outputs) if into_RO is None else into_RO
    name, w, sizes = _FORWARD, w_EOI, (experts, outputs, inputs)
    if not w_EOI.is_contiguous():
        name, w, sizes = _TRANSPOSED, w_EOI.mT, (experts, inputs, outputs)
    run = kernel(*name)
    assert run is not None, "asked before"
    run(y_RO, x_RI, w, starts, *sizes, adds, torch.get_num_threads())
    return y_RO


def stack_gradient(
    w_EOI: Tensor, grad_RO: Tensor, x_RI: Tensor, starts: Tensor, kept: Tensor | None = None
) -> Tensor | None:
    """Gradient of a stack for autograd, by a kernel; None: it has been added to ``w.grad``.
    ``kept`` of the caller may lie where it comes to lie, see ``gradient_room``."""
    added_EOI, run = gradient_to_add_to(w_EOI), kernel(*_OUTER)
    assert run is not None, "asked before"
    adds = added_EOI is not None
    grad_EOI = added_EOI if adds else gradient_room(w_EOI, kept)
    sizes = len(starts) - 1, grad_RO.shape[1], x_RI.shape[1]
    squares_EC = None if grad_EOI is None else squares_to_note(w_EOI, grad_EOI, adds)
    if grad_EOI is None:
        grad_EOI = x_RI.new_empty(sizes)
    run(grad_EOI, squares_EC, grad_RO, x_RI, starts, *sizes, adds, torch.get_num_threads())
    return None if adds else grad_EOI


# -- for the compiler: one operator without insides, since its shape check of grouped_mm refuses
# dtypes that eager runs, and a loop over counts has no shapes --


@torch.library.custom_op("deepseek::grouped_linear", mutates_args=())
def _compiled_linear(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return grouped_linear(x_RI, w_EOI, counts_E)


@_compiled_linear.register_fake
def _(x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])


@torch.library.custom_op("deepseek::grouped_outer", mutates_args=())
def grouped_outer(grad_RO: Tensor, x_RI: Tensor, counts_E: Tensor) -> Tensor:
    """``grad[rows of e].T @ x[rows of e]`` for each expert, the gradient of a stack: (E, O, I)."""
    w_EOI = x_RI.new_empty(counts_E.shape[0], grad_RO.shape[1], x_RI.shape[1])
    if x_RI.shape[0] and _grouped_mm_takes(w_EOI):
        return F.grouped_mm(grad_RO.t(), x_RI.contiguous(), offs=_offsets(counts_E))
    end = 0
    for index, count in enumerate(counts_E.tolist()):
        start, end = end, end + count
        torch.mm(grad_RO[start:end].t(), x_RI[start:end], out=w_EOI[index])
    return w_EOI


@grouped_outer.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, counts_E: Tensor) -> Tensor:
    return x_RI.new_empty(counts_E.shape[0], grad_RO.shape[1], x_RI.shape[1])


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RI, w_EOI, counts_E = ctx.saved_tensors
    needs_x, needs_w, _ = ctx.needs_input_grad
    grad_RO = grad_RO.contiguous()
    return (
        _compiled_linear(grad_RO, w_EOI.mT, counts_E) if needs_x else None,
        grouped_outer(grad_RO, x_RI, counts_E) if needs_w else None,
        None,
    )


_compiled_linear.register_autograd(_backward, setup_context=_remember)
