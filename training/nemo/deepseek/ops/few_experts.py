"""SwiGLU feed-forward of a few rows on a CPU, as in decoding; shapes: ``models/__init__.py``.

What a token needs of its experts is to read their weights once. The kernels (``native/
feed_forward.c``) do it for all rows of an expert, gate, up and down in one call; the twins are
``FeedForward`` and ``GroupedExperts``, an operator at a time. With the norm before it and the
residual addition behind, each half of a block is one call, too (``native/decoding.c``): its twin
is the module's ``forward``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.few_rows import OURS
from deepseek.ops.native import build
from deepseek.ops.routing import Choice


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


def decode_feed_forward(
    h: Tensor, norm: tuple[Tensor, float], w1_FD: Tensor, w3_FD: Tensor, w2_DF: Tensor
) -> Tensor | None:
    """``h + feed_forward(norm(h))`` of fewer than ``OURS`` rows; None as there.

    Args:
        h: (..., D).
        norm: weight and epsilon of an RMSNorm.

    Returns:
        (..., D).
    """
    width, dim = w1_FD.shape
    (norm_D, eps), rows, weights = norm, h.numel() // dim, (w1_FD, w3_FD, w2_DF)
    fits = h.shape[-1] == len(norm_D) == dim
    if not 0 < rows < OURS or not fits or not build.takes(h, norm_D, *weights):
        return None
    kernel = build.kernel("decode_feed_forward", "p" * 7 + "nnnfn")
    if kernel is None or not all(w.is_contiguous() for w in weights):
        return None
    h = h.contiguous()
    y, work = torch.empty_like(h), h.new_empty(rows * (dim + 1 + 2 * width))
    kernel(y, h, norm_D, *weights, work, rows, dim, width, eps, torch.get_num_threads())
    return y


def decode_mixture(
    h_BSD: Tensor,
    norm: tuple[Tensor, float],
    choice: Choice,
    stacks: tuple[Tensor, Tensor, Tensor],
    shared: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``h + mixture(norm(h))`` of fewer than ``OURS`` tokens (B, S, D), scores (T, E) and ids of
    the chosen experts (T, K); None: there is no kernel, or it does not take these.

    Args:
        norm: weight and epsilon of an RMSNorm.
        choice: how experts are chosen.
        stacks: ``w1``, ``w3`` and ``w2`` of the routed experts.
        shared: the same of the shared ones; or nothing.
    """
    experts, width, dim = stacks[0].shape
    norm_D, eps = norm
    tokens, w_ED, bias_E, top_k = h_BSD.numel() // dim, *choice[:3]
    weights = w_ED, *stacks, *shared
    given = weights if bias_E is None else (*weights, bias_E)
    fits = h_BSD.shape[-1] == len(norm_D) == dim and w_ED.shape == (experts, dim)
    if not 0 < tokens < OURS or not fits or not build.takes(h_BSD, norm_D, *given):
        return None
    kernel = build.kernel("decode_mixture", "p" * 15 + "n" * 11 + "ffn")
    if kernel is None or not all(w.is_contiguous() for w in weights):
        return None
    h_BSD, rows, shared_width = h_BSD.contiguous(), tokens * top_k, len(shared[0]) if shared else 0
    numbers = tokens * (2 * dim + 1 + experts + top_k + 2 * shared_width)
    work = h_BSD.new_empty(numbers + rows * (dim + 2 * width + 1))
    y_BSD, scores_TE = torch.empty_like(h_BSD), h_BSD.new_empty(tokens, experts)
    ids = h_BSD.new_empty(3 * rows + experts + 1, dtype=torch.int64)
    ids_TK, order = ids[:rows].view(tokens, top_k), ids[rows:]
    known = y_BSD, scores_TE, ids_TK, h_BSD, norm_D, w_ED, bias_E, *stacks
    sizes = tokens, top_k, experts, dim, width, shared_width
    how = choice.softmax, *choice.groups, choice.normalise, choice.factor, eps
    kernel(*known, *(shared or (None,) * 3), order, work, *sizes, *how, torch.get_num_threads())
    return y_BSD, scores_TE, ids_TK
