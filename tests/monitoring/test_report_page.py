"""The report in a real headless Chromium: whole, silent, offline, readable, and fast enough.

Without a browser these tests are skipped, and the summary says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek.commands.report import report
from support.chromium import Chromium, find_chromium
from support.synthetic_run import SyntheticRun, write_run

DRAWN = "document.documentElement?.dataset.state === 'drawn'"
PLOTS = "[...document.querySelectorAll('.tab:not([hidden]) .plot')]"
EXECUTABLE = find_chromium()

browser_only = pytest.mark.skipif(
    EXECUTABLE is None,
    reason="NO CHROMIUM: the report was not looked at in a browser (apt-get install chromium)",
)

PANELS = {
    "alarms", "events", "loss", "bits", "norms", "lr", "speed", "mfu", "balance", "step-time",
    "utilisation", "variation", "max_violation", "entropy", "dead", "starved", "lorenz",
    "dead-since", "bias", "bias-range", "bias-extremes", "bias-turns", "margin", "rows",
    "memory-phases", "rank-load", "imbalance", "what-if", "compute", "waiting", "traffic",
    "memory", "collectives", "environment", "config",
}  # fmt: skip
EVIL = """</script><script>window.evil = 1</script><img src=x onerror="window.evil = 2">"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    assert EXECUTABLE is not None
    with Chromium(EXECUTABLE) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = SyntheticRun(
        steps=120, layers=12, experts=32, collapsed_layer=9, straggler=3, restart_at=80
    )
    folder = write_run(tmp_path_factory.mktemp("runs") / "one", run)
    return report([folder], folder / "report.html")


