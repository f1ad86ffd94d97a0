"""``config.json`` read and written: every spelling as transformers reads it, or refused by name."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from deepseek.commands.convert import _run_config, config_of_hf
from deepseek.config import load_config
from deepseek.config.errors import ConfigError, UserError
from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.interop.hf_config import hf_config, inference_config, model_config
from deepseek.interop.hf_import import HfFolder, plan_import
from deepseek.interop.huggingface import from_hf
from deepseek.models.transformer import Transformer
from support.hf_configs import (
    DEEPSEEK_V3,
    GLM_47_FLASH,
    INFERENCE_671B,
    KIMI_K2,
    MOONLIGHT,
    TINY,
    V2_LITE,
    YARN_40,
)
from support.hf_folders import small, weights, write_folder


def read_again(cfg: ModelConfig) -> ModelConfig:
    """The configuration after a trip through config.json."""
    return model_config(json.loads(json.dumps(hf_config(cfg))))


@pytest.mark.parametrize("published", [DEEPSEEK_V3, KIMI_K2, MOONLIGHT, V2_LITE, GLM_47_FLASH])
def test_published_configurations(published: dict[str, Any]) -> None:
    cfg = model_config(published)
    for key, value in published.items():
        if key in ("model_type", "rope_scaling", "tie_word_embeddings") or not hasattr(cfg, key):
            continue
        assert getattr(cfg, key) == value, key
    yarn = published["rope_scaling"]
    assert cfg.rope_scaling == (None if yarn is None else RopeScaling(**yarn))
    assert cfg.moe_aux_loss_coeff == published.get("aux_loss_alpha", 1e-4)
    assert read_again(cfg) == cfg


def test_where_all_blocks_are_dense_there_is_nothing_to_balance() -> None:
    dense = MOONLIGHT | {"first_k_dense_replace": MOONLIGHT["num_hidden_layers"]}
    assert model_config(dense).moe_aux_loss_coeff == 1e-4, "the default, which says nothing"


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
    ("name", "reason"),
    [
        ("DeepseekV32ForCausalLM", "indexer"),
        ("DeepseekV4ForCausalLM", "sliding and compressed attention.*hyper-connections"),
        ("GlmMoeDsaForCausalLM", "indexer"),
        ("Mistral4ForCausalLM", "llama_4_scaling_beta"),
        ("LongcatFlashForCausalLM", "zero_expert_num"),
        ("KimiLinearForCausalLM", "linear attention"),
        ("Dots1ForCausalLM", "grouped-query attention"),
        ("Glm4MoeForCausalLM", "grouped-query attention"),
        ("BailingMoeV2ForCausalLM", "grouped-query attention"),
        ("BailingHybridForCausalLM", "linear attention"),
        ("YoutuForCausalLM", "no experts, and its head shares"),
        ("AXK1ForCausalLM", "post_mlp_layernorm"),
        ("DeepseekVLForConditionalGeneration", "vision and a language model"),
        ("DeepseekVLV2ForCausalLM", "vision and a language model"),
        ("KimiK25ForConditionalGeneration", "vision and a language model"),
        ("DeepseekForCausalLM", "multi-head attention, not latent"),
        ("NewForCausalLM", "not known whether .*; only DeepseekV3"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(name: str, reason: str) -> None:
    """Whatever other keys say: V4 has an indexer too."""
    for more in ({}, {"index_topk": 512}):
        if name != "NewForCausalLM" or not more:
            with pytest.raises(UserError, match=f"describes {name}: .*{reason}"):
                model_config(DEEPSEEK_V3 | more | {"architectures": [name]})


def test_model_types_alone_are_refused_with_the_reason() -> None:
    for reason, kinds in {
        "sliding and compressed attention": "deepseek_v4",
        "indexer": "deepseek_v32 glm_moe_dsa axk2",
        "llama_4_scaling_beta": "mistral4",
        "zero_expert_num": "longcat_flash longcat_flash_ngram",
        "Kimi Delta Attention": "kimi_linear",
        "linear attention": "bailing_hybrid bailing_moe_linear bailing_moe_linear_v2 "
        "bailing_moe_v2_5",
        "grouped-query attention": "bailing_moe bailing_moe_v2 dots1 glm4_moe",
        "no experts, and its head shares": "youtu youtu_llm",
        "post_mlp_layernorm": "axk1 AXK1",
        "no experts, and scales": "minicpm3",
        "vision and a language model": "deepseek_vl deepseek_vl_v2 deepseek_vl_hybrid kimi_vl "
        "kimi_k25 mistral3 deepseek_ocr",
    }.items():
        for kind in kinds.split():
            with pytest.raises(UserError, match=f"describes {kind}: .*{reason}"):
                model_config(DEEPSEEK_V3 | {"architectures": None, "model_type": kind})


PUBLISHED_FAMILIES = {
    "deepseek_v4": "sliding and compressed attention",
    "deepseek_v32 glm_moe_dsa axk2": "indexer",
    "mistral4": "llama_4_scaling_beta",
    "longcat_flash": "zero_expert_num",
    "kimi_linear": "Kimi Delta Attention",
    "bailing_hybrid": "linear attention",
    "dots1 glm4_moe": "grouped-query attention",
    "youtu": "no experts, and its head shares",
    "axk1": "post_mlp_layernorm",
    "minicpm3": "no experts, and scales",
    "hy_v4": "hyper-connections",
    "llama qwen3_moe hy_v3": "there is no kv_lora_rank",
    "deepseek_vl deepseek_vl_hybrid deepseek_ocr2 mistral3 mistral_large4 dots3_note glm5_next "
    "kimi_k25": "vision and a language model; pass the language model's own",
}
LANGUAGE_MODELS = {
    "deepseek_vl deepseek_ocr2 mistral3": "there is no kv_lora_rank",
    "mistral_large4 dots3_note": "indexer",
    "glm5_next": "hyper-connections",
}


def test_families_as_transformers_describes_them_are_refused_with_the_reason() -> None:
    """A language model inside a vision model is not told to be one of those once more."""
    for table, inner in ((PUBLISHED_FAMILIES, False), (LANGUAGE_MODELS, True)):
        for kinds, reason in table.items():
            for kind in kinds.split():
                if kind not in transformers.CONFIG_MAPPING:
                    continue  # of another version
                described = transformers.CONFIG_MAPPING[kind]()
                if inner:
                    described = described.get_text_config()
                with pytest.raises(UserError, match=f"config.json describes .*{reason}"):
                    model_config(described.to_dict())
    inside = transformers.CONFIG_MAPPING["kimi_k25"]().get_text_config()
    assert model_config(inside.to_dict()).hidden_size == inside.hidden_size


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"index_topk": 2048}, "DeepseekV3ForCausalLM: .*indexer"),
        ({"hc_mult": 4}, "DeepseekV3ForCausalLM: .*hyper-connections"),
        ({"text_config": {}}, "vision and a language model"),
        (
            {"architectures": None, "model_type": "llama", "kv_lora_rank": None},
            "llama: .*not known",
        ),
        ({"architectures": None, "model_type": "mistral4"}, "mistral4: .*llama_4"),
        ({"architectures": None, "model_type": None}, "neither architectures nor model_type"),
        ({"architectures": "DeepseekV3ForCausalLM"}, "architectures=.*must be a list of names"),
        ({"architectures": [3]}, "architectures=.*must be a list of names"),
        ({"model_type": ["deepseek_v3"]}, "model_type=.*must be a text"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        model_config(DEEPSEEK_V3 | changes)
    assert model_config(DEEPSEEK_V3 | {"architectures": []}) == model_config(DEEPSEEK_V3)


def test_what_is_no_latent_attention_is_told_so() -> None:
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    with pytest.raises(UserError, match="LlamaForCausalLM: .*there is no kv_lora_rank.*; only"):
        model_config(llama)


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
        ({"num_local_experts": 8}, "num_local_experts=8: n_routed_experts=256 says otherwise"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "attends to all tokens"),
        ({"mlp_layer_types": ["sparse"] * 61}, "first_k_dense_replace=3 says otherwise"),
        ({"mlp_layer_types": ["dense"] * 3}, "names 3 layers, num_hidden_layers=61"),
        ({"mlp_layer_types": ["sparse", "dense"]}, "the dense layers come first"),
        ({"mlp_layer_types": "dense"}, "must be a list of dense and sparse"),
        ({"partial_rotary_factor": 0.5}, "rotates all of qk_rope_head_dim"),
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


# -- the same numbers as transformers --

PEERS = {
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
    "deepseek_v2": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "glm4_moe_lite": (transformers.Glm4MoeLiteConfig, transformers.Glm4MoeLiteForCausalLM),
}


def both_logits(content: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ours and theirs of one ``config.json`` with random weights, far along the context too."""
    kind, made = PEERS[content["model_type"]]
    described = kind.from_dict(json.loads(json.dumps(content)))
    described._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = made(described).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    cfg = model_config(content)
    ours = Transformer(cfg)
    ours.load_state_dict(from_hf(theirs.state_dict(), cfg))
    positions_BS = torch.tensor([[0, 1, 2, 3, 50, 127, 128, 129, 200, 400, 510, 511]])
    tokens_BS = torch.arange(12).unsqueeze(0) * 5 % 31
    with torch.no_grad():
        mask_BS = torch.ones_like(tokens_BS)
        wanted = theirs(tokens_BS, position_ids=positions_BS, attention_mask=mask_BS).logits
        return ours(tokens_BS, positions_BS), wanted


