"""``deepseek train``: from a configuration to a trained run folder."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from deepseek.commands.generate import generate_text
from deepseek.commands.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOGS,
    METRICS_FILE,
    TOKENIZER,
    finished_steps,
    run_folder,
)
from deepseek.config import ConfigError, RunConfig, UserError, load_config, resolved_yaml
from deepseek.config.rules import single_process_only
from deepseek.console import StageProgress, say
from deepseek.data.opened import OpenedData, open_data
from deepseek.data.sampler import build_train_loader, build_validation_loader
from deepseek.planner.counts import count_parameters

SAMPLE_TOKENS = 160


@dataclass(frozen=True)
class TrainResult:
    """Where the run lies and how far it came."""

    folder: Path
    finished_steps: int
    val_loss: float | None
    val_bits_per_byte: float | None


def train(
    config: str,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    sample: bool = False,
) -> TrainResult:
    """Train, or continue, one run.

    Args:
        config: name of a shipped configuration, or a YAML file.
        overrides: ``a.b=c``.
        run_dir: the run folder, instead of one under ``exp_manager.exp_dir``.
        sample: print a generated sample at the end.

    Raises:
        ConfigError: every problem of the configuration at once.
        UserError: anything else the user can mend.
    """
    cfg = load_config(config, overrides)
    not_yet = single_process_only(cfg)
    if not_yet:
        raise ConfigError(not_yet, config)
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, RunConfig)
    folder = run_folder(run, run_dir)
    done = finished_steps(folder)
    if run.exp_manager.resume_if_exists and done >= run.trainer.max_steps:
        say(
            f"{folder} is complete: {done} of {run.trainer.max_steps} steps. "
            "To go on, raise trainer.max_steps; to start again, use another --run-dir"
        )
        return TrainResult(folder, done, None, None)
    result = _fit(cfg, run, folder)
    if result.val_loss is not None:
        bits = result.val_bits_per_byte
        per_byte = f", {bits:.4f} bits per byte" if bits is not None else ""
        say(f"validation   loss {result.val_loss:.4f}{per_byte}")
    say(f"run folder   {folder}")
    if result.finished_steps < run.trainer.max_steps:
        step, steps = result.finished_steps, run.trainer.max_steps
        say(f"stopped at step {step} of {steps}; run the same command again to go on")
    elif not (folder / TOKENIZER).is_dir() or not finished_steps(folder):
        pass  # nothing to sample from
    elif sample:
        say("sample:")
        generate_text(folder, [""], max_new_tokens=SAMPLE_TOKENS)
    else:
        say(f"sample it    deepseek generate {folder}")
    return result


def _fit(cfg: DictConfig, run: RunConfig, folder: Path) -> TrainResult:
    # Imported here: a configuration error should not wait seconds for a training framework.
    import torch

    from deepseek.frameworks import USES_NEMO, Trainer, attach_loggers, framework_name
    from deepseek.models.deepseek_model import DeepSeekModel

    if run.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator=gpu: torch finds no GPU here; use trainer.accelerator=auto or cpu"
        )
    if run.exp_manager.checkpoint_callback_params.save_nemo_on_train_end and not USES_NEMO:
        raise UserError(
            "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true: .nemo files are "
            "written by NeMo, which does not drive this run; pip install nemo_toolkit, or set it "
            "to false"
        )
    on_gpu = torch.cuda.is_available() and run.trainer.accelerator != "cpu"
    precision = run.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if on_gpu else "32"
    elif precision == "bf16-mixed" and not on_gpu:
        say("note         trainer.precision=bf16-mixed is slow on most CPUs; 32 or auto is faster")
    if run.trainer.num_threads:
        torch.set_num_threads(run.trainer.num_threads)
    say(f"run folder   {folder}")
    say(f"framework    {framework_name()}")
    data = _open_data(run)
    module = DeepSeekModel(
        cfg.model,
        seed=run.seed,
        max_steps=run.trainer.max_steps,
        gradient_clip_val=run.trainer.gradient_clip_val,
        bytes_per_token=data.validation_bytes_per_token,
    )
    module.train_loader = lambda step: build_train_loader(
        data.train, run.model, max_steps=run.trainer.max_steps, start_step=step
    )
    validates = data.validation is not None and run.trainer.val_check_interval > 0
    if data.validation is not None and validates:
        loader = build_validation_loader(
            data.validation, run.model, limit_batches=run.trainer.limit_val_batches
        )
        module.validation_loader = lambda: loader
    if run.model.torch_compile:
        module.model.compile_attention()
    _say_size(run)
    with _quiet():
        trainer = Trainer(
            accelerator=run.trainer.accelerator,
            devices=1,
            precision="32-true" if precision == "32" else precision,
            max_steps=run.trainer.max_steps,
            val_check_interval=run.trainer.val_check_interval if validates else None,
            check_val_every_n_epoch=None if validates else 1,
            limit_val_batches=run.trainer.limit_val_batches if validates else 0,
            num_sanity_val_steps=0,
            callbacks=_callbacks(cfg, run, folder, data),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        attach_loggers(trainer, folder / LOGS, _wants_tensorboard(run))
        try:
            trainer.fit(module)
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's exit(1) for Ctrl-C
                raise end.__context__ from None
            raise
    finished = module.finished_steps == run.trainer.max_steps
    if run.exp_manager.checkpoint_callback_params.save_nemo_on_train_end and finished:
        module.save_to(str(folder / f"{run.name}.nemo"))
    metrics = module.validation_metrics
    return TrainResult(
        folder,
        module.finished_steps,
        metrics.val_loss if metrics else None,
        metrics.val_bits_per_byte if metrics else None,
    )


def _open_data(run: RunConfig) -> OpenedData:
    with StageProgress() as shown:
        return open_data(
            run.model,
            run.seed,
            lambda now: shown.update(now.stage, now.done, now.total, f"{now.tokens:,} tokens"),
        )


def _wants_tensorboard(run: RunConfig) -> bool:
    if not run.exp_manager.create_tensorboard_logger:
        return False
    if importlib.util.find_spec("tensorboard") is None:
        say("tensorboard is not installed, so no event files are written: pip install tensorboard")
        return False
    return True


def _callbacks(cfg: DictConfig, run: RunConfig, folder: Path, data: OpenedData) -> list[Any]:
    """The others after the checkpoint, whose restoring decides whether and where they start."""
    from deepseek.checkpoint.callback import Checkpointing
    from deepseek.monitoring.metrics_log import MetricsLog
    from deepseek.monitoring.progress import Progress
    from deepseek.monitoring.run_record import RunRecord

    manager = run.exp_manager
    others = [
        RunRecord(folder / CONFIG_FILE, resolved_yaml(cfg), folder / TOKENIZER, data.tokenizer),
        MetricsLog(folder / METRICS_FILE),
        Progress(run.trainer.log_every_n_steps),
    ]
    if not manager.create_checkpoint_callback:
        return others
    checkpointing = Checkpointing(
        folder / CHECKPOINTS,
        manager.checkpoint_callback_params,
        OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        data.fingerprint,
        manager.resume_if_exists,
        say,
    )
    return [checkpointing, *others]


def _say_size(run: RunConfig) -> None:
    """Facts derived from the configuration, before the first step."""
    model = run.model
    counts = count_parameters(model)
    tokens = model.global_batch_size * model.data.seq_length
    micro_batches = model.global_batch_size // model.micro_batch_size
    say(
        f"model        {(counts.total + counts.mtp) / 1e6:,.1f} M parameters, "
        f"{counts.active / 1e6:,.1f} M active per token"
    )
    say(
        f"step         {model.global_batch_size} sequences x {model.data.seq_length} = "
        f"{tokens:,} tokens in {micro_batches} x {model.micro_batch_size} per forward pass; "
        f"{run.trainer.max_steps} steps = {tokens * run.trainer.max_steps:,} tokens"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's banners and tips are not about the user's run."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*treespec.*", ".*logging interval.*"):
            warnings.filterwarnings("ignore", message)
        yield
