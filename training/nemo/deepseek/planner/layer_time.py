"""Seconds of one block, and of what stands around the blocks, on one GPU for one micro-batch.

    product        FLOPs / (peak x share) + its weights' bytes / memory + a fixed start
    attention      FLOPs / (bf16 peak x share); the backward pass at a share of its own
    glue           bytes that norms, activations, casts, permutations move / memory
    all-to-all     bytes to other domains / network, bytes inside / NVLink, the larger

Shares of the peak are those of NVIDIA's published kernel tables (``aiconfigurator-core`` 0.12.0,
4096 rows) and of DeepSeek's profile (github.com/deepseek-ai/profile-data); what is fitted is in
``Efficiency`` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from deepseek.planner.architecture import Architecture, Product
from deepseek.planner.flops import scores_per_token
from deepseek.planner.hardware import Gpu
from deepseek.planner.job import Job, System

START = 6e-6
"""Seconds that a product loses at its begin and end, whatever its size."""


@dataclass(frozen=True)
class Efficiency:
    """The constants that are fitted to published runs."""

    products: float = 0.9
    """Of what a product alone reaches, the share that it reaches in a step."""
    memory: float = 0.75
    """Share of the memory's peak that glue reaches."""
    network: float = 0.85
    """Share of the links' peak that exchanges reach."""


FITTED = Efficiency()


