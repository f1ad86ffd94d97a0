"""``deepseek emit``: what NVIDIA's programs build from the files, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek.config import RunConfig, changed, load_config
from deepseek.config.errors import ConfigError
from deepseek.config.schema import RopeScaling, SchedConfig, value_at
from deepseek.config.yaml_file import read_yaml
from deepseek.frameworks import USES_NEMO
from deepseek.interop.peer_configs import automodel_recipe, megatron_config
from deepseek.training.optim import learning_rate
from support.micro_runs import MicroRuns

needs_peers = pytest.mark.skipif(
    not USES_NEMO, reason="AutoModel and Megatron-Core are installed beside NeMo"
)
PLAIN = ["model.num_nextn_predict_layers=0", "model.moe_aux_loss_coeff=0"]
DEEPSEEK = ["model.optim.sched.name=WarmupConstantCosine", "model.optim.sched.constant_steps=4"]
YARN = [
    "model.rope_scaling.factor=4.0",
    "model.rope_scaling.original_max_position_embeddings=64",
    "model.rope_scaling.mscale=0.7",
    "model.rope_scaling.mscale_all_dim=0.7",
]
V2 = [
    "model.scoring_func=softmax",
    "model.topk_method=group_limited_greedy",
    "model.n_group=4",
    "model.topk_group=2",
    "model.norm_topk_prob=false",
    "model.moe_router_bias_update_rate=0",
    "model.routed_scaling_factor=2.0",
    "model.q_lora_rank=null",
]


def emitted(micro: MicroRuns, kind: str, name: str, *settings: str) -> Path:
    data = f"model.data.data_prefix={micro.folder / 'data'}"
    ran = micro.cli("emit", kind, micro.config, name, data, *settings).assert_done()
    assert f"written      {name}" in ran.out
    return micro.folder / name


def driven(driver: str, micro: MicroRuns, *arguments: object) -> dict[str, Any]:
    """What the driver prints."""
    code = (
        f"import runpy\nrunpy.run_module('support.{driver}', run_name='__main__')\nraise SystemExit"
    )
    ran = micro.cli(*arguments, before=code).assert_done()
    found: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    return found


def configuration(*settings: str) -> RunConfig:
    run = load_config("deepseek_v3_tiny", list(settings))
    return changed(run, {"model.data.data_prefix": "data"})


def same_lr(found: list[float], **settings: Any) -> bool:
    """Whether each step has the learning rate of our own schedule."""
    sched, steps = SchedConfig(**settings), range(len(found))
    expected = [learning_rate(step, 3e-3, sched, len(found)) for step in steps]
    return len(found) == 12 and found == pytest.approx(expected, rel=1e-12)


# -- AutoModel --


@pytest.mark.framework
@needs_peers
def test_automodel_builds_and_trains_what_is_emitted(micro: MicroRuns) -> None:
    """Its model and ours, found through the entry point, have equal logits and take equal steps."""
    warm = "model.optim.sched.warmup_steps=3"
    recipe = emitted(micro, "automodel", "recipe.yaml", *PLAIN, warm)
    micro.cli("hf", "export", "run", "emit_files").assert_done()
    found = driven("automodel_driver", micro, recipe, "run", "emit_files")
    assert found["class"] == "deepseek.interop.automodel.DeepseekTrainingForCausalLM"
    assert found["not loaded"] == [] and found["files come back"]
    assert found["theirs differ by"] < 1e-6 and found["ours differ by"] < 1e-6
    theirs, ours = found["steps"]["theirs"], found["steps"]["ours"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["losses"][1] < ours["losses"][0]
    assert ours["biases moved by"] == theirs["biases moved by"] == [pytest.approx(1e-3)]
    assert found["DDP"] < 1e-7 and found["FSDP"] < 1e-7
    assert same_lr(found["lr"], warmup_steps=3)
    assert found["sections"] == {
        "recipe": "nemo_automodel.recipes.llm.train_ft.TrainFinetuneRecipeForNextTokenPrediction",
        "optimizer": "OptimizerFromFactoryConfig",
        "loss_fn": "MaskedCrossEntropyConfig",
        "checkpoint": "SerializationFormat.SAFETENSORS",
        "step_scheduler": "4",
        "distributed": "{'tp_size': 1, 'pp_size': 1, 'ep_size': 1}",
        "dataloader": "DataloaderConfig",
    }


def test_automodel_gets_the_layout(micro: MicroRuns) -> None:
    sizes = [
        "trainer.devices=4",
        "model.pipeline_model_parallel_size=2",
        "model.micro_batch_size=1",
    ]
    sizes += ["model.expert_model_parallel_size=2", "trainer.precision=bf16-mixed"]
    recipe = emitted(micro, "automodel", "layout.yaml", *PLAIN, *sizes)
    found = read_yaml(recipe.read_text(), str(recipe)).tree
    spread = found["distributed"]
    assert (spread["pp_size"], spread["ep_size"], spread["tp_size"]) == (2, 2, 1)
    assert spread["mp_policy"]["param_dtype"] == "bfloat16"
    assert found["step_scheduler"]["local_batch_size"] == 2
    assert spread["pipeline"]["pp_schedule"] == "1f1b"
    stages = spread["pipeline"]["module_fqns_per_model_part"]
    assert [name for stage in stages for name in stage] == (
        "model.embed_tokens model.layers.0 model.layers.1 model.norm lm_head".split()
    )


def test_what_automodel_lacks_is_refused_at_once(micro: MicroRuns) -> None:
    sizes = ["trainer.devices=2", "model.tensor_model_parallel_size=2"]
    data = f"model.data.data_prefix={micro.folder / 'data'}"
    micro.cli("emit", "automodel", micro.config, "no.yaml", data, *sizes).assert_refused(
        "the recipe for AutoModel 0.7 has 3 problems",
        "model.tensor_model_parallel_size=2: its DeepSeek-V3 declares supports_tp=False; use 1",
        "model.num_nextn_predict_layers=1: its DeepSeek-V3 makes no MTP modules; use 0",
        "model.moe_aux_loss_coeff=0.0001: its balance loss is over the whole local batch",
    )
    assert not (micro.folder / "no.yaml").exists()


# -- Megatron-Core --


@pytest.mark.framework
@needs_peers
def test_megatron_builds_the_same_model(micro: MicroRuns) -> None:
    """With our weights, MTP's too, it gives our losses token by token."""
    file = emitted(
        micro, "megatron", "megatron.yaml", *DEEPSEEK, "model.optim.sched.warmup_steps=3"
    )
    found = driven("megatron_driver", micro, file, "run")
    assert found["missing"] == found["unexpected"] == found["no gradient"] == []
    assert found["differ by"] < 1e-5
    assert found["unknown sizes"] == []
    assert same_lr(found["lr"], name="WarmupConstantCosine", warmup_steps=3, constant_steps=4)


