"""Hugging Face files in and out, bit by bit: layouts, MTP, hundreds of shards."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manifest import step_name
from deepseek.commands.convert import export_hf, import_hf
from deepseek.commands.generate import generate_text
from deepseek.config import RunConfig, load_config
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.inference.generation import Sampling, generate
from deepseek.interop.hf_config import hf_config, model_config
from deepseek.interop.hf_folder import HfFolder
from deepseek.interop.hf_import import WeightImport
from deepseek.interop.huggingface import Layout, hf_tensors, to_hf
from deepseek.interop.open_weights import open_checkpoint
from deepseek.models.transformer import Transformer
from support.hf_folders import (
    assert_equal,
    exported,
    imported,
    random_config,
    small,
    weights,
    write_folder,
    write_tensors,
)


@pytest.mark.parametrize("seed", range(10))
def test_in_out_and_in_again(tmp_path: Path, seed: int) -> None:
    cfg, shards = random_config(seed), 1 + 2 * (seed % 2)
    state = weights(cfg, seed)
    theirs = write_folder(tmp_path / "hf", cfg, state, shards=shards, seed=seed)
    import_hf(tmp_path / "hf", tmp_path / "one")
    assert_equal(imported(tmp_path / "one"), state)
    export_hf(tmp_path / "one", tmp_path / "back", shard_gb=20e-6)
    assert_equal(exported(tmp_path / "back"), theirs)
    described = json.loads((tmp_path / "back" / "config.json").read_text())
    assert model_config(described) == model_config(hf_config(cfg))
    import_hf(tmp_path / "back", tmp_path / "two")
    assert_equal(imported(tmp_path / "two"), state)
    for name in ("config.yaml", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        one, two = ((tmp_path / run / name).read_text() for run in ("one", "two"))
        assert one.replace("name: one", "name: two") == two


@pytest.mark.parametrize("layout", ["released", "stacked"])
@pytest.mark.parametrize("depths", [0, 2])
def test_the_table_says_what_the_dictionaries_do(layout: Layout, depths: int) -> None:
    cfg = small(num_nextn_predict_layers=depths)
    theirs = to_hf(weights(cfg), cfg, layout)
    told = hf_tensors(cfg, layout)
    assert {n: t.shape for n, t in told.items()} == {n: tuple(t.shape) for n, t in theirs.items()}


@pytest.mark.parametrize("layout", ["released", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_dtypes(tmp_path: Path, layout: Layout, dtype: torch.dtype) -> None:
    cfg = small(num_nextn_predict_layers=1, n_shared_experts=2)
    state = {name: tensor.to(dtype) for name, tensor in weights(cfg).items()}
    write_folder(tmp_path / "hf", cfg, state, shards=4, layout=layout)
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert_equal(imported(tmp_path / "run"), {n: t.float() for n, t in state.items()})


def test_bf16_export_rounds_once_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small(num_nextn_predict_layers=1)
    theirs = write_folder(tmp_path / "hf", cfg, weights(cfg))
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out", dtype="bf16")
    assert "rounded from fp32 to bf16" in capsys.readouterr().out
    wanted = {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in theirs.items()
    }
    assert_equal(exported(tmp_path / "out"), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_bf16_comes_out_as_it_came_in(tmp_path: Path) -> None:
    """As the released files are: bf16, correction biases in fp32."""
    cfg = small(num_nextn_predict_layers=1)
    state = {n: t if n.endswith("gate.bias") else t.bfloat16() for n, t in weights(cfg).items()}
    theirs = write_folder(tmp_path / "hf", cfg, state)
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out", dtype="bf16")
    assert_equal(exported(tmp_path / "out"), theirs)


# -- MTP --


def test_mtp_kept_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = small(num_nextn_predict_layers=2)
    state = weights(cfg)
    main = {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}
    write_folder(tmp_path / "hf", cfg, state, shards=3)
    import_hf(tmp_path / "hf", tmp_path / "main", mtp="drop")
    assert "tensors, MTP modules: model.layers.3." in capsys.readouterr().out
    assert_equal(imported(tmp_path / "main"), main)
    assert load_config(tmp_path / "main" / "config.yaml").model.num_nextn_predict_layers == 0
    dropped = open_checkpoint(tmp_path / "main").checkpoint.state()["imported"]["dropped"]
    beyond = [n for n in to_hf(state, cfg) if n.startswith(("model.layers.3.", "model.layers.4."))]
    assert dropped == {"MTP modules": sorted(beyond)}

    import_hf(tmp_path / "hf", tmp_path / "all")
    export_hf(tmp_path / "all", tmp_path / "out", mtp="drop")
    assert "dropped" in capsys.readouterr().out
    assert_equal(exported(tmp_path / "out"), to_hf(state, cfg, mtp=False))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    )


def test_mtp_that_config_json_promises_and_the_weights_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many repackaged checkpoints are."""
    cfg = small()
    write_folder(tmp_path / "hf", cfg, weights(cfg), num_nextn_predict_layers=1)
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert "their weights are not there" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml").model.num_nextn_predict_layers == 0


# -- as large as life --


