"""Attention on a CPU in fp32, from projected heads to the output projection's input, one kernel
each way (``native/attention.c``).

Heads laid out for batched products are copies, and blocks of scores come and go through memory
between the products. Here a head's part is copied where it stays in a core's caches, and scores
never leave them. What is kept is what the projections have made, the result, and of each query the
largest score and the sum of exponentials. A angles, H = H' + 2A dims of queries and keys, U of
values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.ops.native.build import kernel


def takes_heads(q_BSNH: Tensor, kv_BSNH: Tensor) -> bool:
    """Whether these are of the same tokens, and there is a kernel for them."""
    if q_BSNH.shape[:3] != kv_BSNH.shape[:3] or not q_BSNH.numel():
        return False
    return kernel(*_FORWARD, q_BSNH, kv_BSNH) is not None


def fused_attention(
    q_BSNH: Tensor,
    kv_BSNH: Tensor,
    k_rope_BSH: Tensor,
    cos_BSA: Tensor,
    sin_BSA: Tensor,
    scale: float,
    documents_BS: Tensor | None = None,
    largest_BNS: Tensor | None = None,
) -> Tensor:
    """Causal attention of what ``takes_heads``, (B, S, N, U).

    Args:
        q_BSNH: queries as projected: their last 2A dims are rotated here.
        kv_BSNH: made of the latents: the keys' other dims, and the values.
        k_rope_BSH: the keys' last 2A dims, rotated, shared by all heads.
        cos_BSA, sin_BSA: of the positions.
        scale: multiplies the scores.
        documents_BS: document id of each token; a token then sees only its own document.
        largest_BNS: filled with the largest score of each query, scaled; None: not asked for.
    """
    tensors = q_BSNH, kv_BSNH, k_rope_BSH, cos_BSA, sin_BSA
    return _FusedAttention.apply(*tensors, scale, documents_BS, largest_BNS)


_FORWARD, _BACKWARD = (
    (name, "p" * addresses + "nnnnnnfnn")
    for name, addresses in (("attention", 10), ("attention_backward", 15))
)


class _Room(NamedTuple):
    numbers: Tensor
    size: int
    """Of a thread's part."""
    threads: int


_BLOCK, _STEP, _LINE = 96, 112, 16
"""As in the kernels: queries and keys of a block, and numbers of a cache line."""


def _room(like: Tensor, heads: int, tokens: int, width: int, values: int, copies: int) -> _Room:
    """What the kernels use besides; ``copies``: of keys and values, 2 with their gradients."""
    rows, keys, of_values = (-(-n // _LINE) * _LINE for n in (tokens, width, values))
    keys, of_values = keys + _LINE, of_values + _LINE
    size = rows * (1 + copies * (keys + of_values))
    size += _BLOCK * (3 * keys + 2 * of_values + 2 * _STEP)
    threads = min(torch.get_num_threads(), heads)
    return _Room(like.new_empty(size * threads), size, threads)


class Attended(NamedTuple):
    """What the backward pass is given again."""

    y_BSNU: Tensor
    largest_BNS: Tensor
    """Of each query the largest score, scaled."""
    sums_BNS: Tensor
    """And the sum of exponentials."""
    q_BSNH: Tensor
    kv_BSNH: Tensor
    k_rope_BSH: Tensor
    cos_BSA: Tensor
    sin_BSA: Tensor
    documents_BS: Tensor | None


def attend(
    q_BSNH: Tensor,
    kv_BSNH: Tensor,
    k_rope_BSH: Tensor,
    cos_BSA: Tensor,
    sin_BSA: Tensor,
    scale: float,
    documents_BS: Tensor | None,
) -> Attended:
    """``fused_attention`` without gradient."""
    tensors = q_BSNH, kv_BSNH, k_rope_BSH, cos_BSA, sin_BSA
    given = [x.contiguous() for x in tensors]
    if documents_BS is not None:
        documents_BS = documents_BS.to(torch.int32).contiguous()
    sequences, tokens, heads, width = q_BSNH.shape
    sizes = _sizes(q_BSNH, kv_BSNH, cos_BSA)
    y_BSNU = q_BSNH.new_empty(sequences, tokens, heads, sizes[-1])
    largest, sums = (q_BSNH.new_empty(sequences, heads, tokens) for _ in range(2))
    room, run = _room(q_BSNH, sequences * heads, tokens, width, sizes[-1], 1), kernel(*_FORWARD)
    assert run is not None, "asked before"
    rest = *sizes, scale, room.size, room.threads
    run(y_BSNU, largest, sums, room.numbers, *given, documents_BS, *rest)
    q, kv, k_rope, cos, sin = given
    return Attended(y_BSNU, largest, sums, q, kv, k_rope, cos, sin, documents_BS)


def attend_back(grad_BSNU: Tensor, kept: Attended, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, of what is made of the latents, and of the rotary keys."""
    q_BSNH, kv_BSNH, k_rope_BSH = kept.q_BSNH, kept.kv_BSNH, kept.k_rope_BSH
    sequences, tokens, heads, width = q_BSNH.shape
    sizes = _sizes(q_BSNH, kv_BSNH, kept.cos_BSA)
    by = torch.empty_like(q_BSNH), torch.empty_like(kv_BSNH), torch.empty_like(k_rope_BSH)
    of_heads = q_BSNH.new_empty(sequences, heads, tokens, 2 * kept.cos_BSA.shape[-1])
    room, run = _room(q_BSNH, sequences * heads, tokens, width, sizes[-1], 2), kernel(*_BACKWARD)
    assert run is not None, "asked before"
    rest = *sizes, scale, room.size, room.threads
    run(*by, of_heads, room.numbers, grad_BSNU.contiguous(), *kept, *rest)
    return by


def _sizes(q_BSNH: Tensor, kv_BSNH: Tensor, cos_BSA: Tensor) -> tuple[int, ...]:
    """B, N, S, H', A, U."""
    sequences, tokens, heads, width = q_BSNH.shape
    pairs = cos_BSA.shape[-1]
    plain = width - 2 * pairs
    return sequences, heads, tokens, plain, pairs, kv_BSNH.shape[-1] - plain


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSNH: Tensor,
        kv_BSNH: Tensor,
        k_rope_BSH: Tensor,
        cos_BSA: Tensor,
        sin_BSA: Tensor,
        scale: float,
        documents_BS: Tensor | None,
        largest_BNS: Tensor | None,
    ) -> Tensor:
        tensors = q_BSNH, kv_BSNH, k_rope_BSH, cos_BSA, sin_BSA
        kept = attend(*tensors, scale, documents_BS)
        ctx.scale = scale
        ctx.save_for_backward(*kept)
        if largest_BNS is not None:
            largest_BNS.copy_(kept.largest_BNS)
        return kept.y_BSNU

    @staticmethod
    def backward(ctx: Any, grad_BSNU: Tensor) -> tuple[Tensor | None, ...]:
        by = attend_back(grad_BSNU, Attended(*ctx.saved_tensors), ctx.scale)
        return *by, None, None, None, None, None
