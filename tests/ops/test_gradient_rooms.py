"""Activations that lie where gradients come to lie: the same numbers, and nothing is lost."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from deepseek.config.schema import ModelConfig
from deepseek.models.components.block import build_moe
from deepseek.models.components.moe import MoE
from deepseek.ops.gradient_rooms import gradient_room, lent_room, make_gradient_room
from support.kernels import without_kernels

CONFIG = ModelConfig(
    hidden_size=8, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2, n_group=1,
    topk_group=1, n_shared_experts=1,
)  # fmt: skip


def layer(rooms: bool) -> MoE:
    moe = build_moe(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator)
    moe.gate.bias.zero_()
    if rooms:
        moe.experts.make_gradient_rooms()
    return moe


def loss(moe: MoE, seed: int, tokens: int = 7) -> Tensor:
    x_BSD = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed))
    return moe(x_BSD.requires_grad_()).square().sum()


def stacks(moe: MoE) -> list[nn.Parameter]:
    return [moe.experts.w1, moe.experts.w2, moe.experts.w3]


def in_rooms(moe: MoE) -> list[bool]:
    """Whether something lies there."""
    return [lent_room(w, [1]) is None for w in stacks(moe)]


def gradients(moe: MoE) -> list[Tensor]:
    return [p.grad.clone() for p in moe.parameters() if p.grad is not None]


def test_what_is_kept_lies_where_gradients_come_to_lie() -> None:
    moe = layer(rooms=True)
    rooms = [lent_room(w, [1]).data_ptr() for w in stacks(moe)]
    assert in_rooms(moe) == [False] * 3
    forward = loss(moe, 0)
    assert in_rooms(moe) == [True] * 3
    forward.backward()
    assert [w.grad.data_ptr() for w in stacks(moe)] == rooms
    moe.zero_grad()
    assert in_rooms(moe) == [False] * 3


@pytest.mark.parametrize("order", ["in turn", "both forward first", "first goes back first"])
def test_gradients_are_those_without_rooms(order: str) -> None:
    """Of two micro-batches and two steps, to the bit; with more rows than rooms hold, too."""
    found = []
    for rooms in (True, False):
        moe, steps = layer(rooms), []
        for step in range(2):
            if order == "in turn":
                for part in range(2):
                    loss(moe, 2 * step + part).backward()
            else:
                both = [loss(moe, 2 * step + part) for part in range(2)]
                for one in both if order == "first goes back first" else both[::-1]:
                    one.backward()
            steps.append(gradients(moe))
            moe.zero_grad()
        loss(moe, 9, tokens=400).backward()
        found.append([*steps, gradients(moe)])
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_gradient_that_somebody_has_kept_stays() -> None:
    moe = layer(rooms=True)
    loss(moe, 0).backward()
    kept = [w.grad for w in stacks(moe)]
    before = [grad.clone() for grad in kept]
    moe.zero_grad()
    asked = torch.autograd.grad(loss(moe, 1), stacks(moe))
    loss(moe, 2).backward()
    assert all(map(torch.equal, kept, before))
    assert not any(map(torch.equal, kept, asked))
    assert not {g.data_ptr() for g in kept} & {w.grad.data_ptr() for w in stacks(moe)}


def test_rows_that_a_hook_is_shown_stay() -> None:
    moe, shown = layer(rooms=True), list[Tensor]()
    moe.experts.register_forward_pre_hook(lambda module, given: shown.append(given[0]))
    forward = loss(moe, 0)
    before = shown[0].clone()
    forward.backward()
    assert torch.equal(shown[0], before)


def test_who_goes_back_twice_is_told() -> None:
    forward = loss(layer(rooms=True), 0)
    forward.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        forward.backward()


def test_validation_borrows_them_and_leaves_them() -> None:
    moe, plain = layer(rooms=True), layer(rooms=False)
    with torch.no_grad():
        assert torch.equal(loss(moe, 0), loss(plain, 0))
    assert in_rooms(moe) == [False] * 3


def test_are_made_for_what_kernels_train_alone() -> None:
    frozen, single, wide = layer(False), layer(False), layer(False)
    frozen.experts.w1.requires_grad_(False)
    single.experts.grouped = lambda *given: given[0]
    wide.experts.double()
    for moe in (frozen, single, wide):
        moe.experts.make_gradient_rooms()
    assert in_rooms(frozen) == [True, False, False]
    assert in_rooms(single) == in_rooms(wide) == [True] * 3
    with without_kernels():
        none = layer(rooms=True)
    assert in_rooms(none) == [True] * 3


def test_a_room_goes_with_its_weight() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    make_gradient_room(weight)
    room = gradient_room(weight)
    make_gradient_room(weight)
    address = room.data_ptr()
    del room
    assert gradient_room(weight).data_ptr() == address
    assert lent_room(weight, [7]) is None and lent_room(weight, [3, 2]).shape == (3, 2)
    storage = weakref.ref(gradient_room(weight).untyped_storage())
    del weight
    gc.collect()
    assert storage() is None
