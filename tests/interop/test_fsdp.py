"""Checkpoints of FSDP runs in every form: what is taken, and what is not accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.interop.fsdp_names import NameTable
from support.fsdp_checkpoints import (
    CFG,
    FUSED,
    GATE,
    assert_same,
    expected,
    migrate,
    run,
    save,
    written,
)

# -- every form gives the same --


@pytest.mark.parametrize("layout", ["stacked", "released"])
@pytest.mark.parametrize("name", ["full.pt", "sharded"])
def test_bit_by_bit(tmp_path: Path, layout: str, name: str) -> None:
    migration = migrate(save(run(layout), tmp_path / name))
    assert migration.step() == (7, "stored as `step`")
    assert_same(written(migration, tmp_path), expected())
    assert not migration.notes and not any(migration.dropped.values())


def flattened() -> dict[str, Any]:
    """get_optimizer_state_dict(..., flatten_optimizer_state_dict=True), weights at the top."""
    content = run()
    state = content["optimizer"]["state"]
    flat = {f"state.{n}.{k}": v for n, kinds in state.items() for k, v in kinds.items()}
    return {**content["model"], "optim": flat}


def wrapped() -> dict[str, Any]:
    """torch.compile, activation checkpointing and a class that holds it all."""
    content = run()

    def longer(name: str) -> str:
        return "_orig_mod." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")

    model = {longer(name): tensor for name, tensor in content["model"].items()}
    state = {longer(name): kinds for name, kinds in content["optimizer"]["state"].items()}
    return {"app": {"model": model, "optim": {"state": state}, "steps": 7}}


def numbered() -> dict[str, Any]:
    """optimizer.state_dict() of named parameters."""
    content = run()
    state = content["optimizer"]["state"]
    group = {"params": list(range(len(state))), "param_names": list(state)}
    content["optimizer"] = {
        "state": dict(enumerate(state.values())),
        "param_groups": [group],
    }
    return content


@pytest.mark.parametrize("make", [flattened, wrapped, numbered])
@pytest.mark.parametrize("name", ["full.pt", "sharded"])
def test_forms_of_names(tmp_path: Path, make: Any, name: str) -> None:
    migration = migrate(save(make(), tmp_path / name))
    assert_same(written(migration, tmp_path), expected())


@pytest.mark.parametrize("suffix", ["_0", ".bin"])
def test_folder_of_the_trainer(tmp_path: Path, suffix: str) -> None:
    content, folder = run(), tmp_path / "checkpoint-7"
    folder.mkdir()
    model = {"model": content["model"]} if suffix == "_0" else content["model"]
    optim = content["optimizer"]
    names = {"_0": ("pytorch_model_fsdp_0", "optimizer_0")}.get(
        suffix, ("pytorch_model_fsdp.bin", "optimizer.bin")
    )
    save(model, folder / names[0])
    save({"optimizer": optim} if suffix == "_0" else optim, folder / names[1])
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    migration = migrate(folder)
    assert migration.step() == (7, "stored as `global_step`")
    assert_same(written(migration, tmp_path), expected())


def test_optimizer_in_a_file_of_its_own(tmp_path: Path) -> None:
    content = run()
    model = save(content["model"], tmp_path / "model.pt")
    optim = save(content["optimizer"], tmp_path / "optim.pt")
    migration = migrate(model, optimizer=optim)
    assert migration.step() == (7, "updates the optimiser made")
    assert_same(written(migration, tmp_path), expected())


def test_weights_only_and_narrow_weights(tmp_path: Path) -> None:
    content = run()
    content["model"] = {name: tensor.bfloat16() for name, tensor in content["model"].items()}
    migration = migrate(save(content, tmp_path / "full.pt"), weights_only=True)
    wanted = {name: t.bfloat16().float() for name, t in expected().items() if "model." == name[:6]}
    assert_same(written(migration, tmp_path), wanted)
    assert len(migration.dropped["optimiser state (--weights-only)"]) == 3 * 31 - 3


def test_mtp_modules(tmp_path: Path) -> None:
    cfg = ModelConfig(**{**vars(CFG), "num_nextn_predict_layers": 1})
    migration = migrate(save(run(cfg=cfg), tmp_path / "full.pt"), cfg)
    assert_same(written(migration, tmp_path), expected(cfg))
    copies = migration.dropped["copies of other tensors"]
    assert "model.model.layers.2.shared_head.head.weight" in copies


def test_mtp_copy_that_is_none(tmp_path: Path) -> None:
    cfg = ModelConfig(**{**vars(CFG), "num_nextn_predict_layers": 1})
    content = run(cfg=cfg)
    content["model"]["model.layers.2.shared_head.head.weight"][0, 0] += 1
    with pytest.raises(UserError, match="differs from lm_head.weight"):
        written(migrate(save(content, tmp_path / "full.pt"), cfg), tmp_path)


def test_experts_that_torch_updated_differently_often(tmp_path: Path) -> None:
    """torch skips a parameter without gradient: no state yet, or fewer updates."""
    content = run("released")
    state = content["optimizer"]["state"]
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        del state[f"model.layers.1.mlp.experts.0.{matrix}.weight"]
        state[f"model.layers.1.mlp.experts.2.{matrix}.weight"]["step"] = torch.tensor(4.0)
    migration = migrate(save(content, tmp_path / "sharded"))
    wanted = expected()
    for matrix in ("w1", "w2", "w3"):
        for kind in ("exp_avg", "exp_avg_sq"):
            wanted[f"optim.layers.1.ffn.experts.{matrix}.{kind}"][0] = 0
    assert_same(written(migration, tmp_path), wanted)
    idle, uneven = migration.notes
    assert "3 matrices of experts have no optimiser state" in idle
    assert "layers.1.ffn.experts.w1 4 to 7" in uneven


def test_other_state_is_dropped_by_name(tmp_path: Path) -> None:
    content = run() | {"rng": torch.zeros(5, dtype=torch.uint8), "loader": {"epoch": 2}}
    migration = migrate(save(content, tmp_path / "full.pt"))
    (names,) = [names for names in migration.dropped.values() if names]
    assert names == ["rng", "loader.epoch"]


# -- the table --


def test_table_survives_its_file(tmp_path: Path) -> None:
    table = NameTable.hugging_face(ModelConfig(**{**vars(CFG), "num_nextn_predict_layers": 1}))
    file = tmp_path / "names.yaml"
    file.write_text(table.to_yaml())
    again = NameTable.read(file)
    assert (again.names, again.copies, again.drop) == (table.names, table.copies, table.drop)


def test_names_of_ones_own(tmp_path: Path) -> None:
    """Other names, gate and up kept apart as stacks, and a tensor that is not needed."""
    content = run()
    for tree in (content["model"], content["optimizer"]["state"]):
        for name in list(tree):
            tree[name.replace("model.layers.", "net.blocks.").replace(".mlp.", ".ff.")] = tree.pop(
                name
            )
    content["model"]["net.blocks.0.cache"] = torch.zeros(2)
    path = save(content, tmp_path / "full.pt")
    with pytest.raises(UserError, match=r"(?s)unexpected: .*net.blocks.0.*--write-names"):
        migrate(path)
    text = NameTable.hugging_face(CFG).to_yaml()
    text = text.replace("model.layers.{i}.mlp.", "net.blocks.{i}.ff.")
    text = text.replace("model.layers.{i}.", "net.blocks.{i}.")
    text = text.replace("\ndrop:", "\ndrop:\n- '*.cache'")
    (tmp_path / "names.yaml").write_text(text)
    migration = migrate(path, table=NameTable.read(tmp_path / "names.yaml"))
    assert migration.dropped["not needed, by the table"] == ["model.net.blocks.0.cache"]
    assert_same(written(migration, tmp_path), expected())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: {a: b}", "name: unknown key; names?"),
        ("names: {}", "names: must be a section"),
        ("names: {a: 3}", "names.a: 3 is neither a name nor a list"),
        ("names: {'a.{i}': 'b.{j}'}", "b.{j} asks for {j}, the left has none"),
        ("names: {a: b}\ndrop: a", "drop: must be a list"),
        ("names: {a: b}\ncopies: [a]", "copies: must be a section"),
        ("names: {a: b}\nprefix: 3", "prefix: must be a text"),
        ("- a", "expected the keys prefix, names, copies, drop"),
        ("names: {a: b", "names.yaml"),
    ],
)
def test_broken_tables(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "names.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        NameTable.read(tmp_path / "names.yaml")
    assert part in str(error.value)


def test_two_copies_of_the_model_need_a_prefix(tmp_path: Path) -> None:
    content = run()
    content["ema"] = {name: tensor + 1 for name, tensor in content["model"].items()}
    path = save(content, tmp_path / "full.pt")
    with pytest.raises(UserError, match="twice, below `model.` and below `ema.`"):
        migrate(path)
    table = NameTable.hugging_face(CFG)
    table.prefix = "model."
    migration = migrate(path, table=table)
    assert len(migration.dropped["state of the old run (data, random numbers, counters)"]) == 31
    assert_same(written(migration, tmp_path), expected())


# -- tensors that are not accounted for --


def without(name: str) -> dict[str, Any]:
    content = run()
    del content["model"][name]
    return content


def with_shape(*shape: int) -> dict[str, Any]:
    content = run()
    content["model"][FUSED] = torch.zeros(shape)
    return content


def with_state(change: Any) -> dict[str, Any]:
    content = run()
    change(content["optimizer"]["state"])
    return content


def more(name: str, tensor: Tensor) -> dict[str, Any]:
    content = run()
    content["model"][name] = tensor
    return content


def both_layouts() -> dict[str, Any]:
    content = run()
    content["model"]["model.layers.1.mlp.experts.1.gate_proj.weight"] = torch.zeros(8, 16)
    return content


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Numbers without names."""
    return {"model": run()["model"], "optimizer": {"state": dict(enumerate(state.values()))}}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (lambda: without(GATE), [f"1 missing: {GATE} (layers.1.ffn.gate.weight)"]),
        (
            lambda: with_shape(3, 16, 17),
            [f"1 of another shape: model.{FUSED} (3, 16, 17) instead of (3, 16, 16)"],
        ),
        (lambda: more("model.extra", torch.zeros(1)), ["1 unexpected: model.model.extra"]),
        (
            lambda: more(GATE, torch.zeros(3, 16, dtype=torch.int8)),
            [f"1 neither fp32, bf16 nor fp16: model.{GATE} torch.int8"],
        ),
        (
            lambda: more("model.layers.9.input_layernorm.weight", torch.zeros(16)),
            ["1 without a place in this model", "layers.9.attn_norm.weight"],
        ),
        (both_layouts, ["1 given twice", "layers.1.ffn.experts.w1[1]"]),
        (
            lambda: with_state(lambda state: state.pop(GATE)),
            [
                f"1 missing optimiser states (exp_avg): {GATE}",
                f"1 missing optimiser states (step): {GATE}",
                "--weights-only",
            ],
        ),
        (
            lambda: with_state(lambda state: state[GATE].update(max_exp_avg_sq=torch.zeros(3, 16))),
            ["keeps max_exp_avg_sq, so it is not plain AdamW", "--weights-only"],
        ),
        (
            lambda: with_state(lambda state: state[GATE].update(exp_avg=torch.zeros(3, 15))),
            [f"1 of another shape: optimizer.state.{GATE}.exp_avg (3, 15) instead of (3, 16)"],
        ),
        (
            lambda: plain(run()["optimizer"]["state"]),
            ["goes by numbers", "get_optimizer_state_dict"],
        ),
        (
            lambda: {"model": {"some.weight": torch.zeros(2)}},
            ["no name of the checkpoint is in the table", "model.some.weight"],
        ),
    ],
)
@pytest.mark.parametrize("name", ["full.pt", "sharded"])
def test_not_accounted_for(tmp_path: Path, content: Any, parts: list[str], name: str) -> None:
    path = save(content(), tmp_path / name)
    with pytest.raises(UserError) as error:
        migrate(path)
    for part in parts:
        assert part in str(error.value)


