"""What the report reads from a run folder, and what it says of folders it cannot read."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek.commands.report import report
from deepseek.config.errors import UserError
from deepseek.monitoring.array_history import MOST_FRAMES, Traffic, evenly
from deepseek.monitoring.array_log import ArrayLog
from deepseek.monitoring.live import frame, plain
from deepseek.monitoring.report.expert_panels import utilisation_codes, worst_layer
from deepseek.monitoring.report.page import run_page
from deepseek.monitoring.report.panel import binned, duration, quantity, smoothed, table, thin
from deepseek.monitoring.report.rank_panels import folded, replica_counts
from deepseek.monitoring.report.run_panels import alarms_panel, headline
from deepseek.monitoring.report.training_panels import step_parts
from deepseek.monitoring.run_log import RunLog, read_run
from support.synthetic_run import GAMMA, START, SyntheticRun, write_run


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a collapse, a dead expert, a straggler and a restart."""
    run = SyntheticRun(
        steps=150, layers=12, collapsed_layer=9, dead_expert=(2, 5), straggler=3, restart_at=80
    )
    return write_run(tmp_path_factory.mktemp("runs") / "planted", run)


def test_a_run_is_read_whole(planted: Path) -> None:
    run = read_run(planted)
    assert run.label == "synthetic"
    assert run.steps["step"].tolist() == list(range(1, 151))
    assert run.lost_steps == 5
    assert run.max_steps == 150
    assert [event["kind"] for event in run.alarms()] == [
        "straggler", "router_collapse", "loss_spike"]  # fmt: skip
    assert run.experts is not None and run.ranks is not None and run.traffic is not None
    assert run.experts.layers == [*(f"layers.{n}" for n in range(1, 12)), "mtp.0.block"]
    assert run.experts.steps.tolist() == list(range(1, 151))
    assert run.experts.frames.shape == (76, 12, 16) and MOST_FRAMES == 100  # every second, the last
    assert run.experts.frame_steps[[0, -1]].tolist() == [1, 150]
    assert run.experts.bias is not None
    assert np.abs(run.experts.bias[0]).max() == pytest.approx(GAMMA)
    assert run.ranks.ranks == 4 and run.traffic.bytes_per_step.shape == (4, 4)
    assert run.notes == []


def test_the_planted_are_found(planted: Path) -> None:
    run = read_run(planted)
    assert run.experts is not None and run.ranks is not None
    assert run.experts.layers[worst_layer(run.experts)] == "layers.10"
    found = {(d.layer, d.expert): d.since for d in run.experts.dead}
    assert found.pop((2, 5)) == 51
    assert found == {(9, expert): 76 for expert in range(4, 16)}
    late = run.ranks.columns["compute_seconds"][-20:].mean(axis=0)
    assert int(late.argmax()) == 3


def test_cards_of_parameters_data_and_ends_of_alarms(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SyntheticRun(steps=20, straggler=1))
    one = {"name": "/x/corpus", "tokens": 4000, "samples": 40, "share": 1.0}
    path = folder / "environment.json"
    facts = json.loads(path.read_text()) | {
        "parameters": 14_100_000, "active_parameters": 4_100_000, "trained_parameters": 50_000,
        "data": [one],
    }  # fmt: skip
    path.write_text(json.dumps(facts))
    over = {"event": "alarm_over", "step": 17, "kind": "straggler", "rank": 1, "since": 5}
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps(over) + "\n")
    run = read_run(folder)
    cards = {card.label: (card.value, card.below) for card in headline(run)}
    batch = run.setting("model.global_batch_size")
    assert cards["parameters"] == ("14.1 M", "4.10 M active per token, 50.0 k trained")
    assert cards["data"] == ("4.00 k", f"tokens of corpus, {20 * batch / 40:.2f} epochs")
    body = alarms_panel(run).body
    assert '<td class="num">17</td><td >straggler</td>' in body
    assert body.count("20, the run ended") == len(run.alarms()) - 1 > 0
    facts["data"] = [one | {"share": 0.25}, one | {"name": "b", "share": 0.75}]
    path.write_text(json.dumps(facts))
    (data,) = (card for card in headline(read_run(folder)) if card.label == "data")
    most = 20 * batch * 0.75 / 40
    assert data.below == f"tokens of 2 prefixes, {most:.2f} epochs of the one read most"


