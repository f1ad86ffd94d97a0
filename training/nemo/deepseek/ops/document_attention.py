"""Attention that a mask of tokens would be too large for, on GPUs: documents, and late queries.

FlexAttention skips blocks that no query of theirs may see. Which these are follows from the first
and last document of each block, so that no S x M mask is ever made: of 128K tokens it would be
17 GB, and of blocks it is 8 MB. Shapes: ``models/__init__.py``; n blocks.

No GPU has run it yet. On a CPU torch computes the same without skipping, which is for tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary

BLOCK = 128
"""Tokens of a block, FlexAttention's own default."""


def attend_in_blocks(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor,
    largest_BNS: Tensor | None = None,
) -> Tensor:
    """``causal_attention`` over documents, or of late queries, by FlexAttention.

    A mask of blocks is made once for each tensor of ids, and so once a micro-batch for all layers.
    """
    if torch.is_autocast_enabled(q_BNSH.device.type):  # FlexAttention is not on its list
        dtype = torch.get_autocast_dtype(q_BNSH.device.type)
        q_BNSH, k_BNMH, v_BNMU = (x.to(dtype) for x in (q_BNSH, k_BNMH, v_BNMU))
    queries = q_BNSH.shape[2]
    attend: Any = flex_attention
    if torch.compiler.is_compiling():
        mask = document_blocks(documents_BM, queries)
    else:
        made = _made.setdefault(documents_BM, {})
        if queries not in made:
            made[queries] = document_blocks(documents_BM, queries)
        mask = made[queries]
        attend = _compiled() if q_BNSH.is_cuda else flex_attention
    if largest_BNS is None:
        return attend(q_BNSH, k_BNMH, v_BNMU, block_mask=mask, scale=scale)
    # Each row's maximum is at hand in the kernel, in exact form and for nothing.
    told = AuxRequest(max_scores=True)
    y_BNSU, aux = attend(q_BNSH, k_BNMH, v_BNMU, block_mask=mask, scale=scale, return_aux=told)
    largest_BNS.copy_(aux.max_scores)
    return y_BNSU


def document_blocks(documents_BM: Tensor, queries: int) -> BlockMask:
    """Which blocks of keys a block of queries may see in part, and which in whole.

    Args:
        documents_BM: document id of each key's token; in any order, though ids that come back make
            blocks between them be looked at in vain.
        queries: S; those of the last tokens.
    """
    keys = documents_BM.shape[1]
    late = keys - queries
    first_q, last_q, low_q, high_q = (x.unsqueeze(-1) for x in _spans(documents_BM[:, late:], late))
    first_k, last_k, low_k, high_k = (x.unsqueeze(-2) for x in _spans(documents_BM, 0))
    seen_Bnn = (first_k <= last_q) & (low_k <= high_q) & (low_q <= high_k)
    whole_Bnn = (last_k <= first_q) & (low_k == high_q) & (low_q == high_k) & (low_q == high_q)
    whole_Bnn = whole_Bnn & (last_k - first_k == BLOCK - 1) & (last_q - first_q == BLOCK - 1)

    ids_BM = documents_BM.clone()  # the mask must not keep alive what it is remembered by

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + late >= k) & (ids_BM[b, q + late] == ids_BM[b, k])

    return BlockMask.from_kv_blocks(
        *_listed(seen_Bnn & ~whole_Bnn),
        *_listed(whole_Bnn),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def _spans(documents_BS: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each block its first and last token (1, n), and its least and greatest id (B, n)."""
    length = documents_BS.shape[1]
    first_1n = torch.arange(0, length, BLOCK, device=documents_BS.device).unsqueeze(0)
    last_1n = (first_1n + BLOCK).clamp(max=length) - 1
    padding = -length % BLOCK
    if padding:
        documents_BS = torch.cat((documents_BS, documents_BS[:, -1:].expand(-1, padding)), dim=1)
    blocks_BnS = documents_BS.unflatten(1, (-1, BLOCK))
    return first_1n + start, last_1n + start, blocks_BnS.amin(dim=-1), blocks_BnS.amax(dim=-1)


def _listed(chosen_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and which, these first: int32 (B, 1, n) and (B, 1, n, n)."""
    order_Bnn = chosen_Bnn.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    counts_Bn = chosen_Bnn.sum(dim=-1)
    return counts_Bn.to(torch.int32).unsqueeze(1), order_Bnn.to(torch.int32).unsqueeze(1)


@cache
def _compiled() -> Any:
    """Not compiled, FlexAttention holds all scores."""
    return torch.compile(flex_attention, dynamic=False)


_made: Any = WeakIdKeyDictionary()
"""Masks by the tensor of ids and the number of queries; they go with the tensor."""
