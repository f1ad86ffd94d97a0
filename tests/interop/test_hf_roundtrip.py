"""Hugging Face files in and out, bit by bit: layouts, MTP, hundreds of shards."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from deepseek.checkpoint.shards import TensorSpec
from deepseek.commands.convert import export_hf, import_hf
from deepseek.commands.generate import generate_text
from deepseek.config import RunConfig, load_config
from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.data.tokenizer_training import byte_tokenizer
from deepseek.inference.generation import Sampling, generate
from deepseek.interop.hf_config import hf_config, model_config
from deepseek.interop.hf_import import HfFolder, plan_import
from deepseek.interop.huggingface import (
    Layout,
    hf_tensors,
    is_projection,
    our_shapes,
    to_hf,
)
from deepseek.interop.open_weights import open_checkpoint
from deepseek.models.transformer import Transformer
from support.hf_configs import DEEPSEEK_V3
from support.hf_folders import (
    assert_equal,
    exported,
    imported,
    random_config,
    small,
    weights,
    write_folder,
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


def test_every_name_of_deepseek_v3() -> None:
    """61 layers, 256 experts, MTP, FP8 with scales: 91,000 tensors, by their headers alone."""
    cfg = model_config(DEEPSEEK_V3)
    specs: dict[str, TensorSpec] = {}
    for name, target in hf_tensors(cfg).items():
        if is_projection(name):
            rows, columns = (-(-size // 128) for size in target.shape)
            specs[name] = TensorSpec(torch.float8_e4m3fn, target.shape)
            specs[f"{name}_scale_inv"] = TensorSpec(torch.float32, (rows, columns))
        else:
            specs[name] = TensorSpec(torch.bfloat16, target.shape)
    assert len(specs) == 91_991  # counted in the released FP8 checkpoint
    folder: Any = SimpleNamespace(path=Path("v3"), config=DEEPSEEK_V3, tensors=specs)
    plan = plan_import(folder, cfg)
    assert plan.config == cfg and len(plan.quantised) == 91_991 - 46_183
    assert [len(names) for names in plan.dropped.values()] == [0, 2, 0]
    written = {piece.name for target in plan.targets.values() for piece in target.slices}
    assert written == our_shapes(cfg).keys()
    del specs["model.layers.60.mlp.experts.255.up_proj.weight_scale_inv"]
    with pytest.raises(UserError, match=r"layers\.60\.mlp\.experts\.255\.up_proj.*has no .*_inv"):
        plan_import(folder, cfg)


# -- vocabularies --


@pytest.mark.parametrize(("vocab", "rows"), [("pad", 320), ("trim", 288)])
@pytest.mark.parametrize("stated", [288, 320])
def test_rows_that_config_json_does_not_count(
    tmp_path: Path, vocab: str, rows: int, stated: int
) -> None:
    cfg = small(vocab_size=608 - stated, num_nextn_predict_layers=1)
    state = weights(cfg)
    write_folder(tmp_path / "hf", cfg, state, vocab_size=stated)
    message = rf"embed_tokens\.weight has {608 - stated} rows.*vocab_size={stated}: .*--vocab trim"
    with pytest.raises(UserError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "run")
    import_hf(tmp_path / "hf", tmp_path / "run", vocab=vocab)
    found = imported(tmp_path / "run")
    for name, tensor in state.items():
        if name in ("embed.weight", "head.weight"):
            new = tensor.mean(dim=0, keepdim=True).expand(max(0, rows - len(tensor)), -1)
            tensor = torch.cat([tensor[:rows], new])
        assert torch.equal(found[name], tensor), name
    assert load_config(tmp_path / "run" / "config.yaml").model.vocab_size == rows
    export_hf(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows


def test_new_tokens_grow_embedding_and_head(tmp_path: Path) -> None:
    cfg = small()
    state = weights(cfg)
    write_folder(tmp_path / "hf", cfg, state)
    file = tmp_path / "hf" / "tokenizer.json"
    file.write_text(file.read_text().replace('"id": 261', '"id": 305'))
    with pytest.raises(UserError, match="the tokenizer has 306 ids, the model 300; .*--vocab pad"):
        import_hf(tmp_path / "hf", tmp_path / "run")
    import_hf(tmp_path / "hf", tmp_path / "run", vocab="pad")
    found = imported(tmp_path / "run")
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(found[name][:300], state[name])
        assert torch.equal(found[name][300:], state[name].mean(dim=0).expand(6, -1))


# -- folders that are less usual --


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "weights.safetensors"])
def test_one_file_needs_no_index(tmp_path: Path, name: str) -> None:
    cfg = small(n_shared_experts=0)
    theirs = write_folder(tmp_path / "hf", cfg, weights(cfg))
    (tmp_path / "hf" / "model.safetensors").unlink()
    for matrix in ("gate", "up", "down"):  # transformers writes those of no shared expert
        theirs[f"model.layers.1.mlp.shared_experts.{matrix}_proj.weight"] = torch.empty(0, 16)
    save_file({key: tensor.contiguous() for key, tensor in theirs.items()}, tmp_path / "hf" / name)
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert_equal(imported(tmp_path / "run"), weights(cfg))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_named(tmp_path: Path, bad: float) -> None:
    cfg = small()
    for name in ("norm.weight", "layers.1.ffn.experts.w2"):
        state = weights(cfg)
        state[name].view(-1)[-1] = bad
        write_folder(tmp_path / name, cfg, state)
        theirs = "model.norm.weight" if name == "norm.weight" else "experts.3.down_proj.weight"
        with pytest.raises(UserError, match=f"{theirs} holds NaN or infinite numbers"):
            import_hf(tmp_path / name, tmp_path / "run")


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
        str(tmp_path / "out"), dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = "To be, or"
    batch = tokenizer(prompt, return_tensors="pt")
    ids = batch["input_ids"]
    model = open_checkpoint(tmp_path / "run").model().cpu()
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() <= 1e-5
    drawn = theirs.generate(**batch, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    mine = generate(model, ids.tolist(), 8, Sampling(0.0), [tokenizer.eos_token_id])[0]
    assert drawn == mine
    # Its classes know where the modules are in models of 61 layers only.
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]
    drafted = theirs.generate(**batch, max_new_tokens=8, do_sample=False, use_mtp=True)
    assert drafted[0, ids.shape[1] :].tolist() == drawn
    capsys.readouterr()
    (text,) = generate_text(tmp_path / "run", [prompt], 8, temperature=0.0)
    assert len(text) > 0


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize(
    ("generation", "config", "eos"),
    [
        ({"eos_token_id": [257, 3], "do_sample": True, "temperature": 0.6}, {}, [257, 3]),
        ({"eos_token_id": [3, 257], "top_k": 5}, {"eos_token_id": 257}, [3, 257]),
        (None, {"eos_token_id": [257, 9]}, [257, 9]),
        (None, {"eos_token_id": 257}, 257),
        (None, {}, 257),
    ],
)
def test_ids_that_stop_survive(
    tmp_path: Path, generation: Any, config: Any, eos: Any, tokenizer: bool
) -> None:
    """As does all else that ``generation_config.json`` says, with a tokenizer and without."""
    cfg = small()
    write_folder(tmp_path / "hf", cfg, weights(cfg), tokenizer=tokenizer)
    if not tokenizer and not (generation or config):
        eos = None
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if generation is not None:
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {**(generation or {}), "eos_token_id": eos}.items() <= said.items()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == eos
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert read.eos_token_id == eos
    byte_tokenizer().save(tmp_path / "tok")
    if not tokenizer:  # one that is given later draws as the model says
        given = open_checkpoint(tmp_path / "run").tokenizer(tmp_path / "tok")
        assert given is not None and given.generation == (generation or config)


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
    plan = plan_import(HfFolder(tmp_path / "hf"), cfg)
    assert plan.dropped == {key: [] for key in plan.dropped} and not plan.quantised


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """transformers reports the MTP layer that it does not read."""
    caplog.set_level(logging.ERROR, logger="transformers")