def assert_as_transformers(content: dict[str, Any]) -> None:
    ours, wanted = both_logits(content)
    assert wanted.abs().max() > 2
    assert (ours - wanted).abs().max() <= 1e-4, content


def rope_block(draw: random.Random) -> dict[str, Any]:
    block: dict[str, Any] = {"factor": draw.choice([4, 4.0, 40])}
    if draw.random() < 0.9:
        block[draw.choice(["type", "rope_type"])] = draw.choice(
            ["yarn"] * 8 + ["default", "linear"]
        )
    if draw.random() < 0.9:
        block["original_max_position_embeddings"] = draw.choice([128, 64])
    usual = {
        "beta_fast": [32, 16.0, None],
        "beta_slow": [1, 2],
        "mscale": [1.0, 0.707, 0, None],
        "mscale_all_dim": [1.0, 0.707, 0, None],
        "rope_theta": [10000, 5e4],
    }
    odd = {
        "rope_theta": [None, "10000"],
        "type": ["yarn", "default"],
        "attention_factor": [None, 1.3],
        "truncate": [True, False, None],
        "partial_rotary_factor": [1.0, 0.5],
        "unheard_of": [1],
    }
    for chance, choices in ((0.35, usual), (0.04, odd)):
        for key, values in choices.items():
            if draw.random() < chance:
                block[key] = draw.choice(values)
    return {"full_attention": block} if draw.random() < 0.03 else block


