"""The ranks that write or read a checkpoint together: every collective decision of the package.

Three verbs are enough. ``together`` runs a piece of work on every rank and hands all results to
all; ``gather`` hands them to rank 0 alone; ``lead`` runs it on rank 0 and hands the result to all.
What fails on one rank fails on every rank, with the same message, so that none waits for one that
has left. Without a process group all are a plain call: a layout of one.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from deepseek.config.errors import UserError

T = TypeVar("T")


class Ranks:
    """The ranks of ``group`` (None: all ranks, if ``torch.distributed`` is initialised by then).

    Values and messages travel as objects: with NCCL, ``torch.cuda.set_device`` must have been
    called; a gloo group spares that.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def active(self) -> bool:
        """Whether there is a process group. Asked anew each time: it may be made later."""
        return dist.is_available() and dist.is_initialized()

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.active else 0

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if self.active else 1

    def with_own_group(self) -> Ranks:
        """The same ranks with a gloo group of their own, for another thread; a collective.

        Threads must not share a group: their collectives could meet in another order on each rank.
        """
        if not self.active:
            return self
        group = dist.new_group(
            dist.get_process_group_ranks(self.group),
            backend="gloo",
            group_desc="checkpoints",
            # Else every rank of the world would have to come here.
            use_local_synchronization=self.group is not None,
        )
        return Ranks(group)

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank; the results of all ranks, in their order.

        Raises what ``work`` raised, or ``UserError`` with the messages of the ranks that failed.
        """
        if not self.active:
            return [work()]
        value, failure = _attempt(work)
        outcomes: list[tuple[T | None, str | None]] = [(None, None)] * self.size
        dist.all_gather_object(outcomes, (value, _message(failure)), group=self.group)
        messages = {rank: text for rank, (_, text) in enumerate(outcomes) if text is not None}
        if messages:
            _raise(failure, _joined(messages, self.size))
        return [cast(T, value) for value, _ in outcomes]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank; the results of all ranks on rank 0, nothing on the others.

        For what is large: of a checkpoint of 2,048 ranks, what all want to write is 50 MB.

        Raises as ``together``.
        """
        if not self.active:
            return [work()]
        value, failure = _attempt(work)
        root = self._global(0)
        outcomes = self._to_rank_0((value, _message(failure)))
        failures = {rank: text for rank, (_, text) in enumerate(outcomes) if text is not None}
        messages: list[dict[int, str]] = [failures]
        dist.broadcast_object_list(messages, src=root, group=self.group)
        if messages[0]:
            _raise(failure, _joined(messages[0], self.size))
        return [value for value, _ in outcomes]

    def lead(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0; its result on every rank.

        Raises what ``work`` raised on rank 0, and ``UserError`` with its message on the others.
        """
        if not self.active:
            return work()
        value, failure = _attempt(work) if self.rank == 0 else (None, None)
        box: list[tuple[T | None, str | None]] = [(value, _message(failure))]
        dist.broadcast_object_list(box, src=self._global(0), group=self.group)
        value, text = box[0]
        if text is not None:
            _raise(failure, text)
        return cast(T, value)

    def _to_rank_0(self, own: object) -> list[Any]:
        """What all ranks have, in their order, on rank 0; nothing on the others.

        Over a tree: of 2,048 ranks, rank 0 hears 11, which have heard the others. In torch's own
        gather it is connected with every one, which are more sockets than a process may have.
        """
        have, step = [pickle.dumps(own)], 1
        while step < self.size:
            if self.rank % (2 * step):
                dist.send_object_list([have], self._global(self.rank - step), self.group)
                return []
            if self.rank + step < self.size:
                box: list[Any] = [None]
                dist.recv_object_list(box, self._global(self.rank + step), self.group)
                have += box[0]
            step *= 2
        return [pickle.loads(one) for one in have]

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as failure:
        return None, failure


def _message(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    return str(failure) if isinstance(failure, UserError) else repr(failure)


def _joined(messages: dict[int, str], size: int) -> str:
    """One text, each message once, with the ranks that gave it unless all gave the same."""
    ranks: dict[str, list[str]] = {}
    for rank, text in messages.items():
        ranks.setdefault(text, []).append(str(rank))
    if len(ranks) == 1 and len(messages) == size:
        return next(iter(ranks))
    return "\n".join(f"rank {', '.join(who)}: {text}" for text, who in ranks.items())


def _raise(own: Exception | None, text: str) -> None:
    # A bug keeps its own traceback on the rank where it happened.
    if own is not None and not isinstance(own, UserError):
        raise own
    raise UserError(text) from own
