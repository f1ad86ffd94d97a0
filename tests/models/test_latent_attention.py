"""MLA: the expanded form against the absorbed one, cached in chunks of any sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek.config.schema import ModelConfig, RopeScaling
from deepseek.inference.generation import LatentCache
from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.block import build_attention
from deepseek.models.components.rope import rotation
from support.profiles import fewer
from support.tiny_models import tiny_config

YARN = RopeScaling(factor=8.0, original_max_position_embeddings=16, mscale_all_dim=1.0)
CONFIGS = {
    "query_latent": dict(q_lora_rank=5),
    "no_query_latent": {},
    "yarn": dict(rope_scaling=YARN),
    "values_wider_than_keys": dict(v_head_dim=20, num_attention_heads=3),
    "one_head": dict(num_attention_heads=1, qk_rope_head_dim=2),
}


def attention(config: ModelConfig, dtype: torch.dtype = torch.float64) -> MultiHeadLatentAttention:
    module = build_attention(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.4, generator=generator)
    return module.to(dtype)


def inputs(
    config: ModelConfig, batch: int, length: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randn(batch, length, config.hidden_size, generator=generator).double()


def turns(config: ModelConfig, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
    return rotation(
        positions_BS, config.qk_rope_head_dim, config.rope_theta, config.rope_scaling, torch.float64
    )


def cached(
    module: MultiHeadLatentAttention,
    config: ModelConfig,
    x_BSD: Tensor,
    padding_B: Tensor,
    chunks: list[int],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The absorbed form, fed chunk by chunk; x is aligned at its right end."""
    batch, length, _ = x_BSD.shape
    cache = LatentCache(batch, length, config, padding_B, dtype)
    outputs, start = [], 0
    for size in chunks:
        slots_S = torch.arange(start, start + size)
        positions_BS = (slots_S - padding_B.unsqueeze(-1)).clamp(min=0)
        chunk_BSD = x_BSD[:, start : start + size]
        outputs.append(module(chunk_BSD, *turns(config, positions_BS), cache=cache))
        start += size
    assert start == length == cache.length
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("case", CONFIGS)
@fewer(2)
@given(data=st.data())
def test_absorbed_equals_expanded(case: str, data: st.DataObject) -> None:
    config = tiny_config(**CONFIGS[case])
    module = attention(config)
    chunks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), label="chunks")
    length = sum(chunks)
    padding = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=3), label="pad")
    x_BSD = inputs(config, len(padding), length)
    with torch.no_grad():
        got = cached(module, config, x_BSD, torch.tensor(padding), chunks)
        assert got.isfinite().all()
        for row, pad in enumerate(padding):
            alone = x_BSD[row : row + 1, pad:]
            positions = torch.arange(length - pad).unsqueeze(0)
            wanted = module(alone, *turns(config, positions))
            torch.testing.assert_close(got[row : row + 1, pad:], wanted, rtol=1e-10, atol=1e-11)


def test_what_is_in_a_padding_slot_does_not_matter() -> None:
    config = tiny_config()
    module = attention(config)
    x_BSD = inputs(config, 2, 6)
    padding_B = torch.tensor([3, 0])
    with torch.no_grad():
        before = cached(module, config, x_BSD, padding_B, [4, 1, 1])
        x_BSD[0, :3] = 1e3
        after = cached(module, config, x_BSD, padding_B, [4, 1, 1])
    assert torch.equal(before[0, 3:], after[0, 3:]) and torch.equal(before[1], after[1])


def test_bf16_absorbed_is_near_the_exact_one() -> None:
    config = tiny_config(q_lora_rank=5)
    exact, rounded = attention(config), attention(config, torch.bfloat16)
    x_BSD = inputs(config, 2, 6)
    with torch.no_grad():
        wanted = exact(x_BSD, *turns(config, torch.arange(6).expand(2, 6)))
        no_padding_B = torch.zeros(2, dtype=torch.int64)
        got = cached(rounded, config, x_BSD.bfloat16(), no_padding_B, [4, 2], torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).abs().max() < 4e-2 * wanted.abs().max()


