"""What a router decides, by kernels on a CPU (``native/routing.c``): of few tokens all at once, or
step by step which experts, with what weights, and what the balance loss adds up. Shapes:
``models/__init__.py``.

Of equal scores the kernels take the first expert, torch any.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.ops.few_rows import FEW
from deepseek.ops.native.build import kernel, takes


class Choice(NamedTuple):
    """How a router chooses experts."""

    w_ED: Tensor
    """The router's matrix."""
    bias_E: Tensor | None
    """Added to scores where experts are chosen."""
    top_k: int
    """Experts of a token."""
    softmax: bool
    """Over scores; else sigmoid."""
    groups: tuple[int, int, int]
    """How many, of how many the experts are taken, and how many of a group's largest scores are its
    own."""
    normalise: bool
    """Weights sum to ``factor``; else they are scores times it."""
    factor: float
    """Of the weights."""


def route(x_TD: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Weights (T, K), expert ids (T, K), scores and logits (T, E) of fewer than ``FEW`` tokens;
    None: there is no kernel, or it does not take these. Its twin is ``Router`` without it."""
    w_ED, bias_E, top_k, softmax, groups, normalise, factor = choice
    tokens, dim = x_TD.shape
    known = (x_TD, w_ED) if bias_E is None else (x_TD, w_ED, bias_E)
    if not 0 < tokens < FEW or not takes(*known):
        return None
    run = kernel("route", "p" * 7 + "n" * 9 + "fn")
    if run is None or w_ED.shape[1] != dim or not w_ED.is_contiguous():
        return None
    x_TD, experts = x_TD.contiguous(), len(w_ED)
    logits_TE, scores_TE = x_TD.new_empty(2, tokens, experts)
    weights_TK = x_TD.new_empty(tokens, top_k)
    ids_TK = x_TD.new_empty(tokens, top_k, dtype=torch.int64)
    given = logits_TE, scores_TE, ids_TK, weights_TK, x_TD, w_ED, bias_E
    sizes = tokens, experts, top_k, dim, softmax, *groups, normalise
    run(*given, *sizes, factor, torch.get_num_threads())
    return weights_TK, ids_TK, scores_TE, logits_TE


def largest_places(choice_TE: Tensor, count: int) -> Tensor:
    """The experts with the largest numbers, int64 (T, count), in any order; no gradient."""
    if choice_TE.is_contiguous() and (run := kernel("largest_places", "ppnnnn", choice_TE)):
        places_TK = choice_TE.new_empty(len(choice_TE), count, dtype=torch.int64)
        run(places_TK, choice_TE, *choice_TE.shape, count, torch.get_num_threads())
        return places_TK
    return choice_TE.topk(count, dim=-1, sorted=False).indices


def expert_weights(
    scores_TE: Tensor, expert_ids_TK: Tensor, normalises: bool, factor: float
) -> Tensor:
    """Weights of the chosen experts, (T, K): their scores, over the sum of these if ``normalises``,
    times ``factor`` (arXiv:2412.19437 eq 13)."""
    if kernel(*_WEIGH, scores_TE, expert_ids_TK):
        return _ExpertWeights.apply(scores_TE, expert_ids_TK, normalises, factor)
    return expert_weights_slow(scores_TE, expert_ids_TK, normalises, factor)


def expert_weights_slow(
    scores_TE: Tensor, expert_ids_TK: Tensor, normalises: bool, factor: float
) -> Tensor:
    """Reference implementation of ``expert_weights``."""
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if normalises:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * factor


def sequence_sums(scores_BSE: Tensor, top_k: int, real_BS: Tensor) -> Tensor:
    """What the balance loss of a sequence is made of, (B, 2E + 1).

    Over its real tokens: how many have an expert among their K largest scores (no gradient), the
    sum of each expert's share of their scores, and how many tokens there are.
    """
    if kernel(*_SUMS, scores_BSE, real_BS):
        return _SequenceSums.apply(scores_BSE, top_k, real_BS)
    return sequence_sums_slow(scores_BSE, top_k, real_BS)


def sequence_sums_slow(scores_BSE: Tensor, top_k: int, real_BS: Tensor) -> Tensor:
    """Reference implementation of ``sequence_sums``."""
    real_BS1 = real_BS.unsqueeze(-1)
    best_BSK = scores_BSE.detach().topk(top_k, dim=-1).indices
    chosen_BSE = torch.zeros_like(scores_BSE).scatter_(-1, best_BSK, 1.0)
    share_BSE = scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)
    parts = (chosen_BSE * real_BS1, share_BSE * real_BS1, real_BS1.to(scores_BSE.dtype))
    return torch.cat([part.sum(dim=1) for part in parts], dim=-1)


def margin_sums(
    choices: Sequence[Tensor], expert_ids: Sequence[Tensor], real: Sequence[Tensor]
) -> Tensor:
    """Of each layer, fp64 (L, 2): how far the last chosen expert lies above the best other one,
    over real tokens that have another one, and how many tokens these are. No gradient.

    Args:
        choices: what a layer's experts are chosen by, (T, E).
        expert_ids: the chosen ones, (T, K).
        real: False for padding, (T,).
    """
    given = *choices, *expert_ids, *real
    run = kernel("margin_sums", "ppppnnnn", *given)
    if run is None or not all(x.is_contiguous() for x in given):
        return margin_sums_slow(choices, expert_ids, real)
    sums_L2 = choices[0].new_empty(len(choices), 2, dtype=torch.float64)
    table, layers = array("q", [x.data_ptr() for x in given]), len(choices)
    parts = range(0, len(table) * table.itemsize, layers * table.itemsize)
    lie_at = [table.buffer_info()[0] + part for part in parts]
    run(sums_L2, *lie_at, layers, *choices[0].shape, expert_ids[0].shape[1])
    return sums_L2


def margin_sums_slow(
    choices: Sequence[Tensor], expert_ids: Sequence[Tensor], real: Sequence[Tensor]
) -> Tensor:
    """Reference implementation of ``margin_sums``."""
    given = [torch.stack(list(layers)) for layers in (choices, expert_ids, real)]
    choice_LTE, expert_ids_LTK, real_LT = given
    last_LT = choice_LTE.gather(2, expert_ids_LTK).amin(dim=2)
    next_LT = choice_LTE.scatter(2, expert_ids_LTK, -torch.inf).amax(dim=2)  # sorting takes longer
    margin_LT = last_LT - next_LT
    found_LT = real_LT & margin_LT.isfinite()  # not where a token's groups have no other expert
    numbers = margin_LT.where(found_LT, 0.0), found_LT
    return torch.stack([x_LT.sum(dim=1, dtype=torch.float64) for x_LT in numbers], dim=1)


_WEIGH, _WEIGH_BACK = ("weigh_experts", "pppnnnnf"), ("weigh_experts_backward", "ppppnnnnf")
_SUMS, _SUMS_BACK = ("sequence_sums", "pppnnnnn"), ("sequence_sums_backward", "ppppnnnn")


def weigh(scores_TE: Tensor, expert_ids_TK: Tensor, normalises: bool, factor: float) -> Tensor:
    """``expert_weights`` by its kernel, without gradient; what is given is contiguous."""
    weights_TK, run = scores_TE.new_empty(expert_ids_TK.shape), kernel(*_WEIGH)
    assert run is not None, "asked before"
    sizes = *scores_TE.shape, expert_ids_TK.shape[1], int(normalises), factor
    run(weights_TK, scores_TE, expert_ids_TK, *sizes)
    return weights_TK


def weigh_back(
    grad_TK: Tensor, scores_TE: Tensor, expert_ids_TK: Tensor, normalises: bool, factor: float
) -> Tensor:
    """Gradient of the scores that ``weigh`` was given."""
    by_scores_TE, run = torch.empty_like(scores_TE), kernel(*_WEIGH_BACK)
    assert run is not None, "asked before"
    sizes = *scores_TE.shape, expert_ids_TK.shape[1], int(normalises), factor
    run(by_scores_TE, grad_TK.contiguous(), scores_TE, expert_ids_TK, *sizes)
    return by_scores_TE


class _ExpertWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores_TE: Tensor, expert_ids_TK: Tensor, normalises: bool, factor: float
    ) -> Tensor:
        scores_TE, expert_ids_TK = scores_TE.contiguous(), expert_ids_TK.contiguous()
        ctx.save_for_backward(scores_TE, expert_ids_TK)
        ctx.settings = normalises, factor
        return weigh(scores_TE, expert_ids_TK, normalises, factor)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None, None, None]:
        return weigh_back(grad_TK, *ctx.saved_tensors, *ctx.settings), None, None, None


def add_up(scores_BSE: Tensor, top_k: int, real_BS: Tensor) -> Tensor:
    """``sequence_sums`` by its kernel, without gradient; what is given is contiguous."""
    sequences, tokens, experts = scores_BSE.shape
    sums, run = scores_BSE.new_empty(sequences, 2 * experts + 1), kernel(*_SUMS)
    assert run is not None, "asked before"
    sizes = sequences, tokens, experts, top_k
    run(sums, scores_BSE, real_BS, *sizes, torch.get_num_threads())
    return sums


def add_up_back(by_sums: Tensor, scores_BSE: Tensor, real_BS: Tensor) -> Tensor:
    """Gradient of the scores that ``add_up`` was given."""
    by_scores_BSE, run = torch.empty_like(scores_BSE), kernel(*_SUMS_BACK)
    assert run is not None, "asked before"
    given = by_sums.contiguous(), scores_BSE, real_BS
    run(by_scores_BSE, *given, *scores_BSE.shape, torch.get_num_threads())
    return by_scores_BSE


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_BSE: Tensor, top_k: int, real_BS: Tensor) -> Tensor:
        scores_BSE, real_BS = scores_BSE.contiguous(), real_BS.contiguous()
        ctx.save_for_backward(scores_BSE, real_BS)
        return add_up(scores_BSE, top_k, real_BS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return add_up_back(grad, *ctx.saved_tensors), None, None
