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

from deepseek.config.block_passes import Most, Sizes, passes
from deepseek.config.cost import attention_parameters, domains_of_token
from deepseek.config.layout import (
    INTERLEAVED_SCHEDULES,
    V_SCHEDULES,
    Layout,
    StageSlice,
    rank_stages,
    stages_of_rank,
)
from deepseek.config.product_passes import Beside, Product, in_fp8, of_packed
from deepseek.config.schema import ModelConfig
from deepseek.config.weights import lora_targets

ROW_ALIGNMENT = 16
"""Rows of every routed expert are padded to a multiple of this; ``ops/rows.py`` says why. Our own
kernels of CPUs need no such rows, and experts of one process keep theirs in the room of gradients:
what is told of these is the most."""


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
    goes_back: int | None = None
    """The only one of them that goes back meanwhile; None: each may."""


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
    then, and the gradients of what every matrix has made. A stage that recomputes, or keeps its
    activations on the host, makes both at once, and keeps neither.
    """
    name, pp = model.pipeline_schedule, model.pipeline_model_parallel_size
    parts, held = rank_stages(model, pp_rank), in_flight(model, pp_rank, micro_batches)
    total = sum(n * one for n, one in zip(held.values(), of_one, strict=True))
    if name == "DualPipeV" and micro_batches <= 2 * pp - pp_rank:
        # It holds all only before the first micro-batch goes back through the first stage.
        return [Waiting(total, unbegun=(0,)), Waiting(total - min(of_one))]
    # Of a V one less of the last stage waits when the first one has gone forward once more.
    comes = next(iter(held.values())) < micro_batches
    turned = total - of_one[-1] + of_one[0] * comes
    splits = name in ("InterleavedZeroBubble", "ZBVZeroBubble")
    if pp == 1 or not (splits or name in INTERLEAVED_SCHEDULES):
        return [Waiting(total)]
    several = model.num_nextn_predict_layers > 1  # whose stage is not split either
    at_once = [
        not splits
        or model.activations_checkpoint_granularity is not None
        or model.cpu_offloading_activations
        or (part.ahead and several)
        for part in parts
    ]
    made = [
        0 if one or part.first else _product_gradients(model, layout, part, half)
        for part, one in zip(parts, at_once, strict=True)
    ]
    if name in INTERLEAVED_SCHEDULES:
        # Four rounds of micro-batches; more of the same size bring nothing new.
        rounds = max(1, micro_batches // pp)
        steady = micro_batches // rounds * min(rounds, 4)
        sizes = of_one + [one + more for one, more in zip(of_one, made, strict=True)]
        return [
            Waiting(max(sum(map(operator.mul, counts, sizes)) for counts in fullest), *moment)
            for moment, fullest in _fullest(pp, pp_rank, steady, tuple(at_once), splits)
        ]
    if all(at_once):
        # That is when the first stage goes back.
        return [Waiting(total, goes_back=1), Waiting(turned, at_head=False, goes_back=0)]
    # A V that fills up has one such backward pass under way, one that runs empty all of them.
    counts = list(held.values())
    first, second = min(pp, counts[0]), min(pp_rank, counts[-1])
    empty = first * of_one[0] + second * of_one[1]
    empty += min(pp_rank + 1, first) * made[0] + second * made[1]
    full = Waiting(max(total + made[-1], empty))
    if not comes or turned <= total:
        return [full]
    return [full._replace(goes_back=1), Waiting(turned + made[-1], at_head=False, goes_back=0)]


@cache
def _fullest(
    pp: int, pp_rank: int, micro_batches: int, at_once: tuple[bool, ...], splits: bool
) -> list[tuple[tuple[bool, tuple[int, ...]], list[tuple[int, ...]]]]:
    """Of interleaved stages, by ``at_head`` and ``unbegun``: the most that waits.

    Of each stage, how many micro-batches wait for gradients of inputs, and of weights alone; what
    is nowhere more than at another moment is left out. A search asks for few, thousands of times.
    """
    stages, moments = len(at_once), dict[tuple[bool, tuple[int, ...]], list[tuple[int, ...]]]()
    split, begun = [not one for one in at_once], [False] * stages
    order = interleaved_order(pp, stages, pp_rank, micro_batches, splits)
    for forward, inputs, weights, done in order:
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


def interleaved_order(
    pp: int, stages: int, pp_rank: int, micro_batches: int, splits: bool
) -> Iterator[tuple[int | None, list[int], list[int], int | None]]:
    """After each action of a rank with interleaved stages, as torch orders them.

    With ``splits`` under InterleavedZeroBubble, where weights get their gradients some steps after
    inputs and a rank begins to go back earlier; without, both are one action.

    Yields:
        Which of its stages has gone forward, if one has; of each stage, how many micro-batches wait
        for the gradients of their inputs; how many for those of their weights alone; and which has
        made those of its weights.
    """
    rounds = max(1, micro_batches // pp)
    size = micro_batches // rounds
    total = stages * size * rounds
    after, later = pp - 1 - pp_rank, pp_rank if splits else 0
    ahead = min((stages - 1) * size + (1 if splits else 2) * after, total)
    inputs, weights = [0] * stages, [0] * stages
    for step in range(total + ahead + later):
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
        if backward >= later:
            stage = stages - 1 - (backward - later) // size % stages
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
    common = number * (attention + (tokens * latents + 2 * here * dim) * trained)
    dense = number * tokens * (2 * model.intermediate_size // tp + dim)
    inner = model.moe_intermediate_size
    experts = number * here * model.num_experts_per_tok * (2 * inner + dim)
    shared = model.n_shared_experts * inner
    experts += number * tokens * (2 * shared // tp + dim) if shared else 0
    if model.peft is None:
        experts += 4 * here * model.n_routed_experts
    elif half and layout.keeps_experts and not model.peft.base_dtype:
        # the last matrix's copy, which only the gradients of the inputs needed
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
    return sum(
        n * _kept_activations(model, layout, moe, half)
        + others * _block_activations(model, layout, moe, half)
        for moe, n, others in _kinds(model, part)
    )


def host_activations(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes of one micro-batch that a stage's blocks, and MTP's, keep on the host: of a block that
    recomputes its input."""
    if not model.cpu_offloading_activations:
        return 0
    hidden = hidden_bytes(model, layout, half)
    total = sum(
        n * hidden + others * _block_on_host(model, layout, moe, half)
        for moe, n, others in _kinds(model, part)
    )
    if not part.ahead:
        return total
    if model.activations_checkpoint_granularity is None:
        ahead = _block_on_host(model, layout, True, half)
        ahead += 5 * hidden  # what three norms are given, and the projection, twice as wide
    else:
        ahead = 2 * hidden
    return total + model.num_nextn_predict_layers * ahead


