"""``deepseek train``: from a configuration to a trained run folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from deepseek.commands.auto_layout import auto_layout, settings_of
from deepseek.commands.generate import generate_text
from deepseek.commands.report import report as write_report
from deepseek.commands.versions import (
    RUN_FOLDER,
    finished_steps,
    has_gone_back,
    made_folder,
    other_settings,
    run_folder,
    start_going_back,
)
from deepseek.config import RunConfig, UserError, load_config
from deepseek.console import complain, say
from deepseek.files import disk_errors
from deepseek.launch.processes import Processes, check_world, leave, quiet
from deepseek.launch.signals import stopped_at_once
from deepseek.launch.supervisor import supervise, worker_command, worker_threads
from deepseek.run_folder import CONFIG_FILE, SAMPLES_FILE, TOKENIZER

SAMPLE_TOKENS = 160


def train(
    config: str,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    sample: bool = False,
    report: bool = False,
    resume_from: int | None = None,
    with_changes: bool = False,
) -> None:
    """Train, or continue, one run.

    With several processes on this machine and no launcher, this process starts them, watches them,
    starts them anew if one is lost, and exits with their code.

    Args:
        config: name of a shipped configuration, or a YAML file.
        overrides: ``a.b=c``.
        run_dir: the run folder, instead of one under ``exp_manager.exp_dir``.
        sample: print a generated sample at the end.
        report: write the run's report at the end.
        resume_from: go on from the checkpoint of this step, not from the newest.
        with_changes: go on although settings differ that change what the run computes.

    Raises:
        ConfigError: every problem of the configuration at once.
        UserError: anything else the user can mend.
    """
    quiet(Processes.from_environment())
    chosen: dict[str, object] = {}

    def choose(run: RunConfig, auto: Sequence[str]) -> Mapping[str, object]:
        chosen.update(auto_layout(run_dir)(run, auto))
        return chosen

    run = load_config(config, overrides, choose)
    command = None
    if chosen and run.trainer.devices > 1:  # its processes are not to choose once more
        command = [*worker_command(), *settings_of(chosen)]
    train_run(run, run_dir, command, sample, report, resume_from, with_changes)


def train_run(
    run: RunConfig,
    run_dir: Path | None,
    command: Sequence[str] | None,
    sample: bool = False,
    report: bool = False,
    resume_from: int | None = None,
    with_changes: bool = False,
) -> Path:
    """Train, or continue, the run of a checked configuration.

    Args:
        run: the configuration.
        run_dir: the run folder, instead of one under ``exp_manager.exp_dir``.
        command: what each of several processes is started with; None: as this one was.
        sample: print a generated sample at the end.
        report: write the run's report at the end.
        resume_from: go on from the checkpoint of this step, not from the newest.
        with_changes: go on although settings differ that change what the run computes.

    Returns:
        The run folder.

    Raises:
        UserError: what the user can mend.
        SystemExit: 128 + N after signal N, the run saved; or the processes that were started
            failed, with their code.
    """
    processes = Processes.from_environment()
    if resume_from is not None:
        _check_resume_from(resume_from, run, run_dir)
    if with_changes:
        _refuse_without_checkpoints("--resume-with-changes", run)
    if report:  # what it needs is missed now, not when the run is over
        from deepseek.monitoring.report.page import plotly_script

        plotly_script()
    if processes.started_by == "none" and run.trainer.devices > 1 and run.trainer.num_nodes == 1:
        return _train_in_others(run, run_dir, command, sample, report, resume_from)
    check_world(processes, run.trainer.devices, run.trainer.num_nodes)
    # Several processes may be in a collective, which no handler would interrupt: they just end.
    with stopped_at_once() if processes.world_size == 1 else nullcontext():
        return _train_here(run, run_dir, processes, sample, report, resume_from, with_changes)


def _train_here(
    run: RunConfig,
    run_dir: Path | None,
    processes: Processes,
    sample: bool,
    report: bool,
    resume_from: int | None,
    with_changes: bool,
) -> Path:
    """Train in this process, and do what comes after."""
    # Imported here: a configuration error should not wait seconds for a training framework.
    from deepseek.commands.fit import fit

    result = fit(run, run_dir, processes, resume_from, with_changes)
    folder, steps = result.folder, run.trainer.max_steps
    if result.was_complete:
        leave()
        _say_complete(folder, run, sample, report, leads=processes.rank == 0)
        return folder
    if result.val_loss is not None:
        bits = result.val_bits_per_byte
        per_byte = f", {bits:.4f} bits per byte" if bits is not None else ""
        say(f"validation   loss {result.val_loss:.4f}{per_byte}")
    say(f"run folder   {folder}")
    leave()  # what follows is for one process
    if processes.rank == 0 and result.finished_steps == steps:
        _keep_nemo(folder, run)
    if result.finished_steps < steps:
        say(
            f"stopped at step {result.finished_steps} of {steps}; "
            + (
                "run the same command again to go on"
                if run.exp_manager.create_checkpoint_callback
                else "nothing is saved, as exp_manager.create_checkpoint_callback=false"
            )
        )
    elif processes.rank == 0:
        _show(folder, sample, report)
    if result.stop_signal is not None:  # so that a loop of a shell, or a sweep, stops as well
        sys.exit(128 + result.stop_signal)
    return folder


def _show(folder: Path, sample: bool, report: bool) -> None:
    """What a complete run has come to: of its model and of its log."""
    if (folder / TOKENIZER).is_dir() and finished_steps(folder):  # else nothing to sample from
        if sample:
            say("sample:")
            (text,) = generate_text(folder, [""], max_new_tokens=SAMPLE_TOKENS)
            _keep_sample(folder / SAMPLES_FILE, finished_steps(folder), text)
        else:
            say(f"sample it    deepseek generate {folder}")
    if report:
        write_report([folder])


def _keep_sample(path: Path, step: int, text: str) -> None:
    """For the report; the same sample of the same step is kept once."""
    row = json.dumps({"step": step, "prompt": "", "text": text}) + "\n"
    with disk_errors(f"writing {path}"), open(path, "a+") as file:
        file.seek(0)
        if row not in file.readlines():
            file.write(row)


def _check_resume_from(step: int, run: RunConfig, run_dir: Path | None) -> None:
    if run_dir is None:
        raise UserError(f"--resume-from {step}: say of which run, with --run-dir DIR")
    _refuse_without_checkpoints(f"--resume-from {step}", run)
    if step >= run.trainer.max_steps:
        raise UserError(
            f"--resume-from {step}: there is nothing left to train up to "
            f"trainer.max_steps={run.trainer.max_steps}; raise it, or give an earlier step"
        )


def _refuse_without_checkpoints(option: str, run: RunConfig) -> None:
    if not run.exp_manager.create_checkpoint_callback:
        raise UserError(
            f"{option} needs checkpoints; exp_manager.create_checkpoint_callback=false turns them "
            "off"
        )


def _train_in_others(
    run: RunConfig,
    run_dir: Path | None,
    command: Sequence[str] | None,
    sample: bool,
    report: bool,
    resume_from: int | None,
) -> Path:
    """Be the supervisor of the processes that train."""
    folder, trainer = run_folder(run, run_dir), run.trainer
    complete = finished_steps(folder) >= trainer.max_steps
    if run.exp_manager.resume_if_exists and resume_from is None and complete:
        _say_complete(folder, run, sample, report, leads=True)
        return folder
    threads = trainer.num_threads or worker_threads(trainer.devices)
    say(
        f"processes    {trainer.devices}, started and watched by this one; "
        f"threads of each: {threads}"
    )
    os.environ[RUN_FOLDER] = str(folder)
    try:
        with made_folder(folder):
            if resume_from is not None:
                start_going_back(folder)
            code = supervise(
                command or worker_command(),
                trainer.devices,
                trainer.max_restarts,
                complain,
                lambda: finished_steps(folder),
                lambda: (
                    (resume_from is None or has_gone_back(folder))
                    and finished_steps(folder) >= trainer.max_steps
                ),
                lambda: _say_complete(folder, run, sample, report, leads=True),
            )
            if code:
                sys.exit(code)
    finally:
        del os.environ[RUN_FOLDER]  # of these processes alone: a notebook may train again
    return folder


def _keep_nemo(folder: Path, run: RunConfig) -> None:
    if run.exp_manager.checkpoint_callback_params.save_nemo_on_train_end:
        from deepseek.commands.convert import keep_nemo

        keep_nemo(folder, run.name)


def _say_complete(folder: Path, run: RunConfig, sample: bool, report: bool, leads: bool) -> None:
    say(
        f"{folder} is complete: {finished_steps(folder)} of {run.trainer.max_steps} steps. "
        "To go on, raise trainer.max_steps; to start again, use another --run-dir"
    )
    if others := other_settings(folder, run):
        more = f", and {len(others) - 5} more" if len(others) > 5 else ""
        say(
            f"note         it was trained with other settings: {', '.join(others[:5])}{more}; its "
            f"own are in --config {folder / CONFIG_FILE}"
        )
    if leads:  # what was asked for, also if the run was killed while it wrote these
        _keep_nemo(folder, run)
        _show(folder, sample, report)
