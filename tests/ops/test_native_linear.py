"""Few rows by the kernel, and by libraries where there is none, against ``F.linear``."""

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


@pytest.mark.parametrize("most", [1, 16, 33])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_by_libraries(
    most: int, onednn: bool, vendor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever suits so many rows: a machine without a compiler has no kernel."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(module, "processor", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(module, "_IN_CACHES", 0)
    monkeypatch.setattr(module, "_STREAMED_WIDTH", 12 if onednn else 11)
    generator = torch.Generator().manual_seed(most)
    for outputs in (8, 5):
        x_RI = torch.randn(most, 12, generator=generator)
        w_OI = torch.randn(outputs, 12, generator=generator)
        strided_OI = w_OI.t().contiguous().t()
        with torch.no_grad(), without_kernels():
            for rows in range(1, most + 1):
                wanted_RO = F.linear(x_RI[:rows], w_OI)
                torch.testing.assert_close(linear(x_RI[:rows], w_OI), wanted_RO)
                torch.testing.assert_close(linear(x_RI[:rows], strided_OI), wanted_RO)


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