def test_every_name_of_deepseek_v3(tmp_path: Path) -> None:
    """61 layers, 256 experts, MTP, FP8 with scales: 91,000 tensors in 163 files, but tiny."""
    cfg = small(
        hidden_size=2,
        num_hidden_layers=61,
        num_attention_heads=1,
        q_lora_rank=2,
        kv_lora_rank=2,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=2,
        intermediate_size=2,
        moe_intermediate_size=2,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        num_nextn_predict_layers=1,
    )
    state = weights(cfg)
    theirs = {name: tensor.bfloat16() for name, tensor in to_hf(state, cfg).items()}
    assert len(theirs) == 46_183  # counted in the released bf16 checkpoint
    stored = {}
    for name, tensor in theirs.items():
        if name.endswith("_proj.weight") and "eh_proj" not in name:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = torch.full((1, 1), 0.5)
        else:
            stored[name] = tensor
    assert len(stored) > 91_000
    write_tensors(tmp_path / "hf", stored, shards=163)
    config = hf_config(cfg) | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"},
    }
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    import_hf(tmp_path / "hf", tmp_path / "run")
    checkpoint = Checkpoint.open(tmp_path / "run" / "checkpoints" / step_name(0))
    shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    assert checkpoint.tensor_shapes() == shapes
    assert len(list(checkpoint.path.glob("*.distcp"))) == 163
    for name in (
        "layers.3.ffn.experts.w1",
        "layers.60.ffn.experts.w2",
        "mtp.0.block.attn.wo.weight",
    ):
        tensor = torch.empty(state[name].shape)
        checkpoint.load({f"model.{name}": tensor})
        assert torch.equal(tensor, state[name].bfloat16().to(torch.float8_e4m3fn).float() * 0.5)


# -- the peer --


def test_logits_of_a_model_that_transformers_wrote(tmp_path: Path) -> None:
    """At positions 0, 1, about 1000, and far past the original context."""
    yarn = RopeScaling(factor=40.0, original_max_position_embeddings=1024, mscale_all_dim=1.0)
    cfg = small(rope_scaling=yarn, max_position_embeddings=40_960, hidden_size=32)
    torch.manual_seed(0)
    theirs = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**hf_config(cfg), attn_implementation="eager")
    ).eval()
    with torch.no_grad():  # logits of the size that trained models have, not of fresh ones
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    import_hf(tmp_path / "hf", tmp_path / "run")
    model = open_checkpoint(tmp_path / "run").model()
    positions = [0, 1, 2, 999, 1000, 1023, 1024, 5000, 40_958, 40_959]
    tokens_BS = torch.arange(10).unsqueeze(0) * 29
    positions_BS = torch.tensor([positions])
    with torch.no_grad():
        mask_BS = torch.ones_like(tokens_BS)
        wanted = theirs(tokens_BS, position_ids=positions_BS, attention_mask=mask_BS).logits
        ours = model.cpu()(tokens_BS, positions_BS)
    assert wanted.abs().max() > 2
    for i, position in enumerate(positions):
        assert (ours[:, i] - wanted[:, i]).abs().max() <= 1e-5, position


def test_transformers_loads_and_generates_what_we_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small(hidden_size=32, num_nextn_predict_layers=1)
    write_folder(tmp_path / "hf", cfg, weights(cfg))
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out", shard_gb=1e-4)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "To be, or"
    batch = tokenizer(prompt, return_tensors="pt")
    ids = batch["input_ids"]
    model = open_checkpoint(tmp_path / "run").model().cpu()
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() <= 1e-5
    drawn = theirs.generate(**batch, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    mine = generate(model, ids.tolist(), 8, Sampling(0.0, 0, 1.0), tokenizer.eos_token_id, 0)[0]
    assert drawn == mine
    capsys.readouterr()
    (text,) = generate_text(tmp_path / "run", [prompt], 8, temperature=0.0)
    assert len(text) > 0


# -- published configurations --


@pytest.mark.parametrize("scale_format", [None, "ue8m0"], ids=["v3, r1", "v3.1"])
def test_token_and_file_keys_of_published_models_are_known(scale_format: str | None) -> None:
    """Keys of the published config.json files beyond the architecture."""
    quantisation = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    if scale_format:
        quantisation["scale_fmt"] = scale_format
    published = hf_config(small()) | {
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "pretraining_tp": 1,
        "quantization_config": quantisation | {"weight_block_size": [128, 128]},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    }
    assert model_config(published) == model_config(hf_config(small()))
    peer = transformers.DeepseekV3Config(**hf_config(small()))
    assert model_config(peer.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}) is not None


def test_the_result_is_a_run_folder(tmp_path: Path) -> None:
    cfg = small(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False)
    state = weights(cfg)
    write_folder(tmp_path / "hf", cfg, state)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    import_hf(tmp_path / "hf", tmp_path / "run")
    opened = open_checkpoint(tmp_path / "run")
    assert opened.step == 0 and opened.tokenizer() is not None
    loaded = load_config(tmp_path / "run" / "config.yaml")
    assert RunConfig(**{**asdict(opened.config)}).name == loaded.name == "run"
    assert loaded.model.moe_router_bias_update_rate == 0
    assert (tmp_path / "run" / "tokenizer" / "chat_template.jinja").read_text() == "{{ messages }}"
    model: Any = opened.model()
    assert isinstance(model, Transformer) and isinstance(opened.config.model, ModelConfig)
    plan = WeightImport(HfFolder(tmp_path / "hf"))
    assert plan.dropped == {key: [] for key in plan.dropped} and not plan.quantised


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """transformers reports the MTP layer that it does not read."""
    caplog.set_level(logging.ERROR, logger="transformers")
