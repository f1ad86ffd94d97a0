"""Muon: its orthogonalisation against the SVD, its step by hand and against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseek.training.adamw import AdamW
from deepseek.training.muon import Muon, newton_schulz

COMMON = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-8, momentum=0.9)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def muon(parameters: list[nn.Parameter], decay: float = 0.1, **changes: object) -> Muon:
    group = {"params": parameters, "weight_decay": decay, "muon": True}
    return Muon([group], **(COMMON | changes))  # type: ignore[arg-type]


# -- newton_schulz --


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_singular_values_come_near_one(rows: int, columns: int, scale: float, seed: int) -> None:
    """Those above 1% of the largest end in 0.6 to 1.3; the singular vectors stay."""
    g = random(rows, columns, seed=seed, dtype=torch.float64) * scale
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    got = newton_schulz(g)
    assert got.shape == g.shape and got.dtype == torch.float64
    in_basis = u.T @ got @ vt.T
    values = in_basis.diagonal()
    assert (in_basis - torch.diag(values)).abs().max() < 1e-9
    large = s > 0.01 * s[0]
    assert values[large].min() > 0.6 and values[large].max() < 1.3
    assert values.min() > -1e-9


def test_near_the_polar_factor() -> None:
    g = random(24, 16, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    polar, got = u @ vt, newton_schulz(g)
    cosine = (polar * got).sum() / (polar.norm() * got.norm())
    assert cosine > 0.97


def test_more_steps_of_small_values() -> None:
    """Each step lifts a small singular value by the first coefficient, 3.4445."""
    g = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    lifted = [newton_schulz(g, steps)[1, 1].item() for steps in (0, 1, 2)]
    assert lifted[1] / lifted[0] == pytest.approx(3.4445, rel=1e-6)
    assert lifted[2] / lifted[1] == pytest.approx(3.4445, rel=1e-6)


def test_a_stack_is_a_row_of_matrices() -> None:
    for shape in ((3, 8, 4), (3, 4, 8), (2, 3, 5, 5)):
        stack = random(*shape, dtype=torch.float64)
        got = newton_schulz(stack).flatten(0, -3)
        for matrix, wanted in zip(got, stack.flatten(0, -3), strict=True):
            torch.testing.assert_close(matrix, newton_schulz(wanted), rtol=1e-10, atol=1e-12)


def test_tall_is_wide_transposed() -> None:
    g = random(9, 4, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(g), newton_schulz(g.T).T, rtol=1e-12, atol=1e-12)


def test_no_gradient_no_direction() -> None:
    """An expert without tokens: zero, not NaN, also beside one with tokens."""
    stack = torch.stack((torch.zeros(4, 6), random(4, 6)))
    got = newton_schulz(stack)
    assert not got[0].any() and got[1].isfinite().all() and got[1].any()


def test_dtypes() -> None:
    for given_dtype, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert newton_schulz(random(4, 4).to(given_dtype)).dtype == wanted


# -- the step of a hidden matrix --


def test_by_hand() -> None:
    """Moonlight eq 2-4 over three steps: Nesterov momentum, 0.2 sqrt(max side), decay first."""
    weight = nn.Parameter(random(6, 4, dtype=torch.float64))
    optimizer = muon([weight], decay=0.1)
    wanted, momentum = weight.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    for step in range(3):
        weight.grad = random(6, 4, seed=step + 1, dtype=torch.float64)
        momentum = 0.9 * momentum + 0.1 * weight.grad
        nesterov = 0.1 * weight.grad + 0.9 * momentum
        wanted = wanted * (1 - 0.05 * 0.1)
        wanted = wanted - 0.05 * 0.2 * 6**0.5 * newton_schulz(nesterov)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], momentum)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_equals_torch_muon(shape: tuple[int, int]) -> None:
    """Torch's own iterates in bf16, ours on a CPU in fp32: near, not equal."""
    ours, theirs = (nn.Parameter(random(*shape)) for _ in range(2))
    start = ours.detach().clone()
    mine = muon([ours])
    torchs = torch.optim.Muon(
        [theirs], lr=0.05, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        ours.grad = random(*shape, seed=step + 1)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_an_expert_stack_equals_its_matrices() -> None:
    """More experts than rows: the scale is that of a matrix's sides."""
    stack = nn.Parameter(random(12, 6, 4, dtype=torch.float64))
    matrices = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    of_stack, of_matrices = muon([stack]), muon(matrices)
    for step in range(3):
        stack.grad = random(12, 6, 4, seed=step + 1, dtype=torch.float64)
        for matrix, gradient in zip(matrices, stack.grad, strict=True):
            matrix.grad = gradient.clone()
        of_stack.step()
        of_matrices.step()
    torch.testing.assert_close(stack.detach(), torch.stack(matrices), rtol=1e-10, atol=1e-12)


def test_the_size_of_an_update_is_that_of_adamw() -> None:
    """Root mean square about 0.2 * lr, whatever the shape and the gradient's scale."""
    for shape, scale in (((32, 32), 1.0), ((64, 16), 1e-3), ((16, 64), 1e3)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = random(*shape) * scale
        muon([weight], decay=0.0).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.05, rel=0.25)


# -- the rest gets AdamW --


def test_other_groups_equal_adamw() -> None:
    """Bit for bit torch's fused AdamW, learning-rate changes included."""
    ours = [nn.Parameter(random(5, 3)), nn.Parameter(random(4, seed=1))]
    theirs = copy.deepcopy(ours)
    mine = Muon(
        [
            {"params": ours[:1], "weight_decay": 0.1},
            {"params": ours[1:], "weight_decay": 0.0},
        ],
        **COMMON,
    )
    torchs = torch.optim.AdamW(
        [
            {"params": theirs[:1], "weight_decay": 0.1},
            {"params": theirs[1:], "weight_decay": 0.0},
        ],
        lr=0.05,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    for step in range(5):
        for optimizer in (mine, torchs):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (step + 1)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = random(*one.shape, seed=step + 2)
            other.grad = one.grad.clone()
        mine.step()
        torchs.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            got, wanted = mine.state[one][key], torchs.state[other][key]
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_state() -> None:
    hidden, lookup = nn.Parameter(random(4, 3)), nn.Parameter(random(4, 3))
    optimizer = Muon([{"params": [hidden], "muon": True}, {"params": [lookup]}], **COMMON)
    assert not optimizer.state
    for parameter in (hidden, lookup):
        parameter.grad = random(4, 3, seed=1)
    optimizer.step()
    assert set(optimizer.state[hidden]) == {"momentum_buffer"}
    assert set(optimizer.state[lookup]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[lookup]["step"] == 1


def by_hand(weight: Tensor, grads: list[Tensor], lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW in fp32, its moments rounded to bf16 after each step."""
    first = second = torch.zeros_like(weight)
    for number, grad in enumerate(grads, start=1):
        first = 0.9 * first + 0.1 * grad
        second = 0.95 * second + 0.05 * grad.square()
        middle, spread = first / (1 - 0.9**number), second / (1 - 0.95**number)
        weight = weight * (1 - lr * 0.1) - lr * middle / (spread.sqrt() + 1e-8)
        first, second = first.bfloat16().float(), second.bfloat16().float()
    return weight, first, second


def test_moments_in_bf16() -> None:
    """What is computed is fp32; what is kept is rounded."""
    weight, grads = random(16, 8), [random(16, 8, seed=n) for n in range(1, 4)]
    parameter = nn.Parameter(weight.clone())
    settings = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    groups = [{"params": [parameter], "weight_decay": 0.1}]
    optimizer = AdamW(groups, moments=torch.bfloat16, **settings)
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    state = optimizer.state[parameter]
    assert state["step"] == 3
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    wanted, first, second = by_hand(weight, grads, 0.05)
    torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-5)
    for key, value in (("exp_avg", first), ("exp_avg_sq", second)):
        same = state[key].float() == value
        assert same.float().mean() > 0.95  # a last bit may be rounded the other way
        torch.testing.assert_close(state[key].float(), value, rtol=2**-7, atol=0)


def test_momentum_in_bf16() -> None:
    parameter = nn.Parameter(random(6, 4))
    optimizer = muon([parameter], moments=torch.bfloat16)
    twin = copy.deepcopy(parameter)
    exact = muon([twin])
    for number in range(3):
        for one in (parameter, twin):
            one.grad = random(6, 4, seed=number + 1)
        optimizer.step()
        exact.step()
    kept, wanted = (
        o.state[p]["momentum_buffer"] for o, p in ((optimizer, parameter), (exact, twin))
    )
    assert kept.dtype == torch.bfloat16
    torch.testing.assert_close(kept.float(), wanted, rtol=2**-6, atol=1e-3)
    assert not torch.equal(parameter, twin)
    torch.testing.assert_close(parameter, twin, rtol=0.02, atol=0.01)


def test_saved_and_loaded() -> None:
    """Two steps, saved, two more: bitwise four steps in a row."""

    def steps(
        parameters: list[nn.Parameter], optimizer: Muon, numbers: range
    ) -> list[nn.Parameter]:
        for number in numbers:
            for parameter in parameters:
                parameter.grad = random(*parameter.shape, seed=number)
            optimizer.step()
        return parameters

    def make(values: list[Tensor]) -> tuple[list[nn.Parameter], Muon]:
        parameters = [nn.Parameter(value.clone()) for value in values]
        groups = [{"params": parameters[:1], "muon": True}, {"params": parameters[1:]}]
        return parameters, Muon(groups, **COMMON)

    start = [random(4, 3), random(4, 3, seed=9)]
    through = steps(*make(start), range(4))
    half, optimizer = make(start)
    steps(half, optimizer, range(2))
    resumed, other = make([parameter.detach() for parameter in half])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(resumed, other, range(2, 4))
    assert all(torch.equal(*pair) for pair in zip(resumed, through, strict=True))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    for is_muon in (True, False):
        moved, still = nn.Parameter(random(3, 3)), nn.Parameter(random(3, 3))
        optimizer = Muon(
            [{"params": [still, moved], "muon": is_muon, "weight_decay": 0.5}], **COMMON
        )
        moved.grad = random(3, 3, seed=1)
        optimizer.step()
        assert torch.equal(still, random(3, 3)) and still not in optimizer.state
        assert not torch.equal(moved, random(3, 3))


def test_closure() -> None:
    weight = nn.Parameter(random(3, 3))

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert muon([weight]).step(closure) == pytest.approx(random(3, 3).square().sum().item())
    assert not torch.equal(weight, random(3, 3))


def test_bf16_weights() -> None:
    weight = nn.Parameter(random(4, 4).bfloat16())
    weight.grad = random(4, 4, seed=1).bfloat16()
    muon([weight]).step()
    assert weight.dtype == torch.bfloat16 and weight.isfinite().all()
