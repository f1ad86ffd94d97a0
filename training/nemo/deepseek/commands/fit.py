"""The trainer of one run, in each of its processes."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from deepseek.checkpoint.ranks import Ranks
from deepseek.commands.callbacks import callbacks
from deepseek.commands.forecast import forecast
from deepseek.commands.validate import summary
from deepseek.commands.versions import (
    chosen_folder,
    finished_steps,
    has_gone_back,
    made_folder,
    start_going_back,
)
from deepseek.config import RunConfig, UserError
from deepseek.config.batch_ramp import consumed_samples
from deepseek.config.layout import Layout
from deepseek.console import StageProgress, complain, say
from deepseek.data.loader import build_train_loader, build_validation_loader
from deepseek.data.open_data import OpenedData, open_data
from deepseek.frameworks import (
    Trainer,
    Unprofiled,
    attach_loggers,
    framework_name,
    remote_loggers,
)
from deepseek.launch.health import compile_kernels, local_checks, worst
from deepseek.launch.processes import Processes, join, record_flights, remember, remembers
from deepseek.launch.strategy import DeepSeekStrategy, OneProcess
from deepseek.monitoring.record.run_record import peak_of
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.run_folder import FLIGHT_RECORDER, GOING_BACK, LOGS
from deepseek.training.precision import WORTH_IT, cpu_speedup
from deepseek.training.step import DeepSeekModel


@dataclass(frozen=True)
class FitResult:
    """Where the run lies and how far it came."""

    folder: Path
    finished_steps: int
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    stop_signal: int | None = None
    """What ended it before its last step."""
    was_complete: bool = False
    """There was nothing left to do."""


def fit(
    run: RunConfig,
    run_dir: Path | None,
    processes: Processes,
    resume_from: int | None = None,
    with_changes: bool = False,
) -> FitResult:
    """Train in this process, together with the others of the run if there are any.

    Raises:
        UserError: what the user can mend, on every process.
    """
    timeout = timedelta(minutes=run.trainer.collective_timeout_minutes)
    together = processes.world_size > 1
    on_gpu = _device_is_gpu(run)
    if together:
        processes = join(processes, "cuda" if on_gpu else "cpu", timeout)
    resume = run.exp_manager.resume_if_exists or processes.attempt > 0 or resume_from is not None
    folder = Ranks().lead(lambda: chosen_folder(run, run_dir, resume))
    # A rank may have been lost before any began to go back: torchrun leaves no mark in the folder.
    if processes.attempt > 0 and Ranks().lead(
        lambda: remembers(processes, GOING_BACK, timeout) and has_gone_back(folder)
    ):
        resume_from = None  # started anew: the newest checkpoint is what has come of it
    done = Ranks().lead(lambda: finished_steps(folder))
    if resume and resume_from is None and done >= run.trainer.max_steps:
        return FitResult(folder, done, was_complete=True)
    with ExitStack() as stack:
        Ranks().lead(lambda: stack.enter_context(made_folder(folder)))
        if processes.started_by != "none" and resume_from is not None:
            Ranks().lead(lambda: start_going_back(folder))
            Ranks().lead(lambda: remember(processes, GOING_BACK, timeout))
        return _fit(run, folder, processes, on_gpu, resume, resume_from, with_changes)


def _fit(
    run: RunConfig,
    folder: Path,
    processes: Processes,
    on_gpu: bool,
    resume: bool,
    resume_from: int | None,
    with_changes: bool,
) -> FitResult:
    together = processes.world_size > 1
    loggers = remote_loggers(folder, run, complain)
    if run.trainer.num_threads:
        torch.set_num_threads(run.trainer.num_threads)
    if not on_gpu:
        keep_freed_memory()
    say(f"run folder   {folder}")
    say(f"framework    {framework_name()}")
    _say_health(run, processes, on_gpu)
    compiles = processes.local_rank == 0 and not on_gpu  # the machine's others wait for it
    Ranks().together((lambda: compile_kernels(say)) if compiles else lambda: None)
    if together and on_gpu:
        record_flights(folder / FLIGHT_RECORDER, processes.attempt)
    data = _open_data_in_turn(run, processes)
    batch = run.model.global_batch_size, run.model.rampup_batch_size
    for part in data.parts:
        epochs = data.epochs(consumed_samples(run.trainer.max_steps, *batch), part)
        share = f", {part['share']:.3g} of a batch" if len(data.parts) > 1 else ""
        say(f"data         {part['name']}: {part['tokens']:,} tokens{share}, {epochs:.2f} epochs")
    for note in data.notes:
        say(f"data         {note}")
    Ranks().together(data.verification.start if processes.local_rank == 0 else lambda: None)
    module = DeepSeekModel(
        run.model,
        seed=run.seed,
        max_steps=run.trainer.max_steps,
        gradient_clip_val=run.trainer.gradient_clip_val,
        bytes_per_token=data.validation_bytes_per_token,
        parallelize_later=together,
    )
    module.train_loader = lambda step, rank, size: build_train_loader(
        data.train,
        run.model,
        max_steps=run.trainer.max_steps,
        start_step=step,
        dp_rank=rank,
        dp_size=size,
    )
    validates = data.validation is not None and run.trainer.val_check_interval > 0
    validation = data.validation
    if validation is not None and validates:
        module.validation_loader = lambda step, rank, size: build_validation_loader(
            validation,
            run.model,
            limit_batches=run.trainer.limit_val_batches,
            dp_rank=rank,
            dp_size=size,
        )
    for what, value in summary(run, on_gpu):
        say(f"{what:<12} {value}")
    expected = forecast(run, torch.cuda.get_device_name() if on_gpu else None)
    if expected is not None:
        expected.tell()
    precision = _precision(run, on_gpu)
    with _quiet():
        trainer = Trainer(
            accelerator="gpu" if on_gpu else "cpu",  # Lightning's auto takes MPS, without fp64
            devices=run.trainer.devices,
            num_nodes=run.trainer.num_nodes,
            strategy=DeepSeekStrategy(
                lambda size: Layout.of(run.model, size),
                timedelta(minutes=run.trainer.collective_timeout_minutes),
                step_timeout=timedelta(seconds=run.trainer.step_timeout_seconds),
                processes=processes,
            )
            if together
            else OneProcess(_device(processes, on_gpu)),
            precision=precision,  # type: ignore[arg-type]
            max_steps=run.trainer.max_steps,
            val_check_interval=run.trainer.val_check_interval if validates else None,
            check_val_every_n_epoch=None if validates else 1,
            limit_val_batches=1.0 if validates else 0,  # all of the loader, which is limited
            num_sanity_val_steps=0,
            callbacks=callbacks(
                run,
                folder,
                data,
                resume=resume,
                resume_from=resume_from,
                with_changes=with_changes,
                leads=processes.rank == 0,
                peak=peak_of(
                    _device(processes, on_gpu),
                    run.exp_manager.monitor.peak_tflops,
                    torch.float32 if precision == "32-true" else torch.bfloat16,
                ),
                attempt=processes.attempt,
                loggers=loggers,
                expected=expected,
            ),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            profiler=Unprofiled(),
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        if processes.rank == 0:
            attach_loggers(trainer, folder / LOGS, _wants_tensorboard(run))
        try:
            trainer.fit(module)
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's exit(1) for Ctrl-C
                raise end.__context__ from None
            raise
    module.meshes.expect_steps(False)
    if left := Ranks().together(data.verification.finish)[0]:
        say(f"data         {left}")
    metrics = module.validation_record
    if expected is not None and processes.rank == 0:
        expected.compare(folder)
    return FitResult(
        folder,
        module.finished_steps,
        metrics.val_loss if metrics else None,
        metrics.val_bits_per_byte if metrics else None,
        module.stop_signal if module.finished_steps < run.trainer.max_steps else None,
    )


def _say_health(run: RunConfig, processes: Processes, on_gpu: bool) -> None:
    """What ``deepseek doctor`` finds in milliseconds, if it is anything to be told."""
    of_this = processes.local_world_size, on_gpu, run.model.data.num_workers, processes.world_size
    for check in worst(Ranks().together(lambda: local_checks(*of_this))):
        if check.verdict == "fail":
            raise UserError(f"{check.name}: {check.value}; {check.way_out}")
        if check.verdict == "warn":
            say(f"note         {check.name}: {check.value}; {check.way_out}")


def _device_is_gpu(run: RunConfig) -> bool:
    if run.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator=gpu: torch finds no GPU here; use trainer.accelerator=auto or cpu"
        )
    if run.trainer.accelerator == "auto" and torch.backends.mps.is_available():
        say("note         Apple GPUs have no fp64, which losses and norms need: the CPU trains")
    on_gpu = torch.cuda.is_available() and run.trainer.accelerator != "cpu"
    model = run.model
    offloads = ["model.optim.cpu_offload"] * model.optim.cpu_offload
    offloads += ["model.cpu_offloading_activations"] * model.cpu_offloading_activations
    if offloads and not on_gpu:
        say(f"note         {' and '.join(offloads)}: the CPU trains, nothing lies elsewhere")
    return on_gpu


def _device(processes: Processes, on_gpu: bool) -> torch.device:
    return torch.device("cuda", processes.local_rank) if on_gpu else torch.device("cpu")


def _precision(run: RunConfig, on_gpu: bool) -> str:
    """As Lightning names it; the same on all ranks."""
    precision = str(run.trainer.precision)
    if on_gpu:
        precision = "bf16-mixed" if precision == "auto" else precision
    elif precision != "32":
        speedup = Ranks().lead(cpu_speedup)
        if precision == "bf16-mixed" and speedup < 1:
            say(
                "note         trainer.precision=bf16-mixed is slow on this CPU, whose products in "
                f"bf16 take {1 / speedup:.3g} times as long as in fp32; 32 or auto is faster"
            )
        elif precision == "auto":
            precision = "bf16-mixed" if speedup >= WORTH_IT else "32"
            say(
                f"precision    {precision}, since products in bf16 run at {speedup:.3g} times the "
                "rate of fp32 on this CPU; trainer.precision=32 or bf16-mixed decides itself"
            )
    return "32-true" if precision == "32" else precision


def _open_data_in_turn(run: RunConfig, processes: Processes) -> OpenedData:
    """Data that are not there yet are prepared by one process, or by one of each node."""
    my_turn = 0 if processes.rank == 0 else 1 if processes.local_rank == 0 else 2
    opened: list[OpenedData] = []
    for turn in range(3):
        work: Callable[[], None] = lambda: None  # noqa: E731
        if turn == my_turn:
            work = lambda: opened.append(_open_data(run))  # noqa: E731
        Ranks().together(work)
    return opened[0]


def _open_data(run: RunConfig) -> OpenedData:
    with StageProgress() as shown:
        return open_data(run.model, run.seed, shown.of_data)


def _wants_tensorboard(run: RunConfig) -> bool:
    if not run.exp_manager.create_tensorboard_logger:
        return False
    if importlib.util.find_spec("tensorboard") is None:
        say("tensorboard is not installed, so no event files are written: pip install tensorboard")
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's banners and tips are not about the user's run."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*treespec.*", ".*logging interval.*"):
            warnings.filterwarnings("ignore", message)
        yield
