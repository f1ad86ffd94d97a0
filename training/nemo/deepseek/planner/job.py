"""One training step as the model of time sees it: sizes, ranks, batch, precision, program.

``job_of_run`` makes it from a configuration, ``published.py`` from a row of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from deepseek.config.layout import V_SCHEDULES, Layout, split_layers
from deepseek.config.memory import reduces_gradients, reshards
from deepseek.config.schema import ModelConfig, RunConfig
from deepseek.planner.architecture import Architecture


@dataclass(frozen=True)
class System:
    """What a training program does that its layout does not say."""

    name: str
    tuned: bool = False
    """Kernels between products are as fused as DeepSeek's own, and no GPU waits for its host."""
    release: float = 26.0
    """Years, such as 26.25 for April 2026: fused kernels became more from release to release."""
    graphs: bool = False
    """A step's kernels are launched as CUDA graphs: the GPU does not wait for its host."""
    hidden_all_to_all: float = 0.0
    """Share of the experts' exchange that other work hides, but under DualPipe."""
    pairs_passes: bool = True
    """DualPipe's opposite passes hide each other's exchange, and are not just run in turn."""
    hidden_data_parallel: float = 0.7
    """Share of the gradients' and weights' exchange that other work hides."""
    dedicated_sms: float = 0.0
    """Share of a GPU that the experts' exchange takes from products while it is hidden."""
    always_dedicated: bool = False
    """Under DualPipe it takes them all the time, and not just as long as it lasts."""
    loops_experts: bool = False
    """Each expert of a rank is a product of its own, launched by itself."""
    every_copy: bool = False
    """A token is sent to each of its experts, even to several of one domain or GPU (NCCL)."""
    dispatches_fp8: bool = False
    """Rows travel to experts in 8 bits, with a scale for each 128, whatever products are in."""
    fp8_attention: bool = False
    """Attention's products are in 8 bits, too."""
    drops_last_product: bool = False
    """Full recomputation ends before the experts' last product: nothing needs what follows."""
    gathers_weights: bool = False
    """Weights are sharded over data-parallel ranks (FSDP) and gathered before they are used."""
    shared_beside: bool = False
    """Shared experts compute while rows travel to the routed ones, in both directions."""
    exchanged_bytes: float = 6
    """Of a parameter, gathered and its gradient added up over data-parallel ranks."""


DEEPSEEK = System(
    "deepseek",
    tuned=True,
    dedicated_sms=20 / 132,
    always_dedicated=True,
    hidden_data_parallel=0.3,
)
DEDICATED = 0.2
"""Share of products' speed that exchanges by NCCL take, as Qwen3-235B on H100 shows."""
OURS = System(
    "ours",
    pairs_passes=False,
    drops_last_product=True,
    gathers_weights=True,
    shared_beside=True,
    exchanged_bytes=8,
)


class Ranks(NamedTuple):
    """Parallel sizes."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Stages of a rank."""
    ep: int = 1
    cp: int = 1
    dp: int = 1
    """Ranks with batches of their own, replicas included."""
    replicas: int = 1
    """Of the sharded weights, under HSDP."""

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.dp * self.tp * self.cp // self.ep)

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.cp * self.dp


class Stage(NamedTuple):
    """What a pipeline stage holds."""

    dense: int
    """Blocks without experts."""
    moe: int
    """Blocks with experts."""
    embedding: bool
    head: int
    """Passes through head and loss: one, and one for each MTP module."""
    mtp: int
    """MTP modules."""


