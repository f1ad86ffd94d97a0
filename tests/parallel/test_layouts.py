"""Every layout computes what one process computes, and the comparison would notice if not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from deepseek.config.schema import DataConfig, OptimConfig, SchedConfig, changed
from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.router import Router, Routing
from deepseek.ops.cross_entropy import IGNORE_INDEX
from deepseek.parallel import gradients, tensor
from deepseek.parallel.mesh import SingleProcess, local
from deepseek.training.step import DeepSeekModel
from support.draw import ADAM_EPS, WEIGHTS, draw_cases
from support.layouts import (
    Case,
    Driven,
    batches,
    compare,
    compare_all,
    in_one_process,
    small_config,
    spread,
)
from support.ranks import run_in_turn, run_ranks

FP64, FP32 = 1e-12, 1e-5

nightly = pytest.mark.nightly

CLIPPED = 1.0
"""An attention logit that some heads of the small model exceed, and others not."""
SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "rep": "data_parallel_replicate_size",
    "schedule": "pipeline_schedule",
    "virtual": "virtual_pipeline_model_parallel_size",
    "split": "pipeline_layers_per_stage",
    "output": "pipeline_output_stages",
    "mtp": "num_nextn_predict_layers",
    "recompute": "activations_checkpoint_granularity",
    "offload": "cpu_offloading_activations",
    "per_node": "moe_ranks_per_node",
    "overlap": "overlap_moe_expert_parallel_comm",
}
MUON = OptimConfig(name="muon", lr=1e-2, sched=SchedConfig(min_lr=1e-3), qk_clip_threshold=CLIPPED)
ON_HOST = OptimConfig(lr=1e-2, sched=SchedConfig(min_lr=1e-3), cpu_offload=True)


def case_of(world: int, dtype: torch.dtype = torch.float64, **changes: Any) -> Case:
    """A layout of the small model; where it has no stages, one dense layer and one of experts."""
    named = {SHORT.get(key, key): value for key, value in changes.items()}
    if "pp" not in changes:
        named = {"num_hidden_layers": 2} | named
    dp = world // prod(changes.get(axis, 1) for axis in ("tp", "cp", "pp"))
    if 8 // dp >= (8 if "pp" in changes else 4):  # four or two micro-batches are as good as eight
        named = {"micro_batch_size": 2} | named
    optim = named.pop("optim", OptimConfig(lr=1e-2, sched=SchedConfig(min_lr=1e-3)))
    case = Case(
        small_config(optim=replace(optim, eps=ADAM_EPS[dtype]), **named), world, dtype, seed=1
    )
    assert case.problems() == []
    return case


def assert_exact(*cases: Case) -> list[dict[str, float]]:
    """Errors of each, all of them within what the dtype allows."""
    errors = compare_all([*cases])
    for case, found in zip(cases, errors, strict=True):
        allowed = FP64 if case.dtype == torch.float64 else FP32
        too_far = {name: error for name, error in found.items() if not error <= allowed}
        assert not too_far, (str(case), too_far)
    return errors


# -- layouts --


@pytest.mark.parametrize(
    "number", [n if n in (0, 1, 3) else pytest.param(n, marks=nightly) for n in range(6)]
)
def test_drawn_layout_in_fp64(number: int) -> None:
    assert_exact(draw_cases(6, torch.float64, 11)[number])


@pytest.mark.parametrize("number", [pytest.param(0, marks=nightly), 1])
def test_drawn_layout_in_fp32(number: int) -> None:
    case = draw_cases(2, torch.float32, 12)[number]
    # What is kept in bf16 may round the other way, as below.
    assert_exact(replace(case, config=changed(case.config, {"optim.moments_dtype": "fp32"})))


CHOSEN = {  # those of a name one after another on the same ranks
    "EP": [
        case_of(4, ep=4),
        case_of(4, ep=4, per_node=2, recompute="full"),
        case_of(4, tp=2, ep=4, per_node=2, recompute="selective"),
        case_of(4, ep=2, optim=MUON),  # experts shared by two ranks each
        case_of(4, rep=2, ep=2, optim=ON_HOST),  # HSDP
        case_of(  # gradients divided after each micro-batch
            4, rep=2, ep=2, micro_batch_size=1, reshard_after_forward=False, reduce_gradients=True
        ),
    ],
    "Muon, matrices of one row": [
        case_of(
            3,
            moe_intermediate_size=1,
            global_batch_size=6,
            optim=replace(MUON, cpu_offload=True),
        )
    ],
    "TP": [
        case_of(4, tp=2, ep=4, mtp=2),  # EP across its ranks
        case_of(4, tp=2, ep=2, reshard_after_forward=True),  # weights gathered for every pass
        case_of(4, cp=2, tp=2, ep=4, mtp=1),  # with CP, EP across both
    ],
    "CP and kept weights": [
        case_of(2, cp=2, mtp=2, global_batch_size=2, micro_batch_size=1),
        case_of(
            2, ep=2, micro_batch_size=1, reshard_after_forward=False, recompute="full", offload=True
        ),
    ],
    "CP over isolated documents, recomputed": [
        case_of(4, cp=4, recompute="full", data=DataConfig(seq_length=16, isolate_documents=True))
    ],
    "PP": [
        case_of(2, pp=2, schedule="GPipe", mtp=2),
        case_of(  # 1F1B, uneven by hand, with a batch that grows
            2, pp=2, split=[4, 0], recompute="selective", rampup_batch_size=[4, 4, 4]
        ),
        case_of(2, pp=2, schedule="Interleaved1F1B", virtual=2),
    ],
    "PP with split backward passes": [
        case_of(2, pp=2, schedule="InterleavedZeroBubble", virtual=2, mtp=2, offload=True),
        case_of(2, pp=2, schedule="ZBVZeroBubble", mtp=2, recompute="full"),
    ],
    "PP, its output shared": [
        case_of(2, pp=2, output=2, mtp=2, recompute="selective"),
        case_of(2, pp=2, schedule="Interleaved1F1B", virtual=2, output=3, mtp=1),
        case_of(2, pp=2, schedule="InterleavedZeroBubble", virtual=2, output=3, mtp=1),
        case_of(2, pp=2, schedule="ZBVZeroBubble", output=2, mtp=2, optim=MUON),
    ],
    "PP, its output shared, with others": [
        case_of(4, pp=4, split=[2, 2, 0, 0], output=3, mtp=1, micro_batch_size=1),
        case_of(4, pp=2, schedule="DualPipeV", ep=2, output=3, mtp=1, overlap=True),
        case_of(4, torch.float32, pp=2, tp=2, output=2, mtp=1, initializer_range=0.1),
        case_of(4, pp=2, cp=2, schedule="ZBVZeroBubble", output=3, mtp=1, recompute="full"),
    ],
    "PP with others": [
        case_of(4, pp=2, schedule="DualPipeV", ep=2),
        case_of(4, pp=2, schedule="DualPipeV", ep=2, overlap=True, recompute="full"),
        case_of(4, torch.float32, pp=2, tp=2, initializer_range=0.1),
    ],
    "all at once": [
        case_of(8, pp=2, tp=2, ep=4, schedule="DualPipeV", optim=MUON, mtp=2),
        case_of(8, cp=2, pp=2, rep=2, ep=2, schedule="DualPipeV", optim=MUON),
    ],
}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_layout(name: str) -> None:
    assert_exact(*CHOSEN[name])


def test_moments_in_bf16() -> None:
    """As exact as what rounding leaves: sums in another order may round the other way."""
    sched = SchedConfig(min_lr=1e-4)
    both = [
        OptimConfig(name=n, lr=1e-3, moments_dtype="bf16", sched=sched, cpu_offload=n == "adamw")
        for n in ("adamw", "muon")
    ]
    for errors in compare_all([case_of(4, tp=2, ep=2, optim=optim) for optim in both]):
        kept = {"all.momentum_buffer", "all.exp_avg", "all.exp_avg_sq"} & errors.keys()
        assert errors["all.gradient"] < 1e-4 and errors["all.weight"] < 1e-5
        assert all(errors[key] < 1e-2 for key in kept) and kept


FP8 = dict(fp8_recipe="blockwise", num_hidden_layers=2)
HEADS_OF_64 = dict(qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, intermediate_size=256)


@pytest.mark.parametrize(
    "cases",
    [
        [
            case_of(
                2, tp=2, recompute="selective", moe_intermediate_size=256, **HEADS_OF_64, **FP8
            ),
            case_of(2, ep=2, recompute="full", moe_dispatch_fp8=True, **FP8),
            case_of(2, pp=2, schedule="ZBVZeroBubble", **(FP8 | {"num_hidden_layers": 4})),
        ],
    ],
    ids=["2 ranks"],
)
def test_fp8(cases: list[Case]) -> None:
    """The forward pass rounds row by row, the same in every layout, and rows that come in FP8 lose
    nothing more. In the backward pass sums in another order may round the other way, and weights'
    gradients have tiles of a rank's tokens."""
    for errors in compare_all([replace(case, steps=1) for case in cases]):
        exact = ("loss", "mtp_loss", "balance_loss", "all.load", "all.buffer")
        assert all(errors[name] <= FP64 for name in exact)
        assert errors["all.gradient"] < 5e-2


