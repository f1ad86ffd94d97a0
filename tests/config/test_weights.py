"""The table of weights against the modules that hold them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from deepseek.config.layout import Layout, StageSlice, kept_shape, split_layers
from deepseek.config.schema import ModelConfig, PeftConfig
from deepseek.config.weights import (
    LORA_GROUPS,
    TP_DIMS,
    block_weights,
    lora_targets,
    model_weights,
    once_per_shape,
    weight_kinds,
)
from deepseek.models.transformer import Transformer
from support.tiny_models import tiny_config
from support.tiny_runs import worlds


def built(model: ModelConfig, stages: list[StageSlice] | None = None) -> Transformer:
    with torch.device("meta"):
        return Transformer(model, stages)


def shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


def variants() -> Iterator[ModelConfig]:
    """Every switch that adds or removes a weight."""
    for latent, method, shared, depth, dense in itertools.product(
        (None, 5), ("noaux_tc", "greedy"), (0, 2), (0, 2), (0, 1, 3)
    ):
        yield tiny_config(
            q_lora_rank=latent,
            topk_method=method,
            n_shared_experts=shared,
            num_nextn_predict_layers=depth,
            first_k_dense_replace=dense,
            num_hidden_layers=3,
        )


def test_the_table_is_the_state_dictionary_of_the_model() -> None:
    """Names, shapes and their order, of every variant; what is no parameter is a buffer."""
    for model in variants():
        transformer = built(model)
        weights = model_weights(model)
        assert [(weight.name, weight.shape) for weight in weights] == shapes(transformer), model
        parameters = {name for name, _ in transformer.named_parameters()}
        assert {weight.name for weight in weights if not weight.buffer} == parameters, model


def test_weights_of_the_stages_are_those_of_the_model() -> None:
    """The last of several stages has a copy of the embedding."""
    for run in worlds():
        parts = split_layers(run.model)
        for part in parts:
            weights = model_weights(run.model, *part)
            assert {weight.name: weight.shape for weight in weights} == dict(
                shapes(built(run.model, [part]))
            )
        names = [weight.name for part in parts for weight in model_weights(run.model, *part)]
        assert len(names) == len(set(names))


def test_adapters_lie_beside_what_they_adapt() -> None:
    """Of every target alone and of all: names and shapes of the built model."""
    matrices = [matrix for group in LORA_GROUPS.values() for matrix in group]
    for latent, targets in itertools.product(
        (None, 5), [list(LORA_GROUPS), *([matrix] for matrix in matrices)]
    ):
        model = tiny_config(
            q_lora_rank=latent,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            n_shared_experts=1,
            num_nextn_predict_layers=1,
            peft=PeftConfig(dim=3, target_modules=targets),
        )
        weights, transformer = model_weights(model), built(model)
        assert {weight.name: weight.shape for weight in weights} == dict(shapes(transformer))
        trained = {n for n, p in transformer.named_parameters() if p.requires_grad}
        assert {weight.name for weight in weights if weight.adapter} == trained
        assert not any(name.startswith("mtp.") for name in trained)


def test_every_matrix_but_the_router_may_get_an_adapter() -> None:
    model = tiny_config(q_lora_rank=5, first_k_dense_replace=1, n_shared_experts=1)
    blocks = built(replace(model, num_hidden_layers=2)).layers
    found = set()
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            found.add(name.rpartition(".")[2])
    found |= {f"experts.{name}" for name in ("w1", "w2", "w3")}
    targets = {weight.lora for weight in model_weights(model) if weight.lora}
    assert targets == found == lora_targets(list(LORA_GROUPS)) - {"wq"}
    assert lora_targets(["wo", "feed_forward"]) == {"wo", "w1", "w2", "w3"}


def test_tp_divides_heads_and_hidden_widths() -> None:
    """Twice the heads and twice the hidden widths are twice the dims that TP divides."""
    model = tiny_config(q_lora_rank=5, n_shared_experts=1)
    doubled = replace(
        model, num_attention_heads=2 * model.num_attention_heads, intermediate_size=48
    )
    shared = replace(model, n_shared_experts=2)
    for moe, larger in ((False, doubled), (True, doubled), (True, shared)):
        for one, two in zip(block_weights(model, moe), block_weights(larger, moe), strict=True):
            grown = [
                dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b
            ]
            if grown:
                assert grown == [one.tp_dim], one.name
    divided = {name for name, dim in TP_DIMS.items() if dim is not None}
    assert divided == {
        "attn.wq.weight",
        "attn.wq_b.weight",
        "attn.wkv_b.weight",
        "attn.wo.weight",
    } | {
        f"ffn.{owner}{matrix}.weight"
        for owner in ("", "shared_experts.")
        for matrix in ("w1", "w2", "w3")
    }


def test_all_ranks_together_hold_everything() -> None:
    """Parts of equal size times the ranks that hold different ones: at least the whole weight, and
    exactly where it divides."""
    for run in worlds():
        layout = Layout.of_run(run)
        for weight in model_weights(run.model):
            if weight.buffer:
                assert kept_shape(weight, layout) == weight.shape
                continue
            kept = math.prod(kept_shape(weight, layout))
            if weight.routed:
                holders = layout.edp * layout.ep
            else:
                holders = layout.dp_shard * (layout.tp if weight.tp_dim is not None else 1)
            whole = math.prod(weight.shape)
            assert whole <= kept * holders < whole + holders * max(weight.shape) ** 2, weight
            if whole % holders == 0 and weight.shape[0] % holders == 0:
                assert kept * holders == whole, weight


def test_one_weight_of_each_kind() -> None:
    for model in variants():
        kinds = [(weight.name, weight.shape) for weight in weight_kinds(model)]
        found = {
            (re.sub(r"^(layers\.\d+|mtp\.\d+\.block|mtp\.\d+)\.", "", weight.name), weight.shape)
            for weight in model_weights(model)
        }
        # The norm behind an MTP module has the name and shape of the model's own.
        assert len(kinds) == len(set(kinds)) and set(kinds) == found, model


@pytest.mark.parametrize("depth", [0, 2])
def test_hugging_face_names_are_unique(depth: int) -> None:
    model = tiny_config(num_nextn_predict_layers=depth, n_shared_experts=1)
    names = [weight.hf_name for weight in model_weights(model)]
    assert all(names) and len(names) == len(set(names))
    assert {weight.routed for weight in model_weights(model) if "{e}" in weight.hf_name} == {True}


def test_what_is_told_once_per_shape_depends_on_nothing_else() -> None:
    """Every field of a model is changed: what was remembered of another one is never told."""
    base = tiny_config(num_nextn_predict_layers=1)
    tell = once_per_shape(lambda model: model_weights(model))
    others: dict[str, Any] = {"q_lora_rank": 7, "topk_method": "greedy"}
    others["peft"] = PeftConfig(dim=2, target_modules=["wkv_a"])
    for field in fields(base):
        value = getattr(base, field.name)
        other = others.get(field.name, value + 8 if type(value) is int else value)
        model = replace(base, **{field.name: other})
        assert tell(base) == model_weights(base)
        assert tell(model) == model_weights(model), field.name
    model = replace(base, peft=PeftConfig(dim=2, target_modules=["wo"]))
    assert tell(model) == model_weights(model)