class Parts(NamedTuple):
    """Seconds by what takes them; the last two are not on the compute units."""

    products: float = 0.0
    attention: float = 0.0
    experts: float = 0.0
    glue: float = 0.0
    all_to_all: float = 0.0
    other_links: float = 0.0

    def __add__(self, other: Parts) -> Parts:  # type: ignore[override]
        return Parts(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> Parts:  # type: ignore[override]
        return Parts(*(times * a for a in self))

    @property
    def compute(self) -> float:
        """On the compute units."""
        return self.products + self.attention + self.experts + self.glue


class BlockTime(NamedTuple):
    """Of one micro-batch."""

    forward: Parts
    backward: Parts
    """Gradients of inputs and weights, and what is recomputed."""
    weight: float
    """Seconds of the backward pass that are gradients of weights."""


class StageParts(NamedTuple):
    """What stages are put together from."""

    dense: BlockTime
    moe: BlockTime
    head: BlockTime
    mtp: BlockTime
    """A module without its pass through the head."""


def stage_parts(job: Job, gpu: Gpu, efficiency: Efficiency = FITTED) -> StageParts:
    """Times of all kinds of blocks of a job; cached, for what they depend on."""
    ranks = job.ranks
    return _stage_parts(
        job.architecture,
        job.seq_length,
        job.micro_batch,
        ranks.tp,
        ranks.cp,
        ranks.ep,
        job.precision,
        job.recompute,
        job.imbalance,
        job.system,
        gpu,
        efficiency,
    )


@lru_cache(maxsize=65536)
def _stage_parts(
    arch: Architecture,
    seq_length: int,
    micro_batch: int,
    tp: int,
    cp: int,
    ep: int,
    precision: str,
    recompute: str,
    imbalance: float,
    system: System,
    gpu: Gpu,
    efficiency: Efficiency,
) -> StageParts:
    tokens = micro_batch * seq_length / cp
    at = _At(
        arch, tokens, seq_length, tp, cp, ep, precision, imbalance, gpu, efficiency, system.glue
    )
    dense, moe = (at.block(m, recompute) for m in (False, True))
    head = at.head()
    joined = at.products((Product(2 * arch.hidden, arch.hidden),), tokens / tp)
    mtp = BlockTime(
        moe.forward + Parts(products=joined),
        moe.backward + Parts(products=2 * joined),
        moe.weight + joined,
    )
    return StageParts(dense, moe, head, mtp)


class _At(NamedTuple):
    """Where and on how much a block works."""

    arch: Architecture
    tokens: float
    """Of a micro-batch, over the ranks of TP."""
    seq_length: int
    tp: int
    cp: int
    ep: int
    precision: str
    imbalance: float
    gpu: Gpu
    efficiency: Efficiency
    glue: float

    def rate(self) -> tuple[float, int]:
        """FLOP/s of large products, and bytes of a number of their weights."""
        return product_rate(self.gpu, self.precision) * self.efficiency.products, {
            "fp32": 4,
            "bf16": 2,
        }.get(self.precision, 1)

    def products(self, matrices: tuple[Product, ...], rows: float, split: int = 1) -> float:
        """Seconds of one pass through matrices, of which each rank of ``split`` has its part."""
        rate, number = self.rate()
        return sum(
            2 * rows * matrix.size / split / rate
            + START
            + number * matrix.size / split / self.gpu.hbm
            for matrix in matrices
        )

    def block(self, moe: bool, recompute: str) -> BlockTime:
        arch, gpu, tokens, tp = self.arch, self.gpu, self.tokens, self.tp
        plain = self.products((*arch.attention, *arch.feed_forward(moe)), tokens, tp)
        flops = 4 * tokens * scores_per_token(arch, self.seq_length, causal=True) / tp
        forward_share, backward_share = attention_shares(gpu)
        attention = flops / 2 / (gpu.bf16 * forward_share)
        attention_back = 2.5 * flops / 2 / (gpu.bf16 * backward_share)
        experts, exchange = 0.0, 0.0
        if moe:
            held = arch.experts / self.ep
            rows = tokens / tp * arch.top_k * self.imbalance
            rate, number = self.rate()
            experts = sum(
                2 * rows * matrix.size / rate
                + START * max(1.0, held / 8)
                + number * held * matrix.size / gpu.hbm
                for matrix in arch.expert
            )
            exchange = self.exchange()
        glue = self.glue_bytes(moe) * self.glue / (gpu.hbm * self.efficiency.memory)
        links = 0.0
        if tp > 1:
            bytes_ = 2 * tokens * arch.hidden * (tp - 1) / tp
            links = (
                4
                * bytes_
                / ((gpu.nvlink if tp <= gpu.domain else gpu.network) * self.efficiency.network)
            )
        forward = Parts(plain, attention, experts, glue / 3, exchange, links / 2)
        backward = Parts(2 * plain, attention_back, 2 * experts, glue * 2 / 3, exchange, links / 2)
        if recompute == "full":
            backward += forward
        elif recompute == "selective":
            backward += Parts(products=0.15 * plain, glue=0.5 * forward.glue)
        return BlockTime(forward, backward, plain + experts)

    def exchange(self) -> float:
        """Seconds of one dispatch and one combine."""
        arch, gpu, ep = self.arch, self.gpu, self.ep
        if ep == 1:
            return 0.0
        tokens = self.tokens / self.tp
        domain = min(gpu.domain, ep)
        domain = 1 << (int(domain).bit_length() - 1)
        nodes = max(1, ep // domain)
        sent = (1 if self.precision in ("fp8",) else 2) + 2
        per_token = sent * arch.hidden
        limit = arch.top_groups * nodes / arch.groups if arch.groups > 1 else nodes
        reached = min(limit, nodes * (1 - (1 - 1 / nodes) ** arch.top_k))
        remote = tokens * per_token * reached * (nodes - 1) / nodes
        inside = tokens * per_token * min(arch.top_k, ep) * (domain - 1) / domain
        share = self.efficiency.network
        return max(remote / (gpu.network * share), inside / (gpu.nvlink * share)) + 40e-6

    def glue_bytes(self, moe: bool) -> float:
        """Bytes that a block's forward and backward pass move outside its products."""
        arch = self.arch
        wide = 30 * arch.hidden
        heads = 14 * arch.heads * (arch.qk_dim + arch.v_dim)
        width = (arch.shared if moe else 1) * (arch.expert_ffn if moe else arch.dense_ffn)
        inner = 24 * width
        routed = arch.top_k * (24 * arch.hidden + 24 * arch.expert_ffn) if moe else 0
        cast = 1.3 if self.precision in ("fp8", "mxfp8") else 1.0
        return 2 * cast / 2 * self.tokens / self.tp * (wide + heads + inner + routed)

    def head(self) -> BlockTime:
        arch, tokens, tp = self.arch, self.tokens, self.tp
        rate = product_rate(self.gpu, "fp32" if self.precision == "fp32" else "bf16")
        rate *= self.efficiency.products
        product = 2 * tokens * arch.vocab * arch.hidden / tp / rate
        glue = 12 * tokens * arch.vocab / tp / (self.gpu.hbm * self.efficiency.memory)
        return BlockTime(
            Parts(products=product, glue=glue / 2),
            Parts(products=2 * product, glue=glue / 2),
            product,
        )


def product_rate(gpu: Gpu, precision: str) -> float:
    """FLOP/s of a large product alone."""
    blackwell = "B" in gpu.name
    if precision == "fp32":
        return gpu.bf16 * 0.35
    if precision == "bf16" or gpu.fp8 == gpu.bf16:
        return gpu.bf16 * (0.66 if blackwell else 0.8)
    return gpu.fp8 * (0.6 if blackwell else 0.6)


def attention_shares(gpu: Gpu) -> tuple[float, float]:
    """Shares of the bf16 peak that attention reaches forward and backward, the mask's half not
    counted."""
    return (0.56, 0.46) if "B" not in gpu.name else (0.6, 0.45)
