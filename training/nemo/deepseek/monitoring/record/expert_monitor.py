"""Watches the experts: who is chosen how often, by what margin, and the state of the bias.

L layers with experts, E experts per layer, T tokens, K chosen per token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek.config.schema import ModelConfig
from deepseek.console import complain
from deepseek.frameworks import Trainer
from deepseek.models.components.router import Router
from deepseek.monitoring import load_metrics
from deepseek.monitoring.array_log import ArrayLog
from deepseek.monitoring.record.rank_monitor import RecordSchedule
from deepseek.ops.routing import margin_sums
from deepseek.parallel.gradients import sum_over
from deepseek.training.step import DeepSeekCallback, DeepSeekModel, StepRecord


@dataclass(frozen=True)
class ExpertRecord:
    """What was found in one step."""

    step: int
    layers: list[str]
    """Names of the blocks, in order of depth."""
    top_k: int
    """Experts chosen for each token."""
    tokens_LE: np.ndarray
    """int64: assignments of the real tokens of the whole global batch."""
    bias_LE: np.ndarray
    """fp32: correction bias, after its update by this step; zeros where there is none."""
    margin_L: np.ndarray
    """fp32: how far the last chosen expert lay above the next one, mean over a sample."""

    @cached_property
    def counts(self) -> list[list[int]]:
        """``tokens_LE`` for loops: for the dozens of counts of a small model numpy's calls take
        three times as long; with 58 layers of 256 experts loops take some milliseconds."""
        return self.tokens_LE.tolist()


class ExpertMonitor(DeepSeekCallback):
    """Writes ``experts.arrays`` and adds the worst load and the dead experts to the step's row.

    Everything comes from one collective per recorded step. The counts are those the correction bias
    is moved by: real tokens of the whole global batch.

    Args:
        path: the file; only rank 0 writes it.
        schedule: which steps are recorded.
        leads: whether this is rank 0.

    Attributes:
        latest: the newest record; on rank 0 alone.
    """

    def __init__(self, path: Path, schedule: RecordSchedule, leads: bool) -> None:
        self.schedule = schedule
        self.latest: ExpertRecord | None = None
        self._leads = leads
        self._log: ArrayLog | None = ArrayLog(path) if leads else None
        self._layers: list[str] = []
        self._margins: dict[str, RouterMargin] = {}
        self._routers: list[Router | None] = []  # of each layer, where this rank tells of it
        self._none_E = torch.zeros(0, dtype=torch.int64)

    def on_train_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Listen to the routers that are here."""
        self._forget()
        routers, coordinate = module.model.routers(), module.meshes.coordinate
        self._margins = {name: RouterMargin(router) for name, router in routers.items()}
        self._layers = expert_layers(module.config)
        # Counts and bias are equal on all ranks of a stage: one of them tells.
        tells = (coordinate.dp_replicate, coordinate.dp_shard, coordinate.tp) == (0, 0, 0)
        self._routers = [routers.get(name) if tells else None for name in self._layers]
        device = next(module.model.parameters()).device
        self._none_E = torch.zeros(module.config.n_routed_experts, dtype=torch.int64, device=device)

    def on_train_batch_start(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Measure margins only in steps that are recorded."""
        if self.schedule.is_due(module.finished_steps + 1):
            for margin in self._margins.values():
                margin.measure_next()

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Collect, on every rank; write, on rank 0."""
        step, config = module.finished_steps, module.config
        if not self._layers or not self.schedule.is_due(step):
            return
        begin = time.perf_counter()
        record = self._collect(module, step)
        row = module.step_record
        assert row is not None
        if self._leads:
            self.latest = record
            add_loads(row, record, config.expert_model_parallel_size)
            self._write(record, config)
        spent = sum(margin.take_seconds() for margin in self._margins.values())
        spent += time.perf_counter() - begin
        row.monitor_seconds += spent

    def on_train_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Stop listening."""
        self._forget()

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """The same."""
        self._forget()

    def _forget(self) -> None:
        for margin in self._margins.values():
            margin.remove()
        self._margins.clear()

    def _collect(self, module: DeepSeekModel, step: int) -> ExpertRecord:
        """All layers, on every rank: one sum of a table with a row for each."""
        none_E, num_experts = self._none_E, len(self._none_E)
        routers = self._routers
        counts = [none_E if router is None else router.tokens_per_expert for router in routers]
        biases = [none_E if r is None or r.bias is None else r.bias for r in routers]
        sums = sums_of([self._margins.get(name) for name in self._layers]).to(none_E.device)
        # In the dtype of the sums, fp64: counts below 2^53 are exact.
        table = torch.cat((torch.stack(counts), torch.stack(biases), sums), dim=1)
        found = sum_over(table, module.meshes.world).cpu().numpy()
        return ExpertRecord(
            step,
            self._layers,
            module.config.num_experts_per_tok,
            found[:, :num_experts].astype(np.int64),
            found[:, num_experts:-2].astype(np.float32),
            (found[:, -2] / np.maximum(found[:, -1], 1)).astype(np.float32),
        )

    def _write(self, record: ExpertRecord, config: ModelConfig) -> None:
        if self._log is None:
            return
        arrays = {"tokens": record.tokens_LE.astype(np.uint32), "margin": record.margin_L}
        if config.topk_method == "noaux_tc":
            arrays["bias"] = record.bias_LE
        meta = {"ep": config.expert_model_parallel_size, "top_k": record.top_k}
        try:
            self._log.append(record.step, arrays, layers=record.layers, **meta)
        except OSError as error:  # watching must not stop what is watched
            complain(f"{self._log.path}: {error.strerror}; expert loads are no longer recorded")
            self._log = None


def add_loads(row: StepRecord, record: ExpertRecord, ranks: int) -> None:
    """Put a record into the row of its step, in few numbers; layers without tokens are left out.

    Args:
        row: gets the numbers, if there is a token in some layer; ``load_metrics`` has formulas.
        record: of the step.
        ranks: that the experts are divided over.
    """
    layers = record.counts
    used = [layer for layer, counts in enumerate(layers) if any(counts)]
    if not used:
        return
    experts = len(layers[0])
    worst = worst_rank = variation = entropy = 0.0
    dead = starved = 0
    for counts in (layers[layer] for layer in used):
        total = sum(counts)
        mean = total / experts
        worst = max(worst, max(counts) / mean)
        variation += math.sqrt(sum([(n - mean) ** 2 for n in counts]) / experts) / mean
        entropy += load_metrics.nats_of(counts) / math.log(experts) if experts > 1 else 1.0
        dead += counts.count(0)
        starved += sum([n < load_metrics.STARVED_BELOW * mean for n in counts])
        share = experts // ranks
        loads = [sum(counts[first : first + share]) for first in range(0, experts, share)]
        worst_rank = max(worst_rank, max(loads) / total * ranks)
    row.load_max_over_mean = round(worst, 6)
    row.load_cv = round(variation / len(used), 6)
    row.load_entropy = round(entropy / len(used), 6)
    row.rank_load_max_over_mean = round(worst_rank, 6)
    row.bias_range = max(max(bias) - min(bias) for bias in record.bias_LE.tolist())
    row.bias_range = round(row.bias_range, 6)
    row.router_margin = round(float(record.margin_L[used].mean()), 6)
    row.dead_experts, row.starved_experts = dead, starved


def expert_layers(config: ModelConfig) -> list[str]:
    """Names of the blocks with experts, in order of depth, those of other ranks included."""
    main = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    return [f"layers.{i}" for i in main] + [
        f"mtp.{depth}.block" for depth in range(config.num_nextn_predict_layers)
    ]


MARGIN_TOKENS = 128
"""Tokens whose margins are measured, at most, by each rank in each layer of a recorded step."""


class RouterMargin:
    """How far the last chosen expert lies above the next best one, by what they are chosen by.

    Measured over real tokens of the first micro-batch of a step, evenly spaced: a mean of a
    hundred says enough, and measuring all would cost as much as the routing.

    Args:
        router: it tells this one of its choices, until ``remove``.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._sample: tuple[Tensor, Tensor, Tensor] | None = None
        self._due = False
        self._seconds = 0.0
        if router.top_k < router.num_experts:
            router.listener = self._measure

    def measure_next(self) -> None:
        """Measure in the next forward pass."""
        self._due = True
        self._sample = None

    def take(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of some tokens: what they are chosen by (T, E), the experts chosen (T, K), and which of
        them are real (T,); None if nothing was measured."""
        self._due = False
        return self._sample

    def take_seconds(self) -> float:
        """What measuring has cost since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def remove(self) -> None:
        """Leave the model as it was."""
        self._router.listener = None

    @torch.compiler.disable
    @torch.no_grad()
    def _measure(self, scores_TE: Tensor, expert_ids_TK: Tensor, real_BS: Tensor | None) -> None:
        if not self._due:
            return
        self._due = False
        begin = time.perf_counter()
        rows = slice(None, None, -(-len(scores_TE) // MARGIN_TOKENS))
        choice_TE = self._router.choice_scores(scores_TE[rows])  # with the bias of this step
        if real_BS is None:
            real_T = choice_TE.new_ones(len(choice_TE), dtype=torch.bool)
        else:
            real_T = real_BS.flatten()[rows].clone()
        self._sample = choice_TE, expert_ids_TK[rows].clone(), real_T
        self._seconds += time.perf_counter() - begin


@torch.no_grad()
def sums_of(margins: Sequence[RouterMargin | None]) -> Tensor:
    """Sum of the margins and number of tokens of each, fp64 (n, 2), 0 where there is none; all
    layers at once, since small operations cost by their number."""
    found = [margin.take() if margin else None for margin in margins]
    taken = {n: measured for n, measured in enumerate(found) if measured is not None}
    sums = torch.zeros(len(margins), 2, dtype=torch.float64)
    if not taken:
        return sums
    # Layers see the same tokens.
    sums_L2 = margin_sums(*zip(*taken.values(), strict=True))
    if len(taken) == len(margins):
        return sums_L2
    sums = sums.to(sums_L2.device)
    sums[list(taken)] = sums_L2
    return sums
