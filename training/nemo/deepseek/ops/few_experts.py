"""SwiGLU feed-forward of a few rows on a CPU, as in decoding; shapes: ``models/__init__.py``.

What a token needs of its experts is to read their weights once. The kernels (``native/
feed_forward.c``) do it for all rows of an expert, gate, up and down in one call; the twins are
``FeedForward`` and ``GroupedExperts``, an operator at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.few_rows import OURS
from deepseek.ops.native import build


def feed_forward(x: Tensor, w1_FD: Tensor, w3_FD: Tensor, w2_DF: Tensor) -> Tensor | None:
    """``w2(silu(w1 x) * w3 x)`` of fewer than ``OURS`` rows by a kernel; None: there is none, or it
    does not take these.

    Args:
        x: (..., D).

    Returns:
        (..., D).
    """
    width, dim = w1_FD.shape
    rows = x.numel() // dim
    weights = w1_FD, w3_FD, w2_DF
    if not 0 < rows < OURS or x.shape[-1] != dim or not build.takes(x, *weights):
        return None
    kernel = build.kernel("feed_forward", "ppppppnnnn")
    if kernel is None or not all(w.is_contiguous() for w in weights):
        return None
    x = x.contiguous()
    y, work = torch.empty_like(x), x.new_empty(2 * rows * width)
    kernel(y, x, *weights, work, rows, dim, width, torch.get_num_threads())
    return y


def few_experts(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    w2_EDF: Tensor,
) -> Tensor | None:
    """Weighted sum of the chosen experts' results, of fewer than ``OURS`` rows an expert on the
    average, by a kernel; None: there is none, or it does not take these.

    Returns:
        (T, D).
    """
    experts, width, dim = w1_EFD.shape
    tokens, choices = expert_ids_TK.shape
    stacks, rows = (w1_EFD, w3_EFD, w2_EDF), tokens * choices
    if not 0 < rows < OURS * experts or x_TD.shape != (tokens, dim):
        return None
    if not build.takes(x_TD, weights_TK, *stacks):
        return None
    kernel = build.kernel("few_experts", "pppppppppnnnnnn")
    if kernel is None or not all(w.is_contiguous() for w in stacks):
        return None
    x_TD, expert_ids_TK, weights_TK = (t.contiguous() for t in (x_TD, expert_ids_TK, weights_TK))
    order = expert_ids_TK.new_empty(2 * rows + experts + 1)
    y_TD, work = torch.empty_like(x_TD), x_TD.new_empty(rows * (dim + 2 * width + 1))
    given = y_TD, x_TD, expert_ids_TK, weights_TK, *stacks, order, work
    kernel(*given, tokens, choices, experts, dim, width, torch.get_num_threads())
    return y_TD