# -- compiled attention --


def compiled(backend: Any, ranks: int = 8) -> Callable[[Driven], None]:
    """Compile the attention of so many ranks; the one process of the comparison stays eager."""

    def prepare(driven: Driven) -> None:
        if driven.meshes.layout.world_size > 1 and torch.distributed.get_rank() < ranks:
            for module in driven.module.model.modules():
                if isinstance(module, MultiHeadLatentAttention):
                    module.compile(backend=backend)

    return prepare


COMPILED: list[tuple[int, int, dict[str, Any]]] = [
    (2, 1, dict(tp=2, num_hidden_layers=1, first_k_dense_replace=0, mtp=0)),  # 5 s a rank
    (2, 2, dict(tp=2)),
    (2, 2, dict(ep=2)),
    (2, 2, dict(cp=2)),
    (2, 2, dict(tp=2, recompute="full")),
    (4, 4, dict(tp=2, pp=2, recompute="full")),
]


@pytest.mark.parametrize(
    ("world", "ranks", "changes"),
    [COMPILED[0], *(pytest.param(*long, marks=nightly) for long in COMPILED[1:])],
    ids=str,
)
def test_compiled_attention(world: int, ranks: int, changes: dict[str, Any]) -> None:
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(1))  # imported once, not on each rank
    case = case_of(world, **changes)
    case.prepare = compiled("aot_eager", ranks)
    assert_exact(case)


