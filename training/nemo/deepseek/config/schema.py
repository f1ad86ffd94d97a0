"""The run configuration: what every key means, its type and its unit.

One YAML file describes a run in the sections that NeMo users know: ``name``, ``trainer``, ``model``
and ``exp_manager``. The dataclasses below are the whole schema: a key that is not here is an error.
Architecture keys carry the names of a Hugging Face ``config.json``; training-only keys carry those
of NeMo and Megatron.

Reading a file (``extends``, overrides) is in ``load.py``; the arithmetic between fields is in
``rules.py``. Nothing in this package imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar


@dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (arXiv:2309.00071), keys as in ``config.json``'s ``rope_scaling``."""

    type: str = "yarn"
    """Only ``yarn``."""
    factor: float = 40.0
    """New context / original context."""
    original_max_position_embeddings: int = 4096
    """Context of the first training phase, tokens."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is left as it is."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is fully interpolated."""
    mscale: float = 1.0
    """Scale of cos and sin is yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)."""
    mscale_all_dim: float = 0.0
    """Non-zero: the softmax scale is multiplied by yarn_mscale(factor, mscale_all_dim) squared."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer turns text into ids."""

    path: str | None = None
    """A ``tokenizer.json``, or a folder holding one; null: the one recorded with the data."""
    vocab_size: int = 4096
    """Size of the byte-level BPE trained when no path is given, ids."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into sequences."""

    data_prefix: Any = None
    """null: the built-in corpus; a prefix ``P`` (files ``P.bin``, ``P.idx``); or a blend
    ``[0.7, P1, 0.3, P2]``."""
    validation_prefix: Any = None
    """Data for validation, same forms; null: cut from ``data_prefix`` by
    ``validation_fraction``."""
    validation_fraction: float = 0.02
    """Share of the documents of ``data_prefix`` kept for validation, 0 to 1."""
    seq_length: int = 256
    """Tokens in one training sequence."""
    isolate_documents: bool = False
    """true: attention and labels stop at document borders; false: packed as one stream (as
    DeepSeek-V3 did)."""
    fim_rate: float = 0.0
    """Share of documents rearranged for fill-in-the-middle (prefix, suffix, middle), 0 to 1.
    DeepSeek-V3: 0.1."""
    chat: bool = False
    """true: ``data_prefix`` holds conversations (``prepare-data --chat``): each is whole in one
    sequence, and the loss is on answers only; false: text."""
    num_workers: int = 0
    """Loader processes. Order does not depend on it."""
    cache_dir: str | None = None
    """Where the built-in corpus is prepared; null: ``$XDG_CACHE_HOME/deepseek`` or
    ``~/.cache/deepseek``."""


@dataclass(frozen=True)
class PeftConfig:
    """Adapters that are trained instead of the weights (LoRA, arXiv:2106.09685), names as in
    NeMo."""

    peft_scheme: str = "lora"
    """Only ``lora``."""
    dim: int = 16
    """Rank of the adapters."""
    alpha: float = 32.0
    """An adapter's product is multiplied by alpha / dim."""
    target_modules: list[str] = field(default_factory=lambda: ["attention", "feed_forward"])
    """What gets adapters: ``attention``, ``feed_forward`` (dense layers and shared experts),
    ``experts`` (each routed expert its own), or matrices by name: ``wq``, ``wq_a``, ``wq_b``,
    ``wkv_a``, ``wkv_b``, ``wo``, ``w1``, ``w2``, ``w3``, ``experts.w1``, ``experts.w2``,
    ``experts.w3``. MTP modules get none."""


