"""Multi-head latent attention (arXiv:2412.19437 section 2.1.1, eq 1-11).

Keys and values of a token are made from one small latent (C numbers) plus one rotary key shared by
all heads; only these are cached. Two forms compute the same:

* expanded (training): keys and values are materialised per head, attention is ordinary;
* absorbed (decoding): the key up-projection is folded into the query and the value up-projection
  into the output, so that queries attend to the cached latents directly.

S is the number of new tokens here, M that of the tokens in the cache, these included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from deepseek.models.components.attention_node import LayerSizes, attention_node
from deepseek.models.components.feed_forward import Linear, RMSNorm, is_watched
from deepseek.models.components.heads import head_keys, head_queries
from deepseek.models.components.rope import rotate
from deepseek.ops.causal_attention import causal_attention
from deepseek.ops.fused_attention import fused_attention, takes_heads
from deepseek.ops.latent_attention import (
    Room,
    decode_attention,
    latent_attention,
    takes_latents,
)


class LatentStore(Protocol):
    """One layer's cache of latents, as attention sees it."""

    def append(self, latent_BSC: Tensor, k_rope_BSH: Tensor) -> tuple[Tensor, Tensor | None]:
        """Store the new tokens; return all latents with their rotary keys behind them
        (B, M, C + H), and which of them each new token may see (bool (B, S, M); None: all)."""
        ...

    def reserve(self, count: int) -> Room:
        """Room for so many new tokens, which the caller stores."""
        ...


