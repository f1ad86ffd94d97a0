"""The shipped scaling examples on a CPU: with the overrides that their own headers give."""

from __future__ import annotations

import re

from deepseek.config.load import CONFIGS

PROCESSES = {
    "deepseek_v3_2gpu": 2,
    "deepseek_v3_distributed": 4,
    "deepseek_v3_8gpu": 8,
    "deepseek_v3_32gpu": 32,
}
QUICK = [
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "trainer.precision=32",
    "model.micro_batch_size=2",
    "model.global_batch_size=32",
    "model.intermediate_size=64",
    "model.moe_intermediate_size=32",
    "model.num_attention_heads=4",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=32",
    "model.data.seq_length=32",
    "model.data.num_workers=0",
    "exp_manager.monitor.peak_tflops=0.1",
]
"""On top: fewer tokens and narrower layers, so that a test can afford them. 32 sequences in 2 to 8
micro-batches, whatever the layout; fp32, in which layouts agree to 1e-5, whatever the CPU is fast
at."""


def header_overrides(name: str) -> list[str]:
    """The settings of ``To try it ...`` in the comment at the top of a shipped configuration."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    match = re.search(rf"^# To try it.*?^#   deepseek train --config {name} (.*?)\n(?!#  )", text,
                      re.MULTILINE | re.DOTALL)  # fmt: skip
    assert match, f"{name} does not say how to try it"
    words = match[1].replace("#", " ").split()
    assert all("=" in word for word in words), words
    return words


ALONE = [
    "trainer.devices=1",
    "trainer.num_nodes=1",
    "model.tensor_model_parallel_size=1",
    "model.pipeline_model_parallel_size=1",
    "model.expert_model_parallel_size=1",
]
"""The same model and batch in one process."""
