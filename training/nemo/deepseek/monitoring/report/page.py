"""The page: panels, style, script and plotly in one HTML file that needs no network.

A content policy in the page forbids every request, so that it is true even if a library tried.
"""

from __future__ import annotations

import html
import importlib.util
import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from deepseek.config.errors import UserError
from deepseek.monitoring.report.expert_panels import expert_panels
from deepseek.monitoring.report.panel import Figure, Panel, Section
from deepseek.monitoring.report.rank_panels import rank_panels
from deepseek.monitoring.report.run_panels import (
    alarms_panel,
    comparison_panels,
    config_panel,
    environment_panel,
    events_panel,
    headline,
)
from deepseek.monitoring.report.training_panels import training_panels
from deepseek.monitoring.run_log import RunLog

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Tab:
    """One run on the page, or the comparison of all; one is shown at a time."""

    title: str
    sections: list[Section]
    subtitle: str = ""
    cards: list[tuple[str, str, str]] = field(default_factory=list)
    """Label, value, small line."""
    notes: list[str] = field(default_factory=list)


def report_page(runs: list[RunLog]) -> str:
    """The report of one run, or of several with their comparison first."""
    tabs = [_run_tab(run) for run in runs]
    if len(runs) > 1:
        sections = [Section("compare", "Comparison", comparison_panels(runs))]
        tabs.insert(0, Tab("Comparison", sections, f"{len(runs)} runs"))
        title = " / ".join(run.label for run in runs)
    else:
        title = runs[0].label
    return build_page(title, tabs)


def build_page(title: str, tabs: list[Tab]) -> str:
    """Any panels as one page.

    Raises:
        UserError: plotly is not installed.
    """
    figures: dict[str, Figure] = {}
    bodies = [_tab(tab, index, figures, len(tabs) > 1) for index, tab in enumerate(tabs)]
    picker = ""
    if len(tabs) > 1:
        options = "".join(
            f'<option value="{index}">{html.escape(tab.title)}</option>'
            for index, tab in enumerate(tabs)
        )
        picker = f'<label class="picker">show <select id="tab">{options}</select></label>'
    folder = files("deepseek.monitoring.report")
    style = folder.joinpath("page.css").read_text()
    script = folder.joinpath("page.js").read_text()
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            "<noscript><p>The figures of this page need JavaScript; the tables do not.</p>",
            "</noscript>",
            picker,
            *bodies,
            f'<script type="application/json" id="figures">{_json(figures)}</script>',
            f"<script>{_plotly()}</script>",
            f"<script>\n{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _run_tab(run: RunLog) -> Tab:
    sections = [
        Section("events", "Alarms and events", [alarms_panel(run), events_panel(run)]),
        Section("training", "Training", training_panels(run)),
        Section("experts", "Experts", expert_panels(run.experts)),
        Section("ranks", "Ranks and communication", rank_panels(run)),
        Section("record", "Record", [environment_panel(run), config_panel(run)]),
    ]
    for panel in (panel for section in sections for panel in section.panels):
        _set_range(panel, run)
    words = f"{run.folder.resolve().name}, {run.state()}"
    return Tab(run.label, sections, words, headline(run), run.notes)


def _set_range(panel: Panel, run: RunLog) -> None:
    """All figures over steps show the same steps."""
    if panel.figure is None or panel.figure["layout"]["xaxis"]["title"]["text"] != "step":
        return
    first, last = (float(run.steps["step"][end]) for end in (0, -1))
    room = 0.01 * max(last - first, 1.0)
    panel.figure["layout"]["xaxis"].setdefault("range", [first - room, last + room])


def _tab(tab: Tab, index: int, figures: dict[str, Figure], several: bool) -> str:
    cards = "".join(
        f'<div class="card"><dt>{html.escape(label)}</dt><dd>{html.escape(value)}'
        f"<small>{html.escape(below)}</small></dd></div>"
        for label, value, below in tab.cards
    )
    links = "".join(
        f'<a href="#{section.key}-{index}">{html.escape(section.title)}</a>'
        for section in tab.sections
    )
    notes = "".join(f'<p class="damage">{html.escape(note)}</p>' for note in tab.notes)
    sections = "".join(_section(section, index, figures) for section in tab.sections)
    hidden = " hidden" if several and index else ""
    return (
        f'<main class="tab" data-tab="{index}"{hidden}>'
        f"<header><h1>{html.escape(tab.title)}</h1><p>{html.escape(tab.subtitle)}</p></header>"
        f"{notes}"
        + (f'<dl class="cards">{cards}</dl>' if cards else "")
        + (f"<nav>{links}</nav>" if len(tab.sections) > 1 else "")
        + f"{sections}</main>"
    )


def _section(section: Section, index: int, figures: dict[str, Figure]) -> str:
    panels = "".join(_panel(panel, index, figures) for panel in section.panels)
    chooser = ""
    named = next((p.figure for p in section.panels if p.figure and "layers" in p.figure), None)
    if named:
        first = named["layers"]["first"]
        options = "".join(
            f'<option value="{number}"{" selected" if number == first else ""}>'
            f"{html.escape(name)}</option>"
            for number, name in enumerate(named["layers"]["names"])
        )
        chooser = f'<label class="chooser">layer drawn alone <select>{options}</select></label>'
    return (
        f'<section id="{section.key}-{index}"><h2>{html.escape(section.title)}</h2>{chooser}'
        f'<div class="panels">{panels}</div></section>'
    )


def _panel(panel: Panel, index: int, figures: dict[str, Figure]) -> str:
    key = f"{panel.key}-{index}"
    inner = f'<p class="note">{html.escape(panel.note)}</p>' if panel.note else ""
    if panel.missing:
        inner += f'<p class="missing">{html.escape(panel.missing)}</p>'
    if panel.figure is not None:
        figures[key] = panel.figure
        if "frames" in panel.figure:
            last = len(panel.figure["frames"]["steps"]) - 1
            inner += (
                '<div class="scrub"><button type="button" aria-label="play">&#9654;</button>'
                f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step">'
                "<output></output></div>"
            )
        height = panel.figure["layout"]["height"]
        inner += f'<div class="plot" data-plot="{key}" style="min-height:{height}px"></div>'
    wide = " wide" if panel.wide else ""
    return (
        f'<article class="panel{wide}" data-panel="{panel.key}">'
        f"<h3>{html.escape(panel.title)}</h3>{inner}{panel.body}</article>"
    )


def _json(figures: dict[str, Figure]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(figures, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def plotly_script() -> Path:
    """The file of the library that draws.

    Raises:
        UserError: plotly is not installed.
    """
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise UserError("a report is drawn by plotly, which is not installed: pip install plotly")
    return Path(spec.origin).with_name("package_data") / "plotly.min.js"


def _plotly() -> str:
    return plotly_script().read_text(encoding="utf-8").replace("</script", "<\\/script")
