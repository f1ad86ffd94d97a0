"""What ``import deepseek`` can do, for notebooks and scripts: train, sample, open data.

Each is the command of the same name without its printing; the classes that ``deepseek`` exports
beside them are the product's own (``docs/python.md``).
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deepseek.commands.auto_layout import auto_layout
from deepseek.commands.generate import Prompt, Writer, sampling_for
from deepseek.commands.train import train_run
from deepseek.config import RunConfig, UserError, load_config, resolved_yaml
from deepseek.data import open_data as data
from deepseek.interop.open_weights import OpenedCheckpoint, open_checkpoint
from deepseek.launch.signals import StoppedAtOnce


def train(
    run: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume_from: int | None = None,
    resume_with_changes: bool = False,
) -> Path:
    """Train, or continue, one run; what ``deepseek train`` does.

    Args:
        run: a configuration, or the name or file of one.
        overrides: ``a.b=c``, with a name or file.
        run_dir: the run folder, instead of one under ``exp_manager.exp_dir``.
        resume_from: go on from the checkpoint of this step, not from the newest.
        resume_with_changes: go on although settings differ that change what the run computes.

    Returns:
        The run folder, for ``open_checkpoint`` and ``read_run``.

    Raises:
        ConfigError: every problem of the configuration at once.
        UserError: anything else the user can mend; one of several processes failed.
        KeyboardInterrupt: Ctrl-C; the run is saved. After another signal N it is a SystemExit with
            code 128 + N.
    """
    if isinstance(run, RunConfig) and overrides:
        raise UserError(
            f"overrides={list(overrides)} would be ignored beside a RunConfig; give them to "
            "load_config"
        )
    folder = None if run_dir is None else Path(run_dir)
    config = run if isinstance(run, RunConfig) else load_config(run, overrides, auto_layout(folder))
    with tempfile.TemporaryDirectory() as scratch:
        # Several processes are started from a file, as a notebook's own program cannot be.
        file = Path(scratch) / "config.yaml"
        file.write_text(resolved_yaml(config))
        command = [sys.executable, "-m", "deepseek", "train", "--config", str(file)]
        command += ["--resume-from", str(resume_from)] * (resume_from is not None)
        command += ["--resume-with-changes"] * resume_with_changes
        try:
            return train_run(
                config,
                folder,
                command,
                resume_from=resume_from,
                with_changes=resume_with_changes,
            )
        except StoppedAtOnce as stop:
            if stop.number != signal.SIGINT:
                sys.exit(128 + stop.number)
            raise
        except SystemExit as end:
            if end.code == 128 + signal.SIGINT:  # the run is saved, and the program is to stop
                raise KeyboardInterrupt from end
            if isinstance(end.code, int) and end.code > 128:
                raise
            raise UserError(
                f"the processes of the run ended with code {end.code}; their messages are above"
            ) from end


def generate(
    checkpoint: OpenedCheckpoint | str | Path,
    prompts: Sequence[str],
    max_new_tokens: int = 200,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Continue prompts; what ``deepseek generate`` does.

    Args:
        checkpoint: an opened one, or what ``open_checkpoint`` takes.
        prompts: texts of any lengths; "" starts a document.
        max_new_tokens: per prompt.
        temperature: 0 for the most probable token each time; None, here and below: what
            ``generation_config.json`` beside the tokenizer says, else 0.8, 0 and 0.95.
        top_k: keep the k most probable tokens; 0: all.
        top_p: keep the smallest set of tokens whose probability reaches p.
        seed: of the draws.
        stop: texts before which a continuation ends.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: no sound checkpoint, no tokenizer beside it, a prompt that does not fit.
    """
    if not isinstance(checkpoint, OpenedCheckpoint):
        checkpoint = open_checkpoint(Path(checkpoint))
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"{checkpoint.path} has no tokenizer beside it; give a run folder, or decode ids "
            "yourself with deepseek.inference"
        )
    sampling = sampling_for(tokenizer, temperature, top_k, top_p)
    writer = Writer(checkpoint.model(), tokenizer, sampling, max_new_tokens, seed, stop)
    ids = [writer.ids_of(Prompt(text, f"prompt {row}")) for row, text in enumerate(prompts)]
    return [answer.text for answer in writer.answers(ids)]


def open_data(run: RunConfig) -> data.OpenedData:
    """The training and validation data of a run; the built-in corpus is prepared if need be.

    Args:
        run: the configuration; ``model.data`` and ``seed`` decide.

    Returns:
        ``train`` and ``validation`` index like lists: sample ``i`` holds ``tokens``, ``labels`` and
        what belongs to them, int64 [S].

    Raises:
        UserError: files missing or damaged, ids or tokenizer larger than ``model.vocab_size``.
    """
    return data.open_data(run.model, run.seed)
