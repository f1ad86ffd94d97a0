"""Bytes of activations: what micro-batches keep on their way, and what a block works in.

Counted from the configuration alone, and compared with tracked bytes of whole steps by tests.
``half``: products are computed in 2 bytes (``bf16-mixed``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from deepseek.config.cost import attention_parameters
from deepseek.config.layout import (
    INTERLEAVED_SCHEDULES,
    V_SCHEDULES,
    Layout,
    StageSlice,
    rank_stages,
    stages_of_rank,
)
from deepseek.config.schema import ModelConfig

ROW_ALIGNMENT = 16
"""Rows of every routed expert are padded to a multiple of this; ``ops/rows.py`` says why."""


def blocks_of_stage(model: ModelConfig, part: StageSlice) -> tuple[int, int]:
    """Dense and MoE blocks of a stage."""
    layers = part.layers
    dense = min(max(model.first_k_dense_replace - layers.start, 0), len(layers))
    return dense, len(layers) - dense


def in_flight(model: ModelConfig, pp_rank: int, micro_batches: int) -> dict[int, int]:
    """Micro-batches of each stage of a rank that have gone forward and not all the way back.

    At the moment when the rank holds most, as torch orders the schedules.
    """
    pp, name = model.pipeline_model_parallel_size, model.pipeline_schedule
    stages, after = stages_of_rank(model, pp_rank), pp - 1 - pp_rank
    counts = [micro_batches] * len(stages)
    if pp == 1:
        counts = [1]
    elif name == "1F1B":
        counts = [after + 1]
    elif name in V_SCHEDULES:
        counts = [pp + after + (name == "DualPipeV"), pp_rank + 1]
    elif name in INTERLEAVED_SCHEDULES:
        size = micro_batches // max(1, micro_batches // pp)
        between = (len(stages) - 1) * size
        total = between + (2 * after + 1 if name == "Interleaved1F1B" else pp)
        newest = min(size, total - between)
        counts = [total - between + size - newest, *[size] * (len(stages) - 2), newest]
    return {stage: min(n, micro_batches) for stage, n in zip(stages, counts, strict=True)}


class Waiting(NamedTuple):
    """What waits on a rank for its backward pass at some moment of a step."""

    size: int
    """Bytes of all micro-batches."""
    at_head: bool = True
    """The rank's last stage goes forward, or may do so."""
    unbegun: tuple[int, ...] = ()
    """Stages of the rank, counted from 0, that have made no gradient of a weight yet."""


