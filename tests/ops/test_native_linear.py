"""The kernel for few rows against ``F.linear``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from deepseek.ops import few_rows as module
from deepseek.ops.few_rows import linear
from support.kernels import without_kernels


@given(
    rows=st.integers(1, 15),
    outputs=st.integers(1, 13),
    inputs=st.sampled_from([1, 3, 15, 16, 17, 31, 64, 65, 200]),
)
def test_equals_the_usual_way(rows: int, outputs: int, inputs: int) -> None:
    """Any sizes; a row's numbers do not depend on the others."""
    generator = torch.Generator().manual_seed(rows)
    x_RI = torch.randn(rows, inputs, generator=generator)
    w_OI = torch.randn(outputs, inputs, generator=generator)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_IN_CACHES", 0)
        y_RO = linear(x_RI, w_OI)
        assert torch.equal(y_RO, torch.cat([linear(x, w_OI) for x in x_RI.split(1)]))
        assert torch.equal(y_RO, linear(x_RI.t().contiguous().t(), w_OI)), "strided rows"
        with without_kernels():
            torch.testing.assert_close(y_RO, linear(x_RI, w_OI), rtol=1e-5, atol=1e-5)
    wide_RO = F.linear(x_RI.double(), w_OI.double())
    torch.testing.assert_close(y_RO.double(), wide_RO, rtol=1e-6, atol=1e-6 * inputs**0.5)


def test_threads_share_the_outputs() -> None:
    """Each has its own, in whole tiles or not; the sums are the same bit by bit."""
    x_RI, w_OI = torch.randn(4, 1024), torch.randn(131, 1024)
    with torch.no_grad():
        wanted_RO = linear(x_RI, w_OI)
        try:
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(linear(x_RI, w_OI), wanted_RO)
        finally:
            torch.set_num_threads(1)
    torch.testing.assert_close(wanted_RO, F.linear(x_RI, w_OI), rtol=1e-4, atol=1e-4)
