"""Attention that a mask of tokens would be too large for, on GPUs: documents, and late queries.

FlexAttention skips blocks that no query of theirs may see. Which these are follows from the first
and last document of each block, so that no S x M mask is ever made: of 128K tokens it would be
17 GB, and of blocks it is 16 MB. They are made once a micro-batch, and all layers share them.
Shapes: ``models/__init__.py``; n blocks.

No GPU has run it yet. On a CPU torch computes the same without skipping, which is for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

BLOCK = 128
"""Tokens of a block, FlexAttention's own default."""


class Chunks(NamedTuple):
    """The parts of a sequence that have their queries here."""

    number: int = 1
    """Equal parts of a sequence."""
    here: Sequence[int] = (0,)
    """Which of them, ascending."""


def attend_in_blocks(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    blocks: BlockMask,
    largest_BNS: Tensor | None = None,
) -> Tensor:
    """``causal_attention`` over documents, or of late queries, by FlexAttention."""
    if torch.is_autocast_enabled(q_BNSH.device.type):  # FlexAttention is not on its list
        dtype = torch.get_autocast_dtype(q_BNSH.device.type)
        q_BNSH, k_BNMH, v_BNMU = (x.to(dtype) for x in (q_BNSH, k_BNMH, v_BNMU))
    attend: Any = flex_attention
    if q_BNSH.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled()
    if largest_BNS is None:
        return attend(q_BNSH, k_BNMH, v_BNMU, block_mask=blocks, scale=scale)
    # Each row's maximum is at hand in the kernel, in exact form and for nothing.
    told = AuxRequest(max_scores=True)
    y_BNSU, aux = attend(q_BNSH, k_BNMH, v_BNMU, block_mask=blocks, scale=scale, return_aux=told)
    largest_BNS.copy_(aux.max_scores)
    return y_BNSU


def chunk_blocks(
    tokens_BS: Tensor, documents_BS: Tensor | None, chunks: Chunks, always: bool
) -> tuple[BlockMask | None, ...]:
    """The blocks that the queries of each chunk may see, of all that is behind them; None on CPUs.

    Args:
        tokens_BS: of whole sequences.
        documents_BS: their document ids; None: one stream.
        chunks: the first one's queries have no other tokens behind them.
        always: else None where a kernel needs nothing but the causal flag.
    """
    if not takes_blocks(tokens_BS.device):
        return (None,) * len(chunks.here)
    sequences, length = tokens_BS.shape
    made = list[BlockMask | None]()
    for number in chunks.here:
        if documents_BS is None and number == 0 and not always:
            made.append(None)
            continue
        end = (number + 1) * (length // chunks.number)
        seen_BM = tokens_BS.new_zeros(1, 1).expand(sequences, end)
        if documents_BS is not None:
            seen_BM = documents_BS[:, :end]
        made.append(document_blocks(seen_BM, length // chunks.number))
    return tuple(made)


def takes_blocks(device: torch.device) -> bool:
    """Whether attention there is FlexAttention's, where a causal flag is not enough."""
    return device.type != "cpu"


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

    documents_BM = documents_BM.contiguous()  # kernels read it, in whatever order

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + late >= k) & (documents_BM[b, q + late] == documents_BM[b, k])

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