def rope_keys(draw: random.Random) -> dict[str, Any]:
    """Some of the three keys that speak of rotary embeddings."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    keys: dict[str, Any] = draw.choice(
        [
            {"rope_scaling": rope_block(draw)},
            {"rope_parameters": rope_block(draw)},
            {
                "rope_scaling": rope_block(draw),
                "rope_parameters": draw.choice([plain, rope_block(draw)]),
            },
            {"rope_parameters": draw.choice([plain, {"rope_type": "default"}, {}])},
            {"rope_scaling": draw.choice([None, {}, "yarn", 3, [1]])},
        ]
    )
    if draw.random() < 0.5:
        keys["rope_theta"] = draw.choice([10000, 10000.0, 5e4, 1000000, "1e4", None])
    return keys


def test_every_form_of_rope_is_read_as_transformers_does_or_refused() -> None:
    draw, read, refused = random.Random(0), 0, 0
    for _ in range(150):
        content = TINY | rope_keys(draw)
        try:
            model_config(content)
        except ConfigError as error:
            assert "rope" in str(error) or "partial_rotary_factor" in str(error)
            refused += 1
        else:
            assert_as_transformers(content)
            read += 1
    assert read >= 30 and refused >= 30


OTHER_ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
    "su": {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "proportional": {"partial_rotary_factor": 0.25},
    "mrope": {"mrope_section": [1, 1]},
    "YARN": {"factor": 4.0},
    "": {"factor": 4.0},
}


def test_other_types_of_rope_are_refused_by_their_name() -> None:
    for kind, more in OTHER_ROPES.items():
        for block in ("rope_scaling", "rope_parameters"):
            for keys in (["type"], ["rope_type"], ["rope_type", "type"]):
                content = {**more, "original_max_position_embeddings": 128}
                content |= dict.fromkeys(keys, kind)
                for told in (content, {key: None for key in content} | dict.fromkeys(keys, kind)):
                    with pytest.raises(
                        ConfigError, match=rf"{block}\.(rope_)?type={kind or chr(39) * 2}: this"
                    ):
                        model_config(TINY | {block: told})
                with pytest.raises(ConfigError, match=rf"{block}\.full_attention=.*layers of one"):
                    model_config(TINY | {block: {"full_attention": content}})


def test_yarn_without_one_of_its_keys() -> None:
    """Absent or null is what it is to transformers, or refused by the key."""
    whole = {**YARN_40, "original_max_position_embeddings": 128, "type": "yarn"}
    for block in ("rope_scaling", "rope_parameters"):
        for key in whole:
            absent = {k: v for k, v in whole.items() if k != key}
            for content in (absent, whole | {key: None}):
                told = TINY | {block: content}
                if key in ("beta_fast", "beta_slow", "mscale_all_dim"):
                    assert_as_transformers(told)
                    continue
                name = "rope_type" if key == "type" else key
                with pytest.raises(ConfigError, match=rf"{block}\.{name}=\(absent\): "):
                    model_config(told)


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}, 1e6, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, False),
        ({"rope_parameters": {}, "rope_theta": 5e5}, 5e5, False),
        ({"rope_scaling": None}, 10000.0, False),
        ({"rope_scaling": YARN_40, "rope_parameters": {"rope_theta": 1e4}}, 1e4, True),
        ({"rope_scaling": YARN_40 | {"rope_theta": 7e4}}, 7e4, True),
        ({"rope_scaling": YARN_40 | {"truncate": True, "partial_rotary_factor": 1.0}}, 1e4, True),
        ({"rope_parameters": {"rope_type": "yarn", **YARN_40}, "rope_scaling": {}}, 1e4, True),
    ],
)
def test_rope_that_is_read(keys: dict[str, Any], theta: float, scaling: bool) -> None:
    base = {key: value for key, value in DEEPSEEK_V3.items() if not key.startswith("rope")}
    cfg = model_config(base | keys)
    assert cfg.rope_theta == theta
    assert cfg.rope_scaling == (RopeScaling(**YARN_40) if scaling else None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": "yarn"}, 'rope_scaling=yarn: must be a block of keys, and is "yarn"'),
        ({"rope_parameters": [1]}, "rope_parameters=.*must be a block of keys"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling.rope_type=.absent.: factor mean nothing"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4}}, "no such key; remove it"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "layers of one type"),
        ({"rope_scaling": YARN_40 | {"rope_type": "default"}}, "rope_scaling.rope_type=default"),
        ({"rope_scaling": YARN_40 | {"rope_theta": 5e4}, "rope_theta": 1e4}, "50000.0 says other"),
        (
            {"rope_scaling": YARN_40, "rope_parameters": {"rope_type": "yarn", "factor": 2}},
            "rope_parameters.factor=2: rope_scaling=.* says otherwise",
        ),
        ({"rope_scaling": YARN_40 | {"factor": "40"}}, 'factor=40: must be a number, and is "40"'),
        ({"rope_scaling": YARN_40 | {"factor": None}}, "factor=.absent.: YaRN depends on it"),
        ({"rope_scaling": YARN_40 | {"beta_fast": True}}, "beta_fast=true: must be a number"),
        ({"rope_scaling": YARN_40 | {"attention_factor": 2}}, "attention_factor=2: .*no such opti"),
        ({"rope_scaling": YARN_40 | {"truncate": False}}, "truncate=false.*would change the model"),
        ({"rope_scaling": YARN_40 | {"truncate": None}}, "truncate=null.*would change the model"),
        ({"rope_scaling": YARN_40 | {"mscale": 0.5, "mscale_all_dim": 0}}, "mscale=0.5: with"),
        (
            {"rope_scaling": {k: v for k, v in YARN_40.items() if k != "mscale"}},
            r"mscale=\(absent\): with mscale=\(absent\) and mscale_all_dim=1.0",
        ),
        ({"rope_theta": "10000"}, 'rope_theta=10000: must be a number, and is "10000"'),
        ({"rope_theta": float("nan")}, "rope_theta=nan: must be a number"),
    ],
)
def test_rope_that_is_refused(keys: dict[str, Any], message: str) -> None:
    base = {key: value for key, value in DEEPSEEK_V3.items() if not key.startswith("rope")}
    with pytest.raises(ConfigError, match=message):
        model_config(base | keys)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of no shared expert
@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense", "sparse"]},
        {"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "sparse"], "dense": None},
        {"model_type": "glm4_moe_lite", "dense": None},
        {"model_type": "deepseek_v2", "norm_topk_prob": False, "routed_scaling_factor": 16.0},
        {
            "model_type": "deepseek_v2", "norm_topk_prob": False, "n_group": 2,
            "topk_method": "group_limited_greedy", "q_lora_rank": None,
            "rope_scaling": YARN_40 | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
        {"n_shared_experts": 0},
        {"num_local_experts": 4, "num_mtp_layers": 0},
        {
            "layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"],
            "unsloth_version": "2026.1", "moe_router_dtype": "float32", "head_dim": 16,
            "router_aux_loss_coef": 0.001, "partial_rotary_factor": 1.0, "qk_head_dim": 24,
        },
    ],
)  # fmt: skip
def test_families_compute_what_transformers_does(changes: dict[str, Any]) -> None:
    kind = changes.get("model_type", "deepseek_v3")
    content = TINY | changes | {"architectures": [PEERS[kind][1].__name__]}
    if "dense" in content:
        del content["dense"], content["first_k_dense_replace"]
    assert_as_transformers(content)


def test_glm_is_written_under_its_own_name(tmp_path: Path) -> None:
    for dense in (0, 1, 2):
        cfg = small(model_type="glm4_moe_lite", hidden_size=32, first_k_dense_replace=dense)
        write_folder(tmp_path / str(dense), cfg, state := weights(cfg))
        assert read_again(cfg).model_type == "glm4_moe_lite"
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / str(dense), dtype=torch.float32, attn_implementation="eager"
        )
        assert type(theirs) is transformers.Glm4MoeLiteForCausalLM
        ours = Transformer(cfg)
        ours.load_state_dict(state)
        tokens_BS = torch.arange(9).unsqueeze(0) * 7
        with torch.no_grad():
            assert (ours(tokens_BS) - theirs(tokens_BS).logits).abs().max() <= 1e-4


# -- DeepSeek's inference code --


def test_inference_configurations() -> None:
    """That of V3 is the released model; what it lacks is what ``ModelArgs`` says."""
    cfg, released = inference_config(INFERENCE_671B), model_config(DEEPSEEK_V3)
    for key in DEEPSEEK_V3:
        if hasattr(cfg, key) and key not in ("num_nextn_predict_layers", "initializer_range"):
            assert getattr(cfg, key) == getattr(released, key), key
    lite = inference_config({})
    assert (lite.hidden_size, lite.q_lora_rank, lite.topk_method) == (2048, None, "greedy")
    v2 = inference_config({"n_expert_groups": 8, "n_limited_groups": 3, "route_scale": 16.0})
    assert (v2.topk_method, v2.norm_topk_prob) == ("group_limited_greedy", False)
    assert inference_config({"max_seq_len": 4096}).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": 2048}, "index_topk: .*sparse attention"),
        ({"n_heads": "16"}, 'n_heads=16: must be a whole number, and is "16"'),
        ({"width": 3}, "width=3: DeepSeek's inference code has no such key"),
    ],
)
def test_broken_inference_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inference_config(INFERENCE_671B | changes)


def test_a_configuration_without_weights(tmp_path: Path) -> None:
    for name, content in (("config.json", DEEPSEEK_V3), ("config_671B.json", INFERENCE_671B)):
        (tmp_path / name).write_text(json.dumps(content))
        output = tmp_path / f"{Path(name).stem}.yaml"
        config_of_hf(tmp_path / name, output)
        read = load_config(output)
        assert read.model.hidden_size == 7168 and read.model.rope_scaling == RopeScaling(**YARN_40)
        with pytest.raises(UserError, match="exists already and nothing is overwritten"):
            config_of_hf(tmp_path / name, output)
    (tmp_path / "bad.json").write_text('{"dim": 1, "dim": 2}')
    with pytest.raises(UserError, match="bad.json: dim stands there twice"):
        config_of_hf(tmp_path / "bad.json", tmp_path / "bad.yaml")


# -- wrong types and sizes --

WRONG: dict[type, list[Any]] = {
    int: ["8", 8.0, True, [8], {"a": 1}, -1e5, float("nan")],
    float: ["1e-6", True, [1.0], {}, float("inf"), float("nan"), 10**400],
    bool: ["true", 1.5, [True], {"a": 1}],
    str: [3, True, ["sigmoid"], {"a": 1}],
}


def test_wrong_types_are_told_by_the_key() -> None:
    tried = 0
    for key, value in TINY.items():
        if key in ("architectures", "model_type", "num_key_value_heads"):
            continue
        for wrong in WRONG[type(value)]:
            with pytest.raises(ConfigError, match=f"{key}="):
                model_config(TINY | {key: wrong})
            tried += 1
    assert tried > 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    cfg = small()
    write_folder(path, cfg, weights(cfg), tokenizer=False)
    return path


def planned(path: Path) -> None:
    """All that an import does before it reads a number."""
    source = HfFolder(path)
    cfg = model_config(source.config)
    _run_config(path, cfg)
    plan_import(source, cfg)


def test_absurd_sizes_are_refused_at_once(folder: Path) -> None:
    good = hf_config(small())
    begin = time.monotonic()
    for key, value in good.items():
        if type(value) is int and not isinstance(value, bool) and key != "moe_layer_freq":
            for huge in (10**6, 10**9, 10**12, 10**18):
                (folder / "config.json").write_text(json.dumps(good | {key: huge}))
                if key != "max_position_embeddings" or huge > 10**9:
                    with pytest.raises(UserError):
                        planned(folder)
    assert time.monotonic() - begin < 60


def mutated(draw: random.Random, good: dict[str, Any]) -> bytes:
    """A ``config.json`` with some faults: of values, keys, nesting, or of the text."""
    content = dict(good)
    odd: list[Any] = [
        None, True, False, 0, -1, 1, 7, 2**31, 10**12, 10**400, 1e308, 0.5, float("nan"),
        float("inf"), "", "8", "yarn", "\ud800", [], [1], [None], {}, {"a": 1}, {"type": "yarn"},
    ]  # fmt: skip
    for _ in range(draw.randint(1, 3)):
        key = draw.choice([*content, "rope_scaling", "rope_parameters", "rope_theta", "head_dim"])
        how = draw.random()
        if how < 0.6:
            content[key] = draw.choice(odd)
        elif how < 0.7:
            content.pop(key, None)
        elif how < 0.8:
            content[key + draw.choice(["_", "s", "\u00e9"])] = draw.choice(odd)
        else:
            content[key] = rope_block(draw)
    text = json.dumps(content).encode()
    if draw.random() < 0.15:
        place = draw.randrange(len(text))
        text = draw.choice(
            [
                text[:place],
                text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :],
                b"[" * 99999,
            ]
        )
    return text


def test_mutated_files_are_read_or_refused(folder: Path) -> None:
    """Whatever stands there, no traceback."""
    seed, count = 0, 200
    if os.environ.get("HYPOTHESIS_PROFILE") == "nightly":
        count = 5000
    draw, good, refused = random.Random(seed), hf_config(small()), 0
    for _ in range(count):
        (folder / "config.json").write_bytes(mutated(draw, good))
        try:
            planned(folder)
        except UserError as error:
            assert str(error)
            refused += 1
    assert refused > count / 2


@pytest.fixture(autouse=True)
def quiet() -> None:
    """transformers warns of much of this."""
    transformers.logging.set_verbosity_error()