def test_numbers_without_measure_are_not_logged(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SyntheticRun(steps=20))
    huge = 10**400
    facts = {"parameters": huge, "active_parameters": huge, "flops_per_token": huge,
             "peak_flops_per_device": huge, "processes": huge,
             "data": [{"name": "x", "tokens": huge, "samples": huge, "share": 1.0}]}  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(facts))
    row = {"step": 20, "count": huge, "bytes": "x", "p50": None, "op": []}
    (folder / "monitor" / "collectives.jsonl").write_text(json.dumps(row) + "\n")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": huge, "loss": 1.0}) + "\n")
        log.write(json.dumps({"step": 21, "loss": huge, "time": huge}) + "\n")
    run = RunLog(folder)
    assert run.step == 21 and len(run.damaged_lines) == 1
    assert "collectives at step 20" in plain(frame(run), 200)
    run_page([run])


def test_goodput_is_the_time_of_kept_steps(planted: Path) -> None:
    run = read_run(planted)
    rows = [json.loads(line) for line in (planted / "metrics.jsonl").read_text().splitlines()]
    kept = {row["step"]: row["seconds"] for row in rows if "loss" in row}
    times = [row["time"] for row in rows if "time" in row]
    assert run.goodput() == pytest.approx(sum(kept.values()) / (max(times) - min(times)))


def test_what_is_read_on_is_what_is_read_at_once(tmp_path: Path) -> None:
    """Byte by byte through a log with a restart, in which five steps come twice."""
    write_run(tmp_path / "run", SyntheticRun(steps=30, restart_at=20, log_every=5))
    path = tmp_path / "run" / "metrics.jsonl"
    data = path.read_bytes()
    path.write_bytes(b"")
    run = RunLog(tmp_path / "run")
    assert run.steps == {} and run.step == 0 and run.goodput() is None
    chance = np.random.default_rng(0)
    while path.stat().st_size < len(data):
        size = path.stat().st_size
        path.write_bytes(data[: size + int(chance.integers(1, 700))])
        news = b"\n" in data[size : path.stat().st_size]
        assert run.update() == news
    whole = read_run(tmp_path / "run")
    for name in ("steps", "validations"):
        found, wanted = getattr(run, name), getattr(whole, name)
        assert list(found) == list(wanted)
        for column in wanted:
            np.testing.assert_array_equal(found[column], wanted[column])
    assert (run.events, run.lost_steps) == (whole.events, whole.lost_steps)
    assert (run.goodput(), run.state(START)) == (whole.goodput(), whole.state(START))


def test_steps_that_a_restart_will_train_again_are_lost(tmp_path: Path) -> None:
    rows = [
        *({"step": step, "loss": float(step), "time": 100.0 + step} for step in range(1, 9)),
        {"step": 8, "val_loss": 8.0, "val_bits_per_byte": None},
        {"event": "resumed", "step": 4, "time": 200.0},
        {"step": 5, "loss": 50.0, "time": 201.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert run.steps["loss"].tolist() == [1, 2, 3, 4, 50]
    assert run.lost_steps == 4 and run.validations == {}
    with open(path, "a") as file:
        file.write('{"step": 8, "val_loss": 7.0}\n')
    assert run.update() and run.validations["val_loss"].tolist() == [7.0]
    with open(path, "a") as file:
        file.write('{"step": 1, "loss": 9.0}\n')
    assert run.update() and run.steps["loss"].tolist() == [9.0] and run.validations == {}


def test_a_folder_in_which_another_run_has_begun(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 9)))
    run = RunLog(tmp_path)
    path.write_text('{"step": 1, "loss": 2.0}\n')
    assert run.update() and run.steps["loss"].tolist() == [2.0] and run.lost_steps == 0


def test_a_restart_changes_the_configuration(tmp_path: Path) -> None:
    write_run(tmp_path, SyntheticRun(steps=3))
    run = RunLog(tmp_path)
    assert (run.max_steps, run.state()) == (3, "complete")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("max_steps: 3", "max_steps: 9"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "resumed", "step": 3, "time": START + 100}) + "\n")
    run.update()
    assert (run.max_steps, run.state(START + 120)) == (9, "running")


