"""Watches the ranks: what each step's time and memory went to, and what passed between them.

R ranks, M measurements.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deepseek.console import complain
from deepseek.frameworks import Trainer
from deepseek.models.components.moe import GroupedExperts
from deepseek.monitoring.array_log import ArrayLog
from deepseek.monitoring.record.recorder import (
    NUMBERS,
    SEND_RECV,
    CommunicationRecorder,
    Kind,
    Summary,
)
from deepseek.parallel.gradients import max_over, sum_over
from deepseek.parallel.mesh import Meshes
from deepseek.run_folder import COLLECTIVES_FILE, RANKS_FILE, TRAFFIC_FILE
from deepseek.training.phases import Memory
from deepseek.training.step import DeepSeekCallback, DeepSeekModel, StepRecord

MEASURED_PHASES = ("forward_backward", "optimizer", "checkpoint")
"""Whose memory is recorded."""
COLUMNS = (
    "step_seconds",
    "data_seconds",
    "compute_seconds",
    "wait_seconds",
    "transfer_seconds",
    "optimizer_seconds",
    "memory_bytes",
    "peak_memory_bytes",
    "reserved_bytes",
    "received_rows",
    "largest_received_rows",
    *(
        f"{phase}_{kind}_bytes"
        for phase in MEASURED_PHASES
        for kind in ("allocated", "reserved", "peak")
    ),
)
"""What is measured on each rank: seconds of the step, bytes after it and in each phase, rows that
came to its experts. The phase ``checkpoint`` is the newest one, of whatever step."""


SHARE = 0.01
"""Of the time, at most, that records may take if nothing else is asked for."""
FEW_RANKS = 64
"""Up to so many every step is recorded: what it costs grows with their number."""


class RecordSchedule:
    """Which steps are recorded; the same on every rank.

    Args:
        every_n_steps: between them; None: every step with few ranks, else as seldom as costs
            ``SHARE`` of the time, by what the newest record cost.
        world_size: number of ranks.
    """

    def __init__(self, every_n_steps: int | None, world_size: int = 1) -> None:
        self._every = 1 if every_n_steps is None and world_size <= FEW_RANKS else every_n_steps
        self._newest = self._next = 0

    def is_due(self, step: int) -> bool:
        """Whether this step is recorded."""
        if self._every is not None:
            return step % self._every == 0
        return step == self._newest or step >= self._next

    def recorded(self, step: int, cost: float, step_seconds: float) -> None:
        """Of the record at ``step``: seconds that the one before it cost, and those of the step."""
        if step_seconds > 0:
            self._newest = step
            self._next = step + max(1, math.ceil(cost / (SHARE * step_seconds)))


@dataclass(frozen=True)
class RankRecord:
    """What was found in one step."""

    step: int
    stages: list[int]
    """Pipeline coordinate of each rank: those of one stage have the same work."""
    ranks_RM: np.ndarray
    """fp64, the columns are ``COLUMNS``."""

    def column(self, name: str) -> np.ndarray:
        """One measurement of every rank."""
        return self.ranks_RM[:, COLUMNS.index(name)]


class RankMonitor(DeepSeekCallback):
    """Writes ``ranks.arrays``, ``traffic.arrays`` and ``collectives.jsonl``.

    Args:
        folder: of the files; only rank 0 writes them.
        schedule: which steps are recorded.
        leads: whether this is rank 0.
        ranks_per_node: tells which rank is where.

    Attributes:
        latest: the newest record; on rank 0 alone.
    """

    def __init__(
        self,
        folder: Path,
        schedule: RecordSchedule,
        leads: bool,
        ranks_per_node: int = 1,
    ) -> None:
        self.schedule = schedule
        self.latest: RankRecord | None = None
        self._leads = leads
        self._files = _Files(folder, ranks_per_node) if leads else None
        self._recorder: CommunicationRecorder | None = None
        self._rows: ReceivedRows | None = None
        self._stages: list[int] = []
        self._clock = 0.0
        self._cost = 0.0
        """Seconds that watching took in the newest recorded step, writing included."""

    def on_train_start(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Get ready to record, where there is something to record."""
        if isinstance(module.meshes, Meshes):
            self._recorder = CommunicationRecorder(module.meshes)
        layout = module.meshes.layout
        self._stages = [layout.coordinate(rank).pp for rank in range(layout.world_size)]
        self._rows = ReceivedRows(module.model)

    def on_train_batch_start(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Start the clock, and the recorder if this step is recorded."""
        is_due = self.schedule.is_due
        if module.step_record is not None and is_due(module.finished_steps):
            self._cost = module.step_record.monitor_seconds
        if self._recorder is not None and is_due(module.finished_steps + 1):
            self._recorder.start()
        if self._rows is not None:
            self._rows.start()
        self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: DeepSeekModel, *args: Any) -> None:
        """Collect, on every rank; write, on rank 0."""
        step_seconds = time.perf_counter() - self._clock
        step = module.finished_steps
        is_due = self.schedule.is_due(step)
        if is_due:
            self.schedule.recorded(step, *_largest_of_all_ranks(module, self._cost, step_seconds))
        begin = time.perf_counter()
        row = module.step_record
        assert row is not None
        if is_due:
            summary = None
            if self._recorder is not None:
                self._recorder.stop()
                begin -= self._recorder.own_seconds
                summary = self._recorder.summary()
            self._record(module, row, step_seconds, summary)
        row.monitor_seconds += time.perf_counter() - begin

    def on_train_end(self, trainer: Trainer, module: DeepSeekModel) -> None:
        """Leave the model as it was."""
        if self._rows is not None:
            self._rows.remove()

    def on_exception(
        self, trainer: Trainer, module: DeepSeekModel, exception: BaseException
    ) -> None:
        """Leave torch's functions and the model as they were."""
        if self._recorder is not None:
            self._recorder.stop()
        if self._rows is not None:
            self._rows.remove()

    def _record(
        self, module: DeepSeekModel, row: StepRecord, step_seconds: float, summary: Summary | None
    ) -> None:
        own = _measurements(module, row, step_seconds, summary, self._rows)
        kinds = self._recorder.kinds() if self._recorder is not None else []
        layout = module.meshes.layout
        rank, size, ep = module.meshes.rank, layout.world_size, layout.ep
        # One collective: each rank fills its row of one table; at its end what it sent to whom in
        # its EP group, which are neighbours: a row of all ranks would make it size x size.
        width = len(COLUMNS) + len(kinds) * len(NUMBERS) + 1 + ep
        table = np.zeros((size, width))
        table[rank, : len(own)] = own
        if summary is not None:
            mine = [summary.numbers.get(kind, np.zeros(len(NUMBERS))) for kind in kinds]
            table[rank, len(own) :] = np.concatenate(
                [*mine, [summary.row_bytes], summary.expert_bytes]
            )
        found = _summed(table, module)
        if not self._leads:
            return
        ranks_RM = found[:, : len(COLUMNS)]
        self.latest = RankRecord(row.step, self._stages, ranks_RM)
        peak = self.latest.column("peak_memory_bytes")
        row.memory_bytes = int(peak.max())
        numbers_RKN = found[:, len(COLUMNS) : width - ep - 1].reshape(
            size, len(kinds), len(NUMBERS)
        )
        all_to_all = [k for k, kind in enumerate(kinds) if kind.operation == "all_to_all"]
        if all_to_all:
            seconds_R = numbers_RKN[:, all_to_all, NUMBERS.index("seconds")].sum(axis=1)
            row.all_to_all_seconds = float(seconds_R.mean())
        if self._files is None:
            return
        try:
            self._files.write(row.step, ranks_RM, kinds, numbers_RKN)
            self._files.write_traffic(row.step, found[:, -ep:], int(found[:, -ep - 1].max()))
        except OSError as error:  # watching must not stop what is watched
            complain(f"{error.filename}: {error.strerror}; ranks are no longer recorded")
            self._files = None


def _largest_of_all_ranks(module: DeepSeekModel, *values: float) -> list[float]:
    """Wait for the ranks that are still busy with the step; the largest of each value on any rank.

    Not a cost of watching: who is early waits now instead of at the next step's first collective.
    What the monitors' own collectives take afterwards is their cost.
    """
    if module.meshes.world is None:
        return list(values)
    device = next(module.model.parameters()).device
    return max_over(torch.tensor(values, device=device), module.meshes.world).tolist()


def _summed(table: np.ndarray, module: DeepSeekModel) -> np.ndarray:
    """Over all ranks."""
    if module.meshes.world is None:
        return table
    device = next(module.model.parameters()).device
    total = torch.from_numpy(table).to(device)
    sum_over(total, module.meshes.world)
    return total.cpu().numpy()


def _measurements(
    module: DeepSeekModel,
    row: StepRecord,
    step_seconds: float,
    summary: Summary | None,
    rows: ReceivedRows | None,
) -> list[float]:
    """One rank's ``COLUMNS``."""
    seconds = transfer = exposed = 0.0
    if summary is not None:
        numbers = np.array(list(summary.numbers.values()))
        seconds, transfer, exposed = (
            numbers[:, NUMBERS.index(name)].sum()
            for name in ("seconds", "transfer_seconds", "exposed_seconds")
        )
    memory, saved = module.phases.memory, module.save_record
    now = memory["optimizer"]  # which ends the step
    checkpoint = saved.memory if saved else Memory(0, 0, 0)
    used = memory["forward_backward"], now, checkpoint  # of MEASURED_PHASES
    return [  # in the order of COLUMNS
        step_seconds,
        row.data_seconds or 0.0,
        max(0.0, step_seconds - exposed),
        seconds - transfer,
        transfer,
        row.optimizer_seconds or 0.0,
        now.allocated,
        max(now.allocated, row.memory_bytes or 0),
        now.reserved,
        rows.total if rows else 0,
        rows.largest if rows else 0,
        *(n for one in used for n in (one.allocated, one.reserved, one.peak)),
    ]


class _Files:
    """What rank 0 writes."""

    def __init__(self, folder: Path, ranks_per_node: int) -> None:
        self._ranks_per_node = ranks_per_node
        self._ranks = ArrayLog(folder / RANKS_FILE)
        self._traffic = ArrayLog(folder / TRAFFIC_FILE)
        self._collectives = folder / COLLECTIVES_FILE

    def write(
        self,
        step: int,
        ranks_RM: np.ndarray,
        kinds: list[Kind],
        numbers_RKN: np.ndarray,
    ) -> None:
        """Ranks and collectives of one step."""
        self._ranks.append(step, {"ranks": ranks_RM.astype(np.float32)}, columns=list(COLUMNS))
        if not kinds:
            return
        step_seconds = ranks_RM[:, 0].mean()
        rows = [
            _row(step, kind, numbers_RKN[:, k], step_seconds)
            for k, kind in enumerate(kinds)
            if numbers_RKN[:, k, 0].any()
        ]
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            with open(self._collectives, "ab", buffering=0) as file:
                file.write(text.encode())

    def write_traffic(self, step: int, traffic_RP: np.ndarray, row_bytes: int) -> None:
        """Row s, column p: bytes of rows that rank s sent to place p of its EP group."""
        if traffic_RP.any():
            nodes = [rank // self._ranks_per_node for rank in range(len(traffic_RP))]
            arrays = {"bytes": traffic_RP.astype(np.uint64)}
            self._traffic.append(step, arrays, row_bytes=row_bytes, node_of_rank=nodes)


def _row(step: int, kind: Kind, numbers_RN: np.ndarray, step_seconds: float) -> dict[str, Any]:
    """One operation in one kind of group, over all ranks that took part."""
    taking_part = numbers_RN[numbers_RN[:, 0] > 0]
    count, sent, p50, p95, longest, seconds, transfer, exposed, ranks = taking_part.T
    size = float(ranks.max())
    # As nccl-tests define them: the bytes of the whole operation, and what a link carries of them.
    whole = sent.sum() * (size if kind.operation == "all_gather" else 1)
    algorithm = whole / transfer.sum() if transfer.sum() else 0.0
    carried = {"all_reduce": 2 * (size - 1) / size, SEND_RECV: 1.0}
    return {
        "step": step,
        "group": kind.group,
        "op": kind.operation,
        "count": int(count.max()),
        "bytes": int(sent.sum()),
        "p50": float(np.median(p50)),
        "p95": float(p95.max()),
        "max": float(longest.max()),
        "algbw": float(algorithm),
        "busbw": float(algorithm * carried.get(kind.operation, (size - 1) / size)),
        "wait_seconds": float((seconds - transfer).mean()),
        "transfer_seconds": float(transfer.mean()),
        "exposed_share": float(exposed.mean() / step_seconds) if step_seconds else 0.0,
    }


class ReceivedRows:
    """Listens to the experts of a model; only shapes are looked at, so no device is waited for.

    A row is one choice of one token, padding included, since it travels and is computed too. Rows
    that recomputation sends a second time are not counted.

    Args:
        model: this rank's part.

    Attributes:
        total: rows since ``start``, over layers and micro-batches.
        largest: of one layer and micro-batch, the most: what memory has to hold at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total = self.largest = 0
        self._experts = [x for x in model.modules() if isinstance(x, GroupedExperts)]
        for experts in self._experts:
            experts.listener = self._hear

    def start(self) -> None:
        """Begin at nothing."""
        self.total = self.largest = 0

    def remove(self) -> None:
        """Leave the model as it was."""
        for experts in self._experts:
            experts.listener = None

    @torch.compiler.disable
    def _hear(self, rows: int) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass: recomputation
            return
        self.total += rows
        self.largest = max(self.largest, rows)
