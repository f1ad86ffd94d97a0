"""What a product makes on its way, against every tensor of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deepseek.config.product_passes import Beside, Product, in_fp8, of_packed
from deepseek.config.weights import packed_row_bytes
from deepseek.ops import grouped_linear
from deepseek.ops.fp8_linear import fp8_grouped_linear, fp8_linear
from deepseek.ops.packed import packed_grouped_linear, packed_linear
from support.live_bytes import LiveBytes

SIZES = [(512, 1024, 4096), (4096, 1024, 512), (16384, 256, 1024)]
"""Rows, inputs and outputs of all experts together: matrices are large, and rows are."""
EXPERTS = 4


def tracked(product: Callable[..., Tensor], rows: Tensor, *fixed: Tensor) -> Beside:
    """Most bytes of both passes, beside what is given and kept. ``rows`` and matrices are fakes."""
    live = LiveBytes()
    given = [rows, *(weight for weight in fixed if weight.requires_grad)]
    with live:
        for tensor in (rows, *fixed):
            tensor.view_as(tensor)  # seen
        before = live.count()
        made = product(rows, *fixed)
        forward, kept = live.peak, live.count() - before - made.nbytes
        gradient = torch.empty_like(made)
        live.peak = there = live.count()
        torch.autograd.grad(made, given, gradient)
    return Beside(forward - before - kept, live.peak - there)


def _outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(len(counts), grad.shape[1], x.shape[1])


def assert_told(told: Beside, found: Beside) -> None:
    for ours, theirs in zip(told, found, strict=True):
        assert 0.96 < ours / theirs < 1.04, (told, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp8"])
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_packed(
    sizes: tuple[int, int, int],
    stack: bool,
    kind: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouped_linear.F, "grouped_mm", lambda x, w, offs: x @ w[0])
    rows, inputs, outputs = sizes
    told = Product(rows * inputs, rows * outputs, inputs * outputs * (EXPERTS if stack else 1))
    with FakeTensorMode():
        x = torch.empty(rows, inputs, dtype=dtype, requires_grad=True)
        shape = (*([EXPERTS] if stack else []), outputs, packed_row_bytes(inputs, kind))
        packed, counts = torch.empty(shape, dtype=torch.uint8), torch.empty(EXPERTS).long()

        def product(x: Tensor, packed: Tensor) -> Tensor:
            if stack:
                return packed_grouped_linear(x, packed, counts, kind)
            return packed_linear(x, packed, kind)

        assert_told(of_packed(told, dtype.itemsize, kind), tracked(product, x, packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_in_fp8(
    sizes: tuple[int, int, int], stack: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_linear.F, "grouped_mm", lambda x, w, offs: x @ w[0])
    rows, inputs, outputs = sizes
    told = Product(
        rows * inputs, rows * outputs, inputs * outputs * (EXPERTS if stack else 1), stack
    )
    with FakeTensorMode():
        x = torch.empty(rows, inputs, dtype=dtype, requires_grad=True)
        shape = (*([EXPERTS] if stack else []), outputs, inputs)
        w, counts = torch.empty(shape, dtype=dtype, requires_grad=True), torch.empty(EXPERTS).long()

        def product(x: Tensor, w: Tensor) -> Tensor:
            return fp8_grouped_linear(x, w, counts) if stack else fp8_linear(x, w)

        monkeypatch.setattr("deepseek.ops.fp8_linear.grouped_outer", _outer)
        assert_told(in_fp8(told, dtype.itemsize), tracked(product, x, w))