def test_damaged_lines_do_not_end_a_live_view(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n\0\0\n{"step": 2}\n')
    run = RunLog(tmp_path)
    assert run.step == 2 and run.damaged_lines == [2]


def test_collectives_are_read_on_and_damage_is_noted(tmp_path: Path) -> None:
    write_run(tmp_path, SyntheticRun(steps=3))
    run = read_run(tmp_path)
    count = len(run.collectives)
    with open(tmp_path / "monitor" / "collectives.jsonl", "a") as file:
        file.write('{"step": 4, "group": "ep"}\n{"st')
    assert len(run.collectives) == count + 1 and run.notes == []
    with open(tmp_path / "monitor" / "collectives.jsonl", "a") as file:
        file.write("\n")
    assert run.notes == [f"collectives.jsonl: line {count + 2} is damaged and left out"]


def test_goodput_leaves_a_pause_out(tmp_path: Path) -> None:
    """A killed run repeats five steps; the pause after its end is no wall time."""
    run = write_run(tmp_path / "run", SyntheticRun(steps=60, restart_at=40, with_monitor=False))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "resumed", "step": 60, "time": START + 10_000}) + "\n")
        more = {"step": 61, "loss": 2.0, "seconds": 1.0, "time": START + 10_004}
        file.write(json.dumps(more) + "\n")
    found = read_run(run).goodput()
    assert found is not None and 0.5 < found < 0.9


def test_a_pause_after_a_stop_is_no_wall_time(tmp_path: Path) -> None:
    rows = [
        {"event": "started", "step": 0, "time": 100.0},
        {"step": 1, "loss": 2.0, "seconds": 8.0, "time": 110.0},
        {"event": "stopped", "step": 1, "time": 110.0},
        {"event": "resumed", "step": 1, "time": 1000.0},
        {"step": 2, "loss": 2.0, "seconds": 8.0, "time": 1010.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert run.wall_seconds() == 20.0
    assert run.goodput() == 0.8


def test_parts_of_a_step_add_up_to_the_step(planted: Path) -> None:
    run = read_run(planted)
    parts = step_parts(run)
    assert set(parts) == {
        "data", "compute", "wait", "transfer", "optimizer", "checkpoint", "monitor", "other",
    }  # fmt: skip
    assert all((values >= 0).all() for values in parts.values())
    np.testing.assert_allclose(np.sum(list(parts.values()), axis=0), run.steps["seconds"])


def test_rows_of_an_older_run_are_enough(tmp_path: Path) -> None:
    row = {"step": 1, "loss": "nan", "mtp_loss": None, "grad_norm": 1.0, "lr": 0.1, "tokens": 8}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n" + '{"step": 2, "lo')
    run = read_run(tmp_path)
    assert run.steps["step"].tolist() == [1]
    assert run.column("loss") is None and run.column("mfu") is None
    assert run.label == tmp_path.name
    assert step_parts(run) == {} and run.goodput() is None
    report([tmp_path], tmp_path / "r.html")


def test_reading_needs_no_torch(planted: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom deepseek.commands.report import report\n"
        f"report([Path({str(planted)!r})], Path({str(planted / 'r.html')!r}))\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder: it has no metrics.jsonl; give the fold"):
        report([tmp_path / "nowhere"])


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="needs a run folder: deepseek report RUN"):
        report([])


@pytest.mark.parametrize("text", ["", '{"event": "started", "step": 0}\n', '{"step": 1, "loss":'])
def test_a_log_without_a_step_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="holds no step yet; its first row is written after"):
        report([tmp_path])


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"loss": 1.0}', "\x00\x00"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n')
    with pytest.raises(UserError, match=r"line 2 is damaged.*take the line out \(sed -i 2d"):
        report([tmp_path])


def test_a_damaged_environment_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(UserError, match="environment.json is damaged.*remove it"):
        report([tmp_path])


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        report([tmp_path])


def test_an_array_log_that_is_none_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, SyntheticRun(steps=3))
    (tmp_path / "monitor" / "experts.arrays").write_bytes(b"no log at all" * 9)
    with pytest.raises(UserError, match="117 bytes without one whole record; move it away"):
        report([tmp_path])


def test_a_damaged_record_is_noted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, SyntheticRun(steps=9))
    path = tmp_path / "monitor" / "experts.arrays"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    run = read_run(tmp_path)
    assert run.experts is not None and run.experts.steps.tolist() == list(range(1, 9))
    assert run.notes == [
        "experts.arrays: 1 of 9 records are damaged and left out (the first at step 9)"
    ]
    page = report([tmp_path]).read_text()
    assert "1 of 9 records are damaged" in page
    assert "note         synthetic: experts.arrays: 1 of 9" in capsys.readouterr().out


def test_records_of_another_shape_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path, SyntheticRun(steps=4))
    log = ArrayLog(tmp_path / "monitor" / "experts.arrays")
    log.append(5, {"tokens": np.ones((2, 8), np.uint32)}, layers=["a", "b"], ep=1)
    run = read_run(tmp_path)
    assert run.experts is not None and run.experts.layers == ["a", "b"]
    assert "4 records have another number of layers or experts" in run.notes[0]