def _block_on_host(model: ModelConfig, layout: Layout, moe: bool, half: bool) -> int:
    """Bytes of nearly all that a block keeps. On the host a tensor that two operators see in two
    shapes lies twice, and of one of which a part is kept that part. Attention's result is such a
    one, unless what is kept for the product behind it is another."""
    tokens, heads = tokens_of_part(model, layout), model.num_attention_heads // layout.tp
    same = layout.cp == 1 and model.fp8_recipe is None
    twice = tokens * heads * (model.v_head_dim * same - layout.cp * model.qk_nope_head_dim)
    return _block_activations(model, layout, moe, half) + (2 if half else 4) * twice


def _kinds(model: ModelConfig, part: StageSlice) -> Iterator[tuple[bool, int, int]]:
    """Of dense and MoE blocks of a stage, how many recompute, and how many do not."""
    counts = zip(_recomputing(model, part), blocks_of_stage(model, part), strict=True)
    return ((bool(moe), n, blocks - n) for moe, (n, blocks) in enumerate(counts) if blocks)


def stage_activations(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes that a stage keeps of one micro-batch from its forward to its backward pass."""
    hidden = hidden_bytes(model, layout, half)
    if model.cpu_offloading_activations:  # decisions stay
        total = sum(
            n * (_kept_activations(model, layout, moe, half) - hidden)
            for moe, n, _ in _kinds(model, part)
        )
    else:
        total = block_activations(model, layout, part, half)
    recomputes = any(_recomputing(model, part))
    # The pipeline keeps what has been received, which is the first block's input.
    if not part.first and model.cpu_offloading_activations:
        total += hidden
    if recomputes:  # angles are an argument
        total += 4 * model.micro_batch_size * model.data.seq_length * model.qk_rope_head_dim
    if not part.last and layout.pp > 1:
        total += hidden  # the pipeline keeps what it has sent
    return total + output_activations(model, layout, part, half)


def output_activations(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes of ``stage_activations`` of what the stage has of the output."""
    total, depth = 0, model.num_nextn_predict_layers
    if model.peft is None:  # gradients of the head, made in the forward pass
        total += part.heads(model) * 4 * model.vocab_size // layout.tp * model.hidden_size
    if part.main:
        total += head_activations(model, layout, half)
    elif part.last and not part.ahead:  # the gradient of all that the heads saw
        total += depth * layout.tp * hidden_bytes(model, layout, half)
    return total + part.ahead * depth * ahead_activations(model, layout, half)


def head_activations(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes that the last norm and the head keep of one micro-batch: the norm's input, what it
    makes of it if its weight learns, and the gradient of all the head saw. That of the head's
    matrix is not included."""
    numbers = 1 + (model.peft is None) + layout.tp
    return numbers * hidden_bytes(model, layout, half)


def ahead_activations(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes that one MTP depth keeps of one micro-batch, the gradient of the head not included."""
    hidden = hidden_bytes(model, layout, half)
    ahead = 3 * hidden
    if model.cpu_offloading_activations:
        return hidden
    if not model.activations_checkpoint_granularity:
        ahead += _block_activations(model, layout, True, half) + 3 * hidden
        if half and layout.world_size == 1:  # the projection's matrix
            ahead += 4 * model.hidden_size**2
    elif model.activations_checkpoint_granularity == "selective":
        ahead += _kept_activations(model, layout, True, half)
    return ahead


def hidden_bytes(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes of the residual stream of one micro-batch: in the dtype of products."""
    tokens = tokens_of_part(model, layout) // layout.tp
    return (2 if half else 4) * tokens * model.hidden_size


def norm_bytes(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes that a norm's backward pass makes: of what is in bf16 three copies in fp32, one of them
    in bf16 again, which a product takes, and the gradient; of what is in fp32 two."""
    return (16 if half else 8) * (tokens_of_part(model, layout) // layout.tp) * model.hidden_size


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
    if moe:
        total += _order_bytes(model, layout, here)
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
            total += _travelling(model, rows) or rows * (number * dim + 4)
        width = model.n_shared_experts * inner // tp
    return total + 2 * product(tokens, dim, width) + product(tokens, width, dim) * (width > 0)


def _pairs(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """Of tokens and the machines that have experts of theirs."""
    nodes = layout.ep // (layout.ep_node or layout.ep)
    sizes = model.num_experts_per_tok, model.n_group, model.topk_group
    return round(tokens * domains_of_token(nodes, *sizes))


def _order_bytes(model: ModelConfig, layout: Layout, tokens: int) -> int:
    """Of chosen experts, and the order of rows on both sides."""
    choices = model.num_experts_per_tok
    rows = tokens * choices
    if layout.ep_node:
        pairs, nodes = _pairs(model, layout, tokens), layout.ep // layout.ep_node
        return 8 * (4 * rows + pairs + tokens * nodes) + 17 * pairs * choices
    return 8 * rows * (5 if layout.ep > 1 else 1)


def _travelling(model: ModelConfig, rows: int) -> int:
    """Bytes of rows in FP8, their scales and weights, as they travel; 0: they do not."""
    return rows * (model.hidden_size + -(-model.hidden_size // 128) + 4) * model.moe_dispatch_fp8


def block_kinds(model: ModelConfig, stages: Sequence[StageSlice]) -> set[bool]:
    """Whether there are MoE blocks, and others."""
    return {bool(moe) for part in stages for moe, n in enumerate(blocks_of_stage(model, part)) if n}


def stage_passes(
    model: ModelConfig, layout: Layout, stages: Sequence[StageSlice], half: bool, reduces: bool
) -> Most:
    """``working_bytes`` of the costliest of some stages. Where only the first blocks of a stage
    recompute, the others have gone back by then, and what they kept is gone."""
    if model.activations_checkpoint_num_layers is None:
        depth = model.num_nextn_predict_layers
        single = all(len(part.layers) + depth * part.ahead < 2 for part in stages)
        return working_bytes(model, layout, block_kinds(model, stages), half, reduces, single)
    plain = replace(model, activations_checkpoint_granularity=None)
    found = []
    for part in stages:
        counts = list(_kinds(model, part))
        kept = sum(n * _block_activations(model, layout, moe, half) for moe, _, n in counts if n)
        others = {moe for moe, _, n in counts if n}
        again = {moe for moe, n, _ in counts if n}
        for kinds, of, less in ((others, plain, 0), (again, model, kept)):
            most = working_bytes(of, layout, kinds, half, reduces)
            found.append(Most(*(max(0, size - less) for size in most)))
    return _most(found)


def gone_in_turn(
    model: ModelConfig, layout: Layout, forward: StageSlice, backward: StageSlice, half: bool
) -> int:
    """Bytes that never wait where a stage goes forward and another back, in turn, block by block:
    what the one keeps, the other has let go, but for a block. Only rows make them wait."""
    ahead, behind = (
        block_activations(model, layout, part, half) // max(1, len(part.layers))
        for part in (forward, backward)
    )
    steps = min(blocks_of_stage(model, part)[1] for part in (forward, backward))
    one = stage_activations(model, layout, forward, half)
    if not steps or model.cpu_offloading_activations:
        return 0
    return min(one - ahead, one - ahead * steps + behind * (steps - 1))


def _most(found: Sequence[Most]) -> Most:
    return Most(*map(max, zip(*found, strict=True))) if found else Most(0, 0, 0, 0)


def working_bytes(
    model: ModelConfig,
    layout: Layout,
    kinds: set[bool],
    half: bool,
    reduces: bool = False,
    single: bool = False,
    ahead: bool = False,
) -> Most:
    """Bytes of one block's passes, the costliest of ``kinds``, beside what waits for the second.

    Args:
        model: the sizes.
        layout: divides them.
        kinds: of blocks, whether MoE.
        half: products are in 2 bytes.
        reduces: gradients are handed on after each micro-batch.
        single: a stage has no other block.
        ahead: it is MTP's.
    """
    found = []
    for moe in kinds:
        most = passes(_sizes(model, layout, moe, half, reduces)._replace(ahead=ahead))
        back = forth = 0
        if model.cpu_offloading_activations:  # originals till the block is done
            keeps, returns = _block_activations, _block_on_host
            if model.activations_checkpoint_granularity:
                keeps = returns = _kept_activations
            forth += keeps(model, layout, moe, half)
            # What comes back, and what is next to do so.
            back += (1 if single else 2) * returns(model, layout, moe, half)
        more = (forth, back, forth + back, forth)
        found.append(Most(*map(operator.add, most, more)))
    return _most(found)


def _sizes(model: ModelConfig, layout: Layout, moe: bool, half: bool, reduces: bool) -> Sizes:
    tokens, dim, tp = tokens_of_part(model, layout), model.hidden_size, layout.tp
    here, hidden, number = tokens // tp, hidden_bytes(model, layout, half), 2 if half else 4
    trained, parted = model.peft is None, layout.world_size > 1
    recomputes = model.activations_checkpoint_granularity is not None
    # Gradients in the dtype of products stay till their unit is through; those in fp32 are added
    # to what is there, but where that has been handed on.
    stay = number * (trained and parted and (half or reduces))
    gathered = number * tokens * dim * (tp > 1)
    narrower = model.fp8_recipe is not None  # what products keep is a copy, in FP8

    def both(given: int, made: int, matrix: int, is_stack: bool = False) -> tuple[Beside, Beside]:
        """Of SwiGLU's first two products, and its last one."""
        if not matrix:
            return Beside(), Beside()
        first, last = (given, made), (made, given)
        return (
            _beside(model, Product(*first, matrix, is_stack), half),
            _beside(model, Product(*last, matrix, is_stack), half),
        )

    heads = model.num_attention_heads // tp
    attention = _attention_activations(model, layout, half)
    whole = _block_activations(model, layout, moe, half)
    waits = _kept_activations(model, layout, moe, half) if recomputes else whole
    width = model.intermediate_size // tp
    experts_kept = rows = packed = tiled = slots = narrow = matrix = 0
    pairs = pairs_packed = copies = homecoming = 0
    experts_inputs = narrow_kept = 0
    experts_products = Beside(), Beside()
    if moe:
        inner, experts = model.moe_intermediate_size, model.n_routed_experts // layout.ep
        count = here * model.num_experts_per_tok
        padded = _slots(model, layout, count)
        rows, slots, narrow = (number * n for n in (count * dim, padded * dim, padded * inner))
        packed = rows + 4 * count if layout.ep > 1 else 0
        tiled = _travelling(model, count)
        if layout.ep_node:
            sent, choices = _pairs(model, layout, here), model.num_experts_per_tok
            pairs, copies = number * sent * dim, number * sent * choices * dim
            homecoming = hidden * (layout.ep // layout.ep_node)
            pairs_packed = pairs + 4 * sent * choices
        experts_inputs, narrow_kept = _expert_inputs(model, padded, half)
        experts_kept = 2 * narrow + 4 * padded + experts_inputs + narrow_kept
        stack = experts * dim * inner
        experts_products = both(padded * dim, padded * inner, stack, is_stack=True)
        if layout.keeps_experts or not parted:
            experts_kept += 3 * 2 * experts * dim * inner * half
        else:
            matrix = experts * dim * inner
        width = model.n_shared_experts * inner // tp
    wide = number * tokens * width
    once, twice = _input_bytes(model, half)
    wide_hidden = round(once * tokens * width)
    wide_inputs = round(twice * tokens * dim) * (width > 0)
    wide_kept = 2 * wide + wide_hidden + wide_inputs * (tp > 1)
    apart = layout.ep * tp > 1
    return Sizes(
        hidden=hidden,
        gathered=gathered,
        copied=gathered * (model.micro_batch_size > 1),
        attention=attention,
        heads=number * tokens * heads * (model.qk_head_dim + model.qk_rope_head_dim),
        head_gradients=_gradients_of_heads(model, layout, half),
        norm=norm_bytes(model, layout, half) + hidden,  # and what it is given
        between=max(0, whole - attention - wide_kept - experts_kept),
        wide=wide,
        wide_kept=wide_kept,
        wide_matrix=stay * dim * width,
        attention_matrix=stay * dim * heads * model.v_head_dim,
        rows=rows,
        packed=packed,
        tiled=tiled,
        pairs=pairs,
        pairs_packed=pairs_packed,
        copies=copies,
        homecoming=homecoming,
        slots=slots,
        narrow=narrow,
        experts_kept=experts_kept,
        matrix=stay * matrix,
        # Beside it nothing of the block before is on its way, which is counted of every block.
        sent=max(0, 12 * matrix - 4 * attention_parameters(model) // tp)
        * (reduces and trained and parted and apart),
        adapted=not trained,
        narrow_adapted=not trained and narrow_kept > 0,
        stays=(tiled or packed) * (model.activations_checkpoint_granularity == "selective"),
        recomputes=recomputes,
        ahead=False,
        waits=waits,
        apart=apart,
        normed=hidden * narrower,
        slots_held=slots * (narrower or not experts_inputs),
        whole_products=narrower or not trained,
        wide_hidden=wide_hidden,
        wide_inputs=wide_inputs * (tp > 1),
        narrow_kept=narrow_kept,
        experts_inputs=experts_inputs,
        wide_products=both(tokens * dim, tokens * width, dim * width),
        experts_products=experts_products,
        attention_product=_beside(
            model,
            Product(
                tokens * heads * model.v_head_dim, tokens * dim, heads * model.v_head_dim * dim
            ),
            half,
        ),
    )


def _beside(model: ModelConfig, product: Product, half: bool) -> Beside:
    """What a product of the model makes besides."""
    number = 2 if half else 4
    if model.fp8_recipe is not None:
        return in_fp8(product, number)
    if model.peft is not None and model.peft.base_dtype is not None:
        return of_packed(product, number, model.peft.base_dtype)
    return Beside()


def _gradients_of_heads(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes of the gradients of queries, keys, values and results, in one backward pass.

    Of a part of a sequence attention goes back in two halves, each of which makes gradients of the
    keys that it has seen. Those of the half that has seen more come first, and are laid out among
    all keys: beside their own values, or beside the keys and values of the other half.
    """
    tokens, heads = tokens_of_part(model, layout), model.num_attention_heads // layout.tp
    head, cp = model.qk_head_dim + model.v_head_dim, layout.cp
    keys = tokens * cp * head
    if cp > 1:
        keys = tokens * max(
            3 * cp * head // 2, (cp - 1) * head + head // 2 + cp * model.qk_head_dim
        )
    return (2 if half else 4) * heads * (tokens * head + keys)


def _block_activations(model: ModelConfig, layout: Layout, moe: bool, half: bool) -> int:
    """Bytes that a block keeps for its backward pass if nothing is recomputed, its input included.

    A norm keeps what it is given; SwiGLU gate, up and its result. A product keeps a copy of its
    matrix if that is fp32 here: what is gathered from other ranks is in bf16 already, experts that
    are kept in whole and the weights of one process are not.
    """
    tokens, dim, tp = tokens_of_part(model, layout), model.hidden_size, layout.tp
    number, here = 2 if half else 4, tokens // tp
    total: float = _attention_activations(model, layout, half)
    total += number * here * dim  # after attention
    once, twice = _input_bytes(model, half)
    inputs = twice * tokens * dim
    if model.peft is not None and moe:  # what the router is given is for its weights alone
        total -= 4 * here * dim
    parted, matrices = layout.world_size > 1, 0
    # feed-forward
    width = model.intermediate_size // tp
    if moe:
        rows = here * model.num_experts_per_tok
        inner, slots = model.moe_intermediate_size, _slots(model, layout, rows)
        total += 4 * here * dim  # for the router, in fp32
        total += slots * (2 * number * inner + 4) + sum(_expert_inputs(model, slots, half))
        total += 5 * 4 * here * model.n_routed_experts + 8 * rows
        total += max(5 * 8 * rows, _order_bytes(model, layout, here))
        if layout.keeps_experts or not parted:
            matrices += model.n_routed_experts // layout.ep * 3 * dim * inner
        width = model.n_shared_experts * inner // tp
        if not half and tp == 1 and model.fp8_recipe is None and model.peft is None:
            inputs = 0  # the router's copy
    total += (inputs if width else 0) + tokens * width * (2 * number + once)
    matrices += 0 if parted else 3 * dim * width
    if model.peft is not None and model.peft.base_dtype:  # unpacked anew in each pass
        matrices = 0
    return round(total) + (2 * matrices if half else 0)


def _attention_activations(model: ModelConfig, layout: Layout, half: bool) -> int:
    """The same of attention and its norm, the block's input included."""
    tokens, dim, tp = tokens_of_part(model, layout), model.hidden_size, layout.tp
    number, heads = 2 if half else 4, model.num_attention_heads // tp
    latent, keys = model.kv_lora_rank, tokens * layout.cp  # of the whole sequence
    here = tokens // tp
    total: float = number * here * dim  # input
    once, twice = _input_bytes(model, half)
    if tp > 1 and model.q_lora_rank is None:  # gathered for queries alone
        total += once * (here + tokens) * dim
    else:
        total += twice * here * dim
    total += tokens * 8 * model.qk_rope_head_dim  # angles of queries and of keys
    total += tokens * heads * (number * (model.qk_head_dim + model.v_head_dim) + 4)
    total += keys * heads * number * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    if layout.cp > 1:  # gathered latents; results of two halves, joined
        total += number * keys * (latent + model.qk_rope_head_dim)
    if layout.cp > 1 or model.fp8_recipe:
        total += once * tokens * heads * model.v_head_dim
    total += (number + once) * tokens * (latent + (model.q_lora_rank or 0))  # normed, and before
    unpacked = model.peft is not None and model.peft.base_dtype is not None
    is_copied = half and layout.world_size == 1 and not unpacked
    return round(total) + 2 * attention_parameters(model) * is_copied


def _input_bytes(model: ModelConfig, half: bool) -> tuple[float, float]:
    """Of a number that a product keeps of its input, and of one that two products share.

    In FP8 each keeps a byte of its own, and a scale for each 128.
    """
    number = 2 if half else 4
    if model.fp8_recipe is None:
        return number, number
    return 1 + number / 128, 2 * (1 + number / 128)


def _expert_inputs(model: ModelConfig, slots: int, half: bool) -> tuple[int, int]:
    """Bytes of the inputs that the first two products of the routed experts keep, and the last one:
    frozen ones none."""
    once, twice = _input_bytes(model, half)
    names = {"experts.w1", "experts.w2", "experts.w3"}
    if model.peft is not None:
        names &= set(lora_targets(model.peft.target_modules))
    first = twice * model.hidden_size * bool(names - {"experts.w2"})
    last = once * model.moe_intermediate_size * ("experts.w2" in names)
    return round(slots * first), round(slots * last)


def _slots(model: ModelConfig, layout: Layout, rows: int) -> int:
    """That the rows of a rank's experts are padded to, at most."""
    experts = model.n_routed_experts // layout.ep
    return ROW_ALIGNMENT * (experts + max(rows - 1, 0) // ROW_ALIGNMENT)