def test_absorption_never_expands_keys_or_values() -> None:
    """No tensor of L x N x head numbers: what makes decoding cheap at long contexts."""
    config = tiny_config(num_attention_heads=4)
    module = attention(config)
    length, heads = 64, 4
    x_BSD = inputs(config, 1, length)
    cache = LatentCache(1, length + 1, config, torch.zeros(1, dtype=torch.int64), torch.float64)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in stored:
                    sizes.append(leaf.numel())
            return out

    with torch.no_grad():
        module(x_BSD, *turns(config, torch.arange(length).unsqueeze(0)), cache=cache)
        stored = {
            tensor.untyped_storage().data_ptr() for tensor in (cache.kept_BMX, *module.parameters())
        }
        with Watch():
            module(x_BSD[:, :1], *turns(config, torch.tensor([[length]])), cache=cache)
    assert len(sizes) > 20, "the watch saw nothing"
    keys = (length + 1) * heads * min(config.qk_nope_head_dim, config.v_head_dim)
    scores = (length + 1) * heads
    assert scores in sizes and max(sizes) < keys


def test_attention_stays_inside_its_document() -> None:
    """Two documents packed equal the two alone, at positions that start again."""
    config = tiny_config(q_lora_rank=5)
    module = attention(config)
    x_BSD = inputs(config, 1, 7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        packed = module(x_BSD, *turns(config, positions), documents)
        for part in (slice(0, 3), slice(3, 7)):
            alone = module(x_BSD[:, part], *turns(config, positions[:, part]))
            torch.testing.assert_close(packed[:, part], alone, rtol=1e-11, atol=1e-12)
        open_stream = module(x_BSD, *turns(config, positions))
        assert (open_stream[:, 3:] - packed[:, 3:]).abs().max() > 1e-3


def test_by_its_equations() -> None:
    """Eq 1-11, head by head, on a sequence of three."""
    config = tiny_config(q_lora_rank=5, num_attention_heads=2)
    module = attention(config)
    x_BSD = inputs(config, 1, 3)
    nope, rope, value = 8, 4, 6
    positions_BS = torch.arange(3).unsqueeze(0)
    cos, sin = (t[0] for t in rotation(positions_BS, rope, 10000.0, None, torch.float64))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)

    with torch.no_grad():
        x = x_BSD[0]
        q = norm(x @ module.wq_a.weight.T, module.q_norm.weight) @ module.wq_b.weight.T
        down = x @ module.wkv_a.weight.T
        latent, k_rope = norm(down[:, :8], module.kv_norm.weight), turn(down[:, 8:])
        kv = latent @ module.wkv_b.weight.T
        heads = []
        for head in range(2):
            q_h = q[:, head * 12 : (head + 1) * 12]
            kv_h = kv[:, head * 14 : (head + 1) * 14]
            q_h = torch.cat((q_h[:, :nope], turn(q_h[:, nope:])), dim=1)
            k_h = torch.cat((kv_h[:, :nope], k_rope), dim=1)
            scores = q_h @ k_h.T / (nope + rope) ** 0.5
            scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ kv_h[:, nope : nope + value])
        wanted = torch.cat(heads, dim=1) @ module.wo.weight.T
        got = module(x_BSD, *turns(config, positions_BS))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


def test_the_query_latent_is_optional() -> None:
    names = {name for name, _ in build_attention(tiny_config()).named_parameters()}
    assert "wq.weight" in names and not names & {"wq_a.weight", "wq_b.weight", "q_norm.weight"}
    names = {name for name, _ in build_attention(tiny_config(q_lora_rank=5)).named_parameters()}
    assert {"wq_a.weight", "wq_b.weight", "q_norm.weight"} < names and "wq.weight" not in names


def test_no_dropout_and_no_bias() -> None:
    module = attention(tiny_config(q_lora_rank=5))
    assert not [name for name, _ in module.named_parameters() if name.endswith("bias")]
    x_BSD = inputs(tiny_config(), 1, 5)
    rotation = turns(tiny_config(), torch.arange(5).unsqueeze(0))
    assert torch.equal(module.train()(x_BSD, *rotation), module.eval()(x_BSD, *rotation))
