"""Traces of profiled steps: named regions, nested as the model is; profiling changes no bit."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.config import ConfigError, load_config
from deepseek.config.schema import ModelConfig, ProfileConfig
from deepseek.monitoring.record.profile import REGIONS, Profile, Regions
from deepseek.training.step import DeepSeekModel
from support.micro_runs import MEASURED

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_nextn_predict_layers=1,
    global_batch_size=4,
    micro_batch_size=2,
)
STEPS = 6


class Driven:
    """A module stepped without a trainer, with the callback a trainer would call."""

    def __init__(self, config: ModelConfig, callback: Profile | None = None) -> None:
        torch.set_num_threads(1)
        self.module: Any = DeepSeekModel(config, seed=3, max_steps=STEPS)
        self.optimizer = self.module.configure_optimizers()
        self.trainer = SimpleNamespace(optimizers=[self.optimizer], global_rank=0)
        self.callback = callback

    def run(self, steps: int = STEPS, end: bool = True) -> list[dict[str, Any]]:
        """What each step computed."""
        computed = []
        for i in range(steps):
            if self.callback:
                self.callback.on_train_batch_start(self.trainer, self.module, None, i)
            row = self.module.train_step(batch(i), self.optimizer).row()
            computed.append({key: row[key] for key in row if not MEASURED.search(key)})
            if self.callback:
                self.callback.on_train_batch_end(self.trainer, self.module, None, None, i)
        if self.callback and end:
            self.callback.on_train_end(self.trainer, self.module)
        assert {"loss", "mtp_loss", "balance_loss", "grad_norm"} < computed[0].keys()
        return computed


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (4, 17), generator=generator)
    return {
        "tokens": tokens[:, :-1].clone(),
        "labels": tokens[:, 1:].clone(),
        "positions": torch.arange(16).repeat(4, 1),
        "documents": torch.zeros(4, 16, dtype=torch.int32),
    }


def regions(path: Path) -> list[tuple[str, float, float]]:
    """(name, start, end) of what was named, by start."""
    with gzip.open(path) as stream:
        events = json.load(stream)["traceEvents"]
    found = [
        (e["name"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "user_annotation"
    ]
    return sorted(found, key=lambda event: (event[1], -event[2]))


def parents(found: list[tuple[str, float, float]]) -> list[tuple[str, str]]:
    """(name, name of the smallest region around it, or "")."""
    pairs = []
    for name, start, end in found:
        around = [
            (e - s, n) for n, s, e in found if s <= start and end <= e and (n, s) != (name, start)
        ]
        pairs.append((name, min(around)[1] if around else ""))
    return pairs


@pytest.mark.parametrize("granularity", [None, "full"])
def test_the_regions_lie_in_one_another_as_the_model_does(
    tmp_path: Path, granularity: str | None
) -> None:
    config = replace(CONFIG, activations_checkpoint_granularity=granularity)
    Driven(config, Profile(tmp_path, ProfileConfig(steps=[2]))).run()
    (path,) = tmp_path.iterdir()
    assert path.name == "steps_00000002-00000002.rank0.json.gz"
    found = [pair for pair in parents(regions(path)) if pair[0] in REGIONS or "." in pair[0]]
    named = {name for name, _ in found}
    assert set(REGIONS) <= named
    places = {"layers.0", "layers.1", "mtp.0.block"}
    assert places <= named
    passes = 2 * (2 if granularity else 1)  # micro-batches, once more where recomputed
    for name, inside in {
        "attention": places,
        "router": places - {"layers.0"},
        "dispatch": places - {"layers.0"},
        "experts": places - {"layers.0"},
        "combine": places - {"layers.0"},
    }.items():
        assert {parent for n, parent in found if n == name} == inside, name
        # The backward pass may end a recomputation before its last region.
        count = sum(n == name for n, _ in found)
        assert len(inside) * 2 < count + 1 <= len(inside) * passes + 1, name
    assert sum(n == "head" for n, _ in found) == 2 * 2  # main and MTP
    assert sum(n == "optimizer" for n, _ in found) == 1
    assert not any(parent in places for n, parent in found if n in ("head", "optimizer"))


def test_the_order_within_a_layer(tmp_path: Path) -> None:
    Driven(CONFIG, Profile(tmp_path, ProfileConfig(steps=[1]))).run(1)
    found = regions(next(tmp_path.iterdir()))
    start, end = next((s, e) for name, s, e in found if name == "layers.1")
    inside = [name for name, s, e in found if start < s and e < end and name in REGIONS]
    assert inside == ["attention", "router", "dispatch", "experts", "combine"]


def test_one_trace_for_each_range(tmp_path: Path) -> None:
    Driven(CONFIG, Profile(tmp_path, ProfileConfig(steps=[5, 1, 2]))).run()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "steps_00000001-00000002.rank0.json.gz",
        "steps_00000005-00000005.rank0.json.gz",
    ]
    counts = [sum(n == "optimizer" for n, *_ in regions(tmp_path / name)) for name in names]
    assert counts == [2, 1]


@pytest.mark.parametrize("ends", ["on_train_end", "on_exception"])
def test_a_range_cut_short_is_written_too(tmp_path: Path, ends: str) -> None:
    driven = Driven(CONFIG, Profile(tmp_path, ProfileConfig(steps=[2, 3, 4])))
    driven.run(3, end=False)
    assert not list(tmp_path.iterdir())
    more = [ValueError("no")] if ends == "on_exception" else []
    getattr(driven.callback, ends)(driven.trainer, driven.module, *more)
    assert [p.name for p in tmp_path.iterdir()] == ["steps_00000002-00000003.rank0.json.gz"]


def test_training_computes_the_same(tmp_path: Path) -> None:
    """But for last bits: where a mixture is one node of the graph, profiled steps go module by
    module, and autograd adds up gradients in another order."""
    plain = Driven(CONFIG)
    profiled = Driven(CONFIG, Profile(tmp_path, ProfileConfig(steps=[2, 3], memory=True)))
    for ours, theirs in zip(plain.run(), profiled.run(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert list(tmp_path.iterdir())
    ours, theirs = plain.module.model.state_dict(), profiled.module.model.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_outside_its_steps_the_model_is_untouched(tmp_path: Path) -> None:
    def marks(module: Any) -> list[Any]:
        return [
            (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
            for m in module.model.modules()
        ]

    driven = Driven(CONFIG, Profile(tmp_path, ProfileConfig(steps=[2])))
    before = marks(driven.module)
    dispatchers = [m.dispatcher for m in driven.module.model.modules() if hasattr(m, "dispatcher")]
    driven.run(1)
    assert marks(driven.module) == before
    regions = Regions(driven.module.model, driven.trainer.optimizers)
    assert marks(driven.module) != before
    regions.remove()
    assert marks(driven.module) == before
    after = [m.dispatcher for m in driven.module.model.modules() if hasattr(m, "dispatcher")]
    assert all(a is b for a, b in zip(dispatchers, after, strict=True))
    driven.run(3)
    assert marks(driven.module) == before
    assert not driven.trainer.optimizers[0]._optimizer_step_pre_hooks


def test_a_failing_step_leaves_no_region_open(tmp_path: Path) -> None:
    """The error of the step is what is seen, and the next trace is sound."""
    driven = Driven(CONFIG, Profile(tmp_path, ProfileConfig(steps=[1, 3])))
    broken = driven.module.model.layers["1"].ffn.experts.register_forward_hook(
        lambda *_: (_ for _ in ()).throw(ValueError("broken"))
    )
    with pytest.raises(ValueError, match="broken"):
        driven.run(1)
    driven.callback.on_exception(driven.trainer, driven.module, ValueError())
    broken.remove()
    driven.run(3)
    last = tmp_path / "steps_00000003-00000003.rank0.json.gz"
    assert ("attention", "layers.1") in parents(regions(last))


def test_a_trace_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("in the way")
    driven = Driven(CONFIG, Profile(tmp_path / "profile", ProfileConfig(steps=[2])))
    assert len(driven.run()) == STEPS
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["steps=[0, 3]"],
            "names step 0, and the run has steps 1 to trainer.max_steps=20; use [3]",
        ),
        (
            ["steps=[21]"],
            "names step 21, and the run has steps 1 to trainer.max_steps=20; use [10]",
        ),
        (["steps=[5, 4, 5]"], "names step 5 twice; use [4, 5]"),
        (["with_stack=true"], "would be ignored, since exp_manager.profile.steps names no step"),
        (["steps=[]", "memory=true"], "would be ignored, since"),
        (["steps=[1.5]"], "must be a list of whole numbers or null"),
        (["steps=3"], "must be a list of whole numbers or null"),
    ],
)
def test_settings_that_cannot_be_met(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(
            "deepseek_v3_tiny",
            ["trainer.max_steps=20", *(f"exp_manager.profile.{word}" for word in settings)],
        )


def test_settings_that_can() -> None:
    words = ["trainer.max_steps=20", "exp_manager.profile.steps=[1, 20]"]
    cfg = load_config("deepseek_v3_tiny", [*words, "exp_manager.profile.with_stack=true"])
    assert list(cfg.exp_manager.profile.steps) == [1, 20]
