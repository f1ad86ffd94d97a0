"""``collectives.jsonl``: every number of a row equals loops over the calls, one by one.

The calls are planted, each with the moment at which each rank came and the one at which all were
done, so that nothing depends on how long this machine takes.
"""

import statistics
from datetime import timedelta

import numpy as np
import pytest

from deepseek.config.layout import Layout
from deepseek.monitoring.record.rank_monitor import _row
from deepseek.monitoring.record.recorder import NUMBERS, CommunicationRecorder, Kind, _Call
from deepseek.parallel.mesh import Meshes
from support.ranks import run_ranks

RANKS, STEP_SECONDS = 4, 2.0
OPERATIONS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


def calls(operation: str) -> list[list[tuple[int, float, float, bool]]]:
    """[call][rank]: bytes given, arrival, end, exposed. Ranks come up to 40 ms apart."""
    rng = np.random.default_rng(OPERATIONS.index(operation))
    found = []
    for call in range(25):
        size = int(rng.integers(1, 1000)) * 64
        arrivals = call + 0.04 * rng.random(RANKS)
        end = arrivals.max() + 0.001 + 0.01 * rng.random()
        exposed = bool(rng.random() < 0.7)
        # Uneven only where the operation allows it.
        sizes = [size + 8 * r * (operation == "all_to_all") for r in range(RANKS)]
        found.append([(sizes[r], float(arrivals[r]), float(end), exposed) for r in range(RANKS)])
    return found


def planted(rank: int) -> tuple[str, dict[str, np.ndarray]]:
    meshes = Meshes(Layout(dp_shard=RANKS, ep=RANKS), "cpu", timedelta(seconds=60))
    recorder = CommunicationRecorder(meshes)
    name = meshes.names("all_to_all")[meshes.ep]
    for operation in OPERATIONS:
        for call in calls(operation):
            size, begin, end, exposed = call[rank]
            recorder._calls[Kind(name, operation)].append(_Call(size, exposed, [(begin, end)]))
    summary = recorder.summary()
    return name, {op: summary.numbers[Kind(name, op)] for op in OPERATIONS}


@pytest.fixture(scope="module")
def summaries() -> list[tuple[str, dict[str, np.ndarray]]]:
    return run_ranks(RANKS, planted)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_equals_its_oracle(
    summaries: list[tuple[str, dict[str, np.ndarray]]], operation: str
) -> None:
    name = summaries[0][0]
    numbers_RN = np.array([numbers[operation] for _, numbers in summaries])
    # Two more ranks that had no such call: they take no part in any number.
    numbers_RN = np.concatenate([numbers_RN, np.zeros((2, len(NUMBERS)))])
    row = _row(7, Kind(name, operation), numbers_RN, STEP_SECONDS)
    listed = calls(operation)
    seconds = [[end - begin for _, begin, end, _ in call] for call in listed]
    transfers = [min(own) for own in seconds]
    of_rank = [sorted(call[rank] for call in seconds) for rank in range(RANKS)]
    assert (row["step"], row["group"], row["op"]) == (7, name, operation)
    assert row["count"] == 25
    assert row["bytes"] == sum(size for call in listed for size, *_ in call)
    assert row["p50"] == pytest.approx(statistics.median(own[12] for own in of_rank))
    p95 = [own[22] + 0.8 * (own[23] - own[22]) for own in of_rank]  # 0.95 of the way to the 25th
    assert row["p95"] == pytest.approx(max(p95))
    assert row["max"] == pytest.approx(max(map(max, seconds)))
    whole = sum(transfers)
    assert row["transfer_seconds"] == pytest.approx(whole)
    waited = sum(own - transfers[i] for i, call in enumerate(seconds) for own in call) / RANKS
    assert row["wait_seconds"] == pytest.approx(waited)
    exposed = sum(
        own
        for call, times in zip(listed, seconds, strict=True)
        for own, (*_, is_exposed) in zip(times, call, strict=True)
        if is_exposed
    )
    assert row["exposed_share"] == pytest.approx(exposed / RANKS / STEP_SECONDS)
    # As nccl-tests: the size of an operation is the largest buffer of a rank.
    given = sum(size for call in listed for size, *_ in call) / RANKS
    size = given * (RANKS if operation == "all_gather" else 1)
    assert row["algbw"] == pytest.approx(size / whole)
    wires = 2 if operation == "all_reduce" else 1
    assert row["busbw"] == pytest.approx(size / whole * wires * (RANKS - 1) / RANKS)
