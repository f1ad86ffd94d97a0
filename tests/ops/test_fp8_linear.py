"""Products in FP8: tile by tile, forward and backward, and what must never happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.ops import fp8_kernels
from deepseek.ops.fp8 import E4M3
from deepseek.ops.fp8_linear import (
    fp8_grouped_linear,
    fp8_linear,
    fp8_linear_slow,
    pack_tiles,
    round_blocks,
    round_columns,
    round_rows,
    rounded_slow,
    unpack_tiles,
)


def wide(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of many sizes, in tiles of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.randn(shape, generator=generator).exp()).to(dtype)


def columns_slow(x_RI: Tensor) -> Tensor:
    """Each column in tiles of 128 rows."""
    parts = [torch.stack([rounded_slow(c) for c in part.T], 1) for part in x_RI.split(128)]
    return torch.cat(parts)


def all_columns(x_RI: Tensor) -> Tensor:
    """Of one expert's rows."""
    return round_columns(x_RI, torch.tensor([len(x_RI)]))


def test_all_three_products() -> None:
    """Of matrices that are no multiple of a tile."""
    x_RI, w_OI = wide(150, 200).requires_grad_(), wide(130, 200, seed=1).requires_grad_()
    grad_RO = wide(150, 130, seed=2)
    y_RO = fp8_linear(x_RI, w_OI)
    torch.testing.assert_close(y_RO, fp8_linear_slow(x_RI.detach(), w_OI.detach()))
    y_RO.backward(grad_RO)
    torch.testing.assert_close(x_RI.grad, fp8_linear_slow(grad_RO, w_OI.detach().T))
    kept_RI = round_rows(x_RI.detach()).values()
    torch.testing.assert_close(w_OI.grad, columns_slow(grad_RO).T @ columns_slow(kept_RI))


