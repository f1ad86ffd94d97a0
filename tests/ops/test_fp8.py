"""FP8 weights with scales per block: the fast way equals the plain one, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.ops.fp8 import block_counts, dequantise_blocks, dequantise_blocks_plainly


@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.sampled_from([(128, 128), (8, 8), (4, 16), (1, 1)]),
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


def test_scales_must_be_one_per_block() -> None:
    weight_IJ = torch.ones(130, 128, dtype=torch.float8_e4m3fn)
    for function in (dequantise_blocks, dequantise_blocks_plainly):
        with pytest.raises(ValueError, match=r"need scales \(2, 1\), got \(1, 1\)"):
            function(weight_IJ, torch.ones(1, 1))
