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

import math
from functools import lru_cache
from typing import NamedTuple

from deepseek.config.cost import domains_of_token
from deepseek.planner.architecture import Architecture, Product
from deepseek.planner.flops import scores_per_token
from deepseek.planner.hardware import Device, Efficiency
from deepseek.planner.job import Job, System

MEMORY = 0.75
"""Share of the memory's peak that glue reaches."""
NVLINK, NETWORK = 0.75, 0.88
"""Shares of the links' peaks that exchanges reach: arXiv:2603.07685 table 7, 8 to 64 GPUs."""
CAST = 1.9
"""Glue of fp8 in that of bf16: 8.3 ms of a block in DeepSeek's profile, 3.9 of them casts."""
START = 20e-6
"""Seconds that a product loses at its begin and end, whatever its size: what makes fp8 kernels of
164 GFLOP slower than those of 1,000 in the same tables, 10 to 50 us."""
LAUNCH = 0.55e-3
"""Seconds in which a host launches one expert's kernels in 8 bits, forward and backward, in January
2026; half as many in bf16. A block of Qwen3-30B with 16 experts took a B200 8.8 ms with 4096 tokens
(Megatron-Bridge 26.02) and 12.6 with 16384 (26.04.01): the host's time, then the GPU's."""
FP8_ATTENTION = 1.2
"""Rate of attention in 8 bits over bf16's, on B300 and GB300, in the same tables."""
EIGHT_BITS = ("fp8", "mxfp8", "nvfp4")
"""Precisions whose products take operands of 8 bits or fewer, cast before."""
EXCHANGE_START = 80e-6
"""Seconds of the experts' dispatch and combine that carry nothing."""


FITTED = Efficiency(0.802, 0.523, 0.454, 1.08e-3)
"""As ``benchmarks/fit_planner.py`` found them on ``fitted_rows.py``'s rows."""


