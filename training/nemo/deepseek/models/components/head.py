"""The output head: logits for decoding, and the training loss without ever holding them all.

B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from deepseek.ops.cross_entropy import linear_cross_entropy


class Head(nn.Linear):
    """Linear map to the vocabulary, shared by the main model and every MTP depth."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__(dim, vocab_size, bias=False)

    def loss_sum(self, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy summed over labelled tokens, in nats; scalar."""
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.weight, labels_BS.flatten())
