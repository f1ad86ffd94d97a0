"""Parameters, FLOPs and bytes of a model, exact, from its configuration alone.

The shapes are those of DeepSeek-V3 (arXiv:2412.19437 section 2.1). With D = ``hidden_size``, N
heads, Rq and C the latent ranks of query and key-value, I and F the hidden widths of a dense
feed-forward and of one expert, E experts of which a token takes K, V ids:

    attention   Rq (D + N qk) + C N (nope + v) + (C + rope) D + N v D + norms of the latents
    dense       3 D I
    expert      3 D F
    MoE layer   (E + shared) experts + router E D
    MTP module  2 D D + norms + a MoE layer with its attention
    adapter     r (I + O) beside a matrix (O, I), in every routed expert
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from deepseek.config.layout import (
    INTERLEAVED_SCHEDULES,
    V_SCHEDULES,
    Layout,
    StageSlice,
    kept_shape,
    split_layers,
    stages_of_rank,
)
from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.config.weights import Weight, block_weights, model_weights, once_per_shape

KEPT_BYTES = 1 << 30
"""Gathered weights of less stay gathered for a whole step, if nobody says otherwise."""

CHUNK_TOKENS = 512
"""Tokens whose logits exist at one time; ``ops/cross_entropy.py`` computes in such chunks."""

ROW_ALIGNMENT = 16
"""Rows of every routed expert are padded to a multiple of this; ``ops/rows.py`` says why."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters. The correction biases are no parameters and stand apart."""

    embedding: int
    """V x D."""
    head: int
    """V x D."""
    attention_per_layer: int
    """All projections and the norms of the latents."""
    norms_per_layer: int
    """The norms before attention and before the feed-forward."""
    dense_ffn_per_layer: int
    """SwiGLU of a dense layer."""
    expert: int
    """One routed expert."""
    shared_experts_per_layer: int
    """All shared experts of a MoE layer."""
    router_per_layer: int
    """E x D."""
    final_norm: int
    """D."""
    moe_ffn_per_layer: int
    """Routed experts, shared experts and router of a MoE layer."""
    total: int
    """The model without its MTP modules, as models are usually named."""
    active: int
    """Parameters that one token passes through, embedding and head included, MTP not."""
    mtp: int
    """All MTP modules; embedding and head are the main model's and are not counted again."""
    mtp_copies: int
    """Embedding and head once more for each MTP module, as released checkpoints store them."""
    correction_biases: int
    """fp32 numbers of the routers of the main model, moved by the load and not by a gradient."""
    mtp_correction_biases: int
    """The same of the MTP modules."""
    adapters: int | None
    """Numbers of all adapters, in no other count; None without ``model.peft``."""

    @property
    def active_without_embedding(self) -> int:
        """``active`` without the input embedding, which is looked up and not multiplied."""
        return self.active - self.embedding

    @property
    def trained(self) -> int:
        """What the optimiser updates: the model and its MTP modules, or the adapters alone."""
        return self.stored if self.adapters is None else self.adapters

    @property
    def stored(self) -> int:
        """The model and its MTP modules, adapters not counted."""
        return self.total + self.mtp

    @property
    def released(self) -> int:
        """Parameters of a checkpoint in the released form."""
        return self.stored + self.mtp_copies


