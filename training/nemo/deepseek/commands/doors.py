"""Doors for the scripts: they parse with the standard library alone, so that PyTorch Lightning and
OmegaConf are enough to test and to train. The full command line is ``cli.py``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.console import complain
from deepseek.launch.processes import LOST_PEER_EXIT_CODE, is_lost_peer

_DEAD_LOADER = re.compile(r"DataLoader worker \(pid.*?\)[^.]*")
"""What torch says of it."""


def guarded(call: Callable[[], object]) -> None:
    """Run; what the user can mend is a message and exit code 2, never a traceback."""
    try:
        call()
    except UserError as error:
        complain(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except RuntimeError as error:
        if died := _DEAD_LOADER.search(str(error)):
            # Not the user's error as such: a supervisor starts all again.
            complain(
                f"error: a process that loads data died ({died[0]}); mostly memory ran out: watch "
                "it, or do without (model.data.num_workers=0). The same command goes on from the "
                "newest checkpoint"
            )
            sys.exit(1)
        if not is_lost_peer(error):
            raise
        complain("error: contact lost with another rank, which ended or cannot be reached")
        sys.exit(LOST_PEER_EXIT_CODE)
    except BrokenPipeError:  # the reader of a pipe (`| head`) went away
        sys.stderr.close()
        sys.exit(141)


def overrides_of(words: Sequence[str]) -> list[str]:
    """The words that are not options: settings ``a.b=c``, also written ``--a.b=c``.

    Raises:
        UserError: an option that does not exist.
    """
    return [no_option(word) for word in words]


def no_option(word: str) -> str:
    """``word``, unless it is an option: one that exists would not have been left over.

    Raises:
        UserError: an option that does not exist.
    """
    if word.startswith("-") and "=" not in word:
        raise UserError(f"there is no option {word}; --help lists them, a setting is a.b=c")
    return word


def refuse_idle(given: Mapping[str, bool], why: str) -> None:
    """Raise ``UserError`` for the first option that is given and would be ignored."""
    for option, is_given in given.items():
        if is_given:
            raise UserError(f"{option} would be ignored {why}; leave it out")


def train_door(argv: Sequence[str] | None = None) -> None:
    """``train_deepseek.py --config NAME [--run-dir DIR] [a.b=c ...]``."""
    parser = argparse.ArgumentParser(description="Train, or continue, a run.", allow_abbrev=False)
    parser.add_argument("--config", default="deepseek_v3_base", help="shipped name or YAML file")
    parser.add_argument("--run-dir", type=Path, help="the run folder itself")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override")
    options, more = parser.parse_known_args(argv)  # `--a.b=c` is an override too

    def call() -> None:
        from deepseek.commands.train import train

        overrides = overrides_of([*options.overrides, *more])
        train(options.config, overrides, options.run_dir)

    guarded(call)


def test_door(argv: Sequence[str] | None = None) -> None:
    """``test_model.py [--config NAME]``."""
    parser = argparse.ArgumentParser(description="Check the model.", allow_abbrev=False)
    parser.add_argument("--config", help="take the model's kind from this configuration")
    options = parser.parse_args(argv)

    def call() -> None:
        from deepseek.commands.check import test_model

        sys.exit(0 if test_model(options.config) else 1)

    guarded(call)
