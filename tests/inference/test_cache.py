"""The latent cache: its size, what it returns, and who may see what."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek.config.schema import ModelConfig
from deepseek.inference.generation import LatentCache

CONFIG = ModelConfig(kv_lora_rank=5, qk_rope_head_dim=2, num_attention_heads=64)


def cache(padding: list[int], capacity: int, dtype: torch.dtype = torch.float32) -> LatentCache:
    return LatentCache(len(padding), capacity, CONFIG, torch.tensor(padding), dtype)


def test_numbers_per_token() -> None:
    """kv_lora_rank + qk_rope_head_dim per token, whatever the number of heads."""
    made = cache([0, 0, 0], 7, torch.bfloat16)
    tensors = [value for value in vars(made).values() if isinstance(value, torch.Tensor)]
    stored = [tensor for tensor in tensors if tensor.is_floating_point()]
    assert sum(tensor.numel() for tensor in stored) == 3 * 7 * (5 + 2)
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}


def test_numbers_per_token_of_deepseek_v3() -> None:
    """576 per token and layer: 70,272 bytes per token in bf16 over 61 layers, as published."""
    config = ModelConfig(kv_lora_rank=512, qk_rope_head_dim=64)
    made = LatentCache(1, 10, config, torch.tensor([0]), torch.bfloat16)
    assert made.kept_BMX.numel() / 10 * 2 * 61 == 70_272


@given(
    chunks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    padding=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    spare=st.integers(0, 3),
)
def test_append(chunks: list[int], padding: list[int], spare: int) -> None:
    """All stored so far, in order; a token sees its row's real slots up to itself."""
    length = sum(chunks)
    padding = [min(pad, length - 1) for pad in padding]
    made = cache(padding, length + spare)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(len(padding), length, 5, generator=generator)
    k_rope = torch.randn(len(padding), length, 2, generator=generator)
    start = 0
    for size in chunks:
        new = slice(start, start + size)
        start += size
        kept, visible = made.append(latent[:, new], k_rope[:, new])
        assert made.length == start
        assert torch.equal(kept, torch.cat((latent, k_rope), -1)[:, :start])
        if visible is None:
            assert size == 1 and not any(padding)
            continue
        assert visible.shape == (len(padding), size, start) and visible.dtype == torch.bool
        for row, pad in enumerate(padding):
            for token, slot in enumerate(range(new.start, new.stop)):
                seen = [other for other in range(start) if visible[row, token, other]]
                # a padding slot sees itself alone, so that its softmax is not empty
                wanted = list(range(pad, slot + 1)) if slot >= pad else [slot]
                assert seen == wanted