@dataclass(frozen=True)
class StateMemory:
    """Training states, activations not included."""

    parameters: int
    """Numbers, without correction biases."""
    weights: int
    """Bytes of fp32 weights, adapters and correction biases."""
    gradients: int
    """Bytes of fp32 gradients of what is trained."""
    optimizer: int
    """Bytes of fp32 moments or momentum."""

    @property
    def total(self) -> int:
        """Bytes of all states."""
        return self.weights + self.gradients + self.optimizer


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """The parameters of ``model``, part by part."""
    dim, depth = model.hidden_size, model.num_nextn_predict_layers
    table = model.vocab_size * dim
    attention = _attention(model)
    norms = 2 * dim
    dense = 3 * dim * model.intermediate_size
    expert = 3 * dim * model.moe_intermediate_size
    shared = model.n_shared_experts * expert
    router = model.n_routed_experts * dim
    moe = model.n_routed_experts * expert + shared + router
    active_moe = model.num_experts_per_tok * expert + shared + router
    moe_layers = model.num_moe_layers
    dense_layers = model.num_hidden_layers - moe_layers
    common = 2 * table + model.num_hidden_layers * (attention + norms) + dim + dense_layers * dense
    mtp_module = 2 * dim * dim + 3 * dim + attention + norms + moe  # norms of both inputs, output
    biases = model.n_routed_experts if model.topk_method == "noaux_tc" else 0
    return ParameterCounts(
        embedding=table,
        head=table,
        attention_per_layer=attention,
        norms_per_layer=norms,
        dense_ffn_per_layer=dense,
        expert=expert,
        shared_experts_per_layer=shared,
        router_per_layer=router,
        final_norm=dim,
        moe_ffn_per_layer=moe,
        total=common + moe_layers * moe,
        active=common + moe_layers * active_moe,
        mtp=depth * mtp_module,
        mtp_copies=depth * 2 * table,
        correction_biases=moe_layers * biases,
        mtp_correction_biases=depth * biases,
        adapters=None
        if model.peft is None
        else sum(math.prod(weight.shape) for weight in _adapters(model)),
    )


def flops_per_token(
    model: ModelConfig, seq_length: int, with_mtp: bool, causal: bool = True
) -> int:
    """Training FLOPs of one token: three times the forward pass, 2 FLOPs to a multiplication.

    With adapters (``model.peft``), frozen matrices are passed through twice, since they need no
    gradient of their own, and adapters three times.

    Counted: every matrix product, the head, and attention's two products over the sequence, which a
    causal mask halves. Not counted: embedding, router, norms, recomputation. This is the convention
    of DeepSeek's and NVIDIA's published figures (V3 at 4096 tokens: 250 GFLOP).

    Args:
        model: the sizes.
        seq_length: tokens that attention looks over.
        with_mtp: include the MTP modules, each with its own pass through the head.
        causal: count only the lower triangle of attention.

    Returns:
        FLOPs.
    """
    counts = count_parameters(model)
    attention = counts.attention_per_layer - model.kv_lora_rank - (model.q_lora_rank or 0)
    active_moe = model.num_experts_per_tok * counts.expert + counts.shared_experts_per_layer
    moe_layers = model.num_moe_layers
    layers = model.num_hidden_layers
    products = (
        counts.head
        + layers * attention
        + (layers - moe_layers) * counts.dense_ffn_per_layer
        + moe_layers * active_moe
    )
    if with_mtp:
        depth = model.num_nextn_predict_layers
        layers += depth
        products += depth * (counts.head + 2 * model.hidden_size**2 + attention + active_moe)
    scores = seq_length * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    passes, adapted = 3, 0
    if model.peft is not None:
        chosen = model.num_experts_per_tok / model.n_routed_experts
        passes, adapted = (
            2,
            sum(round(math.prod(w.shape) * (chosen if w.routed else 1)) for w in _adapters(model)),
        )
    return 2 * passes * products + 6 * adapted + 3 * layers * scores * (1 if causal else 2)


def state_memory(model: ModelConfig, optimizer: str = "adamw") -> StateMemory:
    """Bytes of weights, gradients and optimiser states, summed over all ranks.

    Everything is fp32, but for moments if so configured, under ``bf16-mixed`` too: that precision
    casts inside matrix products and keeps fp32 weights, the master weights, as the only ones. AdamW
    holds two moments (16 bytes per parameter in all); Muon holds one momentum for hidden matrices
    (12 bytes) and AdamW's moments for embedding, head and norms. With adapters, they alone have
    gradients and moments.

    Args:
        model: the sizes.
        optimizer: ``adamw`` or ``muon``.
    """
    everything = StageSlice(range(model.num_hidden_layers), first=True, last=True)
    return _states(model, Layout(), [everything], optimizer)


