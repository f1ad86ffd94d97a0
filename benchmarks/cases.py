"""What is measured: models and batches, the same for every side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseek.config import load_config
from deepseek.config.schema import ModelConfig

SMALL = ModelConfig(
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
    max_position_embeddings=8192,
    initializer_range=0.02,
    moe_aux_loss_coeff=0.0,
)
WIDE = replace(
    SMALL,
    vocab_size=32000,
    hidden_size=768,
    num_hidden_layers=6,
    num_attention_heads=12,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=4608,
    moe_intermediate_size=768,
    num_experts_per_tok=6,
)
FINE = replace(
    SMALL,
    vocab_size=32000,
    num_hidden_layers=8,
    intermediate_size=1536,
    n_routed_experts=64,
    num_experts_per_tok=6,
)
LONG = replace(SMALL, max_position_embeddings=16384)
EIGHT = replace(SMALL, n_routed_experts=8, num_experts_per_tok=4, n_group=1, topk_group=1)
CHARACTERS = load_config("shakespeare_char").model


@dataclass(frozen=True)
class Case:
    """What all sides do."""

    name: str
    model: ModelConfig
    batch: int
    length: int
    """Of a training sequence, or of what is in the cache."""
    decodes: bool = False
    half: bool = False
    """In bf16 too."""
    peers: tuple[str, ...] = ()
    """Others than transformers."""
    apart: bool = False
    """Where the time of our step goes is told."""
    group: str = ""
    """Cases of one group take turns, too: their ratio is of one run."""
    repeats: int = 1
    """Steps that are timed as one."""

    @property
    def tokens(self) -> int:
        """Of one step, or of decoding."""
        return self.batch * (DECODED if self.decodes else self.length)

    def batches(self) -> Iterator[Tensor]:
        """Random tokens (batch, length), the same on every side."""
        generator = torch.Generator().manual_seed(0)
        sizes = self.batch, self.length
        while True:
            yield torch.randint(0, self.model.vocab_size, sizes, generator=generator)


DECODED = 8
"""Tokens of one measurement of decoding."""
CASES = [
    Case("S: 32 wide experts", WIDE, 2, 512, half=True, apart=True),
    Case("F: 64 fine experts", FINE, 4, 512, half=True, peers=("automodel",), apart=True),
    Case("sequence of 4,096", SMALL, 1, 4096),
    Case("8 experts", EIGHT, 2, 512, group="experts"),
    Case("128 experts", replace(EIGHT, n_routed_experts=128), 2, 512, apart=True, group="experts"),
    Case("decode, batch 1", SMALL, 1, 1024, decodes=True),
    Case("decode, batch 8", SMALL, 8, 1024, decodes=True),
    Case("decode, batch 32", SMALL, 32, 1024, decodes=True),
]
QUICK = [
    Case("small", SMALL, 2, 256, half=True, peers=("automodel",), apart=True),
    Case("decode, batch 4", SMALL, 4, 256, decodes=True),
]
DECODING = [
    Case(f"decode {length:,} x {batch}", LONG, batch, length, decodes=True)
    for length in (128, 1024, 8192)
    for batch in (1, 8, 32)
]
"""Context and batch."""
SHAKESPEARE = Case("characters", CHARACTERS, CHARACTERS.global_batch_size, 64, repeats=20)


def chosen(cases: list[Case], begins: list[str]) -> list[Case]:
    """Those whose names begin so; all, if nothing is asked for.

    Raises:
        ValueError: nothing begins so.
    """
    for words in begins:
        if not any(case.name.startswith(words) for case in cases):
            names = "; ".join(case.name for case in cases)
            raise ValueError(f"no case begins with {words!r}; there are: {names}")
    return [case for case in cases if not begins or case.name.startswith(tuple(begins))]
