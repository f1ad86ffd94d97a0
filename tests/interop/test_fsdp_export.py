"""Back to FSDP: what came in goes out under the same names, in the same form, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.manifest import step_name
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.interop.fsdp_export import ORIGIN, FsdpExport, Origin, export_fsdp
from deepseek.interop.fsdp_migration import Migration
from deepseek.interop.huggingface import to_hf
from support.fsdp_checkpoints import CFG, GATE, migrate, ours, run, save, written


def back(migration: Migration, folder: Path, name: str, step: int | None = None) -> Path:
    """Through our checkpoint and the notes beside it; ``step``: some steps later."""
    tensors = written(migration, folder)
    (folder / "out" / ORIGIN).write_bytes(Origin.of(migration).to_json())
    found = migration.step()
    assert found is not None
    place = folder / "out" / "checkpoints" / step_name(found[0])
    if step is not None:
        for key in tensors:
            if key.endswith(".step"):
                tensors[key] += step - found[0]
        with CheckpointManager(folder / "later") as manager:
            manager.save(step, tensors, {"step": step})
        place = folder / "later" / step_name(step)
    export_fsdp(Checkpoint.open(place), Origin.read(folder / "out"), folder / name, lambda n: None)
    return folder / name


def leaves(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in nested dictionaries and lists, types of the containers included."""
    if isinstance(value, Mapping):
        yield (*keys, "dict"), sorted(map(str, value))
        for key, inner in value.items():
            yield from leaves(inner, (*keys, key))
    elif isinstance(value, (list, tuple)):
        yield (*keys, type(value).__name__), len(value)
        for index, inner in enumerate(value):
            yield from leaves(inner, (*keys, index))
    else:
        yield keys, value


def assert_equal(got: Any, wanted: Any) -> None:
    ours, theirs = dict(leaves(got)), dict(leaves(wanted))
    assert ours.keys() == theirs.keys()
    for keys, value in theirs.items():
        mine = ours[keys]
        assert type(mine) is type(value), keys
        if isinstance(value, Tensor):
            assert mine.dtype == value.dtype and torch.equal(mine, value), keys
        else:
            assert mine == value, keys