def checkpoint_bytes(model: ModelConfig, optimizer: str) -> int:
    """Of one checkpoint: the weights that are trained, in fp32, and their optimiser states."""
    return int(state_memory(model, optimizer).optimizer + 4 * count_parameters(model).trained)


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes that decoding caches for one token: latent and rotary key of every layer.

    V3 in bf16: 70272 (arXiv:2505.09343 table 1). MTP modules are not used in decoding.

    Args:
        model: the sizes.
        bytes_per_number: 2 in bf16, 4 in fp32.
    """
    numbers = model.kv_lora_rank + model.qk_rope_head_dim
    return numbers * model.num_hidden_layers * bytes_per_number


# -- memory of one rank --


def rank_memory(
    model: ModelConfig, layout: Layout, pp_rank: int, optimizer: str = "adamw"
) -> StateMemory:
    """States of one rank at a place of the pipeline; of ranks that differ, the largest.

    Args:
        model: the sizes.
        layout: divides each weight.
        pp_rank: place in the pipeline.
        optimizer: ``adamw`` or ``muon``; see ``state_memory``.

    Returns:
        Activations and gathered weights are not included.
    """
    return _states(model, layout, rank_stages(model, pp_rank), optimizer)


def rank_stages(model: ModelConfig, pp_rank: int) -> list[StageSlice]:
    """What each stage of a rank has of the model, in ascending order."""
    parts = split_layers(model)
    return [parts[stage] for stage in stages_of_rank(model, pp_rank)]


def _states(
    model: ModelConfig, layout: Layout, stages: Sequence[StageSlice], optimizer: str
) -> StateMemory:
    parameters = biases = trained = hidden = 0
    for numbers, times, _ in _groups(model, layout, stages):
        parameters += times * numbers.kept
        biases += times * numbers.biases
        trained += times * numbers.trained
        hidden += times * numbers.hidden
    moments = 2 * trained - (hidden if optimizer == "muon" else 0)
    number = 2 if model.optim.moments_dtype == "bf16" else 4
    return StateMemory(parameters, 4 * (parameters + biases), 4 * trained, number * moments)


def gathered_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes of fp32 copies of weights that the fullest rank has while it computes.

    Of experts that no other rank has a part of, there is none: it computes with what it keeps.
    """
    ranks = (_groups(model, layout, rank_stages(model, pp_rank)) for pp_rank in range(layout.pp))
    return 4 * max(sum(times * numbers.gathered for numbers, times, _ in rank) for rank in ranks)


class _Numbers(NamedTuple):
    """How many numbers a rank has of a group of weights."""

    kept: int
    """Of parameters, between steps."""
    biases: int
    """Of correction biases."""
    trained: int
    """Of ``kept``, what has gradients."""
    hidden: int
    """Of ``trained``, matrices of blocks, for which Muon has one momentum."""
    whole: int
    """What is computed with, if other ranks keep a part of it."""
    gathered: int
    """The same with FSDP's padding: 16 experts over 32 ranks take the bytes of 32."""
    beside: int
    """Of ``gathered``, without experts that are a unit of FSDP of their own: what two blocks in a
    row have at a time."""
    alone: int
    """Of experts that are kept in whole."""


def _groups(
    model: ModelConfig, layout: Layout, stages: Sequence[StageSlice]
) -> list[tuple[_Numbers, int, bool]]:
    """What some stages have: a group of weights, how often, and whether it is a unit of FSDP."""
    numbers, found = _numbers(model, replace(layout, pp=1)), []
    for part in stages:
        dense, moe = _kinds(model, part)
        found += [(numbers["dense"], dense, True), (numbers["moe"], moe, True)]
        if part.first or part.last:
            ends = "both ends" if part.first and part.last else "first" if part.first else "last"
            found.append((numbers[ends], 1, False))
        if part.last:
            found.append((numbers["mtp"], model.num_nextn_predict_layers, True))
    return found