def twice_as_much(graph: Any, inputs: Any) -> Callable[..., Any]:
    """A compiler with an error."""

    def call(*args: Any) -> Any:
        return tuple(2 * out if out.is_floating_point() else out for out in graph.forward(*args))

    return call


@nightly
def test_the_attention_of_these_layouts_is_compiled() -> None:
    case = case_of(2, tp=2)
    case.prepare = compiled(twice_as_much)
    assert compare(case)["all.weight"] > FP64


# -- extremes of the load --


def send_all_to(*experts: int) -> Callable[[Driven], None]:
    """Every token chooses these experts and no other."""

    def prepare(driven: Driven) -> None:
        for router in driven.module.model.routers().values():
            router.bias.fill_(-100.0)
            router.bias[list(experts)] = 100.0

    return prepare


TO_FEW: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((0, 1), dict(ep=4)),  # all rows to the first rank
    ((6, 7), dict(ep=4, recompute="full")),  # all to the last
    ((7,), dict(ep=4, num_experts_per_tok=1, norm_topk_prob=False)),  # to one expert
    ((0, 3), dict(ep=2, tp=2)),  # all to one of two EP ranks, whose shards lie on two
    ((2, 5), dict(ep=2, pp=2)),
]


def test_ranks_without_tokens() -> None:
    # Weights as wide as drawn cases have them: wider ones blow up what is rounded differently.
    wide = dict(n_group=1, topk_group=1, initializer_range=WEIGHTS[torch.float64])
    cases = [
        replace(case_of(4, **wide, **changes), prepare=send_all_to(*experts), steps=1)
        for experts, changes in TO_FEW
    ]
    for (experts, _), case, errors in zip(TO_FEW, cases, assert_exact(*cases), strict=True):
        assert errors["all.load"] == 0
        tensors = in_one_process(case).tensors()
        for load in (t for name, t in tensors.items() if name.startswith("load.")):
            assert {int(expert) for expert in load.nonzero()} == set(experts)


# -- batches --


