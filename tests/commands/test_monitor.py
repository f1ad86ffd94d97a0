"""``deepseek monitor``: frames and pages from the log alone, also while the run goes on."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deepseek.cli import app
from deepseek.commands import monitor as monitor_module
from deepseek.commands.monitor import ReportServer, monitor
from deepseek.config.errors import UserError
from deepseek.monitoring.array_log import ArrayLog
from deepseek.monitoring.live import frame, plain, sparkline, strip
from deepseek.monitoring.record.metrics_log import MetricsLog
from deepseek.monitoring.report.patch import difference, patched
from deepseek.monitoring.run_log import RunLog
from support.chromium import Chromium, find_chromium

NOW = 1_700_000_000.0
COLUMNS = ["compute_seconds", "wait_seconds", "transfer_seconds", "memory_bytes"]


def row(step: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": step, "loss": 10 - step / 10, "mtp_loss": None, "grad_norm": 1.25,
        "grad_norm_dense": 1.0, "grad_norm_expert": 0.7, "grad_norm_router": 0.1, "lr": 3e-4,
        "seconds": 2.0, "time": NOW + 2 * step, "tokens_per_second": 4096.0, "mfu": 0.41,
        "forward_backward_seconds": 1.5, "optimizer_seconds": 0.2, "data_seconds": 0.02,
        "monitor_seconds": 0.01, "memory_bytes": 3 * 2**30, "all_to_all_seconds": 0.3}  # fmt: skip
    return values | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 40 of 100 steps, 12 layers, 2 EP ranks; layers.5 uses two experts alone."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: tiny\ntrainer:\n  max_steps: 100\n")
    log = MetricsLog(run / "metrics.jsonl")
    log.write({"event": "started", "step": 0, "time": NOW})
    for step in range(1, 41):
        log.write(row(step))
    log.write({"step": 40, "val_loss": 6.125, "val_bits_per_byte": 1.5})
    tokens_LE = np.full((12, 16), 32, np.uint32)
    tokens_LE[4] = 0
    tokens_LE[4, :2] = 256
    experts = ArrayLog(run / "monitor" / "experts.arrays")
    layers = [f"layers.{i}" for i in range(1, 13)]
    for step in (39, 40):
        experts.append(step, {"tokens": tokens_LE * (step - 38)}, layers=layers, ep=2, top_k=2)
    ranks = np.array([[1.0, 0.5, 0.25, 2**30], [1.5, 0.0, 0.25, 2**31]], np.float32)
    ArrayLog(run / "monitor" / "ranks.arrays").append(40, {"ranks": ranks}, columns=COLUMNS)
    call = {
        "group": "ep", "op": "all_to_all", "count": 60, "bytes": 2**20, "p50": 0.001, "p95": 0.002,
        "max": 0.00325, "algbw": 4e9, "busbw": 2e9, "wait_seconds": 0.125,
        "transfer_seconds": 0.06, "exposed_share": 0.15}  # fmt: skip
    with open(run / "monitor" / "collectives.jsonl", "w") as file:
        for step in (39, 40):
            file.write(json.dumps({"step": step} | call) + "\n")
    return run


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def drawn(run: RunLog, now: float = NOW + 81) -> str:
    return plain(frame(run, now, 100), 100)


def test_a_frame_has_what_the_log_says(folder: Path) -> None:
    text = drawn(RunLog(folder))
    assert all(len(line) <= 100 for line in text.splitlines())
    found = words(text)
    for part in (
        "tiny step 40 / 100 running goodput 100.0% about 2:00 left",
        "loss 6.0000 █",
        "grad norm 1.250",
        "of it dense 1.000, expert 0.700, router 0.100",
        "tokens/s 4,096",
        "mfu 41.0%",
        "lr 3.00e-04",
        "memory 3 GiB",
        "val loss 6.1250 at step 40, 1.5000 bits per byte",
        "a step: 2.0000 s, mean of 40",
        "forward, backward 1.5000 s 75.0%",
        "of it all-to-all 0.3000 s 15.0%",
        "experts at step 40: 12 layers, 14 dead experts; the 8 most uneven",
        "layers.5 8.00 14 12% ██··············",
        "load of the 2 EP ranks: max/mean 1.08",
        "1 1.5000 0.0000 0.2500 2 GiB",
        "collectives at step 40",
        "ep all_to_all 60 1 MiB 1.00 2.00 3.25 2 0.1250 15.0%",
        "no alarms",
    ):
        assert part in found, (part, text)
    assert "mtp loss" not in found


def test_an_alarm_row_without_its_words(folder: Path) -> None:
    MetricsLog(folder / "metrics.jsonl").write({"event": "alarm", "step": 40})
    assert "alarms: 1" in drawn(RunLog(folder))


def test_alarms_stand_below(folder: Path) -> None:
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(30, 40):
        log.event("alarm", step, kind="straggler", message=f"rank {step}", remedy="look at it")
    text = drawn(RunLog(folder))
    assert "alarms: 10, the last" in text
    assert "step 39 straggler: rank 39" in text and "rank 35" not in text
    assert "look at it" in text


def test_a_run_that_goes_on_is_read_on(folder: Path) -> None:
    run = RunLog(folder)
    assert not run.update()
    log = MetricsLog(folder / "metrics.jsonl")
    with open(log.path, "a") as file:
        file.write('{"step": 41, "lo')
    assert not run.update() and run.step == 40
    with open(log.path, "a") as file:
        file.write(f'ss": 3.5, "time": {NOW + 82}, "seconds": 2.0}}\n')
    assert run.update() and run.step == 41
    assert "loss 3.5000" in words(drawn(run))


def test_a_restart_repeats_steps_and_cuts_a_torn_line(folder: Path) -> None:
    run = RunLog(folder)
    log = MetricsLog(folder / "metrics.jsonl")
    with open(log.path, "a") as file:
        file.write('{"step": 41, "loss": 1')
    run.update()
    from types import SimpleNamespace

    log.on_fit_start(None, SimpleNamespace(finished_steps=36))
    log.write(row(37, loss=1.5))
    assert run.update()
    assert run.steps["step"][-2:].tolist() == [36, 37] and run.lost_steps == 4
    assert run.steps["loss"][-1] == 1.5 and run.events[-1]["event"] == "resumed"


def test_a_long_run_takes_eight_bytes_a_number(folder: Path) -> None:
    text = "".join(json.dumps(row(step)) + "\n" for step in range(41, 20_000))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text)
    run = RunLog(folder)
    kept = sum(values.nbytes for values in run.steps.values())
    assert run.step == 19_999 and kept == 19_999 * 8 * len(row(1))


@pytest.mark.parametrize(
    ("event", "now", "text"),
    [
        (None, NOW + 100, "running"),
        (None, NOW + 80 + 59, "running"),
        (None, NOW + 80 + 3661, "silent for 1:01:01: it validates, hangs, or was killed"),
        ({"reason": "SIGTERM"}, NOW + 9999, "stopped: SIGTERM"),
    ],
)
def test_states(folder: Path, event: dict[str, Any] | None, now: float, text: str) -> None:
    if event:
        MetricsLog(folder / "metrics.jsonl").write({"event": "stopped", "step": 40} | event)
    assert RunLog(folder).state(now) == text


def test_a_log_of_the_fewest_things(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    run = RunLog(tmp_path)
    assert words(drawn(run)) == f"{tmp_path.name} step 0 running no alarms"
    MetricsLog(tmp_path / "metrics.jsonl").write({"step": 1, "loss": float("nan"), "seconds": 0.5})
    run.update()
    assert "loss nan" in words(drawn(run))


def test_sparklines_and_strips() -> None:
    assert sparkline(np.arange(8.0), 20) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.array([0.0, 0, np.nan, 7, 7]), 2) == "▁█"
    assert sparkline(np.array([3.0, 3.0]), 5) == "▁▁" and sparkline(np.array([]), 5) == ""
    assert strip(np.array([10, 10, 10, 10]), 8) == "▄▄▄▄"
    assert strip(np.array([40, 0, 0, 0]), 8) == "█···"
    assert strip(np.array([8, 8, 16, 0]), 2) == "▄▄"
    assert strip(np.array([0, 0]), 2) == "··"


def test_the_command_prints_a_frame_into_a_pipe(folder: Path) -> None:
    for options in ([], ["--once"]):
        ran = CliRunner().invoke(app, ["monitor", str(folder), *options])
        assert ran.exit_code == 0, ran.output
        assert ran.output.startswith("tiny   step 40 / 100   silent for")
        assert "\x1b" not in ran.output


def test_live_until_the_run_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(folder / "metrics.jsonl")
    left = iter([41, 42, None])

    def sleep(seconds: float) -> None:
        assert seconds == 0.25
        step = next(left)
        log.write(row(step) if step else {"event": "stopped", "step": 42, "reason": "complete"})

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(monitor_module.time, "sleep", sleep)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    monkeypatch.setattr(monitor_module.sys, "stdout", out)
    monitor(folder, every=0.25)
    text = out.getvalue()
    assert "step 41 / 100" in text and "step 42 / 100" in text
    assert "stopped: complete" in text


@pytest.mark.parametrize("options", [{}, {"once": True}, {"web": True}])
def test_what_is_no_run_folder(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is no run folder: it has no metrics.jsonl; give the"):
        monitor(tmp_path, **options)
    with pytest.raises(UserError, match="is no run folder"):
        monitor(tmp_path / "nowhere", **options)


def test_other_mistakes(folder: Path) -> None:
    with pytest.raises(UserError, match="--every=0.01: must be at least 0.1 seconds"):
        monitor(folder, every=0.01)


# -- a run that has not begun --


def test_a_run_that_begins_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is made first; the log comes when training begins."""
    (tmp_path / "checkpoints").mkdir()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            MetricsLog(tmp_path / "metrics.jsonl").write(row(1))

    monkeypatch.setattr(monitor_module.time, "sleep", sleep)
    monitor(tmp_path, every=0.25)
    assert slept == [0.25, 0.25, 0.25]
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"waiting      for a run to begin in {tmp_path}: it has no metrics.js")
    assert last == "no alarms"