def _kinds(model: ModelConfig, part: StageSlice) -> tuple[int, int]:
    """Dense and MoE blocks of a stage."""
    layers = part.layers
    dense = min(max(model.first_k_dense_replace - layers.start, 0), len(layers))
    return dense, len(layers) - dense


@once_per_shape
def _weights_of_groups(model: ModelConfig) -> dict[str, list[Weight]]:
    """Of one block (``dense``, ``moe``), one MTP module (``mtp``), and what stages have besides."""
    ends = {
        name: model_weights(model, (), first, last)
        for name, first, last in (
            ("first", True, False),
            ("last", False, True),
            ("both ends", True, True),
        )
    }
    groups = {
        "dense": block_weights(model, moe=False),
        "moe": block_weights(model, moe=True),
        "mtp": [weight for weight in ends["last"] if weight.name.startswith("mtp.0.")],
    }
    for name, weights in ends.items():
        groups[name] = [weight for weight in weights if not weight.name.startswith("mtp.")]
    return groups


@once_per_shape
def _numbers(model: ModelConfig, layout: Layout) -> dict[str, _Numbers]:
    """Of each of ``_weights_of_groups``, whatever the pipeline."""
    found = {}
    for name, weights in _weights_of_groups(model).items():
        kept = biases = trained = hidden = whole = gathered = beside = alone = 0
        for weight in weights:
            count = math.prod(kept_shape(weight, layout))
            if weight.buffer:
                biases += count
                continue
            kept += count
            if model.peft is None or weight.adapter:
                trained += count
                if len(weight.shape) > 1 and name in ("dense", "moe", "mtp"):
                    hidden += count
            here = math.prod(weight.divided(layout.tp, layout.ep))
            if weight.routed and layout.keeps_experts:
                alone += here
            else:
                padded = count * (layout.edp if weight.routed else layout.dp_shard)
                whole += here
                gathered += padded
                beside += 0 if weight.routed and layout.ep * layout.tp > 1 else padded
        found[name] = _Numbers(kept, biases, trained, hidden, whole, gathered, beside, alone)
    return found


def reshards(model: ModelConfig, layout: Layout) -> bool:
    """Whether FSDP drops gathered weights after the forward pass, to gather them once more.

    As ``model.reshard_after_forward`` says; of itself only without a pipeline, and where they take
    more than ``KEPT_BYTES``.
    """
    if model.reshard_after_forward is not None:
        return model.reshard_after_forward
    return layout.pp == 1 and gathered_bytes(model, layout) > KEPT_BYTES


def reduces_gradients(model: ModelConfig, layout: Layout) -> bool:
    """Whether data-parallel ranks add up and divide gradients after every micro-batch.

    As ``model.reduce_gradients`` says; of itself where weights are given back, too. Else a rank
    holds whole gradients, in fp32, from the first micro-batch to the last.
    """
    if model.reduce_gradients is not None:
        return model.reduce_gradients
    return reshards(model, layout)


class RankNeed(NamedTuple):
    """Most bytes that one rank has at a time, by what they are for.

    Routing is taken to be balanced, and gradients, weights and moments are fp32. Activations are
    those of GPUs, with a flash kernel; the test of this class follows every tensor of a fake step.
    """

    states: int
    """Weights and moments, as kept between steps."""
    gathered: int
    """Weights as computed with, of several ranks."""
    gradients: int
    """As held between micro-batches, or of the units that are under way."""
    activations: int
    """Of the micro-batches that wait for their backward pass."""
    buffers: int
    """That stages of a pipeline receive in: one in each direction is under way."""
    working: int
    """What one backward pass needs besides, its recomputation and the experts' exchange included.
    """

    @property
    def total(self) -> int:
        """All of it; a device's context and NCCL's own buffers, 1 to 2 GiB, are not counted."""
        return sum(self)