def test_missing_mtp_modules_have_a_way_out(tmp_path: Path) -> None:
    cfg = ModelConfig(**{**vars(CFG), "num_nextn_predict_layers": 1})
    path = save({"model": run()["model"]}, tmp_path / "full.pt")
    with pytest.raises(UserError, match="add model.num_nextn_predict_layers=0"):
        migrate(path, cfg)


def test_states_of_missing_weights_are_not_listed_once_more(tmp_path: Path) -> None:
    cfg = ModelConfig(**{**vars(CFG), "num_hidden_layers": 3})
    path = save(run(), tmp_path / "full.pt")
    with pytest.raises(UserError, match=r"16 missing optimiser states \(step\): of the same\n"):
        migrate(path, cfg)


def test_a_stack_of_another_shape_is_not_missing_too(tmp_path: Path) -> None:
    path = save({"model": with_shape(3, 16, 17)["model"]}, tmp_path / "full.pt")
    with pytest.raises(UserError) as error:
        migrate(path)
    assert "missing" not in str(error.value)


def test_an_expert_alone_is_missing(tmp_path: Path) -> None:
    content = run("released")
    del content["model"]["model.layers.1.mlp.experts.2.up_proj.weight"]
    path = save(content, tmp_path / "full.pt")
    with pytest.raises(UserError, match=r"1 missing: .*\(layers.1.ffn.experts.w3\), experts 2"):
        migrate(path)


def test_no_step_anywhere(tmp_path: Path) -> None:
    migration = migrate(save({"model": run()["model"]}, tmp_path / "full.pt"))
    assert migration.step() is None
