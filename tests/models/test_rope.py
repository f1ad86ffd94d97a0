"""Rotary positions against complex numbers; YaRN at its corners, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.config.schema import RopeScaling
from deepseek.models.components.block import build_attention
from deepseek.models.components.rope import (
    rotate,
    rotate_slow,
    rotation,
    softmax_scale,
    yarn_mscale,
)
from support.tiny_models import tiny_config

V3_YARN = RopeScaling(
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)


def frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position: the angle at position 1, since no pair turns by more than 1."""
    cos, sin = rotation(torch.ones(1, 1, dtype=torch.int64), dim, theta, scaling, torch.float64)
    return torch.atan2(sin, cos)[0, 0]


def plain_frequencies(dim: int, theta: float) -> list[float]:
    return [theta ** (-2 * pair / dim) for pair in range(dim // 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("skipped", [0, 4, 3])  # an odd one has no view as complex numbers
def test_rotate_equals_its_twin(dtype: torch.dtype, skipped: int) -> None:
    positions_BS = torch.arange(10).view(2, 5)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    turn = rotation(positions_BS, 6, 100.0, None, wide)
    results = []
    for function in (rotate, rotate_slow):
        x = torch.randn(2, 5, 3, skipped + 6, generator=torch.Generator().manual_seed(1))
        x = x.to(dtype).requires_grad_()
        y = function(x[..., skipped:], *turn)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))
        assert y.dtype == dtype
        results.append((y.detach(), x.grad))
    for got, wanted in zip(*results, strict=True):
        assert got is not None
        torch.testing.assert_close(got, wanted, rtol=1e-6 if wide != dtype else 1e-12, atol=1e-6)


# -- plain --


@given(
    dim=st.sampled_from([2, 4, 16]),
    theta=st.sampled_from([10.0, 10000.0]),
    positions=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    heads=st.integers(1, 3),
)
def test_rotation_is_a_complex_product(
    dim: int, theta: float, positions: list[int], heads: int
) -> None:
    """Neighbouring numbers (2p, 2p+1) are one complex number, times exp(i * position * freq)."""
    positions_BS = torch.tensor([positions])
    generator = torch.Generator().manual_seed(dim)
    x_BSNH = torch.randn(
        1, len(positions), heads, dim, generator=generator, dtype=torch.float64, requires_grad=True
    )
    got = rotate(x_BSNH, *rotation(positions_BS, dim, theta, None, torch.float64))

    angles = positions_BS.double().unsqueeze(-1) * torch.tensor(
        plain_frequencies(dim, theta), dtype=torch.float64
    )
    turned = torch.view_as_complex(x_BSNH.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles).unsqueeze(2)
    wanted = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)

    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(got, x_BSNH, upstream, retain_graph=True),
        torch.autograd.grad(wanted, x_BSNH, upstream),
        rtol=1e-10,
        atol=1e-10,
    )


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x, *rotation(torch.tensor([[at]]), 8, 10000.0, None, torch.float64))
            for x, at in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-10)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-3)


def test_each_row_has_its_own_positions() -> None:
    positions_BS = torch.tensor([[0, 1, 2], [5, 0, 9]])
    cos, sin = rotation(positions_BS, 4, 100.0, None, torch.float64)
    assert cos.shape == sin.shape == (2, 3, 2)
    for row in range(2):
        for i in range(3):
            for pair, freq in enumerate(plain_frequencies(4, 100.0)):
                angle = positions_BS[row, i].item() * freq
                assert cos[row, i, pair].item() == pytest.approx(math.cos(angle), abs=1e-12)
                assert sin[row, i, pair].item() == pytest.approx(math.sin(angle), abs=1e-12)


def test_angles_are_fp32() -> None:
    """As in the released code: at long positions another precision is another model."""
    position = 163_839
    cos, sin = rotation(torch.tensor([[position]]), 64, 10000.0, None)
    assert cos.dtype == sin.dtype == torch.float32
    powers = torch.tensor(10000.0) ** (torch.arange(0, 64, 2).float() / 64)
    angles = np.float32(position) * (np.float32(1) / powers.numpy())
    assert angles.dtype == np.float32
    torch.testing.assert_close(cos[0, 0], torch.from_numpy(np.cos(angles)), rtol=0, atol=2e-6)
    exact, _ = rotation(torch.tensor([[position]]), 64, 10000.0, None, torch.float64)
    assert (exact - cos).abs().max() > 1e-3


def test_bf16_is_rotated_in_fp32() -> None:
    x = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotation(torch.tensor([[0, 1, 1000]]), 8, 10000.0, None)
    got = rotate(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(x.float(), cos, sin).bfloat16())


# -- YaRN --


