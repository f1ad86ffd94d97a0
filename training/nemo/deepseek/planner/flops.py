"""FLOPs of a token as training's figures count them: three times the forward pass.

Counted are matrix products, the head and attention's two products over the sequence. Embedding,
router, norms and recomputation are not. Two things differ from one publisher to another, and a
``Convention`` names them: whether a causal mask halves attention, and whether MTP modules count.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from deepseek.config.cost import flops_per_token as flops_of_model
from deepseek.config.schema import ModelConfig
from deepseek.planner.architecture import Architecture


class Convention(NamedTuple):
    """How a figure counts FLOPs."""

    causal: bool = True
    """Attention is counted at half, as a causal mask needs it."""
    with_mtp: bool = True
    """MTP modules are counted, if the model has them."""

    @classmethod
    def of_text(cls, text: str, with_mtp: bool = False) -> Convention:
        """Of a description such as ``causal 3xfwd + MTP``.

        Args:
            text: of several descriptions, the first counts.
            with_mtp: holds where it names no MTP.
        """
        first = text.lower().split(";")[0]
        if "mtp" in first:
            with_mtp = not re.search(r"(no|without|excl\w*|not)\W+mtp", first)
        return cls(not re.search(r"non\W?causal", first), with_mtp)

    def __str__(self) -> str:
        return (
            f"{'' if self.causal else 'non-'}causal, MTP {'' if self.with_mtp else 'not '}counted"
        )


def flops_per_token(
    model: ModelConfig | Architecture, seq_length: int, convention: Convention
) -> int:
    """Training FLOPs of one token.

    Args:
        model: a configuration, or the sizes of a model that has none.
        seq_length: tokens that attention looks over.
        convention: what is counted.
    """
    if isinstance(model, ModelConfig):
        return flops_of_model(model, seq_length, convention.with_mtp, convention.causal)
    moe = model.moe_layers
    routed = model.top_k * model.expert_size
    block = {
        moe: size - (model.hidden * model.experts if moe else 0)
        for moe, size in model.block_size.items()
    }
    head = model.vocab * model.hidden
    products = head + (model.layers - moe) * block[False] + moe * (block[True] + routed)
    layers = model.layers
    if convention.with_mtp and model.mtp:
        layers += model.mtp
        products += model.mtp * (head + 2 * model.hidden**2 + block[True] + routed)
    return 6 * products + 6 * round(layers * scores_per_token(model, seq_length, convention.causal))


def scores_per_token(model: Architecture, seq_length: int, causal: bool) -> float:
    """Multiplications of one token with keys and values in one layer's attention, on average."""
    seen: float = seq_length / 2 if causal else seq_length
    if model.window and model.window < seq_length:
        near = model.window * (1 - model.window / (2 * seq_length))
        seen = (seen + (near if causal else seq_length)) / 2
    return seen * model.heads * (model.qk_dim + model.v_dim)
