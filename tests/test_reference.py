"""The model in float64 against the oracle: logits, losses, loads and every gradient.

Both sides get the same weights; agreement is to 1e-10 of each tensor's largest value, which leaves
room for the order of additions and for nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.models.transformer import Transformer, loss_sums
from support import reference

TOLERANCE = 1e-10

TINY = dict(
    vocab_size=23,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=3,
    intermediate_size=10,
    moe_intermediate_size=5,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_aux_loss_coeff=0.02,
    moe_z_loss_coeff=0.01,
)
YARN = dict(factor=8.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0)
CASES: dict[str, dict] = {
    "plain": {},
    "query_latent": dict(q_lora_rank=5),
    "all_dense": dict(first_k_dense_replace=2, num_nextn_predict_layers=1),
    "all_moe": dict(first_k_dense_replace=0),
    "two_shared_experts": dict(n_shared_experts=2),
    "no_shared_expert": dict(n_shared_experts=0),
    "scaled_not_normalised": dict(norm_topk_prob=False, routed_scaling_factor=2.5),
    "groups": dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3),
    "softmax_greedy": dict(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
    "softmax_groups": dict(
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        n_routed_experts=6,
        n_group=3,
        topk_group=2,
    ),
    "softmax_with_bias": dict(scoring_func="softmax", n_routed_experts=8, n_group=2, topk_group=1),
    "sigmoid_greedy": dict(topk_method="greedy"),
    "yarn": dict(rope_scaling=YARN),
    "yarn_attention_scale": dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=1.0)),
    "yarn_many_pairs": dict(
        qk_rope_head_dim=16,
        rope_theta=500.0,
        rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0, beta_slow=0.5),
    ),
    "yarn_step": dict(rope_scaling=YARN | dict(beta_fast=1.0, beta_slow=1.0)),
    "mtp_one": dict(num_nextn_predict_layers=1),
    "mtp_two": dict(num_nextn_predict_layers=2, mtp_loss_scaling_factor=0.7),
    "mtp_of_a_dense_model": dict(first_k_dense_replace=3, num_nextn_predict_layers=2),
    "no_balance_loss": dict(moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0),
    "eps_matters": dict(rms_norm_eps=0.1),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_one_stream(case: str) -> None:
    cfg = config(**CASES[case])
    compare(cfg, batch(cfg, seed=len(case), sequences=2, length=7))


@pytest.mark.parametrize("case", ["plain", "groups", "yarn", "mtp_one", "mtp_two"])
def test_isolated_documents_and_padding(case: str) -> None:
    cfg = config(**CASES[case])
    sequences = batch(cfg, seed=1, sequences=3, length=9, isolated=True, padded=True)
    compare(cfg, sequences)


@pytest.mark.parametrize("case", ["plain", "softmax_groups", "mtp_two"])
def test_padding_in_one_stream(case: str) -> None:
    cfg = config(**CASES[case])
    compare(cfg, batch(cfg, seed=2, sequences=3, length=6, padded=True))


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations(seed: int) -> None:
    rng = random.Random(seed)
    cfg = random_config(rng)
    sequences = batch(
        cfg,
        seed=seed,
        sequences=rng.randint(1, 3),
        length=rng.randint(4, 9),
        isolated=rng.random() < 0.5,
        padded=rng.random() < 0.5,
    )
    compare(cfg, sequences)


def test_recomputation_changes_nothing() -> None:
    cfg = config(num_nextn_predict_layers=1, activations_checkpoint_granularity="full")
    compare(cfg, batch(cfg, seed=3, sequences=2, length=6))


def test_the_oracle_can_say_no() -> None:
    """A change that a careless model might make moves the logits far beyond the tolerance."""
    cfg = config()
    model = build(cfg)
    sequence = batch(cfg, seed=0, sequences=1, length=6)[0]
    state = reference_state(model)
    wanted = reference.sequence_logits(state, cfg, sequence)
    with torch.no_grad():
        for router in model.routers().values():
            router.bias.zero_()
        ours = model(torch.tensor([sequence.tokens]), torch.tensor([sequence.positions]))[0]
    assert relative_difference(ours, wanted) > 1e-3


# -- both sides ------------------------------------------------------------------------------------


def compare(cfg: ModelConfig, sequences: list[reference.Sequence]) -> None:
    model = build(cfg)
    state = reference_state(model)
    tokens_BS, labels_BS, positions_BS = (
        torch.tensor([getattr(s, name) for s in sequences])
        for name in ("tokens", "labels", "positions")
    )
    isolated = sequences[0].documents is not None
    documents_BS = torch.tensor([s.documents for s in sequences]) if isolated else None
    real_BS = torch.tensor([s.is_real for s in sequences])

    with torch.no_grad():
        logits_BSV = model(tokens_BS, positions_BS, documents_BS)
        for sequence, logits_SV in zip(sequences, logits_BSV, strict=True):
            assert_close("logits", logits_SV, reference.sequence_logits(state, cfg, sequence))

    wanted = reference.training_loss(state, cfg, sequences)
    wanted.total.backward()

    label_count = (labels_BS != reference.IGNORED).sum()
    scale = 1.0 / real_BS.sum().double()
    context = model.context(tokens_BS, positions_BS, documents_BS, real_BS, scale)
    hidden = model.hidden_states(tokens_BS, context)
    sums = loss_sums(hidden.main_BSD, hidden.mtp_BSD, model.head, labels_BS, documents_BS)
    loss = (sums.main + cfg.mtp_loss_scaling_factor * sums.mtp) / label_count
    loss.backward()

    balance = sum((r.balance_loss for r in model.routers().values()), torch.zeros(()).double())
    assert_close("cross-entropy", sums.main / label_count, wanted.cross_entropy)
    assert_close("MTP loss", sums.mtp / label_count, wanted.mtp)
    assert_close("balance losses", balance, wanted.balance + wanted.z)
    assert_close("total", loss + balance, wanted.total)

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} got no gradient"
        expected = state[name].grad
        assert_close(
            f"gradient of {name}",
            parameter.grad,
            torch.zeros_like(parameter) if expected is None else expected,
        )
    compare_loads(cfg, model, state, sequences)


def compare_loads(
    cfg: ModelConfig,
    model: Transformer,
    state: reference.State,
    sequences: list[reference.Sequence],
) -> None:
    """Token counts of every router, and the bias that they lead to."""
    counts = [[0] * cfg.n_routed_experts for _ in model.routers()]
    for sequence in sequences:
        hidden, routes = reference.transformer(state, cfg, sequence)
        for depth in range(1, cfg.num_nextn_predict_layers + 1):
            hidden, mtp_routes = reference.mtp_module(state, cfg, sequence, hidden, depth)
            routes = routes + mtp_routes
        for layer, layer_routes in enumerate(routes):
            real = [r for r, is_real in zip(layer_routes, sequence.is_real, strict=True) if is_real]
            seen = reference.expert_counts(cfg, real)
            counts[layer] = [a + b for a, b in zip(counts[layer], seen, strict=True)]
    for router, expected in zip(model.routers().values(), counts, strict=True):
        assert router.tokens_per_expert.tolist() == expected
        if router.bias is not None:
            moved = reference.updated_bias(router.bias.tolist(), expected, rate=0.125)
            router.update_bias(router.tokens_per_expert, rate=0.125)
            assert router.bias.tolist() == pytest.approx(moved, rel=1e-7)


def build(cfg: ModelConfig) -> Transformer:
    """Float64 model with weights large enough that every non-linearity bends."""
    model = Transformer(cfg).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(1.0)
        for router in model.routers().values():
            router.start_step()
            router.balance_loss = router.balance_loss.double()
            if router.bias is not None:
                # Mostly negative, so that masking a group with 0 would be found out.
                router.bias.normal_(-0.5, 0.4, generator=generator)
    return model


def reference_state(model: Transformer) -> reference.State:
    parameters = dict(model.named_parameters())
    return {
        name: tensor.detach().double().clone().requires_grad_(name in parameters)
        for name, tensor in model.state_dict().items()
    }


def assert_close(what: str, ours: Tensor, wanted: Tensor) -> None:
    difference = relative_difference(ours, wanted)
    assert difference <= TOLERANCE, f"{what}: relative difference {difference:.1e}"


def relative_difference(ours: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; both zero: 0."""
    assert ours.shape == wanted.shape and ours.dtype == wanted.dtype == torch.float64
    difference = (ours - wanted).abs().max().item()
    return difference if difference == 0 else difference / wanted.abs().max().item()


