"""The learning rate at its corners, by hand."""

from __future__ import annotations

import math

import pytest

from deepseek.config.errors import ConfigError
from deepseek.config.load import load_config
from deepseek.config.schema import SchedConfig
from deepseek.training.optim import learning_rate

PEAK = 8.0


def rates(steps: range, trainer_steps: int = 20, **sched: object) -> list[float]:
    config = SchedConfig(**sched)  # type: ignore[arg-type]
    return [learning_rate(step, PEAK, config, trainer_steps) for step in steps]


# -- DeepSeek-V3's: linear warm-up, constant, cosine, floor --


def test_warmup_constant_cosine() -> None:
    """4 steps up, 6 at the peak, 10 down: the first step is not wasted at 0."""
    got = rates(
        range(24), name="WarmupConstantCosine", warmup_steps=4, constant_steps=6, min_lr=2.0
    )
    assert got[:4] == [2.0, 4.0, 6.0, 8.0]
    assert got[4:11] == [8.0] * 7
    assert got[15] == pytest.approx(5.0)  # half-way down
    assert got[11] == pytest.approx(2 + 6 * 0.5 * (1 + math.cos(math.pi * 0.1)))
    assert got[19] == pytest.approx(2 + 6 * 0.5 * (1 + math.cos(math.pi * 0.9)))
    assert got[20:] == [2.0] * 4


def test_warmup_constant_cosine_without_its_parts() -> None:
    name = "WarmupConstantCosine"
    no_warmup = rates(range(21), name=name, constant_steps=5)
    assert no_warmup[:6] == [8.0] * 6 and no_warmup[6] < 8.0 and no_warmup[20] == 0.0
    no_constant = rates(range(6), name=name, warmup_steps=4)
    assert no_constant[:5] == [2.0, 4.0, 6.0, 8.0, 8.0] and no_constant[5] < 8.0
    only_warmup = rates(range(22), name=name, warmup_steps=20, min_lr=1.0)
    assert only_warmup[0] == 0.4 and only_warmup[19] == 8.0 and only_warmup[20:] == [1.0, 1.0]
    no_decay = rates(range(22), name=name, warmup_steps=2, constant_steps=18, min_lr=1.0)
    assert no_decay[:20] == [4.0] + [8.0] * 19 and no_decay[20:] == [1.0, 1.0]


# -- warm-up, stable, decay --


@pytest.mark.parametrize(
    ("style", "middle"), [("linear", 5.0), ("cosine", 5.0), ("minus_sqrt", 8 - 6 * 0.5**0.5)]
)
def test_warmup_stable_decay(style: str, middle: float) -> None:
    """4 steps up, the peak, and down in the last 8 of 20."""
    settings = dict(name="WarmupStableDecay", warmup_steps=4, decay_steps=8, min_lr=2.0)
    got = rates(range(24), decay_style=style, **settings)
    assert got[:4] == [2.0, 4.0, 6.0, 8.0]
    assert got[4:13] == [8.0] * 9 and got[13] < 8.0
    assert got[16] == pytest.approx(middle)
    assert got[20:] == pytest.approx([2.0] * 4)
    # what is learned before the decay serves a longer run as well
    longer = rates(range(24), 40, decay_style=style, **settings)
    assert longer[:12] == got[:12] and longer[12:] == [8.0] * 12


def test_warmup_stable_decay_without_its_parts() -> None:
    name = "WarmupStableDecay"
    assert rates(range(30), name=name, warmup_steps=2) == [4.0] + [8.0] * 29
    assert rates(range(21), name=name, decay_steps=20)[::10] == [8.0, 4.0, 0.0]
    trial = rates(range(4), 4, name=name, warmup_steps=8, decay_steps=8)  # cut short
    assert trial == [1.0, 2.0, 3.0, 4.0]
    no_room = rates(range(6), 4, name=name, warmup_steps=4, decay_steps=2)
    assert no_room == [2.0, 4.0, 6.0, 8.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["name=WarmupStableDecay", "constant_steps=3"], ["constant_steps", "would be ignored"]),
        (["decay_steps=3"], ["decay_steps", "name=CosineAnnealing", "name=WarmupStableDecay"]),
        (
            ["name=WarmupStableDecay", "decay_style=cosine"],
            ["since model.optim.sched.decay_steps=0"],
        ),
        (
            ["name=WarmupStableDecay", "warmup_steps=8", "decay_steps=8", "max_steps=10"],
            ["warm-up 8 + decay 8 = 16 steps", "decay_steps=5"],
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_act_or_fit(settings: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("deepseek_v3_tiny", [f"model.optim.sched.{text}" for text in settings])
    for part in parts:
        assert part in str(caught.value)


# -- NeMo's --


def test_nemo_cosine_annealing() -> None:
    """Warm-up (step + 1) / (warmup + 1), then the cosine down to min_lr at max_steps."""
    got = rates(range(24), name="CosineAnnealing", warmup_steps=4, min_lr=2.0)
    assert got[:5] == pytest.approx([1.6, 3.2, 4.8, 6.4, 8.0])
    assert got[12] == pytest.approx(5.0)
    assert got[5] == pytest.approx(2 + 6 * 0.5 * (1 + math.cos(math.pi / 16)))
    assert got[20:] == pytest.approx([2.0] * 4)


def test_nemo_cosine_annealing_with_constant_steps() -> None:
    """Megatron's warm-up step / warmup from 0, and the last 6 steps at min_lr."""
    got = rates(range(24), name="CosineAnnealing", warmup_steps=4, constant_steps=6, min_lr=2.0)
    assert got[:5] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert got[9] == pytest.approx(5.0)
    assert got[14:] == pytest.approx([2.0] * 10)
    assert got[13] > 2.0


def test_nemo_cosine_annealing_without_warmup() -> None:
    got = rates(range(21), name="CosineAnnealing")
    assert got[0] == 8.0 and got[10] == pytest.approx(4.0) and got[20] == 0.0
    held = rates(range(21), name="CosineAnnealing", constant_steps=10)
    assert held[0] == 8.0 and held[5] == pytest.approx(4.0) and held[10:] == [0.0] * 11


# -- both --


@pytest.mark.parametrize("name", ["CosineAnnealing", "WarmupConstantCosine"])
def test_own_length_or_the_trainers(name: str) -> None:
    """``sched.max_steps`` rules; null takes ``trainer.max_steps``."""
    own = rates(range(30), 20, name=name, max_steps=10)
    assert own == rates(range(30), 10, name=name)
    assert own[10:] == [0.0] * 20
    assert rates(range(30), 20, name=name)[10] == pytest.approx(4.0)


@pytest.mark.parametrize("name", ["CosineAnnealing", "WarmupConstantCosine"])
@pytest.mark.parametrize("constant", [0, 3])
def test_never_above_the_peak_and_falling_after_it(name: str, constant: int) -> None:
    got = rates(range(25), name=name, warmup_steps=5, constant_steps=constant, min_lr=0.5)
    top = got.index(max(got))
    assert max(got) == PEAK
    assert got[: top + 1] == sorted(got[: top + 1])
    assert got[top:] == sorted(got[top:], reverse=True)
    assert got[-1] == 0.5
