"""Rotary position embedding, interleaved as in the released weights, with YaRN.

Sources: RoPE arXiv:2104.09864; YaRN arXiv:2309.00071; arXiv:2412.19437 section 4.3.
A = qk_rope_head_dim / 2 rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from deepseek.config.schema import RopeScaling
from deepseek.ops.native.build import kernel


def rotation(
    positions_BS: Tensor,
    dim: int,
    theta: float,
    scaling: RopeScaling | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cos and sin of each position's angles.

    Angles are computed in fp32, as the released code does (fp64 only for an fp64 model): another
    precision would move logits at long positions.

    Args:
        positions_BS: int64 positions.
        dim: rotated dims per head (2A).
        theta: RoPE base.
        scaling: YaRN, or None.
        dtype: fp64 for an fp64 model, else fp32.

    Returns:
        cos, sin: (B, S, A) in ``dtype``.
    """
    frequencies_A = _frequencies(dim, theta, scaling, dtype, positions_BS.device)
    angles_BSA = positions_BS.to(dtype).unsqueeze(-1) * frequencies_A
    cos_BSA, sin_BSA = angles_BSA.cos(), angles_BSA.sin()
    if scaling is not None:
        size = yarn_mscale(scaling.factor, scaling.mscale)
        size = size / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        cos_BSA, sin_BSA = cos_BSA * size, sin_BSA * size
    return cos_BSA, sin_BSA


def rotate(x_BSNH: Tensor, cos_BSA: Tensor, sin_BSA: Tensor) -> Tensor:
    """Rotate the pairs (0, 1), (2, 3), ... of the last dim; returns the dtype of ``x``.

    By a kernel on a CPU, or: a pair is a complex number, and turning it one multiplication: bitwise
    as ``rotate_slow``, in a third of its time.
    """
    if torch.compiler.is_compiling():  # the compiler fuses real numbers, but knows no complex ones
        return rotate_slow(x_BSNH, cos_BSA, sin_BSA)
    if can_turn(x_BSNH, cos_BSA):
        return turn(x_BSNH, cos_BSA, sin_BSA)
    turn_BS1A = torch.complex(cos_BSA, sin_BSA).unsqueeze(2)
    if not torch.is_grad_enabled():
        return _rotated(x_BSNH, turn_BS1A)
    return _Rotate.apply(x_BSNH, turn_BS1A)


def rotate_slow(x_BSNH: Tensor, cos_BSA: Tensor, sin_BSA: Tensor) -> Tensor:
    """Reference implementation of ``rotate``."""
    pairs = x_BSNH.to(cos_BSA.dtype).unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = cos_BSA.unsqueeze(2), sin_BSA.unsqueeze(2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x_BSNH.dtype)


def can_turn(x_BSNH: Tensor, cos_BSA: Tensor) -> bool:
    """Whether there is a kernel for these."""
    return kernel(*_TURN, x_BSNH, cos_BSA) is not None


def turn(x_BSNH: Tensor, cos_BSA: Tensor, sin_BSA: Tensor, by_head: bool = False) -> Tensor:
    """``x`` whose last 2A dims are rotated, the others as they are, in one pass of a kernel.

    Args:
        x_BSNH: see ``can_turn``.
        cos_BSA, sin_BSA: of the positions.
        by_head: the result is (B, N, S, H), as attention reads it.
    """
    return _Turn.apply(x_BSNH, cos_BSA, sin_BSA, by_head)


def softmax_scale(qk_head_dim: int, scaling: RopeScaling | None) -> float:
    """1/sqrt(H), times yarn_mscale squared when ``mscale_all_dim`` is set.

    The factor goes into the score, once for q and once for k: forgetting one of the two gives a
    model whose error grows with the position.
    """
    scale = qk_head_dim**-0.5
    if scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1; 1 when the context is not extended or mscale is 0."""
    if factor <= 1 or mscale == 0:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


_TURN = "turn_heads", "ppppnnnnnnnnnnnfn"


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BSNH: Tensor, cos_BSA: Tensor, sin_BSA: Tensor, by_head: bool
    ) -> Tensor:
        cos_BSA, sin_BSA = cos_BSA.contiguous(), sin_BSA.contiguous()
        ctx.save_for_backward(cos_BSA, sin_BSA)
        ctx.by_head = by_head
        sequences, tokens, heads, width = x_BSNH.shape
        sizes = (sequences, heads, tokens, width) if by_head else x_BSNH.shape
        y = x_BSNH.new_empty(sizes)
        y_BSNH = y.transpose(1, 2) if by_head else y
        turn_into(y_BSNH, x_BSNH, cos_BSA, sin_BSA, 1.0)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad_BSNH = grad.transpose(1, 2) if ctx.by_head else grad
        by_x_BSNH = grad.new_empty(grad_BSNH.shape)
        cos_BSA, sin_BSA = ctx.saved_tensors
        turn_into(by_x_BSNH, grad_BSNH, cos_BSA, sin_BSA, -1.0)
        return by_x_BSNH, None, None, None


def turn_into(
    y_BSNH: Tensor, x_BSNH: Tensor, cos_BSA: Tensor, sin_BSA: Tensor, sign: float
) -> None:
    """``turn`` into ``y``, without gradient; by -1 times the angles if ``sign`` is -1."""
    sequences, tokens, heads, width = x_BSNH.shape
    if x_BSNH.stride(3) != 1:
        x_BSNH = x_BSNH.contiguous()
    run, pairs = kernel(*_TURN, x_BSNH, cos_BSA), cos_BSA.shape[-1]
    assert run is not None, "asked before"
    run(
        y_BSNH, x_BSNH, cos_BSA, sin_BSA, sequences, tokens, heads, width - 2 * pairs, pairs,
        *y_BSNH.stride()[:3], *x_BSNH.stride()[:3], sign, torch.get_num_threads(),
    )  # fmt: skip


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSNH: Tensor, turn_BS1A: Tensor) -> Tensor:
        ctx.save_for_backward(turn_BS1A)
        return _rotated(x_BSNH, turn_BS1A)

    @staticmethod
    def backward(ctx: Any, grad_BSNH: Tensor) -> tuple[Tensor, None]:
        return _rotated(grad_BSNH, ctx.saved_tensors[0].conj()), None


def _rotated(x_BSNH: Tensor, turn_BS1A: Tensor) -> Tensor:
    wide = torch.float64 if turn_BS1A.dtype == torch.complex128 else torch.float32
    pairs = x_BSNH.to(wide).unflatten(-1, (-1, 2))
    *strides, step = pairs.stride()
    if step != 1 or any(n % 2 for n in (*strides, pairs.storage_offset())):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # no view as complex numbers
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * turn_BS1A)
    return rotated.flatten(-2).to(x_BSNH.dtype)


def _frequencies(
    dim: int,
    theta: float,
    scaling: RopeScaling | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Radians per position of each pair, (A,)."""
    exponents_A = torch.arange(0, dim, 2, device=device).to(dtype) / dim
    plain_A = 1.0 / theta**exponents_A
    if scaling is None:
        return plain_A
    stretched_A = plain_A / scaling.factor

    def pair_rotating(rotations: float) -> float:
        """Index of the pair that makes this many rotations over the original context."""
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_rotating(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_rotating(scaling.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    pairs_A = torch.arange(dim // 2, device=device).to(dtype)
    stretch_A = ((pairs_A - low) / width).clamp(0, 1)  # 0: fast pair, left alone; 1: slow pair
    return stretched_A * stretch_A + plain_A * (1 - stretch_A)