class Breakdown(NamedTuple):
    """Seconds by what takes them; the last three are not on the compute units."""

    products: float = 0.0
    attention: float = 0.0
    experts: float = 0.0
    glue: float = 0.0
    host: float = 0.0
    all_to_all: float = 0.0
    other_links: float = 0.0
    beside: float = 0.0
    """Exchange that the block's own shared experts hide; not in ``all_to_all``."""

    def __add__(self, other: Breakdown) -> Breakdown:  # type: ignore[override]
        return Breakdown(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> Breakdown:  # type: ignore[override]
        return Breakdown(*(times * a for a in self))

    @property
    def compute(self) -> float:
        """On the compute units."""
        return self.products + self.attention + self.experts + self.glue + self.host


class BlockTime(NamedTuple):
    """Of one micro-batch."""

    forward: Breakdown
    backward: Breakdown
    """Gradients of inputs and weights, and what is recomputed."""
    weight: float
    """Seconds of the backward pass that are gradients of weights."""


class BlockTimes(NamedTuple):
    """What stages are put together from."""

    dense: BlockTime
    moe: BlockTime
    head: BlockTime
    mtp: BlockTime
    """A module without its pass through the head."""


def block_times(job: Job, device: Device, efficiency: Efficiency | None = None) -> BlockTimes:
    """Times of all kinds of blocks of a job; cached, for what they depend on."""
    ranks = job.ranks
    if device.cpu:
        return device.cpu.block_times(job)
    return _block_times(
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
        device,
        efficiency or FITTED,
    )


@lru_cache(maxsize=65536)
def _block_times(
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
    device: Device,
    efficiency: Efficiency,
) -> BlockTimes:
    tokens = micro_batch * seq_length / cp
    at = _At(arch, tokens, seq_length, tp, cp, ep, precision, imbalance, device, efficiency, system)
    dense, moe = (at.block(m, recompute) for m in (False, True))
    head = at.head()
    joined, _ = at.products((Product(2 * arch.hidden, arch.hidden),), tokens / tp)
    mtp = BlockTime(
        moe.forward + Breakdown(products=joined),
        moe.backward + Breakdown(products=2 * joined),
        moe.weight + joined,
    )
    return BlockTimes(dense, moe, head, mtp)


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
    device: Device
    efficiency: Efficiency
    system: System

    def rate(self, precision: str) -> float:
        """FLOP/s of large products in a step."""
        return product_rate(self.device, precision) * self.efficiency.products

    def products(
        self, matrices: tuple[Product, ...], rows: float, split: float = 1, copies: float = 1
    ) -> tuple[float, float]:
        """Seconds of the forward pass through matrices, and of their weights' gradients.

        Args:
            matrices: one after the other.
            rows: of all copies together.
            split: ranks among which a matrix is divided.
            copies: of each matrix, the experts of a rank, which share the rows.
        """
        rate, hbm = self.rate(self.precision), self.device.hbm * MEMORY
        start = START * (copies if self.system.loops_experts else 1)
        number = {"fp32": 4, "bf16": 2}.get(self.precision, 1)
        forward = weight = 0.0
        for matrix in matrices:
            size = matrix.size / split
            flops = 2 * rows * size / rate
            passed = rows * (matrix.inner + matrix.outer / split)
            forward += start + max(flops, (number * (copies * size + passed)) / hbm)
            # Gradients of weights are added to fp32 sums, read and written at a product's end.
            weight += start + max(flops, number * passed / hbm) + 8 * copies * size / hbm
        return forward, weight

    def extra(self) -> float:
        """Glue of the program, in that of DeepSeek's own kernels."""
        return 1.0 if self.system.tuned else self.efficiency.glue * self.younger()

    def younger(self) -> float:
        """Glue and host time of the program's release, in those of January 2026."""
        return math.exp(-self.efficiency.trend * (self.system.release - 26))

    def block(self, moe: bool, recompute: str) -> BlockTime:
        arch, device, tokens, tp = self.arch, self.device, self.tokens, self.tp
        plain, weight = self.products((*arch.attention, *arch.feed_forward(moe)), tokens, tp)
        flops = 4 * tokens * scores_per_token(arch, self.seq_length, causal=True) / tp
        longer = 1.19 * self.seq_length / (self.seq_length + 768)
        attention = flops / 2 / (device.bf16 * device.attention_share * longer)
        attention_back = 2.5 * flops / 2 / (device.bf16 * device.attention_back_share * longer)
        experts, weights, there, home = 0.0, 0.0, 0.0, 0.0
        if moe:
            rows = tokens / tp * arch.top_k * self.imbalance
            experts, weights = self.products(arch.expert, rows, copies=arch.experts / self.ep)
            there, home = self.exchange()
        hidden = hidden_back = 0.0
        if self.system.shared_beside:  # rows on their way, and gradients of rows on theirs
            shared, of_weights = self.products(arch.feed_forward(moe), tokens, tp)
            hidden, hidden_back = min(there, shared), min(home, shared + of_weights)
        glue = self.glue_bytes(moe) * self.extra() / (device.hbm * MEMORY)
        if self.system.fp8_attention:
            attention, attention_back = attention / FP8_ATTENTION, attention_back / FP8_ATTENTION
        host = 0.0
        if moe and not (self.system.tuned or self.system.graphs):
            busy = 2 * (plain + experts) + weight + weights + attention + attention_back + glue
            host = self.host(busy)
        links = 0.0
        if tp > 1:
            number = 4 if self.precision == "fp32" else 2
            bytes_ = number * tokens * arch.hidden * (tp - 1) / tp
            near = tp <= device.domain
            links = 4 * bytes_ / (NVLINK * device.nvlink if near else NETWORK * device.network)
        if self.cp > 1:  # each rank gathers the keys and values, or the latents, of its sequence
            width = arch.kv_lora + arch.rope_dim or arch.kv_heads * (arch.qk_dim + arch.v_dim) / tp
            sent = 2 * tokens * (self.cp - 1) * width
            near = tp * self.cp <= device.domain
            links += 2 * sent / (NVLINK * device.nvlink if near else NETWORK * device.network)
        exchange = there + home
        forward = Breakdown(
            plain, attention, experts, glue / 3, host / 3, exchange - hidden, links / 2, hidden
        )
        backward = Breakdown(
            plain + weight,
            attention_back,
            experts + weights,
            glue * 2 / 3,
            host * 2 / 3,
            exchange - hidden_back,
            links / 2,
            hidden_back,
        )
        if recompute == "full":
            backward += forward
            if self.system.drops_last_product:
                backward += Breakdown(experts=-experts / 3, all_to_all=-home)
        elif recompute == "selective":
            expanded, _ = self.products(arch.expansions, tokens, tp)
            backward += Breakdown(products=expanded, glue=0.2 * forward.glue)
        return BlockTime(forward, backward, weight + weights)

    def host(self, busy: float) -> float:
        """Seconds of a block in which a GPU waits for its host: for the numbers of rows, and where
        launches of each expert's kernels take longer than the ``busy`` seconds of the GPU."""
        launches = 0.0
        if self.system.loops_experts:
            number = 1.0 if self.precision in EIGHT_BITS else 0.5
            launches = number * LAUNCH * self.arch.experts / self.ep * self.younger()
        return self.efficiency.host * self.younger() + max(0.0, launches - busy)

    def exchange(self) -> tuple[float, float]:
        """Seconds of one dispatch and of one combine."""
        far, near = sent_to_experts(
            self.arch, self.device, self.ep, self.tokens / self.tp, self.precision, self.system
        )
        if not near:
            return 0.0, 0.0
        over_network = far * self.imbalance / (self.device.network * NETWORK)
        over_nvlink = near * self.imbalance / (self.device.nvlink * NVLINK)
        seconds = max(over_network, over_nvlink) + EXCHANGE_START
        there, home = 1.0, 1.0
        if self.system.dispatches_fp8:
            there, home = bytes_of_ways(self.precision, self.system)
        return seconds * there / (there + home), seconds * home / (there + home)

    def glue_bytes(self, moe: bool) -> float:
        """Bytes that a block's forward and backward pass move outside its products."""
        arch = self.arch
        wide = 30 * arch.hidden
        heads = 14 * arch.heads * (arch.qk_dim + arch.v_dim)
        width = (arch.shared if moe else 1) * (arch.expert_ffn if moe else arch.dense_ffn)
        inner = 24 * width
        routed = arch.top_k * (24 * arch.hidden + 24 * arch.expert_ffn) if moe else 0
        packed = 0.0
        if moe and self.system.dispatches_fp8:  # and unpacked, in both passes
            packed = 4 * arch.top_k * arch.hidden * sum(bytes_of_ways(self.precision, self.system))
        cast = CAST if self.precision in EIGHT_BITS else 1.0
        return 1.03 * cast * self.tokens / self.tp * (wide + heads + inner + routed + packed)

    def head(self) -> BlockTime:
        arch, tokens, tp = self.arch, self.tokens, self.tp
        rate = self.rate("fp32" if self.precision == "fp32" else "bf16")
        product = 2 * tokens * arch.vocab * arch.hidden / tp / rate
        glue = 30 * tokens * arch.vocab / tp / (self.device.hbm * MEMORY)
        return BlockTime(
            Breakdown(products=product, glue=glue / 2),
            Breakdown(products=2 * product, glue=glue / 2),
            product,
        )


def sent_to_experts(
    arch: Architecture, device: Device, ep: int, tokens: float, precision: str, system: System
) -> tuple[float, float]:
    """Bytes that a GPU sends in one dispatch and one combine: over the network, and over NVLink.

    A token goes once to every domain that it has experts in, and there to each of their GPUs.

    Args:
        arch: how experts are chosen.
        device: has the size of a domain.
        ep: ranks that share the experts.
        tokens: of this GPU.
        precision: see ``bytes_of_ways``.
        system: may send a token to each of its experts instead, or dispatch in 8 bits.
    """
    if ep == 1:
        return 0.0, 0.0
    domain = min(ep, 1 << (device.domain.bit_length() - 1))
    domains = max(1, ep // domain)
    copy = tokens * arch.hidden * sum(bytes_of_ways(precision, system))
    if system.every_copy:
        return copy * arch.top_k * (1 - domain / ep), copy * arch.top_k * (domain - 1) / ep
    reached = domains_of_token(domains, arch.top_k, arch.groups, arch.top_groups)
    ranks = ep * (1 - (1 - 1 / ep) ** arch.top_k)
    return copy * reached * (domains - 1) / domains, copy * ranks * (domain - 1) / domain


def bytes_of_ways(precision: str, system: System) -> tuple[float, float]:
    """Of a number on its way to an expert, and home: bf16 or fp32, there also 8 bits with scales,
    as DeepSeek dispatches under fp8 and others where the program says so."""
    number = 4 if precision == "fp32" else 2
    usual = 1.03 if precision == "fp8" and system.tuned else number
    return 1 + 1 / 128 if system.dispatches_fp8 else usual, number


def product_rate(device: Device, precision: str) -> float:
    """FLOP/s of a large product alone; of fp32 those of the tensor cores' TF32, half of bf16's."""
    if precision == "fp32":
        return device.bf16 / 2 * device.product_share
    if precision == "bf16" or device.fp8 == device.bf16:
        return device.bf16 * device.product_share
    return device.fp8 * (device.fp4_share if precision == "nvfp4" else device.fp8_share)
