"""Causal attention; shapes: ``models/__init__.py``; of M keys' tokens, the last S have queries.

On a CPU scores are computed for a block of queries at a time, against the keys that one of them may
see and no others: half of all scores, and of packed documents a diagonal of them. They are dropped
after use and computed again in the backward pass. R = B*N, the heads of all sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from deepseek.ops.document_attention import attend_in_blocks

BLOCK = 128
"""Queries whose scores exist at one time; of 64 to 256 the fastest with 512 and 4,096 keys."""
MOST_SCORES = 1 << 23
"""Numbers of one block of all heads, at most: fewer sequences at a time, then fewer queries."""


def causal_attention(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None = None,
    largest_BNS: Tensor | None = None,
    blocks: BlockMask | None = None,
) -> Tensor:
    """softmax(scale * q k^T + causal mask) v.

    Queries may be fewer than keys: they are then those of the last tokens.

    Args:
        q_BNSH, k_BNMH, v_BNMU: any float dtype, the same for all.
        scale: multiplies the scores.
        documents_BM: document id of each token; a token then sees only its own document.
        largest_BNS: filled with the largest score of each query, scaled; None: not asked for.
        blocks: what queries may see, for FlexAttention, which computes documents, fewer queries
            than keys and ``largest`` on GPUs; a CPU has no use for it.

    Returns:
        (B, N, S, U) in the dtype of ``v``.
    """
    if q_BNSH.device.type == "cpu":
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            q_BNSH, k_BNMH, v_BNMU = (x.to(dtype) for x in (q_BNSH, k_BNMH, v_BNMU))
        if not torch.compiler.is_compiling():
            return _BlockAttention.apply(q_BNSH, k_BNMH, v_BNMU, scale, documents_BM, largest_BNS)
        tells = largest_BNS is not None
        y_BNSU, told_BNS = _compiled(q_BNSH, k_BNMH, v_BNMU, scale, documents_BM, tells)
        if largest_BNS is not None:
            largest_BNS.copy_(told_BNS)
        return y_BNSU
    if blocks is not None:
        return attend_in_blocks(q_BNSH, k_BNMH, v_BNMU, scale, blocks, largest_BNS)
    plain = q_BNSH.shape[2] == k_BNMH.shape[2] and documents_BM is None and largest_BNS is None
    assert plain, "blocks are missing"
    return F.scaled_dot_product_attention(q_BNSH, k_BNMH, v_BNMU, is_causal=True, scale=scale)


def causal_attention_slow(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None = None,
    largest_BNS: Tensor | None = None,
) -> Tensor:
    """Reference implementation of ``causal_attention``: holds all scores."""
    scores_BNSM = _all_scores(q_BNSH, k_BNMH, scale, documents_BM)
    if largest_BNS is not None:
        largest_BNS.copy_(scores_BNSM.detach().amax(dim=-1))
    return scores_BNSM.softmax(dim=-1) @ v_BNMU


def _all_scores(
    q_BNSH: Tensor, k_BNMH: Tensor, scale: float, documents_BM: Tensor | None
) -> Tensor:
    """Scaled, -inf where a query may not look: (B, N, S, M)."""
    scores_BNSM = q_BNSH @ k_BNMH.transpose(-2, -1) * scale
    if documents_BM is None:
        documents_BM = torch.zeros(
            k_BNMH.shape[0], k_BNMH.shape[2], dtype=torch.int64, device=q_BNSH.device
        )
    mask = document_mask(documents_BM, q_BNSH.shape[2])
    return scores_BNSM.masked_fill(~mask, float("-inf"))


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where a query may look: not ahead; bool (S, M)."""
    everything = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everything.tril(keys - queries)


def document_mask(documents_BM: Tensor, queries: int) -> Tensor:
    """True where a query may look: not ahead, and inside its own document; bool (B, 1, S, M)."""
    same_BSM = documents_BM[:, -queries:].unsqueeze(2) == documents_BM.unsqueeze(1)
    causal_SM = causal_mask(queries, documents_BM.shape[1], documents_BM.device)
    return (same_BSM & causal_SM).unsqueeze(1)


class _Block(NamedTuple):
    """Some queries of some sequences, and the keys that one of them may see."""

    rows: slice
    """Heads of the sequences, of R."""
    queries: slice
    keys: slice
    mask: Tensor
    """Where a query may not look: -inf, else 0, (s, s) over the last keys, which are the queries'
    own tokens; or under documents True, bool (b, 1, s, m) over all of them."""


