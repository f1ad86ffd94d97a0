"""The recorder counts every byte that passes between ranks, tells waiting from transfer, and leaves
no trace: neither in the numbers of a model nor in torch."""

import time
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from deepseek.config.layout import Layout
from deepseek.models.components.router import Router
from deepseek.monitoring.record.recorder import (
    NUMBERS,
    OPERATIONS,
    SEND_RECV,
    CommunicationRecorder,
    Kind,
    Summary,
    _percentiles,
)
from deepseek.parallel.mesh import Meshes
from support.layouts import Case, batches, small_config, spread
from support.ranks import run_in_turn, run_ranks

BYTES, COUNT = NUMBERS.index("bytes"), NUMBERS.index("count")
SECONDS, TRANSFER = NUMBERS.index("seconds"), NUMBERS.index("transfer_seconds")


def functions() -> list[Any]:
    return [getattr(dist, name, None) for name in OPERATIONS] + [
        dist.batch_isend_irecv,
        getattr(schedules, "_batch_p2p", None),
    ]


# -- calls made by hand --


def by_hand(rank: int) -> Summary:
    meshes = Meshes(Layout(dp_shard=4, ep=2), "cpu", timedelta(seconds=60))
    recorder = CommunicationRecorder(meshes)
    before = functions()
    dist.all_reduce(torch.zeros(999), group=meshes.data)  # not recorded
    recorder.start()
    assert functions() != before
    dist.all_reduce(torch.zeros(10), group=meshes.data)
    dist.all_reduce(torch.zeros(6, dtype=torch.float64), group=meshes.data)
    # EP groups are (0, 1) and (2, 3). Rank r sends r + 1 rows of 5 floats home and 2 r abroad.
    even = rank % 2 == 0
    counts = [rank + 1, 2 * rank] if even else [2 * rank, rank + 1]
    other = rank + 1 if even else rank - 1
    received = [rank + 1, 2 * other] if even else [2 * other, rank + 1]
    rows, out = torch.ones(sum(counts), 5), torch.empty(sum(received), 5)
    dist.all_to_all_single(out, rows, received, counts, group=meshes.ep)
    integers = torch.zeros(4, dtype=torch.int64)
    dist.all_to_all_single(integers, integers.clone(), group=meshes.ep)  # counts are no rows
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(torch.empty(8), torch.ones(2), group=meshes.data)
    recorder.stop()
    assert functions() == before
    dist.all_reduce(torch.zeros(999), group=meshes.data)
    return recorder.summary()


def test_bytes_and_counts_of_calls_made_by_hand() -> None:
    for rank, summary in enumerate(run_ranks(4, by_hand)):
        found = {(k.group, k.operation): n for k, n in summary.numbers.items()}
        # torch makes one group of data, stage and world here, or three: all of the same ranks.
        reduced = [n for (group, op), n in found.items() if op == "all_reduce"]
        assert sum(n[COUNT] for n in reduced) == 2
        assert sum(n[BYTES] for n in reduced) == 10 * 4 + 6 * 8
        assert found["ep", "all_to_all"][COUNT] == 2
        assert found["ep", "all_to_all"][BYTES] == (rank + 1 + 2 * rank) * 20 + 4 * 8
        assert sum(n[BYTES] for (_, op), n in found.items() if op == "all_gather") == 8
        wanted = np.zeros(2, np.int64)
        wanted[1 - rank % 2] = 2 * rank * 20
        assert summary.expert_bytes.tolist() == wanted.tolist()
        assert summary.row_bytes == 20


LATE = 0.4  # far above what a busy machine takes away from a rank


def late(rank: int) -> tuple[float, float]:
    meshes = Meshes(Layout(dp_shard=3), "cpu", timedelta(seconds=60))
    recorder = CommunicationRecorder(meshes)
    dist.barrier()
    recorder.start()
    for _ in range(3):
        if rank == 1:
            time.sleep(LATE)
        dist.all_reduce(torch.zeros(1000), group=meshes.data)
    recorder.stop()
    (numbers,) = recorder.summary().numbers.values()
    return float(numbers[SECONDS]), float(numbers[TRANSFER])


def test_waiting_for_a_late_rank_is_told_from_transfer() -> None:
    results = run_ranks(3, late)
    waits = [seconds - transfer for seconds, transfer in results]
    assert waits[0] > 2 * LATE and waits[2] > 2 * LATE  # of three times
    assert waits[1] < LATE
    transfers = [transfer for _, transfer in results]
    assert max(transfers) == min(transfers) < LATE  # the same call by call, so the same in sum


