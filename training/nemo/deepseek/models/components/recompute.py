"""Recomputation: a block forgets its activations and makes them again in the backward pass.

What is kept of the forward pass is a policy:

| granularity | kept, beside the block's input                                                     |
| ----------- | ---------------------------------------------------------------------------------- |
| full        | decisions: chosen experts, the order of rows, sizes of what is exchanged           |
| selective   | these, rows that have come from other ranks, attention's result, and products over |
|             | the width of the model or more                                                     |

So ``selective`` makes norms, the up-projections of latents, rotations and SwiGLU again, as V3
does (arXiv:2412.19437 section 3.2.3): few operations for many bytes. A number of a product costs as
many multiplications as its inner dim is wide; latents and experts' hidden values are narrow.

Decisions are kept for another reason too: what has been exchanged must fit what is exchanged in the
backward pass, whether or not a router decides alike twice; and the host need not wait for sizes
once more. Nothing behind the experts' last product is made again: its backward pass needs nothing.

``selective`` sees the operators of torch. What our kernels compute in fp32 on CPUs, attention and
the experts' products, is made again as in ``full``; the last of these products, too, since the
experts are one node of the graph there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# The profiler's marks: FSDP makes more of them, for units inside a block, when it is recomputed.
SAC_IGNORED_OPS.update(
    {
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)

T = TypeVar("T")

_aten = torch.ops.aten
ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Kernels of attention, whose results ``selective`` keeps."""
PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten._grouped_mm.default: 0}
"""Matrix products, and which of their arguments is the left factor."""


def keep(compute: Callable[[], T], rows: bool = False) -> T:
    """``compute()``; in a recomputation what it gave the first time. Its result has no gradient.

    Args:
        compute: the same call at the same place in both passes.
        rows: many bytes, which ``full`` does not keep.
    """
    if torch.compiler.is_compiling():  # which decides by itself what it keeps
        return compute()
    running: _Pass | None = getattr(_here, "running", None)
    if running is None or (rows and not running.keeps_rows):
        return compute()
    return running.keep(compute)


def recomputed(module: nn.Module, granularity: str, width: int, *args: object) -> Tensor:
    """``module(*args)``, whose activations are made again in the backward pass.

    Args:
        module: a block.
        granularity: ``full`` or ``selective``.
        width: of the model: ``selective`` keeps products over as many numbers or more.
        args: of the module.
    """
    selective = granularity == "selective"

    def contexts() -> tuple[_Pass, _Pass]:
        kept: list[Any] = []
        if not selective:
            return _Pass(kept, False), _Pass(kept, False, again=True)
        first, second = create_selective_checkpoint_contexts(partial(_policy, width))
        return _Pass(kept, True, first), _Pass(kept, True, second, again=True)

    # No state of random numbers: nothing in a block draws any.
    return checkpoint(
        module, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
    )


class _Pass(AbstractContextManager[None]):
    """The first pass through a block, which keeps results, or another one, which takes them.

    Args:
        kept: results in the order of the calls, shared by the passes.
        keeps_rows: or only decisions.
        inner: entered with it.
        again: not the first.
    """

    def __init__(
        self,
        kept: list[Any],
        keeps_rows: bool,
        inner: AbstractContextManager[Any] | None = None,
        again: bool = False,
    ) -> None:
        self.kept, self.keeps_rows, self.again = kept, keeps_rows, again
        self.inner = inner or nullcontext()
        self.taken = 0
        self.outer: _Pass | None = None

    def __enter__(self) -> None:
        self.taken, self.outer = 0, getattr(_here, "running", None)
        _here.running = self
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        _here.running = self.outer

    def keep(self, compute: Callable[[], T]) -> T:
        """The next result."""
        if not self.again:
            self.kept.append(compute())
            return self.kept[-1]
        self.taken += 1
        return self.kept[self.taken - 1]


_here = threading.local()
"""``running``: the pass of this thread; the backward pass of a GPU has a thread of its own."""


def _policy(width: int, _: Any, operator: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    kept = operator in ATTENTION
    if operator in PRODUCTS:
        kept = args[PRODUCTS[operator]].shape[-1] >= width
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