def _blocks(
    shape: tuple[int, int, int, int], dtype: torch.dtype, documents_BM: Tensor | None
) -> Iterator[_Block]:
    """All that must be computed for (B, N, S, M), from the first block of queries on."""
    sequences, heads, num_queries, num_keys = shape
    size = BLOCK
    while size > 16 and heads * size * num_keys > MOST_SCORES:
        size //= 2
    at_once = max(1, MOST_SCORES // (heads * size * num_keys))
    first_BM = None
    if documents_BM is not None and num_queries > size:
        at_once = 1  # their documents begin at other places
        first_BM = _first_of_document(documents_BM)
    ahead_SS = torch.ones(size, size, dtype=torch.bool).triu_(1)
    bias_SS = torch.zeros(size, size, dtype=dtype).masked_fill_(ahead_SS, float("-inf"))
    for sequence in range(0, sequences, at_once):
        rows = slice(sequence * heads, (sequence + at_once) * heads)
        for start in range(0, num_queries, size):
            end = min(start + size, num_queries)
            own = slice(num_keys - num_queries + start, num_keys - num_queries + end)
            square = slice(0, end - start)
            if documents_BM is None:
                queries, keys = slice(start, end), slice(0, own.stop)
                yield _Block(rows, queries, keys, bias_SS[square, square])
                continue
            begin = int(first_BM[sequence, own].amin()) if first_BM is not None else 0
            here_bM = documents_BM[sequence : sequence + at_once]
            other_bsm = here_bM[:, own].unsqueeze(2) != here_bM[:, begin : own.stop].unsqueeze(1)
            other_bsm[:, :, own.start - begin :] |= ahead_SS[square, square]
            keys = slice(begin, own.stop)
            yield _Block(rows, slice(start, end), keys, other_bsm.unsqueeze(1))


def _first_of_document(documents_BM: Tensor) -> Tensor:
    """For each token the first one with its document id, int64 (B, M)."""
    sorted_BM, order_BM = documents_BM.sort(dim=1, stable=True)
    starts_BM = torch.arange(documents_BM.shape[1]).repeat(len(documents_BM), 1)
    starts_BM[:, 1:].masked_fill_(sorted_BM[:, 1:] == sorted_BM[:, :-1], 0)
    first_BM = order_BM.gather(1, starts_BM.cummax(dim=1).values)
    return torch.empty_like(order_BM).scatter_(1, order_BM, first_BM)


def _probabilities(
    q_rsH: Tensor, k_rmH: Tensor, scale: float, mask: Tensor, largest_rs: Tensor | None = None
) -> Tensor:
    """Of one block, (r, s, m)."""
    none = q_rsH.new_empty(())
    scores_rsm = torch.baddbmm(none, q_rsH, k_rmH.transpose(1, 2), beta=0, alpha=scale)
    if mask.dim() == 2:
        scores_rsm[:, :, -len(mask) :].add_(mask)  # a fifth of what masked_fill_ takes
    else:
        scores_rsm.unflatten(0, (len(mask), -1)).masked_fill_(mask, float("-inf"))
    if largest_rs is not None:
        largest_rs.copy_(scores_rsm.amax(dim=-1))
    return scores_rsm.softmax(dim=-1)


def _add_product(sum_rIJ: Tensor, a_rIX: Tensor, b_rXJ: Tensor, factor: float = 1.0) -> None:
    """``sum += factor * a b``; the sum may be of a wider dtype."""
    if sum_rIJ.dtype == a_rIX.dtype:
        sum_rIJ.baddbmm_(a_rIX, b_rXJ, alpha=factor)
    else:
        sum_rIJ.add_(torch.bmm(a_rIX, b_rXJ), alpha=factor)


def _attend(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None,
    largest_BNS: Tensor | None,
) -> Tensor:
    """``causal_attention``, block by block."""
    shape = (*q_BNSH.shape[:3], k_BNMH.shape[2])
    largest_RS = None if largest_BNS is None else largest_BNS.view(-1, shape[2])
    q, k, v = (x.flatten(0, 1) for x in (q_BNSH, k_BNMH, v_BNMU))
    y_RSU = q.new_empty(*q.shape[:2], v.shape[2])
    with torch.autocast("cpu", enabled=False):
        for rows, queries, keys, mask in _blocks(shape, q.dtype, documents_BM):
            largest_rs = None if largest_RS is None else largest_RS[rows, queries]
            probs_rsm = _probabilities(q[rows, queries], k[rows, keys], scale, mask, largest_rs)
            y_RSU[rows, queries].baddbmm_(probs_rsm, v[rows, keys], beta=0)
    return y_RSU.view(*shape[:3], -1)


def _attend_back(
    grad_BNSU: Tensor,
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    shape = (*q_BNSH.shape[:3], k_BNMH.shape[2])
    grad_RSU = grad_BNSU.flatten(0, 1).contiguous()
    q, k, v = (x.flatten(0, 1) for x in (q_BNSH, k_BNMH, v_BNMU))
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    with torch.autocast("cpu", enabled=False):
        for rows, queries, keys, mask in _blocks(shape, q.dtype, documents_BM):
            q_rsH, k_rmH, grad_rsU = q[rows, queries], k[rows, keys], grad_RSU[rows, queries]
            probs_rsm = _probabilities(q_rsH, k_rmH, scale, mask)
            _add_product(grad_v[rows, keys], probs_rsm.transpose(1, 2), grad_rsU)
            grad_probs_rsm = torch.bmm(grad_rsU, v[rows, keys].transpose(1, 2))
            scores_rsm = torch._softmax_backward_data(grad_probs_rsm, probs_rsm, -1, q.dtype)
            grad_q[rows, queries].baddbmm_(scores_rsm, k_rmH, beta=0, alpha=scale)
            _add_product(grad_k[rows, keys], scores_rsm.transpose(1, 2), q_rsH, scale)
    of_q, of_k, of_v = (g.to(q.dtype).unflatten(0, shape[:2]) for g in (grad_q, grad_k, grad_v))
    return of_q, of_k, of_v


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BNSH: Tensor,
        k_BNMH: Tensor,
        v_BNMU: Tensor,
        scale: float,
        documents_BM: Tensor | None,
        largest_BNS: Tensor | None,
    ) -> Tensor:
        q_BNSH, k_BNMH, v_BNMU = (x.contiguous() for x in (q_BNSH, k_BNMH, v_BNMU))
        ctx.save_for_backward(q_BNSH, k_BNMH, v_BNMU, documents_BM)
        ctx.scale = scale
        return _attend(q_BNSH, k_BNMH, v_BNMU, scale, documents_BM, largest_BNS)

    @staticmethod
    def backward(ctx: Any, grad_BNSU: Tensor) -> tuple[Tensor | None, ...]:
        q_BNSH, k_BNMH, v_BNMU, documents_BM = ctx.saved_tensors
        grads = _attend_back(grad_BNSU, q_BNSH, k_BNMH, v_BNMU, ctx.scale, documents_BM)
        return (*grads, None, None, None)


# -- the same in a graph of torch's compiler, which cannot look into it --


@torch.library.custom_op("deepseek::block_attention", mutates_args=())
def _compiled(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None,
    tells: bool,
) -> tuple[Tensor, Tensor]:
    q_BNSH, k_BNMH, v_BNMU = (x.contiguous() for x in (q_BNSH, k_BNMH, v_BNMU))
    largest_BNS = q_BNSH.new_empty(q_BNSH.shape[:3] if tells else 0)
    told = largest_BNS if tells else None
    return _attend(q_BNSH, k_BNMH, v_BNMU, scale, documents_BM, told), largest_BNS


@_compiled.register_fake
def _(
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None,
    tells: bool,
) -> tuple[Tensor, Tensor]:
    shape = q_BNSH.shape[:3]
    return q_BNSH.new_empty(*shape, v_BNMU.shape[3]), q_BNSH.new_empty(shape if tells else 0)


@torch.library.custom_op("deepseek::block_attention_back", mutates_args=())
def _compiled_back(
    grad_BNSU: Tensor,
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q_BNSH, k_BNMH, v_BNMU = (x.contiguous() for x in (q_BNSH, k_BNMH, v_BNMU))
    return _attend_back(grad_BNSU, q_BNSH, k_BNMH, v_BNMU, scale, documents_BM)


@_compiled_back.register_fake
def _(
    grad_BNSU: Tensor,
    q_BNSH: Tensor,
    k_BNMH: Tensor,
    v_BNMU: Tensor,
    scale: float,
    documents_BM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (x.new_empty(x.shape) for x in (q_BNSH, k_BNMH, v_BNMU))
    return of_q, of_k, of_v


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *arguments, ctx.scale, documents_BM, _ = inputs
    ctx.save_for_backward(*arguments, documents_BM)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_BNSU: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *arguments, documents_BM = ctx.saved_tensors
    return (*_compiled_back(grad_BNSU, *arguments, ctx.scale, documents_BM), None, None, None)


_compiled.register_autograd(_backward, setup_context=_remember)