def test_experts_have_tiles_of_their_own() -> None:
    """Each as if it were alone, and rows that are nobody's do not matter, whatever they hold."""
    counts = [3, 0, 131, 16]
    rows = sum(counts)
    x_RI, w_EOI = wide(rows + 5, 140), wide(4, 6, 140, seed=1)
    x_RI[rows:] = torch.nan
    grad_RO = wide(rows + 5, 6, seed=2)
    grad_RO[rows:] = torch.nan
    x_RI.requires_grad_(), w_EOI.requires_grad_()
    y_RO = fp8_grouped_linear(x_RI, w_EOI, torch.tensor(counts))
    y_RO.backward(grad_RO)
    start = 0
    for expert, count in enumerate(counts):
        own = slice(start, start + count)
        start += count
        x, w = x_RI.detach()[own].clone().requires_grad_(), w_EOI.detach()[expert].clone()
        y = fp8_linear(x, w.requires_grad_())
        y.backward(grad_RO[own])
        torch.testing.assert_close(y_RO[own], y)
        torch.testing.assert_close(x_RI.grad[own], x.grad)
        torch.testing.assert_close(w_EOI.grad[expert], w.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_holds_what_e4m3_leaves(dtype: torch.dtype) -> None:
    """To the last bit, so that products of bf16 are those of FP8; each within half a step."""
    x = wide(70, 150, dtype=dtype)
    for rounded in (round_rows(x).values(), round_blocks(x).values(), all_columns(x)):
        assert rounded.dtype == dtype and torch.equal(rounded.bfloat16().to(dtype), rounded)
        large = x.abs() > x.abs().max() / 400
        assert ((rounded - x).abs() <= x.abs() / 16)[large].all() and (rounded != x).any()
    stack = torch.stack([x, 3 * x])
    assert torch.equal(round_blocks(stack).values()[1], round_blocks(3 * x).values())


def test_extremes() -> None:
    """Zeros stay, the largest number does not overflow, and what is not finite is not hidden."""
    assert torch.equal(round_rows(torch.zeros(2, 3)).values(), torch.zeros(2, 3))
    for largest in (448.0, 449.0, 3e38, 1e-30, 2.0**-130):
        rounded = round_rows(torch.tensor([[largest, -largest]])).values()
        assert rounded.isfinite().all() and (rounded.abs() <= 1.07 * largest).all()
    for bad in (torch.nan, torch.inf):
        assert not round_rows(torch.tensor([[1.0, bad]])).values().isfinite().all()
        assert not all_columns(torch.tensor([[1.0], [bad]])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_as_bytes(dtype: torch.dtype) -> None:
    """What comes back is what e4m3 leaves, in any tile: zeros, tiny, huge, no number."""
    x_RD = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_RD[0], x_RD[1, 7], x_RD[2] = 0, float("nan"), x_RD[2] * 2.0**-120
    x_RD[3] *= 2.0**120
    packed = pack_tiles(x_RD)
    assert (packed.shape, packed.dtype) == ((5, 300 + 3), torch.uint8)
    back_RD = unpack_tiles(packed, 300, dtype)
    assert torch.equal(back_RD.nan_to_num(), round_rows(x_RD).values().nan_to_num())
    assert back_RD[1, :128].isnan().all() and not back_RD[0].any()
    assert torch.equal(pack_tiles(back_RD[2:]), packed[2:])  # nothing more is lost
    assert unpack_tiles(packed[:0], 300, dtype).shape == (0, 300)


class FalseScaledMM:
    """``torch.nn.functional.scaled_mm`` as cuBLAS takes tiles and blocks, and in no other form."""

    calls: list[tuple[int, ...]]

    def __init__(self) -> None:
        self.calls = []

    def __call__(
        self, a: Tensor, b: Tensor, scales_a: Tensor, kind_a: Any, scales_b: Tensor, kind_b: Any,
        output_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert a.is_contiguous() and b.t().is_contiguous() and a.dtype == b.dtype == E4M3
        self.calls.append((*a.shape, b.shape[1]))
        wide_a, wide_b = self.decoded(a, scales_a, kind_a), self.decoded(b.t(), scales_b, kind_b)
        return (wide_a @ wide_b.t()).to(output_dtype)

    @staticmethod
    def decoded(numbers: Tensor, scales: Tensor, kind: Any) -> Tensor:
        rows, inner = numbers.shape
        assert scales.dtype == torch.float32 and inner % 128 == 0
        if kind == F.ScalingType.BlockWise1x128:
            assert scales.shape == (rows, inner // 128)
            assert scales.stride(0) == 1 and (inner == 128 or scales.stride(1) == rows)
            return numbers.float() * scales.repeat_interleave(128, dim=1)
        assert kind == F.ScalingType.BlockWise128x128
        padded, blocks = inner // 128 + -(inner // 128) % 4, -(-rows // 128)
        assert scales.shape == (padded, blocks) and scales.stride() == (1, padded)
        scales = scales[: inner // 128].t()
        scales = scales.repeat_interleave(128, dim=0)[:rows].repeat_interleave(128, dim=1)
        return numbers.float() * scales


def test_kernels_are_given_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three products by the stand-in; a product without whole tiles is computed in bf16."""
    stand_in = FalseScaledMM()
    monkeypatch.setattr(F, "scaled_mm", stand_in)
    monkeypatch.setattr(fp8_kernels, "require_kernels", lambda device: None)
    for rows, inner, outer, by_kernels in (
        (128, 256, 384, [(128, 256, 384), (128, 384, 256), (384, 128, 256)]),
        (64, 128, 48, [(64, 128, 48)]),
        (6, 70, 128, []),
    ):
        found = []
        for kernels in (False, True):
            x, w = wide(rows, inner).requires_grad_(), wide(outer, inner, seed=1).requires_grad_()
            y = fp8_linear(x, w, kernels)
            y.backward(wide(rows, outer, seed=2))
            found.append((y.detach(), x.grad, w.grad))
        for plain, fast in zip(*found, strict=True):
            assert (fast - plain).norm() < 1e-6 * plain.norm()  # of fp32's sums
        assert stand_in.calls == by_kernels
        stand_in.calls.clear()


def test_there_are_no_kernels_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"fp8_kernels=true: .* SM90 .* this is a CPU; use"):
        fp8_linear(wide(4, 8), wide(6, 8), kernels=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an H100 or H200")
def test_kernels_on_a_gpu() -> None:
    found = []
    for kernels in (False, True):
        x, w = wide(128, 256).bfloat16().cuda(), wide(384, 256, seed=1).bfloat16().cuda()
        x.requires_grad_(), w.requires_grad_()
        y = fp8_linear(x, w, kernels)
        y.backward(wide(128, 384, seed=2).bfloat16().cuda())
        found.append((y.detach(), x.grad, w.grad))
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())
