"""A layer of latent attention in training, on a CPU in fp32, as one node of autograd's graph, with
the norm before it and the residual addition behind.

An operator at a time it is some thirty nodes, a view of heads each one of them, and a small model
notices what each costs. Here the same products and kernels follow one another, gradients of one
input are added up where the first of them lies, and the same is kept. The twin is
``MultiHeadLatentAttention`` without it. X = C + H numbers of latent and rotary key; h is the
residual stream, and x what the norm makes of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.models.components.rope import turn_into
from deepseek.ops.fused_attention import Attended, attend, attend_back
from deepseek.ops.native import build
from deepseek.ops.rms_norm import norm_gradients, normed


class LayerSizes(NamedTuple):
    """Of a layer of attention."""

    latent: int
    """C."""
    head: int
    """Dims of a query."""
    norm_eps: float
    """Of all its norms."""
    softmax_scale: float


def attention_node(
    h_BSD: Tensor,
    norm: Tensor,
    rotation: tuple[Tensor, Tensor],
    documents_BS: Tensor | None,
    largest_BNS: Tensor | None,
    sizes: LayerSizes,
    of_latents: tuple[Tensor, Tensor, Tensor, Tensor],
    of_queries: tuple[Tensor, ...],
) -> Tensor | None:
    """``h + attention(norm(h))``, (B, S, D); None: there are no kernels, or they do not take these.

    Args:
        norm: weight of the norm before the layer.
        rotation, documents_BS, largest_BNS: see ``fused_attention``.
        of_latents: ``wkv_a``, the norm's weight, ``wkv_b``, ``wo``.
        of_queries: ``wq``; or ``wq_a``, the norm's weight, ``wq_b``.
    """
    if not build.takes_in_training(h_BSD, norm, *rotation, *of_latents, *of_queries):
        return None
    if not h_BSD.numel():
        return None
    cos_BSA, sin_BSA = (x.contiguous() for x in rotation)
    seen = cos_BSA, sin_BSA, documents_BS, largest_BNS
    return _Attention.apply(h_BSD, *seen, sizes, norm, *of_latents, *of_queries)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_BSD: Tensor,
        cos_BSA: Tensor,
        sin_BSA: Tensor,
        documents_BS: Tensor | None,
        largest_BNS: Tensor | None,
        sizes: LayerSizes,
        norm: Tensor,
        wkv_a: Tensor,
        kv_norm: Tensor,
        wkv_b: Tensor,
        wo: Tensor,
        *of_queries: Tensor,
    ) -> Tensor:
        tokens, h_TD, latent = h_BSD.shape[:2], h_BSD.flatten(0, 1), sizes.latent
        x_TD, of_norm_T1 = normed(h_TD, norm, sizes.norm_eps)
        q_TX, *of_q_norm = _queries(x_TD, of_queries, sizes.norm_eps)
        kv_TX = x_TD @ wkv_a.t()
        k_rope_BS1H = kv_TX.new_empty(*tokens, 1, len(wkv_a) - latent)
        rope_BS1H = kv_TX[:, latent:].view(k_rope_BS1H.shape)
        turn_into(k_rope_BS1H, rope_BS1H, cos_BSA, sin_BSA, 1.0)
        latent_TC, scale_T1 = normed(kv_TX[:, :latent], kv_norm, sizes.norm_eps)
        kept = attend(
            q_TX.view(*tokens, -1, sizes.head),
            (latent_TC @ wkv_b.t()).view(*tokens, q_TX.shape[1] // sizes.head, -1),
            k_rope_BS1H.squeeze(2),
            cos_BSA,
            sin_BSA,
            sizes.softmax_scale,
            documents_BS,
        )
        if largest_BNS is not None:
            largest_BNS.copy_(kept.largest_BNS)
        ctx.sizes, ctx.queries = sizes, len(of_queries)
        inputs, weights = (h_TD, of_norm_T1, norm, x_TD), (wkv_a, kv_norm, wkv_b, wo, *of_queries)
        ctx.save_for_backward(*inputs, kv_TX, latent_TC, scale_T1, *kept, *weights, *of_q_norm)
        y_TD = kept.y_BSNU.flatten(2).flatten(0, 1) @ wo.t()
        # Not in place: recomputation may have kept the product. No view: a pipeline's schedule
        # takes it off its graph.
        return h_BSD + y_TD.view(h_BSD.shape)

    @staticmethod
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, of_norm_T1, norm, x_TD, kv_TX, latent_TC, scale_T1, *rest = ctx.saved_tensors
        attended = len(Attended._fields)
        kept, (wkv_a, kv_norm, wkv_b, wo, *rest) = Attended(*rest[:attended]), rest[attended:]
        of_queries, of_q_norm = rest[: ctx.queries], rest[ctx.queries :]
        grad_TD, latent = grad_BSD.flatten(0, 1), ctx.sizes.latent
        needs_norm, *needs = ctx.needs_input_grad[6:]
        by_y = (grad_TD @ wo).view(kept.y_BSNU.shape)
        y_TX = kept.y_BSNU.view(len(x_TD), -1)
        by_q, by_kv, by_k_rope_BSH = attend_back(by_y, kept, ctx.sizes.softmax_scale)
        by_q_TX, by_made_TX = by_q.view(len(x_TD), -1), by_kv.view(len(x_TD), -1)
        by_latent_TC, by_kv_norm = norm_gradients(
            by_made_TX @ wkv_b, kv_TX[:, :latent], kv_norm, scale_T1, needs[1]
        )
        by_kv_TX = torch.empty_like(kv_TX)
        by_kv_TX[:, :latent] = by_latent_TC
        by_rope_BS1H = by_kv_TX[:, latent:].view(*by_k_rope_BSH.shape[:2], 1, -1)
        turn_into(by_rope_BS1H, by_k_rope_BSH.unsqueeze(2), kept.cos_BSA, kept.sin_BSA, -1.0)
        by_x_TD = by_kv_TX @ wkv_a
        by_queries = _queries_back(by_q_TX, x_TD, by_x_TD, of_queries, of_q_norm, needs[4:])
        of_norm = h_TD, norm, of_norm_T1, needs_norm
        by_h_TD, by_norm = norm_gradients(by_x_TD, *of_norm, plus=grad_TD)
        return (
            *(by_h_TD.view(grad_BSD.shape), None, None, None, None, None, by_norm),
            by_kv_TX.t() @ x_TD if needs[0] else None,
            by_kv_norm,
            by_made_TX.t() @ latent_TC if needs[2] else None,
            grad_TD.t() @ y_TX if needs[3] else None,
            *by_queries,
        )


def _queries(x_TD: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    """(T, N H), and of compressed queries what the backward pass needs: those, normed ones, and
    1 / rms."""
    if len(weights) == 1:
        return (x_TD @ weights[0].t(),)
    wq_a, q_norm, wq_b = weights
    small_TX = x_TD @ wq_a.t()
    normed_TX, scale_T1 = normed(small_TX, q_norm, eps)
    return normed_TX @ wq_b.t(), small_TX, normed_TX, scale_T1


def _queries_back(
    by_q_TX: Tensor,
    x_TD: Tensor,
    by_x_TD: Tensor,
    weights: list[Tensor],
    kept: list[Tensor],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the weights; that of ``x`` is added to ``by_x``."""
    if len(weights) == 1:
        by_x_TD.addmm_(by_q_TX, weights[0])
        return (by_q_TX.t() @ x_TD if needs[0] else None,)
    (wq_a, q_norm, wq_b), (small_TX, normed_TX, scale_T1) = weights, kept
    by_normed_TX = by_q_TX @ wq_b
    by_small_TX, by_norm = norm_gradients(by_normed_TX, small_TX, q_norm, scale_T1, needs[1])
    by_x_TD.addmm_(by_small_TX, wq_a)
    return (
        by_small_TX.t() @ x_TD if needs[0] else None,
        by_norm,
        by_q_TX.t() @ normed_TX if needs[2] else None,
    )
