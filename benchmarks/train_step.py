"""One training step and one decoding step against Hugging Face transformers, same weights.

    make bench

Both sides run in turn in one process, A B A B ..., so that a machine whose speed drifts slows both
alike; the figure is the median of the ratios, pair by pair. The peer runs as it is best on a CPU:
grouped_mm experts and SDPA attention.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging as transformers_logging

from deepseek.config.schema import ModelConfig
from deepseek.inference.generation import LatentCache
from deepseek.interop.hf_config import hf_config
from deepseek.interop.huggingface import to_hf
from deepseek.models.transformer import Transformer

PAIRS = 5
BATCH, LENGTH = 2, 512
CACHED = 512

MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=1408,
    moe_intermediate_size=256,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.02,
    moe_aux_loss_coeff=0.0,
)


def main() -> None:
    """Print one JSON object."""
    ours, theirs = build()
    result: dict[str, Any] = {
        "model": "4 layers, 512 wide, 32 experts top-4, fp32",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "train": compare(train_step(ours, our_loss), train_step(theirs, their_loss)),
        "decode_batch_1": compare(our_decode(ours, 1), their_decode(theirs, 1)),
        "decode_batch_8": compare(our_decode(ours, 8), their_decode(theirs, 8)),
        "load_after": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))


def build() -> tuple[Transformer, Any]:
    """The same weights on both sides."""
    transformers_logging.set_verbosity_error()
    ours = Transformer(MODEL)
    ours.init_weights(seed=1)
    config = hf_config(MODEL) | {"attn_implementation": "sdpa"}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    theirs.set_experts_implementation("grouped_mm")
    theirs.load_state_dict(to_hf(ours.state_dict(), MODEL, layout="stacked"))
    return ours, theirs


def compare(ours: Callable[[], None], theirs: Callable[[], None]) -> dict[str, float]:
    """Seconds of each side, and how many times faster ours is."""
    pairs = []
    for number in range(PAIRS + 1):
        pair = seconds(ours), seconds(theirs)
        if number:  # the first warms up
            pairs.append(pair)
    return {
        "ours_s": round(statistics.median(a for a, _ in pairs), 4),
        "transformers_s": round(statistics.median(b for _, b in pairs), 4),
        "times_faster": round(statistics.median(b / a for a, b in pairs), 3),
    }


def seconds(call: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def train_step(model: Any, loss: Callable[[Any, Tensor], Tensor]) -> Callable[[], None]:
    """Forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        tokens_BS = torch.randint(0, MODEL.vocab_size, (BATCH, LENGTH), generator=generator)
        loss(model, tokens_BS).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_loss(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """Mean next-token loss, the balance loss off as on the other side."""
    hidden = model.hidden_states(tokens_BS, model.context(tokens_BS))
    return model.head.loss_sum(hidden.main_BSD, tokens_BS.roll(-1, 1)) / tokens_BS.numel()


def their_loss(model: Any, tokens_BS: Tensor) -> Tensor:
    """Mean next-token loss."""
    logits_BSV = model(tokens_BS, use_cache=False).logits
    labels_BS = tokens_BS.roll(-1, 1)
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())


def our_decode(model: Transformer, batch: int) -> Callable[[], None]:
    """Eight tokens after ``CACHED`` cached ones."""
    tokens_BS = torch.randint(0, MODEL.vocab_size, (batch, CACHED))

    @torch.no_grad()
    def decode() -> None:
        for cache in caches:
            cache.length = CACHED
        for i in range(8):
            place = torch.full((batch, 1), CACHED + i)
            model.last_logits(tokens_BS[:, :1], place, caches)

    padding = torch.zeros(batch, dtype=torch.int64)
    caches = [LatentCache(batch, CACHED + 8, MODEL, padding, torch.float32) for _ in model.layers]
    with torch.no_grad():
        positions_BS = torch.arange(CACHED).expand(batch, -1)
        model.last_logits(tokens_BS, positions_BS, caches)
    return decode


def their_decode(model: Any, batch: int) -> Callable[[], None]:
    """Eight tokens after ``CACHED`` cached ones."""
    from transformers import DynamicCache

    tokens_BS = torch.randint(0, MODEL.vocab_size, (batch, CACHED))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens_BS, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def decode() -> None:
        if (added := cache.get_seq_length() - CACHED) > 0:
            cache.crop(-added)
        for _ in range(8):
            model(tokens_BS[:, :1], past_key_values=cache, use_cache=True)

    return decode


if __name__ == "__main__":
    main()
