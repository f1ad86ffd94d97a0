"""Attention of short sequences on a CPU, from projected heads to the output projection's input, one
kernel each way (``native/attention.c``).

Batched products of a few dozen rows take as long to begin as to compute, and heads laid out for
them are copies. What is kept is what the projections have made, and of each query the largest score
and the sum of exponentials. A angles, H = H' + 2A dims of queries and keys, U of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.ops.native.build import kernel

MOST_NUMBERS, MOST_OF_DOCUMENTS = 1 << 18, 1 << 15
"""Of the keys and values of a head, at most: with what is made of them they lie in the caches.
Fewer where documents are isolated: blocks leave out the keys of others, which are most in long
sequences. Forward and backward pass of 512 tokens with 192 and 128 dims took 0.8 of the blocks' CPU
time, with 96 and 64 dims 0.7, of 256 tokens 0.65 (one thread of a Xeon with 2 MiB of caches)."""


def takes_short(q_BSNH: Tensor, kv_BSNH: Tensor, documents_BS: Tensor | None = None) -> bool:
    """Whether these are short, of the same tokens, and there is a kernel for them."""
    most = MOST_NUMBERS if documents_BS is None else MOST_OF_DOCUMENTS
    fits = kv_BSNH.shape[1] * (q_BSNH.shape[3] + kv_BSNH.shape[3]) <= most
    if not fits or q_BSNH.shape[:3] != kv_BSNH.shape[:3] or not q_BSNH.numel():
        return False
    return kernel(*_FORWARD, q_BSNH, kv_BSNH) is not None


def short_attention(
    q_BSNH: Tensor,
    kv_BSNH: Tensor,
    k_rope_BSH: Tensor,
    cos_BSA: Tensor,
    sin_BSA: Tensor,
    scale: float,
    documents_BS: Tensor | None = None,
    largest_BNS: Tensor | None = None,
) -> Tensor:
    """Causal attention of what ``takes_short``, (B, S, N, U).

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
    return _ShortAttention.apply(*tensors, scale, documents_BS, largest_BNS)


_FORWARD, _BACKWARD = (
    (name, "p" * addresses + "nnnnnnfnn")
    for name, addresses in (("attention", 10), ("attention_backward", 14))
)
_TILE, _LANES = 24, 16
"""Queries of a tile, and numbers of a vector, at most."""


def _room(like: Tensor, tokens: int, width: int, values: int) -> tuple[Tensor, int]:
    """What the kernels use besides, and how much of it is a thread's."""
    tokens, width, values = (-(-n // _LANES) * _LANES for n in (tokens, width, values))
    size = tokens * (1 + 3 * width + 2 * values) + _TILE * (2 * tokens + 2 * width + values)
    return like.new_empty(size * torch.get_num_threads()), size


class _ShortAttention(torch.autograd.Function):
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
        given = [x.contiguous() for x in tensors]
        if documents_BS is not None:
            documents_BS = documents_BS.to(torch.int32).contiguous()
        sequences, tokens, heads, width = q_BSNH.shape
        pairs = cos_BSA.shape[-1]
        values = kv_BSNH.shape[-1] - width + 2 * pairs
        ctx.sizes = sequences, heads, tokens, width - 2 * pairs, pairs, values, scale
        y_BSNU = q_BSNH.new_empty(sequences, tokens, heads, values)
        largest, sums = (q_BSNH.new_empty(sequences, heads, tokens) for _ in range(2))
        (room, size), run = _room(y_BSNU, tokens, width, values), kernel(*_FORWARD)
        assert run is not None, "asked before"
        threads = torch.get_num_threads()
        run(y_BSNU, largest, sums, room, *given, documents_BS, *ctx.sizes, size, threads)
        ctx.save_for_backward(largest, sums, *given, documents_BS)
        if largest_BNS is not None:
            largest_BNS.copy_(largest)
        return y_BSNU

    @staticmethod
    def backward(ctx: Any, grad_BSNU: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        q_BSNH, kv_BSNH, k_rope_BSH = kept[2:5]
        sequences, heads, tokens, _, pairs, values, _ = ctx.sizes
        by = [torch.empty_like(x) for x in (q_BSNH, kv_BSNH, k_rope_BSH)]
        of_heads = q_BSNH.new_empty(sequences, heads, tokens, 2 * pairs)
        (room, size), run = _room(q_BSNH, tokens, q_BSNH.shape[-1], values), kernel(*_BACKWARD)
        assert run is not None, "asked before"
        threads = torch.get_num_threads()
        run(*by, of_heads, room, grad_BSNU.contiguous(), *kept, *ctx.sizes, size, threads)
        return *by, None, None, None, None, None
