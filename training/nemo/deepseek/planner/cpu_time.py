"""Seconds of one process of a CPU: how much of each kind of work there is, times its cost.

A CPU has no peak that products reach a share of. A product costs something for itself, for each of
its FLOPs, each number of its matrix, each number of its rows; so do scores, what lies between
products, and exchanges. ``deepseek calibrate`` finds these costs (``commands/cpu_speed.py``); here
is how much of what a step has. All of it follows the program: ``models/components``, ``ops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from deepseek.config.cost import CHUNK_TOKENS
from deepseek.planner.architecture import Architecture, Product
from deepseek.planner.job import Job
from deepseek.planner.layer_time import BlockTime, BlockTimes, Breakdown

QUERIES = 128
"""Of one block of scores; as ``ops/causal_attention.py``, whose block is this."""
NUMBER = 4
"""Bytes of fp32."""


class Work(NamedTuple):
    """Amounts of work in one direction, forward or backward; or the seconds of one of each."""

    flop: float = 0.0
    """Of products."""
    weight: float = 0.0
    """Numbers of matrices."""
    row: float = 0.0
    """Numbers that go into a product and come out of it."""
    product: float = 0.0
    """Products, whatever their size."""
    expert: float = 0.0
    """Experts with a product of their own within a grouped one."""
    score_flop: float = 0.0
    """Of attention's products, forward: backward has a cost of its own."""
    score: float = 0.0
    """Numbers of scores."""
    score_block: float = 0.0
    """Blocks of them."""
    block: float = 0.0
    """Blocks of the model, whatever their size, without what a MoE layer has besides."""
    number: float = 0.0
    """Activations that are read or written between products."""
    moe: float = 0.0
    """MoE layers, whatever their size."""
    choice: float = 0.0
    """Scores of the router."""
    row_order: float = 0.0
    """Rows of experts, that are put in order."""
    head: float = 0.0
    """Passes through head and loss, in chunks, whatever their size."""
    logit: float = 0.0
    """Logits."""
    table: float = 0.0
    """Numbers of weights that are read or written outside of products."""

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> Work:  # type: ignore[override]
        return Work(*(times * a for a in self))

    def seconds(self, costs: Work) -> float:
        """With the seconds of one of each."""
        return sum(a * b for a, b in zip(self, costs, strict=True))


class Passes(NamedTuple):
    """Work by what it is told as, of one direction."""

    products: Work = Work()
    attention: Work = Work()
    experts: Work = Work()
    glue: Work = Work()
    host: Work = Work()

    def __add__(self, other: Passes) -> Passes:  # type: ignore[override]
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))

    def parts(self, costs: Work, all_to_all: float = 0.0, other_links: float = 0.0) -> Breakdown:
        """In seconds."""
        products, attention, experts, glue, host = (work.seconds(costs) for work in self)
        return Breakdown(products, attention, experts, glue, host, all_to_all, other_links)

    @property
    def total(self) -> Work:
        """All of it."""
        return sum(self, Work())


BothWays = tuple[Passes, Passes]
"""Forward and backward."""


# -- what there is to do --


def product(rows: float, matrix: Product, split: float = 1, parts: float = 1) -> tuple[Work, Work]:
    """Rows through a matrix, of which ``split`` ranks have a part, in ``parts`` calls."""
    size, width = matrix.size / split, matrix.inner + matrix.outer / split
    forward = Work(flop=2 * rows * size, weight=size, row=rows * width, product=parts)
    return forward, forward * 2


def grouped(rows: float, matrix: Product, experts: float) -> tuple[Work, Work]:
    """Rows of some experts through a matrix of each."""
    forward = Work(
        flop=2 * rows * matrix.size,
        weight=experts * matrix.size,
        row=rows * (matrix.inner + matrix.outer),
        expert=experts,
    )
    return forward, forward * 2


