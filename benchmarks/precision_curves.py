"""What fewer bits do to a loss curve: pairs of runs that differ in their precision alone.

    python benchmarks/precision_curves.py FOLDER --sides bf16 fp8 again --pairs 8
    python benchmarks/precision_curves.py FOLDER --sides fp32 bf16 again --pairs 8
    python benchmarks/precision_curves.py FOLDER --small --branch 800 --trunks 3 --pairs 15

Training is chaotic: a last bit that differs comes to some percent of the loss of single steps, so
that one pair of runs says nothing. Here each pair has a seed of its own, which gives its start
weights and its data; all its runs begin alike and read the same batches. ``again`` is the null: the
first side once more, its start weights times 1 + 2^-20. What a precision does to the loss is a mean
over pairs that lies further from zero than its standard error, and than the null's.

Runs that have gone their own ways for a thousand steps differ by a percent whatever they compute.
With ``--branch`` all runs of a pair go on from one run of the first side, its optimiser included,
for ``--length`` steps, too few to part by chance. Pairs beyond ``--trunks`` share such a run with
others, and have data of their own from there.

Every run leaves a file in FOLDER, which is for runs of the same settings. The command goes on with
those that are missing, may run several times side by side, and prints means over the pairs that are
complete: of the training loss in each window of steps, and of the validation loss at the end, in
percent of the first side's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from deepseek.commands.entry import guarded
from deepseek.config import load_config
from deepseek.config.schema import RunConfig
from deepseek.data.loader import build_train_loader, build_validation_loader
from deepseek.data.open_data import open_data
from deepseek.files import atomic_open
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.training.step import DeepSeekModel

SMALL = """
    model.hidden_size=128 model.num_hidden_layers=3 model.num_attention_heads=4
    model.intermediate_size=384 model.moe_intermediate_size=128 model.n_routed_experts=8
    model.num_experts_per_tok=2 model.num_nextn_predict_layers=0 model.vocab_size=512
    model.tokenizer.vocab_size=262 model.data.seq_length=128 trainer.max_steps=1000
    trainer.limit_val_batches=40
""".split()
"""Of ``--small``: 4 sequences of 128 bytes a step, which takes 45 ms in fp32."""
PRECISIONS = ("fp32", "bf16", "fp8")
AGAIN = "again"
DISTURBED = 1 + 2**-20


@dataclass(frozen=True)
class Curve:
    """One run."""

    losses: list[float]
    """Of the main task, of every step."""
    val_loss: float
    cpu_seconds: float


@dataclass(frozen=True)
class Plan:
    """What the runs of a folder have in common."""

    folder: Path
    run: RunConfig
    branch: int
    """Steps before the runs of a pair part."""
    end: int
    trunks: int
    first: str
    """Side that the others are compared with."""


def main() -> None:
    """Run what is missing, then tell the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="deepseek_v3_tiny")
    parser.add_argument("--small", action="store_true", help="half as wide, of bytes")
    parser.add_argument("--sides", nargs="+", default=["bf16", "fp8", AGAIN], metavar="SIDE")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--window", type=int, default=100, help="steps")
    parser.add_argument("--branch", type=int, default=0, help="step at which runs part; 0: start")
    parser.add_argument("--length", type=int, help="steps from there; none: to the end")
    parser.add_argument("--trunks", type=int, help="runs to go on from; none: one a pair")
    parser.add_argument("overrides", nargs="*", help="of the configuration: a.b=c")
    args = parser.parse_intermixed_args()
    first, *others = args.sides
    if first not in PRECISIONS or not {*others} <= {*PRECISIONS, AGAIN}:
        parser.error(f"--sides: one of {', '.join(PRECISIONS)}, then others of them or {AGAIN}")
    run = load_config(args.config, [*SMALL, *args.overrides] if args.small else args.overrides)
    plan = Plan(
        args.folder,
        run,
        args.branch,
        min(run.trainer.max_steps, args.branch + (args.length or run.trainer.max_steps)),
        args.trunks or args.pairs,
        first,
    )
    args.folder.mkdir(parents=True, exist_ok=True)
    # ``fp32 again`` is another run than ``bf16 again``.
    names = [f"{first}_{AGAIN}" if side == AGAIN else side for side in args.sides]
    torch.set_num_threads(1)
    keep_freed_memory()
    for seed in range(1, args.pairs + 1):
        for name in names:
            make(plan, name, seed)
    seeds = [
        seed
        for seed in range(1, args.pairs + 1)
        if all((args.folder / f"{name}_{seed}.json").exists() for name in names)
    ]
    if len(seeds) < 2:
        print(f"{len(seeds)} pairs are complete; two have a standard error")
        return
    curves = {n: [read(args.folder / f"{n}_{seed}.json") for seed in seeds] for n in names}
    for name, of_name in curves.items():
        steps = len(of_name[0].losses)
        seconds = statistics.mean(curve.cpu_seconds / steps for curve in of_name)
        loss = statistics.mean(curve.val_loss for curve in of_name)
        print(f"{name}: {1e3 * seconds:.0f} ms of CPU a step, validation loss {loss:.4f}")
    for name in names[1:]:
        tell(name, names[0], curves[name], curves[names[0]], args.window, plan.branch)