def nested(path: Path) -> Any:
    """The content as torch reads it."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    whole = path.with_suffix(".whole")
    dcp_to_torch_save(path, whole)
    return torch.load(whole, weights_only=False)


def wrapped() -> dict[str, Any]:
    """Names of wrappers, an odd root, bf16 weights, other objects."""
    content = run("released")
    name = lambda n: n.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")  # noqa: E731
    weights = {name(n): t.bfloat16() if "norm" in n else t for n, t in content["model"].items()}
    content["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.95)
    return {
        "app": {"model": weights, "optimizer": content["optimizer"]},
        "progress": {"step": 7, "epoch": 0.5, "files": ["a", "b"], "none": None},
    }


@pytest.mark.parametrize("name", ["full.pt", "sharded"])
@pytest.mark.parametrize("make", [run, lambda: run("released"), wrapped])
def test_the_same_to_the_last_bit(tmp_path: Path, name: str, make: Any) -> None:
    content = make()
    path = save(content, tmp_path / name)
    found = back(migrate(path), tmp_path, f"back_{name}")
    assert_equal(nested(found), nested(path))
    assert Origin.read(tmp_path / "out").lost == ()


def test_an_own_program_loads_it(tmp_path: Path) -> None:
    """``dcp.load`` into a state dict that is there fills it, as a training script does."""
    path = back(migrate(save(run(), tmp_path / "sharded")), tmp_path, "back")
    wanted = run()
    mine = run()
    for tensor in (t for _, t in leaves(mine) if isinstance(t, Tensor)):
        tensor.zero_()
    mine["step"] = 0
    dcp.load(mine, checkpoint_id=path, no_dist=True)
    assert_equal(mine, wanted)


@pytest.mark.parametrize("suffix", ["_0", ".bin"])
def test_folder_of_the_trainer(tmp_path: Path, suffix: str) -> None:
    content = run()
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    for name, part in (("pytorch_model_fsdp", "model"), ("optimizer", "optimizer")):
        save({part: content[part]}, folder / f"{name}{suffix}")
    found = back(migrate(folder), tmp_path, "back")
    for name in ("pytorch_model_fsdp", "optimizer"):
        assert_equal(nested(found / f"{name}{suffix}"), nested(folder / f"{name}{suffix}"))


def test_optimizer_that_lay_apart(tmp_path: Path) -> None:
    content = run()
    (tmp_path / "o").mkdir()
    weights = save({"model": content["model"], "step": 7}, tmp_path / "all.pt")
    states = save({"optimizer": content["optimizer"]}, tmp_path / "o" / "all.pt")
    found = back(migrate(weights, optimizer=states), tmp_path, "back")
    assert_equal(nested(found / "0_all.pt"), nested(weights))
    assert_equal(nested(found / "1_all.pt"), nested(states))


def test_mtp_modules_and_their_copies(tmp_path: Path) -> None:
    cfg = ModelConfig(**{**vars(CFG), "num_nextn_predict_layers": 1})
    path = save(run("released", cfg), tmp_path / "full.pt")
    assert_equal(nested(back(migrate(path, cfg), tmp_path, "back.pt")), nested(path))


def test_numbers_instead_of_names(tmp_path: Path) -> None:
    """``optimizer.state_dict()`` of named parameters."""
    content = run()
    states = content["optimizer"]["state"]
    group = {"lr": 0.1, "params": list(range(len(states))), "param_names": list(states)}
    content["optimizer"] = {"state": dict(enumerate(states.values())), "param_groups": [group]}
    path = save(content, tmp_path / "full.pt")
    assert_equal(nested(back(migrate(path), tmp_path, "back.pt")), nested(path))


def test_later_steps_are_told(tmp_path: Path) -> None:
    path = save(run(), tmp_path / "full.pt")
    found = nested(back(migrate(path), tmp_path, "back.pt", step=9))
    assert found["step"] == 9
    assert {state["step"].item() for state in found["optimizer"]["state"].values()} == {9.0}


def test_what_was_left_behind_is_named(tmp_path: Path) -> None:
    content = run()
    content["model"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    content["rng"] = torch.zeros(4, dtype=torch.uint8)
    migration = migrate(save(content, tmp_path / "full.pt"), weights_only=True)
    lost = Origin.of(migration).lost
    assert {"rng", "model.model.layers.0.self_attn.rotary_emb.inv_freq"} < set(lost)
    states = sum(map(len, content["optimizer"]["state"].values()))
    assert len(lost) == 2 + states
    found = nested(back(migration, tmp_path, "back.pt"))
    assert_equal(found["model"], run()["model"])
    assert "state" not in found["optimizer"]


def test_a_checkpoint_that_lacks_what_came(tmp_path: Path) -> None:
    migration = migrate(save(run(), tmp_path / "full.pt"))
    tensors = written(migration, tmp_path)
    origin = Origin.of(migration)
    for missing, part in (("optim.norm.weight.exp_avg", "exp_avg"), ("model.norm.weight", "model")):
        with CheckpointManager(tmp_path / part) as manager:
            manager.save(7, {n: t for n, t in tensors.items() if n != missing}, {"step": 7})
        checkpoint = Checkpoint.open(tmp_path / part / step_name(7))
        with pytest.raises(UserError, match=f"lacks 1 tensors .* {missing}; give a checkpoint"):
            FsdpExport(checkpoint, origin)
    tensors["model.layers.1.ffn.gate.weight"] = torch.zeros(3, 17)
    with CheckpointManager(tmp_path / "other") as manager:
        manager.save(7, tensors, {"step": 7})
    other = Checkpoint.open(tmp_path / "other" / step_name(7))
    with pytest.raises(UserError, match=rf"{GATE} had the shape \[3, 16\] and has \[3, 17\] now"):
        export_fsdp(other, origin, tmp_path / "x.pt", lambda n: None)
    assert not (tmp_path / "x.pt").exists()


def test_notes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did not come from FSDP: .*--like.*deepseek hf export"):
        Origin.read(tmp_path)
    good = json.loads(Origin.of(migrate(save(run(), tmp_path / "full.pt"))).to_json())
    broken: list[Any] = [{}, [], {**good, "pieces": [{}]}]
    entry = next(iter(good["pieces"][0]["content"].values()))
    broken.append(json.loads(json.dumps(good).replace('"float32"', '"save"', 1)))
    assert entry["dtype"] == "float32"
    for content in broken:
        (tmp_path / ORIGIN).write_text(json.dumps(content))
        with pytest.raises(UserError, match="is damaged .*; migrate the FSDP checkpoint again"):
            Origin.read(tmp_path)


def test_the_comparison_notices() -> None:
    content = {"model": to_hf({n: t.clone() for n, t in ours().items()}, CFG)}
    other = {"model": {n: t.clone() for n, t in content["model"].items()}}
    other["model"][GATE][0, 0] += 1
    with pytest.raises(AssertionError):
        assert_equal(other, content)