def pad_first_half(batch: dict[str, Tensor]) -> None:
    """The rows of half of the ranks hold nothing but padding."""
    rows = slice(0, len(batch["tokens"]) // 2)
    batch["labels"][rows] = IGNORE_INDEX
    batch["documents"][rows] = -1


def no_labels_at_all(batch: dict[str, Tensor]) -> None:
    """Real tokens, but nothing to learn from."""
    batch["labels"][:] = IGNORE_INDEX


@pytest.mark.parametrize(
    # test_validation has ranks with only padding as well, in training too
    "edit",
    [pytest.param(pad_first_half, marks=nightly), no_labels_at_all],
)
def test_ranks_with_only_padding_or_without_labels(
    edit: Callable[[dict[str, Tensor]], None],
) -> None:
    layouts = dict(ep=4), dict(tp=2, ep=2), dict(pp=2, schedule="ZBVZeroBubble")
    assert_exact(*(replace(case_of(4, **layout), edit=edit) for layout in layouts))


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    """In the second step of three; the metrics, weights and moments agree afterwards."""

    def prepare(driven: Driven) -> None:
        train, calls = driven.module.micro_batches.train, []

        def spoiled(*args: Any) -> Tensor:
            sums = train(*args)
            calls.append(1)
            alone = isinstance(driven.meshes, SingleProcess)
            if len(calls) == 2 and (alone or torch.distributed.get_rank() == 3):
                gradient = next(driven.module.model.parameters()).grad
                local(gradient).view(-1)[0] = float("nan")
            return sums

        driven.module.micro_batches.train = spoiled

    layouts = dict(ep=2), dict(pp=2, mtp=2)
    cases = [replace(case_of(4, **layout), steps=3, prepare=prepare) for layout in layouts]
    for case, errors in zip(cases, assert_exact(*cases), strict=True):
        assert errors["loss"] <= FP64
        # compare_all() has asked every rank for the same
        assert [metrics.skipped for metrics in in_one_process(case).metrics] == [False, True, False]


def test_clipping() -> None:
    """Off, active and inactive."""
    assert_exact(*(replace(case_of(2, tp=2), clip=clip) for clip in (0.0, 0.05, 1e6)))


def test_the_active_clipping_above_is_active() -> None:
    case = case_of(2, tp=2)
    free, clipped = (Driven(replace(case, clip=clip), SingleProcess()) for clip in (0.0, 0.05))
    for driven in (free, clipped):
        driven.run(batches(case))
    assert all(metrics.grad_norm > 0.05 for metrics in free.metrics)
    name = "exp_avg.head.weight"  # of gradients as the optimiser has seen them
    assert free.tensors()[name].norm() > 2 * clipped.tensors()[name].norm()


# -- validation --


def validated(driven: Driven, case: Case) -> list[float]:
    """Validate, train, validate twice."""
    steps = list(batches(case))
    losses = [driven.validate(steps)]
    driven.run(steps)
    losses += [driven.validate(steps[:1]), driven.validate(steps[1:])]
    assert isinstance(driven.meshes, SingleProcess) or all(
        isinstance(parameter, DTensor) for parameter in driven.module.model.parameters()
    )
    return losses + [metrics.grad_norm for metrics in driven.metrics]


def validated_by_rank(rank: int, case: Case) -> list[float]:
    return validated(spread(case), case)


@pytest.mark.parametrize(
    "cases",
    [
        [case_of(4, rep=2, ep=2), case_of(4, pp=2, tp=2, mtp=2)],
        [
            case_of(2, pp=2, schedule="Interleaved1F1B", virtual=2, split=[1, 1, 1, 1]),
            case_of(2, pp=2, schedule="ZBVZeroBubble", output=3, mtp=1),
        ],
        pytest.param(
            [
                case_of(4, tp=2, ep=4, micro_batch_size=2),
                case_of(4, pp=2, schedule="DualPipeV", ep=2),
            ],
            marks=nightly,
        ),
    ],
    ids=["4 ranks", "2 ranks", "long"],
)
def test_validation(cases: list[Case]) -> None:
    """Half of the ranks have nothing but padding."""
    cases = [replace(case, edit=pad_first_half) for case in cases]
    ranks = run_in_turn(cases[0].world, validated_by_rank, cases)
    for case, found in zip(cases, ranks, strict=True):
        wanted = validated(Driven(case, SingleProcess()), case)
        assert found == [pytest.approx(wanted, rel=FP64)] * case.world, str(case)


# -- bf16 --


def mixed(world: int, **changes: Any) -> Case:
    """One step in bf16, with the routing pinned, so that no rounded score turns a token to another
    expert."""
    small = dict(n_group=1, topk_group=1, initializer_range=0.1)
    case = case_of(world, torch.float32, **small, **changes)
    return replace(case, autocast=True, steps=1, prepare=send_all_to(1, 6))


@pytest.mark.parametrize(
    "cases",
    [
        [
            mixed(2, ep=2),
            mixed(2, tp=2, ep=2, recompute="full"),
            mixed(2, reshard_after_forward=True, micro_batch_size=1, recompute="selective"),
        ],
        [mixed(4, pp=2, ep=2, schedule="ZBVZeroBubble", mtp=2)],
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_mixed_precision(cases: list[Case]) -> None:
    """With autocast's cache of cast weights on, as under Lightning 2.4."""
    for errors in compare_all(cases):
        far = {
            name: error
            for name, error in errors.items()
            if not error
            <= (1e-2 if name.startswith(("loss", "mtp_", "balance", "grad_norm")) else 0.1)
        }
        assert not far
        assert errors["all.gradient"] < 2e-2
        assert errors["all.load"] == errors["all.buffer"] == 0.0


def test_bf16_is_what_mixed_precision_computes_in() -> None:
    case = mixed(1)
    fp32, bf16 = (Driven(replace(case, autocast=on), SingleProcess()) for on in (False, True))
    for driven in (fp32, bf16):
        driven.run(batches(case))
    a, b = (driven.tensors()["gradient.layers.0.attn.wo.weight"] for driven in (fp32, bf16))
    assert 1e-4 < (a - b).norm() / a.norm() < 1e-1


def test_mixed_precision_keeps_router_bias_and_gradients_in_fp32() -> None:
    case = case_of(2, torch.float32, tp=2, ep=2)
    case.autocast = True
    for dtypes in run_ranks(2, dtypes_of_rank, case):
        assert dtypes == {torch.float32}


def dtypes_of_rank(rank: int, case: Case) -> set[torch.dtype]:
    """Of everything that must not be rounded to bf16."""
    driven = spread(case)
    seen: set[torch.dtype] = set()

    def note(module: Router, args: Any, routing: Routing) -> None:
        seen.update({routing.weights_TK.dtype, routing.scores_TE.dtype, routing.logits_TE.dtype})

    for router in driven.module.model.routers().values():
        router.register_forward_hook(note)
        seen.add(router.bias.dtype)
    driven.run(batches(case))
    kinds = ("weight", "gradient", "exp_avg", "exp_avg_sq")
    seen |= {t.dtype for name, t in driven.tensors().items() if name.startswith(kinds)}
    return seen


# -- the comparison notices --


def keep_copies_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_sum_copies_of_embedding", lambda *args: None)


def keep_tensor_ranks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_sum_over_tensor_ranks", lambda *args: None)


def average_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSDPModule, "set_gradient_divide_factor", lambda *args: None)


def balance_parts_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "sum_forward", lambda part, group: part)


def count_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSeekModel, "_count_everywhere", lambda *args: None)


