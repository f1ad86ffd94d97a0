"""The router against plain Python, and the lines everyone gets wrong, one by one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.models.components.router import Router

METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


def router(
    num_experts: int = 4,
    top_k: int = 2,
    *,
    dim: int = 4,
    groups: int = 1,
    kept_groups: int = 1,
    scoring: str = "sigmoid",
    method: str = "noaux_tc",
    normalise: bool = True,
    factor: float = 1.0,
    bias: list[float] | None = None,
    seed: int = 0,
) -> Router:
    made = Router(
        dim=dim,
        num_experts=num_experts,
        top_k=top_k,
        num_groups=groups,
        top_k_groups=kept_groups,
        scoring=scoring,
        topk_method=method,
        normalise=normalise,
        scaling_factor=factor,
    )
    with torch.no_grad():
        made.weight.normal_(generator=torch.Generator().manual_seed(seed))
        if bias is not None:
            assert made.bias is not None
            made.bias.copy_(torch.tensor(bias))
    return made


def tokens(count: int, dim: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64)


def routes_to(logits: list[float], **kwargs: object) -> dict[int, float]:
    """Expert -> weight of one token with these logits."""
    gate = router(len(logits), dim=len(logits), **kwargs).double()  # type: ignore[arg-type]
    with torch.no_grad():
        gate.weight.copy_(torch.eye(len(logits)))
    routing = gate(torch.tensor([logits], dtype=torch.float64))
    return dict(zip(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist(), strict=True))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(gate: Router, x_D: Tensor) -> dict[int, float]:
    """Eq 12-16 for one token, in plain Python."""
    logits = [
        sum(w * x for w, x in zip(row, x_D.tolist(), strict=True)) for row in gate.weight.tolist()
    ]
    if gate.scoring == "sigmoid":
        scores = [sigmoid(logit) for logit in logits]
    else:
        exponentials = [math.exp(logit - max(logits)) for logit in logits]
        scores = [e / sum(exponentials) for e in exponentials]
    preference = list(scores)
    if gate.topk_method == "noaux_tc":
        assert gate.bias is not None
        preference = [s + b for s, b in zip(scores, gate.bias.tolist(), strict=True)]
    candidates = list(range(gate.num_experts))
    if gate.topk_method != "greedy":
        size = gate.num_experts // gate.num_groups
        best = 2 if gate.topk_method == "noaux_tc" else 1
        worth = [
            sum(sorted(preference[g * size : (g + 1) * size])[-best:])
            for g in range(gate.num_groups)
        ]
        groups = sorted(range(gate.num_groups), key=lambda g: -worth[g])[: gate.top_k_groups]
        candidates = [i for i in candidates if i // size in groups]
    chosen = sorted(candidates, key=lambda i: -preference[i])[: gate.top_k]
    weights = {i: scores[i] for i in chosen}
    if gate.normalise:
        weights = {i: w / sum(scores[j] for j in chosen) for i, w in weights.items()}
    return {i: w * gate.scaling_factor for i, w in weights.items()}


@given(
    data=st.data(),
    groups=st.integers(1, 4),
    size=st.integers(2, 4),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    method=st.sampled_from(METHODS),
    normalise=st.booleans(),
    factor=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 1000),
)
def test_equals_plain_python(
    data: st.DataObject,
    groups: int,
    size: int,
    scoring: str,
    method: str,
    normalise: bool,
    factor: float,
    seed: int,
) -> None:
    kept = data.draw(st.integers(1, groups), label="kept groups")
    reach = groups * size if method == "greedy" else kept * size
    gate = router(
        groups * size,
        data.draw(st.integers(1, reach), label="top k"),
        groups=groups,
        kept_groups=kept,
        scoring=scoring,
        method=method,
        normalise=normalise,
        factor=factor,
        seed=seed,
    ).double()
    if gate.bias is not None:
        gate.bias.normal_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    x_TD = tokens(5, seed=seed)
    routing = gate(x_TD)
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (5, gate.top_k)
    for token in range(5):
        ids, weights = routing.expert_ids_TK[token].tolist(), routing.weights_TK[token].tolist()
        wanted = by_hand(gate, x_TD[token])
        assert dict(zip(ids, weights, strict=True)) == pytest.approx(wanted, rel=1e-10)


# -- the lines everyone gets wrong --


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    bias = [0.0, -5.0, 0.0, 5.0]
    plain = routes_to(logits, top_k=2)
    assert set(plain) == {0, 1}
    chosen = routes_to(logits, top_k=2, bias=bias, normalise=False)
    assert chosen == pytest.approx({3: sigmoid(-1.0), 0: sigmoid(2.0)})
    normalised = routes_to(logits, top_k=2, bias=bias)
    total = sigmoid(-1.0) + sigmoid(2.0)
    assert normalised == pytest.approx({3: sigmoid(-1.0) / total, 0: sigmoid(2.0) / total})


def test_a_masked_group_loses_to_negative_scores() -> None:
    """Masked with 0 instead of -inf, experts 2 and 3 would beat the negative biased 0 and 1."""
    routed = routes_to(
        [1.0, 0.5, 0.9, -4.0],
        top_k=2,
        groups=2,
        kept_groups=1,
        bias=[-2.0, -2.0, -2.5, -2.0],
    )
    assert set(routed) == {0, 1}


def test_group_scores() -> None:
    """noaux_tc adds a group's two best, group_limited_greedy takes its best: they differ here."""
    logits = [3.0, -3.0, 1.0, 1.0]
    settings_of = dict(top_k=2, groups=2, kept_groups=1)
    assert set(routes_to(logits, method="noaux_tc", **settings_of)) == {2, 3}
    assert set(routes_to(logits, method="group_limited_greedy", **settings_of)) == {0, 1}
    assert set(routes_to(logits, method="greedy", **settings_of)) == {0, 2} or set(
        routes_to(logits, method="greedy", **settings_of)
    ) == {0, 3}