@pytest.fixture(scope="module")
def big_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 steps of 58 layers x 256 experts on 64 ranks, experts logged every fifth step: the
    page of every step is as large and as slow, the log five times as large."""
    run = SyntheticRun(
        steps=10_000, layers=58, experts=256, top_k=8, ranks=64, tokens=1 << 22, ranks_per_node=8,
        log_every=5,
    )  # fmt: skip
    folder = write_run(tmp_path_factory.mktemp("runs") / "big", run)
    return report([folder], folder / "report.html")


def look(browser: Chromium, page: Path, width: int, scheme: str) -> None:
    """Open the page at this width, with nothing remembered of earlier pages."""
    browser.console.clear()
    browser.requests.clear()
    browser.look(width, 900, scheme, phone=width < 600)
    browser.open(page, DRAWN, 240)


@browser_only
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 390])
def test_the_page_is_whole_silent_and_offline(
    browser: Chromium, page: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    look(browser, page, width, scheme)
    assert browser.console == []
    assert {r.split(":")[0] for r in browser.requests} <= {"file", "data", "blob"}
    assert [r for r in browser.requests if r.startswith("file:")] == [page.resolve().as_uri()]
    panels = browser.evaluate("[...document.querySelectorAll('.panel')].map(p => p.dataset.panel)")
    assert set(panels) == PANELS
    assert browser.evaluate("document.querySelectorAll('.missing').length") == 0
    empty = browser.evaluate(f"{PLOTS}.filter(p => !p.querySelector('.main-svg')).length")
    assert empty == 0
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    wider = browser.evaluate(
        "[...document.querySelectorAll('.plot, .panel, .card')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wider == 0
    back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(17, 20, 26)") == (scheme == "dark")
    ink = browser.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert (ink == "rgb(228, 232, 239)") == (scheme == "dark")
    picture = tmp_path / "page.png"
    browser.screenshot(picture)
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000


@browser_only
def test_every_axis_has_a_title(browser: Chromium, page: Path) -> None:
    look(browser, page, 1360, "light")
    for axis in ("xtitle", "ytitle"):
        bare = browser.evaluate(
            f"{PLOTS}.filter(p => !p.querySelector('.{axis}')?.textContent.trim())"
            ".map(p => p.dataset.plot)"
        )
        assert bare == [], axis


@browser_only
def test_legends_and_tick_labels_do_not_overlap(browser: Chromium, page: Path) -> None:
    boxes = """
        (selector) => [...document.querySelectorAll('.plot')].flatMap((plot) => {
          const found = [...plot.querySelectorAll(selector)].map((e) => e.getBoundingClientRect());
          return found.flatMap((a, i) => found.slice(i + 1).filter((b) =>
            Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3
          ).map(() => plot.dataset.plot));
        })"""
    for width in (1360, 390):
        look(browser, page, width, "light")
        for kind in (".legendtext", ".xtick text", ".ytick text"):
            assert browser.evaluate(f"({boxes})('{kind}')") == [], (width, kind)
        gaps = browser.evaluate(
            f"{PLOTS}.map(p => p.querySelector('.xtitle').getBoundingClientRect().top - Math.max("
            "...[...p.querySelectorAll('.xtick text')].map(t => t.getBoundingClientRect().bottom)))"
        )
        assert min(gaps) > 0, (width, gaps)


@browser_only
def test_the_slider_shows_the_step_it_names(browser: Chromium, page: Path) -> None:
    look(browser, page, 1360, "light")
    set_slider = (
        "(() => { const r = document.querySelector('[data-panel=utilisation] input');"
        "r.value = %d; r.dispatchEvent(new Event('input')); })()"
    )
    at = "document.querySelector('[data-panel=utilisation] %s')"
    dead_in_row = (at % ".plot") + ".data[0].customdata[9].filter(v => v === 0).length"
    assert browser.evaluate((at % "output") + ".textContent") == "step 120"
    assert browser.evaluate(dead_in_row) == 28  # the collapsed layer: 4 of 32 have tokens
    browser.evaluate(set_slider % 0)
    browser.wait(f"{dead_in_row} === 0", 60)
    assert browser.evaluate((at % "output") + ".textContent") == "step 1"
    names = browser.evaluate((at % ".plot") + ".data[0].y")
    assert names == [*(f"layers.{n}" for n in range(1, 12)), "mtp.0.block"]  # 10 after 9


@browser_only
def test_the_chosen_layer_is_drawn(browser: Chromium, page: Path) -> None:
    look(browser, page, 1360, "light")
    trace = "document.querySelector('[data-plot^=max_violation]').data[3]"
    assert browser.evaluate(f"{trace}.name") == "layers.10"  # the collapsed one comes first
    assert browser.evaluate(f"{trace}.y[{trace}.y.length - 1]") == pytest.approx(7.0, rel=0.01)
    browser.evaluate(
        "(() => { const s = document.querySelector('.chooser select');"
        "s.value = 0; s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.evaluate(f"{trace}.name") == "layers.1"
    assert browser.evaluate(f"{trace}.y[{trace}.y.length - 1]") < 1


@browser_only
def test_a_change_of_theme_redraws(browser: Chromium, page: Path) -> None:
    look(browser, page, 1360, "light")
    browser.look(1360, 900, "dark")
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    browser.wait(f"{ink} === 'rgb(228, 232, 239)'", 120)
    assert browser.console == []


@browser_only
def test_several_runs_are_compared(browser: Chromium, tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", SyntheticRun(steps=20, name="first", lr=3e-4))
    second = SyntheticRun(steps=20, name=EVIL, lr=1e-3, with_monitor=False)
    folders = [first, write_run(tmp_path / "b", second)]
    page = report(folders, tmp_path / "both.html")
    look(browser, page, 1360, "light")
    assert browser.console == []
    assert browser.evaluate("window.evil") is None
    names = "document.querySelector('[data-plot^=compare-training]').data.length"
    assert browser.evaluate(names) == 2
    rows = "[...document.querySelectorAll('[data-panel=compare-settings] tbody tr')]"
    cells = browser.evaluate(rows + ".map(r => [...r.cells].map(c => c.textContent))")
    assert ["model.optim.lr", "0.0003", "0.001"] in cells
    assert {row[0] for row in cells} == {"name", "model.optim.lr"}
    options = "[...document.getElementById('tab').options].map(o => o.textContent)"
    assert browser.evaluate(options)[:2] == ["Comparison", "first"]
    browser.evaluate(
        "(() => { const s = document.getElementById('tab'); s.value = 2;"
        "s.dispatchEvent(new Event('change')); })()"
    )
    browser.wait(DRAWN, 120)
    assert browser.evaluate(f"{PLOTS}.every(p => p.dataset.drawn)")
    missing = browser.evaluate(
        "[...document.querySelectorAll('.tab:not([hidden]) .missing')].map(p => p.textContent)"
    )
    assert "The log has no monitor/experts.arrays: the experts were not monitored." in missing
    assert "The log has no monitor/ranks.arrays: the ranks were not monitored." in missing


@browser_only
def test_a_hostile_name_is_only_text(browser: Chromium, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", SyntheticRun(steps=20, name=EVIL, collapsed_layer=1))
    (folder / "environment.json").write_text('{"command": "</script><b>bold</b>"}')
    log = folder / "metrics.jsonl"
    alarm = '{"event": "alarm", "step": 9, "kind": "<i>x</i>", "message": "</script><i>m</i>"}\n'
    log.write_text(log.read_text() + alarm)
    page = report([folder], tmp_path / "page.html")
    look(browser, page, 1360, "light")
    assert browser.console == []
    assert browser.evaluate("window.evil") is None
    assert browser.evaluate("document.title") == EVIL
    assert browser.evaluate("document.querySelector('h1').textContent") == EVIL
    assert browser.evaluate("document.querySelectorAll('i, b, main img').length") == 0


@browser_only
def test_the_largest_report_is_small_and_opens_fast(
    browser: Chromium, big_page: Path, record_property: pytest.RecordProperty
) -> None:
    """Under 15 MB; every figure drawn in 3 s of the browser's own time.

    The clock on the wall is noted and not asked: it measures the neighbours as well.
    """
    megabytes = big_page.stat().st_size / 1e6
    assert megabytes < 15
    browser.call("Performance.enable", timeDomain="threadTicks")
    walls, own = [], []
    for _ in range(3):
        browser.console.clear()
        browser.look(1360, 900, "light")
        walls.append(browser.open(big_page, DRAWN, 240))
        own.append(_task_seconds(browser))
        time.sleep(0.2)
    assert browser.console == []
    record_property("megabytes", megabytes)
    record_property("wall_seconds", min(walls))
    record_property("own_seconds", min(own))
    print(f"{megabytes:.1f} MB, {min(walls):.2f} s on the wall, {min(own):.2f} s of its own")
    assert min(own) < 3, (own, walls)


def _task_seconds(browser: Chromium) -> float:
    """Seconds the main thread of the page's process has worked, earlier pages included."""
    metrics = browser.call("Performance.getMetrics")["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))


def test_the_page_names_no_outside_address_of_its_own(page: Path) -> None:
    """What plotly's code mentions is stopped by the page's policy, which must be there."""
    text = page.read_text()
    head = text[: text.index("<script>")]
    assert "default-src 'none'" in head and "connect-src" not in head
    assert "http://" not in head and "https://" not in head
