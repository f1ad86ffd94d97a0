"""Peak memory of a rank as Megatron-Core keeps it: bf16 weights, fp32 gradients, sharded moments.

Activations are those that each operation of a block keeps for its backward pass, as NVIDIA's
estimator for this model lists them (yanring/Megatron-MoE-ModelZoo, ``deepseek_mem_estimate.py``).
Nothing is fitted. The memory of ``train`` is in ``config/rank_need.py``: it keeps fp32 weights.
"""

from __future__ import annotations

from typing import NamedTuple

from deepseek.planner.job import Job
from deepseek.planner.layer_time import EIGHT_BITS


class Need(NamedTuple):
    """Bytes of the rank that needs most."""

    states: float
    """Weights, gradients, moments."""
    activations: float
    """Of micro-batches in flight, and logits."""

    @property
    def total(self) -> float:
        """Both."""
        return self.states + self.activations


def peak_bytes(job: Job) -> Need:
    """Of the worst rank."""
    return max((rank_bytes(job, rank) for rank in range(job.ranks.pp)), key=lambda need: need.total)


def rank_bytes(job: Job, rank: int) -> Need:
    """Of one place of the pipeline."""
    arch, ranks = job.architecture, job.ranks
    pp = ranks.pp
    chunks = len(job.held[rank])
    if job.schedule == "DualPipe":
        flights = [float(pp - rank), float(rank + 1)]
    else:
        begun = pp - rank if chunks == 1 else (chunks - 1) * pp + 2 * (pp - 1 - rank) + 1
        flights = [min(begun, job.micro_batches * chunks) / chunks] * chunks
    held = [(job.stages[s], flying) for s, flying in zip(job.held[rank], flights, strict=True)]
    states = activations = 0.0
    moments = 4 if job.precision == "fp8" and job.system.name == "deepseek" else 8
    for stage, flying in held:
        blocks = stage.dense + stage.moe + stage.mtp
        dense = (
            stage.dense * arch.block_size[False]
            + (stage.moe + stage.mtp) * arch.block_size[True]
            + blocks * 2 * arch.hidden
            + stage.mtp * 2 * arch.hidden**2
            + (stage.embedding + bool(stage.head and stage.head > stage.mtp))
            * arch.vocab
            * arch.hidden
        ) / ranks.tp
        experts = (stage.moe + stage.mtp) * arch.experts * arch.expert_size / ranks.ep
        whole = 0 if job.system.gathers_weights else 6  # FSDP shards weights and gradients, too
        sharded = 10 + moments - whole
        states += dense * (whole + sharded / (ranks.dp * ranks.cp))
        states += experts * (whole + sharded / ranks.expert_dp)
        activations += flying * (
            stage.dense * block_bytes(job, False) + (stage.moe + stage.mtp) * block_bytes(job, True)
        )
    # At the peak either the loss works on logits in bf16 and fp32, or a block goes backward: its
    # experts' gradients, before those of what it kept are gone.
    tokens = job.micro_batch * job.seq_length / ranks.cp / ranks.tp
    logits = 6 * tokens * arch.vocab * any(job.stages[s].head for s in job.held[rank])
    routed = any(job.stages[s].moe for s in job.held[rank])
    working = tokens * arch.top_k * (2 * arch.hidden + 6 * arch.expert_ffn) * routed
    return Need(states, activations + max(logits, working))


def block_bytes(job: Job, moe: bool) -> float:
    """What one block keeps of one micro-batch."""
    arch, ranks = job.architecture, job.ranks
    tokens = job.micro_batch * job.seq_length / ranks.cp
    hidden = 2 * arch.hidden / ranks.tp
    if job.recompute == "full":
        return tokens * hidden
    # What a product takes in is kept for its weights' gradient as it was multiplied: in 8 bits too.
    taken = 1 if job.precision in EIGHT_BITS else 2
    saved = job.recompute == "selective"
    heads = arch.heads / ranks.tp
    keys = (arch.heads if arch.kv_lora else arch.kv_heads) / ranks.tp
    total = 2 * hidden + (0 if saved else 2 * hidden * taken / 2)  # streams, and both normed
    total += (2 + taken) * (arch.q_lora + arch.kv_lora)  # latents, and normed
    total += taken * heads * arch.v_dim + 4 * heads  # attention's output and its sums
    if not (saved and arch.kv_lora):
        total += 2 * heads * arch.qk_dim + 2 * keys * (arch.qk_dim + arch.v_dim)
    width = (arch.shared * arch.expert_ffn if moe else arch.dense_ffn) / ranks.tp
    total += width * (4 + (0 if saved else taken))
    if moe:
        each = arch.top_k / ranks.tp
        total += 10 * arch.experts / ranks.tp
        total += each * (taken * arch.hidden + 4 * arch.expert_ffn)
        if not saved:
            total += each * (taken * arch.expert_ffn + 2 * arch.hidden)
        total += hidden * taken / 2 if arch.shared and not saved else 0
    return tokens * total