class MultiHeadLatentAttention(nn.Module):
    """MLA; the number of heads is read from the projections' width, so shards work unchanged.

    Attributes:
        whole_sequence: from the latents (B, S, C) and rotary keys (B, S, H) here to those of the
            whole sequence; replaced where several ranks share each sequence.
        attend: attention of the queries here over the keys and values of the whole sequence;
            replaced likewise.
        largest_logit_N: raised to the largest attention logit of each head here, of training and of
            tokens that are no padding; None: not asked for.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        norm_eps: float,
        softmax_scale: float,
    ) -> None:
        super().__init__()
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.softmax_scale = softmax_scale
        q_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.q_lora_rank = q_lora_rank
        if q_lora_rank is None:
            self.wq = Linear(dim, q_width)
        else:
            self.wq_a = Linear(dim, q_lora_rank)
            self.q_norm = RMSNorm(q_lora_rank, norm_eps)
            self.wq_b = Linear(q_lora_rank, q_width)
        self.wkv_a = Linear(dim, kv_lora_rank + qk_rope_head_dim)
        self.kv_norm = RMSNorm(kv_lora_rank, norm_eps)
        self.wkv_b = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
        self.wo = Linear(num_heads * v_head_dim, dim)
        self.whole_sequence: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _whole_here
        self.attend: Callable[..., Tensor] = _attend_here
        self.largest_logit_N: Tensor | None = None

    def forward(
        self,
        x_BSD: Tensor,
        cos_BSA: Tensor,
        sin_BSA: Tensor,
        documents_BS: Tensor | None = None,
        cache: LatentStore | None = None,
        real_BS: Tensor | None = None,
        blocks: Sequence[BlockMask | None] = (None,),
    ) -> Tensor:
        """(B, S, D) -> (B, S, D).

        Args:
            cos_BSA, sin_BSA: rotation of the positions (``rope.rotation``).
            documents_BS: of the whole sequence: attention stays inside a document; None: one
                stream.
            cache: the new tokens also see the cached ones.
            real_BS: False for padding; None: all real.
            blocks: see ``TokenContext``.
        """
        q_BSNH, kv_BSX = self._queries(x_BSD), self.wkv_a(x_BSD)
        if cache is not None:
            norm, w = self.kv_norm, self.wkv_b.weight
            if norm.is_plain and takes_latents(q_BSNH, kv_BSX, norm.weight, cos_BSA, w):
                room, turned = cache.reserve(x_BSD.shape[1]), (cos_BSA, sin_BSA)
                given = q_BSNH, kv_BSX, norm.weight, norm.eps, turned, w, room, self.softmax_scale
                return self.wo(latent_attention(*given).flatten(2))
        latent_BSC, k_rope_BSH = self._latents(kv_BSX, cos_BSA, sin_BSA)
        if cache is None:
            keys = self.whole_sequence(latent_BSC, k_rope_BSH)
            seen = documents_BS, blocks
            y_BSNU = self._expanded(q_BSNH, (cos_BSA, sin_BSA), *keys, seen, real_BS)
        else:
            q_nope, q_rope = q_BSNH.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
            kept_BMX, visible_BSM = cache.append(latent_BSC, k_rope_BSH)
            q_rope = rotate(q_rope, cos_BSA, sin_BSA)
            y_BSNU = self._absorbed(q_nope, q_rope, kept_BMX, visible_BSM)
        return self.wo(y_BSNU.flatten(2))

    def add_to(
        self,
        h_BSD: Tensor,
        norm: RMSNorm,
        cos_BSA: Tensor,
        sin_BSA: Tensor,
        documents_BS: Tensor | None = None,
        cache: LatentStore | None = None,
        real_BS: Tensor | None = None,
        blocks: Sequence[BlockMask | None] = (None,),
    ) -> Tensor:
        """``h + self(norm(h))``, where it can be as one node of the graph, or one kernel; the rest
        as in ``forward``."""
        if (cache is None) == torch.is_grad_enabled() and self._is_plain(norm):
            if cache is None:
                y_BSD = self._in_one(h_BSD, norm, (cos_BSA, sin_BSA), documents_BS, real_BS)
            else:
                y_BSD = self._decoded(h_BSD, norm, (cos_BSA, sin_BSA), cache)
            if y_BSD is not None:
                return y_BSD
        seen = documents_BS, cache, real_BS, blocks
        return h_BSD + self(norm(h_BSD), cos_BSA, sin_BSA, *seen)

    def _is_plain(self, norm: RMSNorm) -> bool:
        """Whether it is its weights and no more, as the norm before it is, and all of each sequence
        is here."""
        if self.whole_sequence is not _whole_here or self.attend is not _attend_here:
            return False
        if type(self) is not MultiHeadLatentAttention or is_watched(self):
            return False
        linear, norms = [self.wkv_a, self.wkv_b, self.wo], [norm, self.kv_norm]
        if self.q_lora_rank is None:
            linear += [self.wq]
        else:
            linear, norms = [*linear, self.wq_a, self.wq_b], [*norms, self.q_norm]
        if any(x.eps != norm.eps for x in norms):
            return False
        return all(x.is_plain for x in linear) and all(x.is_plain for x in norms)

    def _in_one(
        self,
        h_BSD: Tensor,
        norm: RMSNorm,
        rotation: tuple[Tensor, Tensor],
        documents_BS: Tensor | None,
        real_BS: Tensor | None,
    ) -> Tensor | None:
        """``add_to`` in the expanded form by ``attention_node``; None, where that takes none of
        these."""
        of_latents, of_queries = self._weights()
        heads = len(of_queries[-1]) // (self.qk_nope_head_dim + self.qk_rope_head_dim)
        sizes = LayerSizes(
            self.kv_lora_rank,
            self.qk_nope_head_dim + self.qk_rope_head_dim,
            norm.eps,
            self.softmax_scale,
        )
        largest_BNS = self._room_for_logits(h_BSD.shape[0], heads, h_BSD.shape[1])
        seen = rotation, documents_BS, largest_BNS
        y_BSD = attention_node(h_BSD, norm.weight, *seen, sizes, of_latents, of_queries)
        if y_BSD is not None and largest_BNS is not None:
            self._note_logits(largest_BNS, real_BS)
        return y_BSD

    def _decoded(
        self, h_BSD: Tensor, norm: RMSNorm, rotation: tuple[Tensor, Tensor], cache: LatentStore
    ) -> Tensor | None:
        """``add_to`` in the absorbed form by a kernel; None, where that takes none of these."""
        nope, scale = self.qk_nope_head_dim, self.softmax_scale
        given = norm.weight, norm.eps, rotation, *self._weights()
        return decode_attention(h_BSD, *given, nope, cache.reserve, scale)

    def _weights(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Those of latents and output, and those of queries."""
        of_latents = self.wkv_a.weight, self.kv_norm.weight, self.wkv_b.weight, self.wo.weight
        if self.q_lora_rank is None:
            return of_latents, (self.wq.weight,)
        return of_latents, (self.wq_a.weight, self.q_norm.weight, self.wq_b.weight)

    def _queries(self, x_BSD: Tensor) -> Tensor:
        """eq 6-8: compressed query, expanded per head, not rotated yet; (B, S, N, H)."""
        if self.q_lora_rank is None:
            q = self.wq(x_BSD)
        else:
            q = self.wq_b(self.q_norm(self.wq_a(x_BSD)))
        return q.unflatten(-1, (-1, self.qk_nope_head_dim + self.qk_rope_head_dim))

    def _latents(self, kv_BSX: Tensor, cos_BSA: Tensor, sin_BSA: Tensor) -> tuple[Tensor, Tensor]:
        """eq 1 and 3: what is cached, C + H numbers a token."""
        latent, k_rope = kv_BSX.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_rope_BSH = rotate(k_rope.unsqueeze(2), cos_BSA, sin_BSA).squeeze(2)
        return self.kv_norm(latent), k_rope_BSH

    def _expanded(
        self,
        q_BSNH: Tensor,
        angles: tuple[Tensor, Tensor],
        latent_BSC: Tensor,
        k_rope_BSH: Tensor,
        seen: tuple[Tensor | None, Sequence[BlockMask | None]],
        real_BS: Tensor | None,
    ) -> Tensor:
        """eq 2, 4, 5, 9, 10: keys and values per head, then ordinary attention."""
        kv_BSNH = self.wkv_b(latent_BSC).unflatten(
            -1, (-1, self.qk_nope_head_dim + self.v_head_dim)
        )
        sizes = q_BSNH.shape[0], q_BSNH.shape[2], q_BSNH.shape[1]
        largest_BNS = self._room_for_logits(*sizes)
        scale = self.softmax_scale
        if self.attend is _attend_here and takes_heads(q_BSNH, kv_BSNH):
            y_BSNU = fused_attention(
                q_BSNH, kv_BSNH, k_rope_BSH, *angles, scale, seen[0], largest_BNS
            )
        else:
            q_BNSH = head_queries(q_BSNH, *angles)
            k_BNSH, v_BNSU = head_keys(kv_BSNH, k_rope_BSH, self.v_head_dim)
            heads = q_BNSH, k_BNSH, v_BNSU
            y_BSNU = self.attend(*heads, scale, *seen, largest_BNS).transpose(1, 2)
        if largest_BNS is not None:
            self._note_logits(largest_BNS, real_BS)
        return y_BSNU

    def _room_for_logits(self, sequences: int, heads: int, tokens: int) -> Tensor | None:
        """(B, N, S) for the largest logit of each query; None: they are not asked for."""
        if self.largest_logit_N is None or not torch.is_grad_enabled():
            return None
        return self.largest_logit_N.new_empty(sequences, heads, tokens)

    def _note_logits(self, largest_BNS: Tensor, real_BS: Tensor | None) -> None:
        assert self.largest_logit_N is not None
        if real_BS is not None:
            largest_BNS.masked_fill_(~real_BS.unsqueeze(1), float("-inf"))
        # A maximum: recomputation may raise it twice.
        largest_N = self.largest_logit_N.maximum(largest_BNS.amax(dim=(0, 2)))
        self.largest_logit_N.copy_(largest_N)

    def _absorbed(
        self,
        q_nope_BSNH: Tensor,
        q_rope_BSNH: Tensor,
        kept_BMX: Tensor,
        visible_BSM: Tensor | None,
    ) -> Tensor:
        """(W_uk^T q) . latent = q . (W_uk latent): attention over latents, none expanded.

        All heads of a sequence read its cache in one product: X = C + H, P = S*N, T = B*S.
        """
        w_NHC = self.wkv_b.weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        w_uk_NHC, w_uv_NUC = w_NHC.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        sizes = q_nope_BSNH.shape[:3]
        q_NTH = q_nope_BSNH.flatten(0, 1).transpose(0, 1)
        q_latent_BSNC = torch.bmm(q_NTH, w_uk_NHC).transpose(0, 1).unflatten(0, sizes[:2])
        q_BPX = torch.cat((q_latent_BSNC, q_rope_BSNH), dim=-1).flatten(1, 2) * self.softmax_scale
        scores_BPM = torch.bmm(q_BPX, kept_BMX.mT)
        if visible_BSM is not None:
            hidden_BS1M = ~visible_BSM.unsqueeze(2)
            scores_BSNM = scores_BPM.unflatten(1, sizes[1:])
            scores_BPM = scores_BSNM.masked_fill(hidden_BS1M, float("-inf")).flatten(1, 2)
        probs_BPM = scores_BPM.softmax(dim=-1, dtype=_at_least_fp32(scores_BPM.dtype))
        latent_BMC = kept_BMX[..., : self.kv_lora_rank]
        y_BPC = torch.bmm(probs_BPM.to(latent_BMC.dtype), latent_BMC)
        y_NTC = y_BPC.view(-1, sizes[2], self.kv_lora_rank).transpose(0, 1)
        return torch.bmm(y_NTC, w_uv_NUC.mT).transpose(0, 1).unflatten(0, sizes[:2])


def _whole_here(latent_BSC: Tensor, k_rope_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """Of sequences that no other rank has a part of."""
    return latent_BSC, k_rope_BSH


def _attend_here(
    q_BNSH: Tensor,
    k_BNSH: Tensor,
    v_BNSU: Tensor,
    scale: float,
    documents_BS: Tensor | None,
    blocks: Sequence[BlockMask | None],
    largest_BNS: Tensor | None = None,
) -> Tensor:
    """Of whole sequences, which are one chunk; see ``causal_attention``."""
    (mask,) = blocks
    return causal_attention(q_BNSH, k_BNSH, v_BNSU, scale, documents_BS, largest_BNS, mask)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
