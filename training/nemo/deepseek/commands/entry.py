"""What a command line says, and how a command ends; the entry points of the two scripts.

The scripts parse with the standard library alone, so that PyTorch Lightning is enough to test
and to train. The full command line is ``cli.py``.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.console import complain, complain_at_the_end

_DEAD_LOADER = re.compile(r"DataLoader worker \(pid.*?\)[^.]*")
"""What torch says of it."""


def guarded(call: Callable[[], object]) -> None:
    """Run; what the user can mend is a message and exit code 2, never a traceback."""
    try:
        call()
    except UserError as error:
        complain_at_the_end(f"error: {error}")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit, BrokenPipeError) as end:
        why = _reason(end)
        if isinstance(why, KeyboardInterrupt):
            complain_at_the_end("interrupted", by_first_alone=True)
            sys.exit(128 + getattr(why, "number", signal.SIGINT))
        if isinstance(why, BrokenPipeError):  # the reader of a pipe (`| head`) went away
            _drop_output()
            sys.exit(141)
        raise
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _drop_output()
        where = failure.filename or "standard output, or a file of this command"
        complain_at_the_end(f"error: cannot write {where}: {failure.strerror}")
        sys.exit(2)
    except RuntimeError as error:
        from deepseek.launch.processes import LOST_PEER_EXIT_CODE, is_lost_peer, tell_lost_contact

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
        tell_lost_contact(error)
        sys.exit(LOST_PEER_EXIT_CODE)


def _drop_output() -> None:
    """What is flushed at the very end goes nowhere."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _reason(end: BaseException) -> BaseException | None:
    """What ended the program: typer makes an exit with 130 of any interruption, and one with 1 of a
    closed output."""
    found: BaseException | None = end
    if not isinstance(end, SystemExit) or end.code in (1, 130):
        while found is not None and not isinstance(found, (KeyboardInterrupt, BrokenPipeError)):
            found = found.__cause__ or found.__context__
    return found


def overrides_of(words: Sequence[str]) -> list[str]:
    """The words that are not options: settings ``a.b=c``, also written ``--a.b=c``.

    Raises:
        UserError: an option that does not exist.
    """
    return [no_option(word) for word in words]


def chosen(
    words: Sequence[str], option: str | None, default: str | None = None, then: str = ""
) -> tuple[str, list[str]]:
    """The configuration, given bare as the first word or by ``--config``, and the other words.

    Args:
        words: the words that are not options.
        option: of ``--config``.
        default: the configuration if none is given; None: one must be.
        then: what the next word is, if it is no setting.

    Raises:
        UserError: an option that does not exist, no configuration, two, or no next word.
    """
    left = overrides_of(words)
    if option is None and left and (then or _is_name(left[0])):
        option, *left = left
    elif option is not None and left and not then and _is_name(left[0]):
        raise UserError(f"--config {option} and {left[0]}: give one configuration")
    name = option or default
    if name is None:
        raise UserError(
            "give a configuration, NAME or --config NAME: a YAML file or one of `deepseek ls`"
        )
    if then and not left:
        raise UserError(f"give {then} after the configuration")
    return name, left


def _is_name(word: str) -> bool:
    """Of a configuration, not a setting; a key without a value is half a setting."""
    from deepseek.config.schema import FIELDS

    return Path(word).is_file() or ("=" not in word and word not in FIELDS)


def no_option(word: str) -> str:
    """``word``, unless it is an option: one that exists would not have been left over.

    Raises:
        UserError: an option that does not exist.
    """
    if word.startswith("-") and "=" not in word:
        raise UserError(f"there is no option {word}; --help lists them, a setting is a.b=c")
    return word


def refuse_words(words: Sequence[str]) -> None:
    """Raise ``UserError`` for words where none is expected."""
    if words:
        raise UserError(f"{' '.join(words)}: one configuration is taken here, and no settings")


def refuse_idle(given: Mapping[str, bool], why: str) -> None:
    """Raise ``UserError`` for the first option that is given and would be ignored."""
    for option, is_given in given.items():
        if is_given:
            raise UserError(f"{option} would be ignored {why}; leave it out")


def train_entry(argv: Sequence[str] | None = None) -> None:
    """``train_deepseek.py [--config] NAME [--run-dir DIR] [a.b=c ...]``."""
    parser = argparse.ArgumentParser(description="Train, or continue, a run.", allow_abbrev=False)
    parser.add_argument("--config", help="shipped name or YAML file; none: deepseek_v3_base")
    parser.add_argument("--run-dir", type=Path, help="the run folder itself")
    parser.add_argument("--sample", action="store_true", help="print a sample at the end")
    parser.add_argument("--report", action="store_true", help="write the report at the end")
    parser.add_argument("--resume-from", type=int, help="go back to the checkpoint of this step")
    parser.add_argument(
        "--resume-with-changes",
        action="store_true",
        help="go on although what the run computes changes",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override")
    options, more = parser.parse_known_args(argv)  # `--a.b=c` is an override too

    def call() -> None:
        from deepseek.commands.train import train

        words = [*options.overrides, *more]
        name, overrides = chosen(words, options.config, "deepseek_v3_base")
        train(
            name,
            overrides,
            options.run_dir,
            options.sample,
            options.report,
            options.resume_from,
            options.resume_with_changes,
        )

    guarded(call)


def test_entry(argv: Sequence[str] | None = None) -> None:
    """``test_model.py [[--config] NAME]``."""
    parser = argparse.ArgumentParser(description="Check the model.", allow_abbrev=False)
    parser.add_argument("--config", help="take the model's kind from this configuration")
    parser.add_argument("name", nargs="*", help="the same without --config")
    options = parser.parse_args(argv)

    def call() -> None:
        from deepseek.commands.check import test_model

        config, words = chosen(options.name, options.config, "deepseek_v3_tiny")
        refuse_words(words)
        sys.exit(0 if test_model(config) else 1)

    guarded(call)
