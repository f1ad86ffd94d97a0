"""What expert parallelism costs beside the bytes: dispatch and combine against a raw all-to-all.

    OMP_NUM_THREADS=1 python benchmarks/all_to_all.py

Four ranks of one machine, a thread each. Every round runs, one after the other, a barrier between
them:

- ``raw``: two ``all_to_all_single`` of gloo, of the same bytes and the same splits, into new
  tensors,
- ``raw_reused``: the same into tensors made before, which no training step could use again,
- ``raw_shared``: the same as ``raw`` through the memory that the ranks share, as rows travel,
- ``communication``: what ``AllToAllDispatcher`` sends through that memory: the counts, their way to
  the host, rows there, rows back,
- ``permutation``: its sorting and gathering of rows, nothing sent,
- ``whole``: ``dispatch`` and ``combine``.

A time is that of the slowest rank. Times are medians over the rounds. A ratio is given twice: the
median of the ratios round by round, so that a machine whose speed drifts slows both sides alike,
and that of the fastest rounds, which what else runs on the machine disturbs least.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251
import torch.multiprocessing as mp
from torch import Tensor

from deepseek.commands.entry import guarded
from deepseek.models.components.dispatcher import LocalDispatcher
from deepseek.parallel.collectives import all_to_all_rows
from deepseek.parallel.cpu_exchange import all_to_all
from deepseek.parallel.cpu_memory import keep_freed_memory
from deepseek.parallel.expert_dispatcher import AllToAllDispatcher

RANKS = 4
ROUNDS = 25
EXPERTS, TOP_K = 32, 4
SIZES = ((256, 256), (1024, 512), (4096, 512))
"""(tokens of a rank, model dim)."""


def main() -> None:
    """Print one JSON object."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(one_rank, args=(folder,), nprocs=RANKS)
        with open(os.path.join(folder, "result")) as file:
            cases = json.load(file)
    result = {
        "what": f"{RANKS} ranks, 1 thread each, {EXPERTS} experts top-{TOP_K}, fp32, forward",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "load": load,
        "cases": cases,
        "load_after": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))


def one_rank(rank: int, folder: str) -> None:
    """Rank 0 leaves the result in a file."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as ``deepseek train`` does
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    cases = [case(rank, tokens, dim) for tokens, dim in SIZES]
    if rank == 0:
        with open(os.path.join(folder, "result"), "w") as file:
            json.dump(cases, file)
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def case(rank: int, tokens: int, dim: int) -> dict[str, Any]:
    """Median times and ratios for one size; the same on every rank."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(tokens, dim, generator=generator)
    weights_TK, ids_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
    runs = steps(x_TD, ids_TK, weights_TK)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(ROUNDS + 2):
        for name, run in runs.items():
            seconds = timed(run)
            if round_number >= 2:  # the first two warm up
                times[name].append(seconds)
    return {
        "tokens_per_rank": tokens,
        "dim": dim,
        "mebibytes_each_way": round(tokens * TOP_K * dim * 4 / 2**20, 2),
        "milliseconds": {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()},
        "communication_to_raw": ratio(times["communication"], times["raw"]),
        "communication_to_raw_reused": ratio(times["communication"], times["raw_reused"]),
        "communication_to_raw_shared": ratio(times["communication"], times["raw_shared"]),
        "whole_to_raw": ratio(times["whole"], times["raw"]),
        "whole_to_raw_shared": ratio(times["whole"], times["raw_shared"]),
    }


def steps(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed."""
    group = dist.group.WORLD
    assert group is not None
    dispatcher = AllToAllDispatcher(EXPERTS, group)
    local = LocalDispatcher(EXPERTS)
    sent = dispatcher.dispatch(x_TD, weights_TK, ids_TK)
    there, back = sent.state.send_counts, sent.state.receive_counts
    ids_R = ids_TK.flatten()
    rows_RD = x_TD.repeat_interleave(TOP_K, dim=0)[ids_R.argsort(stable=True)]
    out_RD, arrived_QD = torch.empty_like(rows_RD), torch.empty_like(sent.rows_RD)

    def raw() -> None:
        new_QD = torch.empty_like(arrived_QD)
        dist.all_to_all_single(new_QD, rows_RD, back, there)
        dist.all_to_all_single(torch.empty_like(rows_RD), new_QD, there, back)

    def raw_reused() -> None:
        dist.all_to_all_single(arrived_QD, rows_RD, back, there)
        dist.all_to_all_single(out_RD, arrived_QD, there, back)

    def raw_shared() -> None:
        (new_QD,) = all_to_all([rows_RD], back, there, group).wait()
        all_to_all([new_QD], there, back, group).wait()

    def communication() -> None:
        counts = dispatcher.exchange_counts(ids_R)
        sent_counts, received_counts = counts.sum(dim=2).tolist()
        rows_QD = all_to_all_rows(rows_RD, sent_counts, received_counts, group)
        all_to_all_rows(rows_QD, received_counts, sent_counts, group)

    def permutation() -> None:
        here = local.dispatch(x_TD, weights_TK, ids_TK)
        local.combine(here.rows_RD, here)
        arrival_Q = torch.arange(len(arrived_QD)).argsort(stable=True)
        arrived_QD[arrival_Q][arrival_Q]

    def whole() -> None:
        there_and = dispatcher.dispatch(x_TD, weights_TK, ids_TK)
        dispatcher.combine(there_and.rows_RD, there_and)

    runs = raw, raw_reused, raw_shared, communication, permutation, whole
    return {run.__name__: run for run in runs}


def timed(run: Callable[[], object]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    run()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median of the ratios round by round, and ratio of the fastest rounds."""
    by_round = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {"median": round(by_round, 3), "fastest": round(min(ours) / min(theirs), 3)}


if __name__ == "__main__":
    guarded(main)
