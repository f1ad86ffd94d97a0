"""What the sweep calls rounding: only what no order of summing computes better."""

from dataclasses import replace

import pytest
import torch

from deepseek.config import changed
from support import sweep
from support.layouts import Case, conditioning, small_config

FP32 = Case(small_config(), 1, dtype=torch.float32, steps=1)
FP64 = Case(small_config(), 1, steps=1)
GRADIENT = "gradient.head.weight"


def test_a_well_conditioned_case_has_no_excuse() -> None:
    far = {"all.gradient": 2e-5, "loss": 2e-5, GRADIENT: 2e-5, "no such tensor": 2e-5}
    assert sweep.ill_conditioned(FP32, far, 1e-5) == {}
    assert sweep.ill_conditioned(FP64, far, 1e-12) == {}
    assert sweep.ill_conditioned(FP32, {}, 1e-5) == {}


def test_conditioning_goes_with_the_last_bit_of_the_dtype() -> None:
    single, double = conditioning(FP32), conditioning(FP64)
    assert single.keys() == double.keys() >= {"all.gradient", "loss", GRADIENT}
    for name in ("all.gradient", "loss", GRADIENT):
        # eps: 2**29 apart; a loss may by chance not move at all
        assert 1e7 < single[name] / max(double[name], 2**-53) < 1e10


@pytest.mark.parametrize(
    "error, moved, excused",
    [(2e-5, 1.1e-5, True), (2e-5, 0.9e-5, False), (2.3e-5, 1.1e-5, False), (9e-5, 6e-5, False)],
)
def test_sums_over_a_kind_and_metrics(
    monkeypatch: pytest.MonkeyPatch, error: float, moved: float, excused: bool
) -> None:
    """Excused by exact arithmetic alone: what one process in fp32 is off by does not count."""
    for name in ("all.gradient", "loss"):
        monkeypatch.setattr(sweep, "rounding", lambda case, name=name: {name: 1.0})
        monkeypatch.setattr(sweep, "conditioning", lambda case, name=name: {name: moved})
        found = sweep.ill_conditioned(FP32, {name: error}, 1e-5)
        assert found == ({name: moved} if excused else {})


@pytest.mark.parametrize(
    "error, own, moved, excused",
    [
        (2e-5, 1e-5, 0.0, True),
        (2e-5, 0.0, 1e-5, True),
        (4e-5, 1e-5, 1e-5, False),
        (9e-5, 5e-5, 0.0, False),
    ],
)
def test_single_tensors(
    monkeypatch: pytest.MonkeyPatch, error: float, own: float, moved: float, excused: bool
) -> None:
    monkeypatch.setattr(sweep, "rounding", lambda case: {GRADIENT: own})
    monkeypatch.setattr(sweep, "conditioning", lambda case: {GRADIENT: moved})
    found = sweep.ill_conditioned(FP32, {GRADIENT: error}, 1e-5)
    assert found == ({GRADIENT: max(own, moved)} if excused else {})


@pytest.mark.parametrize("length, excused", [(2, True), (8, False)])
def test_a_gradient_that_is_zero(
    monkeypatch: pytest.MonkeyPatch, length: int, excused: bool
) -> None:
    """Of two tokens the second MTP block predicts nothing from more than one: its queries see one
    key, whatever they are."""
    plain = {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": 0.0, "data.seq_length": length}
    case = replace(FP64, config=changed(FP64.config, plain))
    state = "exp_avg_sq.mtp.0.block.attn.wq_b.weight"
    assert ("mtp.0.block.attn.wq_b.weight" in sweep.without_gradient(case)) is excused
    monkeypatch.setattr(sweep, "rounding", lambda case: {state: 0.8})
    found = sweep.ill_conditioned(case, {state: 0.9}, 1e-12)
    assert found == ({state: 0.8} if excused else {})
    assert sweep.ill_conditioned(case, {"exp_avg_sq.head.weight": 0.9}, 1e-12) == {}