def scores(sequences: float, queries: float, keys: float, heads: float, width: float) -> Work:
    """Causal attention of the last ``queries`` of so many keys, of either direction."""
    blocks = -(-queries // QUERIES)
    seen = keys - (queries - min(queries, QUERIES)) / 2
    pairs = sequences * heads * queries * seen
    return Work(score_flop=2 * pairs * width, score=pairs, score_block=blocks)


def block(
    arch: Architecture, moe: bool, sequences: float, length: int, tp: int, cp: int, ep: int
) -> BothWays:
    """A block, of a micro-batch of so many sequences on one rank."""
    tokens = sequences * length / cp
    here, heads = tokens / tp, arch.heads / tp
    forward, backward = Work(), Work()
    queries = arch.heads * arch.qk_dim
    keys_values = arch.heads * (arch.qk_dim - arch.rope_dim + arch.v_dim)
    matrices = [
        product(here, Product(arch.hidden, arch.kv_lora + arch.rope_dim)),
        product(tokens, Product(arch.kv_lora, keys_values), tp),
        product(tokens, Product(arch.heads * arch.v_dim, arch.hidden), tp),
        product(tokens, Product(arch.q_lora or arch.hidden, queries), tp),
    ]
    if arch.q_lora:
        matrices.append(product(here, Product(arch.hidden, arch.q_lora)))
    inner = arch.shared * arch.expert_ffn if moe else arch.dense_ffn
    if inner:
        matrices += [product(tokens, Product(arch.hidden, 2 * inner), tp, 2)]
        matrices += [product(tokens, Product(inner, arch.hidden), tp)]
    if moe:
        matrices.append(product(here, Product(arch.hidden, arch.experts)))
    for there, back in matrices:
        forward, backward = forward + there, backward + back
    attention = scores(sequences, length / cp, length, heads, arch.qk_dim + arch.v_dim)
    # Two norms and two sums; norms of latents; rotation, joining and turning of heads; SwiGLU.
    numbers = 20 * here * arch.hidden + 7 * tokens * (arch.q_lora + arch.kv_lora)
    numbers += tokens * heads * (6 * arch.qk_dim + 4 * arch.v_dim) + 5 * tokens * inner / tp
    glue, host, rows = Work(number=numbers), Work(block=1), (Work(), Work())
    if moe:
        count, routed = arch.experts / ep, here * arch.top_k
        wide_in, out = Product(arch.hidden, arch.expert_ffn), Product(arch.expert_ffn, arch.hidden)
        for matrix in (wide_in, wide_in, out):
            there, back = grouped(routed, matrix, count)
            rows = rows[0] + there, rows[1] + back
        numbers = routed * ((16 if ep > 1 else 10) * arch.hidden + 8 * arch.expert_ffn)
        glue += Work(number=numbers, choice=here * arch.experts, row_order=routed)
        host += Work(moe=1)
    return (
        Passes(forward, attention, rows[0], glue, host),
        Passes(backward, attention, rows[1], glue, host),
    )


def ends(arch: Architecture, sequences: float, length: int, tp: int, cp: int) -> BothWays:
    """Embedding, last norm, head and loss, whose gradients are made in the forward pass."""
    tokens, table = sequences * length / cp, arch.vocab * arch.hidden / tp
    chunks = -(-tokens // CHUNK_TOKENS)
    there, back = product(tokens, Product(arch.hidden, arch.vocab), tp)
    # Every chunk reads the matrix twice and adds to its gradient.
    products = (there + back)._replace(weight=4 * chunks * table, product=3 * chunks)
    glue = Work(logit=tokens * arch.vocab / tp, number=20 * tokens * arch.hidden, table=2 * table)
    back_glue = Work(number=12 * tokens * arch.hidden, table=4 * table)
    return (
        Passes(products=products, glue=glue, host=Work(head=chunks)),
        Passes(glue=back_glue, host=Work(head=chunks)),
    )


def joined(arch: Architecture, here: float) -> BothWays:
    """What an MTP module has before its block: two norms, a product, and the embedding again."""
    there, back = product(here, Product(2 * arch.hidden, arch.hidden))
    glue = Work(number=24 * here * arch.hidden)
    table = Work(table=4 * arch.vocab * arch.hidden)
    return Passes(there, glue=glue), Passes(back, glue=glue + table)


def again(arch: Architecture, forward: Passes, moe: bool, recompute: str) -> Passes:
    """Of a block's forward pass, what its backward pass does once more."""
    if recompute == "none":
        return Passes()
    if recompute == "selective":  # norms, latents' products, SwiGLU; wide products stay
        return Passes(forward.products * 0.2, glue=forward.glue * 0.6, host=forward.host * 0.6)
    last = 2 / 3 if moe else 1.0  # nothing behind the experts' last product is made again
    return forward._replace(experts=forward.experts * last)


# -- what it costs --


@dataclass(frozen=True)
class Links:
    """Exchanges of a group of processes of the machine, all groups at once."""

    ranks: int
    """Of a group."""
    shared: float
    """Seconds of gathering or adding up a sequence through shared memory, however short."""
    shared_byte: float
    """Seconds of each byte of the whole."""
    rows: float
    """Seconds of an all-to-all, however small."""
    rows_byte: float
    """Seconds of each byte that a rank sends to others."""
    sum: float
    """Seconds of an all-reduce, however small."""
    sum_byte: float
    """Seconds of each byte."""
    hop: float
    """Seconds of a message from one stage to the next, however small."""
    hop_byte: float
    """Seconds of each byte."""


@dataclass(frozen=True)
class Outside:
    """What a step has besides its passes."""

    update: float
    """Seconds of norm, clipping and optimiser for one number."""
    tensor: float
    """Seconds of the same for each weight, however small."""
    step: float
    """Seconds of the same, whatever the model."""
    around: float
    """Seconds between steps: the trainer, the data, the log."""
    unit: float
    """Seconds of a unit of FSDP that gathers its weights and adds up gradients, however small."""
    exchange: float
    """Seconds of gathering one number of weights, and adding up its gradient."""


@dataclass(frozen=True)
class Share:
    """What each process of a run has of a machine."""

    processes: int
    cores: int
    """That they share."""
    resident: float
    """Bytes of a process before it has a model."""
    forward: Work
    """Seconds of one of each, in the forward pass."""
    backward: Work
    outside: Outside
    links: tuple[Links, ...]
    """By the size of groups."""

    @property
    def crowded(self) -> float:
        """Processes of a core, at least one."""
        return max(1.0, self.processes / self.cores)

    def among(self, ranks: int) -> Links:
        """Exchanges of a group of so many."""
        return min(self.links, key=lambda links: abs(links.ranks - ranks))

    def block_times(self, job: Job) -> BlockTimes:
        """Seconds of all kinds of blocks; see ``layer_time.BlockTimes``."""
        ranks = job.ranks
        key = job.architecture, job.micro_batch, job.seq_length, ranks.tp, ranks.cp, ranks.ep
        return _block_times(self, *key, job.recompute)

    def hop(self, bytes_: float) -> float:
        """Seconds of so many bytes from one stage to the next."""
        links = self.among(2)
        return (links.hop + bytes_ * links.hop_byte) / self.crowded

    def outside_passes(
        self, job: Job, kept: float, dense: float, experts: float
    ) -> tuple[float, float]:
        """Seconds of the optimiser, and of what ranks exchange once a step.

        Args:
            job: the step.
            kept: numbers that the fullest rank updates.
            dense: numbers of it without routed experts, data parallelism not applied.
            experts: of routed experts, likewise.
        """
        ranks, costs, arch = job.ranks, self.outside, job.architecture
        most = max(job.held, key=lambda held: sum(sum(job.stages[s][:2]) for s in held))
        held = [job.stages[stage] for stage in most]
        blocks, moe = sum(s.dense + s.moe + s.mtp for s in held), sum(s.moe + s.mtp for s in held)
        tensors = 12 * blocks + 4 * moe + 3
        optimizer = kept * costs.update + tensors * costs.tensor + costs.step
        # Gradients of later micro-batches are added to those of the first.
        added = 3 * (dense + experts) * (job.micro_batches - 1) * self.backward.table * self.crowded
        optimizer += added
        if ranks.world == 1:
            return optimizer, 0.0
        # Units of FSDP wait for other ranks; those of one rank only copy, out and in.
        parted, of_experts = ranks.dp * ranks.cp > 1, ranks.expert_dp > 1
        gathered = dense * (1.0 if parted else 0.5) + experts * of_experts
        units = (blocks + 1 if ranks.pp > 1 else 1) * parted
        if of_experts and ranks.ep * ranks.tp > 1:  # experts are units of their own
            units += moe
        seconds = job.exchanges * (gathered * costs.exchange + units * costs.unit)
        if ranks.tp > 1:  # what is whole on every rank of TP
            latents = arch.q_lora + arch.kv_lora + arch.rope_dim
            whole = arch.hidden * (blocks * latents + moe * arch.experts)
            group = self.among(ranks.tp)
            seconds += group.sum + whole * NUMBER * group.sum_byte
        if ranks.pp > 1 and arch.mtp:  # gradients of both copies of the embedding
            group = self.among(2)
            seconds += arch.vocab * arch.hidden / ranks.tp * NUMBER * group.sum_byte
        return optimizer, seconds


@lru_cache(maxsize=4096)
def _block_times(
    share: Share,
    arch: Architecture,
    sequences: int,
    length: int,
    tp: int,
    cp: int,
    ep: int,
    recompute: str,
) -> BlockTimes:
    found = []
    for moe in (False, True):
        there, back = block(arch, moe, sequences, length, tp, cp, ep)
        back += again(arch, there, moe, recompute)
        links = _links(share, arch, moe, sequences * length / cp, tp, cp) / share.crowded
        rows = (0.0, 0.0)
        if moe and ep > 1:
            rows = _rows(share, arch, sequences * length / cp / tp, ep)
        found.append(
            BlockTime(
                there.parts(share.forward, rows[0], links),
                back.parts(share.backward, rows[1], links * (1 + (recompute == "full"))),
                (back.products + back.experts).seconds(share.backward) / 2,
            )
        )
    there, back = ends(arch, sequences, length, tp, cp)
    tokens = sequences * length / cp
    head_links = 0.0
    if tp > 1:
        group = share.among(tp)
        whole = NUMBER * tokens * arch.hidden * group.shared_byte + group.shared
        head_links = 2 * whole + 2 * (-(-tokens // CHUNK_TOKENS)) * group.sum
        head_links /= share.crowded  # which was measured among as many processes
    head = BlockTime(
        there.parts(share.forward, 0.0, head_links),
        back.parts(share.backward, 0.0, head_links / 2),
        0.0,
    )
    dense, moe_block = found
    before, before_back = joined(arch, sequences * length / cp / tp)
    mtp = BlockTime(
        moe_block.forward + before.parts(share.forward),
        moe_block.backward + before_back.parts(share.backward),
        moe_block.weight + before_back.products.seconds(share.backward) / 2,
    )
    return BlockTimes(dense, moe_block, head, mtp)


def _links(share: Share, arch: Architecture, moe: bool, tokens: float, tp: int, cp: int) -> float:
    """Seconds of one direction's exchanges of a block by tensor and context parallelism."""
    seconds = 0.0
    if tp > 1:
        group = share.among(tp)
        queries = arch.q_lora or arch.hidden
        wide = arch.hidden * (3 if arch.shared or not moe else 1)
        numbers = tokens * (queries + arch.kv_lora + arch.rope_dim + wide)
        seconds += (5 if arch.shared or not moe else 3) * group.shared
        seconds += NUMBER * numbers * group.shared_byte + moe * group.sum
    if cp > 1:
        group = share.among(cp)
        numbers = tokens * cp * (arch.kv_lora + arch.rope_dim)
        seconds += 2 * group.shared + NUMBER * numbers * group.shared_byte + moe * group.sum
    return seconds


def _rows(share: Share, arch: Architecture, here: float, ep: int) -> tuple[float, float]:
    """Seconds of the experts' exchanges, forward and backward: counts go forward only."""
    group = share.among(ep)
    sent = NUMBER * here * arch.top_k * (2 * arch.hidden + 1) * (ep - 1) / ep
    both = (2 * group.rows + sent * group.rows_byte) / share.crowded
    return both + group.rows / share.crowded, both