@dataclass(frozen=True)
class Job:
    """One step of training."""

    architecture: Architecture
    seq_length: int
    micro_batch: int
    global_batch: int
    ranks: Ranks
    schedule: str
    """As ``pipeline_schedule`` of a configuration, or DualPipe."""
    stages: tuple[Stage, ...]
    precision: str
    """fp32, bf16, fp8 (scales in blocks), mxfp8 or nvfp4."""
    recompute: str
    """none, selective (norms, activations, latent projections) or full."""
    system: System
    imbalance: float = 1.0
    """Rows of the fullest rank's experts over the mean."""
    optimizer: str = "adamw"
    flushes: int = 1
    """Times that the pipeline runs empty in a step: of gradient accumulation around it."""
    exchanges: float = 1
    """Times that weights are gathered and gradients given back in a step."""

    @property
    def micro_batches(self) -> int:
        """Of one step, on one data-parallel rank."""
        return max(1, self.global_batch // (self.micro_batch * self.ranks.dp))

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the stages that each rank of a pipeline holds."""
        pp, count = self.ranks.pp, len(self.stages)
        if self.schedule == "DualPipe":
            return tuple((rank, pp - 1 - rank) for rank in range(pp))
        if self.schedule in V_SCHEDULES:
            return tuple((rank, 2 * pp - 1 - rank) for rank in range(pp))
        return tuple(tuple(range(rank, count, pp)) for rank in range(pp))


def job_of_run(run: RunConfig, gpus: int) -> Job:
    """The step of a configuration on ``gpus`` GPUs, whatever its trainer section counts."""
    model = run.model
    layout = Layout.of(model, gpus)
    architecture = Architecture.of_model(model)
    stages = _stages(model, architecture)
    ranks = Ranks(
        layout.tp,
        layout.pp,
        len(stages) // layout.pp,
        layout.ep,
        layout.cp,
        layout.dp,
        layout.dp_replicate,
    )
    precision = str(run.trainer.precision)
    once = model.moe_ranks_per_node is not None or model.moe_token_dispatcher_type == "deepep"
    system = replace(
        OURS,
        every_copy=not once,
        pairs_passes=model.overlap_moe_expert_parallel_comm,
        dedicated_sms=DEDICATED if model.overlap_moe_expert_parallel_comm else 0.0,
        dispatches_fp8=model.moe_dispatch_fp8,
    )
    if precision != "32":
        system = replace(system, exchanged_bytes=6)
    return Job(
        architecture,
        model.data.seq_length,
        model.micro_batch_size,
        model.global_batch_size,
        ranks,
        model.pipeline_schedule,
        stages,
        "fp32" if precision == "32" else "bf16",
        model.activations_checkpoint_granularity or "none",
        system,
        optimizer=model.optim.name,
        exchanges=_exchanges(model, layout),
    )


def _exchanges(model: ModelConfig, layout: Layout) -> float:
    """Of half a step's traffic each: weights gathered, twice where they are dropped in between, and
    gradients added up."""
    count = max(1, model.global_batch_size // (model.micro_batch_size * layout.dp))
    gathered = 2 * count if reshards(model, layout) else 1
    return (gathered + (count if reduces_gradients(model, layout) else 1)) / 2


_STAGES: dict[tuple[object, ...], tuple[Stage, ...]] = {}
"""Of the splits met so far: a search asks for few of them, many times, and a split takes ms."""


def _stages(model: ModelConfig, architecture: Architecture) -> tuple[Stage, ...]:
    key = (
        architecture,
        model.data.seq_length,
        model.pipeline_model_parallel_size,
        model.pipeline_schedule,
        model.virtual_pipeline_model_parallel_size,
        tuple(model.pipeline_layers_per_stage or ()),
        model.pipeline_output_stages,
    )
    if key not in _STAGES:
        stages = []
        for part in split_layers(model):
            moe = sum(model.is_moe_layer(layer) for layer in part.layers)
            depth = model.num_nextn_predict_layers * part.ahead
            dense = len(part.layers) - moe
            stages.append(Stage(dense, moe, part.first, part.heads(model), depth))
        _STAGES[key] = tuple(stages)
    return _STAGES[key]


def even_stages(
    architecture: Architecture, costs: Sequence[float], count: int
) -> tuple[Stage, ...]:
    """Equal stages if they divide the blocks; else those whose costliest costs least, where head
    and MTP modules may stand apart.

    Args:
        architecture: the sizes.
        costs: seconds of a dense block, a MoE block, an MTP module, and a pass through the head.
        count: stages.
    """
    dense, moe, mtp, head = costs
    plain = architecture.layers - architecture.moe_layers
    if architecture.layers % count == 0 and not architecture.mtp:
        sizes = [architecture.layers // count] * count
        sizes[-1] += 1
    else:
        sizes = []
    parts = [dense] * plain
    kinds = [Stage(1, 0, False, 0, 0)] * len(parts)
    parts += [moe] * architecture.moe_layers
    kinds += [Stage(0, 1, False, 0, 0)] * architecture.moe_layers
    for _ in range(architecture.mtp):
        parts.append(mtp + head)
        kinds.append(Stage(0, 0, False, 1, 1))
    parts.append(head)
    kinds.append(Stage(0, 0, False, 1, 0))
    sizes = sizes or _smallest_largest(tuple(parts), count)
    stages, at = [], 0
    for size in sizes:
        held = kinds[at : at + size]
        stages.append(
            Stage(
                sum(k.dense for k in held),
                sum(k.moe for k in held),
                at == 0,
                sum(k.head for k in held),
                sum(k.mtp for k in held),
            )
        )
        at += size
    return tuple(stages)


def _smallest_largest(costs: tuple[float, ...], groups: int) -> list[int]:
    """Sizes of consecutive groups whose largest sum is smallest; the last may be empty."""
    low, high = max(costs), sum(costs)
    for _ in range(30):
        middle = (low + high) / 2
        if len(_filled(costs, middle)) <= groups:
            high = middle
        else:
            low = middle
    sizes = _filled(costs, high * (1 + 1e-9))
    return sizes + [0] * (groups - len(sizes))


def _filled(costs: tuple[float, ...], bound: float) -> list[int]:
    sizes, total = [0], 0.0
    for cost in costs:
        if total + cost > bound and sizes[-1]:
            sizes.append(0)
            total = 0.0
        sizes[-1] += 1
        total += cost
    return sizes
