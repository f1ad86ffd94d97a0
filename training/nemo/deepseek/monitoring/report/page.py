"""The page: panels, style, script and plotly in one HTML file that needs no network.

A content policy in the page forbids every request, so that it is true even if a library tried. A
page that a server keeps up to date may ask that server alone, and gets what is new.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from deepseek.config.errors import UserError
from deepseek.monitoring.report.expert_panels import expert_panels
from deepseek.monitoring.report.panel import Figure, Panel, Section
from deepseek.monitoring.report.rank_panels import rank_panels
from deepseek.monitoring.report.run_panels import (
    Card,
    alarms_panel,
    comparison_panels,
    config_panel,
    data_panel,
    environment_panel,
    evaluations_panel,
    events_panel,
    headline,
    last_row,
    samples_panel,
)
from deepseek.monitoring.report.training_panels import loss_panels, training_panels
from deepseek.monitoring.run_log import RunLog

POLICY = (
    "default-src 'none'; script-src {} 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)
PLOTLY_PATH = "/plotly.js"
"""Where a server has the library."""


@dataclass(frozen=True)
class Tab:
    """One run on the page, or the comparison of all; one is shown at a time."""

    title: str
    sections: list[Section]
    subtitle: str = ""
    state: str = ""
    """Of the run; a page that is kept up to date changes it."""
    cards: list[Card] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Page:
    """Any panels as one page.

    Args:
        title: of the window.
        tabs: of which the first is shown at first.

    Attributes:
        figures: what is drawn, by the name of its place.
    """

    def __init__(self, title: str, tabs: list[Tab]) -> None:
        self.title = title
        self.figures: dict[str, Figure] = {}
        bodies = [_tab(tab, index, self.figures, len(tabs) > 1) for index, tab in enumerate(tabs)]
        if len(tabs) > 1:
            options = "".join(
                f'<option value="{index}">{html.escape(tab.title)}</option>'
                for index, tab in enumerate(tabs)
            )
            picker = f'<label class="picker">show <select id="tab">{options}</select></label>'
            bodies.insert(0, picker)
        # Half of a surrogate pair, which a log may hold, is no UTF-8.
        self._body = "\n".join(bodies).encode(errors="replace").decode()

    def whole(self) -> str:
        """One file with everything in it.

        Raises:
            UserError: plotly is not installed.
        """
        data = f'<script type="application/json" id="figures">{_json(self.figures)}</script>'
        library = f"<script>{plotly_script()}</script>"
        return _document(self.title, POLICY.format(""), self._body, data + library)

    def content(self) -> dict[str, Any]:
        """What a page shows that a server keeps up to date; as JSON, so that it can be compared."""
        pieces = re.split("(?=<article|</section)", self._body)
        return {"title": self.title, "body": pieces, "figures": self.figures}


def shell(seconds: float) -> str:
    """A page that asks its server for the content, again and again.

    Args:
        seconds: between two questions.
    """
    policy = POLICY.format("'self'") + "; connect-src 'self'"
    data = f'<script type="application/json" id="figures" data-every="{seconds:g}">{{}}</script>'
    return _document("", policy, "", data + f'<script src="{PLOTLY_PATH}"></script>')


def run_page(runs: list[RunLog]) -> Page:
    """The report of one run, or of several with their comparison first."""
    tabs = [_run_tab(run) for run in runs]
    if len(runs) > 1:
        sections = [Section("compare", "Comparison", comparison_panels(runs))]
        tabs.insert(0, Tab("Comparison", sections, f"{len(runs)} runs"))
    return Page(" / ".join(run.label for run in runs), tabs)


def plotly_script() -> str:
    """The library that draws, as it may stand in a script element.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        message = "a report is drawn by plotly, which is not installed: pip install plotly"
        raise UserError(message) from None

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _run_tab(run: RunLog) -> Tab:
    evaluations = evaluations_panel(run)
    losses = [*loss_panels(run), samples_panel(run), *([evaluations] if evaluations else [])]
    sections = [
        Section("loss", "Loss", losses),
        Section("events", "Alarms and events", [alarms_panel(run), events_panel(run)]),
        Section("training", "Training", training_panels(run)),
        Section("experts", "Experts", expert_panels(run.experts)),
        Section("ranks", "Ranks and communication", rank_panels(run)),
        Section("record", "Record", [data_panel(run), environment_panel(run), config_panel(run)]),
    ]
    for panel in (panel for section in sections for panel in section.panels):
        _set_range(panel, run)
    words = ", ".join(filter(None, [run.folder.resolve().name, last_row(run)]))
    return Tab(run.label, sections, words, run.state(), headline(run), run.notes)


