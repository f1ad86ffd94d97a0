"""Training losses as sums over label tokens: pure functions.

Every loss here is a sum. The training step divides by the number of label tokens of the whole
optimiser step (all ranks, all micro-batches), so the result does not depend on how the batch was
cut.

B batch, S sequence, T = B*S tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.models.components.head import Head
from deepseek.ops.cross_entropy import IGNORE_INDEX


class LossSums(NamedTuple):
    """Cross-entropy sums of one micro-batch, in nats."""

    main: Tensor
    """Next-token prediction."""
    mtp: Tensor
    """Multi-token prediction, averaged over depths; zero without MTP."""


def loss_sums(
    hidden_BSD: Tensor,
    mtp_hidden_BSD: Sequence[Tensor],
    head: Head,
    labels_BS: Tensor,
    documents_BS: Tensor | None = None,
) -> LossSums:
    """Cross-entropy sums of the main model and of the MTP depths (arXiv:2412.19437 eq 24-25).

    The MTP sums share the main task's divisor, as eq 24 divides by the sequence length T for every
    depth.

    Args:
        hidden_BSD: normed hidden state of the main model.
        mtp_hidden_BSD: normed hidden state of each depth.
        head: shared by all depths.
        labels_BS: next tokens, ``IGNORE_INDEX`` where there is none.
        documents_BS: ids of isolated documents, across whose borders nothing is predicted.
    """
    main = head.loss_sum(hidden_BSD, labels_BS)
    mtp = torch.zeros_like(main)
    for depth, depth_hidden_BSD in enumerate(mtp_hidden_BSD, start=1):
        ahead_BS = shift(labels_BS, depth, IGNORE_INDEX, documents_BS)
        mtp = mtp + head.loss_sum(depth_hidden_BSD, ahead_BS) / len(mtp_hidden_BSD)
    return LossSums(main, mtp)


def shift(ids_BS: Tensor, places: int, fill: int, documents_BS: Tensor | None = None) -> Tensor:
    """Position i gets the id ``places`` ahead; ``fill`` past the end or in another document."""
    ahead_BS = torch.full_like(ids_BS, fill)
    ahead_BS[:, :-places] = ids_BS[:, places:]
    if documents_BS is not None:
        other_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        other_BS[:, :-places] = documents_BS[:, places:] != documents_BS[:, :-places]
        ahead_BS = ahead_BS.masked_fill(other_BS, fill)
    return ahead_BS
