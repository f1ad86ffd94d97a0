"""The router: which experts a token goes to, and with what weights.

Source: arXiv:2412.19437 section 2.1.2, eq 12-16, node-limited routing included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepseek.models.components.feed_forward import is_watched
from deepseek.models.components.recompute import keep
from deepseek.ops.few_rows import linear
from deepseek.ops.routing import Choice, expert_weights, largest_places, route


class Routing(NamedTuple):
    """Decision of the router."""

    weights_TK: Tensor
    """fp32 weight of each chosen expert."""
    expert_ids_TK: Tensor
    """int64 chosen experts."""
    scores_TE: Tensor
    """fp32 unbiased scores."""
    logits_TE: Tensor
    """fp32 logits before scoring."""


class Router(nn.Module):
    """Group-limited top-k over sigmoid or softmax scores.

    Attributes:
        bias: fp32 (E,) correction bias, a buffer that stays fp32 whatever the module is cast to;
            None unless ``topk_method`` is ``noaux_tc``.
        tokens_per_expert: int64 (E,) assignments of real tokens since the last ``start_step``.
        balance_loss: fp64 scalar, balance loss since the last ``start_step``.
        listener: told each choice, see ``tell``. Not a hook: a layer with one is called module by
            module, which takes longer.
    """

    KEPT_IN_THEIR_DTYPE = ("bias", "balance_loss")

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        top_k: int,
        num_groups: int,
        top_k_groups: int,
        scoring: str,
        topk_method: str,
        normalise: bool,
        scaling_factor: float,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_k_groups = top_k_groups
        self.scoring = scoring
        self.topk_method = topk_method
        self.normalise = normalise
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        bias = torch.zeros(num_experts) if topk_method == "noaux_tc" else None
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self.tokens_per_expert: Tensor
        self.register_buffer(
            "tokens_per_expert", torch.zeros(num_experts, dtype=torch.int64), persistent=False
        )
        self.balance_loss: Tensor
        self.register_buffer("balance_loss", torch.zeros((), dtype=torch.float64), persistent=False)
        self.listener: Callable[[Tensor, Tensor, Tensor | None], None] | None = None

    def forward(self, x_TD: Tensor) -> Routing:
        """Route each row; everything is computed in fp32 (fp64 for fp64 input)."""
        found = route(x_TD, self.choice)
        if found is not None:
            return Routing(*found)
        dtype = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = linear(x_TD.to(dtype), self.weight.to(dtype))
            scores_TE = (
                logits_TE.sigmoid() if self.scoring == "sigmoid" else logits_TE.softmax(dim=-1)
            )
            expert_ids_TK = keep(lambda: self.choose(scores_TE.detach()))
            # The bias chooses but does not weigh: the weights come from the unbiased scores.
            weights_TK = expert_weights(
                scores_TE, expert_ids_TK, self.normalise, self.scaling_factor
            )
        return Routing(weights_TK, expert_ids_TK, scores_TE, logits_TE)

    @property
    def choice(self) -> Choice:
        """What kernels choose by."""
        softmax, factor = self.scoring == "softmax", self.scaling_factor
        of_scores = self.weight, self.bias, self.top_k, softmax
        return Choice(*of_scores, self._groups(), self.normalise, factor)

    @property
    def is_plain(self) -> bool:
        """Whether nobody watches it, or has replaced it."""
        return type(self) is Router and not is_watched(self)

    def tell(self, scores_TE: Tensor, expert_ids_TK: Tensor, real_BS: Tensor | None) -> None:
        """Tell the listener what has been chosen, and by which unbiased scores; real: False for
        padding, None: all are."""
        if self.listener is not None:
            self.listener(scores_TE, expert_ids_TK, real_BS)

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor, rate: float) -> None:
        """Raise the bias of underloaded experts by ``rate``, lower that of overloaded ones.

        Once per optimiser step, with the counts of the whole global batch (arXiv:2412.19437,
        section 2.1.2, auxiliary-loss-free load balancing).
        """
        if self.bias is None or rate == 0:
            return
        load_E = counts_E.to(torch.float64)
        self.bias += (rate * torch.sign(load_E.mean() - load_E)).to(self.bias.dtype)

    def start_step(self) -> None:
        """Forget the counts of the step before."""
        self.tokens_per_expert.zero_()
        self.balance_loss.zero_()

    @torch.no_grad()
    def choice_scores(self, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by, (T, E): biased scores, -inf outside a token's groups."""
        choice_TE = scores_TE if self.bias is None else scores_TE + self.bias
        if self._groups()[0] > 1:
            choice_TE = self._mask_groups(choice_TE)
        return choice_TE

    def _groups(self) -> tuple[int, int, int]:
        """Groups of experts, how many a token goes to, and how many scores make a group's."""
        groups = 1 if self.topk_method == "greedy" else self.num_groups
        return groups, self.top_k_groups, 2 if self.topk_method == "noaux_tc" else 1

    def choose(self, scores_TE: Tensor) -> Tensor:
        """The chosen experts, (T, K)."""
        return largest_places(self.choice_scores(scores_TE), self.top_k)

    def _mask_groups(self, choice_TE: Tensor) -> Tensor:
        """Keep only the experts of each token's best groups."""
        choice_TGe = choice_TE.unflatten(1, (self.num_groups, -1))
        score_TG = choice_TGe.topk(self._groups()[2], dim=-1).values.sum(dim=-1)
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
        kept_TG.scatter_(1, score_TG.topk(self.top_k_groups, dim=-1).indices, True)
        # -inf, not 0: a masked group must lose against a negative biased score too.
        return choice_TGe.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move with the module, but never lose the precision of the bias to a cast."""
        kept = {
            name: self._buffers.pop(name)
            for name in self.KEPT_IN_THEIR_DTYPE
            if name in self._buffers
        }
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is None:
                self._buffers[name] = None
                continue
            moved = fn(buffer)
            same_device = moved.device == buffer.device
            if moved.dtype != buffer.dtype:
                moved = buffer if same_device else buffer.to(moved.device)
            self._buffers[name] = moved
        return self
