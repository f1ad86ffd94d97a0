"""FSDP2's own collectives on CPUs, by way of ``exchange``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from deepseek.parallel import exchange


def use_exchange(module: FSDPModule) -> None:
    """Let FSDP gather the weights of ``module`` and sum its gradients through ``exchange``."""
    # torch declares base classes for these, in a private file, and asks for their methods only.
    module.set_custom_all_gather(_AllGather())  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]


class _Allocated:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Allocated):
    """Blocks, so that there is nothing to wait for later: CPU ranks have no second stream."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        exchange.all_gather(output_tensor, input_tensor, group)


class _ReduceScatter(_Allocated):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, op
        exchange.reduce_scatter(output_tensor, input_tensor, group)