def rank_need(
    model: ModelConfig, layout: Layout, pp_rank: int, micro_batches: int, half: bool
) -> RankNeed:
    """What a rank at one place of the pipeline needs.

    Args:
        model: the sizes.
        layout: divides weights and work.
        pp_rank: place in the pipeline.
        micro_batches: of a step.
        half: products are computed in 2 bytes (``bf16-mixed``).
    """
    stages, held = rank_stages(model, pp_rank), in_flight(model, pp_rank, micro_batches)
    kept = _states(model, layout, stages, model.optim.name)
    root = roots_gradient = alone = 0
    units: list[tuple[int, int, int]] = []
    for numbers, times, unit in _groups(model, layout, stages):
        alone += 4 * times * numbers.alone
        if unit:
            units += times * [(4 * numbers.gathered, 4 * numbers.whole, 4 * numbers.beside)]
        else:
            roots_gradient += 4 * times * numbers.whole
            root += 4 * times * numbers.gathered
    units.sort()
    beside = units[-2][2] if len(units) > 1 else 0
    parted, trains = layout.world_size > 1, model.peft is None
    at_once = micro_batches == 1 and layout.pp == 1
    reduces = parted and trains and (reduces_gradients(model, layout) or at_once)
    gradients, of_block = kept.gradients, 0
    if reduces:
        of_block = beside  # of the block before, on its way
    elif parted and trains:  # experts in whole are not gathered, nor their gradients
        gradients = alone + roots_gradient + sum(unit[1] for unit in units)
    of_one = [_stage_activations(model, layout, part, half) for part in stages]
    waiting = sum(n * one for n, one in zip(held.values(), of_one, strict=True))
    waiting += _split_backward(model, layout, pp_rank, list(held.values()), of_one, half)
    hidden = 4 * _tokens(model, layout) // layout.tp * model.hidden_size
    ends = sum((not part.first) + (not part.last) for part in stages)
    gives_back = reshards(model, layout)

    def moment(blocks: int, gradients: int, activations: int, working: int) -> RankNeed:
        """While a block works, or none: of those that give their weights back, gathered are its
        own and the next one's, but for experts that come later."""
        there = blocks * (units[-1][0] + beside) if units else 0
        if not gives_back:
            there = sum(unit[0] for unit in units)
        gathered = (root + there) * parted
        states = kept.weights + kept.optimizer
        return RankNeed(states, gathered, gradients, activations, ends * hidden, working)

    # Where all go forward first there is no gradient yet, and one less waits when there is.
    forward_first = all(n == micro_batches for n in held.values())
    before = 0 if forward_first else gradients
    less = sum(of_one) if forward_first and micro_batches > 1 else 0
    main = _working(model, layout, _kinds_of(model, stages), half)
    moments, under_way, of_embedding = [], gradients + of_block, 0
    if not any(part.last for part in stages):
        moments.append(moment(1, under_way, waiting - less, main))
        if less:
            moments.append(moment(1, of_block, waiting, main))
    else:
        depth = model.num_nextn_predict_layers
        numbers_of_head = model.vocab_size // layout.tp * model.hidden_size
        table = 4 * numbers_of_head * trains
        # A head in bf16 and its gradient's summand; logits and what they become.
        chunk = 8 * model.vocab_size // layout.tp * CHUNK_TOKENS
        chunk += 2 * numbers_of_head * (1 + trains) * half
        moments = [moment(0, before, waiting, chunk), moment(1, before, waiting, table)]
        waiting -= less
        # Now what the heads have made is added up, with the embedding's gradient of every depth;
        # not while another stage works.
        of_head = table if reduces else 0
        waiting -= (1 + depth) * table * (len(stages) == 1)
        ahead = _working(model, layout, {True}, half) if depth else 0
        under_way += of_head
        moments.append(moment(1, under_way, waiting, ahead + table * (depth > 1)))
        waiting -= depth * _ahead_activations(model, layout, half)
        of_embedding = table * (depth > 0)
        moments.append(moment(1, under_way, waiting, main + of_embedding))
    if gives_back and units:  # what experts are gathered into is there twice till they have run
        experts_at_work = _experts_at_work(model, layout, half) + of_embedding
        twice = moment(1, under_way, waiting, experts_at_work)
        experts = units[-1][0] - units[-1][2]
        moments.append(twice._replace(gathered=twice.gathered + experts * parted))
    if reduces:  # the embedding comes last
        moments.append(moment(0, gradients + 2 * roots_gradient, 0, 0))
    return max(moments, key=lambda need: need.total)


