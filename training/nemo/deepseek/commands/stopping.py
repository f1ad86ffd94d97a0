"""The end of a run that is asked for from outside: by a signal, or by closing its output."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from deepseek.checkpoint.ranks import Ranks
from deepseek.console import when_output_closes
from deepseek.frameworks import Trainer
from deepseek.launch.signals import StoppedAtOnce, StopRequests, signal_name
from deepseek.training.step import DeepSeekCallback, DeepSeekModel


class Stopping(DeepSeekCallback):
    """Ends the run between two steps, never inside one; comes before ``Checkpointing``.

    All ranks have one, and all stop after the same step, whichever of them was asked.

    Args:
        saves: the run writes checkpoints.
        report: where messages go; called on rank 0 only.
    """

    def __init__(self, saves: bool, report: Callable[[str], None]) -> None:
        self._does = "saving a checkpoint" if saves else "ending without a checkpoint"
        self._report = report
        self._ranks = Ranks()
        self._requests: StopRequests | None = None

    def on_fit_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Begin to listen."""
        self._requests = StopRequests(lambda number: self._ask(module, number), _insist)
        self._requests.listen()
        when_output_closes(lambda: self._output_closed(module))

    def on_train_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Listen again: Lightning's own handler, set meanwhile, would end a validation half-way."""
        assert self._requests is not None
        self._requests.listen()

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Stop after this step if any rank was asked to."""
        if module.meshes.world is None:
            asked = module.stop_signal is not None
        else:  # all act on what they have agreed on: another may not know of this one's
            asked = module.stop_agreed
        if not asked:
            return
        numbers = self._ranks.together(lambda: module.stop_signal)
        number = next(number for number in numbers if number is not None)
        if module.stop_signal is None and not module.stopping:
            self._tell(f"{signal_name(number)} to another rank: {self._does}, then stopping")
        module.stop_signal = number
        module.stopping = trainer.should_stop = True
        every = trainer.val_check_batch
        if every is None or module.finished_steps % every:
            trainer.limit_val_batches = 0  # Lightning would validate at whatever step it stops

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._release()

    def teardown(self, trainer: Trainer, module: DeepSeekModel, stage: str) -> None:
        """Give the signals back."""
        self._release()

    def _release(self) -> None:
        when_output_closes(None)
        if self._requests is not None:
            self._requests.release()

    def _ask(self, module: DeepSeekModel, number: int) -> None:
        module.stop_signal = number
        if not module.stopping:
            self._tell(
                f"{signal_name(number)}: {self._does} after this step, then stopping (once more to "
                "stop at once)"
            )

    def _output_closed(self, module: DeepSeekModel) -> None:
        """Whoever read it is gone: a terminal, or a program such as ``head``. A run that nobody
        sees any more would hold the machine."""
        assert self._requests is not None
        self._requests.request(getattr(signal, "SIGPIPE", signal.SIGTERM))

    def _tell(self, message: str) -> None:
        if self._ranks.rank == 0:
            with suppress(RuntimeError):  # the signal struck inside a print
                self._report(message)


def _insist(number: int) -> None:
    raise StoppedAtOnce(number, again=True)
