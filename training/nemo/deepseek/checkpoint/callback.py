"""Saves and resumes: the same way with NeMo and without."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.manifest import complete_steps
from deepseek.checkpoint.ranks import Ranks
from deepseek.checkpoint.training_state import Base, collect_tensors, restore, run_state
from deepseek.config.batch_ramp import consumed_samples
from deepseek.config.changes import (
    FIXED,
    HARMLESS,
    SAMPLES,
    changed_settings,
    flatten,
    with_new_keys,
)
from deepseek.config.errors import UserError
from deepseek.config.load import stored_config
from deepseek.config.memory import checkpoint_bytes
from deepseek.config.schema import CheckpointConfig, RunConfig
from deepseek.data.digests import Verification
from deepseek.files import disk_errors, megabytes, require_room
from deepseek.frameworks import Trainer
from deepseek.locks import LOCK, Lock
from deepseek.run_folder import CONFIG_FILE
from deepseek.training.optim import learning_rate
from deepseek.training.phases import measured_memory
from deepseek.training.step import DeepSeekCallback, DeepSeekModel, NonFiniteError, SaveRecord


class Checkpointing(DeepSeekCallback):
    """Restores before the first step; saves every so many steps, and at the end.

    Args:
        folder: the run's checkpoint folder.
        params: ``exp_manager.checkpoint_callback_params``.
        config: the resolved configuration, stored with each checkpoint.
        fingerprint: what identifies the data and the tokenizer; a resumed run must have the same.
        resume: continue from the newest sound checkpoint, if there is one.
        resume_from: continue from the checkpoint of this step, and set later ones aside.
        report: where messages go; called on rank 0 only.
        verification: knows the digests of the data's files, which go into the checkpoints, and
            compares them with those of the one resumed from.
        with_changes: go on although settings differ that change what the run computes.
    """

    def __init__(
        self,
        folder: Path,
        params: CheckpointConfig,
        config: dict[str, Any],
        fingerprint: str,
        resume: bool,
        report: Callable[[str], None],
        resume_from: int | None = None,
        verification: Verification | None = None,
        with_changes: bool = False,
    ) -> None:
        self.folder = folder
        self.verification = verification
        self.keep = params.save_top_k
        self._manager: CheckpointManager | None = None
        self.every_n_steps = params.every_n_train_steps
        self.in_background = params.async_save
        self.config = config
        self.fingerprint = fingerprint
        self.resume = resume
        self.resume_from = resume_from
        self.with_changes = with_changes
        self._report = report
        self._ranks = Ranks()
        self._saved_step = -1
        self._to_retire = True  # what a killed run left behind

    @property
    def manager(self) -> CheckpointManager:
        """The folder's writer; only one at a time may have it."""
        if self._manager is None:
            self._manager = CheckpointManager(self.folder, keep=self.keep)
        return self._manager

    def report(self, message: str) -> None:
        """One message for all ranks."""
        if self._ranks.rank == 0:
            self._report(message)

    def on_fit_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Resume."""
        if self.resume:
            self._resume(trainer, module)
        elif self.manager.steps():
            raise UserError(
                f"{self.folder} already holds checkpoints and "
                "exp_manager.resume_if_exists=false; use another --run-dir or name, "
                "or set exp_manager.resume_if_exists=true"
            )
        self._ranks.lead(lambda: self._require_room(module))

    def on_train_batch_start(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Save the step before, if it is due.

        A checkpoint takes the place of older ones once a finite step has started from it: until
        then those may be the only ones whose weights are good.

        Only now are its row and its validation in the log: a run killed between them and the
        checkpoint repeats both, where the other order would lose them.
        """
        step = module.finished_steps
        self._retire(module)
        if step > 0 and self.every_n_steps > 0 and step % self.every_n_steps == 0:
            self._save(trainer, module, self.in_background)

    def on_validation_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Save first if the run is to stop: the validation may outlast what time is left."""
        if module.stopping:
            self._save(trainer, module)

    def on_train_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """The last step is always kept; only at the end of a run does it need no proof."""
        self._save(trainer, module)
        is_complete = module.finished_steps >= module.max_steps
        if is_complete and module.skipped_in_a_row == 0 and self._ranks.rank == 0:
            self.manager.retire()

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """Give the folder back; the exception itself must not be hidden by another."""
        try:
            if isinstance(exception, NonFiniteError) and self._manager is not None:
                self._say_way_back(module)
            self._release()
        except UserError as failure:
            self.report(str(failure))

    def teardown(self, trainer: Trainer, module: DeepSeekModel, stage: str) -> None:
        """Give the folder back."""
        self._release()

    def _release(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def _save(self, trainer: Trainer, module: DeepSeekModel, in_background: bool = False) -> None:
        """Make sure that this step is saved, or, in the background, that it is being saved."""
        begin, step = time.perf_counter(), module.finished_steps
        module.meshes.expect_steps(False)
        saves = self._saved_step != step
        device = next(module.model.parameters()).device
        with measured_memory(device) as memory:
            if saves:
                # A save that takes longer than the steps to the next one is done only now.
                self.manager.wait()
                self._retire(module)
                tensors = collect_tensors(module.model, _optimizer(trainer))
                known = self.verification.digests if self.verification else ()
                state = run_state(module, self.config, self.fingerprint, known)
                save = self.manager.save_in_background if in_background else self.manager.save
                save(step, tensors, state, retire=False)
                self._saved_step, self._to_retire = step, True
            if not in_background:
                self.manager.wait()
        if saves:  # a repeated call must not shorten the time of the first
            module.save_record = SaveRecord(step, time.perf_counter() - begin, memory[0])

    def _retire(self, module: DeepSeekModel) -> None:
        is_proven = module.finished_steps > self._saved_step and module.skipped_in_a_row == 0
        if self._to_retire and is_proven and self._ranks.rank == 0:
            self._to_retire = not self.manager.retire()

    def _require_room(self, module: DeepSeekModel) -> None:
        """Better now than after hours: room for the checkpoints that will lie there at one time.

        The newest is whole before the oldest goes, so that is one more than are kept.
        """
        left = module.max_steps - module.finished_steps
        written = math.ceil(left / self.every_n_steps) if self.every_n_steps > 0 else min(left, 1)
        more = written
        if self.keep >= 0:
            more = min(written, max(self.keep + 1 - len(complete_steps(self.folder)), 1))
        size = checkpoint_bytes(module.config, module.config.optim.name)
        with disk_errors(f"looking for room in {self.folder}"):
            require_room(
                self.folder,
                more * size,
                f"a run with {more} more checkpoints of {megabytes(size)} at one time",
                "keep fewer (exp_manager.checkpoint_callback_params.save_top_k)",
            )

    def _resume(self, trainer: Trainer, module: DeepSeekModel) -> None:
        if self.resume_from is not None:
            checkpoint = self.manager.at(self.resume_from)
        elif (newest := self.manager.newest_sound(self.report)) is not None:
            checkpoint = newest
        else:
            return
        state = checkpoint.state()
        self._ranks.together(lambda: self._check_same_run(state, checkpoint.path))
        restore(checkpoint, module.model, _optimizer(trainer))
        module.base = Base(**state["base"]) if "base" in state else None
        module.finished_steps = self._saved_step = int(state["step"])
        module.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        continue_loops(trainer, module.finished_steps)
        if self.resume_from is not None:
            for path in self.manager.set_aside_after(self.resume_from):
                self.report(f"set aside: a later checkpoint is now {path}; delete it at will")
        self.report(f"resumed from {checkpoint.path} at step {module.finished_steps}")

    def _say_way_back(self, module: DeepSeekModel) -> None:
        last = module.finished_steps - module.skipped_in_a_row
        # No collective: this may be one rank's own end.
        steps = [step for step in complete_steps(self.folder) if step <= last]
        if steps:
            sound = [step for step in steps if step < last] or steps  # a step started from them
            self.report(
                f"checkpoints from before the first skipped step, {last + 1}: "
                f"{', '.join(map(str, steps))}; the newest may hold the weights that failed. "
                f"--run-dir {self.folder.parent} --resume-from {sound[-1]} goes on from one of "
                "them, with --resume-with-changes if you give other settings"
            )

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        """What would change the model is refused, what would change its training asked for."""
        if "imported" in state:
            raise UserError(
                f"{path} holds imported weights and is no run to be continued; start from it with "
                f"model.restore_from={path.parent.parent} and another run folder"
            )
        step, now = int(state["step"]), flatten(self.config)
        before = with_new_keys(flatten(state["config"]), now)
        changes = changed_settings(before, now)
        if fixed := [text for key, text in changes.items() if key in FIXED]:
            raise UserError(
                f"{path} cannot be continued, since this configuration differs: "
                f"{', '.join(fixed)}; set it back (--config {path.parent.parent / CONFIG_FILE} is "
                "the run's own), or start a new run (another name, or another --run-dir)"
            )
        asked = [text for key, text in changes.items() if not HARMLESS.fullmatch(key)]
        other_data = state["data"] != self.fingerprint
        if other_data and not SAMPLES & changes.keys():  # these are in the fingerprint too
            asked.append("it was trained on other data than this configuration opens")
        moved = {"trainer.max_steps", "model.optim.sched.max_steps"} & changes.keys()
        rates = self._moved_rates(stored_config(state["config"]), step) if moved else None
        more_steps = now.get("trainer.max_steps", 0) > before.get("trainer.max_steps", 0)
        if rates and not (more_steps and moved == {"trainer.max_steps"}):
            asked += [changes[key] for key in sorted(moved)]
        if asked and not self.with_changes:
            raise UserError(
                f"{path} is not simply continued, since this run would be another: "
                f"{', '.join(asked)}; add --resume-with-changes if that is meant, set it back, or "
                "start a new run (another name, or another --run-dir)"
            )
        if not other_data and self.verification is not None:
            self.verification.expect(state.get("data_sha256", ()))
        for key, text in changes.items():
            if not key.startswith(("exp_manager.", "name")):
                self.report(f"changed since the checkpoint: {text}")
        if other_data or SAMPLES & changes.keys():
            model = stored_config(self.config).model
            first = consumed_samples(step, model.global_batch_size, model.rampup_batch_size) + 1
            self.report(
                f"changed since the checkpoint: the samples; step {step + 1} takes sample "
                f"{first:,} and those after it, in the order of the data as they are "
                "now: some may come again, and others never"
            )
        if rates:
            keeps = f"; model.optim.sched.max_steps={before['trainer.max_steps']} keeps the old one"
            self.report(
                f"the schedule moves: the learning rate of step {step + 1} is {rates[1]:.3g} "
                f"instead of {rates[0]:.3g}{keeps if moved == {'trainer.max_steps'} else ''}"
            )

    def _moved_rates(self, before: RunConfig, step: int) -> tuple[float, float] | None:
        """Learning rates of the next step, then and now; None if the schedule stays as it was."""
        now = stored_config(self.config)
        steps = range(step, now.trainer.max_steps, 1 + now.trainer.max_steps // 1000)

        def rates(run: RunConfig, peak: float) -> list[float]:
            sched, length = run.model.optim.sched, run.trainer.max_steps
            return [learning_rate(at, peak, sched, length) for at in steps]

        peak = before.model.optim.lr
        if rates(before, peak) == rates(now, peak):
            return None
        return rates(before, peak)[0], rates(now, now.model.optim.lr)[0]


class FolderLock(DeepSeekCallback):
    """Keeps other writers out of a run that writes no checkpoints.

    Args:
        folder: where its checkpoints would be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Lock | None = None

    def on_fit_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Take it. Raises ``UserError`` on all ranks if another process has it."""
        Ranks().lead(self._take)

    def _take(self) -> None:
        with disk_errors(f"locking {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.folder / LOCK)

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """Let the next one in."""
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: Trainer, module: DeepSeekModel, stage: str) -> None:
        """Let the next one in."""
        if self._lock is not None:
            self._lock.release()


def continue_loops(trainer: Trainer, step: int) -> None:
    """Tell Lightning's loops that ``step`` batches are done.

    Lightning's own loop state is not stored: it is a function of the step, and storing it would
    tie a checkpoint to one version and one layout. Its loader holds the remaining steps only, so
    nothing restarts in the middle of an epoch; the totals keep ``trainer.global_step`` and the
    validation interval counting from the start of the run.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    for total in (
        epoch_loop.batch_progress.total,
        epoch_loop.manual_optimization.optim_step_progress.total,
    ):
        total.ready = total.completed = step


def _optimizer(trainer: Trainer) -> Any:
    return trainer.optimizers[0]