def waits_for_stage(rank: int, case: Case) -> tuple[float, float]:
    """Seconds that this stage has sent and received, and that it has slept."""
    driven = spread(case)
    recorder = CommunicationRecorder(driven.meshes)  # type: ignore[arg-type]
    driven.run([next(iter(batches(case)))])
    slept = 0.0

    def sleep(*_: Any) -> None:
        nonlocal slept
        time.sleep(0.1)
        slept += 0.1

    if rank == 1:  # the last stage is slow
        for module in driven.module.model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(sleep)
    recorder.start()
    driven.run([next(iter(batches(case)))])
    recorder.stop()
    return float(recorder.summary().numbers[Kind("pp", SEND_RECV)][SECONDS]), slept


def test_a_stage_that_waits_for_another_is_not_computing() -> None:
    case = Case(small_config(pipeline_model_parallel_size=2, micro_batch_size=2), 2)
    assert not case.problems()
    fast, slow = run_ranks(2, waits_for_stage, case)
    assert slow[1] > 0.5 and fast[1] == 0
    assert fast[0] > 0.5 * slow[1]
    assert slow[0] < 0.5 * fast[0]


# -- a model --


def recorded(rank: int, case: Case) -> tuple[Summary, dict[tuple[int, int], int]]:
    """A step's summary, and rows by (source, destination) as the routers have chosen."""
    driven = spread(case)
    meshes: Any = driven.meshes
    chosen = []
    for router in driven.module.model.routers().values():
        router.register_forward_hook(lambda m, a, routing: chosen.append(routing.expert_ids_TK))
    recorder = CommunicationRecorder(meshes)
    recorder.start()
    driven.run([next(iter(batches(case)))])
    recorder.stop()
    per_rank = case.config.n_routed_experts // case.layout.ep
    ranks = dist.get_process_group_ranks(meshes.ep)
    rows = {(rank, other): 0 for other in range(case.world)}
    for expert in torch.cat([ids.flatten() for ids in chosen]).tolist():
        rows[rank, ranks[expert // per_rank]] += 1
    return recorder.summary(), rows


@pytest.mark.parametrize("fp8", [False, True])
def test_rows_of_experts_are_counted_exactly(fp8: bool) -> None:
    """Two journeys forward, two backward: to the expert, home, and both again for the gradients."""
    config = small_config(expert_model_parallel_size=2, micro_batch_size=2, moe_dispatch_fp8=fp8)
    case = Case(config, 4)
    assert not case.problems()
    results = run_ranks(4, recorded, case)
    rows: dict[tuple[int, int], int] = {}
    for _, own in results:
        rows |= own
    config = case.config
    row_bytes = (config.hidden_size + 1) * 8  # with its routing weight
    home = row_bytes + config.hidden_size * 8
    there = 2 * (config.hidden_size + 1) + 8 if fp8 else home
    layers, micro_batches = 4, config.global_batch_size // (4 * config.micro_batch_size)
    assert sum(rows.values()) == config.global_batch_size * 8 * 2 * layers  # tokens, K, layers
    for rank, (summary, _) in enumerate(results):
        for place, sent in enumerate(summary.expert_bytes):
            other = rank // 2 * 2 + place
            wanted = rows[rank, other] * there + rows[other, rank] * home
            assert sent == (0 if other == rank else wanted)
        (numbers,) = [n for k, n in summary.numbers.items() if k.operation == "all_to_all"]
        # Two forward, two backward, one of the counts of each expert.
        assert numbers[COUNT] == 5 * layers * micro_batches
        sent = sum(rows[rank, to] * there + rows[to, rank] * home for to in range(4))
        assert numbers[BYTES] == sent + layers * micro_batches * config.n_routed_experts * 8
        assert summary.row_bytes == row_bytes


def test_rows_that_travel_by_machine_are_told_by_rank() -> None:
    """To the one that stands there as this one does, and to the others of this machine."""
    config = small_config(expert_model_parallel_size=4, moe_ranks_per_node=2)
    found = [summary.expert_bytes for summary, _ in run_ranks(4, recorded, Case(config, 4))]
    for rank, sent in enumerate(found):
        assert [place for place in range(4) if sent[place]] == sorted({rank ^ 1, rank ^ 2})
        # There once and home once, forward and backward: both send as much.
        assert sent[rank ^ 1] == found[rank ^ 1][rank] and sent[rank ^ 2] == found[rank ^ 2][rank]


def pipelined(rank: int, case: Case) -> Summary:
    driven = spread(case)
    recorder = CommunicationRecorder(driven.meshes)  # type: ignore[arg-type]
    recorder.start()
    driven.run([next(iter(batches(case)))])
    recorder.stop()
    return recorder.summary()


@pytest.mark.parametrize(
    ("schedule", "crossings"),
    [("1F1B", 1), ("GPipe", 1), ("DualPipeV", 2)],  # a V crosses twice: down and up
)
def test_what_stages_exchange_is_counted_exactly(schedule: str, crossings: int) -> None:
    config = small_config(pipeline_model_parallel_size=2, pipeline_schedule=schedule)
    case = Case(config, 2)
    assert not case.problems()
    activations = config.micro_batch_size * config.data.seq_length * config.hidden_size * 8
    for summary in run_ranks(2, pipelined, case):
        numbers = summary.numbers[Kind("pp", SEND_RECV)]
        assert numbers[BYTES] == crossings * config.global_batch_size * activations


def test_sequences_gathered_for_tensor_parallelism_are_seen() -> None:
    case = Case(small_config(tensor_model_parallel_size=2), 2)
    for summary in run_ranks(2, pipelined, case):
        found = {(k.group.split("+")[0], k.operation): n[BYTES] for k, n in summary.numbers.items()}
        assert found["tp", "all_gather"] > 0 and found["tp", "reduce_scatter"] > 0


def with_and_without(rank: int, case: Case) -> list[str]:
    """Names of tensors that differ in one bit."""
    plain, watched = spread(case), spread(case)
    recorder = CommunicationRecorder(watched.meshes)  # type: ignore[arg-type]
    for batch in batches(case):
        plain.run([batch])
        recorder.start()
        watched.run([batch])
        recorder.stop()
        recorder.summary()
    a, b = plain.tensors(), watched.tensors()
    assert a.keys() == b.keys() and len(a) > 50
    local = {name: getattr(t, "to_local", lambda t=t: t)() for name, t in a.items()}
    other = {name: getattr(t, "to_local", lambda t=t: t)() for name, t in b.items()}
    return [name for name in a if not torch.equal(local[name], other[name])]


def test_recording_changes_no_bit() -> None:
    layouts: list[dict[str, Any]] = [
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "num_hidden_layers": 2},
        {"expert_model_parallel_size": 2, "num_hidden_layers": 2},
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "DualPipeV"},
    ]
    cases = [Case(small_config(global_batch_size=4, **sizes), 2) for sizes in layouts]
    assert not any(case.problems() for case in cases)
    assert run_in_turn(2, with_and_without, cases) == [[[], []]] * len(cases)


