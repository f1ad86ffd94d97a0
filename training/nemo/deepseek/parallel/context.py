"""Context parallelism (CP), applied to a finished model: each rank keeps a part of every sequence.

Everything but attention works on tokens one by one, so a rank computes it for its own. Keys and
values of the whole sequence are made from latents, and MLA's are small: C + H numbers a token (V3:
576) where keys and values of 128 heads are 40,960. They are gathered once a layer, before they are
expanded; sending them round in a ring would be the same traffic in more, smaller messages.

The last tokens of a sequence see most of it, the first ones little. Of 2 n chunks, rank r of n has
chunk r and chunk 2 n - 1 - r, so that all ranks compute the same number of scores.

For weights the ranks are data shards like any other: FSDP adds their gradients up.

Shapes: ``models/__init__.py``, with s = S/n; c = S/2n is a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.moe import MoE
from deepseek.models.transformer import Transformer
from deepseek.ops.causal_attention import causal_attention
from deepseek.ops.document_attention import Chunks
from deepseek.parallel.collectives import gather_sequence, sum_forward
from deepseek.parallel.mesh import Meshes


def shard_sequences(model: Transformer, meshes: Meshes) -> None:
    """Let ``model`` work on this rank's part of each sequence, in place.

    It is given whole sequences still, of ids and positions; hidden states are in parts. Where TP
    divides sequences too, it divides what is here.
    """
    group = meshes.cp
    if group is None:
        return
    rank, size = dist.get_rank(group), meshes.layout.cp

    def part(whole: Tensor) -> Tensor:
        return sequence_part(whole, rank, size)

    def cut_tokens(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (part(args[0]),)

    def cut_rotation(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BsD, cos_BSA, sin_BSA, documents_BS, cache, real_BS, blocks = args
        real_Bs = None if real_BS is None else part(real_BS)
        return x_BsD, part(cos_BSA), part(sin_BSA), documents_BS, cache, real_Bs, blocks

    def cut_mask(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BsD, real_BS, *others = args
        return x_BsD, None if real_BS is None else part(real_BS), *others

    def whole_sequence(latent_BsC: Tensor, k_rope_BsH: Tensor) -> tuple[Tensor, Tensor]:
        widths = latent_BsC.shape[-1], k_rope_BsH.shape[-1]
        keys_BSX = gather_sequence(torch.cat((latent_BsC, k_rope_BsH), dim=-1), group)
        latent_BSC, k_rope_BSH = in_order(keys_BSX, size).split(widths, dim=-1)
        return latent_BSC.to(latent_BsC.dtype), k_rope_BSH.to(k_rope_BsH.dtype)

    def attend(*arguments: Any) -> Tensor:
        return attend_to_whole(rank, size, *arguments)

    model.chunks = Chunks(2 * size, (rank, 2 * size - 1 - rank))
    for embed in (model.embed, model.mtp_embed):
        if embed is not None:
            embed.register_forward_pre_hook(cut_tokens)
    for head in (model.head, model.mtp_head):
        if head is not None:
            head.sequence_part = part
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            module.register_forward_pre_hook(cut_rotation)
            module.whole_sequence, module.attend = whole_sequence, attend
        elif isinstance(module, MoE):
            module.register_forward_pre_hook(cut_mask, prepend=True)  # TP cuts what is left
            module.sum_over_sequence = _then_over(module.sum_over_sequence, group)


def sequence_part(whole: Tensor, rank: int, size: int) -> Tensor:
    """(B, S, ...) -> (B, S/n, ...): chunk ``rank`` and, from the end, its counterpart.

    Args:
        whole: S is a multiple of 2 n.
        rank: of n.
        size: n.
    """
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim=1)


def in_order(gathered: Tensor, size: int) -> Tensor:
    """(B, S, ...): the parts of n ranks, one after the other, as the sequence they are of."""
    parts_BnPc = gathered.unflatten(1, (size, 2, -1))
    first, second = parts_BnPc[:, :, 0], parts_BnPc[:, :, 1].flip(1)
    return torch.cat((first, second), dim=1).flatten(1, 2)


def attend_to_whole(
    rank: int,
    size: int,
    q_BNsH: Tensor,
    k_BNSH: Tensor,
    v_BNSU: Tensor,
    scale: float,
    documents_BS: Tensor | None = None,
    blocks: Sequence[BlockMask | None] = (None, None),
    largest_BNs: Tensor | None = None,
) -> Tensor:
    """Causal attention of a rank's two chunks of queries over the whole sequence: (B, N, s, U).

    Args:
        rank: of n.
        size: n.
        q_BNsH: of this rank's part.
        k_BNSH, v_BNSU: of all tokens.
        scale: of the scores.
        documents_BS: of all tokens; None: one stream.
        blocks: of both chunks; see ``causal_attention``.
        largest_BNs: see ``causal_attention``.
    """
    chunk = k_BNSH.shape[2] // (2 * size)
    results = []
    largest = (None, None) if largest_BNs is None else largest_BNs.chunk(2, dim=2)
    numbers = rank, 2 * size - 1 - rank
    chunks = zip(q_BNsH.chunk(2, dim=2), numbers, blocks, largest, strict=True)
    for q_BNcH, number, mask, largest_BNc in chunks:
        end = (number + 1) * chunk
        keys = k_BNSH[:, :, :end], v_BNSU[:, :, :end]
        documents = None if documents_BS is None else documents_BS[:, :end]
        results.append(causal_attention(q_BNcH, *keys, scale, documents, largest_BNc, mask))
    return torch.cat(results, dim=2)


def _then_over(inner: Any, group: dist.ProcessGroup) -> Any:
    return lambda part: sum_forward(inner(part), group)