def keep_cast_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)


def measure_copies_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_holders", lambda *args: 1)


SABOTAGES = [
    (keep_tensor_ranks_apart, dict(tp=2), "gradient.layers.1.attn.wkv_a.weight"),
    (keep_copies_apart, dict(pp=2), "gradient.embed.weight"),
    (keep_copies_apart, dict(pp=2, schedule="ZBVZeroBubble"), "gradient.embed.weight"),
    (average_gradients, dict(ep=2), "gradient.layers.0.attn.wo.weight"),
    (balance_parts_of_sequences, dict(tp=2), "gradient.layers.1.ffn.gate.weight"),
    (count_at_home, dict(ep=2), "buffer.layers.1.ffn.gate.bias"),
    (measure_copies_twice, dict(tp=2), "grad_norm"),
]


@pytest.mark.parametrize(
    ("sabotage", "changes", "shows_in"),
    [SABOTAGES[0], *(pytest.param(*sabotage, marks=nightly) for sabotage in SABOTAGES[1:])],
)
def test_the_comparison_notices(
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[[pytest.MonkeyPatch], None],
    changes: dict[str, Any],
    shows_in: str,
) -> None:
    case = case_of(2, **changes)
    in_one_process(case)  # this one in peace
    sabotage(monkeypatch)
    assert compare(case)[shows_in] > 1e-3


@nightly
def test_the_comparison_notices_gradients_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_apart = mixed(2, ep=2, reshard_after_forward=True)
    in_one_process(blocks_apart)  # in peace
    keep_cast_weights(monkeypatch)
    assert compare(blocks_apart)["all.gradient"] > 0.1
