"""What a run leaves in its log besides losses: events with their reasons, records, its own cost."""

import json

import pytest
from test_interruptions import terminate_at

from deepseek import count_parameters, load_config, open_checkpoint
from deepseek.monitoring.array_log import read_arrays
from deepseek.monitoring.run_log import read_run
from support.log_rows import all_rows
from support.micro_runs import MicroRuns

pytestmark = pytest.mark.framework


def events(micro: MicroRuns, name: str) -> list[tuple[str, int, object]]:
    rows = all_rows(micro.folder / name / "metrics.jsonl")
    return [(row["event"], row["step"], row.get("reason")) for row in rows if "event" in row]


def test_an_undisturbed_run(micro: MicroRuns, whole: str) -> None:
    assert events(micro, whole) == [
        ("started", 0, None),
        *(("checkpoint", step, None) for step in (4, 8, 12)),
        ("stopped", 12, "complete"),
    ]
    rows = all_rows(micro.folder / whole / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    # The checkpoint of a step is made before the next one, and its time is in that one's.
    assert [row["step"] for row in steps if "checkpoint_seconds" in row] == [5, 9]
    for row in steps:
        parts = ("forward_backward", "optimizer", "data", "checkpoint", "monitor")
        known = sum(row.get(f"{part}_seconds", 0.0) for part in parts)
        # Margins are measured inside the forward pass: that little is in two of the parts.
        assert 0.4 * row["seconds"] < known < 1.5 * row["seconds"]
        assert row["memory_bytes"] > 2**26 and 0 < row["mfu"] < 1
    folder = micro.folder / whole
    experts = list(read_arrays(folder / "monitor" / "experts.arrays"))
    assert [record.step for record in experts] == list(range(1, 13))
    for record, row in zip(experts, steps, strict=True):
        tokens_LE = record.arrays["tokens"].astype(int)
        assert record.meta["layers"] == ["layers.1", "mtp.0.block"]
        assert (tokens_LE.sum(axis=1) == row["tokens"] * record.meta["top_k"]).all()
        assert row["dead_experts"] == (tokens_LE == 0).sum()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["processes"] == 1 and environment["peak_flops_per_device"] > 0
    data = read_run(folder)
    counts = count_parameters(load_config(str(folder / "config.yaml")).model)
    assert (
        environment["parameters"]
        == counts.total + counts.mtp
        == sum(tensor.numel() for tensor in open_checkpoint(folder).model().parameters())
    )
    assert environment["trained_parameters"] == environment["parameters"]
    assert environment["active_parameters"] == counts.active
    (part,) = data.data_parts()
    assert part.name == str(micro.folder / "data") and part.share == 1.0
    assert part.tokens > 1000 and part.samples == (part.tokens - 1) // 32
    assert data.epochs() == {part.name: 12 * 4 / part.samples}
    goodput = data.goodput()
    assert data.experts is not None and data.ranks is not None
    assert goodput is not None and 0.2 < goodput <= 1


def test_a_stopped_and_resumed_run(micro: MicroRuns) -> None:
    micro.train("terminated", before=terminate_at("training_step", 5)).assert_stopped()
    micro.train("terminated").assert_done()
    assert events(micro, "terminated") == [
        ("started", 0, None),
        ("checkpoint", 4, None),
        ("checkpoint", 6, None),
        ("stopped", 6, "SIGTERM"),
        ("resumed", 6, None),
        *(("checkpoint", step, None) for step in (8, 12)),
        ("stopped", 12, "complete"),
    ]


def test_a_run_that_ends_by_an_error(micro: MicroRuns) -> None:
    before = (
        "from deepseek.training.step import DeepSeekModel\n"
        "step = DeepSeekModel.training_step\n"
        "def failing(self, *args):\n"
        "    if self.finished_steps == 2: raise ValueError('out of luck')\n"
        "    return step(self, *args)\n"
        "DeepSeekModel.training_step = failing\n"
    )
    assert micro.train("failed", before=before).code == 1
    assert events(micro, "failed") == [
        ("started", 0, None), ("stopped", 2, "ValueError: out of luck")]  # fmt: skip


def test_a_start_after_a_lost_rank(micro: MicroRuns) -> None:
    """As the supervisor starts it again: the environment tells the attempt."""
    before = (
        "import os\n"
        "os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_WORLD_SIZE='1',\n"
        "    MASTER_ADDR='127.0.0.1', MASTER_PORT='29599', TORCHELASTIC_RESTART_COUNT='2')\n"
    )
    micro.train("seen_again", "trainer.max_steps=2", before=before).assert_done()
    assert events(micro, "seen_again")[:2] == [("restart", 0, "restart 2"), ("started", 0, None)]


def test_monitors_leave_layers_their_fast_ways(micro: MicroRuns) -> None:
    """A module with a hook is called by itself: a layer with one is no single node of the graph."""
    before = (
        "from deepseek.models.components.feed_forward import is_watched\n"
        "from deepseek.training.step import DeepSeekModel\n"
        "step = DeepSeekModel.training_step\n"
        "def asking(self, *args):\n"
        "    watched = [name for name, x in self.model.named_modules() if is_watched(x)]\n"
        "    if watched: raise ValueError(f'hooks on {watched}')\n"
        "    return step(self, *args)\n"
        "DeepSeekModel.training_step = asking\n"
    )
    micro.train("unhooked", "trainer.max_steps=2", before=before).assert_done()
    assert (micro.folder / "unhooked" / "monitor" / "experts.arrays").exists()


def test_without_monitoring_there_are_no_records(micro: MicroRuns, whole: str) -> None:
    micro.train("seen_plain", "exp_manager.monitor.every_n_steps=0").assert_done()
    assert not (micro.folder / "seen_plain" / "monitor").exists()
    rows = all_rows(micro.folder / "seen_plain" / "metrics.jsonl")
    assert not any("dead_experts" in row for row in rows)
    wrong = micro.differences(whole, "seen_plain")
    assert all(isinstance(key, str) and key.startswith("(") for key in wrong)  # rows, no tensors


def test_tensorboard_has_the_scalars(micro: MicroRuns) -> None:
    micro.train("seen_board", "exp_manager.create_tensorboard_logger=true").assert_done()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (micro.folder / "seen_board" / "logs").rglob("events.*")}
    board = EventAccumulator(str(folder))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"loss", "mfu", "grad_norm_router", "load_max_over_mean", "val_loss"} <= tags
    assert len(tags) <= 60
    assert [scalar.step for scalar in board.Scalars("loss")] == list(range(1, 13))
