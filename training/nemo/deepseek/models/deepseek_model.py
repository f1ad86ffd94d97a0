"""``DeepSeekModel``: the trained module, and the training step, written once.

A NeMo ``ModelPT`` where NeMo works, a ``LightningModule`` otherwise; the code is the same. The
optimisation is manual: one call of ``training_step`` is one optimiser step over all its
micro-batches, with or without accumulation.

B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from deepseek.config.errors import UserError
from deepseek.config.schema import ModelConfig
from deepseek.frameworks import NEMO_TARGET, USES_NEMO, ModelBase
from deepseek.models.losses import LossSums, loss_sums
from deepseek.models.transformer import Transformer
from deepseek.ops.linear_cross_entropy import IGNORE_INDEX
from deepseek.optim.build import build_optimizer
from deepseek.optim.schedule import learning_rate

MAX_SKIPPED_IN_A_ROW = 10
"""Consecutive steps with a non-finite gradient after which training stops."""


class NonFiniteError(UserError):
    """The gradients are not finite, step after step."""


@dataclass
class StepMetrics:
    """What one optimiser step reports; losses are per label token, in nats."""

    step: int
    loss: float
    mtp_loss: float | None
    balance_loss: float
    grad_norm: float
    lr: float
    tokens: int
    """Tokens of this step, padding not counted."""
    skipped: bool
    """True if the gradient was not finite and no weight was changed."""


@dataclass
class ValidationMetrics:
    """Loss over the fixed validation sequences, in nats per token."""

    step: int
    val_loss: float
    val_bits_per_byte: float | None


class DeepSeekModel(ModelBase):  # type: ignore[misc, valid-type]
    """Transformer, optimiser, step.

    Args:
        cfg: the ``model`` section of a run, as a DictConfig, mapping or ModelConfig.
        trainer: the Lightning trainer, or None.
        seed: decides the initial weights.
        max_steps: ``trainer.max_steps``, the length of the schedule.
        gradient_clip_val: largest global gradient norm; 0 for no clipping.
        bytes_per_token: bytes of text per token of the data, for bits per byte.
    """

    def __init__(
        self,
        cfg: DictConfig | Mapping[str, Any] | ModelConfig,
        trainer: Any = None,
        *,
        seed: int = 1234,
        max_steps: int = 1,
        gradient_clip_val: float = 1.0,
        bytes_per_token: float | None = None,
    ) -> None:
        plain = _plain_config(cfg)
        if USES_NEMO:
            super().__init__(cfg=plain, trainer=trainer)
        else:
            super().__init__()
            self.cfg = plain
        self.automatic_optimization = False
        self.config = _typed_config(plain)
        self.seed = seed
        self.max_steps = max_steps
        self.gradient_clip_val = gradient_clip_val
        self.bytes_per_token = bytes_per_token
        with torch.device("meta"):
            self.model = Transformer(self.config)
        self.model.to_empty(device="cpu")
        self.model.init_weights(seed)
        self.finished_steps = 0
        self.skipped_in_a_row = 0
        self.train_loader: Callable[[int], Iterable[dict[str, Tensor]]] | None = None
        self.validation_loader: Callable[[], Iterable[dict[str, Tensor]]] | None = None
        self.step_metrics: StepMetrics | None = None
        self.validation_metrics: ValidationMetrics | None = None
        self._validation_sums = torch.zeros(2, dtype=torch.float64)

    # -- the step --

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimiser step over the whole batch of this rank.

        Args:
            batch: ``tokens``, ``labels``, ``positions`` (int64) and ``documents`` (int32, -1 for
                padding), each (B, S) with B a multiple of ``micro_batch_size``.
            batch_idx: ignored; the module counts its own steps.
        """
        optimizer = self.optimizers()
        lr = learning_rate(
            self.finished_steps, self.config.optim.lr, self.config.optim.sched, self.max_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        routers = list(self.model.routers().values())
        for router in routers:
            router.start_step()
        # 1. divisors: tokens of the whole step, so that no cut of the batch changes the gradient
        num_labels = (batch["labels"] != IGNORE_INDEX).sum().clamp(min=1)
        num_real = (batch["documents"] >= 0).sum().clamp(min=1)
        # 2. forward and backward, micro-batch by micro-batch
        main, mtp = torch.zeros(2, device=self.device)
        for micro in self._micro_batches(batch):
            sums = self._loss_sums(micro, balance_scale=1.0 / num_real)
            total = sums.main + self.config.mtp_loss_scaling_factor * sums.mtp
            self.manual_backward(total / num_labels)
            main, mtp = main + sums.main.detach(), mtp + sums.mtp.detach()
        # 3. global gradient norm, clip
        grad_norm = self._clip_gradients()
        # 4. update, unless a gradient is not finite: then no weight changes
        finite = bool(torch.isfinite(grad_norm))
        if finite:
            optimizer.step()
            # 5. correction bias, once per step, from the counts of the whole batch
            for router in routers:
                router.update_bias(
                    router.tokens_per_expert, self.config.moe_router_bias_update_rate
                )
        optimizer.zero_grad()
        # 6. report
        self.finished_steps += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.step_metrics = StepMetrics(
            step=self.finished_steps,
            loss=float(main / num_labels),
            mtp_loss=float(mtp / num_labels) if self.model.mtp else None,
            balance_loss=float(sum(router.balance_loss for router in routers)),
            grad_norm=float(grad_norm),
            lr=lr,
            tokens=int(num_real),
            skipped=not finite,
        )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"step {self.finished_steps}: the gradient norm was not finite for "
                f"{self.skipped_in_a_row} steps in a row; the weights are those of step "
                f"{self.finished_steps - self.skipped_in_a_row}. Lower model.optim.lr="
                f"{self.config.optim.lr:g}, "
                "or look at the data of these steps"
            )

    def _micro_batches(self, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        size = self.config.micro_batch_size
        for start in range(0, batch["tokens"].shape[0], size):
            yield {name: tensor[start : start + size] for name, tensor in batch.items()}

    def _loss_sums(self, batch: dict[str, Tensor], balance_scale: Tensor | None = None) -> LossSums:
        """Loss sums of one micro-batch; a balance scale turns counting and balance losses on."""
        documents_BS = batch["documents"] if self.config.data.isolate_documents else None
        context = self.model.context(
            batch["tokens"],
            batch["positions"],
            documents_BS,
            real_BS=batch["documents"] >= 0,
            balance_scale=balance_scale,
        )
        hidden = self.model.hidden_states(batch["tokens"], context)
        return loss_sums(
            hidden.main_BSD,
            hidden.mtp_BSD,
            self.model.head,
            batch["labels"],
            documents_BS,
        )

    def _clip_gradients(self) -> Tensor:
        """Global gradient norm before clipping."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.gradient_clip_val > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), self.gradient_clip_val, norm)
        return norm

    # -- validation --

    def on_validation_epoch_start(self) -> None:
        """Start new sums."""
        self._validation_sums.zero_()

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add one micro-batch to the sums."""
        sums = self._loss_sums(batch)
        num_labels = (batch["labels"] != IGNORE_INDEX).sum()
        self._validation_sums[0] += float(sums.main)
        self._validation_sums[1] += int(num_labels)

    def on_validation_epoch_end(self) -> None:
        """Loss per token, and bits per byte: the one loss that tokenizers cannot flatter."""
        loss_sum, num_labels = self._validation_sums.tolist()
        loss = loss_sum / max(num_labels, 1.0)
        bits = None
        if self.bytes_per_token:
            bits = loss / torch.log(torch.tensor(2.0)).item() / self.bytes_per_token
        self.validation_metrics = ValidationMetrics(self.finished_steps, loss, bits)

    # -- what the frameworks call --

    def train_dataloader(self) -> Iterable[dict[str, Tensor]]:
        """The steps that are left: called after a checkpoint has been restored."""
        assert self.train_loader is not None, "set train_loader before fit"
        return self.train_loader(self.finished_steps)

    def val_dataloader(self) -> Iterable[dict[str, Tensor]]:
        """The fixed validation micro-batches."""
        return self.validation_loader() if self.validation_loader is not None else []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser alone: the learning rate is set by the step."""
        return build_optimizer(self.model.named_parameters(), self.config.optim)

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


def _plain_config(cfg: DictConfig | Mapping[str, Any] | ModelConfig) -> DictConfig:
    """A DictConfig without types: NeMo adds keys of its own to it."""
    tree: Any
    if isinstance(cfg, ModelConfig):
        tree = asdict(cfg)
    elif isinstance(cfg, DictConfig):
        tree = OmegaConf.to_container(cfg, resolve=True)
    else:
        tree = dict(cfg)
    plain = OmegaConf.create(tree)
    if USES_NEMO:
        plain.target = NEMO_TARGET
    return plain


def _typed_config(cfg: DictConfig) -> ModelConfig:
    """The keys that are ours, as a ModelConfig."""
    names = {field.name for field in fields(ModelConfig)}
    ours = {name: cfg[name] for name in cfg if name in names}
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), ours))
    assert isinstance(typed, ModelConfig)
    return typed
