"""The number of an attempt, the same on all ranks that torchrun starts."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_PAUSE_SECONDS = 0.2


def agreed_attempt(store: Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """How often ranks have met in this store before: 0 for the first time.

    torchrun counts restarts on each node by itself: one whose ranks were well when another lost
    some counts none. Ranks that went by that would wait for each other under two names.

    The store outlives attempts, so that what stands in it may be of dead ranks. Each rank leaves a
    mark of its own there. Rank 0 lists all marks beside the attempt's number; a rank that finds its
    own in the list answers with rank 0's, which no dead rank knew. torchrun ends all ranks of an
    attempt before it starts the next.

    Raises:
        RuntimeError: some rank does not come within ``timeout``.
    """
    mark, end = uuid.uuid4().hex[:8], time.monotonic() + timeout.total_seconds()
    store.set(f"here.{rank}", mark)
    number = store.add("attempts", 1) - 1 if rank == 0 else 0
    if world_size == 1:
        return number
    others = [f"agreed.{other}" for other in range(1, world_size)]
    while True:
        if rank == 0:
            marks = store.multi_get([f"here.{other}" for other in range(world_size)])
            listed = [str(number), *(one.decode() for one in marks)]
            store.set("attempt", " ".join(listed))
            answers = store.multi_get(others) if store.check(others) else []
            if answers == [mark.encode()] * len(others):
                return number
        else:
            number_told, *listed = store.get("attempt").decode().split()
            if listed[rank] == mark:
                store.set(f"agreed.{rank}", listed[0])
                return int(number_told)
        if time.monotonic() > end:
            raise RuntimeError(
                f"timed out waiting {timeout.total_seconds() * 1000:.0f}ms for the other ranks to "
                "start anew"
            )
        time.sleep(_PAUSE_SECONDS)
