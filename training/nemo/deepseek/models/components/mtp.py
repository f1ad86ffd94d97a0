"""Multi-token prediction: one module per extra token ahead (arXiv:2412.19437 section 2.2).

B batch, S sequence, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek.config.schema import ModelConfig
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.context import TokenContext
from deepseek.models.components.norm import RMSNorm


class MultiTokenPredictor(nn.Module):
    """Depth k: joins the hidden state at i with the embedding of token i+k, predicts token i+k+1.

    Embedding and head are the main model's own and are passed in or applied by the caller.
    """

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.block = DeepSeekBlock(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(dim, eps)

    def forward(self, hidden_BSD: Tensor, ahead_BSD: Tensor, context: TokenContext) -> Tensor:
        """Next depth's hidden state, ready for the head.

        Args:
            hidden_BSD: the depth before, normed (the main model's final norm for the first depth).
            ahead_BSD: embedding of the token k places ahead of each position.
        """
        # The released weights take the embedding first; the paper's eq 21 writes it second.
        joined = torch.cat((self.enorm(ahead_BSD), self.hnorm(hidden_BSD)), dim=-1)
        return self.norm(self.block(self.eh_proj(joined), context))
