"""docs/monitoring.md names every key that is written, and the thresholds that are in force."""

import json
import re
from pathlib import Path

import pytest

import deepseek
from deepseek.monitoring.array_log import read_arrays
from deepseek.monitoring.record import alarms as detectors
from deepseek.monitoring.record import expert_monitor as router_margin
from deepseek.monitoring.record.alarms import detectors as all_detectors
from deepseek.monitoring.record.metrics_log import SCALARS
from support.log_rows import all_rows
from support.micro_runs import MicroRuns

pytestmark = pytest.mark.framework

GUIDE = (Path(deepseek.__file__).parent / "docs" / "monitoring.md").read_text()
NAMED = set(re.findall(r"`([a-z0-9_]+)`", GUIDE))


def keys(path: Path) -> set[str]:
    return {key for row in all_rows(path) for key in row}


def test_every_key_that_is_written_is_named(micro: MicroRuns, whole: str) -> None:
    folder = micro.folder / whole
    written = keys(folder / "metrics.jsonl") | SCALARS
    assert len(written) > 30
    written |= json.loads((folder / "environment.json").read_text()).keys()
    for name in ("experts", "ranks"):
        record = next(read_arrays(folder / "monitor" / f"{name}.arrays"))
        written |= record.arrays.keys() | set(record.meta.get("columns", []))
    assert written - NAMED == set()


def test_every_key_of_several_processes_is_named(micro: MicroRuns) -> None:
    from support.forked import FORK_WORKERS

    micro.train(
        "guide", "trainer.max_steps=2", "trainer.devices=2", "model.expert_model_parallel_size=2",
        before=FORK_WORKERS,
    ).assert_done()  # fmt: skip
    folder = micro.folder / "guide"
    written = keys(folder / "metrics.jsonl") | keys(folder / "monitor" / "collectives.jsonl")
    assert "all_to_all_seconds" in written and "busbw" in written
    written |= next(read_arrays(folder / "monitor" / "traffic.arrays")).arrays.keys()
    assert written - NAMED == set()


def test_alarms_and_their_thresholds() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]*) \|", GUIDE.split("## Alarms")[1], re.M))
    kinds = {re.match(r"``(\w+)``", type(d).__doc__ or "").group(1) for d in all_detectors()}  # type: ignore[union-attr]
    assert rows.pop("kind").strip() == "raised when"
    assert rows.keys() == kinds
    numbers = {
        "router_collapse": (100 * detectors.COLLAPSED_SHARE, detectors.COLLAPSED_RECORDS),
        "dead_experts": (detectors.DEAD_RECORDS, detectors.DEAD_MISSED),
        "straggler": (
            detectors.STRAGGLER_RATIO, detectors.STRAGGLER_SECONDS, detectors.STRAGGLER_RECORDS),
        "loss_spike": (
            detectors.SPIKE_SIGMA, detectors.SPIKE_NATS, detectors.SPIKE_WINDOW,
            detectors.SPIKE_LEAST),
        "non_finite": (detectors.CALM_STEPS,),
        "memory_creep": (
            detectors.CREEP_BLOCKS, detectors.CREEP_RECORDS, 100 * detectors.CREEP_SHARE,
            detectors.CREEP_BYTES / 2**20),
    }  # fmt: skip
    for kind, wanted in numbers.items():
        found = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", rows[kind])]
        assert found == list(wanted), kind
    assert f"over {router_margin.MARGIN_TOKENS} tokens" in GUIDE
