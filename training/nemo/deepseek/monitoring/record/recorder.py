"""What passes between the ranks: every collective of this process, its bytes and its time.

While it records, the recorder stands in for the collectives of ``torch.distributed``, and for those
of ``cpu_memory`` and ``cpu_exchange``, so that it sees FSDP's and the pipeline's as well as our
own. It changes nothing of what they do.

On a CPU a collective blocks: its time is how long this rank stands still in it, waiting for the
others included. On a GPU it is how long its stream is busy. The pipeline's calls return at once and
are waited for later: both times count.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules

from deepseek.parallel import cpu_exchange, cpu_memory
from deepseek.parallel.mesh import Meshes

OPERATIONS = {
    "all_to_all_single": "all_to_all",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",  # the same under torch's newer name
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "all_reduce": "all_reduce",
}
"""Functions of ``torch.distributed`` and what they are called here."""
SEND_RECV = "send_recv"
"""What stages of a pipeline exchange."""
_BATCH_P2P = (
    (schedules, "_batch_p2p") if hasattr(schedules, "_batch_p2p") else (dist, "batch_isend_irecv")
)
"""Where torch's pipeline schedules send and receive."""
WATCHED = (
    *((dist, name, operation) for name, operation in OPERATIONS.items()),
    (cpu_memory, "all_gather", "all_gather"),
    (cpu_memory, "reduce_scatter", "reduce_scatter"),
    (cpu_exchange, "all_to_all", "all_to_all"),
    (*_BATCH_P2P, SEND_RECV),
)
"""Where the functions are, their names, and the operations."""
NUMBERS = (
    "count",
    "bytes",
    "p50",
    "p95",
    "max",
    "seconds",
    "transfer_seconds",
    "exposed_seconds",
    "ranks",
)
"""What ``Summary`` tells of each kind of call."""


@dataclass
class _Call:
    bytes: int
    exposed: bool
    """On the stream of the computation, which stands still meanwhile."""
    spans: list[tuple[Any, Any]]
    """Begin and end, in seconds or as events of the GPU: of the call, of the waiting for it."""


@dataclass(frozen=True)
class Kind:
    """Calls of one operation in one kind of group."""

    group: str
    """An axis of a mesh, or ``data``, ``stage``, ``ends``, ``world``."""
    operation: str


@dataclass(frozen=True)
class Summary:
    """The calls of one step on this rank."""

    numbers: dict[Kind, np.ndarray]
    """fp64 (``NUMBERS``): calls, bytes that this rank gave, percentiles of the seconds of a call,
    their sum, that part of it in which all ranks of the group were there (the rest was waiting),
    that part in which this rank could not compute, and the size of the group."""
    expert_bytes: np.ndarray
    """int64 (EP): bytes of rows sent to each rank of this one's EP group on their way to experts
    and back; rows that stay here do not count."""
    row_bytes: int
    """Of one such row; 0 if there was none."""


