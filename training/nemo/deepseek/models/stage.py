"""What one pipeline stage computes in training; with all parts, the loss of the whole model.

B batch, S sequence, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek.config.layout import StageParts
from deepseek.models.losses import loss_sums
from deepseek.models.parts import Parts
from deepseek.models.transformer import Transformer


class Stage(Parts):
    """A view of consecutive parts of a transformer, whose modules it shares.

    Args:
        model: holds at least these parts.
        parts: which.
    """

    def __init__(self, model: Transformer, parts: StageParts) -> None:
        super().__init__()
        self.config = model.config
        self.embed = model.embed if parts.first else None
        self.layers = nn.ModuleDict({str(i): model.layers[str(i)] for i in parts.layers})
        self.norm = model.norm if parts.last else None
        self.head = model.head if parts.last else None
        self.mtp = model.mtp if parts.last else nn.ModuleList()
        self.mtp_embed = model.mtp_embed if parts.last else None
        self.recompute = model.recompute

    def forward(
        self,
        inputs: Tensor,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        documents_BS: Tensor,
        balance_scale_B: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, S, D) for the next stage; from the last stage the loss sums (2,).

        Args:
            inputs: tokens (B, S) for the first stage, the stage before's result for the others.
            tokens_BS: int64 ids, on every stage.
            labels_BS: next tokens, ``IGNORE_INDEX`` where there is none.
            positions_BS: int64.
            documents_BS: int32 document ids, -1 for padding.
            balance_scale_B: B times ``TokenContext.balance_scale``; None: not training.

        Returns:
            The last stage's two numbers are those of ``LossSums``: main and MTP.
        """
        isolated_BS = documents_BS if self.config.data.isolate_documents else None
        context = self.context(
            tokens_BS,
            positions_BS,
            isolated_BS,
            real_BS=documents_BS >= 0,
            balance_scale=balance_scale_B[0] if balance_scale_B is not None else None,
        )
        h_BSD = self.main(inputs, context)
        if self.head is None:
            return h_BSD
        ahead = self.predict_ahead(h_BSD, tokens_BS, context)
        return torch.stack(loss_sums(h_BSD, ahead, self.head, labels_BS, isolated_BS))