def test_v3_frequencies() -> None:
    """Pair 10 is the last that turns 32 times in 4096 tokens, pair 23 the first below once.

    64 * ln(4096 / (32 * 2 pi)) / (2 ln 10000) = 10.47, and with 1 rotation 22.51.
    """
    plain = plain_frequencies(64, 10000.0)
    rotations = [4096 * freq / (2 * math.pi) for freq in plain]
    assert rotations[10] > 32 > rotations[11] and rotations[22] > 1 > rotations[23]
    got = frequencies(64, 10000.0, V3_YARN).tolist()
    assert got[:11] == pytest.approx(plain[:11], rel=1e-12)
    assert got[23:] == pytest.approx([freq / 40 for freq in plain[23:]], rel=1e-12)
    for pair in range(11, 23):
        ramp = (pair - 10) / 13
        wanted = plain[pair] * (1 - ramp) + plain[pair] / 40 * ramp
        assert got[pair] == pytest.approx(wanted, rel=1e-12)


def test_every_pair_fast_but_the_last() -> None:
    """A tiny theta: all pairs turn often, and none is stretched wholly."""
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=4096)
    plain = plain_frequencies(8, 4.0)
    low = math.floor(8 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(4.0)))
    assert low > 3  # beyond the last pair
    assert frequencies(8, 4.0, scaling).tolist() == pytest.approx(plain, rel=1e-12)


def test_every_pair_slow() -> None:
    """A context shorter than one turn of the fastest pair: all but that pair are divided.

    The released code lets the ramp begin at pair 0 at the earliest, so that this one is left alone.
    """
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=2, beta_slow=0.5)
    plain = plain_frequencies(8, 10000.0)
    got = frequencies(8, 10000.0, scaling).tolist()
    assert got == pytest.approx([plain[0], *(freq / 8 for freq in plain[1:])], rel=1e-12)


def test_the_lower_border_is_at_least_zero() -> None:
    """No pair turns 32 times in 16 tokens: the ramp begins at pair 0, not before it."""
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=16, beta_slow=0.1)
    plain = plain_frequencies(16, 10000.0)
    high = math.ceil(16 * math.log(16 / (0.1 * 2 * math.pi)) / (2 * math.log(10000.0)))
    assert high == 3
    for pair, freq in enumerate(frequencies(16, 10000.0, scaling).tolist()):
        ramp = min(1.0, pair / high)
        assert freq == pytest.approx(plain[pair] * (1 - ramp) + plain[pair] / 8 * ramp, rel=1e-12)


def test_the_upper_border_is_at_most_dim_minus_one() -> None:
    """beta_slow so low that its pair lies past the end: the ramp ends at dim - 1, as released."""
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=4096, beta_slow=1e-6)
    plain = plain_frequencies(16, 10000.0)
    low = math.floor(16 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10000.0)))
    assert low == 2
    for pair, freq in enumerate(frequencies(16, 10000.0, scaling).tolist()):
        ramp = max(0.0, (pair - low) / (15 - low))
        assert freq == pytest.approx(plain[pair] * (1 - ramp) + plain[pair] / 8 * ramp, rel=1e-12)


def test_no_ramp_is_a_step() -> None:
    """Kimi-K2's beta 1 / 1: floor and ceil differ by one, so that no pair lies between."""
    scaling = RopeScaling(
        factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0
    )
    plain = plain_frequencies(64, 50000.0)
    border = 64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(50000.0))
    wanted = [f if pair <= math.floor(border) else f / 32 for pair, f in enumerate(plain)]
    assert frequencies(64, 50000.0, scaling).tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("mscale", "all_dim", "size"),
    [
        (1.0, 1.0, 1.0),
        (1.0, 0.0, 0.1 * math.log(40) + 1),
        (0.707, 0.0, 0.0707 * math.log(40) + 1),
        (0.707, 1.0, (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)),
    ],
)
def test_size_of_the_rotation(mscale: float, all_dim: float, size: float) -> None:
    scaling = RopeScaling(factor=40.0, mscale=mscale, mscale_all_dim=all_dim)
    cos, sin = rotation(torch.tensor([[0, 3, 5000]]), 64, 10000.0, scaling, torch.float64)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, size**2))


# -- softmax scale --


def test_yarn_mscale() -> None:
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879, rel=1e-7)
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1 + 0.0707 * math.log(40))
    assert yarn_mscale(40.0, 0.0) == 1.0
    assert yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1.0


def test_softmax_scale() -> None:
    assert softmax_scale(192, None) == pytest.approx(192**-0.5)
    without = RopeScaling(factor=40.0, mscale=1.0, mscale_all_dim=0.0)
    assert softmax_scale(192, without) == pytest.approx(192**-0.5)
    assert softmax_scale(192, V3_YARN) == pytest.approx(192**-0.5 * 1.3688879**2, rel=1e-6)


def test_attention_gets_the_scale_of_its_query_width() -> None:
    config = tiny_config(rope_scaling=V3_YARN)
    assert build_attention(config).softmax_scale == pytest.approx(12**-0.5 * 1.3688879**2, rel=1e-6)
