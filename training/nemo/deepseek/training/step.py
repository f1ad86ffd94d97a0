"""``DeepSeekModel``: the trained module, and the training step, written once.

A NeMo ``ModelPT`` where NeMo works, a ``LightningModule`` otherwise; the code is the same. The
optimisation is manual: one call of ``train_step`` is one optimiser step over all its micro-batches,
with or without accumulation. Shapes: ``models/__init__.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.layout import compiles
from deepseek.config.schema import ModelConfig
from deepseek.data.loader import TimedLoader
from deepseek.frameworks import USES_NEMO, Callback, ModelBase, Trainer, model_config, nemo_config
from deepseek.models.components.feed_forward import is_watched
from deepseek.models.components.moe import GroupedExperts
from deepseek.models.components.router import Router
from deepseek.ops.cross_entropy import IGNORE_INDEX
from deepseek.ops.noted_squares import doubt_notes, squares_noted
from deepseek.parallel.gradients import (
    GradientNorms,
    clip_factor,
    finish_gradients,
    gradient_norms,
    sum_over,
)
from deepseek.parallel.mesh import Meshes, SingleProcess, whole_matrices
from deepseek.parallel.parallelize import parallelize
from deepseek.parallel.pipeline import Batch
from deepseek.training.adamw import AdamW
from deepseek.training.muon import newton_schulz
from deepseek.training.optim import (
    build_optimizer,
    learning_rate,
    make_room,
    multiply_in_update,
)
from deepseek.training.phases import Memory, Phases
from deepseek.training.qk_clip import QueryKeyClip

MAX_SKIPPED_IN_A_ROW = 10
"""Consecutive steps with a non-finite gradient after which training stops."""


_PLAIN = (str, int, float, type(None))

Loader = Callable[[int, int, int], Iterable[Batch]]
"""From the first step, the data-parallel rank and their number to this rank's batches."""


