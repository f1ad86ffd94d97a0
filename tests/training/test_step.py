"""The training step: its result does not depend on how the batch is cut; padding counts nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.config.schema import DataConfig, ModelConfig, OptimConfig, SchedConfig
from deepseek.models.components.moe import MoE
from deepseek.models.transformer import loss_sums
from deepseek.ops import grouped_linear, noted_squares, squares
from deepseek.training.step import (
    MAX_SKIPPED_IN_A_ROW,
    DeepSeekModel,
    NonFiniteError,
    StepRecord,
)
from support.device_waits import unwatched, watched

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=32,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    num_nextn_predict_layers=1,
    initializer_range=0.1,
    moe_aux_loss_coeff=0.01,
    moe_z_loss_coeff=0.001,
    global_batch_size=4,
    micro_batch_size=4,
    optim=OptimConfig(lr=1e-2, sched=SchedConfig(min_lr=1e-3)),
)


class Driven:
    """A module stepped without a trainer, in float64."""

    def __init__(self, config: ModelConfig, clip: float = 1.0) -> None:
        self.module: Any = DeepSeekModel(
            config, seed=3, max_steps=20, gradient_clip_val=clip
        ).double()
        self.optimizer = self.module.configure_optimizers()

    def run(self, batches: list[dict[str, Tensor]]) -> list[StepRecord]:
        return [self.module.train_step(batch, self.optimizer) for batch in batches]


def batch(seed: int, padding: int = 0) -> dict[str, Tensor]:
    """Four sequences with very uneven numbers of labels, and rows of padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (4, 17), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, 2:] = -100
    labels[2, ::2] = -100
    documents = torch.zeros(4, 16, dtype=torch.int32)
    made = {
        "tokens": tokens[:, :-1].clone(),
        "labels": labels,
        "positions": torch.arange(16).repeat(4, 1),
        "documents": documents,
    }
    if padding:
        made["tokens"] = torch.nn.functional.pad(made["tokens"], (0, padding), value=5)
        made["labels"] = torch.nn.functional.pad(labels, (0, padding), value=-100)
        made["positions"] = torch.arange(16 + padding).repeat(4, 1)
        made["documents"] = torch.nn.functional.pad(documents, (0, padding), value=-1)
    return made


def assert_same(a: Driven, b: Driven, limit: float = 1e-9) -> None:
    for (name, x), y in zip(
        a.module.model.state_dict().items(), b.module.model.state_dict().values(), strict=True
    ):
        assert (x - y).abs().max() <= limit, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"micro_batch_size": 2},
                                    {"activations_checkpoint_granularity": "full"}])  # fmt: skip