def test_the_bias_moves_the_group_score_too() -> None:
    logits = [1.0, 1.0, 0.5, 0.5]
    grouped = dict(top_k=2, groups=2, kept_groups=1)
    assert set(routes_to(logits, **grouped)) == {0, 1}
    assert set(routes_to(logits, bias=[0.0, 0.0, 1.0, 1.0], **grouped)) == {2, 3}


def test_softmax_runs_over_all_experts() -> None:
    weights = routes_to(
        [2.0, 1.0, 0.0], top_k=2, scoring="softmax", method="greedy", normalise=False
    )
    total = math.exp(2) + math.exp(1) + 1
    assert weights == pytest.approx({0: math.exp(2) / total, 1: math.exp(1) / total})


def test_normalise_then_scale() -> None:
    weights = routes_to([2.0, 1.0, 0.0, -1.0], top_k=3, factor=2.5)
    assert sum(weights.values()) == pytest.approx(2.5)
    plain = routes_to([2.0, 1.0, 0.0, -1.0], top_k=3, factor=2.5, normalise=False)
    assert plain == pytest.approx({i: 2.5 * sigmoid(x) for i, x in enumerate((2.0, 1.0, 0.0))})


def test_scores_of_zero_do_not_divide_by_zero() -> None:
    gate = router(2, 2, dim=2)
    with torch.no_grad():
        gate.weight.copy_(torch.full((2, 2), -1e4))
    weights_TK = gate(torch.ones(1, 2)).weights_TK
    assert torch.equal(weights_TK, torch.zeros(1, 2))


def test_the_choice_has_no_gradient_but_the_weights_have() -> None:
    gate = router(bias=[0.3, 0.0, 0.0, 0.0]).double()
    x_TD = tokens(3).requires_grad_()
    routing = gate(x_TD)
    assert not routing.expert_ids_TK.requires_grad
    (routing.weights_TK * torch.arange(1.0, 3.0)).sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.any() and x_TD.grad.any()


# -- precision --


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_bf16_tokens_are_routed_in_fp32(scoring: str) -> None:
    """256 experts whose scores bf16 cannot tell apart."""
    gate = router(256, 8, dim=64, scoring=scoring).bfloat16()
    x_TD = tokens(20, 64).bfloat16()
    twin = copy.deepcopy(gate).float()
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            routing = gate(x_TD)
            of_fp32 = twin(x_TD.float())
        assert [t.dtype for t in routing] == [torch.float32, torch.int64, *2 * [torch.float32]]
        for got, wanted in zip(routing, of_fp32, strict=True):
            assert torch.equal(got, wanted)
        exact = (x_TD.double() @ gate.weight.double().T).float()
        torch.testing.assert_close(routing.logits_TE, exact, rtol=1e-4, atol=1e-4)


# -- the buffers --