def rank_needs(run: RunConfig) -> list[RankNeed]:
    """Of the ranks at each place of the pipeline."""
    model, layout = run.model, Layout.of_run(run)
    micro_batches = model.global_batch_size // (model.micro_batch_size * layout.dp)
    half = in_half(run)
    return [rank_need(model, layout, pp, micro_batches, half) for pp in range(layout.pp)]


def in_half(run: RunConfig) -> bool:
    """Whether products are taken to be computed in 2 bytes; of ``auto``, on anything but a CPU."""
    precision = str(run.trainer.precision)
    return precision == "bf16-mixed" or (precision == "auto" and run.trainer.accelerator != "cpu")


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


def _split_backward(
    model: ModelConfig,
    layout: Layout,
    pp_rank: int,
    held: Sequence[int],
    of_one: Sequence[int],
    half: bool,
) -> int:
    """Bytes that activations take besides where weights get their gradients later than inputs.

    Till then a micro-batch keeps its activations, which ``in_flight`` counts, and the gradients of
    what every matrix has made. A stage that recomputes makes both at once, and keeps neither.
    """
    name, pp = model.pipeline_schedule, model.pipeline_model_parallel_size
    if pp == 1 or name not in ("InterleavedZeroBubble", "ZBVZeroBubble"):
        return 0
    if model.activations_checkpoint_granularity:
        early = min(pp_rank, held[-1] - 1) if name == "InterleavedZeroBubble" else 0
        return -early * of_one[-1]
    several = model.num_nextn_predict_layers > 1  # whose stage is not split either
    made = [
        0 if part.last and several else _product_gradients(model, layout, part, half)
        for part in rank_stages(model, pp_rank)
    ]
    if name == "InterleavedZeroBubble":
        return min(pp_rank + 1, held[-1]) * made[-1]
    # A V that fills up has one such backward pass under way, one that runs empty all of them.
    first, second = min(pp, held[0]), min(pp_rank, held[-1])
    empty = first * of_one[0] + second * of_one[1]
    empty += min(pp_rank + 1, first) * made[0] + second * made[1]
    full = sum(n * one for n, one in zip(held, of_one, strict=True))
    return max(made[-1], empty - full)


