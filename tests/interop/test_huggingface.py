"""The table of names: complete, strict, and the same as what the peers read and write."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek.config.errors import ConfigError, UserError
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.interop.hf_config import hf_config, model_config
from deepseek.interop.huggingface import Layout, from_hf, to_hf
from deepseek.models.transformer import Transformer

YARN_40 = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
# What the published config.json files say, but for tokens and versions.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN_40,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2: dict[str, Any] = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "rope_scaling": YARN_40 | {"beta_fast": 1.0, "factor": 32.0},
    "topk_group": 1,
    "vocab_size": 163840,
}
MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "vocab_size": 163840,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "aux_loss_alpha": 0.001,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000,
    "rope_scaling": YARN_40 | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
}


# -- weights ---------------------------------------------------------------------------------------


def test_names_are_those_of_the_released_checkpoints() -> None:
    """Every kind of layer, spelled out."""
    cfg = small(
        num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=6, n_routed_experts=2,
        num_nextn_predict_layers=1,
    )  # fmt: skip
    attention = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_a_proj.weight",
        "self_attn.q_a_layernorm.weight",
        "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
    }
    dense = {f"mlp.{matrix}_proj.weight" for matrix in ("gate", "up", "down")}
    moe = {
        f"mlp.{part}.{matrix}_proj.weight"
        for part in ("experts.0", "experts.1", "shared_experts")
        for matrix in ("gate", "up", "down")
    } | {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    mtp = {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "embed_tokens.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
    }
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, names in enumerate((attention | dense, attention | moe, attention | moe | mtp)):
        expected |= {f"model.layers.{layer}.{name}" for name in names}
    assert to_hf(weights(cfg), cfg).keys() == expected


def test_deepseek_v3_to_the_last_value() -> None:
    """As many tensors and values as an audit of the released bf16 checkpoint counted."""
    cfg = model_config(DEEPSEEK_V3)
    with torch.device("meta"):
        state = Transformer(cfg).state_dict()
    released = to_hf(state, cfg)
    assert len(released) == 46_183
    assert sum(tensor.numel() for tensor in released.values()) == 684_489_845_504


@pytest.mark.parametrize("layout", ["released", "stacked"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 6, "n_shared_experts": 2},
        {"n_shared_experts": 0, "first_k_dense_replace": 0},
        {"first_k_dense_replace": 4},
        {"num_nextn_predict_layers": 2},
        {"topk_method": "greedy", "scoring_func": "softmax"},
    ],
)
def test_there_and_back_again(layout: Layout, changes: dict[str, Any]) -> None:
    cfg = small(**changes)
    state = weights(cfg)
    back = from_hf(to_hf(state, cfg, layout), cfg)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_stacked_layout_is_gate_then_up() -> None:
    cfg = small()
    state = weights(cfg)
    stacked = to_hf(state, cfg, "stacked")
    width = cfg.moe_intermediate_size
    gate_up = stacked["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(gate_up[:, :width], state["layers.1.ffn.experts.w1"])
    assert torch.equal(gate_up[:, width:], state["layers.1.ffn.experts.w3"])
    down = stacked["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(down, state["layers.1.ffn.experts.w2"])


def test_without_mtp() -> None:
    cfg = small(num_nextn_predict_layers=2)
    state = weights(cfg)
    main = to_hf(state, cfg, mtp=False)
    without = small(num_nextn_predict_layers=0)
    assert from_hf(main, without).keys() == {n for n in state if not n.startswith("mtp.")}
    assert hf_config(cfg, mtp=False)["num_nextn_predict_layers"] == 0
    assert hf_config(cfg)["num_nextn_predict_layers"] == 2


def test_correction_bias_stays_fp32() -> None:
    cfg = small()
    state = {name: tensor.bfloat16() for name, tensor in weights(cfg).items()}
    released = to_hf(state, cfg)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert released[bias].dtype == torch.float32
    assert released["lm_head.weight"].dtype == torch.bfloat16
    released[bias] = released[bias].bfloat16()
    assert from_hf(released, cfg)["layers.1.ffn.gate.bias"].dtype == torch.float32


def test_rotary_tables_and_absent_copies_are_fine() -> None:
    cfg = small(num_nextn_predict_layers=1)
    state = weights(cfg)
    released = to_hf(state, cfg)
    released["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    del released["model.layers.3.embed_tokens.weight"]
    del released["model.layers.3.shared_head.head.weight"]
    assert from_hf(released, cfg).keys() == state.keys()


def test_missing_unexpected_and_misshapen_are_all_named() -> None:
    cfg = small()
    released = to_hf(weights(cfg), cfg)
    del released["model.layers.1.mlp.experts.2.up_proj.weight"]
    released["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    released["model.norm.weight"] = torch.zeros(5)
    with pytest.raises(UserError) as error:
        from_hf(released, cfg)
    message = str(error.value)
    assert "1 missing: model.layers.1.mlp.experts.2.up_proj.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 of another shape: model.norm.weight (5,) instead of (8,)" in message
    assert "belong together" in message


def test_export_refuses_an_incomplete_model() -> None:
    cfg = small()
    state = weights(cfg)
    del state["layers.2.ffn.experts.w2"]
    with pytest.raises(UserError, match=r"1 missing: layers\.2\.ffn\.experts\.w2"):
        to_hf(state, cfg)


def test_long_lists_are_cut() -> None:
    cfg = small()
    with pytest.raises(UserError, match=r"missing: .* and \d+ more"):
        from_hf({}, cfg)


def test_mtp_layers_that_are_not_there() -> None:
    cfg = small(num_nextn_predict_layers=2)
    with pytest.raises(UserError, match="set model.num_nextn_predict_layers=0"):
        from_hf(to_hf(weights(cfg), cfg, mtp=False), cfg)


def test_mtp_layers_that_nobody_asked_for() -> None:
    cfg = small(num_nextn_predict_layers=2)
    released = to_hf(weights(cfg), cfg)
    with pytest.raises(UserError, match="set model.num_nextn_predict_layers=2, or drop them"):
        from_hf(released, small(num_nextn_predict_layers=0))


def test_mtp_copies_must_be_copies() -> None:
    cfg = small(num_nextn_predict_layers=1)
    released = to_hf(weights(cfg), cfg)
    released["model.layers.3.shared_head.head.weight"] += 1
    with pytest.raises(UserError, match=r"layers\.3\.shared_head\.head\.weight differ"):
        from_hf(released, cfg)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_packed"])
def test_quantised_weights(suffix: str) -> None:
    cfg = small()
    released = to_hf(weights(cfg), cfg)
    released[f"model.layers.0.self_attn.o_proj.{suffix}"] = torch.ones(1)
    with pytest.raises(UserError, match=f"quantised .*o_proj.{suffix}.*dequantise them to bf16"):
        from_hf(released, cfg)


# -- files that transformers reads and writes ------------------------------------------------------


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    cfg = small(num_nextn_predict_layers=1)
    model = filled(cfg)
    save_file(to_hf(model.state_dict(), cfg), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(cfg)))
    theirs, report = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    mtp_layer = f"model.layers.{cfg.num_hidden_layers}."
    assert all(name.startswith(mtp_layer) for name in report["unexpected_keys"])
    tokens_BS = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(model(tokens_BS), theirs(tokens_BS).logits, rtol=1e-4, atol=1e-4)


def test_we_read_what_transformers_writes(tmp_path: Path) -> None:
    cfg = small(q_lora_rank=6, rope_scaling=RopeScaling(mscale_all_dim=1.0))
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**hf_config(cfg)))
    theirs.save_pretrained(tmp_path)
    read = model_config(json.loads((tmp_path / "config.json").read_text()))
    assert read == read_again(cfg)
    model = Transformer(read)
    model.load_state_dict(from_hf(load_file(tmp_path / "model.safetensors"), read))
    tokens_BS = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(model(tokens_BS), theirs(tokens_BS).logits, rtol=1e-4, atol=1e-5)


# -- config.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "published", [DEEPSEEK_V3, KIMI_K2, MOONLIGHT, V2_LITE], ids=["v3", "kimi", "moonlight", "v2"]
)
def test_published_configurations(published: dict[str, Any]) -> None:
    cfg = model_config(published)
    for key, value in published.items():
        if key in ("rope_scaling", "tie_word_embeddings") or not hasattr(cfg, key):
            continue
        assert getattr(cfg, key) == value, key
    yarn = published["rope_scaling"]
    assert cfg.rope_scaling == (None if yarn is None else RopeScaling(**yarn))
    assert cfg.moe_aux_loss_coeff == published.get("aux_loss_alpha", 1e-4)
    assert read_again(cfg) == cfg


def test_written_configuration_says_what_was_published() -> None:
    written = json.loads(json.dumps(hf_config(model_config(DEEPSEEK_V3))))
    for key, value in DEEPSEEK_V3.items():
        if key != "quantization_config":
            assert written[key] == value, key


def test_transformers_5_spelling() -> None:
    old = model_config(DEEPSEEK_V3)
    new = {k: v for k, v in DEEPSEEK_V3.items() if k not in ("rope_theta", "rope_scaling")}
    yarn = {k: v for k, v in YARN_40.items() if k != "type"}
    new["rope_parameters"] = yarn | {"rope_type": "yarn", "rope_theta": 10000}
    assert model_config(new) == old
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000}
    assert model_config(new).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "DeepseekV32ForCausalLM: .*indexer"),
        ({"index_topk": 2048}, "DeepseekV3ForCausalLM: .*indexer"),
        ({"architectures": ["DeepseekV4ForCausalLM"]}, "hyper-connections"),
        ({"architectures": ["GlmMoeDsaForCausalLM"]}, "indexer"),
        ({"architectures": ["KimiK25ForConditionalGeneration"]}, "pass its text_config"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM: only DeepseekV3"),
        ({"architectures": None, "model_type": "llama"}, "llama: only DeepseekV3"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        model_config(DEEPSEEK_V3 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=true: this model has only false"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: this model has only silu"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8: this model has only 128"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true"),
        ({"rope_interleave": False}, "rope_interleave=false"),
        ({"scoring_func": "softmax"}, "scoring_func=softmax: .* computes sigmoid only"),
        ({"topk_method": "greedy"}, "topk_method=greedy: .* computes noaux_tc only"),
        ({"hidden_size": None}, r"hidden_size=\(absent\)"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type=linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"rope_scaling": YARN_40 | {"attention_factor": 2}}, "attention_factor=2"),
        ({"rope_scaling": YARN_40 | {"truncate": False}}, "truncate=false"),
        ({"rope_scaling": YARN_40 | {"mscale": 0.5, "mscale_all_dim": 0}}, "mscale=0.5"),
    ],
)
def test_what_this_model_does_not_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(DEEPSEEK_V3 | changes)


def test_all_problems_at_once() -> None:
    changes = {"attention_bias": True, "hidden_act": "gelu", "topk_method": "greedy"}
    with pytest.raises(ConfigError, match="3 problems"):
        model_config(DEEPSEEK_V3 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "greedy"}, "model.topk_method=greedy: DeepseekV3ForCausalLM computes"),
        ({"scoring_func": "softmax"}, "model.topk_method=noaux_tc: DeepseekV2ForCausalLM"),
        (
            {"scoring_func": "softmax", "topk_method": "greedy"},
            "model.norm_topk_prob=true: DeepseekV2ForCausalLM computes false only",
        ),
        ({"rope_scaling": RopeScaling(mscale=0.5)}, "model.rope_scaling.mscale=0.5"),
    ],
)
def test_export_refuses_what_no_class_computes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_config(small(**changes))


# -- fixtures --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """transformers reports the MTP layer that it does not read."""
    caplog.set_level(logging.ERROR, logger="transformers")


def small(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = dict(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        kv_lora_rank=4,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=3,
        intermediate_size=10,
        moe_intermediate_size=12,
        n_routed_experts=4,
    )
    return ModelConfig(**(fields | changes))


def filled(cfg: ModelConfig) -> Transformer:
    model = Transformer(cfg)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(tensor.numel()))
    return model


def weights(cfg: ModelConfig) -> dict[str, Tensor]:
    return dict(filled(cfg).state_dict())


def read_again(cfg: ModelConfig) -> ModelConfig:
    """The configuration after a trip through config.json."""
    return model_config(json.loads(json.dumps(hf_config(cfg))))
