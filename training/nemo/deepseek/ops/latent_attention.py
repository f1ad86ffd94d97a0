"""Absorbed attention over cached latents by a kernel; shapes: ``models/components/attention.py``.

The kernel (``native/latent_attention.c``) takes new tokens as they are projected: it puts them into
the cache, rotates, reads each latent once for all heads, and makes the softmax on the way. Of few
rows the whole layer is one call (``native/decoding.c``). The twin of both is
``MultiHeadLatentAttention`` without them, of some thirty operators.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.ops.few_rows import OURS
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
    cos_BSA, sin_BSA = (x.contiguous() for x in rotation)
    rope, (latent,) = 2 * cos_BSA.shape[-1], norm_C.shape
    nope = q_width - rope
    values = len(wkv_b) // heads - nope
    sizes = sequences, tokens, heads, nope, rope, latent, values
    splits, numbers = _work(sizes, room, q_BSNH.dtype)
    work = q_BSNH.new_empty(numbers)
    y_BSNU = q_BSNH.new_empty(sequences, tokens, heads, values)
    kernel = build.kernel("latent_attention", "p" * 10 + "n" * 11 + "ffn")
    assert kernel is not None, "asked before"
    known = q_BSNH.contiguous(), kv_BSX.contiguous(), norm_C, cos_BSA, sin_BSA, wkv_b.contiguous()
    given = (y_BSNU, *known, room.slots_BMX, room.padding_B, work)
    steps = room.slots_BMX.stride()[:2]
    kernel(*given, *sizes, room.start, *steps, splits, eps, scale, torch.get_num_threads())
    return y_BSNU


def decode_attention(
    h_BSD: Tensor,
    norm_D: Tensor,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    of_latents: tuple[Tensor, Tensor, Tensor, Tensor],
    of_queries: tuple[Tensor, ...],
    nope: int,
    reserve: Callable[[int], Room],
    scale: float,
) -> Tensor | None:
    """``h + attention(norm(h))`` of fewer than ``OURS`` new tokens in all, (B, S, D); None: there
    is no kernel, or it does not take these.

    Args:
        norm_D, eps: of the norm before the layer; all norms have this ``eps``.
        rotation: as in ``latent_attention``.
        of_latents: ``wkv_a``, the norm's weight, ``wkv_b``, ``wo``.
        of_queries: ``wq``; or ``wq_a``, the norm's weight, ``wq_b``.
        nope: dims of a query that are not rotated.
        reserve: gives room for so many new tokens, if they are taken.
        scale: of the scores.
    """
    sequences, tokens, dim = h_BSD.shape
    *of_q_latent, wq_b = of_queries
    wkv_a, kv_norm, wkv_b, wo = of_latents
    weights = wq_b, wkv_a, wkv_b, wo, *of_q_latent
    if not 0 < sequences * tokens < OURS or tokens > MOST_NEW:
        return None
    if not build.takes(h_BSD, norm_D, *rotation, kv_norm, *weights):
        return None
    kernel = build.kernel("decode_attention", "p" * 15 + "n" * 13 + "ffn")
    fits = dim == len(norm_D) == len(wo) == wkv_a.shape[1] == of_queries[0].shape[1]
    if kernel is None or not fits or not all(w.is_contiguous() for w in weights):
        return None
    cos_BSA, sin_BSA = (x.contiguous() for x in rotation)
    rope, (latent,), (q_width, q_latent) = 2 * cos_BSA.shape[-1], kv_norm.shape, wq_b.shape
    heads, h_BSD, room = q_width // (nope + rope), h_BSD.contiguous(), reserve(tokens)
    values = wo.shape[1] // heads
    sizes = sequences, tokens, heads, nope, rope, latent, values
    splits, numbers = _work(sizes, room, h_BSD.dtype)
    widths = dim + 1 + 2 * q_latent + q_width + latent + rope + heads * values
    y_BSD, work = torch.empty_like(h_BSD), h_BSD.new_empty(numbers + sequences * tokens * widths)
    before = y_BSD, h_BSD, norm_D, *(of_q_latent or (None, None)), wq_b, wkv_a
    cached = kv_norm, cos_BSA, sin_BSA, wkv_b, wo, room.slots_BMX, room.padding_B, work
    steps = room.slots_BMX.stride()[:2]
    places = room.start, *steps, splits
    kernel(*before, *cached, dim, q_latent, *sizes, *places, eps, scale, torch.get_num_threads())
    return y_BSD


def _work(sizes: tuple[int, ...], room: Room, dtype: torch.dtype) -> tuple[int, int]:
    """Of ``latent_attention``: in how many parts each cache is read, and numbers of its work."""
    sequences, tokens, heads, _, rope, latent, _ = sizes
    slots, threads = room.slots_BMX, torch.get_num_threads()
    assert slots.dtype == dtype and room.start + tokens <= slots.shape[1], (
        "a kernel writes new tokens where the cache has room for them"
    )
    # Each thread has the same number of parts, if their caches are long enough.
    splits = max(1, min(threads // gcd(sequences, threads), room.start // _LEAST_PART))
    rows = sequences * tokens * heads
    numbers = rows * (latent + rope) + rows * latent + splits * rows * (latent + 2)
    return splits, numbers + threads * tokens * heads * _BLOCK
