"""The rules of layouts: processes, tensor, pipeline, expert and data parallelism, and the batch.

Each message carries the arithmetic, so that a layout can be mended without reading this file.
``config/layout.py`` turns a configuration that obeys these rules into ranks and stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from deepseek.config.batch_ramp import MOST_INCREMENTS, leads_to
from deepseek.config.errors import Problem, divisors, listed
from deepseek.config.layout import (
    INTERLEAVED_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    data_parallel_size,
    data_shards,
    most_output_stages,
    split_layers,
    stages_per_rank,
    world_size,
)
from deepseek.config.schema import RunConfig, idle
from deepseek.config.weights import Weight, has_experts, has_whole_tiles, weight_kinds


def processes(cfg: RunConfig) -> Iterator[Problem]:
    """The processes can be divided into tensor, pipeline, context and data parallel ranks."""
    world, inside = world_size(cfg), _ranks_of_a_batch(cfg)
    if world % inside:
        nodes = cfg.trainer.num_nodes
        enough = math.lcm(inside, nodes) // nodes
        context = " x context" if cfg.model.context_parallel_size > 1 else ""
        yield Problem(
            "trainer.devices",
            cfg.trainer.devices,
            f"devices {cfg.trainer.devices} x nodes {nodes} = {world} processes is not a multiple "
            f"of {_sizes_of_a_batch(cfg)} = {inside}",
            f"use trainer.devices={enough} (or a multiple), or tensor x pipeline{context} equal to "
            f"{listed(divisors(world), near=inside)}",
        )


def context_parallel(cfg: RunConfig) -> Iterator[Problem]:
    """A sequence can be cut into two chunks for every rank that shares it, and those for TP."""
    cp, tp = cfg.model.context_parallel_size, cfg.model.tensor_model_parallel_size
    length, unit = cfg.model.data.seq_length, math.lcm(2 * cp, cp * tp)
    if cp == 1 or length % unit == 0:
        return
    chunks = f"2 x {cp} chunks" + (f" and those of a rank over tensor {tp}" if tp > 1 else "")
    near = [n for n in (length // unit * unit, (length // unit + 1) * unit) if n]
    ranks = world_size(cfg) * cp // _ranks_of_a_batch(cfg)
    fits = [n for n in divisors(ranks) if n == 1 or length % math.lcm(2 * n, n * tp) == 0]
    yield Problem(
        "model.context_parallel_size",
        cp,
        f"cuts a sequence into {chunks}, and model.data.seq_length={length} is no multiple of "
        f"{unit}",
        f"use model.data.seq_length={' or '.join(map(str, near))}, or for "
        f"model.context_parallel_size {listed(fits, near=cp)}",
    )


def tensor_parallel(cfg: RunConfig) -> Iterator[Problem]:
    """Whatever is cut over the tensor ranks can be cut: heads, vocabulary, widths, sequence."""
    tp, cut = cfg.model.tensor_model_parallel_size, _cut_by_tensor_ranks(cfg)
    uneven = [f"{what}={size}" for what, size in cut.items() if size % tp]
    if uneven:
        world, others = world_size(cfg), _ranks_of_a_batch(cfg) // tp
        ranks = world // others if world % others == 0 else 0
        yield Problem(
            "model.tensor_model_parallel_size",
            tp,
            f"does not divide {' and '.join(uneven)}",
            f"use {listed(divisors(math.gcd(ranks, *cut.values())), near=tp)}",
        )


def fp8_blocks(cfg: RunConfig) -> Iterator[Problem]:
    """Products in FP8 are of weights that are trained, and TP cuts no block of them in two."""
    recipe, tp = cfg.model.fp8_recipe, cfg.model.tensor_model_parallel_size
    if recipe is None:
        because = "model.fp8_recipe=null computes nothing in FP8"
        yield from idle(cfg, "model.fp8_kernels", because, "model.fp8_recipe=blockwise")
        return
    if cfg.trainer.accelerator == "cpu":
        because = "trainer.accelerator=cpu has no such kernels"
        yield from idle(cfg, "model.fp8_kernels", because, "another trainer.accelerator")
    elif cfg.model.fp8_kernels and not any(_tiled_products(cfg)):
        wide, inner = min(_fp8_matrices(cfg), key=sum)
        yield Problem(
            "model.fp8_kernels",
            True,
            "would multiply nothing: kernels sum over whole tiles of 128 numbers, and no product "
            f"of a linear map with a micro-batch of {_tokens_here(cfg)} tokens has such sizes (the "
            f"smallest matrix is {wide} x {inner})",
            "use false, which computes the same in bf16, or sizes that are multiples of 128",
        )
    if cfg.model.peft is not None:
        yield Problem(
            "model.fp8_recipe",
            recipe,
            "with model.peft matrices have adapters beside them, whose products are not in FP8",
            "use null, or model.peft=null",
        )
    cut = {
        f"{weight.name} has {weight.shape[weight.tp_dim]}"
        for weight in weight_kinds(cfg.model)
        if weight.tp_dim is not None and weight.lora and weight.shape[weight.tp_dim] % (128 * tp)
    }
    if tp > 1 and cut:
        yield Problem(
            "model.fp8_recipe",
            recipe,
            f"has a scale for each 128 rows and columns, and model.tensor_model_parallel_size={tp} "
            f"would cut between: {min(cut)}, no multiple of {128 * tp}",
            "use null, or model.tensor_model_parallel_size=1",
        )


def _fp8_matrices(cfg: RunConfig) -> list[tuple[int, int]]:
    """What TP leaves of each linear map in a block: outputs and inputs."""
    tp = cfg.model.tensor_model_parallel_size
    linear = [w for w in weight_kinds(cfg.model) if w.lora and not w.routed]
    return [(rows, columns) for w in linear for rows, columns in [w.divided(tp, 1)]]


def _tiled_products(cfg: RunConfig) -> Iterator[bool]:
    """Of each product of the linear maps, with rows, of gradients with the matrix, and of
    gradients with rows: whether kernels take it."""
    tokens = _tokens_here(cfg)
    for outer, inner in _fp8_matrices(cfg):
        yield has_whole_tiles(tokens, inner, outer)
        yield has_whole_tiles(tokens, outer, inner)
        yield has_whole_tiles(outer, tokens, inner)


def _tokens_here(cfg: RunConfig) -> int:
    """Of a micro-batch, on a context rank."""
    model = cfg.model
    return model.micro_batch_size * model.data.seq_length // model.context_parallel_size


def pipeline_settings(cfg: RunConfig) -> Iterator[Problem]:
    """Settings of a pipeline act on one, and fit its schedule."""
    model = cfg.model
    pp, schedule = model.pipeline_model_parallel_size, model.pipeline_schedule
    if pp == 1:
        for key in (
            "pipeline_schedule",
            "virtual_pipeline_model_parallel_size",
            "pipeline_layers_per_stage",
            "pipeline_output_stages",
        ):
            yield from idle(
                cfg,
                f"model.{key}",
                "model.pipeline_model_parallel_size=1",
                "model.pipeline_model_parallel_size=2 or more",
            )
        return
    virtual = model.virtual_pipeline_model_parallel_size
    if schedule in INTERLEAVED_SCHEDULES and virtual < 2:
        yield Problem(
            "model.virtual_pipeline_model_parallel_size",
            virtual,
            f"leaves nothing to interleave: model.pipeline_schedule={schedule} needs at least 2 "
            "stages a rank",
            "use 2, or model.pipeline_schedule=1F1B",
        )
    if schedule not in INTERLEAVED_SCHEDULES:
        held = "2 stages" if schedule in V_SCHEDULES else "1 stage"
        yield from idle(
            cfg,
            "model.virtual_pipeline_model_parallel_size",
            f"model.pipeline_schedule={schedule} always has {held} a rank",
            "model.pipeline_schedule=Interleaved1F1B",
        )
    if schedule in SPLIT_BACKWARD_SCHEDULES and model.torch_compile:
        yield Problem(
            "model.torch_compile",
            True,
            f"model.pipeline_schedule={schedule} computes the gradients of inputs and weights "
            "apart, which a compiled block cannot",
            "use null or false, or model.pipeline_schedule=1F1B or Interleaved1F1B",
        )


def recomputation(cfg: RunConfig) -> Iterator[Problem]:
    """A number of blocks that recompute says something: of some, and not of all of them."""
    model, key = cfg.model, "model.activations_checkpoint_num_layers"
    if model.activations_checkpoint_granularity is None:
        yield from idle(
            cfg,
            key,
            "model.activations_checkpoint_granularity=null keeps all activations",
            "model.activations_checkpoint_granularity=selective or full",
        )
        return
    if model.activations_checkpoint_granularity == "selective" and model.torch_compile:
        yield Problem(
            "model.torch_compile",
            True,
            "decides by itself what is cheap to recompute, as "
            "model.activations_checkpoint_granularity=selective does for what is not compiled",
            "use model.activations_checkpoint_granularity=null or full, or leave this null",
        )
    number, held = model.activations_checkpoint_num_layers, stages_per_rank(model)
    stages, split = (
        model.pipeline_model_parallel_size * (held or 0),
        model.pipeline_layers_per_stage,
    )
    if (
        number is None
        or not 0 < stages <= model.num_hidden_layers
        or (split is not None and len(split) != stages)
        or model.pipeline_output_stages > most_output_stages(model)
    ):
        return  # other rules speak of these
    most = max(len(part.layers) for part in split_layers(model))
    if number >= most:
        yield Problem(
            key,
            number,
            f"is all there are: no pipeline stage has more than {most} blocks",
            "use null" + (f", or at most {most - 1}" if most > 1 else ""),
        )


def offloading(cfg: RunConfig) -> Iterator[Problem]:
    """There is a device beside the host, and nothing else decides where activations lie."""
    model, key = cfg.model, "model.cpu_offloading_activations"
    if cfg.trainer.accelerator == "cpu":
        because = "trainer.accelerator=cpu computes in the host's memory"
        yield from idle(cfg, "model.optim.cpu_offload", because, "another trainer.accelerator")
    if not model.cpu_offloading_activations:
        return
    against = {
        "trainer.accelerator=cpu": (
            "computes in the host's memory already",
            cfg.trainer.accelerator == "cpu",
        ),
        "model.activations_checkpoint_granularity=selective": (
            "keeps results itself, where they cannot be sent from",
            model.activations_checkpoint_granularity == "selective",
        ),
        "model.torch_compile=true": ("keeps what it decides to", bool(model.torch_compile)),
    }
    for setting, (why, holds) in against.items():
        if holds:
            other = f"another {setting.partition('=')[0]}"
            yield Problem(
                key, True, f"has no effect on what {setting} {why}", f"use false, or {other}"
            )


def pipeline_stages(cfg: RunConfig) -> Iterator[Problem]:
    """Every stage before the output has at least one layer, and a split by hand covers all
    layers."""
    model = cfg.model
    pp, layers, split = (
        model.pipeline_model_parallel_size,
        model.num_hidden_layers,
        model.pipeline_layers_per_stage,
    )
    held = stages_per_rank(model)
    if pp == 1 or held is None:
        return
    stages = pp * held
    times = f"x {held} stages a rank = {stages} stages " if held > 1 else ""
    if stages > layers:
        world, tp = world_size(cfg), model.tensor_model_parallel_size
        ranks = world // tp if world % tp == 0 else pp
        fewer = [n for n in divisors(ranks) if n * held <= layers] or [1]
        yield Problem(
            "model.pipeline_model_parallel_size",
            pp,
            f"{times}is more than model.num_hidden_layers={layers}, so that a stage would be empty",
            f"use {listed(fewer, near=pp)}"
            + (", or model.pipeline_schedule=1F1B" if held > 1 and pp <= layers else ""),
        )
        return
    over, most = model.pipeline_output_stages, most_output_stages(model)
    if over > most:
        depth = model.num_nextn_predict_layers
        yield Problem(
            "model.pipeline_output_stages",
            over,
            f"is more than can share the output of model.num_nextn_predict_layers={depth} "
            f"and {stages} stages: {most}",
            f"use at most {most}",
        )
    elif split is not None:
        faults, before = [], stages - over  # the stages before the output
        if len(split) != stages:
            entries = "1 entry" if len(split) == 1 else f"{len(split) or 'no'} entries"
            faults.append(f"has {entries}, for pipeline {pp} {times}".rstrip())
        elif min(split[:before], default=1) < 1 or min(split[before:]) < 0:
            faults.append("leaves a stage without a layer, as only one with the output may be")
        elif any(split[before + 1 :]):
            faults.append(
                "has a layer after the main loss, which is in stage "
                f"{before} with model.pipeline_output_stages={over}"
            )
        if split and sum(split) != layers:
            sizes = f"{' + '.join(map(str, split))} = " if len(split) > 1 else ""
            faults.append(f"has {sizes}{sum(split)} of model.num_hidden_layers={layers}")
        if faults:
            share, rest = divmod(layers, before + 1)
            even = [share] * (before + 1 - rest) + [share + 1] * rest + [0] * (over - 1)
            least = "the last: 0" if over == 1 else f"the last {over}: 0"
            yield Problem(
                "model.pipeline_layers_per_stage",
                list(split),
                " and ".join(faults),
                f"use {stages} numbers of at least 1 ({least}) that add up to {layers}, such "
                f"as {even}, or null",
            )


def rampup(cfg: RunConfig) -> Iterator[Problem]:
    """A batch that grows does so in whole increments, and each size can be run."""
    model, path = cfg.model, "model.rampup_batch_size"
    ramp, whole = model.rampup_batch_size, model.global_batch_size
    if ramp is None:
        return
    if len(ramp) != 3 or min(ramp) < 1:
        fault, way_out = "must be three numbers, each at least 1", "use [start, increment, samples]"
        yield Problem(path, list(ramp), fault, way_out)
        return
    start, increment, _ = ramp
    if not leads_to(whole, ramp):
        steps = [n for n in divisors(max(1, whole - start)) if leads_to(whole, (start, n, 1))]
        yield Problem(
            path,
            list(ramp),
            f"does not lead from {start} to model.global_batch_size={whole} in 1 to "
            f"{MOST_INCREMENTS:,} increments of {increment}",
            f"use an increment of {listed(steps, near=increment)}"
            if steps
            else f"use a start below {whole}, or null",
        )
        return
    dp, pp = data_parallel_size(model, world_size(cfg)), model.pipeline_model_parallel_size
    if dp is None or stages_per_rank(model) is None:
        return  # other rules speak of these
    unit, schedule = model.micro_batch_size * dp, model.pipeline_schedule
    for size in range(start, whole, increment):
        fits, need = _needed_micro_batches(schedule, pp, size // unit)
        if size % unit:
            fault = f"no multiple of model.micro_batch_size x data-parallel size {dp} = {unit}"
        elif pp > 1 and not fits(size // unit):
            fault = f"{size // unit} micro-batches, and {schedule} over {pp} ranks needs {need}"
        else:
            continue
        yield Problem(
            path,
            list(ramp),
            f"leads through a batch of {size} sequences: {fault}",
            f"use a start and an increment that are multiples of {unit}, or null",
        )
        return


def pipeline_micro_batches(cfg: RunConfig) -> Iterator[Problem]:
    """A step has as many micro-batches as its schedule needs."""
    model = cfg.model
    pp, schedule = model.pipeline_model_parallel_size, model.pipeline_schedule
    dp = data_parallel_size(cfg.model, world_size(cfg))
    whole, micro = model.global_batch_size, model.micro_batch_size
    held = stages_per_rank(model)
    if pp == 1 or held is None or pp * held > model.num_hidden_layers:
        return  # other rules speak of these
    if dp is None or whole % (micro * dp):
        return
    count = whole // (micro * dp)
    fits, need = _needed_micro_batches(schedule, pp, count)
    if fits(count):
        return
    legal = [next(n for n in range(count + 1, count + 4 * pp + 1) if fits(n))]
    legal = [*[n for n in range(count - 1, 0, -1) if fits(n)][:1], *legal]
    batches = [str(n * micro * dp) for n in legal]
    ways = [f"use model.global_batch_size={' or '.join(batches)}"]
    smaller = [n for n in divisors(whole // dp) if fits(whole // dp // n)]
    if smaller:
        ways.append(f"for model.micro_batch_size {listed(smaller, near=micro)}")
    if schedule in ("1F1B", "DualPipeV"):
        free = "GPipe" if schedule == "1F1B" else "ZBVZeroBubble"
        ways.append(f"model.pipeline_schedule={free}, which takes any number")
    yield Problem(
        "model.global_batch_size",
        whole,
        f"/ (model.micro_batch_size {micro} x data-parallel size {dp}) = {count} micro-batches a "
        f"step, and model.pipeline_schedule={schedule} over {pp} ranks needs {need}",
        ", or ".join(ways),
    )


def expert_parallel(cfg: RunConfig) -> Iterator[Problem]:
    """Experts are shared out over ranks borrowed from data and tensor parallelism."""
    ep, experts = cfg.model.expert_model_parallel_size, cfg.model.n_routed_experts
    tp, replicas = cfg.model.tensor_model_parallel_size, cfg.model.data_parallel_replicate_size
    dp = data_parallel_size(cfg.model, world_size(cfg))
    if dp is None:
        return
    if dp % replicas:
        yield Problem(
            "model.data_parallel_replicate_size",
            replicas,
            f"does not divide the data-parallel size = {_data_parallel_sum(cfg, dp)}",
            f"use {listed(divisors(dp), near=replicas)}",
        )
        return
    context = cfg.model.context_parallel_size
    ranks = dp // replicas * context * tp
    legal = f"use {listed(divisors(math.gcd(ranks, experts)), near=ep)}"
    if experts % ep:
        rule = f"does not divide model.n_routed_experts={experts}"
        yield Problem("model.expert_model_parallel_size", ep, rule, legal)
    if ranks % ep:
        halves = f" / {replicas} replicas" if replicas > 1 else ""
        yield Problem(
            "model.expert_model_parallel_size",
            ep,
            f"does not divide data-parallel x {'context x ' if context > 1 else ''}tensor ranks = "
            f"{dp // replicas} x {f'{context} x ' if context > 1 else ''}{tp} = {ranks} "
            f"(data-parallel size = {_data_parallel_sum(cfg, dp)}{halves})",
            legal,
        )


def dispatchers(cfg: RunConfig) -> Iterator[Problem]:
    """DeepEP sends rows of bf16 between GPUs; without EP nothing is sent."""
    model, key = cfg.model, "model.moe_token_dispatcher_type"
    if model.expert_model_parallel_size == 1:
        because = "with model.expert_model_parallel_size=1 no token travels"
        others = ("moe_dispatch_fp8", "moe_ranks_per_node", "overlap_moe_expert_parallel_comm")
        for name in (key, *(f"model.{other}" for other in others)):
            yield from idle(cfg, name, because, "model.expert_model_parallel_size=2 or more")
        return
    yield from _dispatch_per_node(cfg)
    overlap, schedule = "model.overlap_moe_expert_parallel_comm", model.pipeline_schedule
    if model.pipeline_model_parallel_size == 1:
        because = "model.pipeline_model_parallel_size=1 computes no two passes at a time"
        or_else = "model.pipeline_model_parallel_size=2 or more with DualPipeV"
        yield from idle(cfg, overlap, because, or_else)
    elif schedule != "DualPipeV":
        because = f"model.pipeline_schedule={schedule} computes no two passes at a time"
        yield from idle(cfg, overlap, because, "model.pipeline_schedule=DualPipeV")
    if model.moe_token_dispatcher_type != "deepep":
        return
    because = "model.moe_token_dispatcher_type=deepep sends tokens in its own way"
    for name in ("model.moe_dispatch_fp8", "model.moe_ranks_per_node", overlap):
        yield from idle(cfg, name, because, "model.moe_token_dispatcher_type=auto")
    faults = {
        f"runs on GPUs, and trainer.accelerator={cfg.trainer.accelerator}": "cpu"
        == cfg.trainer.accelerator,
        f"sends bf16, and trainer.precision={cfg.trainer.precision}": cfg.trainer.precision == "32",
        f"sends rows of 16 bytes and multiples, and model.hidden_size={model.hidden_size} are "
        f"{2 * model.hidden_size} bytes": model.hidden_size % 8 != 0,
    }
    for fault in (text for text, holds in faults.items() if holds):
        yield Problem(key, "deepep", fault, "use auto or alltoall")


def _dispatch_per_node(cfg: RunConfig) -> Iterator[Problem]:
    """The EP ranks of a machine are as many on each."""
    model = cfg.model
    number, ep, devices = (
        model.moe_ranks_per_node,
        model.expert_model_parallel_size,
        cfg.trainer.devices,
    )
    if number is None or (number < ep and ep % number == 0 and devices % number == 0):
        return
    fits = [n for n in divisors(math.gcd(ep, devices)) if 1 < n < ep]
    yield Problem(
        "model.moe_ranks_per_node",
        number,
        f"does not divide model.expert_model_parallel_size={ep} and trainer.devices={devices} into "
        "two or more",
        f"use {listed(fits, near=number)}" if fits else "use null",
    )


def data_parallel_shards(cfg: RunConfig) -> Iterator[Problem]:
    """What TP and EP leave of a weight can be shared by the data-parallel ranks.

    FSDP2 pads a whole weight, but not a part of one.
    """
    model = cfg.model
    tp, ep = model.tensor_model_parallel_size, model.expert_model_parallel_size
    shards = data_shards(model, world_size(cfg))
    cuts = math.gcd(*_cut_by_tensor_ranks(cfg).values())
    if shards is None or shards * tp % ep or model.n_routed_experts % ep or cuts % tp:
        return  # other rules speak of these
    stuck = [w for w in weight_kinds(model) if not w.routed and w.shard_dim(tp, ep, shards) is None]
    if stuck:
        legal = [
            n
            for n in divisors(math.gcd(cuts, world_size(cfg) // model.pipeline_model_parallel_size))
            for m in [data_shards(model, world_size(cfg), n)]
            if m and all(w.routed or w.shard_dim(n, ep, m) is not None for w in weight_kinds(model))
        ]
        yield Problem(
            "model.tensor_model_parallel_size",
            tp,
            f"leaves {_parts(stuck[0], tp, ep)} to a rank, no dim of which divides into the "
            f"{shards} parts for data-parallel ranks",
            f"use {listed(legal, near=tp)}, or another model.data_parallel_replicate_size",
        )
    parts = shards * tp // ep
    stuck = [w for w in weight_kinds(model) if w.routed and w.shard_dim(tp, ep, parts) is None]
    if stuck:
        legal = [
            n
            for n in divisors(math.gcd(shards * tp, model.n_routed_experts))
            if stuck[0].shard_dim(tp, n, shards * tp // n) is not None
        ]
        yield Problem(
            "model.expert_model_parallel_size",
            ep,
            f"leaves {_parts(stuck[0], tp, ep)} to a rank, no dim of which divides into parts for "
            f"the {shards} x {tp} / {ep} = {parts} ranks that share these experts",
            f"use {listed(legal, near=ep)}, or another model.data_parallel_replicate_size",
        )


def resharding(cfg: RunConfig) -> Iterator[Problem]:
    """Weights that are gathered can be kept or not, where there are any and no pipeline."""
    pp = cfg.model.pipeline_model_parallel_size
    yield from _over_shards(
        cfg,
        "model.reshard_after_forward",
        cfg.model.reshard_after_forward,
        f"model.pipeline_model_parallel_size={pp} keeps weights gathered from one micro-batch to "
        "the next, or it would gather them for each",
        "no two ranks share the memory of a weight, so that none is gathered",
    )


def gradient_reduction(cfg: RunConfig) -> Iterator[Problem]:
    """Gradients can be divided early where there are several shares, and no pipeline."""
    pp = cfg.model.pipeline_model_parallel_size
    yield from _over_shards(
        cfg,
        "model.reduce_gradients",
        cfg.model.reduce_gradients,
        f"torch's schedules for model.pipeline_model_parallel_size={pp} add gradients up over "
        "ranks once, at the end of a step",
        "no two ranks share the memory of a weight",
    )


def _over_shards(
    cfg: RunConfig, key: str, chosen: bool | None, pipelined: str, alone: str
) -> Iterator[Problem]:
    """What FSDP may do needs shards; true is what a pipeline cannot do.

    Args:
        cfg: the configuration.
        key: of the choice.
        chosen: its value.
        pipelined: why true is refused under a pipeline.
        alone: why either is idle where nothing is shared.
    """
    model = cfg.model
    shards = data_shards(model, world_size(cfg))
    if chosen is None or shards is None:
        return
    if chosen and model.pipeline_model_parallel_size > 1:
        yield Problem(key, True, pipelined, "use null or false")
    elif shards == 1 and model.tensor_model_parallel_size == model.expert_model_parallel_size:
        yield from idle(cfg, key, alone, "more trainer.devices")


def batch(cfg: RunConfig) -> Iterator[Problem]:
    """Every rank runs the same whole number of micro-batches in a step."""
    micro, whole = cfg.model.micro_batch_size, cfg.model.global_batch_size
    dp = data_parallel_size(cfg.model, world_size(cfg))
    if dp is None or whole % (micro * dp) == 0:
        return
    step = micro * dp
    multiples = [n for n in (whole // step * step, (whole // step + 1) * step) if n]
    way_out = f"use model.global_batch_size={' or '.join(map(str, multiples))}"
    if whole % dp == 0:
        way_out += f", or for model.micro_batch_size {listed(divisors(whole // dp), near=micro)}"
    yield Problem(
        "model.micro_batch_size",
        micro,
        f"x data-parallel size {dp} = {step} does not divide model.global_batch_size={whole} "
        f"(data-parallel size = {_data_parallel_sum(cfg, dp)})",
        way_out,
    )


# -- helpers --


def _cut_by_tensor_ranks(cfg: RunConfig) -> dict[str, int]:
    """Sizes that tensor ranks divide among them, by the fields they come from."""
    model = cfg.model
    cut = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.vocab_size": model.vocab_size,
        "model.data.seq_length": model.data.seq_length,
    }
    if model.first_k_dense_replace > 0:
        cut["model.intermediate_size"] = model.intermediate_size
    if has_experts(model) and model.n_shared_experts > 0:
        shared, hidden = model.n_shared_experts, model.moe_intermediate_size
        cut[f"model.n_shared_experts {shared} x moe_intermediate_size {hidden}"] = shared * hidden
    return cut


def _parts(weight: Weight, tp: int, ep: int) -> str:
    return f"{list(weight.divided(tp, ep))} of {weight.name} {list(weight.shape)}"


def _data_parallel_sum(cfg: RunConfig, size: int) -> str:
    """The data-parallel size with its arithmetic."""
    return (
        f"devices {cfg.trainer.devices} x nodes {cfg.trainer.num_nodes} / "
        f"({_sizes_of_a_batch(cfg)}) = {size}"
    )


def _ranks_of_a_batch(cfg: RunConfig) -> int:
    """Ranks that work on the same sequences."""
    model = cfg.model
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    return tp * pp * model.context_parallel_size


def _sizes_of_a_batch(cfg: RunConfig) -> str:
    """Their number as a product; without CP, where there is none."""
    model = cfg.model
    sizes = {
        "tensor": model.tensor_model_parallel_size,
        "pipeline": model.pipeline_model_parallel_size,
        "context": model.context_parallel_size,
    }
    shown = [f"{what} {size}" for what, size in sizes.items() if what != "context" or size > 1]
    return " x ".join(shown)


def _needed_micro_batches(schedule: str, pp: int, count: int) -> tuple[Callable[[int], bool], str]:
    """Which numbers of micro-batches the schedule takes, and why ``count`` is none of them.

    As in ``torch.distributed.pipelining``, which raises the same when a schedule is built.
    """
    if schedule == "1F1B":
        return (lambda n: n >= pp), f"at least {pp}, one for each rank"
    if schedule == "DualPipeV":
        return (lambda n: n >= 2 * pp), f"at least {2 * pp}, one for each of its 2 x {pp} stages"
    if schedule in INTERLEAVED_SCHEDULES:
        rounds = max(1, count // pp)
        need = f"a multiple of its rounds = {count} // {pp} = {rounds}"
        return (lambda n: n % max(1, n // pp) == 0), need
    return (lambda n: True), "any number"