def _product_gradients(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes of the gradients of what the products and norms of a stage's blocks have made."""
    tokens, tp, dim = _tokens(model, layout), layout.tp, model.hidden_size
    here, heads, number = tokens // tp, model.num_attention_heads // tp, 2 if half else 4
    latents = model.kv_lora_rank + (model.q_lora_rank or 0)
    attention = tokens * heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    attention += tokens * (latents + model.qk_rope_head_dim) + here * dim
    common = number * attention + 4 * (tokens * latents + 2 * here * dim)
    dense = number * (2 * tokens * model.intermediate_size // tp + here * dim)
    inner = model.moe_intermediate_size
    experts = number * here * model.num_experts_per_tok * (2 * inner + dim)
    shared = model.n_shared_experts * inner
    experts += number * (2 * tokens * shared // tp + here * dim) if shared else 0
    experts += 4 * here * model.n_routed_experts
    of_kind = (common + dense, common + experts)
    return (
        sum(n * size for n, size in zip(_kinds(model, part), of_kind, strict=True)) + 8 * here * dim
    )


def _tokens(model: ModelConfig, layout: Layout) -> int:
    """Of a micro-batch on the ranks of one part of its sequences."""
    return model.micro_batch_size * model.data.seq_length // layout.cp


def _stage_activations(model: ModelConfig, layout: Layout, part: StageSlice, half: bool) -> int:
    """Bytes that a stage keeps of one micro-batch from its forward to its backward pass."""
    hidden = 4 * _tokens(model, layout) // layout.tp * model.hidden_size
    again = _recomputing(model, part)
    total = sum(
        n * _kept_activations(model, layout, bool(moe), half)
        + (blocks - n) * _block_activations(model, layout, bool(moe), half)
        for moe, (n, blocks) in enumerate(zip(again, _kinds(model, part), strict=True))
        if blocks
    )
    if not part.last:
        return total + (hidden if layout.pp > 1 else 0)  # the pipeline keeps what it has sent
    depth = model.num_nextn_predict_layers
    head = 4 * model.vocab_size // layout.tp * model.hidden_size
    if model.peft is None:
        total += (1 + depth) * head  # its gradients, made in the forward pass
    total += 3 * hidden  # input of the norm, normed, gradient of the head's
    return total + depth * _ahead_activations(model, layout, half)


def _ahead_activations(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes that one MTP depth keeps of one micro-batch, the gradient of the head not included."""
    hidden = 4 * _tokens(model, layout) // layout.tp * model.hidden_size
    ahead = hidden * 2 + hidden * (2 if half else 4) // 4
    if not model.activations_checkpoint_granularity:
        ahead += _block_activations(model, layout, True, half) + 2 * hidden
        ahead += hidden + 4 * model.hidden_size**2 if half else hidden
    elif model.activations_checkpoint_granularity == "selective":
        ahead += _kept_activations(model, layout, True, half) - hidden
        ahead += hidden * (2 if half else 4) // 4
    return ahead


def _recomputing(model: ModelConfig, part: StageSlice) -> tuple[int, int]:
    """Dense and MoE blocks of a stage that recompute: its first ones."""
    most, (dense, moe) = model.activations_checkpoint_num_layers, _kinds(model, part)
    if model.activations_checkpoint_granularity is None:
        return 0, 0
    if most is None:
        return dense, moe
    return min(dense, most), min(moe, max(0, most - dense))


def _kept_activations(model: ModelConfig, layout: Layout, moe: bool, half: bool) -> int:
    """Bytes that a block keeps for its backward pass if it recomputes, its input included.

    ``models/components/recompute.py`` says what.
    """
    tokens, dim, tp = _tokens(model, layout), model.hidden_size, layout.tp
    here, number = tokens // tp, 2 if half else 4
    rows = here * model.num_experts_per_tok
    total = 4 * here * dim
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


def _kinds_of(model: ModelConfig, stages: Sequence[StageSlice]) -> set[bool]:
    """Whether there are MoE blocks, and others."""
    return {bool(moe) for part in stages for moe, n in enumerate(_kinds(model, part)) if n}


def _working(model: ModelConfig, layout: Layout, kinds: set[bool], half: bool) -> int:
    """Bytes of one block's backward pass, the costliest of ``kinds``, beside what waits for it."""
    tokens, dim = _tokens(model, layout), model.hidden_size
    hidden = 4 * tokens // layout.tp * dim
    most = 0
    for moe in kinds:
        if moe:
            rows = tokens // layout.tp * model.num_experts_per_tok
            needed = (8 + (2 if half else 0)) * rows * dim + hidden
            if model.activations_checkpoint_granularity:  # which ends before the experts' results
                needed = (2 if half else 4) * rows * dim + hidden
        else:
            width = model.intermediate_size // layout.tp
            needed = 4 * dim * width + hidden + (0 if half else 4 * tokens * width)
        if model.activations_checkpoint_granularity:
            kept = _kept_activations(model, layout, moe, half)
            needed += _block_activations(model, layout, moe, half) - kept
        most = max(most, needed)
    return most


def _experts_at_work(model: ModelConfig, layout: Layout, half: bool) -> int:
    """Bytes of the forward pass of experts, what is recomputed before them included."""
    rows = _tokens(model, layout) // layout.tp * model.num_experts_per_tok
    needed = 0
    if half:  # rows in fp32 before their copy, and what they are weighted in
        needed = 4 * rows * (model.hidden_size * (layout.ep == 1) + model.moe_intermediate_size)
    if model.peft is not None:  # results of matrix and adapter, and their sum
        needed += 3 * rows * model.hidden_size * (2 if half else 4)
    if model.activations_checkpoint_granularity:
        needed += _block_activations(model, layout, True, half)
        needed -= _kept_activations(model, layout, True, half)
    return needed


def _block_activations(model: ModelConfig, layout: Layout, moe: bool, half: bool) -> int:
    """Bytes that a block keeps for its backward pass if nothing is recomputed, its input included.

    The residual stream and what norms keep are fp32. In half precision every product keeps a copy
    of its input and of its matrix: autocast casts them anew for each.
    """
    tokens, dim, tp = _tokens(model, layout), model.hidden_size, layout.tp
    number, heads = 2 if half else 4, model.num_attention_heads // tp
    here, latent = tokens // tp, model.kv_lora_rank
    total = 4 * 4 * here * dim  # input, after attention, and both normed
    inputs = 2 * number * tokens * dim if half else number * tokens * dim
    # attention
    keys = tokens * layout.cp  # of the whole sequence
    total += inputs + tokens * heads * (number * (model.qk_head_dim + model.v_head_dim) + 4)
    total += keys * heads * number * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim)
    if layout.cp > 1:
        total += number * keys * (latent + model.qk_rope_head_dim)
    total += tokens * ((8 if half else 12) * (latent + (model.q_lora_rank or 0)))
    if model.data.isolate_documents:
        total += (1 + number) * tokens * model.data.seq_length
    if model.peft is not None:  # what norms and router are given is for their weights alone
        total -= 4 * (2 + moe) * here * dim
    matrices = _attention(model) // (tp if tp > 1 else 1)
    # feed-forward
    width = model.intermediate_size // tp
    if moe:
        rows = here * model.num_experts_per_tok
        inner, slots = model.moe_intermediate_size, _slots(model, layout, rows)
        total += 4 * here * dim  # for the router, in fp32
        total += slots * (number * (dim + 5 * inner) + 4)
        total += 5 * 4 * here * model.n_routed_experts + 6 * 8 * rows
        matrices += model.n_routed_experts // layout.ep * 3 * dim * inner
        width = model.n_shared_experts * inner // tp
        inputs = inputs if half else 0  # the router's copy
    total += (inputs if width else 0) + 4 * number * tokens * width
    return total + (2 * (matrices + 3 * dim * width) if half else 0)


def _slots(model: ModelConfig, layout: Layout, rows: int) -> int:
    """That the rows of a rank's experts are padded to, at most."""
    experts = model.n_routed_experts // layout.ep
    return ROW_ALIGNMENT * (experts + max(rows - 1, 0) // ROW_ALIGNMENT)


# -- terms of the counts --


def _adapters(model: ModelConfig) -> list[Weight]:
    """Both halves of every adapter."""
    return [weight for weight in model_weights(model) if weight.adapter]


def _attention(model: ModelConfig) -> int:
    """Parameters of one latent attention (MLA), the norms of its latents included."""
    dim, heads, latent = model.hidden_size, model.num_attention_heads, model.kv_lora_rank
    queries = heads * model.qk_head_dim
    if model.q_lora_rank is None:
        query = dim * queries
    else:
        query = dim * model.q_lora_rank + model.q_lora_rank + model.q_lora_rank * queries
    key_value = dim * (latent + model.qk_rope_head_dim) + latent
    expand = latent * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + key_value + expand + heads * model.v_head_dim * dim
