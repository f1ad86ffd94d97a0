"""Causal attention of whole sequences; shapes: ``models/__init__.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    q_BNSH: Tensor,
    k_BNSH: Tensor,
    v_BNSU: Tensor,
    scale: float,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v.

    Args:
        q_BNSH, k_BNSH, v_BNSU: any float dtype, the same for all.
        scale: multiplies the scores.
        documents_BS: document id of each token; a token then sees only its own document.

    Returns:
        (B, N, S, U) in the dtype of ``v``.
    """
    value_dims = v_BNSU.shape[-1]
    padding = q_BNSH.shape[-1] - value_dims
    if padding > 0 and v_BNSU.device.type == "cpu":
        # On CPU the fused kernel needs equal dims; without them torch takes a slower path silently.
        v_BNSU = F.pad(v_BNSU, (0, padding))
    if documents_BS is None:
        y_BNSU = F.scaled_dot_product_attention(q_BNSH, k_BNSH, v_BNSU, is_causal=True, scale=scale)
    else:
        y_BNSU = F.scaled_dot_product_attention(
            q_BNSH, k_BNSH, v_BNSU, attn_mask=document_mask(documents_BS), scale=scale
        )
    return y_BNSU[..., :value_dims]


def causal_attention_slow(
    q_BNSH: Tensor,
    k_BNSH: Tensor,
    v_BNSU: Tensor,
    scale: float,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """Readable twin of ``causal_attention``: holds all scores."""
    scores_BNSS = q_BNSH @ k_BNSH.transpose(-2, -1) * scale
    if documents_BS is None:
        documents_BS = torch.zeros(
            q_BNSH.shape[0], q_BNSH.shape[2], dtype=torch.int64, device=q_BNSH.device
        )
    scores_BNSS = scores_BNSS.masked_fill(~document_mask(documents_BS), float("-inf"))
    return scores_BNSS.softmax(dim=-1) @ v_BNSU


def document_mask(documents_BS: Tensor) -> Tensor:
    """True where a query may look: not ahead, and inside its own document; bool (B, 1, S, S)."""
    length = documents_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).tril()
    same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    return (same_BSS & causal_SS).unsqueeze(1)
