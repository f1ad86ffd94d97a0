"""Low-rank adapters beside frozen matrices (LoRA, arXiv:2106.09685).

A matrix W (O, I) becomes ``W + alpha / r * B A`` with A (r, I) and B (O, r). B starts at zero, so a
model with fresh adapters computes what it did without them. Every routed expert has a pair of its
own, stacked as the experts are: A (E, r, I), B (E, O, r); r is the rank.

Adapters keep the names of what they adapt: ``wo.lora_a`` beside ``wo.weight``,
``experts.w1_lora_a`` beside ``experts.w1``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek.config.weights import packed_row_bytes
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.feed_forward import FeedForward, Linear
from deepseek.models.components.moe import GroupedExperts, MoE
from deepseek.ops.grouped_linear import grouped_linear
from deepseek.ops.packed import packed_grouped_linear, packed_linear


class LoraLinear(Linear):
    """A linear map with an adapter."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float) -> None:
        super().__init__(in_features, out_features)
        self.lora_a = nn.Parameter(torch.empty(rank, in_features))
        self.lora_b = nn.Parameter(torch.empty(out_features, rank))
        self.rank, self.scale = rank, scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.adapted(x, self.weight, self.lora_a, self.lora_b)

    def adapted(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """``x W^T + scale x A^T B^T``; of parts of the matrices a part, or a partial sum, of it."""
        return self.product(x, weight) + self.scale * F.linear(F.linear(x, a), b)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The matrix that computes the same without an adapter."""
        return self.weight + self.scale * self.lora_b @ self.lora_a


class LoraExperts(GroupedExperts):
    """Routed experts, each with adapters of its own beside some of its matrices."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        matrices: Iterable[str],
        rank: int,
        scale: float,
    ) -> None:
        super().__init__(num_experts, dim, hidden_dim)
        self.adapted = tuple(sorted(matrices))
        """Which of w1, w2, w3."""
        self.rank, self.scale = rank, scale
        for name in self.adapted:
            _, rows, columns = getattr(self, name).shape
            a, b = torch.empty(num_experts, rank, columns), torch.empty(num_experts, rows, rank)
            setattr(self, f"{name}_lora_a", nn.Parameter(a))
            setattr(self, f"{name}_lora_b", nn.Parameter(b))

    def product(self, name: str, x_PI: Tensor, padded_e: Tensor) -> Tensor:
        """Rows sorted by expert (P, I) -> (P, O)."""
        y_PO = super().product(name, x_PI, padded_e)
        if name not in self.adapted:
            return y_PO
        a, b = (self.matrix(f"{name}_lora_{side}", x_PI.dtype) for side in "ab")
        return y_PO + self.scale * grouped_linear(grouped_linear(x_PI, a, padded_e), b, padded_e)

    @torch.no_grad()
    def merged(self, name: str) -> Tensor:
        """The stack ``name`` that computes the same without adapters."""
        if name not in self.adapted:
            return getattr(self, name)
        a, b = (getattr(self, f"{name}_lora_{side}") for side in "ab")
        return getattr(self, name) + self.scale * b @ a


def add_adapters(
    blocks: Iterable[nn.Module], matrices: Collection[str], rank: int, scale: float
) -> None:
    """Put adapters beside ``matrices`` (names as in ``config/weights.py``) of ``blocks``."""
    for block in blocks:
        assert isinstance(block, DeepSeekBlock)
        _adapt(block.attn, matrices, rank, scale)
        if isinstance(block.ffn, MoE):
            _adapt(block.ffn.shared_experts, matrices, rank, scale)
            stacked = {name.removeprefix("experts.") for name in matrices if "experts." in name}
            if stacked:
                shape = block.ffn.experts.w1.shape
                block.ffn.experts = LoraExperts(shape[0], shape[2], shape[1], stacked, rank, scale)
        else:
            assert isinstance(block.ffn, FeedForward)
            _adapt(block.ffn, matrices, rank, scale)


def pack_base(blocks: Iterable[nn.Module], kind: str) -> None:
    """Hold the matrices of ``blocks``, but for routers, in packed rows (``ops/packed.py``), under
    the names that they have."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Linear):
                module.weight = _packed(module.weight, kind)
                module.product = partial(packed_linear, kind=kind)
            elif isinstance(module, GroupedExperts):
                for name in ("w1", "w2", "w3"):
                    setattr(module, name, _packed(getattr(module, name), kind))
                module.grouped = partial(packed_grouped_linear, kind=kind)


def _packed(weight: Tensor, kind: str) -> nn.Parameter:
    """Room for the packed rows of a matrix, or of a stack."""
    shape = (*weight.shape[:-1], packed_row_bytes(weight.shape[-1], kind))
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return "lora_" in name.rpartition(".")[2]


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Only adapters get gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of the same model without adapters, names as it has them."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    for prefix, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{prefix}.weight"] = module.merged()
        elif isinstance(module, LoraExperts):
            state |= {f"{prefix}.{name}": module.merged(name) for name in module.adapted}
    return state


def _adapt(owner: nn.Module | None, matrices: Collection[str], rank: int, scale: float) -> None:
    if owner is None:
        return
    for name, linear in list(owner.named_children()):
        if name in matrices and isinstance(linear, nn.Linear):
            made = LoraLinear(linear.in_features, linear.out_features, rank, scale)
            made.weight = linear.weight
            setattr(owner, name, made)
