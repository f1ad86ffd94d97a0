"""Which parameter is decayed, and by which rule it moves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig, OptimConfig
from deepseek.models.transformer import Transformer
from deepseek.ops.native.build import why_not
from deepseek.parallel.gradients import multiply_gradients
from deepseek.training import adamw
from deepseek.training.adamw import AdamW
from deepseek.training.muon import Muon
from deepseek.training.optim import build_optimizer, multiply_in_update
from support.kernels import without_kernels


def model() -> Transformer:
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=4,
        kv_lora_rank=4,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=12,
        moe_intermediate_size=4,
        n_routed_experts=4,
        num_nextn_predict_layers=1,
    )
    made = Transformer(config)
    made.init_weights(0)
    return made


def named_groups(made: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """Every group with its parameters' names."""
    names = {parameter: name for name, parameter in made.named_parameters()}
    return [
        group | {"names": {names[parameter] for parameter in group["params"]}}
        for group in optimizer.param_groups
    ]


def is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_once_and_norms_not_decayed(name: str) -> None:
    made = model()
    optimizer = build_optimizer(made.named_parameters(), OptimConfig(name=name, weight_decay=0.3))
    groups = named_groups(made, optimizer)
    listed = [n for group in groups for n in group["names"]]
    assert sorted(listed) == sorted(n for n, _ in made.named_parameters())
    for group in groups:
        for parameter_name in group["names"]:
            wanted = 0.0 if is_norm(parameter_name) else 0.3
            assert group["weight_decay"] == wanted, parameter_name
    assert sum(is_norm(n) for n in listed) == 16


def test_adamw() -> None:
    config = OptimConfig(name="adamw", lr=0.01, betas=[0.8, 0.7], eps=1e-6)
    optimizer = build_optimizer(model().named_parameters(), config)
    assert type(optimizer) is AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.01, (0.8, 0.7), 1e-6)