class DeepSeekModel(ModelBase):  # type: ignore[misc, valid-type]
    """Transformer, optimiser, step.

    Args:
        cfg: the ``model`` section of a run; NeMo gives a DictConfig, which is a mapping.
        trainer: the Lightning trainer, or None.
        seed: decides the initial weights.
        max_steps: ``trainer.max_steps``, the length of the schedule.
        gradient_clip_val: largest global gradient norm; 0 for no clipping.
        bytes_per_token: bytes of text per token of the data, for bits per byte.
        parallelize_later: leave the weights to ``configure_model``, which divides them over the
            ranks of the trainer's strategy; else the whole model is made at once.
    """

    def __init__(
        self,
        cfg: ModelConfig | Mapping[str, Any],
        trainer: Trainer | None = None,
        *,
        seed: int = 1234,
        max_steps: int = 1,
        gradient_clip_val: float = 1.0,
        bytes_per_token: float | None = None,
        parallelize_later: bool = False,
    ) -> None:
        config = model_config(cfg)
        if USES_NEMO:
            # NeMo keeps the arguments of this call, ``cfg`` by its name, and loggers write them
            # to a file: what is frozen, or no OmegaConf, cannot go there.
            cfg = nemo_config(config)
            super().__init__(cfg=cfg, trainer=trainer)
        else:
            super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.seed = seed
        self.max_steps = max_steps
        self.gradient_clip_val = gradient_clip_val
        self.bytes_per_token = bytes_per_token
        self.base: Any = None
        """Which checkpoint the frozen weights are of, with adapters."""
        self.meshes: Meshes | SingleProcess = SingleProcess()
        if not parallelize_later:
            self.parallelize(self.meshes, torch.device("cpu"))
        self.phases = Phases()
        self.finished_steps = 0
        self.skipped_in_a_row = 0
        self.train_loader: Loader | None = None
        self.validation_loader: Loader | None = None
        self.step_record: StepRecord | None = None
        self.validation_record: ValidationRecord | None = None
        self.save_record: SaveRecord | None = None
        self.stop_signal: int | None = None
        """The signal that ends the run: to this process, or, once all know, to any."""
        self.stopping = False
        """This is the last step: all ranks know of the signal."""
        self.stop_agreed = False
        """A signal had reached some rank before this step ended; the same on all ranks."""
        self._loading: TimedLoader | None = None
        self._validation_sums = torch.zeros(2, dtype=torch.float64)

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module does, without its search for parameters where a plain attribute gets another
        plain value: Lightning notes each hook here, twenty times a step."""
        if isinstance(value, _PLAIN) and name in self.__dict__:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- the step --

    @squares_noted()
    def train_step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> StepRecord:
        """One optimiser step over the whole batch of this rank; needs no trainer.

        Args:
            batch: ``tokens``, ``labels``, ``positions`` (int64) and ``documents`` (int32, -1 for
                padding), each (B, S) with B a multiple of ``micro_batch_size``.
            optimizer: of ``configure_optimizers``.

        Raises:
            NonFiniteError: this and the steps before it had no finite gradient.
        """
        self.meshes.expect_steps(self.step_record is not None)  # the first connects and compiles
        if self.step_record is None:
            make_room(optimizer)
            for module in self.model.modules():
                if isinstance(module, GroupedExperts):
                    module.make_gradient_rooms()
        self.phases.start_step(batch["tokens"].device)
        lr = learning_rate(
            self.finished_steps, self.config.optim.lr, self.config.optim.sched, self.max_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        routers = self.routers
        for router in routers:
            router.start_step()
        most = self.config.optim.qk_clip_threshold
        qk_clip = None if most is None else QueryKeyClip(self.model, most, self.meshes)
        # 1. divisors: tokens of the whole step, so that no cut of the batch changes the gradient
        counts = [(batch["labels"] != IGNORE_INDEX).sum(), (batch["documents"] >= 0).sum()]
        counts_2 = sum_over(torch.stack(counts), self.meshes.data).clamp(min=1)
        num_labels, num_real = counts_2
        # 2. forward and backward, micro-batch by micro-batch
        mtp_weight = self.config.mtp_loss_scaling_factor
        with self.phases("forward_backward"):
            try:
                sums = self.micro_batches.train(
                    batch,
                    lambda sums: (sums[0] + mtp_weight * sums[1]) / num_labels,
                    1.0 / num_real,
                )
            except BaseException:  # half of a gradient, to which the next step would add its own
                optimizer.zero_grad()
                raise
        with self.phases("optimizer"):
            # 3. global gradient norm
            finish_gradients(self.model, self.meshes)
            doubt_notes(map(is_watched, self.model.modules()))
            norms = gradient_norms(self.named, self.meshes)
            self._count_everywhere(routers)
            # 4. what the host must know: the one wait for the device, but for the exchanges of EP
            self.stop_agreed, told = self._to_host(sums, routers, norms, counts_2, qk_clip)
            # 5. clip and update, unless a gradient is not finite: then no weight changes
            if isfinite(told.norms.total):
                factor = clip_factor(self.gradient_clip_val, told.norms.total)
                multiply_in_update(optimizer, factor)
                optimizer.step()
                if qk_clip:
                    qk_clip.scale_weights(self.model)
                # 6. correction bias, once per step, from the counts of the whole batch
                for router in routers:
                    router.update_bias(
                        router.tokens_per_expert, self.config.moe_router_bias_update_rate
                    )
            optimizer.zero_grad()
        # 7. report
        self.step_record = self._record(told, lr)
        self.finished_steps += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.step_record.skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {self.finished_steps}: the gradient norm was not finite for "
                f"{self.skipped_in_a_row} steps in a row; the weights are those of step "
                f"{self.finished_steps - self.skipped_in_a_row}. Lower model.optim.lr="
                f"{self.config.optim.lr:g}, "
                "or look at the data of these steps"
            )
        return self.step_record

    def _record(self, told: _Told, lr: float) -> StepRecord:
        """Of the step that ends, before it is counted."""
        norms, seconds, saved = told.norms, self.phases.seconds(), self.save_record
        saved_before = saved is not None and saved.step == self.finished_steps
        return StepRecord(
            step=self.finished_steps + 1,
            loss=told.main / told.num_labels,
            mtp_loss=told.mtp / told.num_labels if self.config.num_nextn_predict_layers else None,
            balance_loss=told.balance,
            grad_norm=norms.total,
            grad_norm_dense=norms.dense,
            grad_norm_expert=norms.expert,
            grad_norm_router=norms.router,
            lr=lr,
            tokens=int(told.num_real),
            skipped=not isfinite(norms.total),
            max_attention_logit=told.logit,
            clipped_heads=told.clipped,
            data_seconds=self._loading.seconds if self._loading else None,
            forward_backward_seconds=seconds.get("forward_backward"),
            optimizer_seconds=seconds.get("optimizer"),
            memory_bytes=max(memory.peak for memory in self.phases.memory.values()),
            checkpoint_seconds=saved.seconds if saved and saved_before else None,
        )

    def _count_everywhere(self, routers: list[Router]) -> None:
        """Each router's counts, over every rank that sees tokens of its layer."""
        if routers:
            counts_LE = torch.stack([router.tokens_per_expert for router in routers])
            sum_over(counts_LE, self.meshes.stage)
            for router, counts_E in zip(routers, counts_LE, strict=True):
                router.tokens_per_expert.copy_(counts_E)

    def _to_host(
        self,
        sums: Tensor,
        routers: list[Router],
        norms: GradientNorms[Tensor],
        counts_2: Tensor,
        qk_clip: QueryKeyClip | None,
    ) -> tuple[bool, _Told]:
        """Whether a signal has reached a rank, and the numbers of the step, in one read.

        Losses are summed over all ranks; TP ranks all know the same, and CP ranks have the losses
        of their own tokens but know the same balance loss.
        """
        balance = sum((router.balance_loss for router in routers), torch.zeros_like(sums[0]))
        mine = torch.stack([*sums, balance, torch.full_like(balance, self.stop_signal is not None)])
        if self.meshes.coordinate.tp > 0:
            mine[:3].zero_()
        if self.meshes.coordinate.cp > 0:
            mine[2].zero_()
        known = [torch.stack(norms), counts_2.to(mine.dtype)]
        if qk_clip:
            qk_clip.know_all_ranks()
            heads = qk_clip.largest_LN.amax(), qk_clip.clipped_LN.sum()
            known.append(torch.stack([number.to(mine.dtype) for number in heads]))
        read = torch.cat((sum_over(mine, self.meshes.world), *known)).tolist()
        main, mtp, balance_loss, signals, *norms_4, num_labels, num_real = read[:10]
        heads_read = (read[10], int(read[11])) if qk_clip else (None, None)
        norms_read = GradientNorms(*norms_4)
        told = _Told(main, mtp, balance_loss, norms_read, num_labels, num_real, *heads_read)
        return signals > 0, told

    # -- validation --

    def on_validation_epoch_start(self) -> None:
        """Start new sums."""
        self._validation_sums.zero_()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one micro-batch to the sums."""
        main, _ = self.micro_batches.evaluate(batch)
        if self.meshes.coordinate.tp > 0:
            return
        self._validation_sums[0] += float(main)
        if self.model.head is not None and self.meshes.coordinate.cp == 0:
            self._validation_sums[1] += int((batch["labels"] != IGNORE_INDEX).sum())

    def on_validation_epoch_end(self) -> None:
        """Loss per token, and bits per byte: the one loss that tokenizers cannot flatter."""
        sums = self._validation_sums.to(self.device)
        loss_sum, num_labels = sum_over(sums, self.meshes.world).tolist()
        loss = loss_sum / max(num_labels, 1.0)
        bits = None
        if self.bytes_per_token:
            bits = loss / torch.log(torch.tensor(2.0)).item() / self.bytes_per_token
        self.validation_record = ValidationRecord(self.finished_steps, loss, bits)

    # -- what the frameworks call --

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """``train_step`` with the trainer's optimiser; the module counts its own steps."""
        if self.train_step(batch, self.optimizers()).skipped:
            # The trainer counts updates, and a step is a step also without one. Otherwise its loop
            # goes on past max_steps, with the samples of the first steps again.
            progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
            progress.increment_ready()
            progress.increment_completed()

    # Lightning asks for it in each step, and Python would find it out each time.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def parallelize(
        self,
        meshes: Meshes | SingleProcess,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        products: torch.dtype | None = None,
    ) -> None:
        """Make this rank's part of the model, with its start values; ``parallelize`` says how."""
        self.meshes = meshes
        self.model, self.micro_batches = parallelize(
            self.config, meshes, device, self.seed, dtype, products
        )
        # Finding them takes as long as a norm.
        self.named = list(self.model.named_parameters())
        self.routers = list(self.model.routers().values())

    def configure_model(self) -> None:
        """Divide the model over the ranks of the trainer's strategy; Lightning calls it once."""
        if not hasattr(self, "model"):
            strategy = self.trainer.strategy
            mixed = self.trainer.precision == "bf16-mixed"
            self.parallelize(
                strategy.meshes,
                strategy.root_device,
                products=torch.bfloat16 if mixed else None,
            )
        if compiles(self.config, next(self.model.parameters()).device.type == "cuda"):
            self.model.compile_blocks()

    def train_dataloader(self) -> Iterable[Batch]:
        """The steps that are left: called after a checkpoint has been restored."""
        assert self.train_loader is not None, "set train_loader before fit"
        self._loading = TimedLoader(
            self.train_loader(self.finished_steps, self.meshes.data_rank, self.meshes.layout.dp)
        )
        return self._loading

    def val_dataloader(self) -> Iterable[Batch]:
        """The fixed validation micro-batches."""
        if self.validation_loader is None:
            return []
        return self.validation_loader(0, self.meshes.data_rank, self.meshes.layout.dp)

    def configure_optimizers(self) -> AdamW:
        """The optimiser alone: the learning rate is set by the step."""
        return build_optimizer(
            self.model.named_parameters(), self.config.optim, whole_matrices(newton_schulz)
        )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Next-token logits (B, S, V)."""
        return self.model(tokens_BS)

    def setup_training_data(self, train_data_config: Any = None) -> None:
        """NeMo's hook; data reaches the trainer as loaders instead."""

    def setup_validation_data(self, val_data_config: Any = None) -> None:
        """NeMo's hook; data reaches the trainer as loaders instead."""

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """NeMo's hook: no pretrained models are hosted."""
        return []