class CommunicationRecorder:
    """Records the calls of this rank between ``start`` and ``stop``.

    Args:
        meshes: the groups and their names.

    Attributes:
        own_seconds: what recording itself has cost since ``start``.
    """

    def __init__(self, meshes: Meshes) -> None:
        self._meshes = meshes
        self._on_gpu = meshes.device_type == "cuda"
        operations = (*OPERATIONS.values(), SEND_RECV)
        self._names = {operation: meshes.names(operation) for operation in operations}
        self._groups = {
            name: group for names in self._names.values() for group, name in names.items()
        }
        self._members = {
            name: dist.get_process_group_ranks(group) for name, group in self._groups.items()
        }
        self._calls: dict[Kind, list[_Call]] = defaultdict(list)
        self._expert_bytes = [0] * meshes.layout.ep
        self._row_bytes = 0
        self._originals: list[tuple[Any, str, Callable[..., Any]]] = []
        self._stream: Any = None
        self._within = False
        self.own_seconds = 0.0

    def kinds(self) -> list[Kind]:
        """Every kind of call there may be; the same on all ranks."""
        found = {Kind(name, op) for op, names in self._names.items() for name in names.values()}
        found |= {Kind("other", op) for op in self._names}
        found.add(Kind("pp", SEND_RECV))  # not on every rank
        return sorted(found, key=lambda kind: (kind.group, kind.operation))

    def start(self) -> None:
        """Begin, with nothing recorded."""
        self._calls.clear()
        self._expert_bytes = [0] * self._meshes.layout.ep
        self._row_bytes = 0
        self.own_seconds = 0.0
        self._stream = torch.cuda.current_stream() if self._on_gpu else None
        if self._originals:
            return
        for module, name, operation in WATCHED:
            original = getattr(module, name, None)
            if original is not None:
                self._originals.append((module, name, original))
                setattr(module, name, self._recorded(original, operation))

    def stop(self) -> None:
        """Put torch's own functions back."""
        for module, name, original in self._originals:
            setattr(module, name, original)
        self._originals.clear()

    def summary(self) -> Summary:
        """What was recorded; a collective, since only all ranks together know who waited."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = {
            kind: np.array([self._seconds(call) for call in self._calls[kind]])
            for kind in sorted(self._calls, key=lambda kind: (kind.group, kind.operation))
        }
        transfer = self._transfer_seconds(seconds)
        numbers = {}
        for kind, own in seconds.items():
            calls = self._calls[kind]
            p50, p95 = _percentiles(own, (50, 95))
            sent = sum(call.bytes for call in calls)
            exposed = own[[call.exposed for call in calls]].sum()
            group = self._groups.get(kind.group)
            ranks = dist.get_world_size(group) if group is not None else 2
            shared = transfer[kind].sum()
            numbers[kind] = np.array(
                [len(own), sent, p50, p95, own.max(), own.sum(), shared, exposed, ranks]
            )
        expert_bytes = np.array(self._expert_bytes, dtype=np.int64)
        return Summary(numbers, expert_bytes, self._row_bytes)

    def _transfer_seconds(self, seconds: dict[Kind, np.ndarray]) -> dict[Kind, np.ndarray]:
        """Seconds of each call in which all ranks of its group took part.

        The rank that came last has not waited, so they are the shortest time of any rank. Stages of
        a pipeline exchange in pairs, which change from call to call: there they are this rank's
        shortest time for a call of that size.
        """
        found = {}
        # Groups of the same ranks have one collective, in the same order on all of them.
        alike: dict[tuple[int, ...], list[Kind]] = defaultdict(list)
        for kind, own in seconds.items():
            members = self._members.get(kind.group)
            if members and kind.operation != SEND_RECV:
                alike[tuple(members)].append(kind)
                continue
            sizes = np.array([call.bytes for call in self._calls[kind]])
            shortest = {size: own[sizes == size].min() for size in np.unique(sizes)}
            found[kind] = np.array([shortest[size] for size in sizes])
        for kinds in alike.values():
            everything = np.concatenate([seconds[kind] for kind in kinds])
            shared = torch.from_numpy(everything).to(self._meshes.device_type)
            dist.all_reduce(shared, dist.ReduceOp.MIN, group=self._groups[kinds[0].group])
            ends = np.cumsum([len(seconds[kind]) for kind in kinds])[:-1]
            found |= dict(zip(kinds, np.split(shared.cpu().numpy(), ends), strict=True))
        return found

    def _seconds(self, call: _Call) -> float:
        if self._on_gpu:
            return sum(begin.elapsed_time(end) / 1000 for begin, end in call.spans)
        return sum(end - begin for begin, end in call.spans)

    def _recorded(self, original: Callable[..., Any], operation: str) -> Callable[..., Any]:
        """A function of torch whose calls are recorded."""
        inspect_call = self._call_inspector(operation, list(inspect.signature(original).parameters))

        def watched(*args: Any, **options: Any) -> Any:
            if self._within:  # one collective by means of another is one call
                return original(*args, **options)
            # Read now: the call may write over its input.
            start = time.perf_counter()
            kind, sent = inspect_call(args, options)
            begin = self._now()
            entered = time.perf_counter()
            self._within = True
            try:
                result = original(*args, **options)
            finally:
                self._within = False
            left = time.perf_counter()
            span = (begin, self._now())
            exposed = self._stream is None or torch.cuda.current_stream() == self._stream
            call = _Call(sent, exposed, [span])
            self._calls[kind].append(call)
            if operation == SEND_RECV:
                result = [_TimedWork(work, call, self._now) for work in result]
            elif operation == "all_to_all" and result is not None:  # begun, to be waited for
                result = _TimedWork(result, call, self._now)
            self.own_seconds += entered - start + time.perf_counter() - left
            return result

        return watched

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _call_inspector(
        self, operation: str, names: list[str]
    ) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[Kind, int]]:
        """A function of a call's arguments that gives its kind, and the bytes this rank puts in.

        It runs at every call, between two computations, so names are looked up here, once.
        """

        def argument(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
            place = names.index(name) if name in names else len(names)
            return lambda args, options: args[place] if place < len(args) else options.get(name)

        if operation == SEND_RECV:
            operations = argument(names[0])  # the argument has had two names
            pipeline = Kind("pp", operation)

            def sends(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Kind, int]:
                given = operations(args, options)
                return pipeline, sum(_size(op.tensor) for op in given if op.op is dist.isend)

            return sends
        input_of = argument(next(n for n in ("input_tensor", "input", "tensor") if n in names))
        group_of, splits_of = argument("group"), argument("input_split_sizes")
        kinds = {group: Kind(name, operation) for group, name in self._names[operation].items()}
        other = Kind("other", operation)

        def tensors(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Kind, int]:
            given, group = input_of(args, options), group_of(args, options) or dist.group.WORLD
            beside = [given] if isinstance(given, Tensor) else given
            first = beside[0]
            kind = kinds.get(group, other) if group is not None else other
            rows = first.is_floating_point() or first.dtype == torch.uint8  # in FP8, as bytes
            if operation == "all_to_all" and kind is not other and rows:
                self._note_rows(beside, splits_of(args, options), self._members[kind.group])
            return kind, sum(map(_size, beside))

        return tensors

    def _note_rows(
        self, beside: Sequence[Tensor], splits: Sequence[int] | None, ranks: list[int]
    ) -> None:
        """Tensors with as many rows, which travel side by side."""
        counts = splits if splits is not None else [len(beside[0]) // len(ranks)] * len(ranks)
        self._row_bytes = sum(math.prod(x.shape[1:]) * x.element_size() for x in beside)
        for rank, count in zip(ranks, counts, strict=True):
            if rank != self._meshes.rank:  # EP ranks are neighbours
                place = rank % self._meshes.layout.ep
                self._expert_bytes[place] += count * self._row_bytes


class _TimedWork:
    """A transfer under way, as torch returned it; the time it is waited for is the call's too."""

    def __init__(self, work: Any, call: _Call, now: Callable[[], Any]) -> None:
        self._work, self._call, self._now = work, call, now

    def wait(self, *args: Any, **options: Any) -> Any:
        begin = self._now()
        result = self._work.wait(*args, **options)
        self._call.spans.append((begin, self._now()))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _percentiles(values: np.ndarray, percents: Sequence[int]) -> list[float]:
    """As ``np.percentile`` tells them, in a tenth of the time for the few values of a step."""
    ordered = sorted(values.tolist())
    found = []
    for percent in percents:
        below, part = divmod(percent / 100 * (len(ordered) - 1), 1)
        low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
        found.append(low + part * (high - low))
    return found


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
