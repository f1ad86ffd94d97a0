"""The bytes that a stage of a model holds while it computes, told without computing: on fakes.

Every tensor is one of torch's fakes, with a shape and no numbers, so that a rank of the largest
model takes seconds. What torch keeps for the backward pass is what it would keep on a device.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek.config.layout import Layout, StageSlice
from deepseek.config.schema import ModelConfig
from deepseek.models.components import attention
from deepseek.models.components.moe import GroupedExperts, MoE
from deepseek.models.transformer import Stage, Transformer
from deepseek.ops import grouped_linear
from deepseek.parallel import expert_dispatcher
from deepseek.parallel.expert_dispatcher import AllToAllDispatcher


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes until it is gone.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                _, before = self._alive.get(storage._cdata, (None, 0))
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._at_most += storage.nbytes() - before
        if self._at_most > self.peak:  # what is gone is looked for only when it matters
            self._at_most = self.count()
            self.peak = max(self.peak, self._at_most)
        return result

    def count(self) -> int:
        """Bytes alive at this moment."""
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        return sum(size for _, size in self._alive.values())


class _Attention(torch.autograd.Function):
    """What a flash kernel keeps: inputs, output, one number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        out = v.new_empty(v.shape[0], v.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _GroupedProduct(torch.autograd.Function):
    """What the grouped product keeps; torch's own fake of it takes bf16 alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x.new_empty(x.shape[0], w.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(w), None


class _Balanced(AllToAllDispatcher):
    """Every rank of the EP group gets as many rows as it sends, and they do not travel."""

    def __init__(self, num_experts: int, num_ranks: int) -> None:
        self.num_experts, self.num_ranks, self.group = num_experts, num_ranks, None  # type: ignore
        self.experts_per_rank = num_experts // num_ranks

    def exchange_counts(self, expert_ids_R: Tensor) -> Any:
        each = expert_ids_R.numel() // self.num_ranks
        received_ne = expert_ids_R.new_zeros(self.num_ranks, self.experts_per_rank)
        told = SimpleNamespace(tolist=lambda: [[each] * self.num_ranks] * 2)
        return _Counts(received_ne, told)


class _Counts:
    def __init__(self, received_ne: Tensor, sums: Any) -> None:
        self._received, self._sums = received_ne, sums

    def sum(self, dim: int) -> Any:
        return self._sums

    def __getitem__(self, index: int) -> Tensor:
        return self._received


def stage_bytes(
    config: ModelConfig, layout: Layout, part: StageSlice, in_flight: int, autocast: bool
) -> tuple[int, int]:
    """Of a stage whose rank has all its weights gathered, with whole gradients, TP 1.

    Returns:
        What each micro-batch in flight keeps, and the most that is there on top of weights and
        gradients while one of ``in_flight`` goes backward.
    """
    assert layout.tp == 1
    rows, length = config.micro_batch_size, config.data.seq_length
    live = LiveBytes()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), live:
        patch.setattr(expert_dispatcher, "all_to_all_rows", lambda rows, *_: rows.clone())
        patch.setattr(attention, "causal_attention", lambda q, k, v, *_: _Attention.apply(q, k, v))
        patch.setattr(
            grouped_linear.F, "grouped_mm", lambda x, w, offs: _GroupedProduct.apply(x, w, offs)
        )
        model = Transformer(config, [part])
        for module in model.modules():
            if isinstance(module, MoE) and layout.ep > 1:
                here = config.n_routed_experts // layout.ep
                module.experts = GroupedExperts(
                    here, config.hidden_size, config.moe_intermediate_size
                )
                module.dispatcher = _Balanced(config.n_routed_experts, layout.ep)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        stage = Stage(model, part)
        ids = torch.zeros(rows, length, dtype=torch.int64)
        arguments = (ids, ids, ids, ids.int(), torch.ones(rows))
        fixed = live.count()

        def forward() -> Tensor:
            inputs = ids
            if not part.first:
                inputs = torch.empty(rows, length, config.hidden_size, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                return stage(inputs, *arguments)

        outputs = [forward()]
        first = live.count() - fixed
        outputs += [forward() for _ in range(in_flight - 1)]
        kept = (live.count() - fixed - first) // max(1, in_flight - 1)
        live.peak = 0
        output = outputs.pop(0)
        torch.autograd.backward([output], [torch.empty_like(output)])
        return kept, live.peak - fixed
