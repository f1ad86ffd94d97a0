"""Chrome traces of chosen steps, with the parts of the model as named regions.

The regions are put around the finished model from outside, and only while a step is profiled: by
hooks on modules, so that it makes no difference whether tensor parallelism or FSDP has replaced or
wrapped them, and by stand-ins for what is no module call (the dispatcher's methods, the loss of the
head). They add no operation to the graph. On a CPU in fp32 a profiled step may differ by last bits,
since layers that else are one node of the graph go module by module.

Open a trace in https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from deepseek.config.schema import ProfileConfig
from deepseek.console import complain, say
from deepseek.frameworks import Trainer
from deepseek.models.components.attention import MultiHeadLatentAttention
from deepseek.models.components.block import DeepSeekBlock
from deepseek.models.components.moe import GroupedExperts, MoE
from deepseek.models.components.router import Router
from deepseek.models.transformer import Head
from deepseek.training.step import DeepSeekCallback, DeepSeekModel

REGIONS = ("attention", "router", "dispatch", "experts", "combine", "head", "optimizer")
"""Named in every trace, each inside the region of its block (``layers.3``); with recomputation they
appear a second time, in the backward pass."""

_OF_MODULE: dict[type[nn.Module], str] = {
    MultiHeadLatentAttention: "attention",
    Router: "router",
    GroupedExperts: "experts",
    Head: "head",
}


class Profile(DeepSeekCallback):
    """Writes ``steps_00000010-00000012.rank0.json.gz`` for each run of consecutive steps.

    Args:
        folder: where the traces go; made when the first is written.
        config: which steps, and what to record.
    """

    def __init__(self, folder: Path, config: ProfileConfig) -> None:
        self.folder = folder
        self.config = config
        self._steps = frozenset(config.steps or ())
        self._profiler: Any = None
        self._regions: Regions | None = None
        self._first = self._last = 0

    def on_train_batch_start(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Start where the coming step is the first of its range."""
        step = module.finished_steps + 1
        if step not in self._steps or self._profiler is not None:
            return
        self._first = step
        self._regions = Regions(module.model, trainer.optimizers)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            with_stack=self.config.with_stack,
            record_shapes=self.config.record_shapes,
            profile_memory=self.config.memory,
        )
        self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Stop and write where the next step is not in the range."""
        self._last = module.finished_steps
        if self._profiler is not None and self._last + 1 not in self._steps:
            self._write(trainer.global_rank)

    def on_train_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Write what was recorded if the run ends inside a range."""
        if self._profiler is not None:
            self._write(trainer.global_rank)

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """The same where it ends by an error: its trace may tell why."""
        self.on_train_end(trainer, module)

    def _write(self, rank: int) -> None:
        """A trace that cannot be written is reported and costs the run nothing."""
        assert self._regions is not None
        self._regions.remove()
        profiler, self._profiler, self._regions = self._profiler, None, None
        profiler.stop()
        last = max(self._first, self._last)
        path = self.folder / f"steps_{self._first:08d}-{last:08d}.rank{rank}.json.gz"
        temporary = self.folder / f".{path.name.removesuffix('.json.gz')}.tmp.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                temporary.unlink()
            complain(f"the trace {path} cannot be written ({error}); training goes on without it")
            return
        say(f"profile      {path}")


class Regions:
    """``record_function`` around the parts of a model, from construction until ``remove``.

    Args:
        model: any layout of it.
        optimizers: the optimisers themselves, not a trainer's wrappers.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self._open: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        for name, module in model.named_modules():
            kind = next((kind for kind in _OF_MODULE if isinstance(module, kind)), None)
            if isinstance(module, DeepSeekBlock):
                self._around_module(module, name)
            elif kind is not None:
                self._around_module(module, _OF_MODULE[kind])
            if isinstance(module, Head):  # the training loss is a method of the head
                self._around_loss(module)
            if isinstance(module, MoE):
                self._around_dispatcher(module)
        for optimizer in optimizers:
            self._around_optimizer(optimizer)

    def remove(self) -> None:
        """Leave the model as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        while self._open:
            self._exit()

    def _enter(self, name: str) -> None:
        region = record_function(name)
        region.__enter__()
        self._open.append(region)

    def _exit(self) -> None:
        # Hooks set while a region is open would close what they did not open.
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def _around_module(self, module: nn.Module, name: str) -> None:
        """Before all other hooks, such as FSDP's gathering, and after all of them.

        ``always_call``: recomputation ends a forward pass early by an exception.
        """
        handles = [
            module.register_forward_pre_hook(lambda *_: self._enter(name), prepend=True),
            module.register_forward_hook(lambda *_: self._exit(), always_call=True),
        ]
        self._undo += [handle.remove for handle in handles]

    def _around_loss(self, head: Head) -> None:
        head.loss_sum = _Named("head", head.loss_sum)  # type: ignore[method-assign]
        self._undo.append(lambda: delattr(head, "loss_sum"))

    def _around_dispatcher(self, moe: MoE) -> None:
        dispatcher = moe.dispatcher
        moe.dispatcher = _NamedDispatcher(dispatcher)

        def undo() -> None:
            moe.dispatcher = dispatcher

        self._undo.append(undo)

    def _around_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        handles = [
            optimizer.register_step_pre_hook(lambda *_: self._enter("optimizer")),
            optimizer.register_step_post_hook(lambda *_: self._exit()),
        ]
        self._undo += [handle.remove for handle in handles]


class _Named:
    """A function whose calls are a region."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with record_function(self.name):
            return self.function(*args, **kwargs)


class _NamedDispatcher:
    """A dispatcher whose two methods are regions; everything else is the real one's."""

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher
        self.dispatch = _Named("dispatch", dispatcher.dispatch)
        self.combine = _Named("combine", dispatcher.combine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dispatcher, name)
