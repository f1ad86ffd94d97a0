"""Tensors under Hugging Face names: complete, strict, and as the peers read and write them."""

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

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.interop.hf_config import hf_config, model_config
from deepseek.interop.huggingface import Layout, from_hf, hf_tensors, to_hf
from deepseek.models.transformer import Transformer
from support.hf_configs import DEEPSEEK_V3

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
    released = hf_tensors(model_config(DEEPSEEK_V3))
    assert len(released) == 46_183
    assert sum(torch.Size(t.shape).numel() for t in released.values()) == 684_489_845_504


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
    assert read == model_config(json.loads(json.dumps(hf_config(cfg))))
    model = Transformer(read)
    model.load_state_dict(from_hf(load_file(tmp_path / "model.safetensors"), read))
    tokens_BS = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(model(tokens_BS), theirs(tokens_BS).logits, rtol=1e-4, atol=1e-5)


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