@dataclass(frozen=True)
class SchedConfig:
    """Learning rate over the steps."""

    name: str = "CosineAnnealing"
    """``CosineAnnealing`` (as in NeMo: warm-up, cosine, optional floor) or ``WarmupConstantCosine``
    (as in DeepSeek-V3)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    constant_steps: int = 0
    """CosineAnnealing: steps held at ``min_lr`` at the end (NeMo's meaning).
    WarmupConstantCosine: steps held at the peak before the decay."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    max_steps: int | None = None
    """Steps over which the schedule runs; null: ``trainer.max_steps``."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and its schedule."""

    name: str = "adamw"
    """``adamw`` or ``muon`` (Muon for hidden matrices, AdamW for the rest)."""
    lr: float = 2.2e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's averaging coefficients."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases are never decayed."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon."""
    sched: SchedConfig = field(default_factory=SchedConfig)
    """Learning rate over the steps."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, training knobs, batch, parallel sizes; sections data, tokenizer and optim."""

    # -- architecture (names of HF config.json) --
    vocab_size: int = 4096
    """Rows of the embedding and of the head; at least the tokenizer's size."""
    hidden_size: int = 256
    """Width of the residual stream (D)."""
    num_hidden_layers: int = 4
    """Transformer blocks, MTP modules not counted."""
    num_attention_heads: int = 8
    """Attention heads (N)."""
    q_lora_rank: int | None = None
    """Rank of the compressed query; null: queries are projected directly."""
    kv_lora_rank: int = 64
    """Rank of the compressed key and value (C): the cached latent."""
    qk_nope_head_dim: int = 32
    """Per-head query/key dims without position."""
    qk_rope_head_dim: int = 16
    """Per-head query/key dims that carry rotary position; even."""
    v_head_dim: int = 32
    """Per-head value dims."""
    intermediate_size: int = 1024
    """Hidden width of the dense SwiGLU layers."""
    moe_intermediate_size: int = 256
    """Hidden width of one expert (F)."""
    n_routed_experts: int = 8
    """Routed experts per MoE layer (E)."""
    n_shared_experts: int = 1
    """Shared experts per MoE layer, fused into one SwiGLU of this many times
    moe_intermediate_size; 0: none."""
    num_experts_per_tok: int = 2
    """Routed experts chosen per token (K)."""
    first_k_dense_replace: int = 1
    """Leading blocks with a dense feed-forward instead of MoE."""
    n_group: int = 1
    """Groups the experts are divided into for group-limited routing."""
    topk_group: int = 1
    """Groups a token may choose from."""
    scoring_func: str = "sigmoid"
    """``sigmoid`` (V3) or ``softmax`` (V2)."""
    topk_method: str = "noaux_tc"
    """``noaux_tc`` (correction bias, group score = sum of top 2), ``group_limited_greedy`` (group
    score = max, no bias) or ``greedy`` (no groups, no bias)."""
    norm_topk_prob: bool = True
    """Normalise the chosen scores to sum to 1."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed weights."""
    num_nextn_predict_layers: int = 0
    """Multi-token-prediction depth (modules)."""
    max_position_embeddings: int = 4096
    """Longest context, tokens."""
    rope_theta: float = 10000.0
    """RoPE base."""
    rope_scaling: RopeScaling | None = None
    """YaRN, or null for plain RoPE."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights (DeepSeek-V3: 0.006)."""
    tie_word_embeddings: bool = False
    """Head shares the embedding's weight. Only false: no V3-class model ties them."""

    # -- training knobs (names of NeMo / Megatron) --
    moe_aux_loss_coeff: float = 1e-4
    """Weight alpha of the sequence-wise balance loss (arXiv:2412.19437 eq 17-20)."""
    moe_z_loss_coeff: float = 0.0
    """Weight of the router z-loss, mean of logsumexp(router logits) squared."""
    moe_router_bias_update_rate: float = 1e-3
    """Gamma: step of the correction bias per optimiser step (noaux_tc only); 0 freezes it."""
    mtp_loss_scaling_factor: float = 0.3
    """Lambda: weight of the MTP loss, averaged over depths."""
    activations_checkpoint_granularity: str | None = None
    """null: keep activations; ``full``: recompute each block in the backward pass."""
    torch_compile: bool = False
    """Compile each block's attention and norms (the expert dispatch stays eager)."""

    # -- batch --
    micro_batch_size: int = 4
    """Sequences per forward pass on one data-parallel rank."""
    global_batch_size: int = 16
    """Sequences per optimiser step over all ranks."""

    # -- parallel sizes --
    tensor_model_parallel_size: int = 1
    """Ranks that share one layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks the layers are divided over (PP)."""
    pipeline_schedule: str = "1F1B"
    """Order of the forward and backward passes over the stages: ``GPipe``, ``1F1B``,
    ``Interleaved1F1B``, ``InterleavedZeroBubble``, ``ZBVZeroBubble`` or ``DualPipeV``."""
    virtual_pipeline_model_parallel_size: int = 1
    """Stages a pipeline rank holds, for the interleaved schedules (2 or more). The V schedules
    (``ZBVZeroBubble``, ``DualPipeV``) always have 2 and leave this at 1."""
    pipeline_layers_per_stage: list[int] | None = None
    """Layers of each stage, first to last; null: split so that the costliest stage costs least."""
    expert_model_parallel_size: int = 1
    """Ranks the routed experts are divided over (EP)."""
    data_parallel_replicate_size: int = 1
    """Replicas of the sharded model (HSDP); 1: shard over all data-parallel ranks."""
    reshard_after_forward: bool | None = None
    """Gathered weights go after each forward pass and are gathered again for the backward pass
    (true), or stay until the gradients of the step are there (false): more memory, less traffic.
    null: they stay under a pipeline, or if all of them take less than 1 GiB of a rank."""

    restore_from: str | None = None
    """Start from the weights in this run folder, imported folder, checkpoint or ``.nemo`` file, at
    step 0; null: from random ones. A run that goes on from a checkpoint of its own ignores it."""
    peft: PeftConfig | None = None
    """Adapters on top of the frozen weights of ``restore_from``; null: all weights are trained."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Which tokenizer turns text into ids."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is read, and how it is cut into sequences."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and its schedule."""

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


@dataclass(frozen=True)
class TrainerConfig:
    """Passed to the Lightning trainer, but for the keys that the training step itself applies."""

    devices: int = 1
    """Processes (GPUs) per node."""
    num_nodes: int = 1
    """Nodes."""
    accelerator: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu`` or ``gpu``."""
    precision: Any = "32"
    """``32``, ``bf16-mixed`` (products in bf16; weights, router, bias, loss in fp32) or ``auto``
    (``bf16-mixed`` on a GPU, ``32`` on a CPU, whose bf16 products are slow)."""
    max_steps: int = 100
    """Optimiser steps of the whole run."""
    val_check_interval: int = 50
    """Steps between validations; 0: never."""
    limit_val_batches: int = 8
    """Global batches per validation, at most: the same sequences in every layout."""
    log_every_n_steps: int = 1
    """Steps between printed lines (``metrics.jsonl`` gets every step)."""
    gradient_clip_val: float = 1.0
    """Largest global gradient norm; 0: no clipping. Applied by the training step."""
    num_threads: int = 0
    """CPU threads of one process; 0: torch's own choice."""
    max_restarts: int = 3
    """How often the processes of this machine are started anew after one of them was lost; each
    time they go on from the newest checkpoint."""
    collective_timeout_minutes: float = 30.0
    """How long a rank waits for the others in one collective before it gives up."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are written and kept."""

    every_n_train_steps: int = 50
    """Steps between checkpoints; 0: only at the end."""
    save_top_k: int = 2
    """How many of the newest complete checkpoints to keep; -1: all."""
    async_save: bool = False
    """Write the checkpoints on the way in the background, from a copy in CPU memory."""
    save_nemo_on_train_end: bool = False
    """Also write the whole model as ``NAME.nemo`` at the end, in any layout."""


@dataclass(frozen=True)
class ProfileConfig:
    """Steps whose course is written as a Chrome trace into the run folder, ``profile/``."""

    steps: list[int] | None = None
    """Steps to profile, as [10, 11]; each run of consecutive ones gives one trace per rank. null:
    none."""
    with_stack: bool = False
    """Also record the Python lines that called each operation (slow, large)."""
    record_shapes: bool = False
    """Also record the shapes of every operation's inputs."""
    memory: bool = False
    """Also record allocations."""


@dataclass(frozen=True)
class MonitorConfig:
    """What is recorded of a run besides its losses."""

    every_n_steps: int = 1
    """Steps between records of expert loads, traffic, times and memory of every rank; 0: none."""
    peak_tflops: float | None = None
    """What one device could do at best, 10^12 operations a second, the denominator of MFU; null:
    the data sheet's number for a known GPU, on a CPU a measured one."""


@dataclass(frozen=True)
class WandbConfig:
    """A run on Weights & Biases."""

    project: str | None = None
    """Its project; null: the run's ``name``."""
    name: str | None = None
    """What it is called there; null: the name of the run folder."""
    offline: bool = False
    """Write into the run folder alone, for ``wandb sync`` later."""


@dataclass(frozen=True)
class MLFlowConfig:
    """A run on MLflow."""

    experiment_name: str | None = None
    """Its experiment; null: the run's ``name``."""
    run_name: str | None = None
    """What it is called there; null: the name of the run folder."""
    tracking_uri: str | None = None
    """Of the server; null: MLFLOW_TRACKING_URI, or files in the run folder."""


@dataclass(frozen=True)
class ExpManagerConfig:
    """Where the run lives and how it resumes, keys as in NeMo's ``exp_manager``."""

    exp_dir: str = "runs"
    """Parent folder of runs."""
    name: str | None = None
    """Folder under ``exp_dir``; null: the run's ``name``."""
    version: str | None = None
    """Folder under ``name``; null: the newest one when resuming, else ``version_N`` with the next
    N."""
    resume_if_exists: bool = True
    """Continue from the newest complete checkpoint of the same run folder."""
    create_tensorboard_logger: bool = True
    """Mirror the scalars to TensorBoard event files in the run folder."""
    create_wandb_logger: bool = False
    """Mirror the scalars to Weights & Biases."""
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    """Where to."""
    create_mlflow_logger: bool = False
    """Mirror the scalars to MLflow."""
    mlflow_logger_kwargs: MLFlowConfig = field(default_factory=MLFlowConfig)
    """Where to."""
    create_checkpoint_callback: bool = True
    """Write checkpoints."""
    checkpoint_callback_params: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Which checkpoints are written and kept."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is recorded of a run besides its losses."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Steps whose course is written as a trace."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    name: str = "deepseek"
    """Name of the run."""
    seed: int = 1234
    """Decides the initial weights and the order of the data."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Processes, precision, steps, validation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture, training knobs, batch, parallel sizes; tokenizer, data, optimiser."""
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    """Where the run lives and how it resumes."""


Section = TypeVar("Section")
"""``RunConfig``, or the dataclass of one of its sections."""


def changed(config: Section, values: Mapping[str, object]) -> Section:
    """``config`` with other values under dotted keys; no rule is applied to them."""
    for key, value in values.items():
        first, _, rest = key.partition(".")
        inner = changed(getattr(config, first), {rest: value}) if rest else value
        config = replace(config, **{first: inner})  # type: ignore[type-var]
    return config