CASTS = {
    "to bf16": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to bf16 and back": lambda m: m.bfloat16().float(),
    "to like": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "cpu": lambda m: m.cpu(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_bias_stays_fp32(cast: str) -> None:
    """In bf16 an update of 0.001 is lost as soon as the bias reaches 0.5."""
    values = [0.123456789, -0.7, 1e-3, 0.0]
    gate = router(bias=values)
    gate.balance_loss.fill_(0.123456789)
    wanted = gate.bias.clone()
    CASTS[cast](torch.nn.Sequential(gate))
    assert gate.bias is not None and gate.bias.dtype == torch.float32
    assert torch.equal(gate.bias, wanted)
    assert gate.balance_loss.dtype == torch.float64
    assert gate.balance_loss.item() == pytest.approx(0.123456789)
    assert gate.tokens_per_expert.dtype == torch.int64
    assert set(dict(gate.named_buffers())) == {"bias", "tokens_per_expert", "balance_loss"}
    if cast not in ("to bf16 and back", "cpu"):
        assert gate.weight.dtype != torch.float32


def test_the_bias_moves_between_devices() -> None:
    gate = router(bias=[1.0, 2.0, 3.0, 4.0])
    gate.to(device="meta", dtype=torch.bfloat16)
    assert all(buffer.is_meta for buffer in gate.buffers()) and gate.weight.is_meta
    assert gate.bias.dtype == torch.float32 and gate.weight.dtype == torch.bfloat16
    gate.to_empty(device="cpu")
    assert not any(tensor.is_meta for tensor in (*gate.buffers(), gate.weight))
    assert gate.bias.dtype == torch.float32 and gate.bias.shape == (4,)


def test_only_the_bias_is_saved() -> None:
    assert set(router().state_dict()) == {"weight", "bias"}
    for method in ("greedy", "group_limited_greedy"):
        without = router(method=method)
        assert set(without.state_dict()) == {"weight"}
        assert without.bias is None and without.bfloat16().bias is None
        without.update_bias(torch.tensor([1, 2, 3, 4]), 0.1)
        assert without.bias is None
    assert not router().bias.requires_grad


def test_a_saved_bias_comes_back_into_a_bf16_model() -> None:
    gate = router(bias=[0.123456789, 0.0, 0.0, 0.0])
    other = router().bfloat16()
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.bias, gate.bias) and other.bias.dtype == torch.float32


def test_update_bias() -> None:
    """Mean load 5: up by the rate where below it, down where above, untouched at the mean."""
    gate = router(bias=[0.1, 0.2, 0.3, 0.4])
    gate.update_bias(torch.tensor([0, 9, 5, 6]), 0.01)
    assert gate.bias.tolist() == pytest.approx([0.11, 0.19, 0.3, 0.39], abs=1e-7)
    gate.update_bias(torch.tensor([9, 0, 0, 0]), 0.0)
    assert gate.bias.tolist() == pytest.approx([0.11, 0.19, 0.3, 0.39], abs=1e-7)


def test_the_mean_load_of_large_counts_is_exact() -> None:
    """Counts past fp32's 24 bits: a balanced router must not drift."""
    count = 2**24 + 1
    gate = router()
    gate.update_bias(torch.tensor([count, count, count, count]), 0.01)
    assert not gate.bias.any()
    gate.update_bias(torch.tensor([count, count - 1, count, count + 1]), 0.01)
    assert gate.bias.tolist() == pytest.approx([0.0, 0.01, 0.0, -0.01])


def test_start_step() -> None:
    gate = router(bias=[1.0, 1.0, 1.0, 1.0])
    gate.tokens_per_expert += 3
    gate.balance_loss += 3
    gate.start_step()
    assert not gate.tokens_per_expert.any() and not gate.balance_loss
    assert gate.bias.tolist() == [1.0] * 4


def test_a_dead_expert_comes_back() -> None:
    """The bias alone revives an expert that no token chose."""
    gate = router(4, 1, bias=[0.0, 0.0, 0.0, -0.5]).double()
    x_TD = tokens(200)
    for _ in range(200):
        ids = gate(x_TD).expert_ids_TK.flatten()
        gate.update_bias(torch.bincount(ids, minlength=4), 0.01)
    counts = torch.bincount(gate(x_TD).expert_ids_TK.flatten(), minlength=4)
    assert counts.min() > 35 and counts.max() < 65
