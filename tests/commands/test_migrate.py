"""``deepseek migrate``: checkpoints that go on, settings that are mapped or listed, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek.config import load_config
from deepseek.config.schema import ModelConfig
from deepseek.config.yaml_file import dump_yaml
from deepseek.interop.huggingface import to_hf
from support.forked import Forked, Ran
from support.micro_runs import CONFIG, MicroRuns

NAMES = {field for field in ModelConfig.__dataclass_fields__} - {"tokenizer", "data", "optim"}
MODEL = ModelConfig(**{key: value for key, value in CONFIG["model"].items() if key in NAMES})


@pytest.fixture(scope="module")
def source(micro: MicroRuns) -> Path:
    """The finished run of ``micro`` as an FSDP script would have saved it."""
    tensors = micro.tensors("run")

    def theirs(kind: str) -> dict[str, torch.Tensor]:
        named = {
            name.removeprefix("optim.").removesuffix(f".{kind}"): tensor
            for name, tensor in tensors.items()
            if name.endswith(f".{kind}")
        }
        biases = {n[6:]: t for n, t in tensors.items() if n.endswith(".ffn.gate.bias")}
        found = to_hf(named | biases, MODEL)
        return {name: t for name, t in found.items() if not name.endswith("correction_bias")}

    weights = {n[6:]: tensor for n, tensor in tensors.items() if n.startswith("model.")}
    moments, squares = theirs("exp_avg"), theirs("exp_avg_sq")
    step = torch.tensor(12.0)
    state = {
        name: {"exp_avg": moments[name].clone(), "exp_avg_sq": squares[name].clone(), "step": step}
        for name in moments
    }
    norm = "model.norm.weight"
    group = {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.2, "params": [norm]}
    content = {
        "model": {name: t.clone() for name, t in to_hf(weights, MODEL).items()},
        "optimizer": {"state": state, "param_groups": [group]},
        "step": 12,
    }
    torch.save(content, micro.folder / "full.pt")
    torch.save({"model": content["model"]}, micro.folder / "weights.pt")
    return micro.folder / "full.pt"


def migrate(micro: MicroRuns, source: object, target: object, *more: object) -> Ran:
    words = ["--config", micro.config, f"model.data.data_prefix={micro.folder / 'data'}"]
    return micro.cli("migrate", "fsdp-checkpoint", source, target, *words, *more)


def test_migrated_run_is_the_run(micro: MicroRuns, source: Path, tmp_path: Path) -> None:
    """Tensors bitwise, and five more steps bitwise those of the run itself."""
    out = migrate(micro, source, tmp_path / "new").assert_done().out
    assert "step         12 (stored as `step`)" in out
    assert "missing      0; every tensor is accounted for" in out
    for note in (
        "betas were [0.8, 0.95], model.optim.betas is [0.9, 0.95]",
        "1 norms were decayed, such as model.norm.weight",
        "weight_decay was 0.2, model.optim.weight_decay is 0.1",
        "the learning rate was 0.5",
        "trainer.max_steps=12: raise it, to go on at step 12",
    ):
        assert f"note         {note}" in out
    assert f"--run-dir {tmp_path / 'new'}" in out
    before, after = micro.tensors("run"), micro.tensors(str(tmp_path / "new"))
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
    more = ["trainer.max_steps=17", "trainer.val_check_interval=0"]
    shutil.copytree(micro.folder / "run", tmp_path / "same")
    for name in ("new", "same"):
        micro.train(str(tmp_path / name), *more).assert_done()
    ours, theirs = (micro.tensors(str(tmp_path / name)) for name in ("same", "new"))
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []
    micro.cli("generate", tmp_path / "new", "--max-new-tokens", 2).assert_done()


def test_the_way_back(micro: MicroRuns, source: Path, tmp_path: Path) -> None:
    """The file that came, its numbers bitwise; later steps and other runs in the same form."""
    run, file = tmp_path / "run", tmp_path / "back.pt"
    migrate(micro, source, run).assert_done()
    out = micro.cli("migrate", "to-fsdp", run, file).assert_done().out
    assert f"wrote        {file}: FULL state dict" in out and "step         12" in out
    theirs, mine = (torch.load(path, weights_only=True) for path in (source, file))
    assert mine["step"] == 12 and mine["model"].keys() == theirs["model"].keys()
    assert mine["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for name, tensor in theirs["model"].items():
        assert torch.equal(mine["model"][name], tensor), name
    for name, state in theirs["optimizer"]["state"].items():
        for kind, tensor in state.items():
            assert torch.equal(mine["optimizer"]["state"][name][kind], tensor), (name, kind)
    micro.train(str(run), "trainer.max_steps=14", "trainer.val_check_interval=0").assert_done()
    micro.cli("migrate", "to-fsdp", run, tmp_path / "later.pt").assert_done()
    later = torch.load(tmp_path / "later.pt", weights_only=True)
    assert later["step"] == 14 and later["model"].keys() == theirs["model"].keys()
    again = tmp_path / "again"
    migrate(micro, tmp_path / "later.pt", again).assert_done()
    ours, once_more = micro.tensors(str(run)), micro.tensors(str(again))
    assert [name for name in ours if not torch.equal(ours[name], once_more[name])] == []
    back = ["migrate", "to-fsdp"]
    micro.cli(*back, "run", tmp_path / "like.pt", "--like", run).assert_done()
    micro.cli(*back, run, file).assert_refused("exists already")
    micro.cli(*back, run, tmp_path / "back").assert_refused("came from one file: give a name such")
    micro.cli(*back, "run", tmp_path / "x.pt").assert_refused("did not come from FSDP", "--like")
    micro.cli(*back, "nowhere", tmp_path / "x.pt").assert_refused("does not exist")
    assert not list(tmp_path.glob("x.pt")) and not list(tmp_path.glob(".*"))


def test_weights_alone(micro: MicroRuns, source: Path, tmp_path: Path) -> None:
    place = source.with_name("weights.pt")
    migrate(micro, place, tmp_path / "a").assert_refused("weights.pt does not say how many steps")
    out = migrate(micro, place, tmp_path / "a", "--step", 9).assert_done().out
    assert "step         9 (--step)" in out and "there is no optimiser state" in out
    assert micro.steps(str(tmp_path / "a")) == [9]
    out = migrate(micro, source, tmp_path / "b", "--weights-only").assert_done().out
    assert re.search(r"dropped      \d+, optimiser state \(--weights-only\): ", out)


def test_table_is_written_and_read(micro: MicroRuns, source: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.yaml"
    out = migrate(micro, source, tmp_path / "new", "--write-names", names).assert_done().out
    count = len(torch.load(source)["model"])
    assert re.search(rf"it names     {count - 2} of {count} weights", out), out
    assert not (tmp_path / "new").exists()
    migrate(micro, source, tmp_path / "new", "--write-names", names).assert_refused(
        "names.yaml exists already and nothing is overwritten"
    )
    migrate(micro, source, tmp_path / "new", "--names", names).assert_done()
    names.write_text(names.read_text().replace("drop:", "dorp:"))
    migrate(micro, source, tmp_path / "n", "--names", names).assert_refused(
        "dorp: unknown key; drop?"
    )


def test_refusals(micro: MicroRuns, source: Path, tmp_path: Path) -> None:
    migrate(micro, tmp_path / "no", tmp_path / "new").assert_refused("does not exist")
    migrate(micro, source, tmp_path / "new", "--step", -1).assert_refused("--step -1: give")
    migrate(micro, source, tmp_path / "new", "model.optim.name=muon").assert_refused(
        "the checkpoint holds the state of AdamW", "--weights-only"
    )
    migrate(micro, source, tmp_path / "new", "model.moe_intermediate_size=8").assert_refused(
        "of another shape", "instead of"
    )
    migrate(micro, source, tmp_path).assert_done()  # an empty folder may be there
    migrate(micro, source, tmp_path).assert_refused("exists already and nothing is overwritten")


# -- settings --

ACCELERATE: dict[str, Any] = {
    "distributed_type": "FSDP",
    "num_processes": 16,
    "num_machines": 2,
    "machine_rank": 0,
    "mixed_precision": "bf16",
    "fsdp_config": {
        "fsdp_version": 1,
        "fsdp_sharding_strategy": "HYBRID_SHARD_ZERO2",
        "fsdp_offload_params": True,
        "fsdp_activation_checkpointing": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_something_new": 4,
    },
}
ARGUMENTS: dict[str, Any] = {
    "output_dir": "out",
    "max_steps": 200,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-5},
    "warmup_ratio": 0.05,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 0.5,
    "save_steps": 20,
    "eval_strategy": "no",
    "eval_steps": 10,
    "optim": "adafactor",
    "num_train_epochs": 3,
    "report_to": ["wandb", "tensorboard"],
    "ddp_timeout": 1800,
    "fp16": False,
    "fsdp_config": {"min_num_params": 0, "xla": False},
    "hub_model_id": None,
}


@pytest.fixture
def settings(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "accelerate.yaml").write_text(dump_yaml(ACCELERATE))
    (tmp_path / "args.json").write_text(json.dumps(ARGUMENTS))
    return tmp_path / "accelerate.yaml", tmp_path / "args.json"


def test_settings(cli: Forked, settings: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    out = cli("migrate", "fsdp-config", *settings, "--output", output).assert_done().out
    run = load_config(output)
    found = {
        "trainer": (run.trainer.devices, run.trainer.num_nodes, run.trainer.precision),
        "batch": (run.model.micro_batch_size, run.model.global_batch_size),
        "optim": (run.model.optim.lr, list(run.model.optim.betas), run.model.optim.weight_decay),
        "sched": (run.model.optim.sched.warmup_steps, run.model.optim.sched.min_lr),
        "more": (run.trainer.gradient_clip_val, run.trainer.val_check_interval),
        "shards": run.model.data_parallel_replicate_size,
        "reshards": run.model.reshard_after_forward,
        "recompute": run.model.activations_checkpoint_granularity,
        "every": run.exp_manager.checkpoint_callback_params.every_n_train_steps,
    }
    assert found == {
        "trainer": (8, 2, "bf16-mixed"),
        "batch": (2, 128),
        "optim": (1e-4, [0.9, 0.95], 0.0),
        "sched": (10, 1e-5),
        "more": (0.5, 0),
        "shards": 2,
        "reshards": False,
        "recompute": "full",
        "every": 20,
    }
    for left in (
        "fsdp_config.offload_params=true: there is no offloading of weights",
        "fsdp_config.something_new=4: not known to this converter",
        "optim=adafactor: optimisers are adamw and muon",
        "num_train_epochs=3: a run has a number of steps",
        "report_to=wandb: metrics.jsonl",
        "fsdp_config.state_dict_type=SHARDED_STATE_DICT: checkpoints are always sharded",
    ):
        assert f"not taken    {left}" in out
    # Every key is in one of the lists, or counted.
    listed = len(re.findall(r"^(?:not )?taken ", out, re.MULTILINE))
    off = int(re.search(r"^off +(\d+)", out, re.MULTILINE)[1])  # type: ignore[index]
    both = ACCELERATE["fsdp_config"] | ARGUMENTS["fsdp_config"]
    keys = {f"fsdp_config.{key.removeprefix('fsdp_')}" for key in both}
    keys |= (ACCELERATE.keys() | ARGUMENTS.keys()) - {"fsdp_config"}
    assert listed + off == len(keys) + 2  # report_to and sharding_strategy are in two


@pytest.mark.parametrize(
    ("setting", "processes", "reshards"),
    [
        ("fsdp_reshard_after_forward: true", 4, True),
        ("fsdp_reshard_after_forward: false", 4, False),
        ("fsdp_reshard_after_forward: SHARD_GRAD_OP", 4, False),  # as accelerate writes version 1
        ("fsdp_sharding_strategy: FULL_SHARD", 4, True),
        ("fsdp_sharding_strategy: FULL_SHARD", 1, None),
        ("fsdp_reshard_after_forward: true", 1, None),
        ("fsdp_reshard_after_forward: null", 4, None),
    ],
)
def test_gathering_anew(
    cli: Forked, tmp_path: Path, setting: str, processes: int, reshards: bool | None
) -> None:
    file, output = tmp_path / "accelerate.yaml", tmp_path / "mine.yaml"
    text = f"distributed_type: FSDP\nnum_processes: {processes}\nfsdp_config:\n  {setting}\n"
    file.write_text(text)
    cli("migrate", "fsdp-config", str(file), "--output", str(output)).assert_done()
    assert load_config(output).model.reshard_after_forward is reshards


def test_settings_are_printed_without_output(cli: Forked, settings: tuple[Path, Path]) -> None:
    out = cli("migrate", "fsdp-config", settings[1]).assert_done().out
    assert "  micro_batch_size: 2" in out and "  global_batch_size: 8" in out
    assert "give the accelerate file too" in out


def test_settings_on_top_of_a_model(cli: Forked, micro: MicroRuns, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"learning_rate": 0.25}))
    words = ("--extends", micro.config, "--output", tmp_path / "b.yaml")
    cli("migrate", "fsdp-config", tmp_path / "a.json", *words).assert_done()
    run = load_config(tmp_path / "b.yaml")
    assert (run.model.optim.lr, run.model.hidden_size) == (0.25, 32)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.yaml", "colour: red", "neither a configuration of accelerate"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "holds a list, expected keys"),
        ("a.yaml", "num_processes: !!python/name:os.system 3", "a.yaml"),
        ("a.yaml", "num_processes: many", "num_processes=many: give a whole number"),
        ("a.yaml", "num_processes: 3\nnum_machines: 2", "no multiple of num_machines=2"),
        ("a.json", '{"max_steps": 5, "learning_rate": -1.0}', "model.optim.lr"),
    ],
)
def test_broken_settings(cli: Forked, tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    cli("migrate", "fsdp-config", tmp_path / name).assert_refused(part)


def test_settings_overwrite_nothing(
    cli: Forked, settings: tuple[Path, Path], tmp_path: Path
) -> None:
    cli("migrate", "fsdp-config", *settings, "--output", settings[0]).assert_refused(
        "exists already and nothing is overwritten"
    )
    cli("migrate", "fsdp-config", tmp_path / "none.yaml").assert_refused("cannot be read")