def test_waiting_ends_by_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(monitor_module.time, "sleep", interrupted)
    monitor(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_one_frame_waits_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is no run folder"):
        monitor(tmp_path, once=True)


# -- in a browser --


@contextmanager
def serving(folder: Path, every: float = 0.0) -> Iterator[ReportServer]:
    server = ReportServer(RunLog(folder), 0, every)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReportServer]:
    monkeypatch.setattr(monitor_module, "PATIENCE", 0)
    with serving(folder) as server:
        yield server


def get(
    server: ReportServer, path: str = "/", host: str | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers=headers | ({"Host": host} if host else {}))
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data, answer.headers


def news(server: ReportServer, version: str = "") -> dict[str, Any]:
    status, data, _ = get(server, f"/news?version={version}")
    assert status == 200
    found: dict[str, Any] = json.loads(data)
    return found


def test_what_is_new_is_sent_and_nothing_else(folder: Path, server: ReportServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, page, headers = get(server, host="localhost")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert len(page) < 60_000 and b'src="/plotly.js"' in page and b"connect-src 'self'" in page
    first = news(server)
    content = patched(None, first["patch"])
    assert content["title"] == "tiny" and first["state"].startswith("silent for")
    assert "loss-0" in content["figures"] and "</main>" in "".join(content["body"])
    # Nothing has happened.
    assert news(server, first["version"]).keys() == {"state"}
    # A step: points are added to what goes over steps, the rest is not sent again.
    MetricsLog(folder / "metrics.jsonl").write(row(41, time=time.time()))
    second = news(server, first["version"])
    assert second["state"] == "running"
    assert "loss-0" in second["patch"]["k"]["figures"]["k"]
    assert "lorenz-0" not in second["patch"]["k"]["figures"]["k"]
    assert len(json.dumps(second)) < 0.2 * len(json.dumps(first))
    # The page is the same as one that is opened now, and one of an unknown version is sent whole.
    whole = patched(None, news(server)["patch"])
    assert patched(content, second["patch"]) == whole
    for step in range(42, 42 + monitor_module.MOST_VERSIONS):
        MetricsLog(folder / "metrics.jsonl").write(row(step, time=time.time()))
        news(server)
    assert "=" in news(server, second["version"])["patch"]
    zipped = get(server, "/news", **{"Accept-Encoding": "gzip, br"})
    assert zipped[2]["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(zipped[1]))["state"] == "running"


def test_patches() -> None:
    """The ends of strings, arrays that grow and shrink, members that come and go, other types."""
    long = "0123456789" * 9
    values: list[Any] = [
        {"a": long + "x" + long, "b": [1, {"c": 2}, [3]], "d": 1.0},
        {"a": long + "yy" + long, "b": [1, {"c": 4}], "e": {}},
        {"a": long, "b": [1, {"c": 4}, [3], long + "z"], "d": True, "e": []},
        {"a": long + long, "b": "", "d": 1, "e": {"n": 1, "~": [], "=": 0, "-": ""}},
        [],
        None,
    ]
    for old in values:
        for new in values:
            patch = difference(old, new)
            assert (patch is None) == (old is new)
            made = patched(old, json.loads(json.dumps(patch)))
            assert json.dumps(made, sort_keys=True) == json.dumps(new, sort_keys=True)
    assert difference(values[0], values[0] | {"a": long + "y" + long}) == {
        "k": {"a": {"~": [90, 90, "y"]}}
    }


def test_the_page_is_not_made_for_every_step(folder: Path) -> None:
    with serving(folder, every=3600.0) as server:
        first = news(server)
        MetricsLog(folder / "metrics.jsonl").write(row(41, time=time.time()))
        assert news(server)["version"] == first["version"]
        assert news(server, first["version"]) == {"state": "running"}  # that is always true


def test_plotly_is_kept_by_the_browser(server: ReportServer) -> None:
    status, data, headers = get(server, "/plotly.js", **{"Accept-Encoding": "gzip"})
    assert status == 200 and headers["Cache-Control"] == "private, max-age=86400"
    assert b"plotly.js v" in gzip.decompress(data)[:100] and len(data) < 2_000_000


def test_nothing_else_is_served(server: ReportServer) -> None:
    assert get(server, "/metrics.jsonl")[0] == 404
    assert get(server, "/../../etc/passwd")[0] == 404
    # A foreign page whose name was made to lead here (DNS rebinding).
    for path in ("/", "/news", "/plotly.js"):
        assert get(server, path, host=f"evil.example:{server.server_port}")[0] == 403


def test_what_is_in_the_way_is_said(folder: Path, server: ReportServer) -> None:
    (folder / "monitor" / "experts.arrays").write_bytes(b"no log at all")
    assert "experts.arrays is damaged" in news(server)["problem"]
    (folder / "metrics.jsonl").write_text("")
    with serving(folder) as fresh:
        assert news(fresh) == {"problem": "tiny has begun; no step is logged yet"}


def test_idle_clients_block_nobody(
    server: ReportServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    idle = []
    for _ in range(3 * monitor_module.MOST_CLIENTS):
        client = socket.create_connection(("127.0.0.1", server.server_port))
        client.send(b"GET / HT")  # and never the rest
        idle.append(client)
    assert get(server)[0] == 200
    assert threading.active_count() < 2 * monitor_module.MOST_CLIENTS
    idle[0].settimeout(20)
    assert idle[0].recv(100) == b""  # the oldest were closed
    # One that goes away before its answer is no error.
    gone = socket.create_connection(("127.0.0.1", server.server_port))
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.send(b"GET /plotly.js HTTP/1.0\r\nHost: localhost\r\n\r\n")
    gone.close()
    for client in idle:
        client.close()
    assert get(server)[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_says_nothing_is_closed(
    server: ReportServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module._Handler, "timeout", 0.05)
    with socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.settimeout(20)
        assert client.recv(100) == b""


def test_a_port_that_is_taken(folder: Path, server: ReportServer) -> None:
    with pytest.raises(
        UserError, match=rf"cannot listen on 127.0.0.1:{server.server_port}: .*--port"
    ):
        monitor(folder, web=True, port=server.server_port)


def test_a_browser_follows_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws what is new, keeps what the reader has chosen, and says how the run is."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("NO CHROMIUM: the page was not opened in a browser")
    monkeypatch.setattr(monitor_module, "PATIENCE", 0)
    drawn = "document.documentElement?.dataset.state === 'drawn'"
    loss = "document.querySelector('[data-plot=loss-0]')"
    map_ = "document.querySelector('[data-plot=utilisation-0]')"
    slider = "document.querySelector('[data-panel=utilisation] input')"
    layer = "document.querySelector('.chooser select')"
    with serving(folder, every=0.02) as server, Chromium(executable, offline=False) as browser:
        browser.look(1280, 900, "light")
        browser.open(f"http://127.0.0.1:{server.server_port}/", drawn)
        assert browser.evaluate("document.title") == "tiny"
        assert browser.evaluate(f"{loss}._fullData[0].x.length") == 40
        assert browser.evaluate("document.querySelector('.state').textContent")[:6] == "silent"
        browser.evaluate(
            f"{loss}.kept = 1; {slider}.value = 0; {layer}.value = 7; scrollTo(0, 900)"
        )
        browser.evaluate(f"{slider}.dispatchEvent(new Event('input'))")
        MetricsLog(folder / "metrics.jsonl").write(row(41, time=time.time()))
        browser.wait(f"{drawn} && {loss}._fullData[0].x.length === 41")
        assert browser.evaluate(f"{loss}.kept") == 1  # the same drawing, with more in it
        assert browser.evaluate(f"{map_}._fullData[0].z.length") == 12  # and this is not sent again
        assert browser.evaluate("document.querySelector('.state').textContent") == "running"
        assert browser.evaluate(f"[{slider}.value, {layer}.value, scrollY]") == ["0", "7", 900]
        (folder / "metrics.jsonl").unlink()
        browser.wait("document.querySelector('.state').textContent.startsWith('cannot read')")
        foreign = [
            url for url in browser.requests if not url.startswith(("http://127.0.0.1:", "data:"))
        ]
        assert foreign == [] and browser.console == []