def test_starting_twice_and_stopping_twice_is_harmless() -> None:
    def work(rank: int) -> int:
        meshes = Meshes(Layout(dp_shard=2), "cpu", timedelta(seconds=60))
        recorder, before = CommunicationRecorder(meshes), functions()
        recorder.stop()
        recorder.start()
        recorder.start()
        dist.all_reduce(torch.zeros(1), group=meshes.data)
        recorder.stop()
        recorder.stop()
        assert functions() == before
        return sum(int(n[COUNT]) for n in recorder.summary().numbers.values())

    assert run_ranks(2, work) == [1, 1]


def test_kinds_hold_whatever_is_found() -> None:
    case = Case(small_config(pipeline_model_parallel_size=2, expert_model_parallel_size=2), 4)

    def work(rank: int) -> list[Kind]:
        driven = spread(case)
        recorder = CommunicationRecorder(driven.meshes)  # type: ignore[arg-type]
        recorder.start()
        driven.run([next(iter(batches(case)))])
        recorder.stop()
        kinds = recorder.kinds()
        assert set(recorder.summary().numbers) <= set(kinds)
        return kinds

    kinds = run_ranks(4, work)
    assert all(kinds[0] == other for other in kinds)  # one table for all ranks


@pytest.mark.parametrize("number", [1, 2, 3, 20, 21, 153])
def test_percentiles_are_those_of_numpy(number: int) -> None:
    values = np.random.default_rng(number).random(number)
    wanted = np.percentile(values, [0, 50, 95, 100])
    np.testing.assert_allclose(_percentiles(values, (0, 50, 95, 100)), wanted, rtol=1e-12)
