"""What accompanies the training of a run: checkpoints, records, and what people see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek.checkpoint.callback import Checkpointing, FolderLock
from deepseek.commands.forecast import Forecast
from deepseek.commands.stopping import Stopping
from deepseek.config import RunConfig, UserError, resolved_yaml
from deepseek.config.batch_ramp import consumed_samples
from deepseek.config.cost import count_parameters, flops_per_token
from deepseek.console import say
from deepseek.data.digests import Verification
from deepseek.data.open_data import OpenedData
from deepseek.frameworks import Trainer
from deepseek.interop.open_weights import fill_start
from deepseek.monitoring.record.alarms import Alarms
from deepseek.monitoring.record.expert_monitor import ExpertMonitor
from deepseek.monitoring.record.metrics_log import MetricsLog
from deepseek.monitoring.record.profile import Profile
from deepseek.monitoring.record.progress import Progress
from deepseek.monitoring.record.rank_monitor import RankMonitor, RecordSchedule
from deepseek.monitoring.record.run_record import Peak, RunRecord, environment
from deepseek.run_folder import CHECKPOINTS, EXPERTS_FILE, METRICS_FILE, MONITOR, PROFILE
from deepseek.training.step import DeepSeekCallback, DeepSeekModel


def callbacks(
    run: RunConfig,
    folder: Path,
    data: OpenedData,
    *,
    resume: bool,
    resume_from: int | None,
    with_changes: bool,
    leads: bool,
    peak: Peak,
    attempt: int,
    loggers: Mapping[str, Callable[[], Any]],
    expected: Forecast | None = None,
) -> list[Any]:
    """In the order in which they act.

    The data come first: on damaged ones nothing more is saved. Then what may end the run, and the
    checkpoint: its restoring decides whether and where the others start. Then those that measure,
    on every rank; then those that write and show, on the one that speaks for all.

    Args:
        run: the configuration.
        folder: of the run.
        data: what it trains on.
        resume: go on from the newest checkpoint.
        resume_from: go on from the checkpoint of this step instead.
        with_changes: although what the run computes changes.
        leads: this is rank 0.
        peak: of one device.
        attempt: how often a launcher has started the run anew.
        loggers: by name, what opens loggers that the trainer does not know.
        expected: of a step, for the record.
    """
    manager = run.exp_manager
    saves = manager.create_checkpoint_callback
    found: list[Any] = [SoundData(data.verification), Stopping(saves, say)]
    if saves:
        params = manager.checkpoint_callback_params
        found.append(
            Checkpointing(
                folder / CHECKPOINTS,
                params,
                asdict(run),
                data.fingerprint,
                resume,
                say,
                resume_from,
                data.verification,
                with_changes,
            )
        )
    else:
        found.append(FolderLock(folder / CHECKPOINTS))
    if run.model.restore_from is not None:
        found.append(StartingWeights(Path(run.model.restore_from)))
    if manager.profile.steps:
        found.append(Profile(folder / PROFILE, manager.profile))
    model, world = run.model, run.trainer.devices * run.trainer.num_nodes
    every = manager.monitor.every_n_steps
    ranks = experts = None
    if every != 0:
        schedule = RecordSchedule(every, world)
        ranks = RankMonitor(folder / MONITOR, schedule, leads, run.trainer.devices)
        experts = ExpertMonitor(folder / MONITOR / EXPERTS_FILE, schedule, leads)
        found += [ranks, experts]
    if not leads:
        return found
    flops = flops_per_token(model, model.data.seq_length, model.num_nextn_predict_layers > 0)
    counts = count_parameters(model)
    parameters = counts.total + counts.mtp
    facts = environment(world, run.trainer.num_nodes)
    facts |= {
        "parameters": parameters,
        "active_parameters": counts.active,
        "trained_parameters": parameters if counts.adapters is None else counts.adapters,
        "data": list(data.parts),
        "flops_per_token": flops,
        "peak_flops_per_device": peak.flops,
        "peak_source": peak.source,
    }
    if expected is not None:
        facts |= {"predicted_seconds": expected.seconds, "predicted_memory_bytes": expected.bytes}
    log = MetricsLog(
        folder / METRICS_FILE,
        flops,
        peak.flops and peak.flops * world,
        attempt=attempt,
        loggers=loggers,
    )
    return [
        *found,
        RunRecord(folder, resolved_yaml(run), data.tokenizer, facts),
        log,
        # With adapters the routers are frozen: their loads are those of the text.
        Alarms(log, experts if model.peft is None else None, ranks, run),
        Progress(
            run.trainer.log_every_n_steps,
            lambda steps: data.epochs(
                consumed_samples(steps, model.global_batch_size, model.rampup_batch_size)
            ),
        ),
    ]


class SoundData(DeepSeekCallback):
    """Ends the run once its data are found to differ from their digests.

    Args:
        verification: goes on beside the training.
    """

    def __init__(self, verification: Verification) -> None:
        self.verification = verification

    def on_train_batch_start(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """No further step, and no checkpoint of the one before."""
        try:
            self.verification.refuse_damage()
        except UserError as error:
            raise UserError(
                f"{error}. {module.finished_steps} steps are trained on these data: begin anew, or "
                "with --resume-from from a step at which they were sound"
            ) from error

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """Leave no thread behind, in a notebook for one."""
        self.verification.stop()


class StartingWeights(DeepSeekCallback):
    """Fills the model with weights that exist; comes after ``Checkpointing``.

    Args:
        source: ``model.restore_from``.
    """

    def __init__(self, source: Path) -> None:
        self.source = source

    def on_fit_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Start the weights, or go on with those of a resumed run."""
        fill_start(module, self.source, say)
