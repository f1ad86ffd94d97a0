"""What every router chooses for a text, layer by layer, without training anything.

B batch, S sequence, T real tokens, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek.models.components.router import Router, Routing
from deepseek.models.transformer import Transformer


class LayerRouting(NamedTuple):
    """One router's view of the real tokens of one batch."""

    layer: str
    """Name of the block, as ``layers.3`` or ``mtp.0.block``."""
    tokens_T: np.ndarray
    """int64 ids, in the order of the text."""
    experts_TK: np.ndarray
    """int64 chosen experts, in no particular order."""
    scores_TE: np.ndarray
    """fp32 unbiased scores."""
    choice_TE: np.ndarray
    """fp32 scores that were compared: with the correction bias, -inf outside the chosen groups."""


@torch.no_grad()
def read_routing(
    model: Transformer,
    batches: Iterable[dict[str, np.ndarray]],
    observe: Callable[[LayerRouting], None],
) -> int:
    """Run a text through the model and show every router's choices to ``observe``.

    ``observe`` is called once per batch and MoE block, in order of depth (MTP blocks last), while
    the batch runs: only one layer's choices are ever in memory. Padding is left out. The model is
    not changed, and nothing is counted in it.

    Args:
        model: on any device.
        batches: arrays (B, S) as ``PackedDataset`` makes them: ``tokens``, ``positions``,
            ``documents`` (-1 for padding). Attention stops at the borders of documents if the
            model was trained so (``data.isolate_documents``).
        observe: takes what a router did.

    Returns:
        Real tokens read.
    """
    device = next(model.parameters()).device
    watch = _Watch(observe)
    handles = [
        router.register_forward_hook(watch.hook(name)) for name, router in model.routers().items()
    ]
    read = 0
    try:
        for batch in batches:
            tokens_BS, positions_BS, documents_BS = (
                torch.from_numpy(batch[key]).to(device)
                for key in ("tokens", "positions", "documents")
            )
            real_BS = documents_BS >= 0
            watch.start(tokens_BS, real_BS)
            isolated_BS = documents_BS if model.config.data.isolate_documents else None
            context = model.context(tokens_BS, positions_BS, isolated_BS, real_BS)
            main_BSD = model.main(tokens_BS, context)
            model.predict_ahead(main_BSD, tokens_BS, context)
            read += int(real_BS.sum())
    finally:
        for handle in handles:
            handle.remove()
    return read


class _Watch:
    """Turns what routers return into ``LayerRouting`` of the current batch."""

    def __init__(self, observe: Callable[[LayerRouting], None]) -> None:
        self._observe = observe
        self._tokens_T = np.empty(0, np.int64)
        self._real_T = torch.empty(0)

    def start(self, tokens_BS: Tensor, real_BS: Tensor) -> None:
        """A new batch."""
        self._real_T = real_BS.flatten()
        self._tokens_T = tokens_BS.flatten()[self._real_T].cpu().numpy()

    def hook(self, layer: str) -> Callable[[Router, Any, Routing], None]:
        """A forward hook for the router of ``layer``."""

        def show(router: Router, args: Any, routing: Routing) -> None:
            scores_TE = routing.scores_TE[self._real_T]
            self._observe(
                LayerRouting(
                    layer,
                    self._tokens_T,
                    routing.expert_ids_TK[self._real_T].cpu().numpy(),
                    scores_TE.float().cpu().numpy(),
                    _compared(router, scores_TE).float().cpu().numpy(),
                )
            )

        return show


def _compared(router: Router, scores_TE: Tensor) -> Tensor:
    """The scores of which the router takes the K highest."""
    choice_TE = scores_TE if router.bias is None else scores_TE + router.bias
    if router.num_groups > 1 and router.topk_method != "greedy":
        choice_TE = router._mask_groups(choice_TE)
    return choice_TE
