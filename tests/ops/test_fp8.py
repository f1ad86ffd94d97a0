"""FP8 weights with scales per block: the fast way equals the plain one, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.ops.fp8 import (
    block_counts,
    dequantise_blocks,
    dequantise_blocks_plainly,
    quantise_blocks,
    quantise_blocks_plainly,
    widened,
)
from support.profiles import fewer

BLOCKS = [(128, 128), (8, 8), (4, 16), (1, 1)]


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.sampled_from(BLOCKS),
    kind=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    scales=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e8m0fnu]),
    seed=st.integers(0, 100),
)
def test_fast_equals_plain(
    rows: int,
    columns: int,
    block: tuple[int, int],
    kind: torch.dtype,
    scales: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_IJ = (torch.randn(rows, columns, generator=generator) * 30).to(kind)
    scale_PQ = torch.rand(block_counts((rows, columns), block), generator=generator) + 1e-3
    fast = dequantise_blocks(weight_IJ, scale_PQ.to(scales), block)
    assert fast.dtype == torch.float32
    assert torch.equal(fast, dequantise_blocks_plainly(weight_IJ, scale_PQ.to(scales), block))


def test_by_hand() -> None:
    """128 x 128 blocks of a matrix that is no multiple of them; powers of two are exact."""
    weight_IJ = torch.ones(130, 200, dtype=torch.float8_e4m3fn)
    scale_PQ = torch.tensor([[0.5, 2.0], [4.0, 8.0]])
    for scales in (scale_PQ, scale_PQ.to(torch.float8_e8m0fnu)):
        out_IJ = dequantise_blocks(weight_IJ, scales)
        assert out_IJ[127, 127] == 0.5 and out_IJ[127, 128] == 2.0
        assert out_IJ[128, 127] == 4.0 and out_IJ[129, 199] == 8.0


def test_every_number_of_the_format() -> None:
    weight_IJ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    out_IJ = dequantise_blocks(weight_IJ, torch.tensor([[1.0]]))
    assert torch.equal(out_IJ.nan_to_num(-1.0), weight_IJ.float().nan_to_num(-1.0))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_widened_as_a_cast_widens_them(kind: torch.dtype, dtype: torch.dtype) -> None:
    """Every number, more than are widened at a time, in any order in memory; and none at all."""
    numbers = torch.arange(256, dtype=torch.uint8).repeat(300, 1).view(kind)
    for some in (numbers, numbers.mT, numbers[:, 3:7], numbers[:0]):
        wide, wanted = widened(some, dtype), some.to(dtype)
        assert wide.dtype == dtype and wide.shape == some.shape
        assert torch.equal(wide.isnan(), wanted.isnan())
        assert torch.equal(wide.nan_to_num(-1.0), wanted.nan_to_num(-1.0))


def test_scales_must_be_one_per_block() -> None:
    weight_IJ = torch.ones(130, 128, dtype=torch.float8_e4m3fn)
    for function in (dequantise_blocks, dequantise_blocks_plainly):
        with pytest.raises(ValueError, match=r"need scales \(2, 1\), got \(1, 1\)"):
            function(weight_IJ, torch.ones(1, 1))


# -- to FP8 --


@fewer(2)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.sampled_from(BLOCKS),
    largest=st.sampled_from([448.0, 300.0, 240.0, 30.0, 0.01]),
    exponents=st.booleans(),
    seed=st.integers(0, 100),
)
def test_what_came_from_fp8_comes_back(
    rows: int, columns: int, block: tuple[int, int], largest: float, exponents: bool, seed: int
) -> None:
    """Whatever the scales were, and however much of the range of FP8 was used."""
    generator = torch.Generator().manual_seed(seed)
    weight_IJ = torch.rand(rows, columns, generator=generator) * 2 - 1
    scale_PQ = torch.rand(block_counts((rows, columns), block), generator=generator) * 1e-3 + 1e-6
    if exponents:
        scale_PQ = scale_PQ.to(torch.float8_e8m0fnu)
    meant_IJ = dequantise_blocks((weight_IJ * largest).to(torch.float8_e4m3fn), scale_PQ, block)
    numbers_IJ, scale_PQ = quantise_blocks(meant_IJ, block)
    assert torch.equal(dequantise_blocks(numbers_IJ, scale_PQ, block), meant_IJ)
    plain_IJ, plain_PQ = quantise_blocks_plainly(meant_IJ, block)
    assert torch.equal(scale_PQ, plain_PQ) and torch.equal(numbers_IJ.float(), plain_IJ.float())


@fewer(2)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.sampled_from(BLOCKS),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 100),
)
def test_other_weights_are_rounded(
    rows: int, columns: int, block: tuple[int, int], size: float, seed: int
) -> None:
    """By half of the last of four bits, or by half of the smallest number."""
    weight_IJ = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    numbers_IJ, scale_PQ = quantise_blocks(weight_IJ, block)
    assert numbers_IJ.dtype == torch.float8_e4m3fn and scale_PQ.dtype == torch.float32
    plain_IJ, plain_PQ = quantise_blocks_plainly(weight_IJ, block)
    assert torch.equal(scale_PQ, plain_PQ) and torch.equal(numbers_IJ.float(), plain_IJ.float())
    ones_IJ = torch.ones(rows, columns, dtype=torch.float8_e4m3fn)
    smallest_IJ = dequantise_blocks(ones_IJ, scale_PQ, block) * 2**-9
    error_IJ = (dequantise_blocks(numbers_IJ, scale_PQ, block) - weight_IJ).abs()
    allowed_IJ = torch.maximum(weight_IJ.abs() * 2**-4, smallest_IJ / 2) * (1 + 1e-6)
    assert (error_IJ <= allowed_IJ).all()


def test_the_largest_number_is_448_and_zeros_stay() -> None:
    weight_IJ = torch.zeros(256, 130)
    weight_IJ[0, 0], weight_IJ[5, 5] = -0.7, 0.1
    numbers_IJ, scale_PQ = quantise_blocks(weight_IJ)
    assert scale_PQ.shape == (2, 2) and numbers_IJ.float()[0, 0] == -448.0
    assert torch.equal(scale_PQ[1], torch.ones(2)) and scale_PQ[0, 1] == 1.0
    assert numbers_IJ.float()[1:].count_nonzero() == 1
    smallest = torch.full((2, 2), torch.finfo(torch.float32).tiny)  # a scale below has few bits
    numbers_IJ, scale_PQ = quantise_blocks(smallest)
    assert scale_PQ.item() > 0 and numbers_IJ.float().isfinite().all()
