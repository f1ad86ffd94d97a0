"""Adapters in any layout compute what one process computes, and nothing else moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.checkpoint.checkpoint import Checkpoint
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.training_state import load_weights
from deepseek.config.schema import OptimConfig, PeftConfig, SchedConfig
from deepseek.models.components.lora import is_adapter
from deepseek.ops.packed import pack_rows, unpack_rows
from deepseek.parallel import gradients
from deepseek.parallel.mesh import SingleProcess, local, local_slices
from support.layouts import Case, Driven, batches, compare, compare_all, small_config, spread
from support.ranks import run_ranks

FP64 = 1e-12
ALL = ["attention", "feed_forward", "experts"]


def lora_case(
    world: int, targets: list[str], optim: str = "adamw", base: str | None = None, **changes: Any
) -> Case:
    peft = PeftConfig(dim=4, alpha=6.0, target_modules=targets, base_dtype=base)
    config = small_config(
        peft=peft,
        moe_router_bias_update_rate=0.0,
        # fp64 AdamW turns rounding into steps where a gradient is nearly zero
        optim=OptimConfig(name=optim, lr=1e-2, eps=1e-3, sched=SchedConfig(min_lr=1e-3)),
        **changes,
    )
    case = Case(config, world, torch.float64, seed=1)
    case.prepare = start_b
    assert {p.field for p in case.problems()} == {"model.restore_from"}
    return case


def start_b(driven: Driven) -> None:
    """With B at zero the gradient of A is zero in the first step, and hides mistakes."""
    from deepseek.models.transformer import initial_weight

    with torch.no_grad():
        for name, parameter in driven.module.model.named_parameters():
            if name.endswith("lora_b"):
                here = local_slices(parameter)
                as_a = name.replace("lora_b", "lora_start_a")
                value = initial_weight(as_a, parameter.shape, here, driven.case.config, 5)
                local(parameter).copy_(value)


LAYOUTS = {
    "TP and EP": lora_case(
        4, ALL, tensor_model_parallel_size=2, expert_model_parallel_size=2, micro_batch_size=2
    ),
    "EP over TP ranks, direct queries": lora_case(
        4, ALL, tensor_model_parallel_size=2, expert_model_parallel_size=4, q_lora_rank=None
    ),
    "HSDP, Muon": lora_case(
        4, ["wo", "w2", "experts.w1"], "muon", data_parallel_replicate_size=2,
        expert_model_parallel_size=2,
    ),
    "PP, recomputed": lora_case(
        2, ALL, pipeline_model_parallel_size=2, activations_checkpoint_granularity="full",
        micro_batch_size=2,
    ),
    "zero bubble, a stage without adapters": lora_case(
        2, ["experts"], pipeline_model_parallel_size=2, pipeline_schedule="ZBVZeroBubble",
        first_k_dense_replace=2, micro_batch_size=2,
    ),
    "PP, a last stage without a layer": lora_case(  # it has no gradient, and nothing to clip
        2, ALL, pipeline_model_parallel_size=2, pipeline_layers_per_stage=[4, 0],
        num_hidden_layers=4, num_nextn_predict_layers=0, micro_batch_size=2,
    ),
    "packed": lora_case(
        4, ALL, base="nf4", expert_model_parallel_size=2, micro_batch_size=2,
        activations_checkpoint_granularity="full",
    ),
    "packed, TP": lora_case(  # whole blocks of the rows that it cuts
        4, ALL, base="nf4", tensor_model_parallel_size=2, v_head_dim=32, intermediate_size=128,
        moe_intermediate_size=128, num_hidden_layers=2, micro_batch_size=2,
    ),
    "packed, PP": lora_case(
        2, ["wo", "experts.w2"], base="fp8", pipeline_model_parallel_size=2, micro_batch_size=2,
    ),
    "all at once": lora_case(
        8, ALL, pipeline_model_parallel_size=2, tensor_model_parallel_size=2,
        expert_model_parallel_size=2, pipeline_schedule="Interleaved1F1B",
        virtual_pipeline_model_parallel_size=2, num_nextn_predict_layers=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ["TP and EP", "packed", "packed, TP"],
        [
            "PP, recomputed",
            "zero bubble, a stage without adapters",
            "PP, a last stage without a layer",
            "packed, PP",
        ],
        pytest.param(["EP over TP ranks, direct queries", "HSDP, Muon"], marks=pytest.mark.nightly),
        pytest.param(["all at once"], marks=pytest.mark.nightly),
    ],
    ids=", ".join,
)
def test_layouts(names: list[str]) -> None:
    for name, errors in zip(names, compare_all([LAYOUTS[n] for n in names]), strict=True):
        too_far = {key: error for key, error in errors.items() if not error <= FP64}
        assert not too_far, (name, too_far)
        learnt = {key.removeprefix("gradient.") for key in errors if key.startswith("gradient.")}
        assert learnt and all(map(is_adapter, learnt))


def frozen_of(driven: Driven) -> dict[str, Tensor]:
    state = driven.module.model.state_dict()
    return {name: t.clone() for name, t in state.items() if not is_adapter(name)}


def test_only_adapters_move_and_have_optimiser_state() -> None:
    driven = Driven(LAYOUTS["TP and EP"], SingleProcess())
    before, adapters = frozen_of(driven), dict(driven.module.model.named_parameters())
    start = {name: p.detach().clone() for name, p in adapters.items() if is_adapter(name)}
    driven.run(batches(driven.case))
    for name, tensor in frozen_of(driven).items():
        assert torch.equal(tensor, before[name]), name
    assert all(not torch.equal(adapters[name], tensor) for name, tensor in start.items())
    held = {id(p) for group in driven.optimizer.param_groups for p in group["params"]}
    assert held == {id(adapters[name]) for name in start}
    mtp = [name for name in start if name.startswith("mtp.")]
    assert not mtp and len(start) == 2 * (4 * 5 + 4 * 3 + 3 * 3)


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_packed_weights_give_the_gradients_of_what_packing_left(kind: str) -> None:
    """Of adapters: against the same model with the weights taken out of their rows."""
    packed, plain = (Driven(lora_case(1, ALL, base=base), SingleProcess()) for base in (kind, None))
    columns = packed.module.model.packed
    assert len(columns) == 4 * 5 + 4 * 3 + 3 * 3
    rows = packed.module.model.state_dict()
    with torch.no_grad():
        for name, weight in plain.module.model.named_parameters():
            if name in columns:
                assert rows[name].dtype == torch.uint8
                weight.copy_(unpack_rows(rows[name], columns[name], kind, weight.dtype))
    for driven in (packed, plain):
        driven.run(batches(driven.case))
    ours, theirs = packed.gradients, plain.gradients
    assert ours.keys() == theirs.keys() and all(map(is_adapter, ours))
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= FP64 * theirs[name].norm(), name


def keep_tensor_ranks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_sum_over_tensor_ranks", lambda *args: None)


@pytest.mark.nightly
def test_the_comparison_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_tensor_ranks_apart(monkeypatch)
    errors = compare(LAYOUTS["TP and EP"])
    for name in ("attn.wo.lora_b", "attn.wq_b.lora_a", "attn.wkv_a.lora_a"):
        assert errors[f"gradient.layers.1.{name}"] > 1e-3, name


def test_checkpoints_hold_adapters_only() -> None:
    from deepseek.checkpoint.training_state import collect_tensors

    driven = Driven(LAYOUTS["TP and EP"], SingleProcess())
    driven.run(batches(driven.case))
    whole = collect_tensors(driven.module.model, driven.optimizer)
    assert all("lora_" in name for name in whole)
    for names in run_ranks(2, kept_names, lora_case(2, ALL, tensor_model_parallel_size=2)):
        assert set(names) == set(whole)


def kept_names(rank: int, case: Case) -> list[str]:
    from deepseek.checkpoint.training_state import collect_tensors
    from support.layouts import spread

    driven = spread(case)
    driven.run(batches(case))
    return list(collect_tensors(driven.module.model, driven.optimizer))


def test_parts_of_rows_are_packed_as_the_whole_is(tmp_path: Path) -> None:
    """Read from a checkpoint that was never packed."""
    case = replace(LAYOUTS["packed, TP"], dtype=torch.float32)
    config = replace(case.config, peft=None, tensor_model_parallel_size=1)
    plain = Driven(replace(case, config=config, prepare=lambda driven: None), SingleProcess())
    state = plain.module.model.state_dict()
    manager = CheckpointManager(tmp_path)
    path = manager.save(1, {f"model.{name}": tensor for name, tensor in state.items()}, {})
    manager.close()
    seen: set[str] = set()
    for parts in run_ranks(case.world, loaded_parts, case, path):
        for name, part, rows in parts:
            seen.add(name)
            assert torch.equal(rows, pack_rows(state[name], "nf4")[part]), name
    assert {"layers.0.attn.wo.weight", "layers.1.ffn.experts.w2", "layers.0.ffn.w1.weight"} <= seen


def loaded_parts(rank: int, case: Case, path: Path) -> list[tuple[str, Any, Tensor]]:
    model = spread(case).module.model
    load_weights(Checkpoint.open(path), model)
    held = dict(model.named_parameters())
    return [(name, local_slices(held[name]), local(held[name]).detach()) for name in model.packed]
