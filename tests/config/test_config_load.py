"""Reading configurations: names, files, extends, overrides, references, saving."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from deepseek.config import (
    ConfigError,
    ModelConfig,
    RunConfig,
    changed,
    check,
    load_config,
    resolved_yaml,
    shipped_configs,
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def error_of(source: object, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    return caught.value


def test_gives_dataclasses() -> None:
    run = load_config("deepseek_v3_base")
    assert isinstance(run.model, ModelConfig)
    assert run.model.qk_head_dim == 96
    assert run.model.rope_scaling is None


def test_is_frozen_and_closed_to_other_keys() -> None:
    run = load_config("deepseek_v3_tiny")
    with pytest.raises(FrozenInstanceError):
        run.model.hiden_size = 3  # type: ignore[attr-defined]
    with pytest.raises(FrozenInstanceError):
        run.model.hidden_size = 3  # type: ignore[misc]


def test_an_empty_mapping_is_the_schema() -> None:
    assert load_config({}) == RunConfig()


def test_reads_a_configuration_that_was_built_in_code() -> None:
    run = RunConfig(name="built")
    assert load_config(asdict(run)) == run


def test_overrides_in_the_spellings_of_nemo_and_hydra() -> None:
    cfg = load_config(
        "deepseek_v3_tiny",
        [
            "trainer.max_steps=500",
            "--model.optim.lr=1e-3",
            "++model.q_lora_rank=null",
            "+seed=7",
            "model.optim.betas=[0.8, 0.9]",
            "model.rope_scaling={factor: 4}",
            "model.rope_scaling.beta_slow=2",
            "seed=8",
        ],
    )
    assert cfg.trainer.max_steps == 500
    assert cfg.model.optim.lr == 1e-3
    assert cfg.model.q_lora_rank is None
    assert cfg.model.optim.betas == [0.8, 0.9]
    assert (cfg.model.rope_scaling.factor, cfg.model.rope_scaling.beta_slow) == (4, 2)
    assert cfg.model.rope_scaling.beta_fast == 32
    assert cfg.seed == 8


def test_an_override_of_text_may_look_like_a_number() -> None:
    cfg = load_config("deepseek_v3_tiny", ["name=007", "exp_manager.version=true"])
    assert (cfg.name, cfg.exp_manager.version) == ("007", "true")


@pytest.mark.parametrize("value", ["32", '"32"', "32-true"])
def test_precision_32_has_one_form_afterwards(value: str) -> None:
    assert load_config("deepseek_v3_tiny", [f"trainer.precision={value}"]).trainer.precision == "32"


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    lr = load_config({"model": {"optim": {"lr": 1}}}).model.optim.lr
    assert (lr, type(lr)) == (1.0, float)


def test_extends_names_and_paths(tmp_path: Path) -> None:
    write(tmp_path, "base/a.yaml", "extends: deepseek_v3_tiny\nseed: 1\nmodel: {hidden_size: 64}\n")
    write(tmp_path, "base/b.yaml", "extends: a.yaml\nseed: 2\nmodel: {rope_scaling: {factor: 2}}\n")
    c = write(tmp_path, "c.yaml", "extends: base/b.yaml\nname: c\nmodel: {optim: {lr: 1e-3}}\n")
    cfg = load_config(c, ["seed=3"])
    tiny = load_config("deepseek_v3_tiny")
    assert (cfg.seed, cfg.name, cfg.model.hidden_size, cfg.model.optim.lr) == (3, "c", 64, 1e-3)
    assert cfg.model.rope_scaling.factor == 2
    assert cfg.model.n_routed_experts == tiny.model.n_routed_experts
    gone = write(tmp_path, "d.yaml", "extends: c.yaml\nmodel: {rope_scaling: null}\n")
    assert load_config(str(gone)).model.rope_scaling is None


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    b = write(tmp_path, "b.yaml", "name: b\nextends: a.yaml\n")
    text = str(error_of(b))
    assert f"a.yaml:1: extends goes in a circle: {b} -> {tmp_path}/a.yaml -> {b}" in text


def test_extends_must_be_one_name(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "extends: [deepseek_v3_tiny, deepseek_v3_base]\n")
    assert f"{path}:1: extends must name one configuration" in str(error_of(path))


def test_extends_what_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "name: a\nextends: deepseek_v3_tinny\n")
    text = str(error_of(path))
    assert f"{path}:2: there is no file {tmp_path}/deepseek_v3_tinny" in text
    assert "(did you mean deepseek_v3_tiny?)" in text


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    text = str(error_of("deepseek_v3_bse"))
    assert "no shipped configuration deepseek_v3_bse" in text
    for name in shipped_configs():
        assert name in text
    assert "(did you mean deepseek_v3_base?)" in text
    assert "(did you mean deepseek_v3_base?)" in str(error_of("configs/deepseek_v3_base.yml"))


def test_problems_name_file_line_and_override(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model:\n  n_group: 3\n  hiden_size: 5\n")
    path = write(tmp_path, "a.yaml", "extends: base.yaml\n\nmodel:\n  qk_rope_head_dim: 15\n")
    error = error_of(path, "model.optim.lr=0")
    assert {problem.field: problem.where for problem in error.problems} == {
        "model.n_group": f"{tmp_path}/base.yaml:2",
        "model.hiden_size": f"{tmp_path}/base.yaml:3",
        "model.qk_rope_head_dim": f"{path}:4",
        "model.optim.lr": "override",
    }
    assert f"use 14 or 16 [{path}:4]" in str(error)


def test_every_value_of_an_unknown_section_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "optim:\n  lr: 1\n  sched: {warmup_steps: 5}\n")
    assert [problem.field for problem in error_of(path).problems] == [
        "optim.lr",
        "optim.sched.warmup_steps",
    ]


def test_a_dotted_key_of_a_file_must_be_nested(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model.optim.lr: 1e-3\n")
    assert "a key of a file holds no dots; nest it: `model: optim:` with `lr:` below" in str(
        error_of(path)
    )


def test_text_that_looks_like_a_number_is_quoted_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "name: 123\n")
    assert 'name=123: must be text, not a number; quote it: "123"' in str(error_of(path))


def test_references_take_the_value_they_name() -> None:
    cfg = load_config(
        {
            "name": "run",
            "exp_manager": {"name": "${name}-${model.hidden_size}", "version": "${.name}"},
            "model": {
                "hidden_size": "${model.n_routed_experts}",
                "optim": {"betas": ["${model.optim.sched.min_lr}", 0.5], "sched": {"min_lr": 1e-5}},
            },
        },
        ["model.n_routed_experts=16"],
    )
    assert cfg.exp_manager.name == cfg.exp_manager.version == "run-16"
    assert cfg.model.hidden_size == 16
    assert cfg.model.optim.betas == [1e-5, 0.5]
    assert "${" not in resolved_yaml(cfg)


def test_a_reference_to_a_value_of_another_type_is_a_type_error() -> None:
    (problem,) = error_of({"seed": "${name}"}).problems
    assert str(problem) == "seed=deepseek: must be a whole number; the default is 1234"


def test_data_files_that_are_there(tmp_path: Path) -> None:
    for prefix in ("a", "b"):
        write(tmp_path, f"{prefix}.bin", "")
        write(tmp_path, f"{prefix}.idx", "")
    write(tmp_path, "tokenizer/tokenizer.json", "{}")
    blend = f"[0.7, {tmp_path}/a, 0.3, {tmp_path}/b]"
    overrides = [
        f"model.data.data_prefix={blend}",
        f"model.data.validation_prefix={tmp_path}/b",
        f"model.tokenizer.path={tmp_path}/tokenizer",
        "model.tokenizer.vocab_size=5000",  # not used with a given tokenizer
    ]
    cfg = load_config("deepseek_v3_tiny", overrides)
    assert cfg.model.data.data_prefix == [0.7, f"{tmp_path}/a", 0.3, f"{tmp_path}/b"]
    assert load_config({}, overrides[1:2]).model.data.validation_prefix == f"{tmp_path}/b"
    error = error_of("deepseek_v3_tiny", *overrides, "model.data.validation_fraction=0.1")
    assert "would be ignored, since model.data.validation_prefix is given" in str(error)


def test_folders_that_are_files(tmp_path: Path) -> None:
    path = write(tmp_path, "file", "")
    error = error_of("deepseek_v3_tiny", f"exp_manager.exp_dir={path}")
    assert f"exp_manager.exp_dir={path}: is a file" in str(error)


def test_resolved_yaml_holds_every_key_and_loads_back(tmp_path: Path) -> None:
    cfg = load_config("deepseek_v3_distributed", ['name="1e-4"', "model.rope_scaling={}"])
    text = resolved_yaml(cfg)
    assert text == resolved_yaml(cfg)
    assert "original_max_position_embeddings: 4096" in text
    again = load_config(write(tmp_path, "config.yaml", text))
    assert again == cfg
    assert resolved_yaml(again) == text


def test_check_also_checks_types() -> None:
    run = RunConfig()
    assert check(run) == []
    run = changed(run, {"model.qk_rope_head_dim": 15, "model.hidden_size": "wide"})
    assert [problem.field for problem in check(run)] == [
        "model.hidden_size",
        "model.qk_rope_head_dim",
    ]
