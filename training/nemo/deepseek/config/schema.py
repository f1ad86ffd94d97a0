"""The run configuration: every key once, with type, default, legal values, unit and meaning.

One YAML file describes a run in the sections that NeMo users know: ``name``, ``trainer``, ``model``
and ``exp_manager``. The dataclasses below are the whole schema: a key that is not here is an error.
Architecture keys carry the names of a Hugging Face ``config.json``; training-only keys carry those
of NeMo and Megatron. ``V3`` in a meaning is what DeepSeek-V3 was trained with.

Reading a file (``extends``, overrides) is in ``load.py``; what must hold between keys is in
``rules.py``. Nothing in this package imports torch.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

from deepseek.config.errors import Problem, nearest, shown
from deepseek.config.foreign_names import OTHER_VALUES

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Legal numbers: from ``low`` to ``high``, each of them legal unless it is open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """True if ``value`` is inside."""
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.low_open else f"at least {self.low}"
        if self.high in (math.inf, MOST):
            return low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high}"


MOST = 10**9
"""No sound count is larger, and the arithmetic on larger ones (divisors) would take for ever."""


def key(
    default: T,
    meaning: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> T:
    """A key of a section; its type is the annotation.

    Args:
        default: of that type, or another section with all its defaults.
        meaning: for people, as the comment in ``deepseek_v3_tiny.yaml``.
        unit: of the number.
        at_least, above, at_most, below: the ends of the legal numbers; a whole number is at most
            ``MOST`` in any case.
        choices: the legal texts.
    """
    low, high = (
        (above if above is not None else at_least),
        (below if below is not None else at_most),
    )
    limits = Range(
        -math.inf if low is None else low,
        math.inf if high is None else high,
        above is not None,
        below is not None,
    )
    told = {"meaning": meaning, "unit": unit, "limits": limits, "choices": choices}
    made: Any
    if isinstance(default, list):
        made = field(default_factory=lambda: list(default), metadata=told)
    else:
        made = field(default=default, metadata=told)
    return typing.cast(T, made)


# -- model --


@dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (arXiv:2309.00071), keys as in ``config.json``'s ``rope_scaling``."""

    type: str = key("yarn", "only yarn", choices=("yarn",))
    factor: float = key(40.0, "new context / original context", at_least=1)
    original_max_position_embeddings: int = key(
        4096, "context of the first training phase", unit="tokens", at_least=1
    )
    beta_fast: float = key(
        32.0, "frequencies with more over the original context are left", unit="rotations", above=0
    )
    beta_slow: float = key(1.0, "with less are fully interpolated", unit="rotations", above=0)
    # cos and sin are scaled by yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim),
    # the softmax by yarn_mscale(factor, mscale_all_dim) squared
    mscale: float = key(1.0, "scales cos and sin, over mscale_all_dim", at_least=0)
    mscale_all_dim: float = key(0.0, "scales the softmax, squared; 0: not", at_least=0)