def make(plan: Plan, name: str, seed: int) -> None:
    """The file of one run, unless it is there, or another process is at it."""
    file = plan.folder / f"{name}_{seed}.json"
    if file.exists():
        return
    try:
        with FileLock(f"{file}.lock", timeout=0):
            curve = trained(plan, name, seed)
            with atomic_open(file) as stream:
                stream.write(json.dumps(asdict(curve)).encode())
    except Timeout:
        return
    print(f"{file.name}: validation loss {curve.val_loss:.4f}", flush=True)


def read(file: Path) -> Curve:
    """Of a run that is done."""
    return Curve(**json.loads(file.read_text()))


def trained(plan: Plan, name: str, seed: int) -> Curve:
    """Train and validate once."""
    precision, _, again = name.partition("_")
    side = Side(plan, precision, seed)
    if plan.branch:
        side.go_on(trunk(plan, (seed - 1) % plan.trunks + 1))
    if again:
        with torch.no_grad():
            for parameter in side.module.parameters():
                parameter.mul_(DISTURBED)
    begin = time.process_time()
    losses = side.train(plan.branch, plan.end)
    return Curve(losses, side.validate(), time.process_time() - begin)


def trunk(plan: Plan, seed: int) -> Path:
    """The state of a run of the first side at the step where others branch off."""
    file = plan.folder / f"trunk_{seed}.pt"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            side = Side(plan, plan.first, seed)
            side.train(0, plan.branch)
            state = side.module.state_dict(), side.optimizer.state_dict()
            with atomic_open(file) as stream:
                torch.save(state, stream)
    return file


class Side:
    """A run in one precision."""

    def __init__(self, plan: Plan, precision: str, seed: int) -> None:
        run = plan.run
        model = replace(run.model, fp8_recipe="blockwise" if precision == "fp8" else None)
        self.module: Any = DeepSeekModel(
            model,
            seed=seed,
            max_steps=run.trainer.max_steps,
            gradient_clip_val=run.trainer.gradient_clip_val,
        )
        self.optimizer = self.module.configure_optimizers()
        self._model, self._data = model, open_data(model, seed)
        self._limit = run.trainer.limit_val_batches
        # Entered anew in each step: what it has cast of the weights it keeps until it is left.
        self._mixed = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision != "fp32")

    def go_on(self, file: Path) -> None:
        """From a trunk."""
        weights, moments = torch.load(file)
        self.module.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)

    def train(self, start: int, end: int) -> list[float]:
        """The loss of each step."""
        self.module.finished_steps = start
        losses = []
        for batch in build_train_loader(
            self._data.train, self._model, max_steps=end, start_step=start
        ):
            with self._mixed():
                losses.append(self.module.train_step(batch, self.optimizer).loss)
        return losses

    def validate(self) -> float:
        """Nats a token."""
        assert self._data.validation is not None
        batches = build_validation_loader(
            self._data.validation, self._model, limit_batches=self._limit
        )
        module = self.module
        with torch.no_grad(), self._mixed():
            module.on_validation_epoch_start()
            for number, batch in enumerate(batches):
                module.validation_step(batch, number)
            module.on_validation_epoch_end()
        return float(module.validation_record.val_loss)


def tell(
    name: str,
    first: str,
    ours: Sequence[Curve],
    theirs: Sequence[Curve],
    window: int,
    start: int,
) -> None:
    """One line for each window, for all steps, for the validation."""
    print(f"{name} against {first}, {len(ours)} pairs: mean +- its standard error (one pair's)")
    steps = len(ours[0].losses)
    spans = [range(at, min(at + window, steps)) for at in range(0, steps, window)]
    for span in [*spans, range(steps)]:
        pairs = [
            100 * (sum(a.losses[s] for s in span) / sum(b.losses[s] for s in span) - 1)
            for a, b in zip(ours, theirs, strict=True)
        ]
        print(f"  steps {start + span.start + 1:>5} to {start + span.stop:>5}  {spread(pairs)}")
    pairs = [100 * (a.val_loss / b.val_loss - 1) for a, b in zip(ours, theirs, strict=True)]
    print(f"  validation            {spread(pairs)}")


def spread(percents: Sequence[float]) -> str:
    """Mean, standard error, standard deviation."""
    deviation = statistics.stdev(percents)
    error = deviation / math.sqrt(len(percents))
    return f"{statistics.mean(percents):+.3f} % +- {error:.3f} ({deviation:.3f})"


if __name__ == "__main__":
    guarded(main)
