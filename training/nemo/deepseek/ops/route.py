"""The router's decision for few tokens by a kernel (``native/route.c``), where PyTorch takes a
dozen operators; its twin is ``Router`` without it. Shapes: ``models/__init__.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.ops.few_rows import FEW
from deepseek.ops.native import build


def route(
    x_TD: Tensor,
    w_ED: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    softmax: bool,
    groups: tuple[int, int, int],
    normalise: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Weights (T, K), expert ids (T, K), scores and logits (T, E) of fewer than ``FEW`` tokens;
    None: there is no kernel, or it does not take these.

    Args:
        x_TD: tokens.
        w_ED: the router's matrix.
        bias_E: added to scores where experts are chosen.
        top_k: experts of a token.
        softmax: over scores; else sigmoid.
        groups: how many, of how many the experts are taken, and how many of a group's largest
            scores are its own.
        normalise: weights sum to ``factor``; else they are scores times it.
        factor: of the weights.
    """
    tokens, dim = x_TD.shape
    known = (x_TD, w_ED) if bias_E is None else (x_TD, w_ED, bias_E)
    if not 0 < tokens < FEW or not build.takes(*known):
        return None
    kernel = build.function("route", "p" * 7 + "n" * 9 + "fn")
    if kernel is None or w_ED.shape[1] != dim or not w_ED.is_contiguous():
        return None
    x_TD, experts = x_TD.contiguous(), len(w_ED)
    logits_TE, scores_TE = x_TD.new_empty(2, tokens, experts)
    weights_TK = x_TD.new_empty(tokens, top_k)
    ids_TK = x_TD.new_empty(tokens, top_k, dtype=torch.int64)
    given = logits_TE, scores_TE, ids_TK, weights_TK, x_TD, w_ED, bias_E
    sizes = tokens, experts, top_k, dim, softmax, *groups, normalise
    kernel(*given, *sizes, factor, torch.get_num_threads())
    return weights_TK, ids_TK, scores_TE, logits_TE