# -- what is compared ------------------------------------------------------------------------------


def config(**changes: object) -> ModelConfig:
    fields = TINY | changes
    if isinstance(fields.get("rope_scaling"), dict):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)


def random_config(rng: random.Random) -> ModelConfig:
    groups = rng.choice([1, 2, 3])
    topk_group = rng.randint(1, groups)
    group_size = rng.choice([2, 3])
    method = rng.choice(["noaux_tc", "noaux_tc", "group_limited_greedy", "greedy"])
    reachable = group_size * (groups if method == "greedy" else topk_group)
    mscales = rng.choice([{}, dict(mscale=1.0, mscale_all_dim=1.0), dict(mscale_all_dim=0.5)])
    return config(
        num_hidden_layers=rng.randint(1, 3),
        first_k_dense_replace=rng.randint(0, 1),
        num_attention_heads=rng.randint(1, 3),
        q_lora_rank=rng.choice([None, 4, 7]),
        kv_lora_rank=rng.choice([3, 8]),
        qk_nope_head_dim=rng.choice([2, 5]),
        qk_rope_head_dim=rng.choice([2, 4, 8]),
        v_head_dim=rng.choice([2, 5, 16]),
        n_routed_experts=groups * group_size,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=rng.randint(1, min(3, reachable)),
        n_shared_experts=rng.randint(0, 2),
        scoring_func=rng.choice(["sigmoid", "softmax"]),
        topk_method=method,
        norm_topk_prob=rng.random() < 0.5,
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        num_nextn_predict_layers=rng.randint(0, 2),
        rope_theta=rng.choice([100.0, 10000.0]),
        rope_scaling=rng.choice([None, YARN | mscales]),
        rms_norm_eps=rng.choice([1e-6, 1e-3]),
    )


def batch(
    cfg: ModelConfig,
    seed: int,
    sequences: int,
    length: int,
    isolated: bool = False,
    padded: bool = False,
) -> list[reference.Sequence]:
    """Random tokens; positions start anywhere up to far past YaRN's original context."""
    rng = random.Random(seed)
    made = []
    for _ in range(sequences):
        tokens = [rng.randrange(cfg.vocab_size) for _ in range(length + 1)]
        real_count = rng.randint(2, length) if padded else length
        border = rng.randint(1, length - 1)
        documents = [int(i >= border) for i in range(length)]
        start = rng.choice([0, 5, 100])
        positions = [start + i for i in range(length)]
        labels = [tokens[i + 1] if i < real_count - 1 else reference.IGNORED for i in range(length)]
        labels[rng.randrange(length)] = reference.IGNORED
        if isolated:
            positions = [i - border if i >= border else i for i in range(length)]
            labels[border - 1] = reference.IGNORED
        made.append(
            reference.Sequence(
                tokens=tokens[:length],
                labels=labels,
                positions=positions,
                documents=documents if isolated else None,
                real=[i < real_count for i in range(length)],
            )
        )
    return made
