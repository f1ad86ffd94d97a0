"""The cosine schedule against NeMo's own, step for step; runs in the environment with NeMo."""

from __future__ import annotations

import warnings

import pytest
import torch

from deepseek.config.schema import SchedConfig
from deepseek.training.optim import learning_rate

pytestmark = pytest.mark.framework

nemo_schedulers = pytest.importorskip("nemo.core.optim.lr_scheduler")


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("constant", [0, 1, 6])
@pytest.mark.parametrize("floor", [0.0, 2.0])
def test_equals_nemo(warmup: int, constant: int, floor: float) -> None:
    """From the first step until after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=8.0)
    theirs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and NeMo warn about how schedulers are called
        scheduler = nemo_schedulers.CosineAnnealing(
            optimizer, max_steps=20, min_lr=floor, warmup_steps=warmup, constant_steps=constant
        )
        for _ in range(25):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    sched = SchedConfig("CosineAnnealing", warmup, constant, floor)
    ours = [learning_rate(step, 8.0, sched, 20) for step in range(25)]
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15)
