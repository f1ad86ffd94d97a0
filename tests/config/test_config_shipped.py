"""The shipped files: they load, say what each key means, and are what they claim to be."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from deepseek.config import changed, check, load_config, schema, shipped_configs
from deepseek.config.fields import FIELDS, LEAVES
from deepseek.config.foreign_names import OTHER_NAMES
from deepseek.config.ranges import NAMES, RANGES
from deepseek.config.sources import CONFIGS

KEY_LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value>[^#]*)(?:# (?P<comment>.*))?$")


def key_lines(text: str) -> list[tuple[str, str]]:
    """(dotted key, comment on its line) of every key in a YAML text that is indented by two."""
    found = []
    parents: list[str] = []
    for line in text.splitlines():
        match = KEY_LINE.match(line)
        if match:
            depth = len(match["indent"]) // 2
            parents = [*parents[:depth], match["key"]]
            found.append((".".join(parents), match["comment"] or ""))
    return found


def expected_type(path: str) -> str:
    """How a comment must begin."""
    if path == "extends":
        return "str"
    field = FIELDS[path]
    word = "section" if field.is_section else field.kind.__name__
    if word == "list":
        word = {int: "list of ints", str: "list of names"}.get(field.item, "list of two floats")
    word = {"object": "str or list"}.get(word, word)
    if path == "trainer.precision":
        return "str"
    return f"{word} or null" if field.optional else word


def test_the_promised_files_are_there() -> None:
    assert shipped_configs() == [
        "deepseek_v3_2gpu",
        "deepseek_v3_32gpu",
        "deepseek_v3_671b",
        "deepseek_v3_8gpu",
        "deepseek_v3_base",
        "deepseek_v3_distributed",
        "deepseek_v3_tiny",
        "moonlight_16b",
    ]


@pytest.mark.parametrize("name", shipped_configs())
def test_loads_and_is_sound(name: str) -> None:
    cfg = load_config(name)
    assert cfg.name == name
    assert check(cfg) == []


@pytest.mark.parametrize("name", shipped_configs())
def test_every_key_is_commented_with_its_type(name: str) -> None:
    lines = key_lines((CONFIGS / f"{name}.yaml").read_text())
    assert lines
    for path, comment in lines:
        head, separator, meaning = comment.partition(":")
        assert separator, f"{name}: {path} has no comment `type, unit: meaning`"
        kind, _, unit = head.partition(", ")
        assert kind == expected_type(path), f"{name}: {path}"
        assert len(meaning.strip()) > 8, f"{name}: {path}"
        assert not unit or re.fullmatch(r"[a-z -]+", unit), f"{name}: {path}"


@pytest.mark.parametrize("name", shipped_configs())
def test_lines_are_not_longer_than_code(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("name", shipped_configs())
def test_other_readers_of_yaml_read_the_same(name: str) -> None:
    """No value depends on the differences between YAML 1.1 and 1.2."""
    theirs = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert load_config(theirs) == load_config(name)


def test_tiny_shows_every_key_of_the_schema() -> None:
    text = (CONFIGS / "deepseek_v3_tiny.yaml").read_text()
    paths = {path for path, _ in key_lines(text)}
    sections = {}
    for name in ("rope_scaling", "peft"):
        block = re.search(rf"(?m)^  # {name}:.*\n(  #   .*\n)+", text)
        assert block, f"the optional section {name} is shown as a comment"
        shown = re.sub(r"(?m)^  # ?", "  ", block[0])
        lines = key_lines(f"model:\n{shown}")
        paths |= {path for path, _ in lines}
        for path, comment in lines[1:]:
            assert comment.startswith(expected_type(path)), path
        sections[name] = yaml.safe_load(shown)[name]
    assert paths == set(FIELDS)
    yarn = load_config(
        "deepseek_v3_tiny", [f"model.rope_scaling={sections['rope_scaling']}"]
    ).model.rope_scaling
    assert (yarn.factor, yarn.beta_fast, yarn.mscale_all_dim) == (40, 32, 1)
    assert sections["peft"] == asdict(schema.PeftConfig())


def test_every_field_of_the_schema_has_a_docstring() -> None:
    tree = ast.parse(inspect.getsource(schema))
    fields = 0
    for section in tree.body:
        if not isinstance(section, ast.ClassDef):
            continue
        assert ast.get_docstring(section), section.name
        for field, after in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{section.name}.{ast.unparse(field.target)}"
                fields += 1
    assert fields == len(FIELDS)


def test_every_number_has_a_range_and_every_rule_a_field() -> None:
    numbers = {path for path, field in LEAVES.items() if field.kind in (int, float)}
    assert set(RANGES) == numbers
    assert set(NAMES) <= set(LEAVES)
    for path in numbers:
        default = LEAVES[path].default
        assert default is None or RANGES[path].holds(default), path  # type: ignore[arg-type]
        if LEAVES[path].kind is int:
            assert RANGES[path].high <= 2**32, f"{path}: sums over it must end"


def test_names_of_other_stacks_lead_to_keys_that_exist() -> None:
    for name, answer in OTHER_NAMES.items():
        same = [path for path in FIELDS if path.rpartition(".")[2] == name]
        assert all(path in answer for path in same), f"{name} is a key itself: {same}"
        for path in re.findall(r"\b(?:model|trainer|exp_manager)\.[a-z_.]+[a-z_](?!\*)", answer):
            assert path in FIELDS or path == "model", f"{name}: {answer}"


def test_base_is_the_described_model() -> None:
    cfg = load_config("deepseek_v3_base")
    model = cfg.model
    assert (model.num_hidden_layers, model.hidden_size) == (12, 768)
    assert (model.n_routed_experts, model.num_experts_per_tok) == (8, 2)
    assert cfg.trainer.devices == 1


def test_distributed_is_the_described_model() -> None:
    cfg = load_config("deepseek_v3_distributed")
    model = cfg.model
    assert (model.num_hidden_layers, model.hidden_size, model.n_routed_experts) == (24, 1024, 16)
    assert (cfg.trainer.devices, model.expert_model_parallel_size) == (4, 4)


# name -> devices, nodes, EP, TP, PP
LAYOUTS = {
    "deepseek_v3_distributed": (4, 1, 4, 1, 1),
    "deepseek_v3_2gpu": (2, 1, 2, 1, 1),
    "deepseek_v3_8gpu": (8, 1, 4, 2, 1),
    "deepseek_v3_32gpu": (8, 4, 8, 2, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_are_the_described_ones_of_one_model(name: str) -> None:
    cfg = load_config(name)
    model = cfg.model
    assert (
        cfg.trainer.devices,
        cfg.trainer.num_nodes,
        model.expert_model_parallel_size,
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
    ) == LAYOUTS[name]
    sizes = {key: getattr(cfg.trainer, key) for key in ("devices", "num_nodes")}
    parts = [f"{kind}_model_parallel_size" for kind in ("expert", "tensor", "pipeline")]
    values = {"name": name}
    values |= {f"trainer.{key}": size for key, size in sizes.items()}
    values |= {f"model.{key}": getattr(model, key) for key in parts}
    same = changed(load_config("deepseek_v3_distributed"), values)
    assert cfg == same, "checkpoints of one are checkpoints of all"


def header_commands(name: str) -> list[list[str]]:
    """The words of each command in the comment on top of a file; deeper lines go on."""
    header = (CONFIGS / f"{name}.yaml").read_text().partition("\nextends:")[0]
    header = re.sub(r"\n#     +", " ", header)
    return [line.split() for line in re.findall(r"(?m)^#   (deepseek .*)$", header)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_commands_in_the_headers_are_sound(name: str) -> None:
    trains = [words for words in header_commands(name) if words[1] == "train"]
    assert len(trains) == 2
    for words in trains:
        assert words[:4] == ["deepseek", "train", "--config", name]
        cfg = load_config(name, words[4:])
        assert check(cfg) == []
    on_cpu = cfg
    processes = LAYOUTS[name][0] * LAYOUTS[name][1]
    assert (on_cpu.trainer.devices, on_cpu.trainer.num_nodes) == (processes, 1)
    assert on_cpu.trainer.accelerator == "cpu" and on_cpu.model.hidden_size < 100


def test_distributed_points_to_the_others() -> None:
    text = (CONFIGS / "deepseek_v3_distributed.yaml").read_text()
    pointed = re.findall(r"(?m)^#   (deepseek_v3_\w+)    ? *(?:4 nodes of )?(\d+) GPUs", text)
    assert pointed == [
        ("deepseek_v3_2gpu", "2"),
        ("deepseek_v3_8gpu", "8"),
        ("deepseek_v3_32gpu", "8"),
    ]


def test_tiny_has_every_part_of_v3() -> None:
    model = load_config("deepseek_v3_tiny").model
    assert model.q_lora_rank is not None
    assert 0 < model.first_k_dense_replace < model.num_hidden_layers
    assert 1 <= model.topk_group < model.n_group
    assert model.topk_method == "noaux_tc" and model.scoring_func == "sigmoid"
    assert model.n_shared_experts >= 1 and model.num_nextn_predict_layers >= 1
    assert model.moe_router_bias_update_rate > 0 and model.moe_aux_loss_coeff > 0


def test_the_recipe_of_671b_in_tokens() -> None:
    """Steps times batch gives the report's tokens (arXiv:2412.19437 section 4.2) to one step."""
    cfg = load_config("deepseek_v3_671b")
    sched, step = cfg.model.optim.sched, cfg.model.global_batch_size * cfg.model.data.seq_length
    assert sched.warmup_steps == 2000
    assert 0 <= (sched.warmup_steps + sched.constant_steps) * step - 10.0e12 < step
    assert 0 <= sched.max_steps * step - 14.3e12 < step
    assert 0 <= cfg.trainer.max_steps * step - 14.8e12 < step
    assert (cfg.model.optim.lr, sched.min_lr) == (2.2e-4, 2.2e-5)
    assert cfg.model.initializer_range == 0.006


def test_shipped_files_lie_in_the_package() -> None:
    assert CONFIGS == Path(schema.__file__).parents[1] / "configs"
