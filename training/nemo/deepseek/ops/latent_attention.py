"""Absorbed attention over cached latents by a kernel; shapes: ``models/components/attention.py``.

The kernel (``native/latent_attention.c``) takes new tokens as they are projected: it puts them into
the cache, rotates, reads each latent once for all heads, and makes the softmax on the way. Its twin
is ``MultiHeadLatentAttention`` without it, of some thirty operators.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.ops.native import build

MOST_NEW = 8
"""New tokens of a sequence, as drafts are: with more the library's products are faster."""
_LEAST_PART = 128
"""Cached tokens that are worth a thread of their own."""
_BLOCK = 64
"""Of scores; the kernel's."""


class Room(NamedTuple):
    """Where new tokens go in a cache of latents."""

    slots_BMX: Tensor
    """Of all tokens that there may be; the last dim is contiguous."""
    start: int
    """Of the new tokens: all slots before it are filled."""
    padding_B: Tensor
    """int64, slots at the left of each row that hold no token."""


def takes_latents(q_BSNH: Tensor, *others: Tensor) -> bool:
    """Whether ``latent_attention`` can be called with these."""
    return (
        0 < q_BSNH.shape[1] <= MOST_NEW
        and q_BSNH.shape[0] > 0
        and build.takes(q_BSNH, *others)
        and build.why_not() is None
    )


def latent_attention(
    q_BSNH: Tensor,
    kv_BSX: Tensor,
    norm_C: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    wkv_b: Tensor,
    room: Room,
    scale: float,
) -> Tensor:
    """Attention of new tokens to all cached ones and to themselves.

    Args:
        q_BSNH: queries as projected, not rotated.
        kv_BSX: latents and keys as projected; normed and rotated they are put into ``room``.
        norm_C, eps: of the latents' norm.
        rotation: cos and sin of the new tokens' positions, (B, S, A).
        wkv_b: from latents to keys and values, (N (H' + U), C).
        room: for them.
        scale: of the scores.

    Returns:
        (B, S, N, U).
    """
    sequences, tokens, heads, q_width = q_BSNH.shape
    slots = room.slots_BMX
    assert slots.dtype == q_BSNH.dtype and room.start + tokens <= slots.shape[1], (
        "a kernel writes new tokens where the cache has room for them"
    )
    cos_BSA, sin_BSA = (x.contiguous() for x in rotation)
    latent, rope = norm_C.shape[0], 2 * cos_BSA.shape[-1]
    nope = q_width - rope
    values = wkv_b.shape[0] // heads - nope
    threads = torch.get_num_threads()
    # Each thread has the same number of parts, if their caches are long enough.
    splits = max(1, min(threads // gcd(sequences, threads), room.start // _LEAST_PART))
    rows = sequences * tokens * heads
    numbers = rows * (latent + rope) + rows * latent + splits * rows * (latent + 2)
    work = q_BSNH.new_empty(numbers + threads * tokens * heads * _BLOCK)
    y_BSNU = q_BSNH.new_empty(sequences, tokens, heads, values)
    kernel = build.kernel("latent_attention", "p" * 10 + "n" * 11 + "ffn")
    assert kernel is not None, "asked before"
    known = q_BSNH.contiguous(), kv_BSX.contiguous(), norm_C, cos_BSA, sin_BSA, wkv_b.contiguous()
    given = (y_BSNU, *known, slots, room.padding_B, work)
    sizes = sequences, tokens, heads, nope, rope, latent, values
    steps = slots.stride()[:2]
    kernel(*given, *sizes, room.start, *steps, splits, eps, scale, threads)
    return y_BSNU