@pytest.mark.parametrize("kernels", [True, False])
def test_adamw_is_torchs(kernels: bool) -> None:
    """Of many sizes, in several steps, of which each parameter counts its own."""
    shapes, generator = [(3, 5), (7,), (40, 500), (1, 1), (0, 4)], torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    sides = [[start.clone().requires_grad_() for start in starts] for _ in range(2)]
    settings: dict[str, Any] = dict(lr=0.01, betas=(0.8, 0.7), eps=1e-6)
    groups = [
        [
            {"params": side[:3], "weight_decay": 0.3},
            {"params": side[3:], "weight_decay": 0.0},
        ]
        for side in sides
    ]
    optimizers = AdamW(groups[0], **settings), torch.optim.AdamW(groups[1], fused=True, **settings)
    with nullcontext() if kernels else without_kernels():
        for step in range(3):
            for parameters in zip(*sides, strict=True):
                gradient = torch.randn(parameters[0].shape, generator=generator)
                for parameter in parameters:
                    is_late = step == 0 and parameter.dim() == 1
                    parameter.grad = None if is_late else gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        for name, value in optimizers[1].state[other].items():
            torch.testing.assert_close(optimizers[0].state[one][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moments", [None, torch.bfloat16])
def test_adamw_is_the_same_on_any_threads(moments: torch.dtype | None) -> None:
    """Whose shares end anywhere: in a parameter, between two, in one that is smaller than both."""
    sizes, generator = [3, 1023, 0, 1, 70_000, 1024, 5000, 4097], torch.Generator().manual_seed(0)
    starts, gradients = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(2))

    def updated(threads: int) -> list[Tensor]:
        parameters = [start.clone().requires_grad_() for start in starts]
        optimizer = AdamW(
            [{"params": parameters}], moments=moments, lr=0.1, betas=(0.8, 0.7), eps=1e-6
        )
        torch.set_num_threads(threads)
        for _ in range(2):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        states = [x for p in parameters for _, x in sorted(optimizer.state[p].items())]
        return [*(p.detach() for p in parameters), *states]

    try:
        wanted = updated(1)
        for threads in (2, 3, 7):
            assert all(map(torch.equal, updated(threads), wanted))
    finally:
        torch.set_num_threads(1)


def updated(
    name: str, moments: str, factors: Sequence[float], in_update: bool, on_host: bool = False
) -> list[Tensor]:
    """Weights and states after an update for each factor, by which gradients are multiplied in it
    or before it."""
    made = model()
    config = OptimConfig(name=name, lr=0.1, moments_dtype=moments, cpu_offload=on_host)
    optimizer = build_optimizer(made.named_parameters(), config)
    generator = torch.Generator().manual_seed(0)
    for factor in factors:
        for parameter in made.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if in_update:
            multiply_in_update(optimizer, factor)
        else:
            multiply_gradients(list(made.parameters()), factor)
        optimizer.step()
    states = [x for p in made.parameters() for _, x in sorted(optimizer.state[p].items())]
    return [*(p.detach() for p in made.parameters()), *states]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_are_multiplied_in_the_update(
    name: str, moments: str, on_host: bool, kernels: bool
) -> None:
    """Bit by bit as if they had been before it; once, and in the one that it was asked for."""
    with nullcontext() if kernels else without_kernels():
        sides = [
            updated(name, moments, (0.3, 1.0, 1e-5, 0.77), in_update, on_host)
            for in_update in (True, False)
        ]
    assert all(map(torch.equal, *sides))
    other = updated(name, moments, (1.0, 1.0, 1.0, 1.0), True, on_host)
    assert not any(torch.equal(a, b) for a, b in zip(other, sides[0], strict=True) if a.dim() > 1)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("moments", [None, torch.bfloat16])
def test_a_state_of_other_sizes_is_an_error(moments: torch.dtype | None, kernels: bool) -> None:
    """A state loaded in another order of parameters, and a parameter given more numbers: kernels
    wrote behind the smaller one."""
    made = [torch.ones(4, requires_grad=True), torch.ones(8, 16, requires_grad=True)]
    settings: dict[str, Any] = dict(lr=0.1, betas=(0.9, 0.9), eps=1e-8, moments=moments)
    optimizer, swapped = (AdamW([{"params": p}], **settings) for p in (made, made[::-1]))
    swapped.make_room()
    optimizer.load_state_dict(swapped.state_dict())
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    with nullcontext() if kernels else without_kernels():
        with pytest.raises(UserError, match=r"exp_avg of parameter 0 .* \[8, 16\], .* \[4\]"):
            optimizer.step()
        swapped.step()
        made[1].data = torch.ones(2**16)
        with pytest.raises(UserError, match=r"grad of parameter 0 .* \[8, 16\], .* \[65536\]"):
            swapped.step()


@pytest.mark.parametrize("kernels", [True, False])
def test_a_transposed_weight_is_updated_number_by_number(kernels: bool) -> None:
    """torch's fused update takes numbers as they lie in memory."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(5, 3, generator=generator) for _ in range(2))
    ends = []
    for transposed in (False, True):
        weight = nn.Parameter(start.clone())
        optimizer = AdamW([{"params": [weight]}], lr=0.1, betas=(0.9, 0.9), eps=1e-8)
        optimizer.make_room()
        if transposed:
            weight.data = start.t().contiguous().t()
        weight.grad = gradient.clone()
        with nullcontext() if kernels else without_kernels():
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_copies_go_on_as_the_original(name: str, moments: str) -> None:
    made = model()
    optimizer = build_optimizer(
        made.named_parameters(), OptimConfig(name=name, lr=0.1, moments_dtype=moments)
    )
    sides = [(made, optimizer), copy.deepcopy((made, optimizer))]
    for model_of_side, optimizer_of_side in sides:
        generator = torch.Generator().manual_seed(0)
        for parameter in model_of_side.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer_of_side.step()
    assert all(map(torch.equal, *(list(side.parameters()) for side, _ in sides)))


def test_a_factor_is_of_one_update() -> None:
    parameter = torch.ones(2, requires_grad=True)
    optimizer = AdamW([{"params": [parameter]}], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    multiply_in_update(optimizer, 0.5)
    for wanted in (0.05, 0.05 * 0.9 + 0.1):
        parameter.grad = torch.ones(2)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full((2,), wanted))


def test_a_state_of_torchs_adamw_has_no_factor() -> None:
    weight = nn.Parameter(torch.ones(3))
    ours, theirs = AdamW([weight], lr=0.1), torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(3)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    multiply_in_update(ours, 0.5)
    ours.step()
    assert ours.state[weight]["exp_avg"].tolist() == pytest.approx([0.9 * 0.1 + 0.1 * 0.5] * 3)


def test_another_optimiser_gets_multiplied_gradients() -> None:
    parameter = torch.ones(2, requires_grad=True)
    parameter.grad = torch.full((2,), 4.0)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    multiply_in_update(optimizer, 0.25)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.9))


def test_bf16_moments_are_rounded_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's numbers are those of fp32 moments that are made for the update and rounded when
    it is done, bit by bit; infinite ones, tiny ones and NaN, too."""
    taken: list[bool] = []
    kernel = adamw.adamw_kernel
    monkeypatch.setattr(adamw, "adamw_kernel", lambda *a: taken.append(kernel(*a)) or taken[-1])
    start = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    gradient = start.clone()
    gradient[:6] = torch.tensor([3.4e38, -3.4e38, torch.inf, torch.nan, 1e-42, 0.0])
    sides = []
    for on_host in (False, True):  # on the host moments are copied for the update
        parameter = start.clone().requires_grad_()
        groups = [{"params": [parameter]}]
        settings: dict[str, Any] = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-8)
        optimizer = AdamW(groups, moments=torch.bfloat16, on_host=on_host, **settings)
        for sign in (1.0, -0.7, 0.01):
            parameter.grad = gradient * sign
            optimizer.step()
        state = optimizer.state[parameter]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        sides.append([parameter.detach(), state["exp_avg"], state["exp_avg_sq"]])
    assert all(taken) == (why_not() is None)
    for one, other in zip(*sides, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("kernels", [True, False])
def test_a_rate_in_a_tensor(kernels: bool) -> None:
    sides = [torch.ones(3, requires_grad=True) for _ in range(2)]
    for parameter, rate in zip(sides, (0.1, torch.tensor(0.1)), strict=True):
        parameter.grad = torch.arange(3.0)
        optimizer = AdamW([{"params": [parameter]}], lr=rate, betas=(0.9, 0.99), eps=1e-8)
        with nullcontext() if kernels else without_kernels():
            optimizer.step()
    torch.testing.assert_close(*sides)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    config = OptimConfig(name="muon", lr=0.01, betas=[0.8, 0.7], eps=1e-6, muon_momentum=0.6)
    made = model()
    optimizer = build_optimizer(made.named_parameters(), config)
    assert type(optimizer) is Muon
    orthogonalised = set()
    for group in named_groups(made, optimizer):
        assert (group["lr"], group["momentum"]) == (0.01, 0.6)
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-6)
        if group["muon"]:
            orthogonalised |= group["names"]
    left = {n for n, _ in made.named_parameters()} - orthogonalised
    assert {n for n in left if not is_norm(n)} == {"embed.weight", "head.weight"}
    assert not [n for n in orthogonalised if is_norm(n)]
    assert {"mtp.0.eh_proj.weight", "layers.1.ffn.experts.w1", "layers.0.attn.wq_a.weight"} < (
        orthogonalised
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_are_left_out(name: str) -> None:
    made = model()
    made.embed.weight.requires_grad_(False)
    made.norm.weight.requires_grad_(False)
    optimizer = build_optimizer(made.named_parameters(), OptimConfig(name=name))
    names = {n for group in named_groups(made, optimizer) for n in group["names"]}
    assert not names & {"embed.weight", "norm.weight"}
    assert len(names) == len(list(made.parameters())) - 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_moves_everything_and_decays_matrices(name: str) -> None:
    """With zero gradients only the decay acts: matrices shrink by 1 - lr * decay, norms stay."""
    made = model()
    start = {n: parameter.detach().clone() for n, parameter in made.named_parameters()}
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(made.named_parameters(), config)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for n, parameter in made.named_parameters():
        factor = 1.0 if is_norm(n) else 0.95
        torch.testing.assert_close(parameter.detach(), start[n] * factor, msg=n)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = {n: parameter.detach().clone() for n, parameter in made.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(parameter, before[n]) for n, parameter in made.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_on_the_host(name: str, moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, bit by bit; each state comes once an update, and goes home."""
    fetched: list[Tensor] = []
    bring = adamw._Visit._copied
    monkeypatch.setattr(
        adamw._Visit, "_copied", lambda self, state: (fetched.append(state), bring(self, state))[1]
    )
    trained = {}
    for on_host in (False, True):
        made = model()
        config = OptimConfig(name=name, lr=0.1, moments_dtype=moments, cpu_offload=on_host)
        optimizer = build_optimizer(made.named_parameters(), config)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in made.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        states = [
            state
            for parameter in made.parameters()
            for key, state in sorted(optimizer.state[parameter].items())
            if key != "step"
        ]
        assert len(fetched) == on_host * 3 * len(states)
        assert {id(state) for state in fetched} <= {id(state) for state in states}
        trained[on_host] = [*(p.detach() for p in made.parameters()), *states]
    assert all(torch.equal(a, b) for a, b in zip(trained[False], trained[True], strict=True))