class _Told(NamedTuple):
    """What the host is told of a step."""

    main: float
    """Sums of the losses, over all label tokens."""
    mtp: float
    balance: float
    norms: GradientNorms[float]
    num_labels: float
    num_real: float
    logit: float | None
    """The largest of attention, and how many heads were clipped for theirs; None: not asked for."""
    clipped: int | None


class NonFiniteError(UserError):
    """The gradients are not finite, step after step."""


@dataclass(slots=True)
class StepRecord:
    """What is known of one optimiser step; None where it was not measured in this step.

    Losses are in nats per label token. The step fills all but the last two groups: monitors fill
    the first of them in the steps they record, the log fills the second.
    """

    step: int
    loss: float
    mtp_loss: float | None
    """None without MTP."""
    balance_loss: float
    grad_norm: float
    grad_norm_dense: float
    """Of what is neither a routed expert nor a router."""
    grad_norm_expert: float
    grad_norm_router: float
    lr: float
    tokens: int
    """Tokens of this step, padding not counted."""
    skipped: bool
    """True if the gradient was not finite and no weight was changed."""

    max_attention_logit: float | None = None
    """Before QK-clip, of all heads of all blocks."""
    clipped_heads: int | None = None
    """That QK-clip has scaled after this step."""

    data_seconds: float | None = None
    """This rank's wait for its batch."""
    forward_backward_seconds: float | None = None
    """On a GPU this and the next are of the step before: nothing waits for them."""
    optimizer_seconds: float | None = None
    memory_bytes: int | None = None
    """Most that was allocated on this rank; in recorded steps, on any rank."""
    checkpoint_seconds: float | None = None
    """Of the save between the step before and this one."""

    all_to_all_seconds: float | None = None
    """Mean over ranks."""
    load_max_over_mean: float | None = None
    """Most tokens of an expert over the mean, of the worst layer; ``load_metrics`` has formulas."""
    load_cv: float | None = None
    load_entropy: float | None = None
    rank_load_max_over_mean: float | None = None
    bias_range: float | None = None
    router_margin: float | None = None
    dead_experts: int | None = None
    starved_experts: int | None = None
    monitor_seconds: float = 0.0
    """What watching cost on this rank."""

    seconds: float | None = None
    """From the end of the step before, without validations."""
    time: float | None = None
    """Seconds since 1970, at the end."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Share of the devices' peak; None where that is unknown."""

    def row(self) -> dict[str, Any]:
        """What the log keeps of it: seconds to the microsecond, nothing that was not measured."""
        found = {}
        for name in _STEP_FIELDS:
            value = getattr(self, name)
            if value is not None:
                found[name] = round(value, 6) if name in _STEP_SECONDS else value
            elif name in ("mtp_loss", "mfu"):  # None says something there
                found[name] = None
        return found


_STEP_FIELDS = tuple(field.name for field in fields(StepRecord))
_STEP_SECONDS = frozenset(name for name in _STEP_FIELDS if name.endswith("seconds"))


@dataclass(frozen=True)
class ValidationRecord:
    """Loss over the fixed validation sequences, in nats per token."""

    step: int
    val_loss: float
    val_bits_per_byte: float | None


class SaveRecord(NamedTuple):
    """What the newest checkpoint of this process cost."""

    step: int
    """That was saved."""
    seconds: float
    memory: Memory


class DeepSeekCallback(Callback):  # type: ignore[misc]
    """A callback of a ``DeepSeekModel``: Lightning's hooks, with the types of this project.

    ``module.step_record`` is that of the step that has ended, until the next one ends.
    """

    def on_fit_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Before training, when the model is in place."""

    def on_train_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Before the first step of this process."""

    def on_train_batch_start(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Before a step."""

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """After a step."""

    def on_validation_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Before a validation."""

    def on_validation_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """After a validation."""

    def on_train_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """After the last step."""

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """When training ends by an error."""

    def teardown(self, trainer: Trainer, module: DeepSeekModel, stage: str) -> None:
        """At the very end."""