def test_a_page_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", SyntheticRun(steps=3))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*choose another file with --output"):
        report([tmp_path / "run"], tmp_path / "file" / "report.html")
    target = report([tmp_path / "run"], tmp_path / "new" / "report.html")
    before = target.read_bytes()

    def full_disk(stream: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("deepseek.files.sync", full_disk)
    with pytest.raises(UserError, match="cannot write .*No space left on device; choose"):
        report([tmp_path / "run"], target)
    assert target.read_bytes() == before and list(target.parent.iterdir()) == [target]


def test_a_missing_plotly_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, SyntheticRun(steps=3))
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match="plotly, which is not installed: pip install plotly"):
        report([tmp_path])


# -- helpers of the panels --


def test_thinning_keeps_extremes_ends_and_gaps() -> None:
    y = np.sin(np.arange(20_000) / 300)
    y[7_777], y[12_000], y[500:900] = 9.0, -9.0, np.nan
    x, thinned = thin(np.arange(20_000), y, 600)
    assert len(x) <= 620 and x[0] == 0 and x[-1] == 19_999
    assert np.nanmax(thinned) == 9.0 and np.nanmin(thinned) == -9.0
    assert np.isnan(thinned).any() and (np.diff(x) > 0).all()


def test_smoothing_weighs_both_sides() -> None:
    values = np.random.default_rng(0).random(60)
    values[10] = np.nan
    for at, found in enumerate(smoothed(values, 4.0)):
        pairs = [(v, 0.5 ** (abs(i - at) / 4)) for i, v in enumerate(values) if np.isfinite(v)]
        pairs += [(values[at], 1.0)] if np.isfinite(values[at]) else []  # the middle is in both
        expected = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
        assert found == pytest.approx(expected)


def test_bins_are_means_of_what_is_known() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan])
    np.testing.assert_array_equal(binned(values, 3), [2.0, 5.0, np.nan])
    np.testing.assert_array_equal(binned(values[:2], 3), [1.0, 3.0])
    many = np.random.default_rng(0).random(1000)  # what a longer log adds changes the end alone
    assert [len(binned(many[:n], 300)) for n in (300, 301, 601)] == [300, 151, 151]
    np.testing.assert_array_equal(binned(many, 300)[:200], binned(many[:801], 300)[:200])
    assert evenly(10, 5) == [0, 4, 8, 9] and evenly(3, 5) == [0, 1, 2] and evenly(0, 5) == []


def test_codes_hold_the_utilisation() -> None:
    tokens = np.array([[0, 10, 20, 40, 10], [0, 0, 0, 0, 0]], np.uint32)
    codes = utilisation_codes(tokens)
    assert codes[0, 0] == 0 and (codes[1] == 255).all()
    decoded = 2 ** (-3 + 6 * (codes[0, 1:].astype(float) - 1) / 253)
    np.testing.assert_allclose(decoded, tokens[0, 1:] / 16, rtol=0.009)


def test_traffic_of_many_ranks_is_folded() -> None:
    matrix = np.random.default_rng(0).random((512, 512))
    by_node, unit = folded(Traffic(matrix, 1, [rank // 8 for rank in range(512)], None))
    assert unit == "node" and by_node.shape == (64, 64)
    assert by_node[1, 2] == pytest.approx(matrix[8:16, 16:24].sum())
    blocks, unit = folded(Traffic(matrix, 1, None, None))
    assert unit == "block of 2 ranks" and blocks.sum() == pytest.approx(matrix.sum())


def test_replica_counts_are_multiples_of_the_ranks() -> None:
    assert replica_counts(256, 64) == [0, 64, 128]
    assert replica_counts(64, 8) == [0, 8, 16, 24, 32]
    assert replica_counts(4, 4) == [0, 4]
    assert len(replica_counts(256, 2)) == 9


def test_numbers_are_written_for_people() -> None:
    assert [quantity(v, "B") for v in (0, 999, 12_345, 6.2e10)] == [
        "0 B", "999 B", "12.3 kB", "62.0 GB"]  # fmt: skip
    assert [quantity(v, "s") for v in (4.18e-3, 2e-6, 1.5, None)] == [
        "4.18 ms", "2.00 µs", "1.50 s", "not logged"]  # fmt: skip
    assert [duration(s) for s in (7.31, 250, 7500, 100_000, None)] == [
        "7.3 s", "4 min 10 s", "2 h 05 min", "1 d 3 h", "not logged"]  # fmt: skip


def test_a_table_is_escaped() -> None:
    assert "<script>" not in table(["a"], [["<script>alert(1)</script>"]])