@dataclass(frozen=True)
class PeftConfig:
    """Adapters that are trained instead of the weights (LoRA, arXiv:2106.09685), names as in
    NeMo."""

    peft_scheme: str = key("lora", "only lora", choices=("lora",))
    dim: int = key(16, "rank of the adapters", unit="dims", at_least=1)
    alpha: float = key(32.0, "an adapter's product is multiplied by alpha / dim", above=0)
    target_modules: list[str] = key(
        ["attention", "feed_forward"],
        "attention, feed_forward (dense layers and shared experts), experts (each routed expert "
        "its own), or matrices such as wq_a, w2 and experts.w1; MTP modules get none",
    )
    base_dtype: str | None = key(
        None,
        "of the frozen matrices of blocks, but for routers and MTP: nf4 (QLoRA) or fp8; null: fp32",
        choices=("nf4", "fp8"),
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids."""

    path: str | None = key(
        None, "a tokenizer.json or its folder; null: the one recorded with the data"
    )
    # 256 bytes and 6 special tokens are the least
    vocab_size: int = key(
        4096, "of the byte-level BPE trained when no path is given", unit="ids", at_least=262
    )


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into sequences."""

    data_prefix: Any = key(
        None, "prefix P (of P.bin and P.idx), or a blend [0.7, P1, 0.3, P2]; null: built-in corpus"
    )
    validation_prefix: Any = key(
        None, "data for validation, same forms; null: a share of data_prefix"
    )
    validation_fraction: float = key(
        0.02,
        "kept for validation when validation_prefix is null",
        unit="share of documents",
        at_least=0,
        below=1,
    )
    # a label is the next token
    seq_length: int = key(256, "in one training sequence", unit="tokens", at_least=2)
    isolate_documents: bool = key(
        False,
        "true: attention and labels stop at document borders; false: one stream, as V3",
    )
    fim_rate: float = key(
        0.0,
        "rearranged for fill-in-the-middle: prefix, suffix, middle (V3: 0.1)",
        unit="share of documents",
        at_least=0,
        at_most=1,
    )
    chat: bool = key(
        False,
        "data_prefix holds conversations, made by prepare-data --chat; each is whole in one "
        "sequence, and the loss is on answers only",
    )
    num_workers: int = key(
        0, "that load data; their number changes no sample", unit="processes", at_least=0
    )
    cache_dir: str | None = key(
        None,
        "folder of the built-in corpus; null: $XDG_CACHE_HOME/deepseek or ~/.cache/deepseek",
    )


@dataclass(frozen=True)
class SchedConfig:
    """Learning rate over the steps."""

    name: str = key(
        "CosineAnnealing",
        "CosineAnnealing (NeMo: warm-up, cosine, optional floor), WarmupConstantCosine (V3) or "
        "WarmupStableDecay (WSD)",
        choices=("CosineAnnealing", "WarmupConstantCosine", "WarmupStableDecay"),
    )
    warmup_steps: int = key(0, "linear warm-up from 0", unit="steps", at_least=0)
    constant_steps: int = key(
        0,
        "CosineAnnealing holds min_lr for them at the end, WarmupConstantCosine the peak before "
        "the decay",
        unit="steps",
        at_least=0,
    )
    min_lr: float = key(0.0, "learning rate at the end of the decay", at_least=0)
    max_steps: int | None = key(
        None, "length of the schedule; null: trainer.max_steps", unit="steps", at_least=1
    )
    decay_steps: int = key(
        0,
        "of WarmupStableDecay, which holds the peak until then, from max_steps backwards; 0: none",
        unit="steps",
        at_least=0,
    )
    decay_style: str = key(
        "linear",
        "of WarmupStableDecay: linear, cosine or minus_sqrt (1 - sqrt: fast at first)",
        choices=("linear", "cosine", "minus_sqrt"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and its schedule."""

    name: str = key(
        "adamw", "adamw, or muon (AdamW for all but hidden matrices)", choices=("adamw", "muon")
    )
    lr: float = key(2.2e-4, "peak learning rate (V3: 2.2e-4)", above=0)
    betas: list[float] = key([0.9, 0.95], "AdamW's two averaging coefficients")
    eps: float = key(1e-8, "floor of AdamW's denominator", above=0)
    weight_decay: float = key(
        0.1, "decoupled decay of matrices; norms and biases are never decayed", at_least=0
    )
    moments_dtype: str = key(
        "fp32",
        "of what the optimiser keeps of gradients: fp32, or bf16 (V3), which takes half the bytes",
        choices=("fp32", "bf16"),
    )
    muon_momentum: float = key(0.95, "Nesterov momentum of Muon", at_least=0, below=1)
    sched: SchedConfig = key(SchedConfig(), "learning rate over the steps")
    qk_clip_threshold: float | None = key(
        None,
        "largest attention logit of a head in a step, above which its query and key weights are "
        "scaled down (QK-clip; Kimi-K2: 100); null: none are",
        above=0,
    )
    cpu_offload: bool = key(
        False,
        "what the optimiser keeps of gradients lies in the host's memory between updates (no GPU "
        "has run it yet)",
    )


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, training knobs, batch, parallel sizes; sections data, tokenizer and optim."""

    # -- architecture (names of HF config.json) --
    model_type: str | None = key(
        None,
        "name for `hf export`: deepseek_v3, deepseek_v2 or glm4_moe_lite; null: deepseek_v3, or "
        "deepseek_v2 with softmax scores",
        choices=("deepseek_v3", "deepseek_v2", "glm4_moe_lite"),
    )
    vocab_size: int = key(
        4096, "rows of embedding and head; the tokenizer's or more", unit="ids", at_least=1
    )
    hidden_size: int = key(256, "width of the residual stream (D)", unit="dims", at_least=1)
    num_hidden_layers: int = key(
        4, "without the MTP modules", unit="blocks", at_least=1, at_most=10_000
    )
    num_attention_heads: int = key(8, "attention heads (N)", unit="heads", at_least=1)
    q_lora_rank: int | None = key(
        None,
        "rank of the compressed query; null: queries are projected directly",
        unit="dims",
        at_least=1,
    )
    kv_lora_rank: int = key(
        64, "rank of the compressed key and value (C): the cached latent", unit="dims", at_least=1
    )
    qk_nope_head_dim: int = key(
        32, "query/key dims of a head without position", unit="dims", at_least=1
    )
    qk_rope_head_dim: int = key(
        16, "query/key dims of a head with rotary position; even", unit="dims", at_least=2
    )
    v_head_dim: int = key(32, "value dims of a head", unit="dims", at_least=1)
    intermediate_size: int = key(1024, "hidden width of a dense SwiGLU", unit="dims", at_least=1)
    moe_intermediate_size: int = key(256, "hidden width of one expert (F)", unit="dims", at_least=1)
    n_routed_experts: int = key(
        8, "routed experts of a MoE layer (E)", unit="experts", at_least=1, at_most=100_000
    )
    n_shared_experts: int = key(
        1,
        "shared experts of a MoE layer, fused into one SwiGLU this many times "
        "moe_intermediate_size; 0: none",
        unit="experts",
        at_least=0,
    )
    num_experts_per_tok: int = key(
        2, "routed experts chosen for a token (K)", unit="experts", at_least=1
    )
    first_k_dense_replace: int = key(
        1, "leading ones with a dense feed-forward, not MoE", unit="blocks", at_least=0
    )
    n_group: int = key(1, "of experts in group-limited routing", unit="groups", at_least=1)
    topk_group: int = key(1, "that a token may choose from", unit="groups", at_least=1)
    scoring_func: str = key(
        "sigmoid", "sigmoid (V3) or softmax (V2)", choices=("sigmoid", "softmax")
    )
    topk_method: str = key(
        "noaux_tc",
        "noaux_tc (correction bias; group score: sum of its top 2), group_limited_greedy (group "
        "score: its maximum; no bias) or greedy (no groups, no bias)",
        choices=("noaux_tc", "group_limited_greedy", "greedy"),
    )
    norm_topk_prob: bool = key(True, "the chosen scores are normalised to sum to 1")
    routed_scaling_factor: float = key(1.0, "factor on the routed weights (V3: 2.5)", above=0)
    num_nextn_predict_layers: int = key(
        0, "multi-token prediction (MTP); 0: none", unit="modules", at_least=0
    )
    max_position_embeddings: int = key(4096, "longest context", unit="tokens", at_least=1)
    # YaRN divides by its logarithm
    rope_theta: float = key(10000.0, "base of the rotary frequencies", above=1)
    rope_scaling: RopeScaling | None = key(None, "YaRN (below); null: plain RoPE")
    rms_norm_eps: float = key(1e-6, "epsilon of every RMSNorm", above=0)
    initializer_range: float = key(
        0.006, "standard deviation of the initial weights (V3: 0.006 at a width of 7168)", above=0
    )
    tie_word_embeddings: bool = key(
        False, "head shares the embedding's weight; only false, since no V3-class model ties them"
    )

    # -- training knobs (names of NeMo / Megatron) --
    moe_aux_loss_coeff: float = key(
        1e-4, "weight (alpha) of the sequence-wise balance loss (V3: 1e-4)", at_least=0
    )
    moe_z_loss_coeff: float = key(
        0.0, "weight of the router z-loss, the mean of logsumexp(router logits) squared", at_least=0
    )
    moe_router_bias_update_rate: float = key(
        1e-3,
        "step (gamma) of the correction bias per optimiser step; 0: frozen (V3: 1e-3)",
        at_least=0,
        at_most=1,
    )
    mtp_loss_scaling_factor: float = key(
        0.3, "weight (lambda) of the MTP loss, averaged over depths", at_least=0
    )
    activations_checkpoint_granularity: str | None = key(
        None,
        "full recomputes each block in the backward pass, but for the router's decisions; "
        "selective what is cheap to recompute: norms, up-projections of latents, SwiGLU (V3); null "
        "keeps activations",
        choices=("full", "selective"),
    )
    torch_compile: bool | None = key(
        None,
        "compile each block, but for exchanges between ranks; null: on GPUs (none has run it yet), "
        "where recomputation and schedule allow it",
    )

    # -- batch --
    micro_batch_size: int = key(
        4, "in one forward pass of one data-parallel rank", unit="sequences", at_least=1
    )
    global_batch_size: int = key(
        16, "in one optimiser step over all ranks", unit="sequences", at_least=1
    )

    # -- parallel sizes --
    tensor_model_parallel_size: int = key(
        1, "that share the matrices of a layer (TP)", unit="ranks", at_least=1
    )
    context_parallel_size: int = key(
        1, "that share each sequence, for long ones (CP)", unit="ranks", at_least=1
    )
    pipeline_model_parallel_size: int = key(
        1, "that share the layers, in stages (PP)", unit="ranks", at_least=1
    )
    pipeline_schedule: str = key(
        "1F1B",
        "GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV",
        choices=(
            "GPipe",
            "1F1B",
            "Interleaved1F1B",
            "InterleavedZeroBubble",
            "ZBVZeroBubble",
            "DualPipeV",
        ),
    )
    virtual_pipeline_model_parallel_size: int = key(
        1,
        "of a rank, 2 or more when interleaved; ZBVZeroBubble and DualPipeV always have 2 and "
        "leave this at 1",
        unit="stages",
        at_least=1,
    )
    pipeline_layers_per_stage: list[int] | None = key(
        None,
        "layers of each stage, as [2, 1, 1]; the first with a part of the output may have none, "
        "and those after it have none; null: split so that the costliest rank costs least",
    )
    pipeline_output_stages: int = key(
        1,
        "that share the output: 1: the last has all; 2: main loss, MTP with its loss; 3: main "
        "loss, MTP, its loss",
        unit="stages",
        at_least=1,
    )
    expert_model_parallel_size: int = key(
        1, "that share the routed experts (EP)", unit="ranks", at_least=1
    )
    moe_token_dispatcher_type: str = key(
        "auto",
        "how tokens travel under EP: alltoall, deepep (GPUs, bf16-mixed and DeepEP installed; no "
        "GPU has run it yet), or auto, which is alltoall",
        choices=("auto", "alltoall", "deepep"),
    )
    data_parallel_replicate_size: int = key(
        1,
        "of the sharded model (HSDP); 1: shard over all data-parallel ranks",
        unit="replicas",
        at_least=1,
    )
    reshard_after_forward: bool | None = key(
        None,
        "true: weights gathered from data-parallel ranks go after each forward pass and are "
        "gathered again for the backward pass; false: they stay to the end of the step (more "
        "memory, less traffic); null: they stay under a pipeline, or if all take less than 1 GiB",
    )
    reduce_gradients: bool | None = key(
        None,
        "true: data-parallel ranks add up and divide gradients after each micro-batch; false: once "
        "a step, and whole ones stay till then (more memory, less traffic); null: as "
        "reshard_after_forward comes out",
    )

    restore_from: str | None = key(
        None,
        "start at step 0 from the weights in this run folder, imported folder, checkpoint or .nemo "
        "file; null: from random ones; a run that goes on from a checkpoint of its own ignores it",
    )
    peft: PeftConfig | None = key(
        None,
        "adapters (below) on the frozen weights of restore_from; null: all weights are trained",
    )
    tokenizer: TokenizerConfig = key(TokenizerConfig(), "which tokenizer turns text into ids")
    data: DataConfig = key(DataConfig(), "what is read, and how it is cut")
    optim: OptimConfig = key(OptimConfig(), "optimiser and its schedule")
    activations_checkpoint_num_layers: int | None = key(
        None,
        "the first ones of each pipeline stage that recompute, and all MTP modules; null: all",
        unit="blocks",
        at_least=1,
    )
    rampup_batch_size: list[int] | None = key(
        None,
        "[start, increment, samples]: the global batch grows from start by increments to "
        "global_batch_size, in equal parts of the first samples (V3: from 3072 over 469 B tokens); "
        "null: none",
    )

    fp8_recipe: str | None = key(
        None,
        "blockwise: products of blocks in FP8 (e4m3), scales of 1 x 128 tiles of activations and "
        "128 x 128 blocks of weights, as V3; emulated, in bf16 with the same result, on every "
        "device; null: none",
        choices=("blockwise",),
    )
    cpu_offloading_activations: bool = key(
        False,
        "what blocks keep for the backward pass lies in the host's memory till then (no GPU has "
        "run it yet)",
    )
    moe_dispatch_fp8: bool = key(
        False,
        "under EP rows travel to experts in e4m3 with a scale for each 1 x 128 tile, and so do "
        "gradients of their results; results and sums of gradients travel as ever (V3)",
    )
    moe_ranks_per_node: int | None = key(
        None,
        "EP ranks of one machine: a token travels once to each that has experts of its, is spread "
        "inside, and one sum comes home; null: a row for every expert",
        unit="ranks",
        at_least=2,
    )
    overlap_moe_expert_parallel_comm: bool = key(
        False,
        "under DualPipeV and EP the forward pass of one micro-batch computes while rows of the "
        "backward pass of another travel, and the other way round (no GPU has run it yet)",
    )
    fp8_kernels: bool = key(
        False,
        "with fp8_recipe linear maps are multiplied by cuBLAS on SM90 (H100, H200), experts "
        "emulated as ever (no GPU has run it yet)",
    )

    # -- derived, read everywhere, never set --
    @property
    def qk_head_dim(self) -> int:
        """Per-head query/key width: nope + rope."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE blocks among ``num_hidden_layers``."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    def is_moe_layer(self, layer: int) -> bool:
        """True if block ``layer`` holds experts; MTP blocks count on from ``num_hidden_layers``."""
        return layer >= self.first_k_dense_replace


# -- trainer --


@dataclass(frozen=True)
class TrainerConfig:
    """Passed to the Lightning trainer, but for the keys that the training step itself applies."""

    devices: int = key(1, "GPUs (or CPU processes) per node", unit="processes", at_least=1)
    num_nodes: int = key(1, "machines that take part", unit="nodes", at_least=1)
    accelerator: str = key(
        "auto", "auto (a GPU if there is one), cpu or gpu", choices=("auto", "cpu", "gpu")
    )
    precision: str = key(
        "32",
        "32, bf16-mixed (products, hidden states and what ranks gather of weights in bf16; kept "
        "weights, sums of gradients, norms, router, loss in fp32), or auto (bf16-mixed on a GPU, "
        "and on a CPU whose bf16 products are measured to be faster)",
        choices=("32", "bf16-mixed", "auto"),
    )
    max_steps: int = key(100, "optimiser steps of the whole run", unit="steps", at_least=1)
    val_check_interval: int = key(50, "between validations; 0: never", unit="steps", at_least=0)
    limit_val_batches: int = key(
        8,
        "of one validation, at most; the same sequences in every layout",
        unit="global batches",
        at_least=1,
    )
    log_every_n_steps: int = key(
        1, "between printed lines; metrics.jsonl gets every step", unit="steps", at_least=1
    )
    gradient_clip_val: float = key(1.0, "largest global gradient norm; 0: no clipping", at_least=0)
    num_threads: int = key(
        0, "of one process on the CPU; 0: torch's choice", unit="threads", at_least=0
    )
    max_restarts: int = key(
        3,
        "that the processes of this machine are started anew after one was lost; they go on from "
        "the newest checkpoint",
        unit="times",
        at_least=0,
    )
    # torch counts it in nanoseconds of 64 bits
    collective_timeout_minutes: float = key(
        30.0,
        "that a rank waits for the others in one collective, at the start, in the first step and "
        "while a checkpoint is written",
        unit="minutes",
        above=0,
        at_most=10**6,
    )
    step_timeout_seconds: float = key(
        300.0,
        "the same from the second step on, if it is shorter: how long a rank that hangs is waited "
        "for",
        unit="seconds",
        above=0,
        at_most=10**7,
    )


# -- exp_manager --


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are written and kept."""

    every_n_train_steps: int = key(
        50, "between checkpoints; 0: only at the end", unit="steps", at_least=0
    )
    save_top_k: int = key(
        2, "the newest complete ones to keep; -1: all", unit="checkpoints", at_least=-1
    )
    async_save: bool = key(
        False, "write those on the way in the background, from a copy in CPU memory"
    )
    save_nemo_on_train_end: bool = key(
        False, "also write the whole model as NAME.nemo at the end, in any layout"
    )


@dataclass(frozen=True)
class ProfileConfig:
    """Steps whose course is written as a Chrome trace into the run folder, ``profile/``."""

    steps: list[int] | None = key(
        None, "as [10, 11]; each run of consecutive ones gives one trace per rank; null: none"
    )
    with_stack: bool = key(False, "with the Python lines behind each operation (slow, large)")
    record_shapes: bool = key(False, "with the shapes of each operation's inputs")
    memory: bool = key(False, "with allocations")


@dataclass(frozen=True)
class MonitorConfig:
    """What is recorded of a run besides its losses."""

    every_n_steps: int | None = key(
        None,
        "between records of expert loads, traffic, times and memory of every rank; 0: none; null: "
        "1 up to 64 processes, beyond as many as keep it below 1 % of the time",
        unit="steps",
        at_least=0,
    )
    peak_tflops: float | None = key(
        None,
        "at best of one device, the denominator of MFU; null: from the data sheet of a GPU, "
        "measured on a CPU",
        unit="teraflops",
        above=0,
    )


@dataclass(frozen=True)
class WandbConfig:
    """A run on Weights & Biases."""

    project: str | None = key(None, "its project; null: the run's name")
    name: str | None = key(None, "what it is called there; null: the run folder's name")
    offline: bool = key(False, "into the run folder alone, for wandb sync later")


@dataclass(frozen=True)
class MLFlowConfig:
    """A run on MLflow."""

    experiment_name: str | None = key(None, "its experiment; null: the run's name")
    run_name: str | None = key(None, "what it is called there; null: the run folder's name")
    tracking_uri: str | None = key(
        None, "the server; null: MLFLOW_TRACKING_URI, or files in the run folder"
    )


@dataclass(frozen=True)
class ExpManagerConfig:
    """Where the run lives and how it resumes, keys as in NeMo's ``exp_manager``."""

    exp_dir: str = key("runs", "parent folder of runs")
    name: str | None = key(None, "folder under exp_dir; null: the run's name")
    version: str | None = key(
        None,
        "folder under name; null: the newest one when resuming, else version_N with the next N",
    )
    resume_if_exists: bool = key(
        True, "go on from the newest complete checkpoint of the same run folder"
    )
    create_tensorboard_logger: bool = key(
        True, "mirror the scalars to TensorBoard files in the run folder"
    )
    create_wandb_logger: bool = key(False, "mirror the scalars to Weights & Biases")
    wandb_logger_kwargs: WandbConfig = key(WandbConfig(), "where its scalars go")
    create_mlflow_logger: bool = key(False, "mirror the scalars to MLflow")
    mlflow_logger_kwargs: MLFlowConfig = key(MLFlowConfig(), "where its scalars go")
    create_checkpoint_callback: bool = key(True, "write checkpoints")
    checkpoint_callback_params: CheckpointConfig = key(
        CheckpointConfig(), "which checkpoints are written and kept"
    )
    monitor: MonitorConfig = key(MonitorConfig(), "what is recorded besides the losses")
    profile: ProfileConfig = key(ProfileConfig(), "steps whose course is written as a Chrome trace")


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: str = key("deepseek", "name of the run, one folder under exp_manager.exp_dir")
    # numpy and Lightning take 32 bits
    seed: int = key(
        1234, "decides the initial weights and the order of the data", at_least=0, below=2**32
    )
    trainer: TrainerConfig = key(TrainerConfig(), "processes, precision, steps, validation")
    model: ModelConfig = key(ModelConfig(), "architecture, training, batch, parallel sizes")
    exp_manager: ExpManagerConfig = key(
        ExpManagerConfig(), "where the run lives and how it resumes"
    )


Section = TypeVar("Section")
"""``RunConfig``, or the dataclass of one of its sections."""


def changed(config: Section, values: Mapping[str, object]) -> Section:
    """``config`` with other values under dotted keys; no rule is applied to them."""
    for path, value in values.items():
        first, _, rest = path.partition(".")
        inner = changed(getattr(config, first), {rest: value}) if rest else value
        config = replace(config, **{first: inner})  # type: ignore[type-var]
    return config


def value_at(config: object, path: str) -> Any:
    """The value under a dotted key; None where a section on the way is null."""
    for name in path.split("."):
        config = None if config is None else getattr(config, name)
    return config


# -- the keys as a table, and whether a value fits --


@dataclass(frozen=True)
class Field:
    """One key of the schema."""

    path: str
    """Dotted key, such as ``model.optim.lr``."""
    kind: Any
    """bool, int, float, str, list (of ``item``), object (anything plain), or a section's
    dataclass."""
    optional: bool
    """True if null is a value."""
    item: Any
    """What a list holds: int, float or str."""
    default: Any
    meaning: str
    unit: str
    limits: Range
    """Of a number."""
    choices: tuple[str, ...]
    """Of a text; empty: any."""

    @property
    def is_section(self) -> bool:
        """True if it holds keys, not a value."""
        return is_dataclass(self.kind)

    def problem_with(self, value: object) -> Problem | None:
        """The problem of a plain ``value`` (numbers, text, null, lists) in a key that is no
        section; None if it fits."""
        fault = _misfit(self, value)
        if fault is None and value is not None:
            fault = _out_of_range(self, value) or _no_choice(self, value)
        return None if fault is None else Problem(self.path, value, *fault)


def schema_fields(section: type = RunConfig, prefix: str = "") -> dict[str, Field]:
    """Keys of ``section`` and of all sections below it, in the schema's order."""
    hints = typing.get_type_hints(section)
    found: dict[str, Field] = {}
    for entry in fields(section):
        kind, optional, item = _kind(hints[entry.name])
        path = f"{prefix}{entry.name}"
        made = entry.default_factory
        told = dict(entry.metadata)
        if kind is int and told["limits"].high == math.inf:
            told["limits"] = replace(told["limits"], high=MOST)
        default = entry.default if made is MISSING else made()
        found[path] = Field(path, kind, optional, item, default, **told)
        if is_dataclass(kind):
            found |= schema_fields(typing.cast(type, kind), f"{path}.")
    return found


def _kind(hint: Any) -> tuple[Any, bool, Any]:
    """The field's kind, whether null is allowed, and what a list holds, from a type hint."""
    if hint is Any:
        return object, True, None
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [member for member in members if member is not type(None)]
    assert len(kinds) == 1, f"the schema has no reading for {hint}"
    (item,) = typing.get_args(kinds[0]) or (None,)
    return typing.get_origin(kinds[0]) or kinds[0], len(kinds) < len(members), item


FIELDS: dict[str, Field] = schema_fields()
"""All keys, by dotted name."""
LEAVES: dict[str, Field] = {path: field for path, field in FIELDS.items() if not field.is_section}
"""All keys that hold values."""

_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list of numbers",
    object: "a value",
}
_LISTS = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of names"}
_TRUE_WORDS, _FALSE_WORDS = ("yes", "on", "true", "1"), ("no", "off", "false", "0")


def _misfit(entry: Field, value: object) -> tuple[str, str] | None:
    """(rule, way out) if ``value`` is not of the type of ``entry``.

    Strict: ``"yes"`` is no true, ``"8"`` no 8, and true no number.
    """
    noun, by_default = _LISTS.get(entry.item, _NOUNS[entry.kind]), shown(entry.default)
    if value is None:
        way_out = f"give a value or remove the line (default {by_default})"
        return None if entry.optional else (f"must be {noun}, not null", way_out)
    if value == "???":
        return "is still the placeholder ???", f"give {noun}, such as {by_default}"
    if _fits(value, entry.kind, entry.item):
        return None
    if entry.kind is object:
        return "must be text, a number or a list of them", f"the default is {by_default}"
    if entry.kind is bool:
        word = str(value).lower()
        meant = {**dict.fromkeys(_TRUE_WORDS, "true"), **dict.fromkeys(_FALSE_WORDS, "false")}
        return "must be true or false", f"write {meant.get(word, 'true or false')}"
    if entry.kind is str and entry.choices:
        return _no_choice(entry, value)
    if entry.kind is str:
        if isinstance(value, (dict, list)):
            return "must be text", f"the default is {by_default}"
        given = "true or false" if isinstance(value, bool) else "a number"
        return f"must be text, not {given}", f'quote it: "{shown(value)}"'
    if entry.kind is list:
        or_null = " or null" if entry.optional else ""
        return f"must be {noun}{or_null}", f"write it as {shown(entry.default or [2, 1])}"
    if entry.kind is float and isinstance(value, float):
        return "must be a finite number", f"the default is {by_default}"
    return f"must be {noun}", _number_way_out(value, entry.kind) or f"the default is {by_default}"


def _fits(value: object, kind: Any, item: Any = None) -> bool:
    if kind is object:
        items = value if isinstance(value, list) else [value]
        return all(isinstance(entry, (str, bool, int, float)) for entry in items)
    if kind is list:
        return isinstance(value, list) and all(_fits(entry, item) for entry in value)
    if kind is float:
        return _is_number(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def _number_way_out(value: object, kind: type) -> str | None:
    """The number that was probably meant."""
    try:
        number = float(value.replace("_", "").replace(",", "")) if isinstance(value, str) else value
    except ValueError:
        return None
    if not _is_number(number):
        return None
    assert isinstance(number, (int, float))
    plainly = ", digits only and without quotes" if isinstance(value, str) else ""
    if kind is float:
        return f"write {number:g}{plainly}"
    if number == int(number):
        return f"write {int(number)}{plainly}"
    return f"write {math.floor(number)} or {math.ceil(number)}"


def _out_of_range(entry: Field, value: Any) -> tuple[str, str] | None:
    """(rule, way out) for a number outside the limits of its key."""
    legal = entry.limits
    if entry.kind not in (int, float) or legal.holds(value):
        return None
    if value < legal.low or (legal.low_open and value == legal.low):
        way_out = f"use more than {legal.low}" if legal.low_open else f"use {legal.low} or more"
    else:
        way_out = f"use less than {legal.high}" if legal.high_open else f"use {legal.high} or less"
    if entry.default is not None:
        way_out += f" (default {entry.default})"
    return f"must be at most {MOST}" if value > MOST == legal.high else f"must be {legal}", way_out


def _no_choice(entry: Field, value: object) -> tuple[str, str] | None:
    """(rule, way out) for a text that is none of those its key knows."""
    if not entry.choices or value in entry.choices:
        return None
    *others, last = [*entry.choices, "null"] if entry.optional else entry.choices
    listed = f"{', '.join(others)} or {last}" if others else last
    same = OTHER_VALUES.get(entry.path, {}).get(str(value).lower())
    near = same or nearest(str(value), entry.choices, cutoff=0.5)
    return f"must be {listed}", f"use {near or entry.choices[0]}"


def idle(
    config: RunConfig, path: str, because: str, or_else: str = "", harmless: Any = MISSING
) -> Iterator[Problem]:
    """The problem of a setting that has no effect, and yet says something of its own.

    Args:
        config: the configuration.
        path: the dotted key.
        because: why, as it follows on "since".
        or_else: another way out than to leave it.
        harmless: the values at which it may stand, the best first; none given: its default.
    """
    default, value = LEAVES[path].default, value_at(config, path)
    legal = (default,) if harmless is MISSING else harmless
    if value in legal:
        return
    best = shown(legal[0]) + (" (the default)" if legal[0] == default else "")
    way_out = f"use {best}, or {or_else}" if or_else else f"use {best}"
    yield Problem(path, value, f"would be ignored, since {because}", way_out)
