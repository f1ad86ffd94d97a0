"""The fused head and cross-entropy against the reference that holds all logits."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from deepseek.ops import cross_entropy as module
from deepseek.ops import rows as rows_module
from deepseek.ops.added_gradients import added_in_place
from deepseek.ops.cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropy,
    linear_cross_entropy_slow,
)
from support.kernels import kernels_asked_for


def inputs(
    tokens: int, dim: int, vocab: int, dtype: torch.dtype = torch.float32, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels; this share of the labels is ``IGNORE_INDEX``."""
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * dim + vocab)
    hidden_TD = torch.randn(tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    labels_T = torch.randint(vocab, (tokens,), generator=generator)
    labels_T[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX
    return hidden_TD, weight_VD, labels_T


def loss_and_gradients(
    loss: Tensor, hidden_TD: Tensor, weight_VD: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = torch.autograd.grad(loss * scale, (hidden_TD, weight_VD))
    return loss.detach(), *gradients


@given(
    tokens=st.integers(0, 17),
    dim=st.integers(1, 6),
    vocab=st.integers(1, 9),
    chunk=st.integers(1, 20),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    scale=st.sampled_from([1.0, -3.5, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_whole_logits(
    tokens: int,
    dim: int,
    vocab: int,
    chunk: int,
    ignored: float,
    scale: float,
    dtype: torch.dtype,
) -> None:
    hidden_TD, weight_VD, labels_T = inputs(tokens, dim, vocab, dtype, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "BLOCK_NUMBERS", 3 * vocab)
        fast = linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk)
    slow = linear_cross_entropy_slow(hidden_TD, weight_VD, labels_T)
    assert fast.dtype == dtype and fast.shape == ()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for ours, wanted in zip(
        loss_and_gradients(fast, hidden_TD, weight_VD, scale),
        loss_and_gradients(slow, hidden_TD, weight_VD, scale),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [40, 150])
@pytest.mark.parametrize("strided", ["", "hidden", "weight"])
def test_logits_are_a_kernel_of_what_is_one_piece(tokens: int, strided: str) -> None:
    hidden_TD, weight_VD, labels_T = inputs(tokens, 37, 517)
    if strided == "hidden":
        hidden_TD = hidden_TD.detach().t().contiguous().t().requires_grad_()
    if strided == "weight":
        weight_VD = weight_VD.detach().t().contiguous().t().requires_grad_()
    with kernels_asked_for() as asked:
        fast = linear_cross_entropy(hidden_TD, weight_VD, labels_T, 100)
    assert ("dense_linear" in asked) == (not strided)
    slow = linear_cross_entropy_slow(hidden_TD, weight_VD, labels_T)
    for ours, wanted in zip(
        loss_and_gradients(fast, hidden_TD, weight_VD),
        loss_and_gradients(slow, hidden_TD, weight_VD),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [0, 4, 16])
def test_hidden_states_of_another_width_are_an_error(width: int) -> None:
    """A kernel would read what lies behind them."""
    _, weight_VD, labels_T = inputs(5, 8, 23)
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear_cross_entropy(torch.ones(5, width), weight_VD, labels_T)


def test_gradcheck() -> None:
    hidden_TD, weight_VD, labels_T = inputs(5, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels_T, 2), (hidden_TD, weight_VD)
    )


def test_gradients_are_scaled_where_they_lie_if_nobody_comes_back() -> None:
    """The head's is as large as the head. Who comes back all the same is told, not given gradients
    that were scaled twice."""
    found, largest = [], []
    for context in (nullcontext, added_in_place):
        hidden_TD, weight_VD, labels_T = inputs(6, 8, 23)
        loss = linear_cross_entropy(hidden_TD, weight_VD, labels_T, 4) / 3
        with context(), profile(profile_memory=True) as made:
            loss.backward()
        sizes = [event.self_cpu_memory_usage for event in made.events()]
        largest.append(max(sizes) >= weight_VD.numel() * weight_VD.element_size())
        found.append((hidden_TD.grad, weight_VD.grad))
    assert all(map(torch.equal, *found))
    assert largest == [True, False]
    loss = linear_cross_entropy(*inputs(6, 8, 23))
    with added_in_place():
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_value_by_hand() -> None:
    """Two tokens, three words: -log softmax summed, the unlabelled token left out."""
    hidden_TD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    weight_VD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    labels_T = torch.tensor([0, 2, IGNORE_INDEX])
    e = torch.e
    wanted = -torch.log(torch.tensor(e / (e + 2))) - torch.log(torch.tensor(1 / (e**2 + 2)))
    torch.testing.assert_close(linear_cross_entropy(hidden_TD, weight_VD, labels_T), wanted)


def test_no_label_at_all() -> None:
    hidden_TD, weight_VD, labels_T = inputs(6, 3, 4, ignored=1.0)
    loss, *gradients = loss_and_gradients(
        linear_cross_entropy(hidden_TD, weight_VD, labels_T, 4), hidden_TD, weight_VD
    )
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)


def test_an_unlabelled_token_may_hold_anything() -> None:
    """A huge hidden state at padding must not leak into the loss or the head's gradient."""
    hidden_TD, weight_VD, labels_T = inputs(6, 3, 4)
    labels_T[2] = IGNORE_INDEX
    kept_T = torch.arange(6) != 2
    wanted = loss_and_gradients(
        linear_cross_entropy(hidden_TD[kept_T], weight_VD, labels_T[kept_T]), hidden_TD, weight_VD
    )
    with torch.no_grad():
        hidden_TD[2] = 1e4
    got = loss_and_gradients(
        linear_cross_entropy(hidden_TD, weight_VD, labels_T), hidden_TD, weight_VD
    )
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_large_logits_do_not_overflow() -> None:
    hidden_TD = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight_VD = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, *gradients = loss_and_gradients(
        linear_cross_entropy(hidden_TD, weight_VD, torch.tensor([1, 1])), hidden_TD, weight_VD
    )
    assert loss.item() == pytest.approx(600.0)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_never_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    rows = []
    logits = module._logits

    def watched(h_tD: Tensor, w_VD: Tensor) -> Tensor:
        rows.append(h_tD.shape[0])
        return logits(h_tD, w_VD)

    monkeypatch.setattr(module, "_logits", watched)
    hidden_TD, weight_VD, labels_T = inputs(11, 3, 7)
    loss = linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk)
    loss.backward()
    assert sum(rows) == 11 and max(rows) == min(chunk, 11)


def test_the_largest_tensor_is_a_chunk() -> None:
    """Whatever the code calls, nothing of T x V numbers is made, forward or backward."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if _is(t))
            return out

    def _is(leaf: object) -> bool:
        return isinstance(leaf, Tensor)

    tokens, dim, vocab, chunk = 64, 4, 50, 8
    hidden_TD, weight_VD, labels_T = inputs(tokens, dim, vocab)
    with Watch():
        linear_cross_entropy(hidden_TD, weight_VD, labels_T, chunk).backward()
    assert len(sizes) > 50, "the watch saw nothing"
    assert max(sizes) <= chunk * vocab


def test_default_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.CHUNK_TOKENS == 512
    rows = []
    logits = module._logits
    monkeypatch.setattr(module, "_logits", lambda h, w: rows.append(len(h)) or logits(h, w))
    linear_cross_entropy(*inputs(1030, 2, 3))
    assert rows == [512, 512, 6]


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needs: tuple[bool, bool]) -> None:
    hidden_TD, weight_VD, labels_T = inputs(5, 3, 4)
    wanted = loss_and_gradients(
        linear_cross_entropy_slow(hidden_TD, weight_VD, labels_T), hidden_TD, weight_VD
    )[1:]
    leaves = [
        tensor.detach().requires_grad_(need)
        for tensor, need in zip((hidden_TD, weight_VD), needs, strict=True)
    ]
    linear_cross_entropy(*leaves, labels_T).backward()
    for leaf, need, gradient in zip(leaves, needs, wanted, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_pays_for_no_gradient(monkeypatch: pytest.MonkeyPatch, mode: type) -> None:
    """Without grad mode, no (V, D) gradient is made and no softmax is turned into one."""
    hidden_TD, weight_VD, labels_T = inputs(5, 3, 4)
    wanted = linear_cross_entropy_slow(hidden_TD, weight_VD, labels_T)

    def forbidden(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("a gradient was computed in validation")

    monkeypatch.setattr(Tensor, "scatter_add_", forbidden)
    monkeypatch.setattr(torch, "zeros_like", forbidden)
    with mode():
        loss = linear_cross_entropy(hidden_TD, weight_VD, labels_T)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted.detach())


def test_autocast() -> None:
    """Products in bf16, loss and sum in fp32, gradients in the dtype of their leaves."""
    hidden_TD, weight_VD, labels_T = inputs(24, 16, 12)
    exact = loss_and_gradients(
        linear_cross_entropy(hidden_TD, weight_VD, labels_T), hidden_TD, weight_VD
    )
    products = []
    linear = F.linear
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(module.F, "linear", lambda x, w: products.append(x.dtype) or linear(x, w))
        loss = linear_cross_entropy(hidden_TD, weight_VD, labels_T, 7)
    rounded = loss_and_gradients(loss, hidden_TD, weight_VD)
    assert set(products) == {torch.bfloat16}
    for close, value in zip(rounded, exact, strict=True):
        assert close.dtype == torch.float32
        scale = value.abs().max()
        assert 1e-5 < (close - value).abs().max() / scale < 2e-2


def test_bf16_tensors() -> None:
    hidden_TD, weight_VD, labels_T = inputs(24, 16, 12, torch.bfloat16)
    got = loss_and_gradients(
        linear_cross_entropy(hidden_TD, weight_VD, labels_T, 7), hidden_TD, weight_VD
    )
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    wanted = loss_and_gradients(linear_cross_entropy_slow(*wide, labels_T), *wide)
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for close, value in zip(got, wanted, strict=True):
        assert (close.float() - value).abs().max() < 2e-2 * value.abs().max()


def test_sums_over_chunks_in_fp32() -> None:
    """2,000 equal terms in bf16 would stop growing at 256; the sum is kept in fp32."""
    tokens = 2000
    hidden_TD = torch.ones(tokens, 1, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(hidden_TD, weight_VD, torch.zeros(tokens, dtype=torch.int64), 10)
    loss.backward()
    assert loss.item() == pytest.approx(tokens * 0.6931472, rel=1e-4)
    assert weight_VD.grad is not None
    assert weight_VD.grad[:, 0].tolist() == pytest.approx([-1000.0, 1000.0], rel=1e-2)


def test_gradients_are_gone_after_the_backward_pass() -> None:
    """Those of the head are large, and a pipeline keeps the loss of every micro-batch."""
    hidden_TD, weight_VD, labels_T = inputs(4, 3, 5)
    loss = linear_cross_entropy(hidden_TD, weight_VD, labels_T)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