def _set_range(panel: Panel, run: RunLog) -> None:
    """All figures over steps show the same steps."""
    if (
        panel.figure is None
        or not run.steps
        or panel.figure["layout"]["xaxis"]["title"]["text"] != "step"
    ):
        return
    first, last = (float(run.steps["step"][end]) for end in (0, -1))
    room = 0.01 * max(last - first, 1.0)
    panel.figure["layout"]["xaxis"].setdefault("range", [first - room, last + room])


def _document(title: str, policy: str, body: str, scripts: str) -> str:
    folder = files("deepseek.monitoring.report")
    style = folder.joinpath("page.css").read_text()
    script = folder.joinpath("page.js").read_text()
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<noscript><p>The figures of this page need JavaScript; the tables do not.</p></noscript>
<div id="tabs">
{body}
</div>
{scripts}
<script>
{script}</script>
</body>
</html>
"""


def _tab(tab: Tab, index: int, figures: dict[str, Figure], several: bool) -> str:
    shown = [
        Section(section.key, section.title, [p for p in section.panels if not p.missing])
        for section in tab.sections
    ]
    shown = [Section(one.key, one.title, _filled(one.panels)) for one in shown if one.panels]
    cards = "".join(
        f'<div class="card{" warn" if card.is_warning else ""}"><dt>{html.escape(card.label)}</dt>'
        f"<dd>{html.escape(card.value)}<small>{html.escape(card.below)}</small></dd></div>"
        for card in tab.cards
    )
    links = "".join(
        f'<a href="#{section.key}-{index}">{html.escape(section.title)}</a>' for section in shown
    )
    state = f'<b class="state">{html.escape(tab.state)}</b> ' if tab.state else ""
    parts = [
        f'<main class="tab" data-tab="{index}"{" hidden" if several and index else ""}>',
        f"<header><h1>{html.escape(tab.title)}</h1>"
        f"<p>{state}{html.escape(tab.subtitle)}</p></header>",
        *(f'<p class="damage">{html.escape(note)}</p>' for note in tab.notes),
        f'<dl class="cards">{cards}</dl>' if cards else "",
        f"<nav>{links}</nav>" if len(shown) > 1 else "",
        *(_section(section, index, figures) for section in shown),
        _missing([panel for section in tab.sections for panel in section.panels if panel.missing]),
        "</main>",
    ]
    return "".join(parts)


def _filled(panels: list[Panel]) -> list[Panel]:
    """The same; a panel that would leave half of its row empty takes the whole."""
    filled, is_second = [], False
    for panel, following in zip(panels, [*panels[1:], None], strict=True):
        alone = not is_second and (following is None or following.wide)
        filled.append(replace(panel, wide=panel.wide or alone))
        is_second = not filled[-1].wide and not is_second
    return filled


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
    if panel.figure is not None:
        figures[key] = panel.figure
        if "frames" in panel.figure:
            frames = panel.figure["frames"]
            last, at = len(frames["names"]) - 1, frames.get("first", len(frames["names"]) - 1)
            inner += (
                '<div class="scrub"><button type="button" aria-label="play">&#9654;</button>'
                f'<input type="range" min="0" max="{last}" value="{at}" aria-label="step">'
                "<output></output></div>"
            )
        height = panel.figure["layout"]["height"]
        inner += f'<div class="plot" data-plot="{key}" style="min-height:{height}px"></div>'
    wide = " wide" if panel.wide else ""
    return (
        f'<article class="panel{wide}" data-panel="{panel.key}">'
        f"<h3>{html.escape(panel.title)}</h3>{inner}{panel.body}</article>"
    )


def _missing(panels: list[Panel]) -> str:
    """What is not on the page, and why, in one line that opens."""
    if not panels:
        return ""
    rows = "".join(
        f'<dt>{html.escape(panel.title)}</dt><dd class="missing">{html.escape(panel.missing)}</dd>'
        for panel in panels
    )
    some = f"{len(panels)} figure{'s' if len(panels) > 1 else ''}"
    summary = f"<summary>Not shown, for want of numbers: {some}</summary>"
    return f"<details>{summary}<dl>{rows}</dl></details>"


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
