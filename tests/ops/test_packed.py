"""Frozen weights in few bits: the fast way is the plain one, products are those of what is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.config.weights import packed_row_bytes
from deepseek.ops import packed
from deepseek.ops.grouped_linear import grouped_linear_loop
from deepseek.ops.packed import (
    NF4,
    pack_rows,
    pack_rows_slow,
    packed_grouped_linear,
    packed_linear,
    unpack_rows,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
@pytest.mark.parametrize("columns", [1, 63, 64, 130])
def test_rows(kind: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI = normal(5, columns)
    w_OI[2] = 0
    rows = pack_rows(w_OI, kind)
    assert torch.equal(rows, pack_rows_slow(w_OI, kind))
    assert rows.shape == (5, packed_row_bytes(columns, kind))
    back = unpack_rows(rows, columns, kind, torch.float32)
    assert torch.equal(pack_rows(back, kind), rows) and torch.equal(back[2], torch.zeros(columns))
    gaps = (torch.tensor(NF4).diff().max() / 2).item() if kind == "nf4" else 1 / 16
    assert ((back - w_OI).abs().amax(1) <= gaps * 1.01 * w_OI.abs().amax(1)).all()
    monkeypatch.setattr(packed, "UNPACKED_AT_ONCE", 1)
    stack = unpack_rows(torch.stack([rows, rows]), columns, kind, torch.float32)
    assert torch.equal(stack, torch.stack([back, back]))


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_products(kind: str) -> None:
    """And the gradient of their input; of stacks too."""
    rows = pack_rows(normal(2, 6, 70), kind)
    w_EOI = unpack_rows(rows, 70, kind, torch.float64)
    counts = torch.tensor([3, 4])
    for own, wanted in (
        (lambda x: packed_linear(x, rows[0], kind), lambda x: F.linear(x, w_EOI[0])),
        (
            lambda x: packed_grouped_linear(x, rows, counts, kind),
            lambda x: grouped_linear_loop(x, w_EOI, counts),
        ),
    ):
        gradients = []
        for product in (own, wanted):
            x = normal(7, 70, seed=1).requires_grad_()
            y = product(x)
            y.backward(normal(7, 6, seed=2))
            gradients.append((y.detach(), x.grad))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
