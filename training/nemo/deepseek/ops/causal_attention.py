"""Causal attention; shapes: ``models/__init__.py``; of M keys' tokens, the last S have queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.ops.document_attention import attend_in_blocks


def causal_attention(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v.

    Queries may be fewer than keys: they are then those of the last tokens.

    Args:
        q_BNSH, k_BNMH, v_BNMU: any float dtype, the same for all.
        scale: multiplies the scores.
        documents_BM: document id of each token; a token then sees only its own document.

    Returns:
        (B, N, S, U) in the dtype of ``v``.
    """
    if q_BNSH.is_cuda and (documents_BM is not None or q_BNSH.shape[2] < k_BNMH.shape[2]):
        if documents_BM is None:
            documents_BM = torch.zeros(1, 1, dtype=torch.int32, device=q_BNSH.device)
            documents_BM = documents_BM.expand(k_BNMH.shape[0], k_BNMH.shape[2])
        return attend_in_blocks(q_BNSH, k_BNMH, v_BNMU, scale, documents_BM)
    value_dims = v_BNMU.shape[-1]
    padding = q_BNSH.shape[-1] - value_dims
    if padding > 0 and v_BNMU.device.type == "cpu":
        # On CPU the fused kernel needs equal dims; without them torch takes a slower path silently.
        v_BNMU = F.pad(v_BNMU, (0, padding))
    queries, keys = q_BNSH.shape[2], k_BNMH.shape[2]
    mask: Tensor | None = None
    if documents_BM is not None:
        mask = document_mask(documents_BM, queries)
    elif queries < keys:
        mask = causal_mask(queries, keys, q_BNSH.device)
    y_BNSU = F.scaled_dot_product_attention(
        q_BNSH, k_BNMH, v_BNMU, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return y_BNSU[..., :value_dims]


def causal_attention_slow(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None = None,
) -> Tensor:
    """Readable twin of ``causal_attention``: holds all scores."""
    scores_BNSM = q_BNSH @ k_BNMH.transpose(-2, -1) * scale
    if documents_BM is None:
        documents_BM = torch.zeros(
            k_BNMH.shape[0], k_BNMH.shape[2], dtype=torch.int64, device=q_BNSH.device
        )
    mask = document_mask(documents_BM, q_BNSH.shape[2])
    return scores_BNSM.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v_BNMU


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where a query may look: not ahead; bool (S, M)."""
    everything = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everything.tril(keys - queries)


def document_mask(documents_BM: Tensor, queries: int) -> Tensor:
    """True where a query may look: not ahead, and inside its own document; bool (B, 1, S, M)."""
    same_BSM = documents_BM[:, -queries:].unsqueeze(2) == documents_BM.unsqueeze(1)
    causal_SM = causal_mask(queries, documents_BM.shape[1], documents_BM.device)
    return (same_BSM & causal_SM).unsqueeze(1)