def waiting(
    model: ModelConfig,
    layout: Layout,
    pp_rank: int,
    micro_batches: int,
    half: bool,
    of_one: list[int],
) -> list[Waiting]:
    """Moments of which one is the fullest; ``of_one`` is each stage's ``stage_activations``.

    Where weights get their gradients later than inputs, a micro-batch keeps its activations till
    then, and the gradients of what every matrix has made. A stage that recomputes makes both at
    once, and keeps neither.
    """
    name, pp = model.pipeline_schedule, model.pipeline_model_parallel_size
    parts, held = rank_stages(model, pp_rank), in_flight(model, pp_rank, micro_batches)
    total = sum(n * one for n, one in zip(held.values(), of_one, strict=True))
    if pp == 1 or name not in ("InterleavedZeroBubble", "ZBVZeroBubble"):
        return [Waiting(total)]
    several = model.num_nextn_predict_layers > 1  # whose stage is not split either
    at_once = [
        model.activations_checkpoint_granularity is not None or (part.last and several)
        for part in parts
    ]
    made = [
        0 if one or part.first else _product_gradients(model, layout, part, half)
        for part, one in zip(parts, at_once, strict=True)
    ]
    if name == "InterleavedZeroBubble":
        # Four rounds of micro-batches; more of the same size bring nothing new.
        rounds = max(1, micro_batches // pp)
        steady = micro_batches // rounds * min(rounds, 4)
        sizes = of_one + [one + more for one, more in zip(of_one, made, strict=True)]
        return [
            Waiting(max(sum(map(operator.mul, counts, sizes)) for counts in fullest), *moment)
            for moment, fullest in _fullest(pp, pp_rank, steady, tuple(at_once))
        ]
    if model.activations_checkpoint_granularity:
        return [Waiting(total)]
    # A V that fills up has one such backward pass under way, one that runs empty all of them.
    counts = list(held.values())
    first, second = min(pp, counts[0]), min(pp_rank, counts[-1])
    empty = first * of_one[0] + second * of_one[1]
    empty += min(pp_rank + 1, first) * made[0] + second * made[1]
    return [Waiting(max(total + made[-1], empty))]


@cache
def _fullest(
    pp: int, pp_rank: int, micro_batches: int, at_once: tuple[bool, ...]
) -> list[tuple[tuple[bool, tuple[int, ...]], list[tuple[int, ...]]]]:
    """Under InterleavedZeroBubble, by ``at_head`` and ``unbegun``: the most that waits.

    Of each stage, how many micro-batches wait for gradients of inputs, and of weights alone; what
    is nowhere more than at another moment is left out. A search asks for few, thousands of times.
    """
    stages, moments = len(at_once), dict[tuple[bool, tuple[int, ...]], list[tuple[int, ...]]]()
    split, begun = [not one for one in at_once], [False] * stages
    for forward, inputs, weights, done in zero_bubble_order(pp, stages, pp_rank, micro_batches):
        for stage, one in enumerate(at_once):
            begun[stage] |= stage == done or (one and weights[stage] > 0)
        unbegun = tuple(stage for stage, has in enumerate(begun) if not has)
        now = (*inputs, *map(operator.mul, weights, split))
        most = moments.setdefault((forward == stages - 1, unbegun), [])
        if not any(_at_most(now, other) for other in most):
            most[:] = [other for other in most if not _at_most(other, now)] + [now]
    return list(moments.items())


def _at_most(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(map(operator.le, one, other))


def zero_bubble_order(
    pp: int, stages: int, pp_rank: int, micro_batches: int
) -> Iterator[tuple[int | None, list[int], list[int], int | None]]:
    """After each action of a rank under InterleavedZeroBubble, as torch orders them.

    Yields:
        Which of its stages has gone forward, if one has; of each stage, how many micro-batches wait
        for the gradients of their inputs; how many for those of their weights alone; and which has
        made those of its weights.
    """
    rounds = max(1, micro_batches // pp)
    size = micro_batches // rounds
    total = stages * size * rounds
    ahead = min((stages - 1) * size + pp - 1 - pp_rank, total)
    inputs, weights = [0] * stages, [0] * stages
    for step in range(total + ahead + pp_rank):
        forward, backward = step, step - ahead
        if forward < total:
            stage = forward // size % stages
            inputs[stage] += 1
            yield stage, inputs, weights, None
        if 0 <= backward < total:
            stage = stages - 1 - backward // size % stages
            inputs[stage] -= 1
            weights[stage] += 1
            yield None, inputs, weights, None
        if backward >= pp_rank:
            stage = stages - 1 - (backward - pp_rank) // size % stages
            weights[stage] -= 1
            yield None, inputs, weights, stage


def _product_gradients(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes of the gradients of what the products and norms of a stage's blocks have made."""
    tokens, tp, dim = tokens_of_part(model, layout), layout.tp, model.hidden_size
    here, heads, number = tokens // tp, model.num_attention_heads // tp, 2 if half else 4
    latents = model.kv_lora_rank + (model.q_lora_rank or 0)
    attention = tokens * heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    attention += tokens * (latents + model.qk_rope_head_dim + dim)
    trained = model.peft is None  # with adapters norms and routers are not
    common = number * attention + 4 * (tokens * latents + 2 * here * dim) * trained
    dense = number * tokens * (2 * model.intermediate_size // tp + dim)
    inner = model.moe_intermediate_size
    experts = number * here * model.num_experts_per_tok * (2 * inner + dim)
    shared = model.n_shared_experts * inner
    experts += number * tokens * (2 * shared // tp + dim) if shared else 0
    if trained:
        experts += 4 * here * model.n_routed_experts
        common -= (8 - 2 * number) * here * dim  # what norms give is as wide as what they get
    elif half:  # the last matrix, which only the gradients of the inputs needed
        experts -= 2 * model.n_routed_experts // layout.ep * dim * inner
    of_kind = (common + dense, common + experts)
    return (
        sum(n * size for n, size in zip(blocks_of_stage(model, part), of_kind, strict=True))
        + 2 * number * here * dim * trained
    )


def tokens_of_part(model: ModelConfig, layout: Layout) -> int:
    """Of a micro-batch on the ranks of one part of its sequences."""
    return model.micro_batch_size * model.data.seq_length // layout.cp


def block_activations(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes that a stage's blocks keep of one micro-batch, on the device or on the host."""
    again = _recomputing(model, part)
    return sum(
        n * _kept_activations(model, layout, bool(moe), half)
        + (blocks - n) * _block_activations(model, layout, bool(moe), half)
        for moe, (n, blocks) in enumerate(zip(again, blocks_of_stage(model, part), strict=True))
        if blocks
    )


def stage_activations(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes that a stage keeps of one micro-batch from its forward to its backward pass."""
    hidden, total = hidden_bytes(model, layout, half), 0
    if not model.cpu_offloading_activations:
        total = block_activations(model, layout, part, half)
    if not part.last:
        return total + (hidden if layout.pp > 1 else 0)  # the pipeline keeps what it has sent
    depth = model.num_nextn_predict_layers
    head = 4 * model.vocab_size // layout.tp * model.hidden_size
    if model.peft is None:
        total += (1 + depth) * head  # its gradients, made in the forward pass
    # Input of the norm, in fp32 for it, normed if its weight learns, gradient of all the head saw.
    total += (1 + 2 * half + (model.peft is None) + layout.tp) * hidden
    return total + depth * ahead_activations(model, layout, half)


def ahead_activations(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes that one MTP depth keeps of one micro-batch, the gradient of the head not included."""
    hidden = hidden_bytes(model, layout, half)
    ahead = 3 * hidden
    if not model.activations_checkpoint_granularity:
        ahead += _block_activations(model, layout, True, half) + 3 * hidden
        if half:  # norms keep what they are given in fp32
            ahead += 2 * hidden + (0 if layout.world_size > 1 else 4 * model.hidden_size**2)
    elif model.activations_checkpoint_granularity == "selective":
        ahead += _kept_activations(model, layout, True, half)
    return ahead


def hidden_bytes(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes of the residual stream of one micro-batch: in the dtype of products."""
    tokens = tokens_of_part(model, layout) // layout.tp
    return (2 if half else 4) * tokens * model.hidden_size


def _recomputing(model: ModelConfig, part: StageSlice) -> tuple[int, int]:
    """Dense and MoE blocks of a stage that recompute: its first ones."""
    most, (dense, moe) = model.activations_checkpoint_num_layers, blocks_of_stage(model, part)
    if model.activations_checkpoint_granularity is None:
        return 0, 0
    if most is None:
        return dense, moe
    return min(dense, most), min(moe, max(0, most - dense))


def _kept_activations(model: ModelConfig, layout: Layout, moe: bool, half: bool) -> int:
    """Bytes that a block keeps for its backward pass if it recomputes, its input included.

    ``models/components/recompute.py`` says what.
    """
    tokens, dim, tp = tokens_of_part(model, layout), model.hidden_size, layout.tp
    here, number = tokens // tp, 2 if half else 4
    rows = here * model.num_experts_per_tok
    total = number * here * dim
    if moe:  # chosen experts; the order of rows on both sides
        total += 8 * rows * (5 if layout.ep > 1 else 1)
    if model.activations_checkpoint_granularity != "selective":
        return total

    def product(rows: int, inner: int, outer: int) -> int:
        return number * rows * outer * (inner >= dim)

    heads = model.num_attention_heads // tp
    values, width = heads * model.v_head_dim, model.intermediate_size // tp
    total += tokens * (number * values + 4 * heads)
    total += product(here, dim, model.kv_lora_rank + model.qk_rope_head_dim)
    if model.q_lora_rank is None:
        total += product(tokens, dim, heads * model.qk_head_dim)
    else:
        total += product(here, dim, model.q_lora_rank)
    total += product(tokens, values, dim)
    if moe:
        inner = model.moe_intermediate_size
        slots = _slots(model, layout, rows)
        total += 4 * here * model.n_routed_experts
        total += 2 * product(slots, dim, inner) + product(slots, inner, dim)
        if layout.ep > 1:
            total += rows * (number * dim + 4)
        width = model.n_shared_experts * inner // tp
    return total + 2 * product(tokens, dim, width) + product(tokens, width, dim) * (width > 0)


def block_kinds(model: ModelConfig, stages: Sequence[StageSlice]) -> set[bool]:
    """Whether there are MoE blocks, and others."""
    return {bool(moe) for part in stages for moe, n in enumerate(blocks_of_stage(model, part)) if n}


def backward_bytes(
    model: ModelConfig, layout: Layout, stages: Sequence[StageSlice], half: bool
) -> int:
    """``working_bytes`` of the costliest of some stages. Where only the first blocks of a stage
    recompute, the others have gone back by then, and what they kept is gone."""
    if model.activations_checkpoint_num_layers is None:
        return working_bytes(model, layout, block_kinds(model, stages), half)
    plain = replace(model, activations_checkpoint_granularity=None)
    most = 0
    for part in stages:
        counts = list(zip(_recomputing(model, part), blocks_of_stage(model, part), strict=True))
        kept = sum(
            (blocks - n) * _block_activations(model, layout, bool(moe), half)
            for moe, (n, blocks) in enumerate(counts)
            if blocks > n
        )
        others = {bool(moe) for moe, (n, blocks) in enumerate(counts) if blocks > n}
        again = {bool(moe) for moe, (n, _) in enumerate(counts) if n}
        most = max(most, working_bytes(plain, layout, others, half))
        most = max(most, working_bytes(model, layout, again, half) - kept)
    return most


def working_bytes(model: ModelConfig, layout: Layout, kinds: set[bool], half: bool) -> int:
    """Bytes of one block's backward pass, the costliest of ``kinds``, beside what waits for it."""
    tokens, dim = tokens_of_part(model, layout), model.hidden_size
    hidden, number = hidden_bytes(model, layout, half), 2 if half else 4
    most = 0
    for moe in kinds:
        if moe:
            rows = tokens // layout.tp * model.num_experts_per_tok
            needed = 2 * number * rows * dim + hidden
            if model.activations_checkpoint_granularity:  # which ends before the experts' results
                needed = number * rows * dim + hidden
        else:
            width = model.intermediate_size // layout.tp
            needed = (6 if half else 4) * dim * width + hidden + (0 if half else 4 * tokens * width)
        whole = _block_activations(model, layout, moe, half)
        waits = whole
        if model.activations_checkpoint_granularity:
            waits = _kept_activations(model, layout, moe, half)
            needed += whole - waits
        if layout.cp > 1:  # attention's pass comes last, and of long sequences is the larger one
            attention = _attention_activations(model, layout, half) - waits
            attention += _gradients_of_heads(model, layout, half) + hidden
            needed = max(needed, attention)
        if model.peft is not None and model.peft.base_dtype:  # one stack or matrix, unpacked
            width = model.n_routed_experts // layout.ep * model.moe_intermediate_size
            needed += number * dim * (width if moe else model.intermediate_size)
        if model.cpu_offloading_activations:  # of this block and of the next to come back
            keeps = (
                _kept_activations
                if model.activations_checkpoint_granularity
                else _block_activations
            )
            needed += 2 * keeps(model, layout, moe, half)
        most = max(most, needed)
    return most


def _gradients_of_heads(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes of the gradients of queries, keys, values and results, in one backward pass."""
    tokens, heads = tokens_of_part(model, layout), model.num_attention_heads // layout.tp
    rows = tokens + tokens * layout.cp  # keys are of the whole sequence
    return (2 if half else 4) * heads * rows * (model.qk_head_dim + model.v_head_dim)


def experts_at_work(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes of the forward pass of experts, what is recomputed before them included."""
    rows = tokens_of_part(model, layout) // layout.tp * model.num_experts_per_tok
    needed = 0
    if half:  # what they are weighted in
        needed = 4 * rows * model.moe_intermediate_size
    if model.peft is not None:  # results of matrix and adapter, scaled, and their sum
        needed += 4 * rows * model.hidden_size * (2 if half else 4)
    elif model.activations_checkpoint_granularity:
        needed += _block_activations(model, layout, True, half)
        needed -= _kept_activations(model, layout, True, half)
    return needed


def _block_activations(model: ModelConfig, layout: Layout, moe: bool, half: bool) -> int:
    """Bytes that a block keeps for its backward pass if nothing is recomputed, its input included.

    In half precision a norm keeps what it is given in fp32, and what it makes of it in bf16; in
    fp32 the first alone. SwiGLU keeps gate, up and its result. A product keeps a copy of its matrix
    if that is fp32 here: what is gathered from other ranks is in bf16 already, experts that are
    kept in whole and the weights of one process are not.
    """
    tokens, dim, tp = tokens_of_part(model, layout), model.hidden_size, layout.tp
    number, here = 2 if half else 4, tokens // tp
    total = _attention_activations(model, layout, half)
    total += (6 if half else 4) * here * dim  # after attention; in bf16 normed too
    inputs = number * tokens * dim
    if model.peft is not None:  # what norms and router are given is for their weights alone
        total -= (4 * half + 4 * moe) * here * dim
    parted, matrices = layout.world_size > 1, 0
    # feed-forward
    width = model.intermediate_size // tp
    if moe:
        rows = here * model.num_experts_per_tok
        inner, slots = model.moe_intermediate_size, _slots(model, layout, rows)
        total += 4 * here * dim  # for the router, in fp32
        total += slots * (number * (dim + 3 * inner) + 4)
        total += 5 * 4 * here * model.n_routed_experts + 6 * 8 * rows
        if layout.keeps_experts or not parted:
            matrices += model.n_routed_experts // layout.ep * 3 * dim * inner
        width = model.n_shared_experts * inner // tp
        inputs = inputs if half else 0  # the router's copy
    total += (inputs if width else 0) + 3 * number * tokens * width
    matrices += 0 if parted else 3 * dim * width
    if model.peft is not None and model.peft.base_dtype:  # unpacked anew in each pass
        matrices = 0
    return total + (2 * matrices if half else 0)


def _attention_activations(model: ModelConfig, layout: Layout, half: bool) -> int:
    """The same of attention and its norm, the block's input included."""
    tokens, dim, tp = tokens_of_part(model, layout), model.hidden_size, layout.tp
    number, heads = 2 if half else 4, model.num_attention_heads // tp
    latent, keys = model.kv_lora_rank, tokens * layout.cp  # of the whole sequence
    total = (6 if half else 4) * (tokens // tp) * dim  # input; in bf16 normed too
    total += number * tokens * dim
    total += tokens * heads * (number * (model.qk_head_dim + model.v_head_dim) + 4)
    total += keys * heads * number * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    if layout.cp > 1:
        total += number * keys * (latent + model.qk_rope_head_dim)
    total += tokens * 8 * (latent + (model.q_lora_rank or 0))
    unpacked = model.peft is not None and model.peft.base_dtype is not None
    is_copied = half and layout.world_size == 1 and not unpacked
    return total + 2 * attention_parameters(model) * is_copied


def _slots(model: ModelConfig, layout: Layout, rows: int) -> int:
    """That the rows of a rank's experts are padded to, at most."""
    experts = model.n_routed_experts // layout.ep
    return ROW_ALIGNMENT * (experts + max(rows - 1, 0) // ROW_ALIGNMENT)