def test_the_cut_of_the_batch_changes_nothing(change: dict[str, Any], optimizer: str) -> None:
    config = replace(CONFIG, optim=replace(CONFIG.optim, name=optimizer))
    whole, cut = Driven(config), Driven(replace(config, **change))
    batches = [batch(seed) for seed in range(3)]
    for one, other in zip(whole.run(batches), cut.run(batches), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.mtp_loss == pytest.approx(other.mtp_loss, rel=1e-6)
        assert one.balance_loss == pytest.approx(other.balance_loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
    assert_same(whole, cut)
    biases = [router.bias for router in whole.module.model.routers().values()]
    assert all(bias.abs().max() > 0 for bias in biases)


def test_gradients_of_later_micro_batches_are_added_where_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of experts, in fp32, by kernels: the same step as of one micro-batch."""
    asked, added = grouped_linear.gradient_to_add_to, []

    def noted(weight: Tensor) -> Tensor | None:
        added.append(asked(weight))
        return added[-1]

    monkeypatch.setattr(grouped_linear, "gradient_to_add_to", noted)
    records = []
    for size in (4, 1):
        module = DeepSeekModel(replace(CONFIG, micro_batch_size=size), seed=3, max_steps=20)
        records.append(module.train_step(batch(0), module.configure_optimizers()))
    assert records[0].grad_norm == pytest.approx(records[1].grad_norm, rel=1e-5)
    stacks = 3 * sum(isinstance(part, MoE) for part in module.modules())
    assert [x is None for x in added] == [True] * 2 * stacks + [False] * 3 * stacks


@pytest.mark.parametrize("size", [4, 1])
def test_the_norm_takes_squares_that_kernels_have_noted(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every stack of experts, in every step; the norms are those of all gradients read."""
    asked, given, records = squares.noted_squares, [], []

    def noted(grad: Tensor) -> Tensor | None:
        found = asked(grad)
        given.append(found is not None)
        return found

    monkeypatch.setattr(squares, "noted_squares", noted)
    for least in (0, 1 << 20):
        monkeypatch.setattr(noted_squares, "WORTH", least)
        module = DeepSeekModel(replace(CONFIG, micro_batch_size=size), seed=3, max_steps=20)
        optimizer = module.configure_optimizers()
        records.append([module.train_step(batch(seed), optimizer) for seed in range(2)])
        stacks = 3 * sum(isinstance(part, MoE) for part in module.modules())
        assert sum(given) == (0 if least else 2 * stacks)
        given.clear()
    for one, other in zip(*records, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
        assert one.grad_norm_expert == pytest.approx(other.grad_norm_expert, rel=1e-6)
        assert one.grad_norm_dense == pytest.approx(other.grad_norm_dense, rel=1e-6)


def test_hooks_of_modules_may_change_gradients_that_kernels_have_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By way of ``.data``, of which no version tells."""

    def triples(part: MoE, *_: object) -> None:
        if part.experts.w1.grad is not None:
            part.experts.w1.grad.data.mul_(3)

    norms = []
    for least in (0, 1 << 20):
        monkeypatch.setattr(noted_squares, "WORTH", least)
        module = DeepSeekModel(replace(CONFIG, micro_batch_size=2), seed=3, max_steps=20)
        for part in module.modules():
            if isinstance(part, MoE):
                part.register_full_backward_hook(triples)
        norms.append(module.train_step(batch(0), module.configure_optimizers()).grad_norm_expert)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_step_takes_another_optimiser() -> None:
    module = DeepSeekModel(CONFIG, seed=3, max_steps=20, gradient_clip_val=0.1)
    before = module.model.head.weight.clone()
    record = module.train_step(batch(0), torch.optim.SGD(module.model.parameters(), lr=1.0))
    moved = before - module.model.head.weight
    gradient = module.model.head.weight.grad
    assert record.grad_norm > 0.1 and moved.norm() <= 0.1 * record.lr * 1.001
    assert gradient is None or gradient.norm() <= 0.1 * 1.001


def test_norms_are_those_of_a_model_made_anew() -> None:
    module = DeepSeekModel(CONFIG, seed=3, max_steps=20)
    records = []
    for _ in range(2):
        module.parallelize(module.meshes, torch.device("cpu"))
        records.append(module.train_step(batch(0), module.configure_optimizers()))
    assert records[0].grad_norm == records[1].grad_norm > 0


def test_padding_changes_nothing() -> None:
    plain, padded = Driven(CONFIG), Driven(CONFIG)
    first = plain.run([batch(seed) for seed in range(3)])
    second = padded.run([batch(seed, padding=7) for seed in range(3)])
    assert [m.tokens for m in first] == [m.tokens for m in second] == [64] * 3
    for one, other in zip(first, second, strict=True):
        assert one.balance_loss == pytest.approx(other.balance_loss, rel=1e-4)
    assert_same(plain, padded)


@pytest.mark.parametrize("isolated", [False, True])
def test_gradients_are_those_of_the_mean_over_labels_and_clipped(isolated: bool) -> None:
    """What the optimiser sees, with no limit of the norm, one above it and one below."""
    config = replace(CONFIG, data=DataConfig(seq_length=19, isolate_documents=isolated))
    made = batch(0, padding=3)
    made["documents"][:, 6:16] = 1
    for clip in (0.0, 1e3, 1e-3):
        driven = Driven(config, clip)
        wanted = by_hand(driven.module.model, made)
        norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
        factor = min(1.0, clip / float(norm)) if clip else 1.0
        driven.optimizer.zero_grad = lambda: None
        assert driven.run([made])[0].grad_norm == pytest.approx(float(norm), rel=1e-9)
        for name, parameter in driven.module.model.named_parameters():
            error = (parameter.grad - factor * wanted[name]).abs().max()
            # clipping adds 1e-6 to the norm
            assert error <= 3e-6 * factor * wanted[name].abs().max(), (clip, name)


def by_hand(model: Any, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the mean over labels, and of the balance losses' mean over real tokens."""
    real = made["documents"] >= 0
    documents = made["documents"] if model.config.data.isolate_documents else None
    scale = 1 / real.sum()
    context = model.context(made["tokens"], made["positions"], documents, real, scale)
    hidden = model.hidden_states(made["tokens"], context)
    sums = loss_sums(hidden.main_BSD, hidden.mtp_BSD, model.head, made["labels"], documents)
    loss = sums.main + model.config.mtp_loss_scaling_factor * sums.mtp
    (loss / (made["labels"] >= 0).sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    driven = Driven(CONFIG)
    driven.run([batch(0)])
    with torch.no_grad():
        driven.module.model.layers["0"].attn.wo.weight[0, 0] = float("nan")
    before = {k: v.clone() for k, v in driven.module.model.state_dict().items()}
    (record,) = driven.run([batch(1)])
    assert record.skipped
    assert driven.module.finished_steps == 2
    for name, value in driven.module.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    with pytest.raises(NonFiniteError, match=f"{MAX_SKIPPED_IN_A_ROW} steps in a row"):
        driven.run([batch(i) for i in range(MAX_SKIPPED_IN_A_ROW)])


def test_a_pass_that_fails_leaves_no_gradient_to_the_next() -> None:
    """Half of a gradient was added to the next step's."""
    sides = Driven(CONFIG), Driven(CONFIG)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("in the middle")

    hook = sides[0].module.model.layers["0"].attn.wo.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        sides[0].run([batch(0)])
    hook.remove()
    first, second = (side.run([batch(0), batch(1)]) for side in sides)
    assert [row.grad_norm for row in first] == [row.grad_norm for row in second]
    assert_same(*sides, limit=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_made_before_the_first_forward_pass(name: str) -> None:
    driven = Driven(replace(CONFIG, optim=replace(CONFIG.optim, name=name)))
    train, made = driven.module.micro_batches.train, []

    def noted(*given: Any) -> Tensor:
        made.append({p: sorted(state) for p, state in driven.optimizer.state.items()})
        return train(*given)

    driven.module.micro_batches.train = noted
    driven.run([batch(1)])
    assert set(made[0]) == set(driven.module.parameters())
    assert made[0] == {p: sorted(state) for p, state in driven.optimizer.state.items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("recomputed", [None, "full"])
def test_a_step_waits_once_for_the_device(name: str, recomputed: str | None) -> None:
    """Over two micro-batches, for all that the host must know: losses, norms, the counts."""
    config = replace(
        CONFIG,
        micro_batch_size=2,
        activations_checkpoint_granularity=recomputed,
        optim=replace(CONFIG.optim, name=name),
    )
    module = DeepSeekModel(config, seed=3, max_steps=20)  # fp32: the product of fp64 is a loop
    optimizer = module.configure_optimizers()
    unwatched(optimizer)
    for seed in (1, 2):
        watch = watched(lambda seed=seed: module.train_step(batch(seed), optimizer))
        assert watch.calls > 500, "the watch saw nothing"
        assert watch.waits == ["tolist"]
