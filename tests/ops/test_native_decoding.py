"""What decoding does by kernels, against what PyTorch does: the same modules, both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepseek.config.schema import ModelConfig
from deepseek.inference.generation import LatentCache
from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.feed_forward import FeedForward, Linear, RMSNorm
from deepseek.models.components.moe import MoE
from deepseek.models.components.rope import rotation
from deepseek.models.components.router import Router
from deepseek.ops import latent_attention as attention_module
from support.kernels import kernels_asked_for, without_kernels

CLOSE = dict(rtol=1e-5, atol=3e-6)


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.3, generator=generator)
        for name, buffer in module.named_buffers():
            buffer.normal_(0, 0.3, generator=generator) if name.endswith("bias") else buffer.zero_()
    return module


def random(*sizes: int, seed: int = 1) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


@contextmanager
def only_by(*names: str) -> Iterator[None]:
    """Fails unless these kernels are called, and no others."""
    with kernels_asked_for() as called:
        yield
    assert called == set(names)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("sizes", [(1, 16), (3, 7), (2, 3, 130), (40, 512)])
def test_norm(sizes: tuple[int, ...]) -> None:
    norm, x = filled(RMSNorm(sizes[-1], 1e-6)), random(*sizes)
    with torch.no_grad():
        with only_by("rms_norm"):
            y = norm(x)
        assert torch.equal(y.flatten(0, -2)[:1], norm(x.flatten(0, -2)[:1]))
        with without_kernels():
            torch.testing.assert_close(y, norm(x), rtol=1e-6, atol=1e-6)


@given(
    rows=st.integers(1, 15),
    dim=st.sampled_from([3, 16, 40]),
    width=st.sampled_from([1, 6, 33, 64]),
)
def test_feed_forward(rows: int, dim: int, width: int) -> None:
    module, x = filled(FeedForward(dim, width)), random(rows, dim)
    with torch.no_grad():
        with only_by("feed_forward"):
            y = module(x)
        assert torch.equal(y[:1], module(x[:1]))
        with without_kernels():
            torch.testing.assert_close(y, module(x), **CLOSE)


@given(rows=st.integers(1, 15), width=st.sampled_from([1, 33, 64]), threads=st.integers(1, 3))
def test_half_of_a_block_with_a_feed_forward(rows: int, width: int, threads: int) -> None:
    module, norm, h = filled(FeedForward(40, width)), filled(RMSNorm(40, 1e-6)), random(rows, 40)
    with torch.no_grad():
        with only_by("decode_feed_forward"), threads_set(threads):
            y = module.add_to(h, norm)
        assert torch.equal(y[:1], module.add_to(h[:1], norm))
        with without_kernels():
            torch.testing.assert_close(y, h + module(norm(h)), **CLOSE)


def test_feed_forward_that_is_watched_goes_step_by_step() -> None:
    module, seen = filled(FeedForward(8, 8)), []
    module.w3.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), only_by():
        module(random(2, 8))
    assert seen == [1]


ROUTERS = {
    "sigmoid": {},
    "one": dict(top_k=1),
    "all": dict(top_k=12),
    "softmax": dict(scoring="softmax", normalise=False),
    "groups": dict(num_groups=4, top_k_groups=2, top_k=4),
    "groups by maximum": dict(num_groups=3, top_k_groups=1, topk_method="group_limited_greedy"),
    "greedy": dict(num_groups=4, topk_method="greedy"),
}


def router(**changes: object) -> Router:
    fields = dict(
        dim=20,
        num_experts=12,
        top_k=3,
        num_groups=1,
        top_k_groups=1,
        scoring="sigmoid",
        topk_method="noaux_tc",
        normalise=True,
        scaling_factor=2.5,
    )
    made = filled(Router(**(fields | changes)))  # type: ignore[arg-type]
    assert isinstance(made, Router)
    return made


def by_expert(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """In the order of the ids, which is no promise of either way."""
    order_TK = ids_TK.argsort(dim=-1)
    return torch.stack((ids_TK.gather(1, order_TK), weights_TK.gather(1, order_TK)))


@pytest.mark.parametrize("case", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 7, 31])
def test_route(case: str, tokens: int) -> None:
    made, x_TD = router(**ROUTERS[case]), random(tokens, 20)
    with torch.no_grad():
        with only_by("route"):
            fast = made(x_TD)
        with without_kernels():
            slow = made(x_TD)
    torch.testing.assert_close(fast.logits_TE, slow.logits_TE, **CLOSE)
    torch.testing.assert_close(fast.scores_TE, slow.scores_TE, **CLOSE)
    torch.testing.assert_close(
        by_expert(fast.expert_ids_TK, fast.weights_TK),
        by_expert(slow.expert_ids_TK, slow.weights_TK),
        **CLOSE,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", ROUTERS)
def test_what_is_no_number_chooses_experts_that_exist(value: float, case: str) -> None:
    """Their numbers are addresses."""
    made = router(**ROUTERS[case])
    for x_TD in (torch.full((2, 20), value), random(2, 20)):
        made.weight.data[3] = value
        with torch.no_grad():
            ids_TK = made(x_TD).expert_ids_TK
        assert ids_TK.min() >= 0 and ids_TK.max() < 12
        assert all(len(set(row)) == made.top_k for row in ids_TK.tolist())


@given(
    tokens=st.integers(1, 20),
    dim=st.sampled_from([5, 16, 24]),
    width=st.sampled_from([3, 16, 20]),
    shared=st.integers(0, 1),
)
def test_experts(tokens: int, dim: int, width: int, shared: int) -> None:
    layer = MoE(
        dim=dim,
        hidden_dim=width,
        num_shared_experts=shared,
        router=router(dim=dim),
        balance_coeff=0.0,
        z_coeff=0.0,
    )
    x_BSD = random(tokens, 1, dim)
    with torch.no_grad():
        filled(layer)
        names = ("feed_forward",) if shared and tokens < 16 else ()
        with only_by("few_experts", "route", *names):
            y_BSD = layer(x_BSD, decodes=True)
        with without_kernels():
            torch.testing.assert_close(y_BSD, layer(x_BSD, decodes=True), **CLOSE)


@given(
    tokens=st.integers(1, 15),
    width=st.sampled_from([3, 16, 20]),
    shared=st.integers(0, 2),
    case=st.sampled_from(list(ROUTERS)),
    threads=st.integers(1, 3),
)
def test_half_of_a_block_with_a_mixture(
    tokens: int, width: int, shared: int, case: str, threads: int
) -> None:
    layer, norm = mixture(width, shared, **ROUTERS[case]), RMSNorm(20, 1e-6)
    h_BSD, told = random(tokens, 1, 20), list[tuple[Tensor, Tensor]]()
    layer.gate.listener = lambda scores, ids, real: told.append((scores, ids))
    with torch.no_grad():
        filled(norm, 2)
        with only_by("decode_mixture"), threads_set(threads):
            y_BSD = layer.add_to(h_BSD, norm, decodes=True)
        with without_kernels():
            torch.testing.assert_close(y_BSD, h_BSD + layer(norm(h_BSD), decodes=True), **CLOSE)
    (scores, ids), (slow_scores, slow_ids) = told
    torch.testing.assert_close(scores, slow_scores, **CLOSE)
    assert torch.equal(ids.sort(-1).values, slow_ids.sort(-1).values)


def test_mixtures_that_are_watched_or_have_many_tokens_go_step_by_step() -> None:
    layer, norm, h_BSD = mixture(8, 1), RMSNorm(20, 1e-6), random(3, 1, 20)
    with torch.no_grad():
        with only_by("rms_norm", "route", "few_experts"):
            layer.add_to(random(16, 1, 20), norm, decodes=True)
        layer.gate.register_forward_hook(lambda *_: None)
        with only_by("rms_norm", "route", "few_experts", "feed_forward"):
            layer.add_to(h_BSD, norm, decodes=True)


def test_hooks_of_experts_and_of_latents_are_called() -> None:
    """The kernels of a step compute what these compute, too."""
    layer, norm, made, seen = mixture(8, 1), RMSNorm(20, 1e-6), attention(3), list[nn.Module]()
    watched = [layer.experts, made.kv_norm]
    for module in watched:
        module.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        layer.add_to(random(3, 1, 20), norm, decodes=True)
    attended(made, [0], 5, 1, filled(RMSNorm(24, 1e-6)))  # type: ignore[arg-type]
    assert seen == watched


def mixture(width: int, shared: int, **changes: object) -> MoE:
    made = MoE(
        dim=20,
        hidden_dim=width,
        num_shared_experts=shared,
        router=router(**changes),
        balance_coeff=0.0,
        z_coeff=0.0,
    )
    return filled(made)  # type: ignore[return-value]


def attention(heads: int, **changes: int) -> MultiHeadLatentAttention:
    fields = dict(
        dim=24,
        num_heads=heads,
        q_lora_rank=10,
        kv_lora_rank=21,
        qk_nope_head_dim=7,
        qk_rope_head_dim=6,
        v_head_dim=9,
    )
    made = MultiHeadLatentAttention(
        **(fields | changes),  # type: ignore[arg-type]
        norm_eps=1e-6,
        softmax_scale=0.7,
    )
    return filled(made)  # type: ignore[return-value]


def attended(
    made: MultiHeadLatentAttention,
    padding: list[int],
    before: int,
    new: int,
    norm: RMSNorm | None = None,
) -> tuple[Tensor, Tensor]:
    """Of new tokens after some cached ones: the result, and the cache. With a norm: of the half of
    a block."""
    sizes = dict(kv_lora_rank=made.kv_lora_rank, qk_rope_head_dim=made.qk_rope_head_dim)
    config = ModelConfig(**sizes, num_attention_heads=64)
    batch = len(padding)
    cache = LatentCache(batch, before + new + 3, config, torch.tensor(padding), torch.float32)
    kept_BMX = random(batch, before, cache.kept_BMX.shape[-1])
    cache.kept_BMX[:, :before] = kept_BMX
    cache.length = before
    positions_BS = torch.arange(before, before + new).expand(batch, -1)
    turned = rotation(positions_BS, made.qk_rope_head_dim, 100.0, None)
    h_BSD = random(batch, new, 24, seed=2)
    with torch.no_grad():
        if norm is None:
            y_BSD = made(h_BSD, *turned, cache=cache)
        else:
            y_BSD = made.add_to(h_BSD, norm, *turned, cache=cache)
    assert cache.length == before + new
    assert not cache.kept_BMX[:, before + new :].any(), "written beyond the new tokens"
    return y_BSD, cache.kept_BMX


@given(
    heads=st.integers(1, 5),
    padding=st.lists(st.sampled_from([0, 0, 1, 60, 130, 400]), min_size=1, max_size=3),
    before=st.sampled_from([0, 1, 63, 64, 127, 300]),
    new=st.integers(1, 8),
    threads=st.integers(1, 3),
    least=st.sampled_from([1, 40]),
)
def test_attention(
    heads: int, padding: list[int], before: int, new: int, threads: int, least: int
) -> None:
    """Blocks that are full or not, padding that ends anywhere, parts of a cache."""
    made = attention(heads)
    padding = [min(pad, before + new - 1) for pad in padding]
    with pytest.MonkeyPatch.context() as patch, threads_set(threads):
        patch.setattr(attention_module, "_LEAST_PART", least)
        with only_by("latent_attention", "rms_norm"):
            fast, cached = attended(made, padding, before, new)
    with without_kernels():
        slow, cached_slow = attended(made, padding, before, new)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(cached, cached_slow, **CLOSE)


@given(
    q_lora_rank=st.sampled_from([None, 10]),
    padding=st.lists(st.sampled_from([0, 1, 130]), min_size=1, max_size=3),
    before=st.sampled_from([0, 1, 300]),
    new=st.integers(1, 5),
    threads=st.integers(1, 3),
)
def test_half_of_a_block_with_attention(
    q_lora_rank: int | None, padding: list[int], before: int, new: int, threads: int
) -> None:
    made, norm = attention(3, q_lora_rank=q_lora_rank), filled(RMSNorm(24, 1e-6), 2)
    padding = [min(pad, before + new - 1) for pad in padding]
    few = len(padding) * new < 16
    with (
        threads_set(threads),
        only_by(*(["decode_attention"] if few else ["rms_norm", "latent_attention"])),
    ):
        fast, cached = attended(made, padding, before, new, norm)
    with without_kernels():
        slow, cached_slow = attended(made, padding, before, new, norm)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(cached, cached_slow, **CLOSE)


def test_attention_with_another_norm_or_that_is_watched_goes_step_by_step() -> None:
    """The kernel has one epsilon."""
    made = attention(3)
    with only_by("rms_norm", "latent_attention"):
        attended(made, [0], 5, 1, filled(RMSNorm(24, 1e-5)))
    made.wo.register_forward_hook(lambda *_: None)
    with only_by("rms_norm", "latent_attention"):
        attended(made, [0], 5, 1, filled(RMSNorm(24, 1e-6)))


@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_attention_of_sizes_that_are_vectors(q_lora_rank: int | None) -> None:
    made = attention(
        4, q_lora_rank=q_lora_rank, kv_lora_rank=160, qk_nope_head_dim=32, v_head_dim=70
    )
    fast, _ = attended(made, [0, 0], 200, 1)
    with without_kernels():
        slow, _ = attended(made, [0, 0], 200, 1)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cache_without_room_is_not_written_to(dtype: torch.dtype) -> None:
    made, config = attention(2), ModelConfig(kv_lora_rank=21, qk_rope_head_dim=6)
    capacity = 3 if dtype == torch.float32 else 9
    cache = LatentCache(1, capacity, config, torch.zeros(1, dtype=torch.int64), dtype)
    angles = rotation(torch.arange(4).unsqueeze(0), 6, 100.0, None)
    with torch.no_grad(), pytest.raises(AssertionError, match="has room for them"):
        made(random(1, 4, 24), *angles, cache=cache)


def test_inputs_of_another_width_are_an_error() -> None:
    """A kernel would read what lies behind them."""
    layer = MoE(
        dim=20, hidden_dim=8, num_shared_experts=0, router=router(), balance_coeff=0, z_coeff=0
    )
    with torch.no_grad():
        for compute in (
            filled(Linear(256, 300)),
            filled(FeedForward(20, 8)),
            router(),
            lambda x: (
                layer.experts.few(x, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
                or x @ layer.gate.weight.mT
            ),
        ):
            for width in (10, 40):
                with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                    compute(random(2, width))


@pytest.mark.parametrize("width", [10, 40])
@pytest.mark.parametrize("trains", [False, True])
def test_a_norm_of_another_width_is_an_error(width: int, trains: bool) -> None:
    norm, h, scale = RMSNorm(width, 1e-6), random(2, 1, 20), torch.ones(()) if trains else None
    for half in (
        lambda: norm(h),
        lambda: filled(FeedForward(20, 8)).add_to(h, norm),  # type: ignore[operator]
        lambda: mixture(8, 1).add_to(h, norm, None, scale, not trains),
    ):
        with torch.set_grad_enabled(trains), pytest.raises(RuntimeError, match="must match"):
            half()


def test_many_new_tokens_take_the_usual_way() -> None:
    with only_by("rms_norm", "turn_heads"):
        attended(attention(2), [0], 5, 9)
