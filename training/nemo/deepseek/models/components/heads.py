"""Queries, keys and values as attention reads them: head by head, position turned in.

Each is one kernel on a CPU (``ops/native/heads.c``), forward and backward, of which the operators
here are the reference. M tokens of keys, A pairs of dims that are turned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek.models.components.rope import can_turn, rotate, turn
from deepseek.ops.native.build import kernel


def head_queries(q_BSNH: Tensor, cos_BSA: Tensor, sin_BSA: Tensor) -> Tensor:
    """Queries of each head, (B, N, S, H), their last 2A dims rotated.

    Args:
        q_BSNH: as projected.
        cos_BSA, sin_BSA: of the queries' positions.
    """
    if can_turn(q_BSNH, cos_BSA):
        return turn(q_BSNH, cos_BSA, sin_BSA, by_head=True)
    return head_queries_slow(q_BSNH, cos_BSA, sin_BSA)


def head_queries_slow(q_BSNH: Tensor, cos_BSA: Tensor, sin_BSA: Tensor) -> Tensor:
    """Reference implementation of ``head_queries``."""
    turned = 2 * cos_BSA.shape[-1]
    plain, rope = q_BSNH.split([q_BSNH.shape[-1] - turned, turned], dim=-1)
    return _joined(plain, rotate(rope, cos_BSA, sin_BSA))


def head_keys(kv_BMNH: Tensor, k_rope_BMH: Tensor, value_dims: int) -> tuple[Tensor, Tensor]:
    """Keys and values of each head, (B, N, M, H) and (B, N, M, U).

    Args:
        kv_BMNH: made of the latents: the keys' dims without position, and the values.
        k_rope_BMH: the keys' other dims, rotated, shared by all heads.
        value_dims: U.
    """
    if kernel(*_LAY, kv_BMNH, k_rope_BMH) is not None:
        return _HeadKeys.apply(kv_BMNH, k_rope_BMH, value_dims)
    return head_keys_slow(kv_BMNH, k_rope_BMH, value_dims)


def head_keys_slow(kv_BMNH: Tensor, k_rope_BMH: Tensor, value_dims: int) -> tuple[Tensor, Tensor]:
    """Reference implementation of ``head_keys``."""
    heads, plain = kv_BMNH.shape[2], kv_BMNH.shape[3] - value_dims
    k_nope, v_BMNU = kv_BMNH.split([plain, value_dims], dim=-1)
    k_rope_BMNH = k_rope_BMH.unsqueeze(2).expand(-1, -1, heads, -1)
    return _joined(k_nope, k_rope_BMNH), v_BMNU.transpose(1, 2)


def _joined(plain_BSNH: Tensor, rope_BSNH: Tensor) -> Tensor:
    """Head by head, since that is how attention reads them."""
    return torch.cat((plain_BSNH.transpose(1, 2), rope_BSNH.transpose(1, 2)), dim=-1)


_LAY, _LAY_BACK = ("lay_keys", "ppppnnnnnnn"), ("lay_keys_backward", "ppppnnnnnnn")


class _HeadKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kv_BMNH: Tensor, k_rope_BMH: Tensor, value_dims: int
    ) -> tuple[Tensor, Tensor]:
        sequences, tokens, heads, width = kv_BMNH.shape
        turned, plain = k_rope_BMH.shape[-1], width - value_dims
        k_BNMH = kv_BMNH.new_empty(sequences, heads, tokens, plain + turned)
        v_BNMU = kv_BMNH.new_empty(sequences, heads, tokens, value_dims)
        ctx.sizes = sequences, tokens, heads, plain, turned, value_dims
        run = kernel(*_LAY, kv_BMNH, k_rope_BMH)
        assert run is not None, "asked before"
        given = kv_BMNH.contiguous(), k_rope_BMH.contiguous()
        run(k_BNMH, v_BNMU, *given, *ctx.sizes, torch.get_num_threads())
        return k_BNMH, v_BNMU

    @staticmethod
    def backward(ctx: Any, by_k_BNMH: Tensor, by_v_BNMU: Tensor) -> tuple[Tensor, Tensor, None]:
        sequences, tokens, heads, plain, turned, value_dims = ctx.sizes
        by_kv = by_k_BNMH.new_empty(sequences, tokens, heads, plain + value_dims)
        by_rope = by_k_BNMH.new_empty(sequences, tokens, turned)
        run = kernel(*_LAY_BACK, by_k_BNMH, by_v_BNMU)
        assert run is not None, "asked before"
        given = by_k_BNMH.contiguous(), by_v_BNMU.contiguous()
        run(by_kv, by_rope, *given, *ctx.sizes, torch.get_num_threads())
        return by_kv, by_rope, None