@pytest.mark.framework
@needs_peers
def test_megatron_knows_yarn_and_v2(micro: MicroRuns) -> None:
    settings = ["trainer.max_steps=1", "trainer.val_check_interval=0", *YARN, *V2]
    micro.train("emit_v2", *settings).assert_done()
    file = emitted(micro, "megatron", "v2.yaml", *settings)
    found = driven("megatron_driver", micro, file, "emit_v2")
    assert found["missing"] == found["unexpected"] == []
    assert found["differ by"] < 1e-5


@pytest.mark.framework
@needs_peers
def test_megatron_takes_the_layout(micro: MicroRuns) -> None:
    sizes = ["trainer.devices=4", "model.pipeline_model_parallel_size=2"]
    sizes += ["model.tensor_model_parallel_size=2", "model.expert_model_parallel_size=2"]
    found = driven("megatron_driver", micro, emitted(micro, "megatron", "pp.yaml", *sizes))
    # The last of two stages is the dearer one without a block, too.
    assert found["stages"] == [["embedding", "decoder", "decoder"], ["mtp", "loss"]]
    assert found["sequence_parallel"] and found["unknown sizes"] == []


# -- what is refused --

BOTH: list[tuple[str, Any]] = [
    ("model.optim.name", "muon"),
    ("model.optim.qk_clip_threshold", 100.0),
    ("model.rampup_batch_size", [2, 2, 8]),
    ("model.data.fim_rate", 0.1),
    ("model.data.chat", True),
    ("model.data.data_prefix", None),
    ("model.restore_from", "somewhere"),
    ("model.torch_compile", True),
    ("model.reshard_after_forward", False),
]
AUTOMODEL: list[tuple[str, Any]] = [
    *BOTH,
    ("model.tensor_model_parallel_size", 2),
    ("model.num_nextn_predict_layers", 1),
    ("model.scoring_func", "softmax"),
    ("model.topk_method", "greedy"),
    ("model.moe_aux_loss_coeff", 1e-4),
    ("model.moe_z_loss_coeff", 1e-3),
    ("model.data.isolate_documents", True),
]
MEGATRON: list[tuple[str, Any]] = [
    *BOTH,
    ("model.norm_topk_prob", False),
    ("model.topk_group", 2),
    ("model.scoring_func", "softmax"),
]


@pytest.mark.parametrize(
    ("emit", "field", "value"),
    [(automodel_recipe, *lacked) for lacked in AUTOMODEL]
    + [(megatron_config, *lacked) for lacked in MEGATRON],
)
def test_what_they_lack(emit: Any, field: str, value: Any) -> None:
    run = _accepted_by_both()
    emit(run)
    assert value_at(run, field) != value
    run = changed(run, {field: value})
    with pytest.raises(ConfigError) as caught:
        emit(run)
    assert field in [problem.field for problem in caught.value.problems]


@pytest.mark.parametrize("emit", [automodel_recipe, megatron_config])
def test_schedules_they_lack(emit: Any) -> None:
    run = _accepted_by_both()
    run = changed(run, {"trainer.devices": 2, "model.pipeline_model_parallel_size": 2})
    emit(run)
    run = changed(run, {"model.pipeline_schedule": "DualPipeV"})
    with pytest.raises(ConfigError, match="model.pipeline_schedule=DualPipeV"):
        emit(run)


def test_nothing_is_overwritten(micro: MicroRuns) -> None:
    file = emitted(micro, "megatron", "once.yaml")
    before = file.read_text()
    assert before.startswith("# For Megatron-Core 0.16, by `deepseek emit megatron")
    data = f"model.data.data_prefix={micro.folder / 'data'}"
    micro.cli("emit", "megatron", micro.config, file, data).assert_refused("exists already")
    assert file.read_text() == before
    micro.cli("emit", "megatron", micro.config, "no/file.yaml", data).assert_refused("no/file.yaml")


def test_without_experts_megatron_gets_none() -> None:
    run = _accepted_by_both()
    dense = replace(
        run.model,
        first_k_dense_replace=run.model.num_hidden_layers,
        rope_scaling=RopeScaling(),
    )
    run = replace(run, model=dense)
    found = megatron_config(run)["MLATransformerConfig"]
    assert not [key for key in found if key.startswith("moe_")] and found["rope_type"] == "yarn"


def _accepted_by_both() -> RunConfig:
    values = {
        "n_routed_experts": 8,
        "n_group": 4,
        "num_experts_per_tok": 2,
        "topk_group": 1,
        "data.fim_rate": 0.0,
        "torch_compile": False,
    }
    return changed(configuration(*PLAIN), {f"model.{key}": v for key, v in values.items()})
