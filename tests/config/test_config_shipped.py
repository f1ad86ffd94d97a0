"""The shipped files: they load, say what each key means, and are what they claim to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml  # as another reader of our files

from deepseek.config import changed, check, load_config, schema, shipped_configs
from deepseek.config.foreign_names import MEGATRON, NO_SUCH_KEY, OTHER_VALUES, RENAMED
from deepseek.config.load import CONFIGS
from deepseek.config.schema import FIELDS, LEAVES, Field

KEY_LINE = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<value>[^#]*)(?:# (?P<comment>.*))?$")
WORDS = {list: {int: "list of ints", float: "list of floats", str: "list of names"}}


def key_lines(text: str) -> list[tuple[str, str]]:
    """(dotted key, its comment, over several lines) of every key in a YAML text that is indented
    by two."""
    found: list[tuple[str, str]] = []
    parents: list[str] = []
    for line in text.splitlines():
        match = KEY_LINE.match(line)
        more = re.match(r"^ {20,}# (.*)$", line)
        if match:
            depth = len(match["indent"]) // 2
            parents = [*parents[:depth], match["key"]]
            found.append((".".join(parents), match["comment"] or ""))
        elif more:
            found[-1] = (found[-1][0], f"{found[-1][1]} {more[1]}")
    return found


def type_of(field: Field) -> str:
    """As a comment names it."""
    word = "section" if field.is_section else field.kind.__name__
    word = {"list": WORDS[list].get(field.item, ""), "object": "str or list"}.get(word, word)
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
        "shakespeare_char",
    ]
    assert CONFIGS == Path(schema.__file__).parents[1] / "configs"


@pytest.mark.parametrize("name", shipped_configs())
def test_each_is_sound_and_comments_every_key(name: str) -> None:
    run, text = load_config(name), (CONFIGS / f"{name}.yaml").read_text()
    assert run.name == name
    assert check(run) == []
    assert max(len(line) for line in text.splitlines()) <= 100
    # no value depends on the differences between YAML 1.1 and 1.2
    assert load_config(yaml.safe_load(text)) == run
    lines = key_lines(text)
    assert lines
    for path, comment in lines:
        head, separator, meaning = comment.partition(":")
        assert separator, f"{path} has no comment `type, unit: meaning`"
        kind, _, unit = head.partition(", ")
        assert kind == ("str" if path == "extends" else type_of(FIELDS[path])), path
        assert len(meaning.strip()) > 8, path
        assert not unit or re.fullmatch(r"[a-z -]+", unit), path


def test_tiny_says_of_every_key_what_the_schema_says() -> None:
    text = (CONFIGS / "deepseek_v3_tiny.yaml").read_text()
    blocks = re.findall(r"(?m)^  # (?:rope_scaling|peft):.*\n(?:  #   .*\n)+", text)
    optional = "model:\n" + re.sub(r"(?m)^  # ?", "  ", "".join(blocks))
    lines = key_lines(text) + key_lines(optional)[1:]
    assert {path for path, _ in lines} == set(FIELDS)
    for path, comment in lines:
        field = FIELDS[path]
        unit = f", {field.unit}" if field.unit else ""
        assert comment == f"{type_of(field)}{unit}: {field.meaning}"
    shown = yaml.safe_load(optional)["model"]
    yarn = load_config("deepseek_v3_tiny", [f"model.rope_scaling={shown['rope_scaling']}"])
    yarn = yarn.model.rope_scaling
    assert (yarn.factor, yarn.beta_fast, yarn.mscale_all_dim) == (40, 32, 1)
    assert schema.PeftConfig(**shown["peft"]) == schema.PeftConfig()


def test_every_key_may_stand_at_its_default_and_every_number_has_limits() -> None:
    for path, field in LEAVES.items():
        assert field.problem_with(field.default) is None, path
        if field.kind in (int, float):
            assert field.limits.low > -10, path
        if field.kind is int:
            assert field.limits.high <= 2**32, f"{path}: sums over it must end"
        assert not field.choices or field.kind is str


def test_names_of_other_programs_lead_to_keys_that_exist() -> None:
    assert set(RENAMED.values()) <= set(LEAVES) | {"model.optim"}
    for name, answer in NO_SUCH_KEY.items():
        same = [path for path in FIELDS if path.rpartition(".")[2] == name]
        assert all(path in answer for path in same), f"{name} is a key itself: {same}"
        for path in re.findall(r"\b(?:model|trainer|exp_manager)\.[a-z_.]+[a-z_](?!\*)", answer):
            assert path in FIELDS or path == "model", f"{name}: {answer}"
    for path, values in OTHER_VALUES.items():
        assert set(values.values()) <= set(LEAVES[path].choices), path
    taken = [name for section in MEGATRON.values() for name in section]
    for name in taken:
        assert len({section[name] for section in MEGATRON.values() if name in section}) == 1


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
