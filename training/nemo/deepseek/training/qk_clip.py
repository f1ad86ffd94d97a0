"""QK-clip: weights of heads whose attention logits grow too large are scaled down after a step.

Source: Kimi K2, arXiv:2507.20534 section 2.1 (MuonClip). Of each head the largest logit S of the
step, over all its tokens, gives gamma = min(1, threshold / S). What makes the head's own part of
the logits is scaled so that these shrink by gamma: queries and keys without position by its root
each, rotary queries by gamma, since the rotary key is shared by all heads and stays.

It needs no state: what a step has clipped is in the weights.

Shapes: ``models/__init__.py``; L blocks, those of MTP modules last.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.transformer import Transformer
from deepseek.parallel.gradients import max_over
from deepseek.parallel.mesh import Meshes, SingleProcess, local, local_slices


class QueryKeyClip:
    """The largest attention logits of one step, and the clip that follows from them.

    Args:
        model: the parts that are here.
        threshold: the largest logit that is left alone.
        meshes: where this rank stands.
    """

    def __init__(
        self, model: Transformer, threshold: float, meshes: Meshes | SingleProcess
    ) -> None:
        self.threshold, self.meshes = threshold, meshes
        weight = next(model.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.largest_LN = torch.full(_shape(model), -torch.inf, dtype=dtype, device=weight.device)
        heads = self.largest_LN.shape[1] // meshes.layout.tp
        here = slice(heads * meshes.coordinate.tp, heads * (meshes.coordinate.tp + 1))
        for number, attn in _attentions(model):
            attn.largest_logit_N = self.largest_LN[number, here]

    def know_all_ranks(self) -> None:
        """Take in what other ranks have found, of their tokens, heads and blocks."""
        max_over(self.largest_LN, self.meshes.world)

    @property
    def clipped_LN(self) -> Tensor:
        """Which heads are above the threshold, bool."""
        return self.largest_LN > self.threshold

    @torch.no_grad()
    def scale_weights(self, model: Transformer) -> None:
        """Of the heads above the threshold, as far as they are here."""
        gamma_LN = (self.threshold / self.largest_LN).where(self.clipped_LN, 1.0)
        for number, attn in _attentions(model):
            gamma_N1 = gamma_LN[number].unsqueeze(1)
            root_NH = gamma_N1.sqrt().expand(-1, attn.qk_nope_head_dim)
            query = attn.wq if attn.q_lora_rank is None else attn.wq_b
            _scale_rows(query.weight, root_NH, gamma_N1.expand(-1, attn.qk_rope_head_dim))
            values_NU = torch.ones_like(gamma_N1).expand(-1, attn.v_head_dim)
            _scale_rows(attn.wkv_b.weight, root_NH, values_NU)


def _shape(model: Transformer) -> tuple[int, int]:
    config = model.config
    blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    return blocks, config.num_attention_heads


def _attentions(model: Transformer) -> Iterator[tuple[int, MultiHeadLatentAttention]]:
    """Those that are here, by the numbers of their blocks."""
    for name, module in model.named_modules():
        if isinstance(module, MultiHeadLatentAttention):  # layers.3.attn, mtp.0.block.attn
            kind, number, *_ = name.split(".")
            yield int(number) + (model.config.num_hidden_layers if kind == "mtp" else 0), module


def _scale_rows(weight: Tensor, *factors: Tensor) -> None:
    """Rows by head, of each head those without position first; whatever part of them is here."""
    factors_O = torch.cat(factors, dim=1).flatten()[local_slices(weight)[0]]
    local(weight).mul_(factors_O.unsqueeze(1).to(weight.dtype))
